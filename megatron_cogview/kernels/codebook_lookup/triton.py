"""The search through a codebook as one kernel: scores stay in registers.

Shapes: N vectors, K codes, D width.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from megatron_cogview.kernels.triton_support import Shipped, dot
from megatron_cogview.kernels.tuning import tuned

FIXED = (64, 64, 4, 2)
"""Rows and codes of a tile, warps, stages."""
CANDIDATES = (
    FIXED,
    (128, 64, 4, 2),
    (64, 128, 4, 2),
    (32, 64, 4, 2),
    (64, 64, 8, 2),
    (128, 128, 8, 2),
)
"""What the tuner tries."""
WIDTHS = (32, 64, 256)
"""Of the presets' codebooks, the last one the paper's; others run as well."""


@triton.jit
def search_codes(
    vectors_ptr,
    codebook_ptr,
    norms_ptr,
    best_ptr,
    index_ptr,
    second_ptr,
    num_rows,
    num_codes,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Smallest and second-smallest score of a block of rows, and the code of the smallest."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = row.to(tl.int64)[:, None] * WIDTH
    column = tl.arange(0, COLUMNS)
    best = tl.full([ROWS], float("inf"), tl.float32)
    second = tl.full([ROWS], float("inf"), tl.float32)
    index = tl.zeros([ROWS], tl.int32)
    for first in range(0, num_codes, CODES):
        code = first + tl.arange(0, CODES)
        product = tl.zeros([ROWS, CODES], tl.float32)
        for at in range(0, WIDTH, COLUMNS):
            d = at + column
            inside = d < WIDTH
            x = tl.load(
                vectors_ptr + start + d[None], (row < num_rows)[:, None] & inside[None], other=0.0
            )
            c = tl.load(
                codebook_ptr + code.to(tl.int64)[None] * WIDTH + d[:, None],
                (code < num_codes)[None] & inside[:, None],
                other=0.0,
            )
            product += dot(x, c)
        norm = tl.load(norms_ptr + code, code < num_codes, other=float("inf"))
        scores = norm[None] - 2.0 * product
        low = tl.min(scores, 1)
        # The lowest of equal codes.
        where = tl.min(tl.where(scores == low[:, None], code[None], 2147483647), 1)
        rest = tl.where(code[None] == where[:, None], float("inf"), scores)
        # The larger of the two winners competes with both losers for second place.
        second = tl.minimum(tl.maximum(best, low), tl.minimum(second, tl.min(rest, 1)))
        index = tl.where(low < best, where, index)
        best = tl.minimum(best, low)
    tl.store(best_ptr + row, best, row < num_rows)
    tl.store(second_ptr + row, second, row < num_rows)
    tl.store(index_ptr + row, index.to(tl.int64), row < num_rows)


@torch.library.custom_op("cogview::search_codes", mutates_args=())
def search(
    vectors_ND: torch.Tensor, codebook_KD: torch.Tensor, norms_K: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Smallest score, its index and the second-smallest score of each row.

    Args:
        vectors_ND, codebook_KD: fp32, contiguous.
        norms_K: squared lengths of the codes.

    Returns:
        Scores fp32 ``[N]``, indices int64 ``[N]``, scores fp32 ``[N]``.
    """
    num_rows, width = vectors_ND.shape
    best_N, index_N, second_N = _outputs(vectors_ND)
    rows, codes, num_warps, num_stages = tuned(f"codebook_lookup.D{width}", FIXED)
    if num_rows:
        with torch.cuda.device_of(vectors_ND):
            search_codes[(triton.cdiv(num_rows, rows),)](
                vectors_ND,
                codebook_KD,
                norms_K,
                best_N,
                index_N,
                second_N,
                num_rows,
                codebook_KD.shape[0],
                WIDTH=width,
                ROWS=rows,
                CODES=codes,
                COLUMNS=_columns(width),
                num_warps=num_warps,
                num_stages=num_stages,
            )
    return best_N, index_N, second_N


@search.register_fake
def _(
    vectors_ND: torch.Tensor, codebook_KD: torch.Tensor, norms_K: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _outputs(vectors_ND)


def _outputs(vectors_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    best_N = vectors_ND.new_empty(vectors_ND.shape[0])
    return best_N, torch.empty_like(best_N, dtype=torch.int64), torch.empty_like(best_N)


def _columns(width: int) -> int:
    """Of a tile: 16 at least, and so many that no registers spill."""
    return max(16, triton.next_power_of_2(width)) if width <= 64 else 32


def shipped() -> Iterator[Shipped]:
    """The kernel as it is started."""
    pointers = ("vectors_ptr", "codebook_ptr", "norms_ptr", "best_ptr", "second_ptr")
    rows, codes, num_warps, num_stages = FIXED
    for width in WIDTHS:
        sizes = {"WIDTH": width, "ROWS": rows, "CODES": codes, "COLUMNS": _columns(width)}
        yield Shipped(
            kernel=search_codes,
            types={
                **dict.fromkeys(pointers, "*fp32"),
                "index_ptr": "*i64",
                "num_rows": "i32",
                "num_codes": "i32",
            },
            constants=sizes,
            num_warps=num_warps,
            num_stages=num_stages,
            most_registers=224,
            most_shared_bytes=32_768,
        )
