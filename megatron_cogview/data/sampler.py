"""From a count of consumed samples to record numbers; the whole state of reading is that count.

Every epoch of a data set is a new keyed permutation of its training part.  The order of the global
stream does not depend on the number of ranks or on the micro-batch.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_cogview.configs.errors import ConfigError, DataError
from megatron_cogview.data.mixture import Mixture
from megatron_cogview.data.permutation import derive_key, permute
from megatron_cogview.data.split import Split

Numbers = NDArray[np.int64]


class Sampler:
    """Order of the training records of one or several data sets, for one seed.

    Record numbers run through all sets, in their order.
    """

    def __init__(self, splits: Sequence[Split], seed: int, weights: Sequence[float] = ()) -> None:
        """Take the training parts of ``splits``; weights default to their sizes.

        Raises:
            DataError: a set that is to be drawn from has no training records.
        """
        self.splits = list(splits)
        self.seed = seed
        sizes = [split.num_train for split in self.splits]
        shares = list(weights) or [float(size) for size in sizes]
        empty = [k for k, size in enumerate(sizes) if size < 1 and (weights == () or shares[k] > 0)]
        if empty or not sizes:
            raise DataError(f"no training records in data set {empty[0] if empty else 0}")
        self._mixture = Mixture(shares, seed)
        totals = [split.num_train + split.num_validation for split in self.splits]
        self._offsets = np.cumsum([0, *totals])

    @property
    def num_validation(self) -> int:
        """Validation records of all sets."""
        return sum(split.num_validation for split in self.splits)

    def records(self, samples: Numbers) -> Numbers:
        """Record numbers of global sample numbers (0 = the first sample of the run)."""
        chosen, within = self._mixture.deal(samples)
        result = np.empty(samples.shape, dtype=np.int64)
        for number in np.unique(chosen).tolist():
            mask = chosen == number
            result[mask] = self._offsets[number] + self._ordered(number, within[mask])
        return result

    def validation(self, index: Numbers) -> Numbers:
        """Record numbers of the members ``index`` of the validation parts, set after set."""
        ends = np.cumsum([split.num_validation for split in self.splits])
        chosen = np.searchsorted(ends, index, side="right")
        result = np.empty(index.shape, dtype=np.int64)
        for number in np.unique(chosen).tolist():
            mask = chosen == number
            split = self.splits[number]
            within = index[mask] - (ends[number] - split.num_validation)
            result[mask] = self._offsets[number] + split.validation(within)
        return result

    def _ordered(self, number: int, samples: Numbers) -> Numbers:
        """Record numbers within one set of its sample numbers."""
        split = self.splits[number]
        epoch, index = np.divmod(samples, split.num_train)
        order = np.empty(samples.shape, dtype=np.int64)
        for value in np.unique(epoch):
            mask = epoch == value
            key = derive_key(self.seed, int(value), *([number] if number else []))
            order[mask] = permute(index[mask], split.num_train, key)
        return split.train(order)


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
