"""Which records are for training and which for validation, by record number alone.

In every block of 1,000 consecutive records a keyed permutation ranks the records; the first ranks
are validation.  A record keeps its side when others are appended, and the split does not depend on
the shuffle's seed.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_cogview.configs.errors import ConfigError
from megatron_cogview.data.permutation import derive_key, permute

BLOCK = 1000
SPLIT_KEY = 0x5EED_5917


class Split:
    """Disjoint, exhaustive numbering of the records ``0..num_records - 1`` in two parts.

    With a fraction above 0 and two records or more, both parts have a record: record 0 is always
    validation and record 1 always training.  (A single record is for training.)
    """

    def __init__(self, num_records: int, fraction: float) -> None:
        """Work out the parts' sizes; ``fraction`` in [0, 1) goes to validation.

        Raises:
            ConfigError: ``fraction`` is out of range.
        """
        if not 0.0 <= fraction < 1.0:
            raise ConfigError(f"data.validation_fraction = {fraction}: must be in [0, 1)")
        self.num_records = num_records
        per_block = min(max(1, round(BLOCK * fraction)), BLOCK - 1)
        self._per_block = per_block if fraction > 0 and num_records > 1 else 0
        full = num_records // BLOCK
        tail = np.arange(full * BLOCK, num_records)
        # Fewer than 1,000 records: listed, because an unfinished block lacks some of its ranks.
        held_out = self.is_validation(tail)
        self._tails = {True: tail[held_out], False: tail[~held_out]}
        self._full = {True: full * self._per_block, False: full * (BLOCK - self._per_block)}

    @property
    def num_train(self) -> int:
        """Records of the training part."""
        return self._full[False] + len(self._tails[False])

    @property
    def num_validation(self) -> int:
        """Records of the validation part."""
        return self._full[True] + len(self._tails[True])

    def train(self, index: ArrayLike) -> NDArray[np.int64]:
        """Record numbers of the training part's members ``index``, ``0..num_train - 1``."""
        return self._records(np.asarray(index, dtype=np.int64), False)

    def validation(self, index: ArrayLike) -> NDArray[np.int64]:
        """Record numbers of the validation part's members ``index``."""
        return self._records(np.asarray(index, dtype=np.int64), True)

    def is_validation(self, records: ArrayLike) -> NDArray[np.bool_]:
        """Side of each record."""
        numbers = np.asarray(records, dtype=np.int64)
        if not numbers.size:
            return np.zeros(numbers.shape, dtype=np.bool_)
        blocks, inverse = np.unique(numbers // BLOCK, return_inverse=True)
        ranks_KR = np.argsort(self._offsets(blocks[:, None], np.arange(BLOCK)[None]), axis=1)
        rank = ranks_KR[inverse.reshape(numbers.shape), numbers % BLOCK]
        return np.asarray(rank < self._per_block)

    def _records(self, index: NDArray[np.int64], held_out: bool) -> NDArray[np.int64]:
        full, tail = self._full[held_out], self._tails[held_out]
        if index.size and (int(index.min()) < 0 or int(index.max()) >= full + len(tail)):
            raise IndexError(f"index outside 0..{full + len(tail) - 1}")
        per_block = self._per_block if held_out else BLOCK - self._per_block
        first_rank = 0 if held_out else self._per_block
        result = np.empty(index.shape, dtype=np.int64)
        inside = index < full
        if inside.any():
            block, within = index[inside] // per_block, index[inside] % per_block
            result[inside] = block * BLOCK + self._offsets(block, first_rank + within)
        result[~inside] = tail[index[~inside] - full]
        return result

    @staticmethod
    def _offsets(block: NDArray[np.int64], rank: NDArray[np.int64]) -> NDArray[np.int64]:
        """Offset within its block of the record with a rank (0..999)."""
        block, rank = np.broadcast_arrays(block, rank)
        keys = block.astype(np.uint64) + derive_key(SPLIT_KEY)
        offset = permute(rank, BLOCK, keys)
        if (block == 0).any():
            # Block 0: rank 0 is record 0 and rank 999 is record 1, so that both parts exist
            # however few records there are; the other 998 are permuted among themselves.
            inner = 2 + permute(np.clip(rank - 1, 0, BLOCK - 3), BLOCK - 2, keys)
            fixed = np.where(rank == 0, 0, np.where(rank == BLOCK - 1, 1, inner))
            offset = np.where(block == 0, fixed, offset)
        return offset
