"""checkpoint.boxes: against counting elements one by one."""

import math

import numpy as np
import pytest

from megatron_cogview.checkpoint.boxes import Box, boxes_of_range


def covered(boxes: list[Box], shape: tuple[int, ...]) -> list[int]:
    """Flat numbers of the elements of ``boxes``, in the order in which the boxes hold them."""
    numbers = np.arange(math.prod(shape)).reshape(shape)
    whole = Box((0,) * len(shape), shape)
    return [int(n) for box in boxes for n in numbers[box.slices_in(whole)].flatten()]


@pytest.mark.parametrize("dimensions", range(5))
def test_a_range_is_cut_into_few_boxes_in_order(dimensions: int) -> None:
    rng = np.random.default_rng(dimensions)
    for _ in range(200):
        shape = tuple(int(n) for n in rng.integers(1, 6, dimensions))
        size = math.prod(shape)
        start, end = sorted(int(n) for n in rng.integers(0, size + 1, 2))
        boxes = list(boxes_of_range(start, end, shape))
        assert covered(boxes, shape) == list(range(start, end))
        assert sum(box.numel for box in boxes) == end - start
        assert all(box.numel for box in boxes)
        assert len(boxes) <= max(1, 2 * dimensions - 1)


def test_every_range_of_a_small_tensor() -> None:
    shape = (2, 3, 2, 2)
    for start in range(25):
        for end in range(start, 25):
            boxes = list(boxes_of_range(start, end, shape))
            assert covered(boxes, shape) == list(range(start, end))


def test_a_whole_tensor_is_one_box() -> None:
    for shape in ((), (7,), (3, 4), (1, 1, 1), (2, 3, 4, 5)):
        assert list(boxes_of_range(0, math.prod(shape), shape)) == [Box((0,) * len(shape), shape)]


def test_overlap_is_what_both_cover() -> None:
    rng = np.random.default_rng(3)
    seen = set()
    for _ in range(500):
        dimensions = int(rng.integers(0, 4))
        shape = (6,) * dimensions
        first, second = (
            Box(tuple(int(n) for n in start), tuple(int(n) for n in size))
            for start, size in (
                (rng.integers(0, 4, dimensions), rng.integers(0, 3, dimensions)) for _ in range(2)
            )
        )
        common = first.overlap(second)
        both = sorted(set(covered([first], shape)) & set(covered([second], shape)))
        assert common == second.overlap(first)
        assert (sorted(covered([common], shape)) if common else []) == both
        seen.add(common is None)
    assert seen == {True, False}


def test_a_box_inside_another() -> None:
    inner, outer = Box((3, 5), (1, 2)), Box((2, 4), (4, 4))
    assert inner.slices_in(outer) == (slice(1, 2), slice(1, 3))
    assert inner.moved((10, 20)) == Box((13, 25), (1, 2))
    with pytest.raises(ValueError):
        inner.overlap(Box((0,), (1,)))
