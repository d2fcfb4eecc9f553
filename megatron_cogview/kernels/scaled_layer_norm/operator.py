"""PB-relax LayerNorm under either implementation, as an operation that PyTorch can trace.

Shapes: ``x_SBH`` sequence, batch, hidden; any leading shape works.  M tokens, N = H columns.

The Triton version is a custom operation, so that ``torch.compile`` and activation recomputation
see one node with known shapes.  Triton is imported when it first runs.
"""

import torch
import torch.distributed as dist

from megatron_cogview.kernels.dispatch import Implementation
from megatron_cogview.kernels.scaled_layer_norm import reference
from megatron_cogview.kernels.scaled_layer_norm.reference import RelaxRule


def scaled_layer_norm(
    x_SBH: torch.Tensor,
    weight_H: torch.Tensor,
    bias_H: torch.Tensor,
    epsilon: float,
    rule: RelaxRule,
    max_group: dist.ProcessGroup | None = None,
    *,
    implementation: Implementation,
) -> torch.Tensor:
    """LayerNorm over the last axis of ``x / m``; no gradient flows through ``m`` (P-STAB-3).

    Args:
        x_SBH: input; fp16, bf16 or fp32 for ``triton``, contiguous or not.
        weight_H, bias_H: affine parameters.
        epsilon: added to the variance of ``x / m``.
        rule: what m is, see ``reference.scaled_layer_norm``.
        max_group: ranks that hold other parts of the same tensor; for ``tensor_max_over_8``.
        implementation: as ``dispatch.choose`` returned it.

    Returns:
        The normalised tensor, shaped and typed as ``x_SBH``.

    Raises:
        ValueError: a type or a width that the kernel is not made for.
    """
    if implementation == "reference":
        return reference.scaled_layer_norm(x_SBH, weight_H, bias_H, epsilon, rule, max_group)
    x_MN = x_SBH.reshape(-1, x_SBH.shape[-1]).contiguous()
    divisor_1 = _tensor_divisor(x_MN, max_group) if rule == "tensor_max_over_8" else None
    y_MN, _ = _layer_norm(
        x_MN, weight_H.contiguous(), bias_H.contiguous(), divisor_1, epsilon, rule == "token_max"
    )
    return y_MN.view(x_SBH.shape)


def check_rows(x_MN: torch.Tensor, *parameters_N: torch.Tensor | None) -> None:
    """That a kernel which holds a row in registers can take these rows and parameters.

    Raises:
        ValueError: it cannot; the message says why.
    """
    from megatron_cogview.kernels.scaled_layer_norm.triton import MOST_COLUMNS

    columns = x_MN.shape[1]
    if x_MN.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"fp16, bf16 or fp32 expected, got {x_MN.dtype}; use the reference")
    if not 1 <= columns <= MOST_COLUMNS:
        raise ValueError(f"1 to {MOST_COLUMNS} columns expected, got {columns}; use the reference")
    for parameter_N in parameters_N:
        if parameter_N is not None and parameter_N.shape != (columns,):
            raise ValueError(f"a parameter is {tuple(parameter_N.shape)}, rows are {columns} wide")


def _tensor_divisor(x_MN: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """max|x| of the whole tensor / 8, one fp32 element."""
    # aminmax has no answer for a tensor without elements, abs().amax() makes a copy.
    least, most = torch.aminmax(x_MN.detach())
    divisor = torch.maximum(-least, most).float()
    if group is not None:
        dist.all_reduce(divisor, op=dist.ReduceOp.MAX, group=group)
    return (divisor / 8).view(1)


@torch.library.custom_op("cogview::scaled_layer_norm", mutates_args=())
def _layer_norm(
    x_MN: torch.Tensor,
    weight_N: torch.Tensor,
    bias_N: torch.Tensor,
    divisor_1: torch.Tensor | None,
    epsilon: float,
    token_max: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    from megatron_cogview.kernels.scaled_layer_norm import triton

    check_rows(x_MN, weight_N, bias_N)
    return triton.forward(x_MN, weight_N, bias_N, divisor_1, epsilon, token_max)


@_layer_norm.register_fake
def _(
    x_MN: torch.Tensor,
    weight_N: torch.Tensor,
    bias_N: torch.Tensor,
    divisor_1: torch.Tensor | None,
    epsilon: float,
    token_max: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x_MN), x_MN.new_empty((2, x_MN.shape[0]), dtype=torch.float32)


@torch.library.custom_op("cogview::scaled_layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    dy_MN: torch.Tensor, x_MN: torch.Tensor, weight_N: torch.Tensor, statistics_2M: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    from megatron_cogview.kernels.scaled_layer_norm import triton

    return triton.backward(dy_MN, x_MN, weight_N, statistics_2M)


@_layer_norm_backward.register_fake
def _(
    dy_MN: torch.Tensor, x_MN: torch.Tensor, weight_N: torch.Tensor, statistics_2M: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x_MN), x_MN.new_empty((2, x_MN.shape[1]), dtype=torch.float32)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x_MN, weight_N, *_ = inputs
    _, statistics_2M = output
    ctx.save_for_backward(x_MN, weight_N, statistics_2M)
    ctx.mark_non_differentiable(statistics_2M)


def _gradients(ctx, dy_MN, _):  # type: ignore[no-untyped-def]
    x_MN, weight_N, statistics_2M = ctx.saved_tensors
    dx_MN, sums_2N = _layer_norm_backward(dy_MN.contiguous(), x_MN, weight_N, statistics_2M)
    dweight_N, dbias_N = sums_2N.to(weight_N.dtype).unbind(0)
    return dx_MN, dweight_N, dbias_N, None, None, None


_layer_norm.register_autograd(_gradients, setup_context=_save)
