"""Key sets of three-region attention as a dense mask: obvious, and slow at length.

Shapes: B batch, S queries, K keys.
"""

import torch

from megatron_cogview.kernels.pivot_attention.sampler import pivot_mask


def visible_keys(
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
) -> torch.Tensor:
    """Keys each query attends to: all text, the layer's pivots and its window, causally.

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

    Returns:
        Boolean ``[B, 1, S, K]``; a key in several regions appears once by construction.
    """
    device = pivot_key_B2.device
    query_S1 = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key_1K = torch.arange(num_keys, device=device)[None]
    first_S1 = (query_S1 // window_block - (window_blocks - 1)) * window_block
    window_SK = key_1K >= first_S1
    pivot_BK = pivot_mask(pivot_key_B2, total_length, num_pivots, layer_number, seed)[:, :num_keys]
    visible_BSK = (window_SK[None] | pivot_BK[:, None]) & (key_1K <= query_S1)[None]
    return visible_BSK[:, None]
