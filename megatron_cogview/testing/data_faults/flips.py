"""Flip single bits and cut files short; ``verify`` must notice, and no reader may get wrong data.

Damage is done in place on a small set that the campaign makes for itself, and undone.
"""

from pathlib import Path
from typing import Any

import numpy as np

from megatron_cogview.configs.errors import DataError
from megatron_cogview.data.shard_set import ShardSet
from megatron_cogview.data.shards import MANIFEST
from megatron_cogview.data.token_folder import LOCKS
from megatron_cogview.data.verify import verify
from megatron_cogview.testing.data_faults.small_set import random_records, write_set

FRACTION = 0.1
"""Validation part that a reader asks for."""
SHARD_STEP, TABLE_STEP = 4096, 64
"""Distance of the lengths to which shards, and the manifest and split table, are cut."""


class _Damaged:
    """An intact set, and what a reader gets from it."""

    def __init__(self, folder: Path, shards: int, records_per_shard: int) -> None:
        self.folder = folder / "tokens"
        write_set(self.folder, [random_records(records_per_shard, seed=k) for k in range(shards)])
        self.files = {
            path.name: path.read_bytes()
            for path in sorted(self.folder.iterdir())
            if path.name != LOCKS
        }
        self._expected = self._contents()
        if findings := verify(self.folder).findings:
            raise RuntimeError(f"the intact set is not sound: {findings[0]}")

    def put(self, name: str, at: int, data: bytes) -> None:
        """Write bytes in place."""
        with open(self.folder / name, "r+b", buffering=0) as file:
            file.seek(at)
            file.write(data)

    def detected_by(self, quick: bool = False) -> list[str]:
        """Checks of ``verify`` that fail."""
        return sorted({finding.check for finding in verify(self.folder, quick=quick).findings})

    def reader_gets(self) -> str:
        """``refused``, ``the original`` or, never, ``wrong data``."""
        try:
            same = self._contents() == self._expected
        except DataError:
            return "refused"
        return "the original" if same else "wrong data"

    def _contents(self) -> tuple[bytes, bytes, bytes]:
        """All records, and which of them are for training and validation."""
        shards = ShardSet(self.folder)
        split = shards.split(FRACTION)
        train = split.train(np.arange(split.num_train))
        validation = split.validation(np.arange(split.num_validation))
        records = shards.read(np.arange(len(shards)))
        return records.tobytes(), train.tobytes(), validation.tobytes()


class FlipCampaign:
    """One random bit a trial."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        """Make the set in ``folder``."""
        self._set = _Damaged(folder, shards=3, records_per_shard=40)
        self._seed = seed
        self._names = list(self._set.files)
        self._sizes = np.array([len(data) for data in self._set.files.values()])

    def trial(self, number: int) -> dict[str, Any]:
        """Flip, verify, read, undo.

        Even trials draw from all bits alike, which are nearly all in shards; odd ones draw the
        file first.
        """
        rng = np.random.default_rng([self._seed, number])
        shares = self._sizes / self._sizes.sum()
        name = self._names[rng.choice(len(self._names), p=None if number % 2 else shares)]
        original = self._set.files[name]
        bit = int(rng.integers(8 * len(original)))
        at = bit // 8
        self._set.put(name, at, bytes([original[at] ^ 1 << bit % 8]))
        try:
            detected_by, reader = self._set.detected_by(), self._set.reader_gets()
        finally:
            self._set.put(name, at, original[at : at + 1])
        return {
            "trial": number,
            "kind": "flip",
            "file": name,
            "bit": bit,
            "detected_by": detected_by,
            "reader": reader,
            "ok": bool(detected_by) and reader != "wrong data",
        }


class TruncationCampaign:
    """Every length in steps, and one byte less than whole, of all files that readers use."""

    def __init__(self, folder: Path, records_per_shard: int = 600) -> None:
        """Make the set in ``folder``."""
        self._set = _Damaged(folder, 3, records_per_shard)
        self._cases: list[tuple[str, int]] = []
        for name, data in self._set.files.items():
            if name.startswith("shard-") and name.endswith(".npy"):
                step = SHARD_STEP
            elif name == MANIFEST or name.startswith("split-"):
                step = TABLE_STEP
            else:
                continue
            lengths = {*range(0, len(data), step), len(data) - 1}
            self._cases += [(name, length) for length in sorted(lengths)]

    @property
    def trials(self) -> int:
        """Number of cases."""
        return len(self._cases)

    def trial(self, number: int) -> dict[str, Any]:
        """Cut, open, undo; a damaged split table is to be noticed when the split is asked for."""
        name, length = self._cases[number]
        path = self._set.folder / name
        with open(path, "r+b", buffering=0) as file:
            file.truncate(length)
        try:
            noticed_at = self._noticed_at()
            detected_by = self._set.detected_by(quick=True)
        finally:
            self._set.put(name, length, self._set.files[name][length:])
        return {
            "trial": number,
            "kind": "truncation",
            "file": name,
            "length": length,
            "noticed_at": noticed_at,
            "detected_by": detected_by,
            "ok": noticed_at == ("split" if name.startswith("split-") else "open")
            and bool(detected_by),
        }

    def _noticed_at(self) -> str:
        try:
            shards = ShardSet(self._set.folder)
        except DataError:
            return "open"
        try:
            shards.split(FRACTION)
        except DataError:
            return "split"
        return "never"
