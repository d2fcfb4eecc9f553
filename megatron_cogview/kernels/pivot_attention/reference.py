"""Three-region attention with a dense mask: obvious, and slow at length.

Shapes: B batch, N heads of this rank, S queries, K keys, D head dim.
"""

import math
from typing import Any

import torch

from megatron_cogview.kernels import philox
from megatron_cogview.kernels.pivot_attention.sampler import in_padding, pivot_mask


def visible_keys(
    pivot_key_B2: torch.Tensor, num_queries: int, num_keys: int, total_length: int, **settings: Any
) -> torch.Tensor:
    """Keys each query attends to: all text, the layer's pivots and its window, causally.

    Arguments as of :func:`key_regions`.

    Returns:
        Boolean ``[B, 1, S, K]``; a key in several regions appears once by construction.
    """
    window_B1SK, outside_B1SK = key_regions(
        pivot_key_B2, num_queries, num_keys, total_length, **settings
    )
    return window_B1SK | outside_B1SK


def key_regions(
    pivot_key_B2: torch.Tensor,
    num_queries: int,
    num_keys: int,
    total_length: int,
    *,
    window_block: int,
    window_blocks: int,
    num_pivots: int,
    layer_number: int,
    seed: int,
    padding_B2: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys each query sees in its window, and text and pivots that it sees before the window.

    The queries are the last ``num_queries`` of ``num_keys`` tokens.  Pivots are drawn among the
    ``total_length`` tokens of the whole sequence, so that decoding, which has seen only its first
    ``num_keys``, uses the sets that training used (P-ATT-7).

    Args:
        pivot_key_B2: int64 ``[B, 2]``: sample number, count of text-region tokens.
        num_queries, num_keys, total_length: see above.
        window_block: tokens per block (W).
        window_blocks: blocks seen, the query's own included (T, P-ATT-3).
        num_pivots: text and pivots together (P).
        layer_number: global layer number.
        seed: key of the sampler.
        padding_B2: int64 ``[B, 2]``, first position of each sample's padding and the one after its
            last.  Nobody attends to it, but a query in it to itself, so that no row is empty.

    Returns:
        Two boolean ``[B, 1, S, K]``; no key is in both.
    """
    device = pivot_key_B2.device
    query_S1 = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key_1K = torch.arange(num_keys, device=device)[None]
    first_S1 = (query_S1 // window_block - (window_blocks - 1)) * window_block
    window_BSK = ((key_1K >= first_S1) & (key_1K <= query_S1)).expand(len(pivot_key_B2), -1, -1)
    if padding_B2 is not None:
        seen_B1K = ~in_padding(padding_B2, num_keys)[:, None]
        window_BSK = window_BSK & (seen_B1K | (key_1K == query_S1))
    pivot_BL = pivot_mask(
        pivot_key_B2, total_length, num_pivots, layer_number, seed, padding_B2=padding_B2
    )
    outside_BSK = pivot_BL[:, None, :num_keys] & (key_1K < first_S1)
    return window_BSK[:, None], outside_BSK[:, None]


def kept_weights(
    shape: tuple[int, int, int, int],
    dropout: float,
    seed: int,
    batch_offset: int,
    head_offset: int,
    device: torch.device,
) -> torch.Tensor:
    """Attention weights that dropout keeps, by seed, sample, head and positions alone.

    Four queries in a row share a counter and take one word of it each, because drawing costs more
    than multiplying.

    Args:
        shape: B, N, S, K; the queries are the last S of the K tokens.
        dropout: probability of dropping a weight.
        seed: of this layer and step, in ``[0, 2^63)``.
        batch_offset, head_offset: global numbers of the first sample and the first head here.

    Returns:
        Boolean ``[B, N, S, K]``.
    """
    batch, heads, num_queries, num_keys = shape
    sample_B111 = torch.arange(batch, device=device).view(-1, 1, 1, 1) + batch_offset
    head_N11 = torch.arange(heads, device=device).view(-1, 1, 1) + head_offset
    query_S1 = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key_1K = torch.arange(num_keys, device=device)[None]
    drawn = philox.words(seed, query_S1 // 4, key_1K, head_N11, sample_B111)
    word_BNSK = sum(torch.where(query_S1 % 4 == i, word, 0) for i, word in enumerate(drawn))
    assert isinstance(word_BNSK, torch.Tensor)
    return philox.signed(word_BNSK) >= philox.drop_threshold(dropout)


def masked_attention(
    q_BNSD: torch.Tensor,
    k_BNKD: torch.Tensor,
    v_BNKD: torch.Tensor,
    visible: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Softmax attention over the visible keys, computed in fp32 or better.

    Args:
        q_BNSD, k_BNKD, v_BNKD: queries, keys and values.
        visible: boolean, broadcast to ``[B, N, S, K]``; every query must see a key.
        bias: added to the scores; broadcasts likewise.
        kept: weights that dropout keeps; the others become zero and these grow.
        dropout: the probability that ``kept`` was drawn with.

    Returns:
        ``[B, N, S, D]`` in the dtype of the queries.
    """
    wide = torch.promote_types(q_BNSD.dtype, torch.float32)
    scores_BNSK = q_BNSD.to(wide) @ k_BNKD.to(wide).transpose(-1, -2)
    scores_BNSK = scores_BNSK / math.sqrt(q_BNSD.shape[-1])
    if bias is not None:
        scores_BNSK = scores_BNSK + bias
    weights_BNSK = torch.softmax(scores_BNSK.masked_fill(~visible, float("-inf")), -1)
    if kept is not None:
        weights_BNSK = torch.where(kept, weights_BNSK / (1 - dropout), 0.0)
    return (weights_BNSK @ v_BNKD.to(wide)).to(q_BNSD.dtype)
