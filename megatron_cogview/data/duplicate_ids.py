"""How many records of a data set share their ``sample_id`` with another one.

The ids of all shards go into a temporary file, 8 bytes a record (240 MB for 30 million), and are
compared one range of values after the other: memory does not grow with the number of records.
"""

import os
import tempfile
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

IDS_AT_ONCE = 4 << 20
"""Ids of one range; they are hashes, so that ranges of equal width hold about as many.

32 MB, and some copies of them: 115 MB were measured.
"""


class SampleIds:
    """Collects the ids of shards; a context manager."""

    def __init__(self, total: int, ids_at_once: int = IDS_AT_ONCE) -> None:
        """Make the temporary file, in ``TMPDIR``; it has no name and cannot be left behind.

        ``total``: about how many ids there will be.
        """
        self._ranges = max(1, -(-total // ids_at_once))
        limits = [(k << 64) // self._ranges for k in range(1, self._ranges)]
        self._limits = np.array(limits, dtype=np.uint64)
        # Where each range begins and ends within each shard, counted over the file.
        self._cuts: list[NDArray[np.int64]] = []
        self._end = 0
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> "SampleIds":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, sample_ids: NDArray[np.uint64]) -> None:
        """Take the sorted ids of one shard, uint64 ``[n]``."""
        inner = np.searchsorted(sample_ids, self._limits)
        self._cuts.append(self._end + np.concatenate([[0], inner, [len(sample_ids)]]))
        self._file.seek(8 * self._end)
        data = np.ascontiguousarray(sample_ids).view(np.uint8).data
        while data:
            data = data[self._file.write(data) :]
        self._end += len(sample_ids)

    def count_duplicates(self) -> int:
        """Records whose id an earlier record has, over all shards."""
        duplicates = 0
        for k in range(self._ranges):
            pieces = [self._read(int(cut[k]), int(cut[k + 1])) for cut in self._cuts]
            if pieces:
                ids = np.concatenate(pieces)
                ids.sort()
                duplicates += int(np.count_nonzero(ids[1:] == ids[:-1]))
        return duplicates

    def _read(self, start: int, end: int) -> NDArray[np.uint64]:
        data = os.pread(self._file.fileno(), 8 * (end - start), 8 * start)
        return np.frombuffer(data, dtype=np.uint64)
