"""Eq. 4 written out in PyTorch, and the choice of PyTorch's fused attention where it is as safe.

Shapes: B batch, N heads of this rank, S queries, K keys, D head dim.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

FUSED_BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
)
"""Backends whose scores live in fp32 accumulators and never in half precision."""


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
    """Visible keys ``[S, K]``: the queries are the last ``num_queries`` of ``num_keys`` tokens."""
    query_S1 = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    return torch.arange(num_keys, device=device)[None] <= query_S1


def pb_relax_attention(
    q_BNSD: torch.Tensor,
    k_BNKD: torch.Tensor,
    v_BNKD: torch.Tensor,
    visible: torch.Tensor,
    alpha: float,
    relax_max: Literal["row", "head"],
    dropout: float = 0.0,
) -> torch.Tensor:
    """``softmax((Q/(alpha sqrt d) K - max) * alpha) V`` with the maximum subtracted first.

    Scores are divided by alpha before they are stored and multiplied by it only after the maximum
    is gone, so that half precision overflows alpha times later than ``Q K / sqrt d`` (P-STAB-6).

    Args:
        q_BNSD, k_BNKD, v_BNKD: queries, keys and values.
        visible: boolean, broadcast to ``[B, N, S, K]``; every query must see a key.
        alpha: divisor of Eq. 4; 1 is plain attention.
        relax_max: maximum over the visible keys of a row, or over all visible scores of a head.
            Both satisfy P-STAB-7; only the row's can be reproduced by cached decoding, because a
            head's maximum depends on later rows.
        dropout: probability of dropping an attention weight.

    Returns:
        ``[B, N, S, D]`` in the dtype of the queries.
    """
    scale = 1.0 / (alpha * math.sqrt(q_BNSD.shape[-1]))
    scores_BNSK = (q_BNSD * scale) @ k_BNKD.transpose(-1, -2)
    scores_BNSK = scores_BNSK.masked_fill(~visible, float("-inf"))
    over = (-1,) if relax_max == "row" else (-2, -1)
    scores_BNSK = (scores_BNSK - scores_BNSK.detach().amax(over, keepdim=True)) * alpha
    weights_BNSK = F.dropout(torch.softmax(scores_BNSK, -1), dropout, training=dropout > 0)
    return weights_BNSK @ v_BNKD


def fused_is_safe(dtype: torch.dtype, device: torch.device, dropout: float) -> bool:
    """Whether PyTorch's fused attention is at least as overflow-safe as Eq. 4 here.

    In fp32 nothing can overflow at the sizes in question.  In half precision only kernels with
    fp32 scores qualify; on a CPU there is one, and it knows no dropout.
    """
    return dtype == torch.float32 or device.type == "cuda" or dropout == 0.0


def fused_attention(
    q_BNSD: torch.Tensor, k_BNKD: torch.Tensor, v_BNKD: torch.Tensor, dropout: float = 0.0
) -> torch.Tensor:
    """Causal attention by PyTorch's kernels; the queries are the last tokens of the keys.

    In half precision the materialising fallback is forbidden: with no fused kernel PyTorch raises.
    """
    num_queries, num_keys = q_BNSD.shape[-2], k_BNKD.shape[-2]
    square = num_queries == num_keys
    mask = None
    if not square and num_queries > 1:
        mask = causal_mask(num_queries, num_keys, q_BNSD.device)

    def attend() -> torch.Tensor:
        return F.scaled_dot_product_attention(
            q_BNSD, k_BNKD, v_BNKD, attn_mask=mask, dropout_p=dropout, is_causal=square
        )

    if q_BNSD.dtype == torch.float32:
        return attend()
    with sdpa_kernel(list(FUSED_BACKENDS)):
        return attend()
