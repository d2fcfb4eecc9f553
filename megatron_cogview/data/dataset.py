"""Shard records as model sequences: ids, positions and loss weights in NumPy.

Joins one or several :class:`ShardSet` with a :class:`SequenceLayout` and checks that they belong
together.  Knows nothing of order, ranks or tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_cogview.configs.errors import ConfigError, DataError
from megatron_cogview.data.shard_set import ShardSet
from megatron_cogview.data.shards import Records
from megatron_cogview.storage.digest import sha256_bytes
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
    """Records by number, as sequences of one layout.

    Record numbers run through all shard sets, in their order.
    """

    def __init__(
        self,
        sets: Sequence[ShardSet],
        layout: SequenceLayout,
        text_weight: float = 1.0,
        image_weight: float = 1.0,
    ) -> None:
        """Check that every record fits the layout and its vocabulary.

        Raises:
            ConfigError: other grids, more text, or larger tokenizers than the layout takes.
            DataError: the sets were made with different tokenizers.
        """
        self.sets = list(sets)
        self.layout = layout
        self.weights = (text_weight, image_weight)
        for shards in self.sets:
            _check_fits(shards, layout)
            _check_same_tokenizers(self.sets[0], shards)
        self._ends = np.cumsum([len(shards) for shards in self.sets])

    def __len__(self) -> int:
        """Number of records."""
        return int(self._ends[-1])

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the hashes of all shards in order: which records have which numbers."""
        hashes = [entry["sha256"] for s in self.sets for entry in s.manifest["shards"]]
        return sha256_bytes("\n".join(hashes).encode("ascii"))

    def sequences(self, records: NDArray[np.int64]) -> Sequences:
        """Sequences of the record numbers ``records``, in that order."""
        rows = self._rows(records)
        grids = [rows[f"image{i}"] for i in range(len(self.sets[0].codes_per_side))]
        ids_NL = self.layout.build_batch(rows["text"], rows["text_length"], *grids)
        labels_NS = ids_NL[:, 1:]
        return Sequences(
            tokens_NS=ids_NL[:, :-1],
            labels_NS=labels_NS,
            positions_NS=self.layout.positions(ids_NL[:, :-1]),
            loss_weights_NS=self.layout.loss_weights(labels_NS, *self.weights),
            text_region_N=self.layout.text_region(ids_NL[:, :-1]),
        )

    def _rows(self, records: NDArray[np.int64]) -> Records:
        if len(self.sets) == 1:
            return self.sets[0].read(records)
        chosen = np.searchsorted(self._ends, records, side="right")
        rows = np.empty(records.shape, dtype=self.sets[0].dtype)
        for number in np.unique(chosen).tolist():
            shards, mask = self.sets[number], chosen == number
            rows[mask] = shards.read(records[mask] - (self._ends[number] - len(shards)))
        return rows


def _check_fits(shards: ShardSet, layout: SequenceLayout) -> None:
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


def _check_same_tokenizers(first: ShardSet, other: ShardSet) -> None:
    for kind in ("text", "image"):
        there, here = (s.manifest["tokenizers"][kind]["fingerprint"] for s in (first, other))
        if there != here:
            raise DataError(
                f"data.shards: {first.folder} was made with the {kind} tokenizer {there} and "
                f"{other.folder} with {here}; a mixture needs the same one"
            )
