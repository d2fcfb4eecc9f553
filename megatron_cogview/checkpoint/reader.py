"""Fill tensors from a checkpoint, whatever layout it was written under."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_cogview.checkpoint.blobs import BlobReader
from megatron_cogview.checkpoint.boxes import Box
from megatron_cogview.checkpoint.index import FILE, Stored, read_index
from megatron_cogview.checkpoint.snapshot import Piece
from megatron_cogview.configs.errors import CheckpointError


class CheckpointReader:
    """Tensors of one checkpoint by key.

    Args:
        folder: the checkpoint.

    Raises:
        CheckpointError: its index is damaged or not to be trusted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = read_index(folder / FILE)
        self._blobs = BlobReader(folder)

    @torch.no_grad()
    def fill(self, pieces: Sequence[Piece]) -> None:
        """Copy the stored values into the pieces, converting their type if need be.

        Raises:
            CheckpointError: a tensor is missing, has another shape, or not all of its values.
        """
        by_key: dict[str, list[Piece]] = defaultdict(list)
        for piece in pieces:
            by_key[piece.key].append(piece)
        for key, each in by_key.items():
            stored = self.index.get(key)
            if stored is None:
                raise CheckpointError(f"{self.folder}: holds no {key!r}")
            boxes = _Boxes(stored)
            for piece in each:
                self._fill(piece, stored, boxes)

    def _fill(self, piece: Piece, stored: Stored, boxes: "_Boxes") -> None:
        if stored.shape != piece.shape:
            raise CheckpointError(
                f"{self.folder}: {piece.key} has shape {stored.shape}, and this model's has "
                f"{piece.shape}"
            )
        filled, touching = 0, boxes.touching(piece.box)
        # Parts that overlap could add up to the right number and leave a hole.
        covered = torch.zeros(piece.box.sizes, dtype=torch.bool) if len(touching) > 1 else None
        for number in touching:
            box, place = stored.parts[number]
            common = piece.box.overlap(box)
            if common is None:
                continue
            filled += common.numel
            if filled > piece.box.numel:
                raise CheckpointError(f"{self.folder}: {piece.key} has parts that overlap")
            values = self._blobs.read(place, stored.dtype, box.numel).view(box.sizes)
            target = piece.data[common.slices_in(piece.box)]
            target.copy_(values[common.slices_in(box)])
            if covered is not None:
                covered[common.slices_in(piece.box)] = True
        if filled != piece.box.numel or (covered is not None and not covered.all()):
            raise CheckpointError(
                f"{self.folder}: {piece.key} lacks some of the {piece.box.numel} values wanted"
            )

    def whole(self, key: str) -> torch.Tensor:
        """A whole tensor.

        Raises:
            CheckpointError: its parts are not all there.
        """
        stored = self.index.get(key)
        if stored is None:
            raise CheckpointError(f"{self.folder}: holds no {key!r}")
        return self.part(key, Box((0,) * len(stored.shape), stored.shape))

    def part(self, key: str, box: Box) -> torch.Tensor:
        """A part of a tensor that is there.

        Raises:
            CheckpointError: not all of its values are.
        """
        stored = self.index[key]
        # Before memory is asked for.
        held = sum(place.length for _, place in stored.parts)
        if math.prod(stored.shape) * stored.dtype.itemsize > held:
            raise CheckpointError(f"{self.folder}: {key} has {held} bytes, too few for its shape")
        self._blobs.check_room(place for _, place in stored.parts)
        data = torch.empty(box.sizes, dtype=stored.dtype)
        self.fill([Piece(key, stored.shape, box, data, False)])
        return data


class _Boxes:
    """The parts of one tensor as arrays: there may be tens of thousands."""

    def __init__(self, stored: Stored) -> None:
        dimensions = len(stored.shape)
        shape = (len(stored.parts), dimensions)
        self._starts = np.array([b.offsets for b, _ in stored.parts], np.int64).reshape(shape)
        sizes = np.array([b.sizes for b, _ in stored.parts], np.int64).reshape(shape)
        self._ends = self._starts + sizes

    def touching(self, box: Box) -> list[int]:
        """Numbers of the parts that have something in common with ``box``."""
        start = np.array(box.offsets, np.int64)
        end = start + np.array(box.sizes, np.int64)
        hit = np.all((self._starts < end) & (self._ends > start), axis=1)
        return [int(number) for number in np.flatnonzero(hit)]
