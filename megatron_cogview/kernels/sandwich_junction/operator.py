"""The junction of two Sandwich-LN branches under either implementation, traceable by PyTorch.

Shapes: S sequence, B batch, H hidden; any leading shape works.  M tokens, N = H columns, K sums or
statistics.

The Triton version is a custom operation, so that ``torch.compile`` and activation recomputation
see one node with known shapes.  Triton is imported when it first runs.
"""

import torch

from megatron_cogview.kernels.dispatch import Implementation
from megatron_cogview.kernels.philox import drop_threshold
from megatron_cogview.kernels.sandwich_junction import reference
from megatron_cogview.kernels.sandwich_junction.reference import JunctionRule
from megatron_cogview.kernels.scaled_layer_norm.operator import check_rows


def sandwich_junction(
    h_SBH: torch.Tensor,
    bias_H: torch.Tensor | None,
    residual_SBH: torch.Tensor,
    end_weight_H: torch.Tensor,
    end_bias_H: torch.Tensor,
    next_weight_H: torch.Tensor | None,
    next_bias_H: torch.Tensor | None,
    *,
    epsilon: float,
    end_rule: JunctionRule = "none",
    next_rule: JunctionRule = "none",
    dropout: float = 0.0,
    seed: int = 0,
    implementation: Implementation,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``z = residual + LN(dropout(h + bias))`` and ``n = LN(z)`` (P-STAB-8, P-STAB-9).

    Args:
        h_SBH: result of the branch's last matrix; fp16, bf16 or fp32 for ``triton``.
        bias_H: that matrix's bias, or None.
        residual_SBH: the residual stream, of the same shape; it may be fp32 where ``h_SBH`` is not.
        end_weight_H, end_bias_H: the norm at the end of the branch.
        next_weight_H, next_bias_H: the norm that starts the next branch, or None: no ``n``.
        epsilon: added to the variance, of both norms.
        end_rule, next_rule: PB-relax of each (P-STAB-3): ``none`` or ``token_max``.
        dropout: probability in [0, 1) that an element of ``h + bias`` becomes zero; 0 outside
            training.
        seed: signed, 64 bits.  What dropout drops follows from it and from row and column here:
            ranks that hold other rows need another seed, ranks that hold the same rows the same.
            It must differ between layers, branches and steps.
        implementation: as ``dispatch.choose`` returned it.

    Returns:
        ``z_SBH`` in the residual's type and ``n_SBH`` in the type of ``h_SBH``, or None.

    Raises:
        ValueError: shapes that do not fit, a rule or a dropout outside the above, or a type or
            width that the kernel is not made for.
    """
    _check(h_SBH, residual_SBH, next_weight_H, next_bias_H, (end_rule, next_rule), dropout)
    parameters = (end_weight_H, end_bias_H, next_weight_H, next_bias_H)
    if implementation == "reference":
        return reference.sandwich_junction(
            h_SBH, bias_H, residual_SBH, *parameters, epsilon, end_rule, next_rule, dropout, seed
        )
    columns = h_SBH.shape[-1]
    z_MN, n_MN, _ = _junction(
        h_SBH.reshape(-1, columns).contiguous(),
        None if bias_H is None else bias_H.contiguous(),
        residual_SBH.reshape(-1, columns).contiguous(),
        *(None if each is None else each.contiguous() for each in parameters),
        epsilon,
        end_rule == "token_max",
        next_rule == "token_max",
        dropout,
        seed,
    )
    z_SBH = z_MN.view(h_SBH.shape)
    return z_SBH, None if next_weight_H is None else n_MN.view(h_SBH.shape)


def _check(
    h_SBH: torch.Tensor,
    residual_SBH: torch.Tensor,
    next_weight_H: torch.Tensor | None,
    next_bias_H: torch.Tensor | None,
    rules: tuple[str, str],
    dropout: float,
) -> None:
    if h_SBH.shape != residual_SBH.shape:
        raise ValueError(
            f"sandwich_junction: h is {tuple(h_SBH.shape)}, residual {tuple(residual_SBH.shape)}"
        )
    if (next_weight_H is None) != (next_bias_H is None):
        raise ValueError("sandwich_junction: the next norm needs a weight and a bias, or neither")
    for rule in rules:
        if rule not in ("none", "token_max"):
            raise ValueError(
                f"sandwich_junction: rule {rule!r} needs more than one token; take separate norms"
            )
    drop_threshold(dropout)


@torch.library.custom_op("cogview::sandwich_junction", mutates_args=())
def _junction(
    h_MN: torch.Tensor,
    bias_N: torch.Tensor | None,
    residual_MN: torch.Tensor,
    end_weight_N: torch.Tensor,
    end_bias_N: torch.Tensor,
    next_weight_N: torch.Tensor | None,
    next_bias_N: torch.Tensor | None,
    epsilon: float,
    relax_end: bool,
    relax_next: bool,
    dropout: float,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from megatron_cogview.kernels.sandwich_junction import triton

    check_rows(h_MN, bias_N, end_weight_N, end_bias_N, next_weight_N, next_bias_N)
    check_rows(residual_MN)
    return triton.forward(
        h_MN, bias_N, residual_MN, end_weight_N, end_bias_N, next_weight_N, next_bias_N,
        epsilon, relax_end, relax_next, dropout, seed,
    )  # fmt: skip


@_junction.register_fake
def _(h_MN, bias_N, residual_MN, end_weight_N, end_bias_N, next_weight_N, *_):  # type: ignore[no-untyped-def]
    M, N = h_MN.shape
    has_next = next_weight_N is not None
    n_MN = h_MN.new_empty((M if has_next else 0, N))
    statistics_KM = h_MN.new_empty((4 if has_next else 2, M), dtype=torch.float32)
    return torch.empty_like(residual_MN), n_MN, statistics_KM


@torch.library.custom_op("cogview::sandwich_junction_backward", mutates_args=())
def _junction_backward(
    dz_MN: torch.Tensor | None,
    dn_MN: torch.Tensor | None,
    h_MN: torch.Tensor,
    bias_N: torch.Tensor | None,
    z_MN: torch.Tensor,
    end_weight_N: torch.Tensor,
    next_weight_N: torch.Tensor | None,
    statistics_KM: torch.Tensor,
    dropout: float,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from megatron_cogview.kernels.sandwich_junction import triton

    return triton.backward(
        dz_MN, dn_MN, h_MN, bias_N, z_MN, end_weight_N, next_weight_N, statistics_KM, dropout, seed
    )


@_junction_backward.register_fake
def _(dz_MN, dn_MN, h_MN, bias_N, z_MN, *_):  # type: ignore[no-untyped-def]
    M, N = h_MN.shape
    has_next = dn_MN is not None
    dx_MN = z_MN.new_empty((M if has_next else 0, N))
    sums_KN = h_MN.new_empty((5 if has_next else 3, N), dtype=torch.float32)
    return dx_MN, torch.empty_like(h_MN), sums_KN


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    h_MN, bias_N, _, end_weight_N, _, next_weight_N, _, _, _, _, dropout, seed = inputs
    z_MN, _, statistics_KM = output
    ctx.save_for_backward(h_MN, bias_N, z_MN, end_weight_N, next_weight_N, statistics_KM)
    ctx.dropout, ctx.seed = dropout, seed
    ctx.mark_non_differentiable(statistics_KM)
    # A result that nobody uses has no gradient, and the kernel reads none.
    ctx.set_materialize_grads(False)


def _gradients(ctx, dz_MN, dn_MN, _):  # type: ignore[no-untyped-def]
    h_MN, bias_N, z_MN, end_weight_N, next_weight_N, statistics_KM = ctx.saved_tensors
    dz_MN = None if dz_MN is None else dz_MN.contiguous()
    # Without a next norm its result has no elements, and may have a gradient with none.
    dn_MN = None if dn_MN is None or next_weight_N is None else dn_MN.contiguous()
    dx_MN, dh_MN, sums_KN = _junction_backward(
        dz_MN, dn_MN, h_MN, bias_N, z_MN, end_weight_N, next_weight_N, statistics_KM,
        ctx.dropout, ctx.seed,
    )  # fmt: skip
    return (
        dh_MN,
        None if bias_N is None else sums_KN[2].to(bias_N.dtype),
        dz_MN if dn_MN is None else dx_MN,
        *sums_KN[:2].to(end_weight_N.dtype).unbind(0),
        *((None, None) if dn_MN is None else sums_KN[3:].to(next_weight_N.dtype).unbind(0)),
        *(None,) * 5,
    )


_junction.register_autograd(_gradients, setup_context=_save)
