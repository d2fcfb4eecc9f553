"""Batches of one data-parallel rank by step number.

Stateless: the batches of a step depend on the configuration and the step alone, so resuming is
calling with the step.  Knows the order and the split; the content comes from the dataset.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_cogview.configs.data import DataConfig
from megatron_cogview.configs.errors import ConfigError
from megatron_cogview.configs.training import TrainingConfig
from megatron_cogview.data.batch import Batch, make_batch
from megatron_cogview.data.dataset import TokenDataset
from megatron_cogview.data.sampler import Sampler, rank_samples
from megatron_cogview.data.shard_set import ShardSet
from megatron_cogview.tokenization.layout import SequenceLayout


class TrainLoader:
    """Training and validation micro-batches; all ranks of one model replica ask alike."""

    def __init__(
        self,
        sets: Sequence[ShardSet],
        layout: SequenceLayout,
        training: TrainingConfig,
        data: DataConfig,
        data_rank: int,
        data_size: int,
    ) -> None:
        """Take rank ``data_rank`` of ``data_size`` model replicas.

        Raises:
            ConfigError: batch sizes do not divide, or the shards do not fit the layout.
            DataError: no training records, or sets that do not go together.
        """
        self.training = training
        self.data_rank, self.data_size = data_rank, data_size
        self.num_micro_batches = training.num_micro_batches(data_size)
        weights = (training.text_weight, training.image_weight)
        self.dataset = TokenDataset(sets, layout, *weights)
        splits = [shards.split(data.validation_fraction) for shards in sets]
        self.sampler = Sampler(splits, data.seed, data.weights)
        self._ahead = data.prefetch
        self._pending: dict[int, Future[list[Batch]]] = {}
        # One thread: what is made ahead must not compete with the model for cores.
        self._thread = ThreadPoolExecutor(1, "batches") if data.prefetch else None

    @property
    def num_validation_batches(self) -> int:
        """Global batches that cover the validation part once."""
        return -(-self.sampler.num_validation // self.training.global_batch_size)

    def micro_batches(self, step: int) -> list[Batch]:
        """All micro-batches of this rank for ``step`` (0 = the first), in order.

        The steps after it are made ahead; what is given does not depend on that.
        """
        if self._thread is None:
            return self._train(step)
        wanted = range(step, step + 1 + self._ahead)
        for stale in self._pending.keys() - set(wanted):
            self._pending.pop(stale).cancel()
        for each in wanted:
            if each not in self._pending:
                self._pending[each] = self._thread.submit(self._train, each)
        return self._pending.pop(step).result()

    def validation(self, batch_index: int) -> list[Batch]:
        """This rank's micro-batches of one validation batch; indices past the end start again.

        The last batch is filled up with records whose loss weights are all 0, so that shapes stay
        the same and every record counts once.

        Raises:
            ConfigError: ``data.validation_fraction`` is 0, or the data has one record only.
        """
        if not self.sampler.num_validation:
            raise ConfigError(
                "data.validation_fraction: no validation records; raise it or set "
                "training.validate_every = 0"
            )
        samples = self._samples(batch_index % self.num_validation_batches)
        records = self.sampler.validation(samples % self.sampler.num_validation)
        return self._batches(records, samples, samples < self.sampler.num_validation)

    def _train(self, step: int) -> list[Batch]:
        samples = self._samples(step)
        return self._batches(self.sampler.records(samples), samples)

    def _samples(self, step: int) -> NDArray[np.int64]:
        size = self.training.global_batch_size
        return rank_samples(step * size, size, self.data_rank, self.data_size)

    def _batches(
        self,
        records: NDArray[np.int64],
        samples: NDArray[np.int64],
        counted: NDArray[np.bool_] | None = None,
    ) -> list[Batch]:
        size = self.training.micro_batch_size
        batches = []
        for at in range(0, len(records), size):
            part = slice(at, at + size)
            sequences = self.dataset.sequences(records[part])
            if counted is not None:
                sequences.loss_weights_NS[~counted[part]] = 0.0
            batches.append(make_batch(sequences, samples[part]))
        return batches


def build_loader(
    layout: SequenceLayout,
    training: TrainingConfig,
    data: DataConfig,
    data_rank: int = 0,
    data_size: int = 1,
) -> TrainLoader:
    """Open the folders ``data.shards`` and make their loader.

    Raises:
        ConfigError: ``data.shards`` is not set.
        DataError: a folder holds no intact shards.
    """
    if not data.shards:
        raise ConfigError("data.shards: not set; name the folders of tools/tokenize_dataset.py")
    sets = [ShardSet(Path(folder), verify_crc=data.verify_crc) for folder in data.shards]
    return TrainLoader(sets, layout, training, data, data_rank, data_size)
