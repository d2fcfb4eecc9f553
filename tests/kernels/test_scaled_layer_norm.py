"""The fused LayerNorm against fp64: every rule, type and gradient, and what must not happen."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_cogview.kernels.scaled_layer_norm import reference, triton
from megatron_cogview.kernels.scaled_layer_norm.operator import _layer_norm, scaled_layer_norm
from megatron_cogview.kernels.scaled_layer_norm.reference import RelaxRule
from tests.kernels.row_cases import DEVICE, allowance, error, normal, own_storage, poisoned, uneven

RULES: tuple[RelaxRule, ...] = ("none", "token_max", "tensor_max_over_8")
NAMES = ("y", "dx", "dweight", "dbias")


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    with poisoned(triton):
        yield


def case(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[Tensor]:
    """x, weight and bias."""
    given = [uneven(*shape) * scale, normal(shape[-1], seed=3), normal(shape[-1], seed=4)]
    return [each.to(dtype).requires_grad_() for each in given]


def fused(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, rule: RelaxRule) -> Tensor:
    return scaled_layer_norm(x, weight, bias, epsilon, rule, implementation="triton")


def with_gradients(function, given: list[Tensor], *args) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    y = function(*given, *args)
    dy = normal(*y.shape, seed=5).to(given[0].dtype).to(y.dtype)
    return dict(zip(NAMES, [y, *torch.autograd.grad(y, given, dy)], strict=True))


def exact(given: list[Tensor], *args) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    wide = [each.detach().double().requires_grad_() for each in given]
    y = reference.scaled_layer_norm(*wide, *args)
    dy = normal(*y.shape, seed=5).to(given[0].dtype).double()
    return dict(zip(NAMES, [y, *torch.autograd.grad(y, wide, dy)], strict=True))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(1, 40), (3, 3, 160), (13, 257), (5, 1), (2, 2560)])
def test_fp32_is_exact_to_rounding(shape: tuple[int, ...], rule: RelaxRule) -> None:
    given = case(*shape)
    actual, expected = with_gradients(fused, given, 1e-2, rule), exact(given, 1e-2, rule)
    if shape[-1] == 1:
        # A row of one column is its own mean: dx and dweight are zero.
        assert not actual.pop("dx").any() and not actual.pop("dweight").any()
    for name, value in actual.items():
        assert error(value, expected[name]) <= 1e-6, name


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_no_worse_than_pytorch(dtype: torch.dtype, rule: RelaxRule) -> None:
    given = case(3, 5, 160, dtype=dtype)
    expected = exact(given, 1e-2, rule)
    eager = with_gradients(reference.scaled_layer_norm, given, 1e-2, rule)
    for name, value in with_gradients(fused, given, 1e-2, rule).items():
        assert value.dtype == dtype
        bound = 2 * error(eager[name], expected[name]) + allowance(dtype)
        assert error(value, expected[name]) <= bound, name


@pytest.mark.parametrize("rule", RULES)
def test_fp16_where_squares_overflow(rule: RelaxRule) -> None:
    x, weight, bias = case(7, 160, dtype=torch.float16)
    x = (x.detach() / x.detach().abs().amax(-1, keepdim=True) * 6e4).requires_grad_()
    assert (x * x).isinf().any()
    given = [x, weight, bias]
    expected = exact(given, 1e-5, rule)
    for name, value in with_gradients(fused, given, 1e-5, rule).items():
        assert error(value, expected[name]) <= 2e-3, name


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("rule", ["token_max", "tensor_max_over_8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_zero_row_gives_the_bias(dtype: torch.dtype, rule: RelaxRule) -> None:
    x, weight, bias = case(4, 40, dtype=dtype)
    y = fused(torch.zeros_like(x), weight, bias, 1e-5, rule)
    torch.testing.assert_close(y, bias.expand(4, 40), rtol=1e-2, atol=0)
    # Beside other rows it changes nothing, and its gradient is large but a number.
    x = x.detach() * torch.tensor([1, 0, 1, 1], device=DEVICE)[:, None]
    actual = with_gradients(fused, [x.requires_grad_(), weight, bias], 1e-1, rule)
    assert all(value.isfinite().all() for name, value in actual.items() if name != "dx")
    assert dtype == torch.float16 or actual["dx"].isfinite().all()


def test_small_rows_are_relaxed_as_well() -> None:
    """Without its square, m would leave epsilon far above the variance of such rows."""
    given = case(6, 40, scale=1e-9)
    actual = with_gradients(fused, given, 1e-5, "token_max")
    for name, value in exact(given, 1e-5, "token_max").items():
        assert error(actual[name], value) <= 1e-6, name


def test_a_nan_stays_in_its_row() -> None:
    x, weight, bias = (each.detach() for each in case(5, 40))
    x[2, 7] = torch.nan
    y = fused(x, weight, bias, 1e-5, "token_max")
    assert y.isnan().all(1).tolist() == [False, False, True, False, False]
    assert y[[0, 1, 3, 4]].isfinite().all()


def test_the_maximum_is_taken_over_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [each.detach() for each in case(5, 40)]
    seen = []

    def all_reduce(divisor: Tensor, op: object, group: object) -> None:
        seen.append((op, group))
        divisor.mul_(4)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    alone = fused(*given, 1e-1, "tensor_max_over_8")
    group: object = "the tensor axis"
    rule, calls = "tensor_max_over_8", {"max_group": group}
    actual = scaled_layer_norm(*given, 1e-1, rule, **calls, implementation="triton")  # type: ignore[arg-type]
    expected = scaled_layer_norm(*given, 1e-1, rule, **calls, implementation="reference")  # type: ignore[arg-type]
    assert seen == [(torch.distributed.ReduceOp.MAX, group)] * 2
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    assert (actual - alone).abs().max() > 1e-2


@pytest.mark.parametrize("programs", [1, 3, 11, 40])
def test_any_grid_sums_all_rows(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = case(11, 40)
    expected = exact(given, 1e-2, "token_max")
    monkeypatch.setattr(triton, "backward_programs", lambda *_: programs)
    for name, value in with_gradients(fused, given, 1e-2, "token_max").items():
        assert error(value, expected[name]) <= 1e-6, name


def test_the_grid_follows_the_device_and_the_rows() -> None:
    cpu = torch.device("cpu")
    assert triton.backward_programs(1000, 16, cpu) == 4
    assert triton.backward_programs(1000, 4, cpu) == 16
    assert triton.backward_programs(3, 4, cpu) == 3
    assert [triton.row_warps(n) for n in (1, 1024, 2560, 4096, 8192)] == [1, 2, 8, 8, 16]


def test_the_same_bits_again_also_under_recomputation() -> None:
    given = case(3, 7, 40)
    first = with_gradients(fused, given, 1e-2, "token_max")

    def recomputed(*args) -> Tensor:  # type: ignore[no-untyped-def]
        return torch.utils.checkpoint.checkpoint(fused, *args, use_reentrant=False)

    for again in (fused, recomputed):
        for name, value in with_gradients(again, given, 1e-2, "token_max").items():
            assert torch.equal(value, first[name]), (again, name)


def test_strides_do_not_matter() -> None:
    x, weight, bias = case(40, 6, 5)
    given = [x.detach().permute(2, 1, 0).requires_grad_(), weight[:1], bias[:1]]
    given[1:] = [each.detach().expand(40).requires_grad_() for each in given[1:]]
    actual = fused(*given, 1e-2, "token_max")
    # An expanded gradient has strides of zero.
    gradients = torch.autograd.grad(actual.sum(), given)
    wide = [each.detach().double().requires_grad_() for each in given]
    y = reference.scaled_layer_norm(*wide, 1e-2, "token_max")
    assert error(actual, y) <= 1e-6
    for a, e in zip(gradients[1:], torch.autograd.grad(y.sum(), wide)[1:], strict=True):
        assert error(a, e) <= 1e-6


def test_no_rows() -> None:
    actual = with_gradients(fused, case(0, 40), 1e-5, "token_max")
    assert actual["dx"].shape == (0, 40)
    assert not actual["dweight"].any() and not actual["dbias"].any()


def test_it_is_a_sound_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "empty", own_storage)
    given = case(5, 40)
    torch.library.opcheck(_layer_norm, (*given, None, 1e-5, True))
    torch.library.opcheck(_layer_norm, (*given, torch.ones(1, device=DEVICE), 1e-5, False))


def test_it_is_one_node_of_a_compiled_graph() -> None:
    given = case(3, 40)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    expected = with_gradients(fused, given, 1e-2, "tensor_max_over_8")
    for name, value in with_gradients(compiled, given, 1e-2, "tensor_max_over_8").items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    ("x", "parameter", "words"),
    [
        (torch.zeros(3, 4, dtype=torch.float64), torch.zeros(4), "use the reference"),
        (torch.zeros(1, 8193), torch.zeros(8193), "1 to 8192 columns"),
        (torch.zeros(3, 4), torch.zeros(5), "rows are 4 wide"),
    ],
)
def test_refuses(x: Tensor, parameter: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fused(x, parameter, parameter, 1e-5, "none")


def test_the_package_does_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from megatron_cogview.kernels.sandwich_junction.operator import sandwich_junction
from megatron_cogview.kernels.scaled_layer_norm.operator import scaled_layer_norm
x, w = torch.randn(3, 8), torch.ones(8)
y = scaled_layer_norm(x, w, w, 1e-5, "token_max", implementation="reference")
z, n = sandwich_junction(x, w, x, w, w, w, w, epsilon=1e-5, dropout=0.5, implementation="reference")
assert y.isfinite().all() and n.isfinite().all()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
