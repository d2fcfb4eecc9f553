"""Three-region and dense causal attention in Triton: pieces of all its kernels, and the forward.

A program owns a tile of queries of one head.  Tiles begin at multiples of their size, counted from
the sequence's first token, also when the queries are only its last tokens.  README.md has the
regions, the invariant and the sizes.

Letters: M queries of a tile, N keys of a tile, D head dim (padded to a power of two).
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from megatron_cogview.kernels.pivot_attention.launch import (
    FEW_QUERIES,
    MOST_SHARED_BYTES,
    Settings,
    arguments,
    launch,
    num_query_tiles,
    readable,
    sequence_first,
    unwritten,
)
from megatron_cogview.kernels.pivot_attention.plan import FAR, Plan
from megatron_cogview.kernels.triton_support import Shipped, dot

EMPTY = tl.constexpr(FAR)
LOWEST = tl.constexpr(-3.0e38)
"""A maximum of nothing.  Finite, so that a tile without visible keys changes nothing."""


@triton.jit
def window_start(position, WINDOW: tl.constexpr, BLOCKS: tl.constexpr):
    """First position of a query's window."""
    return tl.maximum(position // WINDOW - (BLOCKS - 1), 0) * WINDOW


@triton.jit
def in_window(
    position, key, pad_begin, pad_end,
    WINDOW: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Whether a query sees a key in its window."""
    visible = (key >= window_start(position, WINDOW, BLOCKS)) & (key <= position)
    if PADDED:
        visible = visible & ((key < pad_begin) | (key >= pad_end) | (key == position))
    return visible


@triton.jit
def before_window(position, key, WINDOW: tl.constexpr, BLOCKS: tl.constexpr):
    """Whether a query sees a key that is text or pivot outside its window."""
    return key < window_start(position, WINDOW, BLOCKS)


@triton.jit
def load_padding(padding, sample, PADDED: tl.constexpr):
    """First position of a sample's padding and the one after its last."""
    if PADDED:
        return tl.load(padding + 2 * sample), tl.load(padding + 2 * sample + 1)
    else:
        return 0, 0


@triton.jit
def load_rows(start, row_R, stride, is_row_R, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows as a tile, with zeros where there is no row or no column."""
    column_D = tl.arange(0, BLOCK_D)
    wanted = is_row_R[:, None]
    if D != BLOCK_D:
        wanted = wanted & (column_D < D)[None, :]
    at = start + row_R.to(tl.int64)[:, None] * stride + column_D[None, :]
    return tl.load(at, mask=wanted, other=0.0)


@triton.jit
def store_rows(start, row_R, stride, is_row_R, tile_RD, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The reverse of ``load_rows``."""
    column_D = tl.arange(0, BLOCK_D)
    wanted = is_row_R[:, None]
    if D != BLOCK_D:
        wanted = wanted & (column_D < D)[None, :]
    at = start + row_R.to(tl.int64)[:, None] * stride + column_D[None, :]
    tl.store(at, tile_RD.to(start.dtype.element_ty), mask=wanted)


@triton.jit
def kept_by_dropout(first_query, key_N, stream, BM: tl.constexpr):
    """Which weights of a tile dropout keeps, ``[N, M]``: ``kept_weights`` of the reference.

    ``stream`` is seed, sample, head and threshold."""
    group_G = first_query // 4 + tl.arange(0, BM // 4)
    a, b, c, d = tl.philox(stream[0], group_G[None, :], key_N[:, None], stream[2], stream[1])
    word = tl.join(tl.join(a, c), tl.join(b, d)).reshape(key_N.shape[0], BM)
    return word.to(tl.int32, bitcast=True) >= stream[3]


@triton.jit
def attend(
    acc_MD, total_M, peak_M, q_MD, k_ND, v_ND, visible_MN, first_query, key_N, scale, bias, stream,
    MASKED: tl.constexpr, DROPPED: tl.constexpr,
):  # fmt: skip
    """Add a tile of keys to the running softmax.  Scores are fp32 and in powers of two."""
    score_MN = dot(q_MD, tl.trans(k_ND)) * scale + bias
    if MASKED:
        score_MN = tl.where(visible_MN, score_MN, -float("inf"))
    higher_M = tl.maximum(peak_M, tl.max(score_MN, 1))
    weight_MN = tl.math.exp2(score_MN - higher_M[:, None])
    shrink_M = tl.math.exp2(peak_M - higher_M)
    total_M = total_M * shrink_M + tl.sum(weight_MN, 1)
    if DROPPED:
        # What is left grows by one factor, which the whole sum gets at the end.
        kept_NM = kept_by_dropout(first_query, key_N, stream, q_MD.shape[0])
        weight_MN = tl.where(tl.trans(kept_NM), weight_MN, 0.0)
    acc_MD = acc_MD * shrink_M[:, None] + dot(weight_MN.to(v_ND.dtype), v_ND)
    return acc_MD, total_M, higher_M


@triton.jit
def attend_slots(
    acc_MD, total_M, peak_M, q_MD, k, v, k_s, slots, num_visible, position_M, first_query,
    scale, bias, stream, WINDOW: tl.constexpr, BLOCKS: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DROPPED: tl.constexpr,
):  # fmt: skip
    """Text and pivots before the window, gathered row by row."""
    for begin in range(0, num_visible, BN):
        slot_N = begin + tl.arange(0, BN)
        is_slot_N = slot_N < num_visible
        key_N = tl.load(slots + slot_N, mask=is_slot_N, other=EMPTY)
        k_ND = load_rows(k, key_N, k_s, is_slot_N, D, BLOCK_D)
        v_ND = load_rows(v, key_N, k_s, is_slot_N, D, BLOCK_D)
        visible_MN = before_window(position_M[:, None], key_N[None, :], WINDOW, BLOCKS)
        acc_MD, total_M, peak_M = attend(
            acc_MD, total_M, peak_M, q_MD, k_ND, v_ND, visible_MN, first_query, key_N,
            scale, bias, stream, True, DROPPED,
        )  # fmt: skip
    return acc_MD, total_M, peak_M


@triton.jit
def attend_window(
    acc_MD, total_M, peak_M, q_MD, k, v, k_s, begin, end, num_keys, position_M, first_query,
    pad_begin, pad_end, scale, stream, WINDOW: tl.constexpr, BLOCKS: tl.constexpr,
    BN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr, PADDED: tl.constexpr, DROPPED: tl.constexpr,
):  # fmt: skip
    """Keys from ``begin`` up to ``end``; unmasked, every query must see them all."""
    for first in range(begin, end, BN):
        key_N = first + tl.arange(0, BN)
        is_key_N = key_N < num_keys
        k_ND = load_rows(k, key_N, k_s, is_key_N, D, BLOCK_D)
        v_ND = load_rows(v, key_N, k_s, is_key_N, D, BLOCK_D)
        visible_MN = in_window(
            position_M[:, None], key_N[None, :], pad_begin, pad_end, WINDOW, BLOCKS, PADDED
        )
        acc_MD, total_M, peak_M = attend(
            acc_MD, total_M, peak_M, q_MD, k_ND, v_ND, visible_MN, first_query, key_N,
            scale, 0.0, stream, MASKED, DROPPED,
        )  # fmt: skip
    return acc_MD, total_M, peak_M


@triton.jit(do_not_specialize=["seed", "threshold", "batch_offset", "head_offset"])
def forward_kernel(
    q, k, v, out, lse, slots, slots_before, padding, q_b, q_n, q_s, k_b, k_n, k_s,
    num_samples, num_heads, num_queries, num_keys, num_slots, total_length,
    scale, bias, seed, threshold, keep_scale, batch_offset, head_offset,
    WINDOW: tl.constexpr, BLOCKS: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr,
    DROPPED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Outputs of a tile of queries, and the logarithm (base 2) of each softmax's sum."""
    shift = num_keys - num_queries
    # The tiles with most keys first: the short ones fill the gaps at the end.
    first_query = (shift // BM + tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    position_M = first_query + tl.arange(0, BM)
    row_M = position_M - shift
    is_row_M = (row_M >= 0) & (row_M < num_queries)
    sample, head = tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    stream = (seed, batch_offset + sample, head_offset + head, threshold)
    wide_sample, wide_head = sample.to(tl.int64), head.to(tl.int64)
    q_MD = load_rows(q + wide_sample * q_b + wide_head * q_n, row_M, q_s, is_row_M, D, BLOCK_D)
    k += wide_sample * k_b + wide_head * k_n
    v += wide_sample * k_b + wide_head * k_n
    pad_begin, pad_end = load_padding(padding, sample, PADDED)
    acc_MD = tl.zeros([BM, BLOCK_D], tl.float32)
    total_M = tl.zeros([BM], tl.float32)
    peak_M = tl.full([BM], LOWEST, tl.float32)
    end = tl.minimum(first_query + BM, num_keys)
    if SLOTS:
        behind = window_start(end - 1, WINDOW, BLOCKS)
        acc_MD, total_M, peak_M = attend_slots(
            acc_MD, total_M, peak_M, q_MD, k, v, k_s, slots + wide_sample * num_slots,
            tl.load(slots_before + wide_sample * total_length + behind), position_M, first_query,
            scale, bias, stream, WINDOW, BLOCKS, BN, D, BLOCK_D, DROPPED,
        )  # fmt: skip
    begin = window_start(first_query, WINDOW, BLOCKS)
    diagonal = begin + (first_query - begin) // BN * BN
    # Queries of one block have one window, so before the diagonal they see the same keys.
    acc_MD, total_M, peak_M = attend_window(
        acc_MD, total_M, peak_M, q_MD, k, v, k_s, begin, diagonal, num_keys, position_M,
        first_query, pad_begin, pad_end, scale, stream, WINDOW, BLOCKS, BN, D, BLOCK_D,
        PADDED or WINDOW % BM != 0, PADDED, DROPPED,
    )  # fmt: skip
    acc_MD, total_M, peak_M = attend_window(
        acc_MD, total_M, peak_M, q_MD, k, v, k_s, diagonal, end, num_keys, position_M,
        first_query, pad_begin, pad_end, scale, stream, WINDOW, BLOCKS, BN, D, BLOCK_D,
        True, PADDED, DROPPED,
    )  # fmt: skip
    out += (wide_sample * num_heads + wide_head) * D
    out_MD = acc_MD * (keep_scale / total_M)[:, None]
    store_rows(out, row_M, num_samples * num_heads * D, is_row_M, out_MD, D, BLOCK_D)
    lse += (wide_sample * num_heads + wide_head) * num_queries
    tl.store(lse + row_M, peak_M + tl.log2(total_M), mask=is_row_M)


def forward(
    q_BNSD: torch.Tensor,
    k_BNKD: torch.Tensor,
    v_BNKD: torch.Tensor,
    plan: Plan,
    padding_B2: torch.Tensor | None,
    settings: Settings,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend; the queries are the last S of the K tokens.

    Args:
        q_BNSD, k_BNKD, v_BNKD: of one dtype, fp32, fp16 or bf16.
        plan: of this layer and batch.
        padding_B2: int32, or None.
        settings: see there.

    Returns:
        ``[B, N, S, D]``, lying in memory as ``[S, B, N, D]``, and fp32 ``[B, N, S]``: the
        logarithm (base 2) of each softmax's sum.
    """
    q_BNSD, k_BNKD, v_BNKD = readable(q_BNSD, k_BNKD, v_BNKD)
    batch, heads, num_queries, _ = q_BNSD.shape
    out_BNSD = sequence_first(q_BNSD.shape, q_BNSD.dtype, q_BNSD.device)
    lse_BNS = unwritten((batch, heads, num_queries), torch.float32, q_BNSD.device)
    dropped, padded = settings.dropout > 0, padding_B2 is not None
    sizes = launch("forward", q_BNSD, dropped, padded, plan.slots_BP.shape[1] == 0)
    grid = (num_query_tiles(num_queries, k_BNKD.shape[2], sizes.queries), batch * heads)
    with torch.cuda.device_of(q_BNSD):
        forward_kernel[grid](
            *(q_BNSD, k_BNKD, v_BNKD, out_BNSD, lse_BNS, plan.slots_BP, plan.slots_before_BL),
            **arguments(q_BNSD, k_BNKD, plan, padding_B2, settings, sizes),
        )
    return out_BNSD, lse_BNS


_POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_INPUTS = ("q", "k", "v", "out", "d_out", "d_q", "d_k", "d_v")
_SINGLE = ("lse", "delta", "packed_k", "packed_v")
_WHOLE = ("slots", "slots_before", "slot_of_key", "padding")
_TYPES = {
    **dict.fromkeys(_SINGLE, "*fp32"),
    **dict.fromkeys(_WHOLE, "*i32"),
    **dict.fromkeys(("scale", "bias", "root", "keep_scale"), "fp32"),
    "seed": "i64",
}
_STRIDES = ("q_b", "q_n", "q_s", "k_b", "k_n", "k_s")
"""At every start they are multiples of 16, if the head dim is."""


def shipped() -> Iterator[Shipped]:
    """Every kernel for the heads of the presets: three regions as in fashion_3b, and dense."""
    from megatron_cogview.kernels.pivot_attention import triton_sampler

    bf16, fp16, three_regions, dense = torch.bfloat16, torch.float16, (128, 6), (FAR, 1)
    for head_dim, dtype, blocks, dropout, padded in (
        (64, bf16, three_regions, 0.0, False),
        (64, bf16, three_regions, 0.1, False),
        (64, bf16, three_regions, 0.0, True),
        (64, bf16, dense, 0.0, False),
        (64, bf16, dense, 0.1, False),
        (64, fp16, three_regions, 0.0, False),
        (64, fp16, three_regions, 0.1, True),
        (64, torch.float32, three_regions, 0.0, False),
        (32, bf16, dense, 0.0, False),
        (32, bf16, dense, 0.1, False),
    ):
        for direction in ("forward", "query_gradient", "slot_gradient", "key_gradient"):
            if direction != "slot_gradient" or blocks != dense:
                yield _shipped(direction, 2560, head_dim, dtype, blocks, dropout, padded)
    for blocks in (three_regions, dense):
        yield _shipped("forward", 1, 64, bf16, blocks)
    yield from triton_sampler.shipped()


def _shipped(
    direction: str,
    num_queries: int,
    head_dim: int,
    dtype: torch.dtype,
    blocks: tuple[int, int],
    dropout: float = 0.0,
    padded: bool = False,
) -> Shipped:
    """A kernel of a call with 2,560 keys."""
    from megatron_cogview.kernels.pivot_attention import triton_backward

    kernels = {
        "forward": forward_kernel,
        "query_gradient": triton_backward.query_gradient_kernel,
        "slot_gradient": triton_backward.slot_gradient_kernel,
        "key_gradient": triton_backward.key_gradient_kernel,
    }
    q_BNSD, k_BNKD = (
        torch.empty((length, 2, 40, head_dim), dtype=dtype, device="meta").permute(1, 2, 0, 3)
        for length in (num_queries, 2560)
    )
    num_slots = 0 if blocks[0] == FAR else 768
    slots_BP, padding_B2 = (
        torch.empty((2, size), dtype=torch.int32, device="meta") for size in (num_slots, 2)
    )
    plan, settings = Plan(slots_BP, slots_BP, slots_BP), Settings(*blocks, 0.0, dropout, 0, 0, 0)
    kernel, dropped = kernels[direction], dropout > 0
    sizes = launch(direction, q_BNSD, dropped, padded, num_slots == 0)
    given = arguments(q_BNSD, k_BNKD, plan, padding_B2 if padded else None, settings, sizes)
    fixed = {name: given[name] for name in given if name.isupper() or given[name] is None}
    types = {**_TYPES, **dict.fromkeys(_INPUTS, _POINTERS[dtype])}
    product_rows = sizes.keys if direction.startswith(("slot", "key")) else sizes.queries
    limits = MOST_SHARED_BYTES["decoding" if sizes == FEW_QUERIES else direction]
    return Shipped(
        kernel=kernel,
        types={n: types.get(n, "i32") for n in kernel.arg_names if n not in fixed},
        constants=fixed,
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
        divisible=_STRIDES,
        most_registers=255,
        most_shared_bytes=limits[dropped],
        product_rows=0 if dtype == torch.float32 else product_rows,
    )
