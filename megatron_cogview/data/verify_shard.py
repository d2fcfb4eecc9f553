"""One shard against what its manifest says of it: every byte, in one pass and constant memory.

Runs in a worker process, so it loads no torch and gives plain values.  The file is read, not
mapped: a failing disk is then an error to report instead of a signal that ends the process.
"""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_cogview.configs.sequence import MAX_SHARD_TEXT
from megatron_cogview.data.shards import Records, compute_crc32, npy_header, record_dtype
from megatron_cogview.data.split import split_counts

CHUNK_BYTES = 4 << 20
"""Records are read in pieces of about this size."""
MAX_LISTED = 20
"""Records of one shard that are listed for one kind of damage; the others are counted."""

COPY_SHARD = (
    "copy the file again, or run tools/tokenize_dataset.py again with the same arguments, which "
    "makes damaged shards anew"
)
WRITTEN_WRONG = (
    "the file is as it was written, so what wrote it is at fault: tokenise again into another "
    "folder, and report it"
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong."""

    check: str
    """Which check failed; one of a few fixed words."""
    file: str
    """Name within the folder."""
    what: str
    """What is there and what should be."""
    remedy: str
    """What to do about it."""
    record: int | None = None
    """Number of the record within its shard."""

    def __str__(self) -> str:
        place = self.file if self.record is None else f"{self.file}, record {self.record}"
        return f"{place}: {self.what}; {self.remedy}"


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """What a shard should be."""

    path: Path
    """Where it lies."""
    records: int
    """Their number."""
    num_bytes: int
    """Size of the file."""
    sha256: str
    """Of the file, hex."""
    codes_per_side: tuple[int, ...]
    """Side of each image grid."""
    most_text: int
    """Largest text length allowed."""
    vocab_size: int
    """Text ids are below."""
    num_codes: int
    """Image codes are below."""


@dataclass(slots=True)
class ShardResult:
    """What a shard is."""

    findings: list[Finding] = field(default_factory=list)
    """Nothing if all is well."""
    sample_ids: NDArray[np.uint64] | None = None
    """Sorted, uint64 ``[records]``; None if not read whole."""
    split: list[int] | None = None
    """Column of the split table; None if the ids were not read or are in another order."""


def check_shard(plan: ShardPlan, quick: bool = False) -> ShardResult:
    """Compare one shard with its plan; ``quick``: existence, size and header only."""
    reading = _Reading(plan)
    try:
        size = plan.path.stat().st_size
        if size != plan.num_bytes:
            reading.note("size", f"{size:,} bytes, the manifest says {plan.num_bytes:,}")
        else:
            with open(plan.path, "rb", buffering=0) as file:
                reading.run(file, quick)
    except OSError as error:
        reading.note("unreadable", f"cannot be read ({error.strerror or error})")
    return reading.result()


class _Reading:
    """The state of reading one shard from start to end."""

    def __init__(self, plan: ShardPlan) -> None:
        self._plan = plan
        self._dtype = record_dtype(plan.codes_per_side)
        self._noted: list[tuple[str, str, int | None]] = []
        self._counts: Counter[str] = Counter()
        self._as_written = False
        self._ids = np.empty(0, dtype=np.uint64)
        self._complete = False

    def note(self, check: str, what: str, record: int | None = None) -> None:
        """One thing that is wrong."""
        self._noted.append((check, what, record))

    def run(self, file: Any, quick: bool) -> None:
        """Header, then records, then the hash over all of it."""
        plan = self._plan
        expected = npy_header(self._dtype, plan.records)
        header = file.read(len(expected))
        stride = self._dtype.itemsize
        fits = plan.num_bytes == len(expected) + plan.records * stride
        if header != expected or not fits:
            self.note("header", f"does not begin as {plan.records:,} records of {stride} bytes do")
        if quick:
            return
        digest = hashlib.sha256(header)
        if fits:
            self._complete = self._read_records(file, digest.update)
            if not self._complete:
                self.note("size", "became shorter while it was read")
                return
        else:
            # Where a record begins is unknown; the hash is all that can be compared.
            while data := file.read(CHUNK_BYTES):
                digest.update(data)
        self._as_written = digest.hexdigest() == plan.sha256
        if not self._as_written:
            self.note("sha256", f"SHA-256 {digest.hexdigest()}, the manifest says {plan.sha256}")

    def result(self) -> ShardResult:
        """Findings with their remedies.

        Values that cannot be are the work of the writer if the hash is right, and of the disk or
        the network if it is not.
        """
        remedy = WRITTEN_WRONG if self._as_written else COPY_SHARD
        for check, count in self._counts.items():
            if count > MAX_LISTED:
                self.note(check, f"{count - MAX_LISTED:,} more records like those above")
        name = self._plan.path.name
        result = ShardResult([Finding(c, name, what, remedy, r) for c, what, r in self._noted])
        if self._complete and self._counts["order"]:
            result.sample_ids = np.sort(self._ids)
        elif self._complete:
            result.sample_ids = self._ids
            result.split = split_counts(self._ids).tolist()
        return result

    def _read_records(self, file: BinaryIO, update: Callable[[memoryview], None]) -> bool:
        """Check all records; False if the file ends before them."""
        count = self._plan.records
        per_chunk = max(1, CHUNK_BYTES // self._dtype.itemsize)
        buffer: Records = np.empty(min(per_chunk, count), dtype=self._dtype)
        self._ids = np.empty(count, dtype=np.uint64)
        for first in range(0, count, per_chunk):
            records = buffer[: min(per_chunk, count - first)]
            raw = records.view(np.uint8).data
            if not _fill(raw, file):
                return False
            update(raw)
            self._check_record_fields(records, first)
        return True

    def _check_record_fields(self, records: Records, first: int) -> None:
        """One chunk; ``first`` is the number of its first record."""
        plan = self._plan
        crc, stated = compute_crc32(records), records["crc32"]
        self._list(
            "crc32",
            first,
            crc != stated,
            lambda i: f"CRC32 {crc[i]:08x}, the record says {stated[i]:08x}",
        )
        ids = self._ids[first : first + len(records)]
        ids[:] = records["sample_id"]
        before = self._ids[first - 1 : first] if first else ids[:1]
        unsorted = ids < np.concatenate([before, ids[:-1]])
        self._list(
            "order", first, unsorted, lambda i: f"sample_id {ids[i]} is below the one before it"
        )
        length = records["text_length"]
        self._list(
            "text_length",
            first,
            (length < 1) | (length > plan.most_text),
            lambda i: f"text_length {length[i]}, must be in 1..{plan.most_text}",
        )
        text = np.ascontiguousarray(records["text"])
        beyond = np.arange(MAX_SHARD_TEXT, dtype=np.uint16) >= length[:, None]
        self._list(
            "padding",
            first,
            ((text != 0) & beyond).any(axis=1),
            lambda i: f"ids other than 0 beyond its text_length {length[i]}",
        )
        self._list_values("text_id", "text", text, plan.vocab_size, first)
        for image in range(len(plan.codes_per_side)):
            name = f"image{image}"
            self._list_values("code", name, records[name], plan.num_codes, first)

    def _list_values(
        self, check: str, name: str, values: NDArray[np.uint16], limit: int, first: int
    ) -> None:
        # One maximum over all is several times as fast as one a record, and nearly always enough.
        if int(values.max()) < limit:
            return
        largest = values.reshape(len(values), -1).max(axis=1)
        self._list(
            check,
            first,
            largest >= limit,
            lambda i: f"{name} holds {largest[i]}, its tokenizer has 0..{limit - 1}",
        )

    def _list(
        self, check: str, first: int, bad: NDArray[np.bool_], describe: Callable[[int], str]
    ) -> None:
        """Note the records that are marked in ``bad``, up to the limit."""
        rows = np.flatnonzero(bad)
        room = max(0, MAX_LISTED - self._counts[check])
        self._counts[check] += len(rows)
        for row in rows[:room].tolist():
            self.note(check, describe(row), first + row)


def _fill(target: memoryview, file: Any) -> bool:
    """Read until ``target`` is full; False at an early end of the file."""
    at = 0
    # One read of an unbuffered file may give less than was asked for.
    while at < len(target) and (count := file.readinto(target[at:])):
        at += count
    return at == len(target)
