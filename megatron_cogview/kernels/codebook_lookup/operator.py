"""Nearest code by blocks, with near-ties decided in fp64.  See README.md for the error bound.

Knows nothing of pictures, gradients or how codebooks are learned.

Shapes: N vectors, K codes, D width, P candidate pairs.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_cogview.kernels.codebook_lookup.reference import CODES_PER_BLOCK, search
from megatron_cogview.kernels.dispatch import Wanted, choose

_DOUBTFUL_ROWS_PER_BLOCK = 256
_PAIRS_PER_BLOCK = 2048


@torch.no_grad()
def nearest_code(
    vectors_ND: Tensor, codebook_KD: Tensor, chunk: int = 1024, backend: Wanted = "auto"
) -> Tensor:
    """Index of the nearest code (squared Euclidean distance) of each vector, int64 ``[N]``.

    Args:
        vectors_ND: floating point; compared in fp32.
        codebook_KD: floating point, same width and device.
        chunk: rows per block of the reference; bounds the memory, never changes the result.
        backend: who searches; what is nearly tied is decided here in any case.

    Raises:
        ValueError: shapes that do not fit, no codes, or values that are not finite in fp32.
    """
    _check(vectors_ND, codebook_KD, chunk)
    vectors_ND, codebook_KD = vectors_ND.float().contiguous(), codebook_KD.float().contiguous()
    with _full_precision(vectors_ND.device):
        norms_K = codebook_KD.square().sum(1)
        if choose("codebook_lookup", backend, vectors_ND.device) == "triton":
            from megatron_cogview.kernels.codebook_lookup import triton

            best_N, indices_N, second_N = triton.search(vectors_ND, codebook_KD, norms_K)
            # A minimum of the device may pass over a NaN.
            sound = vectors_ND.isfinite().all() & norms_K.isfinite().all()
        else:
            best_N, indices_N, second_N = search(vectors_ND, codebook_KD, norms_K, chunk)
            sound = torch.isfinite(best_N).all()
        if not bool(sound & torch.isfinite(best_N).all()):
            raise ValueError("nearest_code: vectors or codebook hold values that are not finite")
        bound_N = _score_error(vectors_ND.square().sum(1), norms_K.max(), codebook_KD.shape[1])
        doubtful_R = torch.nonzero(second_N - best_N <= 2 * bound_N).squeeze(1)
        for rows_R in torch.split(doubtful_R, _DOUBTFUL_ROWS_PER_BLOCK):
            limit_R = best_N[rows_R] + 2 * bound_N[rows_R]
            indices_N[rows_R] = _decide_in_fp64(vectors_ND[rows_R], codebook_KD, norms_K, limit_R)
    return indices_N


def _check(vectors_ND: Tensor, codebook_KD: Tensor, chunk: int) -> None:
    if vectors_ND.dim() != 2 or codebook_KD.dim() != 2:
        raise ValueError(
            f"nearest_code: expected [N, D] and [K, D], got {tuple(vectors_ND.shape)} and "
            f"{tuple(codebook_KD.shape)}"
        )
    if vectors_ND.shape[1] != codebook_KD.shape[1] or codebook_KD.shape[0] == 0:
        raise ValueError(
            f"nearest_code: vectors {tuple(vectors_ND.shape)} do not fit the codebook "
            f"{tuple(codebook_KD.shape)}"
        )
    if chunk < 1:
        raise ValueError(f"nearest_code: chunk = {chunk} must be at least 1")


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Keep autocast and TF32 out: the error bound is that of fp32."""
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before


def _score_error(squares_N: Tensor, largest_norm: Tensor, width: int) -> Tensor:
    """Bound of the rounding error of one score, per row (README.md)."""
    epsilon = torch.finfo(torch.float32).eps
    product_N = 2.0 * (squares_N * largest_norm).sqrt()
    return (width + 4) * epsilon * (largest_norm + product_N)


def _decide_in_fp64(
    vectors_RD: Tensor, codebook_KD: Tensor, norms_K: Tensor, limit_R: Tensor
) -> Tensor:
    """Nearest code of rows with several candidates (scores up to ``limit_R``)."""
    num_rows, num_codes = vectors_RD.shape[0], codebook_KD.shape[0]
    rows_parts, codes_parts = [], []
    for code in range(0, num_codes, CODES_PER_BLOCK):
        codes = slice(code, code + CODES_PER_BLOCK)
        scores = torch.addmm(norms_K[codes], vectors_RD, codebook_KD[codes].t(), alpha=-2.0)
        rows_p, codes_p = torch.nonzero(scores <= limit_R[:, None], as_tuple=True)
        rows_parts.append(rows_p)
        codes_parts.append(codes_p + code)
    rows_P, codes_P = torch.cat(rows_parts), torch.cat(codes_parts)
    distance_P = torch.cat(
        [
            _distance_in_fp64(vectors_RD[r], codebook_KD[c])
            for r, c in zip(
                torch.split(rows_P, _PAIRS_PER_BLOCK),
                torch.split(codes_P, _PAIRS_PER_BLOCK),
                strict=True,
            )
        ]
    )
    nearest_R = distance_P.new_full((num_rows,), torch.inf)
    nearest_R.scatter_reduce_(0, rows_P, distance_P, "amin")
    winners_P = distance_P == nearest_R[rows_P]
    index_R = torch.full((num_rows,), num_codes, dtype=torch.int64, device=vectors_RD.device)
    return index_R.scatter_reduce_(0, rows_P[winners_P], codes_P[winners_P], "amin")


def _distance_in_fp64(left_PD: Tensor, right_PD: Tensor) -> Tensor:
    """Squared distances of pairs, through one shape only: sums then have one order of addition."""
    num_pairs, width = left_PD.shape
    difference = torch.zeros(_PAIRS_PER_BLOCK, width, dtype=torch.float64, device=left_PD.device)
    difference[:num_pairs] = left_PD.double() - right_PD.double()
    return difference.square_().sum(1)[:num_pairs]
