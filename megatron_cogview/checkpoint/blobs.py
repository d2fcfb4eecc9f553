"""One tensor in a file, in the form of ``torch.save``, written for other readers and read without
unpickling: the values stand uncompressed in one member of a zip archive.
"""

import hashlib
import io
import mmap
import os
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, BinaryIO, Self, cast

import torch

from megatron_cogview.checkpoint.index import Place, open_regular
from megatron_cogview.configs.errors import CheckpointError

ALIGNMENT = 64
"""Blobs begin at multiples of it, and so, by torch's own padding, do their values."""
MOST_OVERHEAD = 1 << 16
"""Bytes that a blob may have beside its values; torch needs about a thousand."""
_LOCAL_HEADER_BYTES = 30
_END_BYTES, _LOCATOR_BYTES, _END64_BYTES = 22, 20, 56
"""The three records at the end of an archive."""


class BlobFile:
    """A file of blobs that is hashed while it is written."""

    def __init__(self, path: Path) -> None:
        """Create the file; it must not exist."""
        self.path = path
        self._file: BinaryIO = path.open("xb", buffering=0)
        self._hash = hashlib.sha256()
        self.size = 0

    def add(self, value: torch.Tensor | None) -> Place:
        """Append a contiguous tensor of the CPU, or megatron-core's empty object.

        The tensor must own its storage alone: torch writes the whole of it.
        """
        self._write(bytes(-self.size % ALIGNMENT))
        start = self.size
        # megatron-core keeps objects in lists of one.
        content = [None] if value is None else value
        sink = _Sink(self)
        try:
            torch.save(content, cast("IO[bytes]", sink))
        except Exception as error:
            # torch, which ends its archive all the same, would complain of a wrong position.
            raise sink.error or error from None
        return Place(self.path.name, start, self.size - start)

    def _write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        written = 0
        while written < len(view):
            # A disk may take less than it is given, and say why only the next time.
            written += write_some(self._file, view[written:])
        self._hash.update(view)
        self.size += len(view)
        return len(view)

    def finish(self) -> str:
        """Flush to the disk and close; gives the SHA-256 of all bytes."""
        sync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def write_some(file: BinaryIO, data: memoryview) -> int:
    """One ``write``; tests put faults here."""
    return file.write(data)


def sync(descriptor: int) -> None:
    """One ``fsync``; tests put faults here."""
    os.fsync(descriptor)


class _Sink(io.RawIOBase):
    """What ``torch.save`` writes into."""

    def __init__(self, target: BlobFile) -> None:
        self._target = target
        self.error: OSError | None = None
        """Why the first write failed."""

    def writable(self) -> bool:
        return True

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]
        if self.error is not None:
            raise self.error
        try:
            return self._target._write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Nothing is held back."""


class BlobReader:
    """Tensors of a folder's files; maps each file into memory once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._maps: dict[str, mmap.mmap] = {}
        self._sound: set[Place] = set()

    def read(self, place: Place, dtype: torch.dtype, numel: int) -> torch.Tensor:
        """The values of a blob, flat: a view of the file where its alignment allows it.

        Raises:
            CheckpointError: there is no such blob, or not with these values.
        """
        where = f"{self._folder / place.file} at {place.start}"
        wanted = numel * dtype.itemsize
        whole = self._map(place.file)
        if place.start + place.length > len(whole):
            raise CheckpointError(f"{where}: lies behind the end of the file")
        if not wanted <= place.length <= wanted + MOST_OVERHEAD:
            raise CheckpointError(f"{where}: {place.length} bytes for {wanted} bytes of values")
        if not numel:
            return torch.empty(0, dtype=dtype)
        try:
            begin, checksum = _find_values(_Window(whole, place), wanted)
            start = place.start + begin
        except (zipfile.BadZipFile, struct.error, ValueError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{where}: not a tensor ({error})") from error
        if start + wanted > place.start + place.length:
            raise CheckpointError(f"{where}: its values go on behind its end")
        if place not in self._sound:
            # Files are hashed by one rank each; this one may see other bytes, on another machine.
            if zlib.crc32(memoryview(whole)[start : start + wanted]) != checksum:
                raise CheckpointError(f"{where}: its values differ from their checksum")
            self._sound.add(place)
        if start % dtype.itemsize:
            return torch.frombuffer(bytearray(whole[start : start + wanted]), dtype=dtype)
        return torch.frombuffer(whole, dtype=dtype, count=numel, offset=start)

    def check_room(self, places: Iterable[Place]) -> None:
        """Refuse blobs that together are larger than their files, before memory is asked for.

        Raises:
            CheckpointError: they are, or a file is missing.
        """
        wanted = Counter[str]()
        for place in places:
            wanted[place.file] += place.length
        for name, length in wanted.items():
            if length > len(self._map(name)):
                raise CheckpointError(f"{self._folder / name}: too short for what it shall hold")

    def _map(self, name: str) -> mmap.mmap:
        if name not in self._maps:
            path = self._folder / name
            descriptor = open_regular(path)
            try:
                # Private and writable, for torch; nothing is ever written to it.
                self._maps[name] = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path}: cannot be read ({error})") from error
            finally:
                os.close(descriptor)
        return self._maps[name]


def _find_values(window: "_Window", wanted: int) -> tuple[int, int]:
    """Where in the blob the values begin, and their CRC32."""
    _check_list(window)
    with zipfile.ZipFile(window) as archive:
        members = [m for m in archive.infolist() if m.filename.endswith("/data/0")]
        if len(members) != 1:
            raise ValueError(f"{len(members)} members hold values")
        (member,) = members
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise ValueError("its values are compressed or encrypted")
        if not member.file_size == member.compress_size == wanted:
            raise ValueError(f"{member.file_size} bytes of values instead of {wanted}")
        window.seek(member.header_offset)
        header = window.read(_LOCAL_HEADER_BYTES)
        if len(header) < _LOCAL_HEADER_BYTES or header[:4] != b"PK\3\4":
            raise ValueError("its values have no header")
        names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return member.header_offset + _LOCAL_HEADER_BYTES + names, member.CRC


def _check_list(window: "_Window") -> None:
    """Refuse an archive whose list of members would fill the memory.

    Its size stands at the end, and in archives of more than 4 GiB once more before that.
    """
    length = window.seek(0, os.SEEK_END)
    window.seek(max(0, length - _END64_BYTES - _LOCATOR_BYTES - _END_BYTES))
    tail = window.read()
    end, end64 = tail[-_END_BYTES:], tail[: -_LOCATOR_BYTES - _END_BYTES]
    if end[:4] != b"PK\5\6" or end[20:] != b"\0\0":
        raise ValueError("it does not end as an archive does")
    sizes = [int.from_bytes(end[12:16], "little")]
    if end64[:4] == b"PK\6\6" and len(end64) == _END64_BYTES:
        sizes.append(int.from_bytes(end64[40:48], "little"))
    if any(size > MOST_OVERHEAD and size != 0xFFFFFFFF for size in sizes):
        raise ValueError("its list of members is too long")
    if sizes == [0xFFFFFFFF]:
        raise ValueError("its list of members has no size")


class _Window(io.RawIOBase):
    """A part of a mapped file as a file of its own."""

    def __init__(self, whole: mmap.mmap, place: Place) -> None:
        self._whole, self._start, self._length = whole, place.start, place.length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError("a position before its start")
        self._at = base + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        rest = max(0, self._length - self._at)
        count = rest if size is None or size < 0 else min(size, rest)
        start = self._start + self._at
        self._at += count
        return self._whole[start : start + count]
