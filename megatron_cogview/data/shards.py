"""Token shards on disk (AD-5): fixed-stride records in ``.npy`` files and one ``manifest.json``.

Ids are local to their tokenizers.  There is no index: record n of a shard lies at a known offset,
and files are memory-mapped.  Knows nothing of sequences, shuffling or tensors.
"""

import io
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_cogview.configs.errors import DataError
from megatron_cogview.configs.sequence import MAX_SHARD_TEXT
from megatron_cogview.storage.atomic import write_bytes
from megatron_cogview.storage.digest import read_json_with_digest, sha256_bytes

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SHARD_NAME = re.compile(r"shard-\d{6,}\.npy")

Records = NDArray[np.void]
"""Structured array of :func:`record_dtype`."""


def shard_name(index: int) -> str:
    """File name of the shard of input file ``index``."""
    return f"shard-{index:06d}.npy"


def record_dtype(codes_per_side: Sequence[int]) -> np.dtype[np.void]:
    """One record: text, its length, one grid per image, id hash, CRC32; packed, little-endian.

    ``sample_id`` is the first 8 bytes of the SHA-256 of the source's id.
    """
    grids = [(f"image{i}", "<u2", (side, side)) for i, side in enumerate(codes_per_side)]
    return np.dtype(
        [
            ("text", "<u2", (MAX_SHARD_TEXT,)),
            ("text_length", "<u2"),
            *grids,
            ("sample_id", "<u8"),
            ("crc32", "<u4"),
        ]
    )


def compute_crc32(records: Records) -> NDArray[np.uint32]:
    """CRC32 of each record's bytes but its last four, which hold the CRC itself."""
    stride = records.dtype.itemsize
    raw = np.ascontiguousarray(records).view(np.uint8).data
    sums = (zlib.crc32(raw[at : at + stride - 4]) for at in range(0, len(raw), stride))
    return np.fromiter(sums, dtype=np.uint32, count=len(records))


def write_shard(path: Path, records: Records) -> dict[str, Any]:
    """Fill in the CRCs and write one shard atomically; gives ``{name, records, bytes, sha256}``."""
    records["crc32"] = compute_crc32(records)
    buffer = io.BytesIO()
    np.save(buffer, records, allow_pickle=False)
    data = buffer.getvalue()
    write_bytes(path, data)
    return {
        "name": path.name,
        "records": len(records),
        "bytes": len(data),
        "sha256": sha256_bytes(data),
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """The checked content of ``manifest.json``.

    Raises:
        DataError: missing, damaged, or of another format version.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise DataError(
            f"{path}: not found; the folder holds no finished token shards "
            f"(make them with tools/tokenize_dataset.py)"
        )
    manifest = read_json_with_digest(path)
    if manifest.get("version") != FORMAT_VERSION:
        raise DataError(
            f"{path}: format version {manifest.get('version')!r}, this program reads "
            f"{FORMAT_VERSION}; tokenise again or use the matching release"
        )
    return manifest


class ShardSet:
    """All records of a folder as one numbered sequence, read through memory maps."""

    def __init__(self, folder: Path, verify_crc: bool = True) -> None:
        """Open the manifest and compare every shard's size with it.

        Raises:
            DataError: manifest damaged, a shard missing or of another size.
        """
        self.folder = Path(folder)
        self.verify_crc = verify_crc
        self.manifest = read_manifest(self.folder)
        self.codes_per_side: tuple[int, ...] = tuple(self.manifest["layout"]["codes_per_side"])
        self.dtype = record_dtype(self.codes_per_side)
        self._entries = [e for e in self.manifest["shards"] if e["records"]]
        counts = [int(e["records"]) for e in self._entries]
        self._ends = np.cumsum(counts, dtype=np.int64)
        # Mapped at first use: a large data set has thousands of files.
        self._maps: list[Records | None] = [None] * len(self._entries)
        for entry in self.manifest["shards"]:
            self._check_size(entry)

    def __len__(self) -> int:
        """Number of records."""
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def longest_text(self) -> int:
        """Most text ids of any record."""
        return int(self.manifest["layout"]["longest_text"])

    def read(self, indices: NDArray[np.int64]) -> Records:
        """A copy of the records ``indices`` (any order, repeats allowed), shape ``[n]``.

        Raises:
            IndexError: an index outside the set.
            DataError: a record fails its CRC32 (with ``verify_crc``).
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and (int(indices.min()) < 0 or int(indices.max()) >= len(self)):
            raise IndexError(f"record outside 0..{len(self) - 1}")
        records = np.empty(indices.shape, dtype=self.dtype)
        shard = np.searchsorted(self._ends, indices, side="right")
        for number in np.unique(shard):
            chosen = shard == number
            records[chosen] = self._map(int(number))[indices[chosen] - self._start(int(number))]
        if self.verify_crc:
            self._check_crc(records, indices, shard)
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

    def _start(self, number: int) -> int:
        return int(self._ends[number] - self._entries[number]["records"])

    def _check_size(self, entry: dict[str, Any]) -> None:
        if not SHARD_NAME.fullmatch(str(entry["name"])):
            raise DataError(f"{self.folder / MANIFEST}: {entry['name']!r} is not a shard's name")
        path = self.folder / entry["name"]
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        if size != entry["bytes"]:
            raise DataError(
                f"{path}: {size} bytes, the manifest says {entry['bytes']}; "
                f"the file is truncated or foreign; copy it again or tokenise again"
            )

    def _map(self, number: int) -> Records:
        mapped = self._maps[number]
        if mapped is None:
            entry = self._entries[number]
            path = self.folder / entry["name"]
            try:
                mapped = np.load(path, mmap_mode="r", allow_pickle=False)
            except Exception as error:  # NumPy parses the header as Python; damage raises any type.
                raise DataError(f"{path}: damaged header ({type(error).__name__})") from None
            if mapped.dtype != self.dtype or mapped.shape != (entry["records"],):
                raise DataError(f"{path}: header does not match the manifest; the file is damaged")
            self._maps[number] = mapped
        return mapped

    def _check_crc(
        self, records: Records, indices: NDArray[np.int64], shard: NDArray[np.int64]
    ) -> None:
        bad = np.flatnonzero(compute_crc32(records) != records["crc32"])
        if bad.size:
            number = int(shard[bad[0]])
            raise DataError(
                f"{self.folder / self._entries[number]['name']}: record "
                f"{indices[bad[0]] - self._start(number)} fails its CRC32; the file is damaged; "
                f"copy it again or tokenise again"
            )
