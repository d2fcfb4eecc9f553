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

CHUNK_BYTES = 1 << 28
"""Of host memory; a larger piece has a chunk of its own."""


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
    it.  It comes in chunks: what is pinned for a GPU is rounded up to a power of two."""

    def __init__(self, with_cuda: bool) -> None:
        self._pinned = with_cuda
        self._chunks: list[torch.Tensor] = []
        self._copies: list[tuple[Piece, torch.Tensor]] = []

    def reserve(self, pieces: Sequence[Piece]) -> None:
        """Get the memory for such pieces now, so that not even the first copy waits for it.

        Raises:
            RuntimeError: there is not enough.
        """
        self._rooms([piece for piece in pieces if piece.is_written])

    def take(self, pieces: Sequence[Piece]) -> None:
        """Copy what this rank writes of ``pieces``.

        Raises:
            RuntimeError: there is not enough memory.
        """
        ours = [piece for piece in pieces if piece.is_written]
        self._copies = []
        for piece, room in zip(ours, self._rooms(ours), strict=True):
            flat = room.view(piece.data.dtype)
            flat.view(piece.data.shape).copy_(piece.data, non_blocking=self._pinned)
            self._copies.append((piece, flat))
        if self._pinned:
            torch.cuda.synchronize()

    def _rooms(self, pieces: Sequence[Piece]) -> list[torch.Tensor]:
        """A range of the memory for each piece."""
        lengths: list[int] = []
        plan = []
        for piece in pieces:
            size = piece.data.numel() * piece.data.element_size()
            start = lengths[-1] + -lengths[-1] % ALIGNMENT if lengths else 0
            if not lengths or start + size > CHUNK_BYTES:
                lengths.append(0)
                start = 0
            lengths[-1] = start + size
            plan.append((len(lengths) - 1, start, size))
        if lengths != [chunk.numel() for chunk in self._chunks]:
            # The old memory goes first.
            self._chunks = []
            self._chunks = [self._new(length) for length in lengths]
        return [self._chunks[number][start : start + size] for number, start, size in plan]

    def _new(self, length: int) -> torch.Tensor:
        chunk = torch.empty(length, dtype=torch.uint8, pin_memory=self._pinned)
        # The system gives pages only when they are written to; pinned ones are there.
        return chunk if self._pinned else chunk.zero_()

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
