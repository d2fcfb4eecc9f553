"""The junction of two Sandwich-LN branches written out in PyTorch, and its dropout.

Shapes: S sequence, B batch, H hidden; any leading shape works.  M tokens, Q groups of
four columns.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch

from megatron_cogview.kernels import philox
from megatron_cogview.kernels.scaled_layer_norm.reference import scaled_layer_norm

JunctionRule = Literal["none", "token_max"]
"""The rules that look at one token alone; a maximum of the tensor is not known in one pass."""


def sandwich_junction(
    h_SBH: torch.Tensor,
    bias_H: torch.Tensor | None,
    residual_SBH: torch.Tensor,
    end_weight_H: torch.Tensor,
    end_bias_H: torch.Tensor,
    next_weight_H: torch.Tensor | None,
    next_bias_H: torch.Tensor | None,
    epsilon: float,
    end_rule: JunctionRule,
    next_rule: JunctionRule,
    dropout: float,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``z = residual + LN(dropout(h + bias))`` and ``n = LN(z)`` (P-STAB-8, P-STAB-9).

    Args:
        h_SBH: result of the branch's last matrix.
        bias_H: that matrix's bias, or None.
        residual_SBH: the residual stream; it may be fp32 where ``h_SBH`` is not.
        end_weight_H, end_bias_H: the norm at the end of the branch.
        next_weight_H, next_bias_H: the norm that starts the next branch, or None: no ``n``.
        epsilon: of both norms.
        end_rule, next_rule: PB-relax of each (P-STAB-3).
        dropout: probability in [0, 1) that an element of ``h + bias`` becomes zero.
        seed: 64 bits, must differ between layers and steps; see ``keep_mask``.

    Returns:
        ``z_SBH`` in the residual's type and ``n_SBH`` in the type of ``h_SBH``, or None.
    """
    u_SBH = h_SBH if bias_H is None else h_SBH + bias_H
    if dropout > 0:
        keep_SBH = keep_mask(seed, h_SBH.shape, dropout, h_SBH.device)
        u_SBH = torch.where(keep_SBH, u_SBH / (1 - dropout), 0)
    z_SBH = residual_SBH + scaled_layer_norm(u_SBH, end_weight_H, end_bias_H, epsilon, end_rule)
    if next_weight_H is None or next_bias_H is None:
        return z_SBH, None
    weight_H, bias_H = next_weight_H.to(z_SBH.dtype), next_bias_H.to(z_SBH.dtype)
    n_SBH = scaled_layer_norm(z_SBH, weight_H, bias_H, epsilon, next_rule)
    return z_SBH, n_SBH.to(h_SBH.dtype)


def keep_mask(
    seed: int, shape: Sequence[int], p: float, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Which elements dropout keeps; a function of seed, row and column, and of nothing else.

    Element (row, column) has word ``column % 4`` of Philox at the counter ``row * ceil(H / 4) +
    column // 4``, rows counted over all leading axes.  Four neighbours share a counter, because
    drawing costs more than normalising.

    Args:
        seed: 64 bits, signed or unsigned.
        shape: [..., H].
        p: probability in [0, 1) that an element is dropped.
        device: where the mask is made.

    Returns:
        bool, of that shape.

    Raises:
        ValueError: p is outside [0, 1).
    """
    columns = shape[-1]
    groups = -(-columns // 4)
    counter_MQ = torch.arange(math.prod(shape[:-1]) * groups, device=device).view(-1, groups)
    drawn = philox.words(seed, counter_MQ, counter_MQ >> 32, 0, 0)
    word_MH = torch.stack(drawn, -1).flatten(1)[:, :columns]
    return (philox.signed(word_MH) >= philox.drop_threshold(p)).view(tuple(shape))
