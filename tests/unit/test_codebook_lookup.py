"""The nearest code against a brute-force fp64 search, on easy and on nearly tied codebooks."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_cogview.kernels.codebook_lookup.operator import nearest_code


def brute_force(vectors_ND: Tensor, codebook_KD: Tensor) -> Tensor:
    difference = vectors_ND.double()[:, None] - codebook_KD.double()[None]
    return difference.square().sum(2).argmin(1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("rows", "codes", "width"), [(1, 1, 1), (7, 5, 3), (300, 2049, 60), (65, 4100, 8)]
)
def test_equals_brute_force_in_fp64(rows: int, codes: int, width: int) -> None:
    vectors, codebook = normal(rows, width), normal(codes, width, seed=1)
    assert torch.equal(nearest_code(vectors, codebook, chunk=64), brute_force(vectors, codebook))


def test_near_ties_that_fp32_products_get_wrong_are_decided_right() -> None:
    """Codes a few ulps apart, far from the origin: |c|^2 - 2xc cancels in fp32."""
    centre = 30.0 + normal(1, 16)
    codebook = centre + 1e-4 * normal(64, 16, seed=1)
    vectors = centre + 1e-4 * normal(200, 16, seed=2)
    naive = (codebook.square().sum(1) - 2 * vectors @ codebook.t()).argmin(1)
    expected = brute_force(vectors, codebook)
    assert (naive != expected).any(), "the case is too easy to show anything"
    assert torch.equal(nearest_code(vectors, codebook), expected)


def test_equal_codes_give_the_lowest_index() -> None:
    codebook = normal(10, 4).repeat(300, 1)
    assert torch.equal(nearest_code(codebook[:10], codebook), torch.arange(10))
    same = torch.ones(3000, 4)
    assert torch.equal(nearest_code(normal(5, 4), same), torch.zeros(5, dtype=torch.int64))


def test_a_row_does_not_depend_on_the_others_nor_on_the_chunk() -> None:
    codebook = 5.0 + 1e-3 * normal(512, 32)
    vectors = 5.0 + 1e-3 * normal(130, 32, seed=1)
    together = nearest_code(vectors, codebook)
    alone = torch.cat([nearest_code(v[None], codebook) for v in vectors])
    assert torch.equal(together, alone)
    assert torch.equal(together, nearest_code(vectors.flip(0), codebook, chunk=17).flip(0))


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def test_never_makes_the_full_distance_matrix() -> None:
    vectors, codebook = normal(5000, 16), normal(8192, 16, seed=1)
    with LargestTensor() as seen:
        nearest_code(vectors, codebook, chunk=256)
    # A block of scores, or the inputs' own size.
    assert seen.elements <= max(256 * 2048, codebook.numel())
    assert seen.elements >= 256 * 2048, "the mode saw no block; the test shows nothing"


def test_bf16_input_is_compared_in_fp32_under_autocast() -> None:
    vectors, codebook = normal(40, 16).bfloat16(), normal(100, 16, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = nearest_code(vectors, codebook)
    assert torch.equal(found, brute_force(vectors, codebook))


@pytest.mark.parametrize(
    ("vectors", "codebook", "words"),
    [
        (torch.zeros(3), torch.zeros(2, 3), "expected"),
        (torch.zeros(3, 4), torch.zeros(2, 3), "do not fit"),
        (torch.zeros(3, 4), torch.zeros(0, 4), "do not fit"),
        (torch.full((2, 4), torch.nan), torch.zeros(2, 4), "not finite"),
        (torch.zeros(2, 4), torch.full((2, 4), torch.nan), "not finite"),
        (torch.full((2, 4), 1e30), torch.zeros(2, 4), "not finite"),
    ],
)
def test_refuses(vectors: Tensor, codebook: Tensor, words: str) -> None:
    if torch.isfinite(vectors).all() and vectors.abs().max() > 1e20:
        codebook = codebook + 1e30
    with pytest.raises(ValueError, match=words):
        nearest_code(vectors, codebook)


def test_no_rows() -> None:
    assert nearest_code(torch.zeros(0, 4), torch.zeros(2, 4)).shape == (0,)
