"""Which records are for training and which for validation: by their ids, in every data set alike.

A record's ``sample_id`` is a hash of its source id, and the records of a shard are sorted by it, so
that the validation part of any fraction is the beginning of each shard.  A pair that occurs twice,
also in two data sets of a mixture, is on one side; records keep their side when others are added;
and the shuffle's seed plays no role.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_cogview.configs.data import SPLIT_STEPS

Counts = NDArray[np.int64]


def threshold(ten_thousandths: int) -> int:
    """Ids below are validation records at this fraction; up to 2**64."""
    return (ten_thousandths << 64) // 10_000


def split_counts(sample_ids: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """Records of one shard below the threshold of each of ``SPLIT_STEPS``, uint32 ``[steps]``.

    ``sample_ids`` are sorted.
    """
    # The last threshold is 2**64, which uint64 cannot hold.
    limits = np.array([threshold(step) for step in SPLIT_STEPS[:-1]], dtype=np.uint64)
    below = np.searchsorted(sample_ids, limits, side="left")
    return np.append(below, len(sample_ids)).astype(np.uint32)


def split_row(fraction: float) -> int:
    """Row of the table of split counts for a fraction that ``DataConfig`` admits."""
    return SPLIT_STEPS.index(round(fraction * 10_000))


class Split:
    """Disjoint, exhaustive numbering of all records in two parts."""

    def __init__(self, records: ArrayLike, held_out: ArrayLike) -> None:
        """Take the number of records of each shard, and how many of them, from its beginning, are
        validation."""
        records_K = np.asarray(records, dtype=np.int64).reshape(-1)
        held_out_K = np.asarray(held_out, dtype=np.int64).reshape(-1)
        starts_K = np.cumsum(records_K) - records_K
        self._validation = _Part(starts_K, held_out_K)
        self._train = _Part(starts_K + held_out_K, records_K - held_out_K)

    @property
    def num_train(self) -> int:
        """Records of the training part."""
        return self._train.size

    @property
    def num_validation(self) -> int:
        """Records of the validation part."""
        return self._validation.size

    def train(self, index: ArrayLike) -> Counts:
        """Record numbers of the training part's members ``index``, ``0..num_train - 1``."""
        return self._train.records(np.asarray(index, dtype=np.int64))

    def validation(self, index: ArrayLike) -> Counts:
        """Record numbers of the validation part's members ``index``."""
        return self._validation.records(np.asarray(index, dtype=np.int64))


class _Part:
    """Runs of consecutive records, one a shard, numbered through."""

    def __init__(self, first_K: Counts, count_K: Counts) -> None:
        self._ends = np.cumsum(count_K)
        # Record number minus index within the part, constant over a run.
        self._shift = first_K - (self._ends - count_K)
        self.size = int(self._ends[-1]) if len(self._ends) else 0

    def records(self, index: Counts) -> Counts:
        if index.size and (int(index.min()) < 0 or int(index.max()) >= self.size):
            raise IndexError(f"index outside 0..{self.size - 1}")
        if not index.size:
            return index
        run = np.searchsorted(self._ends, index, side="right")
        return np.asarray(index + self._shift[run])
