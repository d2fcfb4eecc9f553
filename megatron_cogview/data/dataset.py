"""Shard records as model sequences: ids, positions and loss weights in NumPy.

Joins a :class:`ShardSet` with a :class:`SequenceLayout` and checks that they belong together.
Knows nothing of order, ranks or tensors.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_cogview.configs.errors import ConfigError, DataError
from megatron_cogview.data.shards import ShardSet
from megatron_cogview.tokenization.layout import SequenceLayout


@dataclass(frozen=True, slots=True)
class Sequences:
    """N sequences shifted by one: inputs are ids ``0..L-2``, labels ids ``1..L-1`` (P-SEQ-3)."""

    tokens_NS: NDArray[np.int64]
    """Input ids."""
    labels_NS: NDArray[np.int64]
    """The next id of each input."""
    positions_NS: NDArray[np.int64]
    """Positions of the inputs."""
    loss_weights_NS: NDArray[np.float32]
    """Weight of each label, 0 on ``[PAD]``."""
    text_region_N: NDArray[np.int64]
    """Inputs before the first image code."""


class TokenDataset:
    """Records by number, as sequences of one layout."""

    def __init__(
        self,
        shards: ShardSet,
        layout: SequenceLayout,
        text_weight: float = 1.0,
        image_weight: float = 1.0,
    ) -> None:
        """Check that every record fits the layout and its vocabulary.

        Raises:
            ConfigError: other grids, more text, or larger tokenizers than the layout takes.
            DataError: the manifest contradicts itself.
        """
        self.shards = shards
        self.layout = layout
        self.weights = (text_weight, image_weight)
        sequence, vocab = layout.sequence, layout.vocab
        if shards.codes_per_side != sequence.codes_per_side:
            raise ConfigError(
                f"sequence.codes_per_side = {sequence.codes_per_side}: the shards in "
                f"{shards.folder} hold {shards.codes_per_side}"
            )
        if shards.longest_text > sequence.text_budget:
            raise ConfigError(
                f"sequence.text_budget = {sequence.text_budget}: the shards in {shards.folder} "
                f"hold texts of {shards.longest_text} ids; tokenise again with this budget"
            )
        tokenizers = shards.manifest["tokenizers"]
        for name, limit, there in (
            ("num_text_ids", vocab.num_text_ids, tokenizers["text"]["vocab_size"]),
            ("num_image_codes", vocab.num_image_codes, tokenizers["image"]["num_codes"]),
        ):
            if there > limit:
                raise ConfigError(
                    f"model.vocab.{name} = {limit}: the shards in {shards.folder} were made with "
                    f"a tokenizer of {there}"
                )
        if len(shards) != shards.manifest["records"]:
            raise DataError(f"{shards.folder}: the manifest's record counts do not add up")

    def __len__(self) -> int:
        """Number of records."""
        return len(self.shards)

    def sequences(self, records: NDArray[np.int64]) -> Sequences:
        """Sequences of the record numbers ``records``, in that order."""
        rows = self.shards.read(records)
        grids = [rows[f"image{i}"] for i in range(len(self.shards.codes_per_side))]
        ids_NL = self.layout.build_batch(rows["text"], rows["text_length"], *grids)
        labels_NS = ids_NL[:, 1:]
        return Sequences(
            tokens_NS=ids_NL[:, :-1],
            labels_NS=labels_NS,
            positions_NS=self.layout.positions(ids_NL[:, :-1]),
            loss_weights_NS=self.layout.loss_weights(labels_NS, *self.weights),
            text_region_N=self.layout.text_region(ids_NL[:, :-1]),
        )
