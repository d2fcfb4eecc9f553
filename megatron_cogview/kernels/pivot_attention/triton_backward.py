"""Gradients of three-region attention in three kernels without atomics: two runs agree bit for bit.

1. A program owns a tile of queries: their gradients, and the row sums that the others need.
2. A program owns a tile of slots and a part of the queries: gradients of text and pivots from
   queries whose window lies behind them, in fp32, packed.
3. A program owns a tile of keys: starts from the packed gradients of its own slots, part by part,
   and adds those from queries that see it in their window, so each gradient is rounded once.

Letters: M queries of a tile, N keys of a tile, D head dim (padded to a power of two).
"""

from typing import Any

import torch
import triton
import triton.language as tl

from megatron_cogview.kernels.pivot_attention.launch import (
    Settings,
    arguments,
    as_sequence_first,
    launch,
    num_parts,
    num_query_tiles,
    num_tiles,
    readable,
    sequence_first,
    unwritten,
)
from megatron_cogview.kernels.pivot_attention.plan import Plan
from megatron_cogview.kernels.pivot_attention.triton import (
    EMPTY,
    before_window,
    in_window,
    kept_by_dropout,
    load_padding,
    load_rows,
    store_rows,
    window_start,
)
from megatron_cogview.kernels.triton_support import dot


@triton.jit
def weights_and_gradient(
    left_AD, right_BD, left_value_AD, right_value_BD, lse, delta, visible_AB, kept_AB,
    scale, bias, keep_scale, DROPPED: tl.constexpr,
):  # fmt: skip
    """Attention weights after dropout, and the gradient of the scores, fp32.

    Either queries are on the left, and keys on the right, or the other way round; values go with
    keys, and gradients of outputs with queries.  ``lse`` and ``delta`` broadcast."""
    score_AB = dot(left_AD, tl.trans(right_BD)) * scale + bias
    weight_AB = tl.math.exp2(tl.where(visible_AB, score_AB - lse, -float("inf")))
    from_output_AB = dot(left_value_AD, tl.trans(right_value_BD))
    if DROPPED:
        used_AB = tl.where(kept_AB, weight_AB * keep_scale, 0.0)
        return used_AB, used_AB * from_output_AB - weight_AB * delta
    else:
        return weight_AB, weight_AB * (from_output_AB - delta)


@triton.jit
def add_query_gradient(
    grad_MD, q_MD, d_out_MD, lse_M, delta_M, k_ND, v_ND, key_N, visible_MN, first_query,
    scale, bias, root, keep_scale, stream, DROPPED: tl.constexpr,
):  # fmt: skip
    """What a tile of keys adds to the gradients of a tile of queries."""
    kept_MN = visible_MN
    if DROPPED:
        kept_MN = tl.trans(kept_by_dropout(first_query, key_N, stream, q_MD.shape[0]))
    _, grad_score_MN = weights_and_gradient(
        q_MD, k_ND, d_out_MD, v_ND, lse_M[:, None], delta_M[:, None], visible_MN, kept_MN,
        scale, bias, keep_scale, DROPPED,
    )  # fmt: skip
    # Scaled in fp32: in fp16 the unscaled gradient would overflow earlier.
    return grad_MD + dot((grad_score_MN * root).to(k_ND.dtype), k_ND)


@triton.jit(do_not_specialize=["seed", "threshold", "batch_offset", "head_offset"])
def query_gradient_kernel(
    q, k, v, out, d_out, lse, delta, d_q, slots, slots_before, padding,
    q_b, q_n, q_s, k_b, k_n, k_s, num_samples, num_heads, num_queries, num_keys, num_slots,
    total_length,
    scale, bias, root, seed, threshold, keep_scale, batch_offset, head_offset,
    WINDOW: tl.constexpr, BLOCKS: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr,
    DROPPED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of queries; also ``delta``, the sums of output times gradient."""
    shift = num_keys - num_queries
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
    here, out_s = wide_sample * num_heads + wide_head, num_samples * num_heads * D
    d_out_MD = load_rows(d_out + here * D, row_M, out_s, is_row_M, D, BLOCK_D)
    out_MD = load_rows(out + here * D, row_M, out_s, is_row_M, D, BLOCK_D)
    delta_M = tl.sum(out_MD.to(tl.float32) * d_out_MD.to(tl.float32), 1)
    tl.store(delta + here * num_queries + row_M, delta_M, mask=is_row_M)
    lse_M = tl.load(lse + here * num_queries + row_M, mask=is_row_M, other=0.0)
    pad_begin, pad_end = load_padding(padding, sample, PADDED)
    grad_MD = tl.zeros([BM, BLOCK_D], tl.float32)
    end = tl.minimum(first_query + BM, num_keys)
    if SLOTS:
        slots += wide_sample * num_slots
        behind = window_start(end - 1, WINDOW, BLOCKS)
        num_visible = tl.load(slots_before + wide_sample * total_length + behind)
        for begin in range(0, num_visible, BN):
            is_slot_N = begin + tl.arange(0, BN) < num_visible
            key_N = tl.load(slots + begin + tl.arange(0, BN), mask=is_slot_N, other=EMPTY)
            visible_MN = before_window(position_M[:, None], key_N[None, :], WINDOW, BLOCKS)
            grad_MD = add_query_gradient(
                grad_MD, q_MD, d_out_MD, lse_M, delta_M,
                load_rows(k, key_N, k_s, is_slot_N, D, BLOCK_D),
                load_rows(v, key_N, k_s, is_slot_N, D, BLOCK_D),
                key_N, visible_MN, first_query, scale, bias, root, keep_scale, stream, DROPPED,
            )  # fmt: skip
    for begin in range(window_start(first_query, WINDOW, BLOCKS), end, BN):
        key_N = begin + tl.arange(0, BN)
        visible_MN = in_window(
            position_M[:, None], key_N[None, :], pad_begin, pad_end, WINDOW, BLOCKS, PADDED
        )
        grad_MD = add_query_gradient(
            grad_MD, q_MD, d_out_MD, lse_M, delta_M,
            load_rows(k, key_N, k_s, key_N < num_keys, D, BLOCK_D),
            load_rows(v, key_N, k_s, key_N < num_keys, D, BLOCK_D),
            key_N, visible_MN, first_query, scale, 0.0, root, keep_scale, stream, DROPPED,
        )  # fmt: skip
    store_rows(d_q + here * D, row_M, out_s, is_row_M, grad_MD, D, BLOCK_D)


@triton.jit
def add_key_gradients(
    grad_k_ND, grad_v_ND, k_ND, v_ND, key_N, begin, end, q, d_out, lse, delta, q_s, out_s,
    shift, num_queries, pad_begin, pad_end, scale, bias, root, keep_scale, stream,
    WINDOW: tl.constexpr, BLOCKS: tl.constexpr, OUTSIDE: tl.constexpr, PADDED: tl.constexpr,
    DROPPED: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What queries from ``begin``, a multiple of the tile, up to ``end`` add to keys and values.

    ``OUTSIDE``: those whose window lies behind the key, instead of those who see it there."""
    # Row numbers below zero stand for tokens that are keys only.
    for first_query in range(begin, end, BM):
        position_M = first_query + tl.arange(0, BM)
        row_M = position_M - shift
        is_row_M = (row_M >= 0) & (row_M < num_queries)
        q_MD = load_rows(q, row_M, q_s, is_row_M, D, BLOCK_D)
        d_out_MD = load_rows(d_out, row_M, out_s, is_row_M, D, BLOCK_D)
        lse_M = tl.load(lse + row_M, mask=is_row_M, other=0.0)
        delta_M = tl.load(delta + row_M, mask=is_row_M, other=0.0)
        if OUTSIDE:
            visible_NM = before_window(position_M[None, :], key_N[:, None], WINDOW, BLOCKS)
        else:
            visible_NM = in_window(
                position_M[None, :], key_N[:, None], pad_begin, pad_end, WINDOW, BLOCKS, PADDED
            )
        visible_NM = visible_NM & is_row_M[None, :]
        kept_NM = visible_NM
        if DROPPED:
            kept_NM = kept_by_dropout(first_query, key_N, stream, BM)
        used_NM, grad_score_NM = weights_and_gradient(
            k_ND, q_MD, v_ND, d_out_MD, lse_M[None, :], delta_M[None, :], visible_NM, kept_NM,
            scale, bias, keep_scale, DROPPED,
        )  # fmt: skip
        grad_v_ND += dot(used_NM.to(d_out_MD.dtype), d_out_MD)
        grad_k_ND += dot((grad_score_NM * root).to(q_MD.dtype), q_MD)
    return grad_k_ND, grad_v_ND


@triton.jit(do_not_specialize=["seed", "threshold", "batch_offset", "head_offset"])
def slot_gradient_kernel(
    q, k, v, d_out, lse, delta, slots, packed_k, packed_v, padding,
    q_b, q_n, q_s, k_b, k_n, k_s, num_samples, num_heads, num_queries, num_keys, num_slots,
    total_length,
    scale, bias, root, seed, threshold, keep_scale, batch_offset, head_offset,
    WINDOW: tl.constexpr, BLOCKS: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr,
    DROPPED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of slots from a part of the queries whose window lies behind them: fp32,
    packed."""
    sample, head = tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    stream = (seed, batch_offset + sample, head_offset + head, threshold)
    wide_sample, wide_head = sample.to(tl.int64), head.to(tl.int64)
    here = wide_sample * num_heads + wide_head
    slot_N = tl.program_id(0) * BN + tl.arange(0, BN)
    key_N = tl.load(slots + wide_sample * num_slots + slot_N, mask=slot_N < num_slots, other=EMPTY)
    is_key_N = key_N < num_keys
    at = wide_sample * k_b + wide_head * k_n
    k_ND = load_rows(k + at, key_N, k_s, is_key_N, D, BLOCK_D)
    v_ND = load_rows(v + at, key_N, k_s, is_key_N, D, BLOCK_D)
    shift = num_keys - num_queries
    # The first query of any block whose window lies behind the first of these keys.
    begin = (tl.min(key_N, 0) // WINDOW + BLOCKS) * WINDOW
    begin = tl.maximum(begin, shift) // BM * BM
    part, num_parts = tl.program_id(2), tl.num_programs(2)
    # Nothing if begin lies behind all queries, as it does for empty slots.
    size = tl.cdiv(tl.maximum(tl.cdiv(num_keys - begin, BM), 0), num_parts) * BM
    begin += part * size
    grad_k_ND, grad_v_ND = add_key_gradients(
        tl.zeros([BN, BLOCK_D], tl.float32), tl.zeros([BN, BLOCK_D], tl.float32),
        k_ND, v_ND, key_N, begin, tl.minimum(begin + size, num_keys),
        q + wide_sample * q_b + wide_head * q_n, d_out + here * D, lse + here * num_queries,
        delta + here * num_queries, q_s, num_samples * num_heads * D, shift, num_queries, 0, 0,
        scale, bias, root, keep_scale, stream,
        WINDOW, BLOCKS, True, PADDED, DROPPED, BM, D, BLOCK_D,
    )  # fmt: skip
    here = (here + part.to(tl.int64) * num_samples * num_heads) * num_slots * D
    store_rows(packed_k + here, slot_N, D, is_key_N, grad_k_ND, D, BLOCK_D)
    store_rows(packed_v + here, slot_N, D, is_key_N, grad_v_ND, D, BLOCK_D)


@triton.jit(do_not_specialize=["seed", "threshold", "batch_offset", "head_offset"])
def key_gradient_kernel(
    q, k, v, d_out, lse, delta, slot_of_key, packed_k, packed_v, d_k, d_v, num_parts, padding,
    q_b, q_n, q_s, k_b, k_n, k_s, num_samples, num_heads, num_queries, num_keys, num_slots,
    total_length,
    scale, bias, root, seed, threshold, keep_scale, batch_offset, head_offset,
    WINDOW: tl.constexpr, BLOCKS: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr,
    DROPPED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys: those of its slots, and of queries with it in their window."""
    sample, head = tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    stream = (seed, batch_offset + sample, head_offset + head, threshold)
    wide_sample, wide_head = sample.to(tl.int64), head.to(tl.int64)
    here, out_s = wide_sample * num_heads + wide_head, num_samples * num_heads * D
    first_key = tl.program_id(0) * BN
    key_N = first_key + tl.arange(0, BN)
    is_key_N = key_N < num_keys
    at = wide_sample * k_b + wide_head * k_n
    k_ND = load_rows(k + at, key_N, k_s, is_key_N, D, BLOCK_D)
    v_ND = load_rows(v + at, key_N, k_s, is_key_N, D, BLOCK_D)
    grad_k_ND = tl.zeros([BN, BLOCK_D], tl.float32)
    grad_v_ND = tl.zeros([BN, BLOCK_D], tl.float32)
    if SLOTS:
        slot_N = tl.load(slot_of_key + wide_sample * total_length + key_N, mask=is_key_N, other=-1)
        packed = here * num_slots * D
        for _ in range(num_parts):
            grad_k_ND += load_rows(packed_k + packed, slot_N, D, slot_N >= 0, D, BLOCK_D)
            grad_v_ND += load_rows(packed_v + packed, slot_N, D, slot_N >= 0, D, BLOCK_D)
            packed += tl.cast(num_samples, tl.int64) * num_heads * num_slots * D
    pad_begin, pad_end = load_padding(padding, sample, PADDED)
    shift = num_keys - num_queries
    last_key = tl.minimum(first_key + BN, num_keys) - 1
    grad_k_ND, grad_v_ND = add_key_gradients(
        grad_k_ND, grad_v_ND, k_ND, v_ND, key_N, tl.maximum(first_key, shift) // BM * BM,
        # The first query of the block that no longer sees the last of these keys.
        tl.minimum((last_key // WINDOW + BLOCKS) * WINDOW, num_keys),
        q + wide_sample * q_b + wide_head * q_n, d_out + here * D, lse + here * num_queries,
        delta + here * num_queries, q_s, out_s, shift, num_queries, pad_begin, pad_end,
        scale, 0.0, root, keep_scale, stream,
        WINDOW, BLOCKS, False, PADDED, DROPPED, BM, D, BLOCK_D,
    )  # fmt: skip
    store_rows(d_k + here * D, key_N, out_s, is_key_N, grad_k_ND, D, BLOCK_D)
    store_rows(d_v + here * D, key_N, out_s, is_key_N, grad_v_ND, D, BLOCK_D)


def backward(
    d_out_BNSD: torch.Tensor,
    q_BNSD: torch.Tensor,
    k_BNKD: torch.Tensor,
    v_BNKD: torch.Tensor,
    out_BNSD: torch.Tensor,
    lse_BNS: torch.Tensor,
    plan: Plan,
    padding_B2: torch.Tensor | None,
    settings: Settings,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of queries, keys and values.

    Args:
        d_out_BNSD: gradient of the output.
        out_BNSD, lse_BNS: what the forward returned.
        q_BNSD, k_BNKD, v_BNKD, plan, padding_B2, settings: what it was given.

    Returns:
        In the shapes and the dtype of queries, keys and values, sequence first in memory.
    """
    q_BNSD, k_BNKD, v_BNKD = readable(q_BNSD, k_BNKD, v_BNKD)
    batch, heads, num_queries, head_dim = q_BNSD.shape
    num_keys, num_slots = k_BNKD.shape[2], plan.slots_BP.shape[1]
    dtype, device, programs = q_BNSD.dtype, q_BNSD.device, batch * heads
    out_BNSD, d_out_BNSD = as_sequence_first(out_BNSD), as_sequence_first(d_out_BNSD)
    d_q_BNSD = sequence_first(q_BNSD.shape, dtype, device)
    d_k_BNKD, d_v_BNKD = (sequence_first(k_BNKD.shape, dtype, device) for _ in range(2))
    delta_BNS = unwritten((batch, heads, num_queries), torch.float32, device)
    qkv = (q_BNSD, k_BNKD, v_BNKD)
    rows = (d_out_BNSD, lse_BNS, delta_BNS)

    def rest(direction: str) -> dict[str, Any]:
        dropped, padded = settings.dropout > 0, padding_B2 is not None
        sizes = launch(direction, q_BNSD, dropped, padded, num_slots == 0)
        given = arguments(q_BNSD, k_BNKD, plan, padding_B2, settings, sizes)
        return {**given, "root": head_dim**-0.5}

    with torch.cuda.device_of(q_BNSD):
        given = rest("query_gradient")
        query_gradient_kernel[(num_query_tiles(num_queries, num_keys, given["BM"]), programs)](
            *qkv, out_BNSD, *rows, d_q_BNSD, plan.slots_BP, plan.slots_before_BL, **given
        )
        parts, tiles = 0, 0
        if num_slots > 0:
            given = rest("slot_gradient")
            tiles = num_tiles(num_slots, given["BN"])
            parts = num_parts(tiles * programs, num_tiles(num_queries, given["BM"]))
        packed = (parts, batch, heads, num_slots, head_dim)
        packed_k, packed_v = (unwritten(packed, torch.float32, device) for _ in range(2))
        if parts > 0:
            slot_gradient_kernel[(tiles, programs, parts)](
                *qkv, *rows, plan.slots_BP, packed_k, packed_v, **given
            )
        given = rest("key_gradient")
        key_gradient_kernel[(num_tiles(num_keys, given["BN"]), programs)](
            *(*qkv, *rows, plan.slot_of_key_BL, packed_k, packed_v, d_k_BNKD, d_v_BNKD, parts),
            **given,
        )
    return d_q_BNSD, d_k_BNKD, d_v_BNKD
