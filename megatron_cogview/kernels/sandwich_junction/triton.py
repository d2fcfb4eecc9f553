"""The junction in one pass over memory each way, in Triton.

    u = dropout(h + bias)      z = residual + LN(u)      n = LN(z)

``end`` names the norm at the end of the branch, ``next`` the one that starts the next branch.

Shapes: M tokens, N columns, P programs, K parameters with a gradient.  A token's values stay in the
registers of one program from ``h`` to ``n``; everything is fp32 there.  ``z`` is rounded to its
type before the next norm reads it, so that the norm sees what the residual stream holds.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from megatron_cogview.kernels.philox import drop_threshold
from megatron_cogview.kernels.scaled_layer_norm.triton import (
    STAGES,
    backward_programs,
    block_columns,
    empty,
    load_row,
    relaxed_epsilon,
    row_statistics,
    row_warps,
    through_norm,
    tuned_warps,
)
from megatron_cogview.kernels.triton_support import Shipped

_BACKWARD_ELEMENTS = 8
"""Of a row, per thread: beside it lie three parameters and five sums."""
_MIXED_BACKWARD_ELEMENTS = 16
"""Where branch and residual differ in type.  Their loads then spread a row differently, and twice
as many threads, with half the registers each, would spill.  So would a second row under way."""


@triton.jit
def branch_row(
    h_MN, bias_N, row, seed, threshold, keep_scale, column_N, is_column_N,
    N: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``dropout(h + bias)`` of a row, and which elements dropout kept (``reference.keep_mask``).

    ``bias_N`` is the bias itself, not its place, or None."""
    u_N = load_row(h_MN + row * N, column_N, is_column_N)
    if bias_N is not None:
        u_N += bias_N
    keep_N = is_column_N
    if DROPOUT:
        counter_Q = row * ((N + 3) // 4) + tl.arange(0, BLOCK_N // 4)
        a_Q, b_Q, c_Q, d_Q = tl.randint4x(seed, counter_Q)
        word_N = tl.interleave(tl.interleave(a_Q, c_Q), tl.interleave(b_Q, d_Q))
        keep_N = word_N.to(tl.int32, bitcast=True) >= threshold
        u_N = tl.where(keep_N, u_N * keep_scale, 0.0)
    return u_N, keep_N


@triton.jit(do_not_specialize=["M", "seed", "threshold"])
def _forward(
    h_MN, bias_N, residual_MN, end_weight_N, end_bias_N, next_weight_N, next_bias_N,
    z_MN, n_MN, statistics_KM, M, epsilon, seed: tl.int64, threshold, keep_scale,
    N: tl.constexpr, RELAX_END: tl.constexpr, RELAX_NEXT: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One row a program.  ``bias_N`` and what belongs to the next norm may be None."""
    row = tl.program_id(0).to(tl.int64)
    column_N = tl.arange(0, BLOCK_N)
    is_column_N = column_N < N
    if bias_N is not None:
        bias_N = load_row(bias_N, column_N, is_column_N)
    u_N, _ = branch_row(
        h_MN, bias_N, row, seed, threshold, keep_scale, column_N, is_column_N, N, DROPOUT, BLOCK_N
    )
    end_epsilon = epsilon
    if RELAX_END:
        end_epsilon = relaxed_epsilon(u_N, epsilon, h_MN.dtype.element_ty)
    centred_N, mean, rstd = row_statistics(u_N, is_column_N, end_epsilon, N)
    tl.store(statistics_KM + row, mean)
    tl.store(statistics_KM + M + row, rstd)
    end_N = centred_N * rstd * load_row(end_weight_N, column_N, is_column_N)
    end_N += load_row(end_bias_N, column_N, is_column_N)
    z_N = load_row(residual_MN + row * N, column_N, is_column_N) + end_N
    stored_N = z_N.to(z_MN.dtype.element_ty)
    tl.store(z_MN + row * N + column_N, stored_N, mask=is_column_N)
    if next_weight_N is not None:
        z_N = stored_N.to(tl.float32)
        if RELAX_NEXT:
            epsilon = relaxed_epsilon(z_N, epsilon, z_MN.dtype.element_ty)
        centred_N, mean, rstd = row_statistics(z_N, is_column_N, epsilon, N)
        tl.store(statistics_KM + 2 * M + row, mean)
        tl.store(statistics_KM + 3 * M + row, rstd)
        n_N = centred_N * rstd * load_row(next_weight_N, column_N, is_column_N)
        n_N += load_row(next_bias_N, column_N, is_column_N)
        tl.store(n_MN + row * N + column_N, n_N.to(n_MN.dtype.element_ty), mask=is_column_N)


@triton.jit(do_not_specialize=["M", "seed", "threshold"])
def _backward(
    dz_MN, dn_MN, h_MN, bias_N, z_MN, end_weight_N, next_weight_N, statistics_KM,
    dx_MN, dh_MN, partial_PKN, M, seed: tl.int64, threshold, keep_scale,
    N: tl.constexpr, K: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Rows program, program + P, ...; the program's sums go to its own rows of the partial sums.

    ``dz_MN`` None: nothing comes from the residual stream.  ``dn_MN`` None: nothing comes from the
    next norm, the residual's gradient is ``dz_MN`` itself, and K is 3 instead of 5.
    """
    column_N = tl.arange(0, BLOCK_N)
    is_column_N = column_N < N
    end_weight_N = load_row(end_weight_N, column_N, is_column_N)
    if bias_N is not None:
        bias_N = load_row(bias_N, column_N, is_column_N)
    if dn_MN is not None:
        next_weight_N = load_row(next_weight_N, column_N, is_column_N)
    zero_N = tl.zeros([BLOCK_N], tl.float32)
    dend_weight_N, dend_bias_N, dbias_N = zero_N, zero_N, zero_N
    dnext_weight_N, dnext_bias_N = zero_N, zero_N
    # Beside the loop's own counter, because places in memory need 64 bits.
    row = tl.program_id(0).to(tl.int64)
    for _ in tl.range(tl.program_id(0), M, tl.num_programs(0), num_stages=STAGES):
        if dn_MN is not None:
            dn_N = load_row(dn_MN + row * N, column_N, is_column_N)
            z_N = load_row(z_MN + row * N, column_N, is_column_N)
            dx_N, normalised_N = through_norm(
                dn_N, z_N, next_weight_N, statistics_KM + 2 * M, M, row, is_column_N, N
            )
            dnext_weight_N += dn_N * normalised_N
            dnext_bias_N += dn_N
            if dz_MN is not None:
                dx_N += load_row(dz_MN + row * N, column_N, is_column_N)
            tl.store(dx_MN + row * N + column_N, dx_N.to(dx_MN.dtype.element_ty), mask=is_column_N)
        else:
            dx_N = load_row(dz_MN + row * N, column_N, is_column_N)
        u_N, keep_N = branch_row(
            h_MN, bias_N, row, seed, threshold, keep_scale, column_N, is_column_N,
            N, DROPOUT, BLOCK_N,
        )  # fmt: skip
        # Outside the columns the weight is zero, whatever dx is there.
        dh_N, normalised_N = through_norm(
            dx_N, u_N, end_weight_N, statistics_KM, M, row, is_column_N, N
        )
        dend_weight_N += dx_N * normalised_N
        dend_bias_N += dx_N
        if DROPOUT:
            dh_N = tl.where(keep_N, dh_N * keep_scale, 0.0)
        dbias_N += dh_N
        tl.store(dh_MN + row * N + column_N, dh_N.to(dh_MN.dtype.element_ty), mask=is_column_N)
        row += tl.num_programs(0)
    partial = partial_PKN + tl.program_id(0) * K * N + column_N
    tl.store(partial, dend_weight_N, mask=is_column_N)
    tl.store(partial + N, dend_bias_N, mask=is_column_N)
    tl.store(partial + 2 * N, dbias_N, mask=is_column_N)
    if dn_MN is not None:
        tl.store(partial + 3 * N, dnext_weight_N, mask=is_column_N)
        tl.store(partial + 4 * N, dnext_bias_N, mask=is_column_N)


def forward(
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
    """The junction of rows.

    Args:
        h_MN, residual_MN: contiguous; fp16, bf16 or fp32, each of its own type.
        bias_N, end_weight_N, end_bias_N, next_weight_N, next_bias_N: contiguous; those of the next
            norm are None together.
        epsilon: of both norms.
        relax_end, relax_next: whether a norm divides each row by its maximum first.
        dropout: probability in [0, 1).
        seed: signed, 64 bits.

    Returns:
        ``z_MN`` in the residual's type; ``n_MN`` in the type of ``h_MN``, without elements if there
        is no next norm; ``statistics_KM`` in fp32: mean and 1 / sqrt(variance + epsilon m^2) of the
        end norm, then of the next one, so K is 2 or 4.
    """
    M, N = h_MN.shape
    has_next = next_weight_N is not None
    z_MN = empty((M, N), residual_MN.dtype, h_MN.device)
    n_MN = empty((M, N) if has_next else (0, N), h_MN.dtype, h_MN.device)
    statistics_KM = empty((4 if has_next else 2, M), torch.float32, h_MN.device)
    with torch.cuda.device_of(h_MN):
        _forward[(M,)](
            h_MN, bias_N, residual_MN, end_weight_N, end_bias_N, next_weight_N, next_bias_N,
            z_MN, n_MN, statistics_KM, M, epsilon, seed, drop_threshold(dropout),
            1 / (1 - dropout), N, relax_end, relax_next, dropout > 0, block_columns(N),
            num_warps=tuned_warps("sandwich_junction.forward", N),
        )  # fmt: skip
    return z_MN, n_MN, statistics_KM


def backward(
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
    """Gradients of the junction; the same call gives the same bits.

    Args:
        dz_MN, dn_MN: gradients of ``z`` and ``n``, contiguous; one of them may be None, for zero.
        h_MN, bias_N, end_weight_N, next_weight_N, dropout, seed: as in ``forward``.
        z_MN, statistics_KM: its results.

    Returns:
        ``dx_MN`` of the residual, in its type, without elements if ``dn_MN`` is None: it is
        ``dz_MN`` then.  ``dh_MN`` in the type of ``h_MN``.  In fp32 the gradients of end weight,
        end bias, bias and, unless ``dn_MN`` is None, of the next weight and bias, as rows.
    """
    M, N = h_MN.shape
    has_next = dn_MN is not None
    dx_MN = empty((M, N) if has_next else (0, N), z_MN.dtype, h_MN.device)
    dh_MN = empty((M, N), h_MN.dtype, h_MN.device)
    mixed = h_MN.dtype != z_MN.dtype
    name = f"sandwich_junction.backward{'.mixed' if mixed else ''}"
    warps = tuned_warps(name, N, _backward_elements(mixed))
    programs = backward_programs(M, warps, h_MN.device)
    sums = 5 if has_next else 3
    partial_PKN = empty((programs, sums, N), torch.float32, h_MN.device)
    with torch.cuda.device_of(h_MN):
        _backward[(programs,)](
            dz_MN, dn_MN, h_MN, bias_N, z_MN, end_weight_N, next_weight_N, statistics_KM,
            dx_MN, dh_MN, partial_PKN, M, seed, drop_threshold(dropout), 1 / (1 - dropout),
            N, sums, dropout > 0, block_columns(N), _backward_stages(mixed), num_warps=warps,
        )  # fmt: skip
    # One row a program, added in torch's fixed order: no atomics.
    return dx_MN, dh_MN, partial_PKN.sum(0)


def _backward_elements(mixed: bool) -> int:
    return _MIXED_BACKWARD_ELEMENTS if mixed else _BACKWARD_ELEMENTS


def _backward_stages(mixed: bool) -> int:
    return 1 if mixed else STAGES


def shipped() -> Iterator[Shipped]:
    """The kernels at the hidden sizes of the presets, for the check that compiles them."""
    for columns in (128, 256):
        yield _shipped_forward(columns)
        yield _shipped_backward(columns, (152, 2304))
    for columns, most in ((1024, (168, 8448)), (2560, (128, 33024)), (4096, (128, 33024))):
        for relaxed in (False, True):
            yield _shipped_forward(columns, relaxed=relaxed)
        yield _shipped_backward(columns, most)
        # The residual stream in fp32.
        yield _shipped_forward(columns, most=(64, 8192), residual="fp32")
        for branch in ("bf16", "fp16"):
            yield _shipped_backward(columns, (255, 8448), branch=branch, residual="fp32")
    yield _shipped_forward(2560, branch="fp16", residual="fp16")
    yield _shipped_backward(2560, (128, 33024), branch="fp16", residual="fp16")
    # The last layer, in evaluation.
    yield _shipped_forward(2560, has_next=False, dropout=False)
    yield _shipped_backward(2560, (104, 16640), has_next=False, dropout=False)


def _shipped_forward(
    columns: int,
    most: tuple[int, int] = (48, 32),
    branch: str = "bf16",
    residual: str = "bf16",
    relaxed: bool = True,
    has_next: bool = True,
    dropout: bool = True,
) -> Shipped:
    constants = {"N": columns, "RELAX_END": relaxed, "RELAX_NEXT": relaxed, "DROPOUT": dropout}
    absent = () if has_next else ("next_weight_N", "next_bias_N")
    return _shipped(_forward, row_warps(columns), constants, absent, branch, residual, most)


def _shipped_backward(
    columns: int,
    most: tuple[int, int],
    branch: str = "bf16",
    residual: str = "bf16",
    has_next: bool = True,
    dropout: bool = True,
) -> Shipped:
    mixed = branch != residual
    constants = {"N": columns, "K": 5 if has_next else 3, "DROPOUT": dropout}
    constants["STAGES"] = _backward_stages(mixed)
    absent = () if has_next else ("dn_MN", "next_weight_N")
    warps = row_warps(columns, _backward_elements(mixed))
    return _shipped(_backward, warps, constants, absent, branch, residual, most)


def _shipped(
    kernel: Any,
    warps: int,
    constants: dict[str, Any],
    absent: tuple[str, ...],
    branch: str,
    residual: str,
    most: tuple[int, int],
) -> Shipped:
    """``absent`` arguments are None; ``most`` is registers and bytes of shared memory."""
    constants = constants | dict.fromkeys(absent) | {"BLOCK_N": block_columns(constants["N"])}
    of_residual = ("residual_MN", "z_MN", "dz_MN", "dx_MN")
    types = {name: f"*{residual if name in of_residual else branch}" for name in kernel.arg_names}
    types |= {"statistics_KM": "*fp32", "partial_PKN": "*fp32", "M": "i32", "epsilon": "fp32"}
    types |= {"seed": "i64", "threshold": "i32", "keep_scale": "fp32"}
    return Shipped(
        kernel=kernel,
        types={name: types[name] for name in kernel.arg_names if name not in constants},
        constants=constants,
        num_warps=warps,
        num_stages=1,
        most_registers=most[0],
        most_shared_bytes=most[1],
    )
