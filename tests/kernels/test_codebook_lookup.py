"""The Triton search gives what the search in PyTorch gives, and the same codes in the end."""

import pytest
import torch
from torch import Tensor

from megatron_cogview.kernels.codebook_lookup import operator, triton
from megatron_cogview.kernels.codebook_lookup.operator import nearest_code
from megatron_cogview.kernels.codebook_lookup.reference import search

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize(
    ("rows", "codes", "width"), [(1, 1, 1), (7, 5, 3), (65, 130, 60), (70, 64, 100), (3, 65, 16)]
)
def test_scores_and_indices(
    rows: int, codes: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = triton._outputs

    def poisoned(vectors_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        best_N, index_N, second_N = made(vectors_ND)
        return best_N.fill_(torch.nan), index_N.fill_(-1), second_N.fill_(torch.nan)

    monkeypatch.setattr(triton, "_outputs", poisoned)
    vectors, codebook = normal(rows, width), normal(codes, width, seed=1)
    norms = codebook.square().sum(1)
    best, index, second = triton.search(vectors, codebook, norms)
    expected = search(vectors.double(), codebook.double(), norms.double(), 64)
    torch.testing.assert_close(best, expected[0].float(), rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(second, expected[2].float(), rtol=2e-6, atol=2e-5)
    assert torch.equal(index, expected[1])


def test_the_same_codes_as_the_reference_also_where_they_are_nearly_tied() -> None:
    centre = 30.0 + normal(1, 16)
    codebook = centre + 1e-4 * normal(70, 16, seed=1)
    vectors = centre + 1e-4 * normal(90, 16, seed=2)
    found = nearest_code(vectors, codebook, backend="triton")
    assert torch.equal(found, nearest_code(vectors, codebook, backend="reference"))
    _, alone, _ = triton.search(vectors, codebook, codebook.square().sum(1))
    assert (alone != found).any(), "the case is too easy to show anything"


def test_equal_codes_give_the_lowest_index() -> None:
    same = torch.ones(200, 4, device=DEVICE)
    assert not nearest_code(normal(5, 4), same, backend="triton").any()


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning", "ignore:invalid:RuntimeWarning")
@pytest.mark.parametrize(
    ("where", "value"),
    [
        *(("vectors", torch.nan), ("vectors", torch.inf)),
        # The square of the last one is not finite.
        *(("codebook", torch.nan), ("codebook", torch.inf), ("codebook", 1e30)),
    ],
)
def test_what_is_not_finite_is_refused(where: str, value: float) -> None:
    given = {"vectors": normal(5, 4), "codebook": normal(70, 4)}
    given[where][3, 2] = value
    with pytest.raises(ValueError, match="not finite"):
        nearest_code(given["vectors"], given["codebook"], backend="triton")


def test_no_rows() -> None:
    assert nearest_code(normal(0, 4), normal(7, 4), backend="triton").shape == (0,)


def test_it_is_a_sound_operator() -> None:
    vectors, codebook = normal(5, 8), normal(9, 8)
    torch.library.opcheck(triton.search, (vectors, codebook, codebook.square().sum(1)))


def test_products_are_not_rounded_to_tf32() -> None:
    """The bound that near-ties are found by is that of fp32."""
    vectors, codebook = 100 * normal(40, 64), 100 * normal(64, 64, seed=1)
    best, _, _ = triton.search(vectors, codebook, codebook.square().sum(1))
    exact, _, _ = search(vectors.double(), codebook.double(), codebook.double().square().sum(1), 64)
    bound = operator._score_error(
        vectors.square().sum(1), codebook.square().sum(1).max(), codebook.shape[1]
    )
    assert ((best.double() - exact).abs() <= bound).all()
