"""LayerNorm with PB-relax in one pass over memory each way, in Triton.

PB-relax divides a token by m before the norm.  As m is a constant to the gradient,
``LN(x / m; epsilon) = LN(x; epsilon m^2)``: the kernels scale epsilon and never divide a token, and
the gradient is that of a plain LayerNorm once the scaled epsilon is inside ``rstd``.

Shapes: M tokens, N columns, P programs.  A token is held in registers by one program; its
statistics are fp32, whatever the tensors' type.

The functions without an underscore that are marked ``triton.jit`` are for other kernels too.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from megatron_cogview.kernels.triton_support import Shipped, num_multiprocessors
from megatron_cogview.kernels.tuning import tuned

MOST_COLUMNS = 8192
"""A wider row no longer fits the registers of one program."""

ELEMENTS_PER_THREAD = 16
"""Of a row, where few rows of sums are held beside it."""
_WARPS_PER_MULTIPROCESSOR = 16
"""In the backward grid.  More programs hide more latency and write more partial sums."""
STAGES = 2
"""Rows of a backward program under way: the next is fetched while one is worked on."""


@triton.jit
def load_row(start, column_N, is_column_N):
    """A row in fp32, zero outside its columns."""
    return tl.load(start + column_N, mask=is_column_N, other=0.0).to(tl.float32)


@triton.jit
def clamped(largest, dtype: tl.constexpr):
    """m, kept from zero: a zero token would give 0 * inf.

    fp16 has the reference's clamp, its smallest normal number.  For bf16 and fp32 that number
    squared is zero in fp32; 2^-50 keeps ``epsilon m^2`` a normal number down to epsilon = 1e-7.
    """
    smallest: tl.constexpr = 2.0**-14 if dtype == tl.float16 else 2.0**-50
    return tl.maximum(largest, smallest)


@triton.jit
def relaxed_epsilon(row_N, epsilon, dtype: tl.constexpr):
    """``epsilon m^2`` with m = max|x| of the row; ``dtype`` is what the row is stored as."""
    largest = clamped(tl.max(tl.abs(row_N), 0), dtype)
    return epsilon * largest * largest


@triton.jit
def row_statistics(row_N, is_column_N, epsilon, N: tl.constexpr):
    """The row less its mean, the mean, and 1 / sqrt(variance + epsilon).

    Two passes in registers: a sum of squares less the squared mean would cancel.  ``row_N`` is zero
    outside the columns, and so is the centred row.
    """
    mean = tl.sum(row_N, 0) / N
    centred_N = tl.where(is_column_N, row_N - mean, 0.0)
    variance = tl.sum(centred_N * centred_N, 0) / N
    return centred_N, mean, 1.0 / tl.sqrt_rn(variance + epsilon)


@triton.jit
def through_norm(
    dy_N, x_N, weight_N, statistics_2M, M, row, is_column_N, N: tl.constexpr
):  # fmt: skip
    """The gradient of a norm's input, and the input normalised by its saved statistics."""
    mean = tl.load(statistics_2M + row)
    rstd = tl.load(statistics_2M + M + row)
    normalised_N = tl.where(is_column_N, (x_N - mean) * rstd, 0.0)
    gradient_N = dy_N * weight_N
    along = tl.sum(gradient_N * normalised_N, 0) / N
    gradient_N -= tl.sum(gradient_N, 0) / N
    return (gradient_N - normalised_N * along) * rstd, normalised_N


@triton.jit(do_not_specialize=["M"])
def _forward(
    x_MN, weight_N, bias_N, divisor_1, y_MN, statistics_2M, M, epsilon,
    N: tl.constexpr, TOKEN_MAX: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One row a program.  ``divisor_1`` is None, or the m of all rows."""
    row = tl.program_id(0).to(tl.int64)
    column_N = tl.arange(0, BLOCK_N)
    is_column_N = column_N < N
    x_N = load_row(x_MN + row * N, column_N, is_column_N)
    if TOKEN_MAX:
        epsilon = relaxed_epsilon(x_N, epsilon, x_MN.dtype.element_ty)
    if divisor_1 is not None:
        divisor = clamped(tl.load(divisor_1), x_MN.dtype.element_ty)
        epsilon = epsilon * divisor * divisor
    centred_N, mean, rstd = row_statistics(x_N, is_column_N, epsilon, N)
    y_N = centred_N * rstd * load_row(weight_N, column_N, is_column_N)
    y_N += load_row(bias_N, column_N, is_column_N)
    tl.store(y_MN + row * N + column_N, y_N.to(y_MN.dtype.element_ty), mask=is_column_N)
    tl.store(statistics_2M + row, mean)
    tl.store(statistics_2M + M + row, rstd)


@triton.jit(do_not_specialize=["M"])
def _backward(
    dy_MN, x_MN, weight_N, statistics_2M, dx_MN, partial_P2N, M,
    N: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows program, program + P, ...; the program's sums for weight and bias go to its own row."""
    program = tl.program_id(0)
    column_N = tl.arange(0, BLOCK_N)
    is_column_N = column_N < N
    weight = load_row(weight_N, column_N, is_column_N)
    dweight_N = tl.zeros([BLOCK_N], tl.float32)
    dbias_N = tl.zeros([BLOCK_N], tl.float32)
    # Beside the loop's own counter, because places in memory need 64 bits.
    row = program.to(tl.int64)
    for _ in tl.range(program, M, tl.num_programs(0), num_stages=STAGES):
        dy_N = load_row(dy_MN + row * N, column_N, is_column_N)
        x_N = load_row(x_MN + row * N, column_N, is_column_N)
        dx_N, normalised_N = through_norm(dy_N, x_N, weight, statistics_2M, M, row, is_column_N, N)
        dweight_N += dy_N * normalised_N
        dbias_N += dy_N
        tl.store(dx_MN + row * N + column_N, dx_N.to(dx_MN.dtype.element_ty), mask=is_column_N)
        row += tl.num_programs(0)
    partial = partial_P2N + program * 2 * N + column_N
    tl.store(partial, dweight_N, mask=is_column_N)
    tl.store(partial + N, dbias_N, mask=is_column_N)


def forward(
    x_MN: torch.Tensor,
    weight_N: torch.Tensor,
    bias_N: torch.Tensor,
    divisor_1: torch.Tensor | None,
    epsilon: float,
    token_max: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised rows, and their statistics for the backward pass.

    Args:
        x_MN: rows, contiguous, fp16, bf16 or fp32.
        weight_N, bias_N: affine parameters, contiguous.
        divisor_1: m of all rows, fp32, or None.
        epsilon: added to the variance of ``x / m``.
        token_max: whether m is max|x| of the row; not together with ``divisor_1``.

    Returns:
        ``y_MN`` in the type of ``x_MN``, and ``statistics_2M``: mean and 1 / sqrt(variance +
        epsilon m^2) of each row, fp32.
    """
    M, N = x_MN.shape
    y_MN = empty((M, N), x_MN.dtype, x_MN.device)
    statistics_2M = empty((2, M), torch.float32, x_MN.device)
    with torch.cuda.device_of(x_MN):
        _forward[(M,)](
            x_MN, weight_N, bias_N, divisor_1, y_MN, statistics_2M, M, epsilon,
            N, token_max, block_columns(N), num_warps=tuned_warps("scaled_layer_norm.forward", N),
        )  # fmt: skip
    return y_MN, statistics_2M


def backward(
    dy_MN: torch.Tensor, x_MN: torch.Tensor, weight_N: torch.Tensor, statistics_2M: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the rows, the weight and the bias; the same call gives the same bits.

    Args:
        dy_MN: gradient of the result, contiguous.
        x_MN, weight_N, statistics_2M: as in ``forward``.

    Returns:
        ``dx_MN`` in the type of ``x_MN``, and in fp32 the gradients of weight and bias as the two
        rows of one tensor.
    """
    M, N = x_MN.shape
    dx_MN = empty((M, N), x_MN.dtype, x_MN.device)
    warps = tuned_warps("scaled_layer_norm.backward", N)
    programs = backward_programs(M, warps, x_MN.device)
    partial_P2N = empty((programs, 2, N), torch.float32, x_MN.device)
    with torch.cuda.device_of(x_MN):
        _backward[(programs,)](
            dy_MN, x_MN, weight_N, statistics_2M, dx_MN, partial_P2N, M,
            N, block_columns(N), STAGES, num_warps=warps,
        )  # fmt: skip
    # One row a program, added in torch's fixed order: no atomics.
    return dx_MN, partial_P2N.sum(0)


def block_columns(columns: int) -> int:
    """Lanes of a row: the next power of two, and at least a 128-bit load for each of 32 threads."""
    return max(256, triton.next_power_of_2(columns))


def row_warps(columns: int, elements: int = ELEMENTS_PER_THREAD) -> int:
    """Warps of a program that holds one row, so many elements of it in a thread."""
    return min(16, max(1, block_columns(columns) // (32 * elements)))


def tuned_warps(kernel: str, columns: int, elements: int = ELEMENTS_PER_THREAD) -> int:
    """Warps of a program that holds one row, measured ones if there are some."""
    return tuned(f"{kernel}.N{columns}", (row_warps(columns, elements),))[0]


def backward_programs(rows: int, warps: int, device: torch.device) -> int:
    """P of a backward grid: what fills the device, and no more than there are rows."""
    each = max(1, _WARPS_PER_MULTIPROCESSOR // warps)
    return min(rows, num_multiprocessors(device) * each)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory that a kernel fills; tests poison it."""
    return torch.empty(shape, dtype=dtype, device=device)


def shipped() -> Iterator[Shipped]:
    """The kernels at the hidden sizes of the presets, for the check that compiles them."""
    for columns in (128, 256, 1024, 2560, 4096):
        yield _shipped_forward("bf16", columns, "token_max")
        yield _shipped_backward("bf16", columns)
    for rule in ("none", "tensor_max_over_8"):
        yield _shipped_forward("bf16", 2560, rule)
    yield _shipped_forward("fp16", 2560, "token_max")
    yield _shipped_backward("fp16", 2560)


def _shipped_forward(dtype: str, columns: int, rule: str) -> Shipped:
    of_rows = dict.fromkeys(("x_MN", "weight_N", "bias_N", "y_MN"), f"*{dtype}")
    types = {**of_rows, "statistics_2M": "*fp32", "M": "i32", "epsilon": "fp32"}
    constants: dict[str, Any] = {"N": columns, "TOKEN_MAX": rule == "token_max"}
    if rule == "tensor_max_over_8":
        types["divisor_1"] = "*fp32"
    else:
        constants["divisor_1"] = None
    return Shipped(
        kernel=_forward,
        types=types,
        constants={**constants, "BLOCK_N": block_columns(columns)},
        num_warps=row_warps(columns),
        num_stages=1,
        most_registers=48,
        most_shared_bytes=32,
    )


def _shipped_backward(dtype: str, columns: int) -> Shipped:
    of_rows = dict.fromkeys(("dy_MN", "x_MN", "weight_N", "dx_MN"), f"*{dtype}")
    return Shipped(
        kernel=_backward,
        types={**of_rows, "statistics_2M": "*fp32", "partial_P2N": "*fp32", "M": "i32"},
        constants={"N": columns, "BLOCK_N": block_columns(columns), "STAGES": STAGES},
        num_warps=row_warps(columns),
        num_stages=1,
        most_registers=104,
        most_shared_bytes=16640,
    )
