"""Batches of one data-parallel rank by step number.

Stateless: the batches of a step depend on the configuration and the step alone, so resuming is
calling with the step.  Knows the order and the split; the content comes from the dataset.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_cogview.configs.data import DataConfig
from megatron_cogview.configs.errors import ConfigError
from megatron_cogview.configs.training import TrainingConfig
from megatron_cogview.data.batch import Batch, make_batch
from megatron_cogview.data.dataset import TokenDataset
from megatron_cogview.data.sampler import Sampler, rank_samples
from megatron_cogview.data.shards import ShardSet
from megatron_cogview.data.split import Split
from megatron_cogview.tokenization.layout import SequenceLayout


class TrainLoader:
    """Training and validation micro-batches; all ranks of one model replica ask alike."""

    def __init__(
        self,
        shards: ShardSet,
        layout: SequenceLayout,
        training: TrainingConfig,
        data: DataConfig,
        data_rank: int,
        data_size: int,
    ) -> None:
        """Take rank ``data_rank`` of ``data_size`` model replicas.

        Raises:
            ConfigError: batch sizes do not divide, or the shards do not fit the layout.
            DataError: no training records.
        """
        self.training = training
        self.data_rank, self.data_size = data_rank, data_size
        self.num_micro_batches = training.num_micro_batches(data_size)
        weights = (training.text_weight, training.image_weight)
        self.dataset = TokenDataset(shards, layout, *weights)
        self.split = Split(len(shards), data.validation_fraction)
        self.sampler = Sampler(self.split, data.seed)

    @property
    def num_validation_batches(self) -> int:
        """Global batches that cover the validation part once."""
        return -(-self.split.num_validation // self.training.global_batch_size)

    def micro_batches(self, step: int) -> list[Batch]:
        """All micro-batches of this rank for ``step`` (0 = the first), in order."""
        samples = self._samples(step)
        return self._batches(self.sampler.records(samples), samples)

    def validation(self, batch_index: int) -> list[Batch]:
        """This rank's micro-batches of one validation batch; indices past the end start again.

        The last batch is filled up with records whose loss weights are all 0, so that shapes stay
        the same and every record counts once.

        Raises:
            ConfigError: ``data.validation_fraction`` is 0, or the data has one record only.
        """
        if not self.split.num_validation:
            raise ConfigError(
                "data.validation_fraction: no validation records; raise it or set "
                "training.validate_every = 0"
            )
        samples = self._samples(batch_index % self.num_validation_batches)
        records = self.split.validation(samples % self.split.num_validation)
        return self._batches(records, samples, samples < self.split.num_validation)

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
    """Open the folder ``data.shards`` and make its loader.

    Raises:
        ConfigError: ``data.shards`` is not set.
        DataError: the folder holds no intact shards.
    """
    if not data.shards:
        raise ConfigError("data.shards: not set; name the folder of tools/tokenize_dataset.py")
    shards = ShardSet(Path(data.shards), verify_crc=data.verify_crc)
    return TrainLoader(shards, layout, training, data, data_rank, data_size)
