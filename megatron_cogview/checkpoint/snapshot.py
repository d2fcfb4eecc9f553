"""A copy of this rank's part of a training state in host memory, for a thread to write.

Training goes on as soon as the copy is made; what is written is the state of that moment.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_cogview.checkpoint.blobs import ALIGNMENT, BlobFile
from megatron_cogview.checkpoint.boxes import Box
from megatron_cogview.checkpoint.index import Entry, Place


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a tensor that this rank holds."""

    key: str
    """Name of the tensor in checkpoints."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    box: Box
    """Which part."""
    data: torch.Tensor
    """The live values, in the shape of the box."""
    is_written: bool
    """Whether this rank writes it; others hold copies."""


@dataclass(frozen=True, slots=True)
class ShardedState:
    """This rank's part of a training state; the tensors are the live ones."""

    pieces: list[Piece]
    common: dict[str, Any]
    """JSON values that are the same on all ranks."""
    objects: list[str]
    """Keys of megatron-core's empty extra states, for readers that ask for them."""


@dataclass(frozen=True, slots=True)
class Written:
    """What one rank has written, for the index and the manifest."""

    entries: list[Entry]
    objects: dict[str, Place]
    files: dict[str, tuple[int, str]]
    """Bytes and SHA-256 by name."""


class Snapshot:
    """Host memory that is kept from save to save, because getting it anew takes longer than filling
    it."""

    def __init__(self, with_cuda: bool) -> None:
        self._pinned = with_cuda
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._copies: list[tuple[Piece, torch.Tensor]] = []

    def take(self, pieces: Sequence[Piece]) -> None:
        """Copy what this rank writes of ``pieces``."""
        ours = [piece for piece in pieces if piece.is_written]
        ends, end = [], 0
        for piece in ours:
            end += -end % ALIGNMENT + piece.data.numel() * piece.data.element_size()
            ends.append(end)
        if self._memory.numel() < end:
            # The old memory goes first.
            self._memory = torch.empty(0, dtype=torch.uint8)
            self._memory = torch.empty(end, dtype=torch.uint8, pin_memory=self._pinned)
        self._copies = []
        for piece, stop in zip(ours, ends, strict=True):
            size = piece.data.numel() * piece.data.element_size()
            flat = self._memory[stop - size : stop].view(piece.data.dtype)
            flat.view(piece.data.shape).copy_(piece.data, non_blocking=self._pinned)
            self._copies.append((piece, flat))
        if self._pinned:
            torch.cuda.synchronize()

    def write(self, folder: Path, rank: int, objects: Sequence[str] = ()) -> Written:
        """Write the copies into one file of ``folder``; needs no other rank.

        Args:
            folder: exists.
            rank: names the file, as megatron-core does.
            objects: keys under which other readers look for an empty object.
        """
        written = Written([], {}, {})
        if not self._copies and not objects:
            return written
        with BlobFile(folder / f"__{rank}_0.distcp") as file:
            for piece, flat in self._copies:
                place = file.add(_alone(flat).view(piece.data.shape))
                entry = (piece.key, piece.data.dtype, piece.shape, piece.box, place)
                written.entries.append(entry)
            for key in objects:
                written.objects[key] = file.add(None)
            written.files[file.path.name] = (file.size, file.finish())
        # They know the live tensors, which may be gone long before the next save.
        self._copies = []
        return written


def _alone(flat: torch.Tensor) -> torch.Tensor:
    """The same memory as a storage of its own size, for torch saves whole storages."""
    if not flat.numel():
        return torch.empty(0, dtype=flat.dtype)
    return torch.frombuffer(flat.view(torch.uint8).numpy(), dtype=flat.dtype)
