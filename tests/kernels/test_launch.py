"""How attention's kernels are started: sizes by shape, and the parts of the slot gradient."""

import pytest
import torch

from megatron_cogview.kernels.pivot_attention import launch, triton_backward
from megatron_cogview.kernels.pivot_attention.launch import num_parts
from tests.kernels.pivot_attention_cases import (
    FP32_BOUND,
    NAMES,
    Case,
    assert_right,
    by_triton,
    errors,
    exact,
)


def queries(number: int, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(2, 4, number, head_dim, dtype=dtype, device="meta")


def test_sizes_follow_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "is_interpreted", lambda: False)
    start = launch.launch
    assert start("forward", queries(1, 64), False, False, False).queries == 16
    assert start("forward", queries(16, 40), False, False, False).queries == 16
    assert start("forward", queries(17, 64), False, False, False).queries == 128
    # Only the forward is for decoding, and only heads up to 64 have a tile for it.
    assert start("query_gradient", queries(1, 64), False, False, False).queries == 64
    assert start("forward", queries(1, 80), False, False, False).queries == 64
    padded, plain = (
        start("query_gradient", queries(99, 64), False, p, False) for p in (True, False)
    )
    assert (padded.keys, plain.keys) == (32, 64)
    assert start("key_gradient", queries(99, 64), True, False, False).num_stages == 1
    assert start("forward", queries(1, 64, torch.float32), False, False, False).queries == 32


@pytest.mark.parametrize(
    ("programs", "query_tiles", "parts"),
    [
        # 12 tiles of slots, 40 heads: 4 samples, 1 sample, 1 of 8 tensor-parallel ranks.
        (12 * 160, 64, 1),
        (12 * 40, 64, 2),
        (12 * 5, 64, 16),
        (12 * 5, 3, 3),
        (1, 1, 1),
        (0, 4, 4),
    ],
)
def test_few_programs_are_split_over_queries(programs: int, query_tiles: int, parts: int) -> None:
    assert num_parts(programs, query_tiles) == parts


@pytest.mark.parametrize("parts", [1, 3])
def test_the_parts_add_up(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """50 queries are 4 tiles under the interpreter, of which late slots have fewer."""
    monkeypatch.setattr(triton_backward, "num_parts", lambda programs, tiles: parts)
    # Gradients of slots and keys start with more keys than queries, the forward with more queries.
    tiles = launch.Launch(16, 32, 1, 1) if parts == 1 else launch.Launch(32, 16, 1, 1)
    monkeypatch.setattr(launch, "INTERPRETED", tiles)
    for case in (Case(), Case(queries=9, given={"num_pivots": 30}, heads=1)):
        assert_right(case)
        tensors = case.tensors()
        first, second = by_triton(case, tensors), by_triton(case, tensors)
        assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_a_part_that_is_left_out_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = triton_backward.key_gradient_kernel

    class OnePartLess:
        """The kernel, told of one part less than there is."""

        def __getitem__(self, grid: tuple[int, int]):
            return lambda *tensors, **given: real[grid](*tensors[:-1], tensors[-1] - 1, **given)

    monkeypatch.setattr(triton_backward, "num_parts", lambda programs, tiles: 2)
    monkeypatch.setattr(triton_backward, "key_gradient_kernel", OnePartLess())
    case = Case()
    tensors = case.tensors()
    found = errors(by_triton(case, tensors), exact(case, tensors))
    assert min(found["k"], found["v"]) > 1e-2
    assert max(found["out"], found["q"]) < FP32_BOUND
