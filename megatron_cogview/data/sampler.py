"""From a count of consumed samples to record numbers; the whole state of reading is that count.

Every epoch of a data set is a new keyed permutation of its training part.  The order of the global
stream does not depend on the number of ranks or on the micro-batch.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_cogview.configs.errors import ConfigError, DataError
from megatron_cogview.data.mixture import Mixture
from megatron_cogview.data.permutation import derive_key, permute
from megatron_cogview.data.split import Split

Numbers = NDArray[np.int64]


class Sampler:
    """Order of the training records of one or several data sets, for one seed.

    Record numbers run through all sets, in their order.  Without weights the sets are one: an epoch
    is a permutation of all their training records.  With weights each set has epochs of its own.
    """

    def __init__(self, splits: Sequence[Split], seed: int, weights: Sequence[float] = ()) -> None:
        """Take the training parts of ``splits``.

        Raises:
            DataError: no training records, or none in a set that has a weight.
        """
        self.splits = list(splits)
        self.seed = seed
        sizes = [split.num_train for split in self.splits]
        for number, weight in enumerate(weights):
            if weight > 0 and sizes[number] < 1:
                raise DataError(f"no training records in data set {number}, which has a weight")
        if not sum(sizes):
            raise DataError("no training records: the shards are empty, or all are validation")
        self._mixture = Mixture(weights, seed) if weights else None
        totals = [split.num_train + split.num_validation for split in self.splits]
        self._offsets = np.cumsum([0, *totals])
        self._train_ends = np.cumsum(sizes)
        self._validation_ends = np.cumsum([split.num_validation for split in self.splits])

    @property
    def num_validation(self) -> int:
        """Validation records of all sets."""
        return int(self._validation_ends[-1])

    def records(self, samples: Numbers) -> Numbers:
        """Record numbers of global sample numbers (0 = the first sample of the run)."""
        if self._mixture is None:
            order = self._ordered(samples, int(self._train_ends[-1]))
            return self._numbers(order, self._train_ends, Split.train)
        chosen, within = self._mixture.deal(samples)
        result = np.empty(samples.shape, dtype=np.int64)
        for number in np.unique(chosen).tolist():
            mask, split = chosen == number, self.splits[number]
            order = self._ordered(within[mask], split.num_train, number)
            result[mask] = self._offsets[number] + split.train(order)
        return result

    def validation(self, index: Numbers) -> Numbers:
        """Record numbers of the members ``index`` of the validation parts, set after set."""
        return self._numbers(index, self._validation_ends, Split.validation)

    def _ordered(self, samples: Numbers, size: int, *key: int) -> Numbers:
        """Members ``0..size - 1`` in the order of their epochs."""
        epoch, index = np.divmod(samples, size)
        order = np.empty(samples.shape, dtype=np.int64)
        for value in np.unique(epoch).tolist():
            mask = epoch == value
            order[mask] = permute(index[mask], size, derive_key(self.seed, value, *key))
        return order

    def _numbers(
        self, index: Numbers, ends: Numbers, part: Callable[[Split, Numbers], Numbers]
    ) -> Numbers:
        """Record numbers of members of one part of all sets, numbered through."""
        chosen = np.searchsorted(ends, index, side="right")
        result = np.empty(index.shape, dtype=np.int64)
        for number in np.unique(chosen).tolist():
            mask = chosen == number
            first = int(ends[number - 1]) if number else 0
            result[mask] = self._offsets[number] + part(self.splits[number], index[mask] - first)
        return result


def rank_samples(
    consumed: int, global_batch_size: int, data_rank: int, data_size: int
) -> NDArray[np.int64]:
    """Global sample numbers of one data-parallel rank in the batch after ``consumed`` samples.

    Each rank has one contiguous slice, in rank order.

    Raises:
        ConfigError: the batch does not divide evenly over the ranks.
    """
    if global_batch_size % data_size:
        raise ConfigError(
            f"training.global_batch_size = {global_batch_size}: must be a multiple of the "
            f"data-parallel size {data_size}"
        )
    share = global_batch_size // data_size
    first = consumed + data_rank * share
    return np.arange(first, first + share, dtype=np.int64)
