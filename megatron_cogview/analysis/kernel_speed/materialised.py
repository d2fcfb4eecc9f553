"""Sparse attention as the original code computes it, with every score in memory: a peer.

It gathers the pivots, cuts keys into overlapping chunks, joins both kinds of scores in one softmax
and multiplies each part by its values.  Scores and weights are stored in the dtype of the queries;
they are scaled after the product, masked by a factor and by minus 10,000, and not relaxed, because
the original leaves PB-relax out here.

Shapes: B batch, N heads, S sequence, D head dim, P pivots, G blocks, W tokens of a block, C keys of
a block's window.
"""

import math

import torch
from torch import Tensor

from megatron_cogview.kernels.pivot_attention.plan import FAR

_HIDDEN = 10_000.0


def pivot_positions(chosen_BS: Tensor) -> Tensor:
    """Positions of text and pivots, ascending, int64 ``[B, P]``.

    Args:
        chosen_BS: boolean, of ``sampler.pivot_mask``.

    Returns:
        P is the largest count of a sample; a place that a sample does not need holds
        :data:`FAR`, which lies behind every query.
    """
    count = int(chosen_BS.sum(-1).max())
    position_S = torch.arange(chosen_BS.shape[-1], device=chosen_BS.device)
    return torch.where(chosen_BS, position_S, FAR).sort(-1).values[:, :count]


def sparse_attention(
    q_BNSD: Tensor,
    k_BNSD: Tensor,
    v_BNSD: Tensor,
    pivot_BP: Tensor,
    window_block: int,
    window_blocks: int,
    pivot_bias: float = 0.0,
) -> Tensor:
    """Softmax over visible pivots and the window, written out (P-ATT-1..4).

    Args:
        q_BNSD, k_BNSD, v_BNSD: queries, keys and values of the same tokens.
        pivot_BP: of :func:`pivot_positions`.
        window_block, window_blocks: tokens of a block (W), and blocks seen with the own (T).
        pivot_bias: added to the pivots' scores; the original adds ``log(S // P)``.

    Returns:
        ``[B, N, S, D]`` in the dtype of the queries.

    Raises:
        ValueError: the length is not a multiple of the block, which this algorithm needs.
    """
    batch, heads, length, head_dim = q_BNSD.shape
    if length % window_block:
        raise ValueError(
            f"sequence of {length} tokens: the original algorithm takes multiples of its block of "
            f"{window_block} tokens only"
        )
    scale = 1.0 / math.sqrt(head_dim)
    index_BNPD = pivot_BP.clamp(max=length - 1)[:, None, :, None].expand(-1, heads, -1, head_dim)
    pivot_k_BNPD, pivot_v_BNPD = k_BNSD.gather(2, index_BNPD), v_BNSD.gather(2, index_BNPD)
    seen_B1SP = _seen_pivots(pivot_BP, length, window_block, window_blocks)[:, None]
    far_BNSP = _masked(q_BNSD @ pivot_k_BNPD.transpose(-1, -2), seen_B1SP, scale) + pivot_bias

    blocks = length // window_block
    k_BNGCD, v_BNGCD = (_chunks(x, window_block, window_blocks) for x in (k_BNSD, v_BNSD))
    q_BNGWD = q_BNSD.reshape(batch, heads, blocks, window_block, head_dim)
    seen_GWC = _seen_window(blocks, window_block, window_blocks, q_BNSD.device)
    near_BNGWC = _masked(q_BNGWD @ k_BNGCD.transpose(-1, -2), seen_GWC, scale)

    joint = torch.cat([far_BNSP, near_BNGWC.flatten(2, 3)], -1)
    weights = torch.softmax(joint, -1)
    far_BNSP, near_BNSC = weights.split([pivot_BP.shape[-1], near_BNGWC.shape[-1]], -1)
    near_BNGWD = near_BNSC.unflatten(2, (blocks, window_block)) @ v_BNGCD
    return far_BNSP @ pivot_v_BNPD + near_BNGWD.flatten(2, 3)


def _masked(scores: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Scaled scores where seen, minus 10,000 elsewhere; both in the scores' dtype."""
    kept = seen.to(scores.dtype)
    return scores * (kept * scale) - _HIDDEN * (1 - kept)


def _seen_pivots(pivot_BP: Tensor, length: int, block: int, blocks_seen: int) -> Tensor:
    """Which pivots a query sees, ``[B, S, P]``: those at least T blocks before its own."""
    block_of_query_S1 = torch.arange(length, device=pivot_BP.device)[:, None] // block
    return pivot_BP[:, None] // block <= block_of_query_S1 - blocks_seen


def _chunks(x_BNSD: Tensor, block: int, blocks_seen: int) -> Tensor:
    """Keys of each block's window, overlapping, ``[B, N, G, C, D]``; zeros before the first.

    Shifted views side by side: their gradient is a sum of slices, where that of a strided view, the
    other way to write this, would be added up element by element.
    """
    before = (blocks_seen - 1) * block
    padded = torch.nn.functional.pad(x_BNSD, (0, 0, before, 0)).unflatten(2, (-1, block))
    blocks = x_BNSD.shape[2] // block
    shifted = [padded[:, :, first : first + blocks] for first in range(blocks_seen)]
    return torch.cat(shifted, 3)


def _seen_window(blocks: int, block: int, blocks_seen: int, device: torch.device) -> Tensor:
    """Which keys of its window a query sees, ``[G, W, C]``: up to itself, from the first token."""
    key_C = torch.arange(blocks_seen * block, device=device) - (blocks_seen - 1) * block
    causal_WC = key_C <= torch.arange(block, device=device)[:, None]
    exists_G1C = key_C + torch.arange(blocks, device=device)[:, None, None] * block >= 0
    return causal_WC & exists_G1C
