"""PB-relax LayerNorm written out in PyTorch.

Shapes: ``x_SBH`` sequence, batch, hidden; any leading shape works.
"""

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F

RelaxRule = Literal["none", "token_max", "tensor_max_over_8"]


def scaled_layer_norm(
    x_SBH: torch.Tensor,
    weight_H: torch.Tensor,
    bias_H: torch.Tensor,
    epsilon: float,
    rule: RelaxRule,
    max_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """LayerNorm over the last axis of ``x / m``; no gradient flows through ``m``.

    Args:
        x_SBH: input.
        weight_H, bias_H: affine parameters.
        epsilon: added to the variance of ``x / m``.
        rule: ``none`` (m = 1), ``token_max`` (m = max|x| of the token, P-STAB-4) or
            ``tensor_max_over_8`` (m = max|x| of the whole tensor / 8, as the released code).
        max_group: ranks that hold other parts of the same tensor (sequence parallelism); the
            whole-tensor maximum is reduced over them.

    Returns:
        The normalised tensor, shaped and typed as ``x_SBH``.
    """
    if rule != "none":
        size_SBH = x_SBH.detach().abs()
        # A clamp, because an all-zero token or tensor would give 0/0.
        smallest = torch.finfo(x_SBH.dtype).tiny
        if rule == "token_max":
            divisor = size_SBH.amax(-1, keepdim=True)
        else:
            divisor = size_SBH.amax()
            if max_group is not None:
                dist.all_reduce(divisor, op=dist.ReduceOp.MAX, group=max_group)
            divisor = divisor / 8
        x_SBH = x_SBH / divisor.clamp_min(smallest)
    return F.layer_norm(x_SBH, x_SBH.shape[-1:], weight_H, bias_H, epsilon)
