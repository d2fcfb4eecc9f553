"""From a count of consumed samples to record numbers; the whole state of reading is that count.

Every epoch is a new keyed permutation of the training part.  The order of the global stream does
not depend on the number of ranks or on the micro-batch.
"""

import numpy as np
from numpy.typing import NDArray

from megatron_cogview.configs.errors import ConfigError, DataError
from megatron_cogview.data.permutation import derive_key, permute
from megatron_cogview.data.split import Split


class Sampler:
    """Order of the training records for one seed."""

    def __init__(self, split: Split, seed: int) -> None:
        """Take the training part of ``split``.

        Raises:
            DataError: it is empty.
        """
        if split.num_train < 1:
            raise DataError("no training records: the shards are empty")
        self.split = split
        self.seed = seed

    def records(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Record numbers of global sample numbers (0 = the first sample of the run)."""
        epoch, index = np.divmod(samples, self.split.num_train)
        order = np.empty(samples.shape, dtype=np.int64)
        for value in np.unique(epoch):
            chosen = epoch == value
            key = derive_key(self.seed, int(value))
            order[chosen] = permute(index[chosen], self.split.num_train, key)
        return self.split.train(order)


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
