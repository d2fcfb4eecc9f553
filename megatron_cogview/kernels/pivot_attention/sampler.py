"""Stateless choice of pivots: a function of (seed, layer, sample), equal wherever it is computed.

No random state is read or advanced, so tensor-parallel ranks, pipeline stages, recomputation,
resumed runs and generation all find the same pivots without talking to each other (P-ATT-2, 7).
"""

import torch

# Signed 64-bit integers of 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9 and 0x94D049BB133111EB.
GOLDEN = -7046029254386353131
MIX_1 = -4658895280553007687
MIX_2 = -7723592293110705685
NEVER = 1 << 62
"""Above every draw."""


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift; torch's int64 shift is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The signed 64-bit integer that ``value`` wraps around to."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Finaliser of splitmix64, on int64 that wraps around."""
    x = (x ^ _shift_right(x, 30)) * MIX_1
    x = (x ^ _shift_right(x, 27)) * MIX_2
    return x ^ _shift_right(x, 31)


def in_padding(padding_B2: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Boolean ``[B, num_keys]``: positions from ``padding_B2[:, 0]`` up to ``padding_B2[:, 1]``."""
    position_1K = torch.arange(num_keys, device=padding_B2.device)[None]
    return (position_1K >= padding_B2[:, :1]) & (position_1K < padding_B2[:, 1:])


def pivot_mask(
    pivot_key_B2: torch.Tensor,
    num_keys: int,
    num_pivots: int,
    layer_number: int,
    seed: int,
    padding_B2: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which positions are text or pivots.

    Args:
        pivot_key_B2: int64, per sample its number in the run and its count of text-region tokens.
        num_keys: positions to choose from.
        num_pivots: text tokens and pivots together (P); all text counts even when it is more.
        layer_number: global number of the layer; pivots are drawn anew at each (P-ATT-2).
        seed: key of the sampler.
        padding_B2: int64, first position of each sample's padding and the one after its last;
            neither text nor pivot, and it takes no place.

    Returns:
        Boolean ``[B, num_keys]``.  The choice for a position does not depend on ``num_keys``
        beyond the competition for places, see :func:`visible_keys` for decoding.
    """
    return chosen(draws(pivot_key_B2, num_keys, layer_number, seed, padding_B2), num_pivots)


def draws(
    pivot_key_B2: torch.Tensor,
    num_keys: int,
    layer_number: int,
    seed: int,
    padding_B2: torch.Tensor | None = None,
) -> torch.Tensor:
    """The number that each position draws, int64 ``[B, num_keys]``; the smallest win.

    Text has -1 and padding :data:`NEVER`; the others are distinct and lie between.  Arguments as of
    :func:`pivot_mask`.
    """
    sample_B1, text_B1 = pivot_key_B2[:, :1], pivot_key_B2[:, 1:]
    position_1K = torch.arange(num_keys, device=pivot_key_B2.device)[None]
    seed_term, layer_term = key_terms(seed, layer_number)
    key_B1 = _mix(_mix(sample_B1 + seed_term) + layer_term)
    # 31 random bits, with the position below them: distinct, so that the choice is unique.
    draw_BK = (_shift_right(_mix(key_B1 + position_1K * GOLDEN), 33) << 31) + position_1K
    draw_BK = draw_BK.masked_fill(position_1K < text_B1, -1)
    if padding_B2 is not None:
        draw_BK = draw_BK.masked_fill(in_padding(padding_B2, num_keys), NEVER)
    return draw_BK


def key_terms(seed: int, layer_number: int) -> tuple[int, int]:
    """What seed and layer add to a key, as signed 64-bit integers."""
    return _signed(seed * GOLDEN), _signed(layer_number * GOLDEN)


def chosen(draw_BK: torch.Tensor, num_pivots: int) -> torch.Tensor:
    """Text, and the smallest draws up to ``num_pivots`` with it: boolean ``[B, num_keys]``."""
    places = min(num_pivots, draw_BK.shape[1])
    if places == 0:
        return draw_BK < 0
    threshold_B1 = draw_BK.kthvalue(places, dim=-1, keepdim=True).values
    return draw_BK <= threshold_B1.clamp(max=NEVER - 1)
