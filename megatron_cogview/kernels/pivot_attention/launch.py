"""How the kernels are started: tile sizes, memory for results, and the arguments they share.

Needs no Triton.

Shapes: B batch, N heads of this rank, S queries, K keys, D head dim.
"""

import math
from typing import Any, NamedTuple

import torch

from megatron_cogview.kernels.dispatch import is_interpreted
from megatron_cogview.kernels.philox import drop_threshold
from megatron_cogview.kernels.pivot_attention.plan import Plan
from megatron_cogview.kernels.tuning import tuned

_LOG2_E = math.log2(math.e)


class Settings(NamedTuple):
    """What a call fixes for all its kernels."""

    window_block: int
    window_blocks: int
    pivot_bias: float
    dropout: float
    seed: int
    batch_offset: int
    head_offset: int


class Launch(NamedTuple):
    """How a kernel is started."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


INTERPRETED = Launch(16, 16, 1, 1)
"""Small, so that short sequences have several tiles."""

_NARROW = {
    "forward": Launch(128, 64, 8, 3),
    "query_gradient": Launch(64, 64, 4, 3),
    "slot_gradient": Launch(64, 64, 4, 2),
    "key_gradient": Launch(64, 64, 4, 2),
}
_DROPPED = {
    "forward": Launch(128, 64, 8, 3),
    "query_gradient": Launch(64, 32, 4, 3),
    "slot_gradient": Launch(32, 64, 4, 1),
    "key_gradient": Launch(32, 64, 4, 1),
}
_WIDE = {
    "forward": Launch(64, 64, 8, 2),
    "query_gradient": Launch(64, 32, 8, 2),
    "slot_gradient": Launch(32, 64, 8, 1),
    "key_gradient": Launch(32, 64, 8, 1),
}
_PADDED = Launch(64, 32, 4, 3)
"""Of the query gradient, which spills at the usual sizes where padding is masked too."""
FEW_QUERIES = Launch(16, 128, 4, 3)
"""Of the forward for up to 16 queries, in decoding.  A product has at least 16 rows."""
_FULL = Launch(32, 32, 8, 1)
"""fp32, which has no tensor cores here."""
MOST_SHARED_BYTES = {
    "forward": (65536, 73728),
    "query_gradient": (65536, 43008),
    "slot_gradient": (49664, 26624),
    "key_gradient": (49664, 26624),
    "decoding": (73728, 73728),
}
"""Of a block with heads of up to 64, without and with dropout, as compiled."""
_KEY_CANDIDATES = (
    Launch(64, 64, 4, 2),
    Launch(64, 64, 4, 3),
    Launch(32, 64, 4, 2),
    Launch(32, 64, 4, 1),
    Launch(64, 64, 8, 2),
    Launch(64, 128, 8, 2),
)
CANDIDATES = {
    "forward": (
        Launch(128, 64, 4, 3),
        Launch(128, 64, 8, 3),
        Launch(128, 128, 8, 3),
        Launch(64, 64, 4, 3),
        Launch(64, 64, 8, 2),
        Launch(128, 32, 4, 4),
    ),
    "query_gradient": (
        Launch(64, 64, 4, 3),
        Launch(64, 64, 4, 2),
        Launch(64, 32, 4, 3),
        Launch(64, 128, 8, 2),
        Launch(128, 64, 8, 3),
        Launch(128, 64, 8, 2),
    ),
    "slot_gradient": _KEY_CANDIDATES,
    "key_gradient": _KEY_CANDIDATES,
    "decoding": (
        Launch(16, 128, 4, 3),
        Launch(16, 128, 4, 2),
        Launch(16, 64, 4, 3),
        Launch(16, 128, 8, 2),
        Launch(16, 32, 4, 4),
    ),
}
"""What the tuner tries of each kernel besides its fixed sizes."""
_ENOUGH_PROGRAMS = 1024
"""Several for each multiprocessor of a large GPU."""
_MOST_PARTS = 16
"""Each has packed gradients of its own."""


def launch(
    direction: str,
    q_BNSD: torch.Tensor,
    dropped: bool,
    padded: bool,
    dense: bool,
) -> Launch:
    """Tile sizes of a kernel.  README.md has what the compiler makes of the fixed ones.

    Args:
        direction: ``forward``, ``query_gradient``, ``slot_gradient`` or ``key_gradient``.
        q_BNSD: queries; their shape and dtype count.  D is at most 128.
        dropped: whether weights are dropped; drawing takes registers.
        padded: whether there is padding to be masked.
        dense: whether the window covers everything.
    """
    num_queries, head_dim = q_BNSD.shape[2:]
    if q_BNSD.dtype == torch.float32 and not is_interpreted():
        return _FULL
    is_few = direction == "forward" and num_queries <= FEW_QUERIES.queries and head_dim <= 64
    if is_interpreted():
        fixed = INTERPRETED
    elif is_few:
        fixed = FEW_QUERIES
    elif direction == "query_gradient" and padded and not dropped and head_dim <= 64:
        fixed = _PADDED
    else:
        fixed = (_WIDE if head_dim > 64 else _DROPPED if dropped else _NARROW)[direction]
    # In a file of measured sizes, for instance, pivot_attention.forward.D64.dropout.
    variant = ".dense" * dense + ".dropout" * dropped + ".padded" * padded
    name = f"{'decoding' if is_few else direction}.D{head_dim}{variant}"
    return Launch(*tuned(f"pivot_attention.{name}", fixed))


def unwritten(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory for a kernel to fill.  Tests put NaN into it."""
    return torch.empty(shape, dtype=dtype, device=device)


def sequence_first(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``[B, N, S, D]`` to be filled, lying in memory as ``[S, B, N, D]``."""
    batch, heads, length, head_dim = shape
    return unwritten((length, batch, heads, head_dim), dtype, device).permute(1, 2, 0, 3)


def as_sequence_first(x_BNSD: torch.Tensor) -> torch.Tensor:
    """The same values, lying in memory as ``[S, B, N, D]``; copied only if they do not."""
    return x_BNSD.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)


def readable(
    q_BNSD: torch.Tensor, k_BNKD: torch.Tensor, v_BNKD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values as the kernels read them, which copies only unusual layouts.

    Any strides will do if a row's numbers lie side by side, and those of keys and values agree.
    """
    if q_BNSD.stride(-1) != 1:
        q_BNSD = as_sequence_first(q_BNSD)
    if k_BNKD.stride() != v_BNKD.stride() or k_BNKD.stride(-1) != 1:
        k_BNKD, v_BNKD = as_sequence_first(k_BNKD), as_sequence_first(v_BNKD)
    return q_BNSD, k_BNKD, v_BNKD


def arguments(
    q_BNSD: torch.Tensor,
    k_BNKD: torch.Tensor,
    plan: Plan,
    padding_B2: torch.Tensor | None,
    settings: Settings,
    sizes: Launch,
) -> dict[str, Any]:
    """What all kernels are given besides their tensors."""
    batch, heads, num_queries, head_dim = q_BNSD.shape
    q_b, q_n, q_s, _ = q_BNSD.stride()
    k_b, k_n, k_s, _ = k_BNKD.stride()
    dropped = settings.dropout > 0
    return {
        "padding": padding_B2,
        **{"q_b": q_b, "q_n": q_n, "q_s": q_s, "k_b": k_b, "k_n": k_n, "k_s": k_s},
        **{"num_samples": batch, "num_heads": heads, "num_queries": num_queries},
        **{"num_keys": k_BNKD.shape[2], "num_slots": plan.slots_BP.shape[1]},
        "total_length": plan.slot_of_key_BL.shape[1],
        "scale": head_dim**-0.5 * _LOG2_E,
        "bias": settings.pivot_bias * _LOG2_E,
        "seed": settings.seed,
        "threshold": drop_threshold(settings.dropout) if dropped else 0,
        "keep_scale": 1 / (1 - settings.dropout),
        "batch_offset": settings.batch_offset,
        "head_offset": settings.head_offset,
        "WINDOW": settings.window_block,
        "BLOCKS": settings.window_blocks,
        "SLOTS": plan.slots_BP.shape[1] > 0,
        "PADDED": padding_B2 is not None,
        "DROPPED": dropped,
        **{"BM": sizes.queries, "BN": sizes.keys},
        **{"D": head_dim, "BLOCK_D": max(16, 1 << (head_dim - 1).bit_length())},
        **{"num_warps": sizes.num_warps, "num_stages": sizes.num_stages},
    }


def num_tiles(length: int, tile: int) -> int:
    """Tiles that cover a length."""
    return -(-length // tile)


def num_query_tiles(num_queries: int, num_keys: int, tile: int) -> int:
    """Tiles with a query in them, counted from the start of the sequence."""
    return num_tiles(num_keys, tile) - (num_keys - num_queries) // tile


def num_parts(programs: int, query_tiles: int) -> int:
    """Parts of the queries in the slot gradient.

    A tensor-parallel rank may have few heads, and its slots few tiles; and early slots have far
    more queries than late ones.  It depends on shapes alone, so every device adds in one order.

    Args:
        programs: of one part.
        query_tiles: tiles of queries.
    """
    return max(1, min(_ENOUGH_PROGRAMS // max(1, programs), _MOST_PARTS, query_tiles))
