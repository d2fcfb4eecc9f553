"""Boxes: rectangular parts of a tensor, by offsets and sizes.  Plain arithmetic."""

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Box:
    """Where a part lies in the whole tensor, and how large it is."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.sizes)

    def overlap(self, other: "Box") -> "Box | None":
        """What both cover; None when that is nothing."""
        starts = [max(a, b) for a, b in zip(self.offsets, other.offsets, strict=True)]
        ends = [
            min(a + m, b + n)
            for a, m, b, n in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        ]
        if any(start >= end for start, end in zip(starts, ends, strict=True)):
            return None
        sizes = tuple(end - start for start, end in zip(starts, ends, strict=True))
        return Box(tuple(starts), sizes)

    def slices_in(self, outer: "Box") -> tuple[slice, ...]:
        """Index of this box in the tensor that holds ``outer``."""
        return tuple(
            slice(start - base, start - base + size)
            for start, base, size in zip(self.offsets, outer.offsets, self.sizes, strict=True)
        )

    def moved(self, offsets: tuple[int, ...]) -> "Box":
        """The same box of a tensor that begins at ``offsets`` of a larger one."""
        return Box(tuple(a + b for a, b in zip(self.offsets, offsets, strict=True)), self.sizes)


def boxes_of_range(start: int, end: int, shape: tuple[int, ...]) -> Iterator[Box]:
    """The elements ``start`` to ``end - 1`` of a row-major tensor as boxes, in order.

    A distributed optimizer cuts tensors into such ranges wherever its buckets end; a file format of
    boxes holds one in at most ``2 * dimensions - 1`` pieces.
    """
    if start >= end:
        return
    if len(shape) <= 1:
        yield Box((start,) * len(shape), (end - start,) * len(shape))
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row
    if first > last:
        # It begins and ends inside one row.
        yield from _in_row(last, start - last * row, end - last * row, shape)
        return
    if start % row:
        yield from _in_row(first - 1, start - (first - 1) * row, row, shape)
    if first < last:
        rest = shape[1:]
        yield Box((first, *(0 for _ in rest)), (last - first, *rest))
    yield from _in_row(last, 0, end - last * row, shape)


def _in_row(row: int, start: int, end: int, shape: tuple[int, ...]) -> Iterator[Box]:
    for box in boxes_of_range(start, end, shape[1:]):
        yield Box((row, *box.offsets), (1, *box.sizes))
