"""Reading token shards: all records of a folder as one numbered sequence, through memory maps."""

import errno
import mmap
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_cogview.configs.errors import DataError
from megatron_cogview.data.shards import (
    MANIFEST,
    SHARD_NAME,
    SPLIT_TABLE,
    Records,
    compute_crc32,
    npy_header,
    read_manifest,
    record_dtype,
)
from megatron_cogview.data.split import Split, split_row
from megatron_cogview.storage.digest import sha256_file

MAX_MAPS = 16_384
"""Shards mapped at a time; the kernel allows a process 65,530 mappings by default."""
OTHER_FILES = 256
"""Open files left to the rest of the process."""


class ShardSet:
    """All records of one folder."""

    def __init__(self, folder: Path, verify_crc: bool = True) -> None:
        """Open the manifest and compare every file's size with it.

        Raises:
            DataError: manifest damaged, a shard missing or of another size.
        """
        self.folder = Path(folder)
        self.verify_crc = verify_crc
        self.manifest = read_manifest(self.folder)
        try:
            self.codes_per_side: tuple[int, ...] = tuple(self.manifest["layout"]["codes_per_side"])
            self.dtype = record_dtype(self.codes_per_side)
            self._entries: list[dict[str, Any]] = self.manifest["shards"]
            counts = [int(entry["records"]) for entry in self._entries]
            sizes = [(str(entry["name"]), int(entry["bytes"])) for entry in self._entries]
            stated = int(self.manifest["records"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{self.folder / MANIFEST}: lacks what a reader needs ({error!r}); see what "
                "tools/verify_shards.py says"
            ) from None
        self._ends = np.cumsum(np.array(counts, dtype=np.int64))
        self._starts = self._ends - np.array(counts, dtype=np.int64)
        self._size = int(self._ends[-1]) if counts else 0
        # Mapped at first use: a large data set has thousands of files.
        self._maps: dict[int, memoryview] = {}
        self._max_maps = _allow_open_files(len(self._entries))
        for name, size in sizes:
            self._check_size(name, size)
        if self._size != stated:
            raise DataError(f"{self.folder / MANIFEST}: its record counts do not add up")

    def __len__(self) -> int:
        """Number of records."""
        return self._size

    @property
    def longest_text(self) -> int:
        """Most text ids of any record."""
        return int(self.manifest["layout"]["longest_text"])

    def split(self, fraction: float) -> Split:
        """Training and validation part; ``fraction`` is one that ``DataConfig`` admits.

        Of a few dozen records none may fall to a part: which side a record is on follows from its
        id alone, in every data set alike.

        Raises:
            DataError: the split table is missing or damaged.
        """
        held_out = np.array(self._split_table()[split_row(fraction)], dtype=np.int64)
        return Split(self._ends - self._starts, held_out)

    def read(self, indices: NDArray[np.int64]) -> Records:
        """A copy of the records ``indices`` (any order, repeats allowed), shape ``[n]``.

        Raises:
            IndexError: an index outside the set.
            DataError: a record fails its CRC32 (with ``verify_crc``).
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and (int(indices.min()) < 0 or int(indices.max()) >= self._size):
            raise IndexError(f"record outside 0..{self._size - 1}")
        shard = np.searchsorted(self._ends, indices, side="right")
        row = indices - self._starts[shard]
        records = self._gather(shard, row)
        if self.verify_crc:
            self._check_crc(records, row, shard)
        return records

    def check_tokenizers(
        self,
        text_fingerprint: str | None = None,
        image_fingerprint: str | None = None,
    ) -> None:
        """Refuse tokenizers other than those that made the shards; ``None`` is not compared.

        Raises:
            DataError: naming both fingerprints.
        """
        given = {"text": text_fingerprint, "image": image_fingerprint}
        for kind, fingerprint in given.items():
            made_with = self.manifest["tokenizers"][kind]["fingerprint"]
            if fingerprint is not None and fingerprint != made_with:
                raise DataError(
                    f"{self.folder / MANIFEST}: made with the {kind} tokenizer {made_with}, "
                    f"but the {kind} tokenizer given is {fingerprint}; "
                    f"give the same file or tokenise again into another folder"
                )

    def _gather(self, shard: NDArray[np.int64], row: NDArray[np.int64]) -> Records:
        """Records by shard and row, whichever way is faster; the bytes are the same."""
        raw = np.dtype((np.void, self.dtype.itemsize))
        if shard.size and int(shard.min()) == int(shard.max()):
            mapped = np.frombuffer(self._map(int(shard[0])), dtype=raw)
            return mapped.take(row).view(self.dtype)
        stride = self.dtype.itemsize
        records = np.empty(shard.shape, dtype=self.dtype)
        target = records.view(np.uint8).data
        maps, load = self._maps, self._map
        # Slices of memory views cost a third of what NumPy's selection by shard does.
        ends = range(stride, len(target) + stride, stride)
        for end, number, first in zip(ends, shard.tolist(), (row * stride).tolist(), strict=True):
            mapped_bytes = maps.get(number) or load(number)
            target[end - stride : end] = mapped_bytes[first : first + stride]
        return records

    def _check_size(self, name: str, expected: int) -> None:
        if not SHARD_NAME.fullmatch(name):
            raise DataError(f"{self.folder / MANIFEST}: {name!r} is not a shard's name")
        path = f"{self.folder}/{name}"
        try:
            size = os.stat(path).st_size
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        if size != expected:
            raise DataError(
                f"{path}: {size} bytes, the manifest says {expected}; "
                f"the file is truncated or foreign; copy it again or tokenise again"
            )

    def _map(self, number: int) -> memoryview:
        """Bytes of the records of one shard; its header must be exactly the one we write."""
        found = self._maps.get(number)
        if found is not None:
            return found
        entry = self._entries[number]
        path = self.folder / entry["name"]
        header = npy_header(self.dtype, int(entry["records"]))
        try:
            mapped = memoryview(self._pages(path))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({error})") from None
        expected = len(header) + int(entry["records"]) * self.dtype.itemsize
        if len(mapped) != expected or mapped[: len(header)] != header:
            raise DataError(
                f"{path}: header does not match the manifest; the file is damaged; "
                "copy it again or tokenise again"
            )
        if len(self._maps) >= self._max_maps:
            self._maps.clear()
        body = self._maps[number] = mapped[len(header) :]
        return body

    def _pages(self, path: Path) -> mmap.mmap:
        """A mapped file; where others have used up the open files, our maps make room."""
        try:
            return _mapped(path)
        except OSError as error:
            if error.errno != errno.EMFILE or not self._maps:
                raise
            self._maps.clear()
            return _mapped(path)

    def _check_crc(
        self, records: Records, row: NDArray[np.int64], shard: NDArray[np.int64]
    ) -> None:
        bad = np.flatnonzero(compute_crc32(records) != records["crc32"])
        if bad.size:
            raise DataError(
                f"{self.folder / self._entries[int(shard[bad[0]])]['name']}: record "
                f"{row[bad[0]]} fails its CRC32; the file is damaged; "
                f"copy it again or tokenise again"
            )

    def _split_table(self) -> NDArray[np.uint32]:
        """uint32 ``[steps, shards]``."""
        stated = self.manifest["split_table"]
        if not SPLIT_TABLE.fullmatch(str(stated["name"])):
            raise DataError(f"{self.folder / MANIFEST}: {stated['name']!r} is not a table's name")
        path = self.folder / stated["name"]
        try:
            if sha256_file(path) != stated["sha256"]:
                raise DataError(
                    f"{path}: damaged; copy it again or run tools/tokenize_dataset.py again"
                )
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        table: NDArray[np.uint32] = np.load(path, mmap_mode="r", allow_pickle=False)
        return table


def _mapped(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # Records are read in random order: what stands beside one is not wanted.
    pages.madvise(mmap.MADV_RANDOM)
    return pages


def _allow_open_files(num_shards: int) -> int:
    """How many shards may be mapped at a time: each holds an open file.

    The usual limit of 1,024 is raised as far as the system lets a process raise it itself.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(num_shards, MAX_MAPS) + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    room = MAX_MAPS if soft == resource.RLIM_INFINITY else soft - OTHER_FILES
    return max(16, min(MAX_MAPS, room))
