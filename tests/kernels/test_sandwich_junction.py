"""The fused junction against fp64: every option, type and gradient, its dropout, its grids."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_cogview.kernels.sandwich_junction import triton
from megatron_cogview.kernels.sandwich_junction.operator import _junction, sandwich_junction
from megatron_cogview.kernels.sandwich_junction.reference import keep_mask
from tests.kernels.row_cases import DEVICE, allowance, error, normal, own_storage, poisoned, uneven

INPUTS = ("h", "bias", "residual", "end_weight", "end_bias", "next_weight", "next_bias")
RELAXED: dict[str, Any] = {"epsilon": 1e-2, "end_rule": "token_max", "next_rule": "token_max"}
SEED = -(2**40) + 3
"""More than 32 bits, and negative."""


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    with poisoned(triton):
        yield


def case(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    residual: torch.dtype | None = None,
    without: tuple[str, ...] = (),
) -> dict[str, Tensor | None]:
    """The inputs by name; those in ``without`` are None."""
    given = {"h": uneven(*shape), "bias": normal(shape[-1], seed=6)}
    given["residual"] = uneven(*shape, seed=10)
    given |= {name: normal(shape[-1], seed=20 + i) for i, name in enumerate(INPUTS[3:])}
    types = {"residual": residual or dtype}
    return {
        name: None if name in without else value.to(types.get(name, dtype)).requires_grad_()
        for name, value in given.items()
    }


def fused(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return sandwich_junction(*args, **kwargs, implementation="triton")


def plain(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return sandwich_junction(*args, **kwargs, implementation="reference")


def with_gradients(
    function: Callable[..., tuple[Tensor, Tensor | None]],
    given: dict[str, Tensor | None],
    used: tuple[str, ...] = ("z", "n"),
    **settings: Any,
) -> dict[str, Tensor]:
    """z, n and the gradients of all inputs, where only the results in ``used`` have one."""
    results = dict(zip("zn", function(*given.values(), **settings), strict=True))
    made = {name: value for name, value in results.items() if value is not None}
    # The gradients that go in are numbers of 8 bits, so that they are the same in every type.
    ends = {name: made[name] for name in used if name in made}
    starts = [
        normal(*value.shape, seed=30 + i).bfloat16().to(value.dtype)
        for i, value in enumerate(ends.values())
    ]
    inputs = {name: value for name, value in given.items() if value is not None}
    gradients = torch.autograd.grad(
        list(ends.values()), list(inputs.values()), starts, allow_unused=True
    )
    by_name = {f"d{n}": g for n, g in zip(inputs, gradients, strict=True) if g is not None}
    return made | by_name


def exact(given: dict[str, Tensor | None], **settings: Any) -> dict[str, Tensor]:
    wide = {
        name: None if value is None else value.detach().double().requires_grad_()
        for name, value in given.items()
    }
    return with_gradients(plain, wide, **settings)


def assert_within(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert error(value, expected[name]) <= bound, name


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("end_rule", "next_rule"), [("none", "token_max"), ("token_max", "none")])
@pytest.mark.parametrize("shape", [(1, 40), (3, 3, 160), (13, 257), (2, 2560)])
def test_fp32_is_exact_to_rounding(
    shape: tuple[int, ...], end_rule: str, next_rule: str, dropout: float
) -> None:
    given, settings = case(*shape), {"epsilon": 1e-2, "end_rule": end_rule, "next_rule": next_rule}
    settings |= {"dropout": dropout, "seed": SEED}
    actual = with_gradients(fused, given, **settings)
    assert len(actual) == 9
    assert_within(actual, exact(given, **settings), 1e-6)


@pytest.mark.parametrize("without", [("bias",), INPUTS[5:], ("bias", *INPUTS[5:])])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_may_be_absent(without: tuple[str, ...], dropout: float) -> None:
    given, settings = case(5, 40, without=without), {**RELAXED, "dropout": dropout, "seed": 7}
    actual = with_gradients(fused, given, **settings)
    assert ("n" in actual) == ("next_weight" not in without)
    assert_within(actual, exact(given, **settings), 1e-6)


@pytest.mark.parametrize("used", ["z", "n"])
def test_a_result_without_use_costs_no_gradient(used: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, calls, backward = case(5, 40), [], triton.backward

    def spy(dz_MN: Tensor | None, dn_MN: Tensor | None, *rest: Any) -> Any:
        calls.append({"z": dz_MN is not None, "n": dn_MN is not None})
        return backward(dz_MN, dn_MN, *rest)

    monkeypatch.setattr(triton, "backward", spy)
    actual = with_gradients(fused, given, (used,), **RELAXED)
    assert calls == [{"z": used == "z", "n": used == "n"}]
    assert_within(actual, exact(given, used=(used,), **RELAXED), 1e-6)


@pytest.mark.parametrize("residual", ["same", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_no_worse_than_pytorch(dtype: torch.dtype, residual: str) -> None:
    given = case(3, 5, 160, dtype=dtype, residual=torch.float32 if residual == "fp32" else dtype)
    settings = {**RELAXED, "dropout": 0.1, "seed": 3}
    actual, expected = with_gradients(fused, given, **settings), exact(given, **settings)
    eager = with_gradients(plain, given, **settings)
    assert actual["n"].dtype == dtype
    for name, value in actual.items():
        assert value.dtype == eager[name].dtype, name
        bound = 2 * error(eager[name], expected[name]) + allowance(dtype)
        assert error(value, expected[name]) <= bound, name


def test_the_next_norm_reads_what_the_stream_holds() -> None:
    """z is rounded first: in bf16, n is the norm of the z that was written, to fp32 rounding."""
    given = case(6, 160, dtype=torch.bfloat16)
    z, _ = fused(*given.values(), **RELAXED)
    _, _, statistics_KM = _junction(*given.values(), 1e-2, True, True, 0.0, 0)
    torch.testing.assert_close(statistics_KM[2], z.float().mean(-1), rtol=1e-6, atol=1e-6)


def test_fp16_where_squares_overflow() -> None:
    given = case(7, 160, dtype=torch.float16)
    for name in ("h", "residual"):
        large = given[name].detach()  # type: ignore[union-attr]
        given[name] = (large / large.abs().amax(-1, keepdim=True) * 6e4).requires_grad_()
    h = given["h"]
    assert h is not None and (h * h).isinf().any()
    settings = {**RELAXED, "epsilon": 1e-5, "dropout": 0.1, "seed": 3}
    assert_within(with_gradients(fused, given, **settings), exact(given, **settings), 5e-3)


def test_zero_rows_give_the_biases() -> None:
    given = case(4, 40)
    zero = torch.zeros(4, 40, device=DEVICE)
    given |= {"h": zero, "residual": zero.clone(), "bias": None, "end_bias": zero[0].clone()}
    for name in ("h", "residual", "end_bias"):
        given[name].requires_grad_()  # type: ignore[union-attr]
    made = with_gradients(fused, given, **RELAXED)
    assert not made["z"].any()
    assert given["next_bias"] is not None
    torch.testing.assert_close(made["n"], given["next_bias"].expand(4, 40), rtol=0, atol=0)
    assert all(value.isfinite().all() for value in made.values())


@pytest.mark.parametrize("columns", [40, 42, 129])
@pytest.mark.parametrize("seed", [0, 1, 2**31, SEED, 2**63 - 1])
def test_dropout_keeps_what_the_reference_keeps(columns: int, seed: int) -> None:
    """With h = 1, a kept element is above its row's mean and a dropped one below."""
    one, zero = torch.ones(9, columns, device=DEVICE), torch.zeros(9, columns, device=DEVICE)
    given = (one, None, zero, one[0], zero[0], None, None)
    z, _ = fused(*given, epsilon=1e-5, dropout=0.3, seed=seed)
    keep = keep_mask(seed, (9, columns), 0.3, DEVICE)
    assert keep.any(1).all() and not keep.all(1).any()
    assert torch.equal(z > 0, keep)


def test_the_mask_is_a_fair_draw_that_follows_from_row_and_column() -> None:
    mask = keep_mask(5, (4, 50, 1000), 0.1)
    rate = float(mask.double().mean())
    assert abs(rate - 0.9) < 4 * (0.09 / mask.numel()) ** 0.5
    for dim in ((0, 1), (2,)):
        assert (mask.double().mean(dim) - 0.9).abs().max() < 0.1
    assert torch.equal(keep_mask(5, (30, 1000), 0.1), mask.view(200, 1000)[:30])
    assert (keep_mask(6, (30, 1000), 0.1) != mask.view(200, 1000)[:30]).double().mean() > 0.15
    # More is kept at a lower probability, and at 0 everything.
    assert (keep_mask(5, (4, 50, 1000), 0.05) | ~mask).all()
    assert keep_mask(5, (7, 3), 0.0).all()


def test_without_dropout_the_seed_is_not_used() -> None:
    given = case(5, 40)
    first, second = (with_gradients(fused, given, **RELAXED, seed=seed) for seed in (1, 2))
    dropped = with_gradients(fused, given, **RELAXED, seed=1, dropout=0.5)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert not torch.equal(value, dropped[name]) or name == "dnext_bias", name


@pytest.mark.parametrize("programs", [1, 3, 11, 40])
def test_any_grid_sums_all_rows(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given, settings = case(11, 40), {**RELAXED, "dropout": 0.1, "seed": SEED}
    expected = exact(given, **settings)
    monkeypatch.setattr(triton, "backward_programs", lambda *_: programs)
    assert_within(with_gradients(fused, given, **settings), expected, 1e-6)


def test_the_same_bits_again_also_under_recomputation() -> None:
    given, settings = case(3, 7, 40), {**RELAXED, "dropout": 0.1, "seed": SEED}
    first = with_gradients(fused, given, **settings)

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(fused, *args, use_reentrant=False, **kwargs)

    for again in (fused, recomputed):
        for name, value in with_gradients(again, given, **settings).items():
            assert torch.equal(value, first[name]), (again, name)


def test_strides_do_not_matter() -> None:
    given = case(6, 5, 40)
    settings = {**RELAXED, "dropout": 0.1, "seed": SEED}
    expected = with_gradients(fused, given, **settings)
    for name in ("h", "residual"):
        value = given[name].detach()  # type: ignore[union-attr]
        given[name] = value.permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    for name, value in with_gradients(fused, given, **settings).items():
        assert torch.equal(value, expected[name]), name


def test_a_gradient_without_strides() -> None:
    given = case(5, 40)
    z, n = fused(*given.values(), **RELAXED)
    assert n is not None
    (dbias,) = torch.autograd.grad(z.sum() + 2 * n.sum(), [given["next_bias"]])  # type: ignore[list-item]
    assert torch.equal(dbias, torch.full((40,), 10.0, device=DEVICE))


def test_no_rows() -> None:
    given = case(0, 40)
    z, n = fused(*given.values(), **RELAXED)
    assert n is not None and z.shape == n.shape == (0, 40)
    (dweight,) = torch.autograd.grad(z.sum() + n.sum(), [given["end_weight"]])  # type: ignore[list-item]
    assert not dweight.any()


@pytest.mark.parametrize("without", [(), INPUTS[5:]])
def test_it_is_a_sound_operator(without: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "empty", own_storage)
    given = case(5, 40, residual=torch.float32, dtype=torch.float16, without=without)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        _junction, (*given.values(), 1e-5, True, False, 0.1, 5), test_utils=checks
    )
    given = case(5, 40, without=without)
    torch.library.opcheck(_junction, (*given.values(), 1e-5, True, False, 0.1, 5))


def test_it_is_one_node_of_a_compiled_graph() -> None:
    given, settings = case(3, 40), {**RELAXED, "dropout": 0.1}
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for seed in (5, 6):
        expected = with_gradients(fused, given, **settings, seed=seed)
        for name, value in with_gradients(compiled, given, **settings, seed=seed).items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"end_rule": "tensor_max_over_8"}, "more than one token"),
        ({"dropout": 1.0}, r"must be in \[0, 1\)"),
        ({"next_bias_H": None}, "a weight and a bias"),
        ({"residual_SBH": torch.zeros(4, 40)}, "residual"),
    ],
)
def test_refuses(change: dict[str, Any], words: str, implementation: str) -> None:
    one = torch.ones(40)
    given = {"h_SBH": torch.zeros(3, 40), "bias_H": None, "residual_SBH": torch.zeros(3, 40)}
    given |= {"end_weight_H": one, "end_bias_H": one, "next_weight_H": one, "next_bias_H": one}
    settings = {"epsilon": 1e-5, "implementation": implementation}
    with pytest.raises(ValueError, match=words):
        sandwich_junction(**{**given, **settings, **change})  # type: ignore[arg-type]


def test_refuses_what_the_kernel_cannot_read() -> None:
    wide = case(3, 40, dtype=torch.float64)
    with pytest.raises(ValueError, match="use the reference"):
        fused(*wide.values(), **RELAXED)
    given = {**case(3, 40), "end_bias": torch.zeros(39, device=DEVICE)}
    with pytest.raises(ValueError, match="rows are 40 wide"):
        fused(*given.values(), **RELAXED)
