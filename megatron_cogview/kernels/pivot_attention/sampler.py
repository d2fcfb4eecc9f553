"""Stateless choice of pivots: a function of (seed, layer, sample), equal wherever it is computed.

No random state is read or advanced, so tensor-parallel ranks, pipeline stages, recomputation,
resumed runs and generation all find the same pivots without talking to each other (P-ATT-2, 7).
"""

import torch

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_NEVER = 1 << 62  # above every draw
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift; torch's int64 shift is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The signed 64-bit integer that ``value`` wraps around to."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Finaliser of splitmix64, on int64 that wraps around."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
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
    sample_B1, text_B1 = pivot_key_B2[:, :1], pivot_key_B2[:, 1:]
    position_1K = torch.arange(num_keys, device=pivot_key_B2.device)[None]
    key_B1 = _mix(_mix(sample_B1 + _signed(seed * _GOLDEN)) + _signed(layer_number * _GOLDEN))
    # 31 random bits, with the position below them: distinct, so that the choice is unique.
    draw_BK = (_shift_right(_mix(key_B1 + position_1K * _GOLDEN), 33) << 31) + position_1K
    text_BK = position_1K < text_B1
    draw_BK = draw_BK.masked_fill(text_BK, -1)
    if padding_B2 is not None:
        padding_BK = in_padding(padding_B2, num_keys)
        text_BK, draw_BK = text_BK & ~padding_BK, draw_BK.masked_fill(padding_BK, _NEVER)
    places = min(num_pivots, num_keys)
    if places == 0:
        return text_BK
    threshold_B1 = draw_BK.kthvalue(places, dim=-1, keepdim=True).values
    return text_BK | (draw_BK <= threshold_B1) & (draw_BK < _NEVER)
