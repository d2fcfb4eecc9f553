"""The search through a codebook by blocks, in PyTorch.

Shapes: N vectors, K codes, D width.
"""

import torch
from torch import Tensor

CODES_PER_BLOCK = 2048


def search(
    vectors_ND: Tensor, codebook_KD: Tensor, norms_K: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest score ``|c|^2 - 2 x c``, its index and the second-smallest score of each row.

    Args:
        vectors_ND, codebook_KD: fp32.
        norms_K: squared lengths of the codes.
        chunk: rows per block.

    Returns:
        Scores ``[N]``, indices int64 ``[N]``, scores ``[N]``.
    """
    num_rows = vectors_ND.shape[0]
    best_N = vectors_ND.new_full((num_rows,), torch.inf)
    second_N = best_N.clone()
    indices_N = torch.zeros(num_rows, dtype=torch.int64, device=vectors_ND.device)
    for row in range(0, num_rows, chunk):
        rows = slice(row, row + chunk)
        best, second, indices = best_N[rows], second_N[rows], indices_N[rows]
        for code in range(0, codebook_KD.shape[0], CODES_PER_BLOCK):
            codes = slice(code, code + CODES_PER_BLOCK)
            scores = torch.addmm(
                norms_K[codes], vectors_ND[rows], codebook_KD[codes].t(), alpha=-2.0
            )
            low, where = scores.min(1)
            low_second = scores.scatter_(1, where[:, None], torch.inf).amin(1)
            # The larger of the two winners competes with both losers for second place.
            second.copy_(torch.minimum(torch.maximum(best, low), torch.minimum(second, low_second)))
            # "~ >=" also lets NaN through, so that it reaches the check instead of vanishing.
            better = ~(low >= best)
            best.copy_(torch.where(better, low, best))
            indices.copy_(torch.where(better, where + code, indices))
    return best_N, indices_N, second_N
