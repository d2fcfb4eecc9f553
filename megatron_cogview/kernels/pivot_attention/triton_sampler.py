"""The draws of the pivot sampler in one kernel: PyTorch needs nearly fifty for the same integers.

Shapes: B batch, K positions.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from megatron_cogview.kernels.pivot_attention.sampler import (
    GOLDEN,
    MIX_1,
    MIX_2,
    NEVER,
    key_terms,
)
from megatron_cogview.kernels.triton_support import Shipped

_GOLDEN, _MIX_1, _MIX_2 = tl.constexpr(GOLDEN), tl.constexpr(MIX_1), tl.constexpr(MIX_2)
_NEVER = tl.constexpr(NEVER)
_POSITIONS, _WARPS = 1024, 4


@triton.jit
def shifted(x, BITS: tl.constexpr):
    """A logical shift to the right; that of signed integers keeps the sign."""
    return (x >> BITS) & ((1 << (64 - BITS)) - 1)


@triton.jit
def mixed(x):
    """Finaliser of splitmix64."""
    x = (x ^ shifted(x, 30)) * _MIX_1
    x = (x ^ shifted(x, 27)) * _MIX_2
    return x ^ shifted(x, 31)


@triton.jit(do_not_specialize=["seed_term", "layer_term"])
def draw_kernel(
    pivot_key, padding, out, num_keys, seed_term, layer_term,
    PADDED: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """What ``sampler.draws`` computes, of a stretch of one sample's positions."""
    sample = tl.program_id(1).to(tl.int64)
    position_K = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS).to(tl.int64)
    number = tl.load(pivot_key + 2 * sample)
    text = tl.load(pivot_key + 2 * sample + 1)
    key = mixed(mixed(number + seed_term) + layer_term)
    draw_K = (shifted(mixed(key + position_K * _GOLDEN), 33) << 31) + position_K
    draw_K = tl.where(position_K < text, -1, draw_K)
    if PADDED:
        begin, end = tl.load(padding + 2 * sample), tl.load(padding + 2 * sample + 1)
        draw_K = tl.where((position_K >= begin) & (position_K < end), _NEVER, draw_K)
    tl.store(out + sample * num_keys + position_K, draw_K, mask=position_K < num_keys)


@torch.library.custom_op("cogview::pivot_draws", mutates_args=())
def draws(
    pivot_key_B2: torch.Tensor,
    num_keys: int,
    layer_number: int,
    seed: int,
    padding_B2: torch.Tensor | None = None,
) -> torch.Tensor:
    """``sampler.draws`` bit by bit."""
    draw_BK = pivot_key_B2.new_empty(len(pivot_key_B2), num_keys)
    seed_term, layer_term = key_terms(seed, layer_number)
    if padding_B2 is not None:
        padding_B2 = padding_B2.long().contiguous()
    with torch.cuda.device_of(pivot_key_B2):
        draw_kernel[(triton.cdiv(num_keys, _POSITIONS), len(pivot_key_B2))](
            *(pivot_key_B2.contiguous(), padding_B2, draw_BK, num_keys, seed_term, layer_term),
            PADDED=padding_B2 is not None,
            POSITIONS=_POSITIONS,
            num_warps=_WARPS,
        )
    return draw_BK


@draws.register_fake
def _(
    pivot_key_B2: torch.Tensor,
    num_keys: int,
    layer_number: int,
    seed: int,
    padding_B2: torch.Tensor | None = None,
) -> torch.Tensor:
    return pivot_key_B2.new_empty(len(pivot_key_B2), num_keys)


def shipped() -> Iterator[Shipped]:
    """With and without padding."""
    pointers = {"pivot_key": "*i64", "out": "*i64"}
    numbers = {"num_keys": "i32", "seed_term": "i64", "layer_term": "i64"}
    for padded in (False, True):
        constants = {"PADDED": padded, "POSITIONS": _POSITIONS}
        yield Shipped(
            kernel=draw_kernel,
            types={**pointers, **numbers, **({"padding": "*i64"} if padded else {})},
            constants=constants if padded else {**constants, "padding": None},
            num_warps=_WARPS,
            num_stages=1,
            most_registers=64,
            most_shared_bytes=0,
        )
