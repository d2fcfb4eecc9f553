"""The toy run in a forked world, with its phase visible from outside, and what it leaves behind."""

import json
import mmap
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_cogview.checkpoint import commit
from megatron_cogview.checkpoint.saver import Saver
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.testing.train_faults.world import World
from megatron_cogview.training.checkpoints import CHECKPOINTS
from megatron_cogview.training.metrics import read_metrics
from megatron_cogview.training.throughput import MEASURED

PHASES = ("start", "load", "data", "forward", "gradients", "update", "validate", "save")
LONGEST_RUN_S = 240.0

LAYOUTS: tuple[tuple[int, dict[str, Any]], ...] = (
    (1, {}),
    (2, {"distributed_optimizer": True}),
    (2, {"pipeline": 2}),
    (2, {"tensor": 2, "sequence": True}),
    (2, {}),
    (2, {"pipeline": 2, "virtual_pipeline": 1, "recompute": "full"}),
)
"""Ranks, and how they are used."""

_CELL = struct.Struct("qqq")


class Blackboard:
    """Where each rank writes its step and phase, in memory that parent and children share."""

    def __init__(self, size: int) -> None:
        self._memory = mmap.mmap(-1, size * _CELL.size)

    def write(self, rank: int, step: int, phase: str) -> None:
        """Called by a rank."""
        mark = self.committed(rank)
        _CELL.pack_into(self._memory, rank * _CELL.size, step, PHASES.index(phase), mark)

    def read(self, rank: int) -> tuple[int, str]:
        """Called by the campaign."""
        step, phase, _ = _CELL.unpack_from(self._memory, rank * _CELL.size)
        return step, PHASES[phase]

    def committed(self, rank: int = 0) -> int:
        """Step of the newest checkpoint that ``rank`` was told is there."""
        return int(_CELL.unpack_from(self._memory, rank * _CELL.size)[2])

    def mark(self, rank: int, step: int) -> None:
        """Called by a rank that was told so."""
        at, phase, _ = _CELL.unpack_from(self._memory, rank * _CELL.size)
        _CELL.pack_into(self._memory, rank * _CELL.size, at, phase, step)


class Run:
    """One start of a run; a context manager that leaves no process behind.

    Args:
        config: the run.
        size: ranks.
        hurt: called by each rank before it begins, to arrange for what shall happen to it.
    """

    def __init__(
        self,
        config: RunConfig,
        size: int,
        hurt: Callable[[int, Blackboard], None] | None = None,
    ) -> None:
        self.board = Blackboard(size)
        self.folder = Path(config.training.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = self.folder / "ranks.log"
        board = self.board

        def work(rank: int) -> int:
            # Imported by the parent already; named here because only ranks may use them.
            from megatron_cogview.tasks import pretrain
            from megatron_cogview.training.watchdog import Watchdog

            beat, commit_saved = Watchdog.beat, Saver.commit

            def marked(self: Saver) -> Path | None:
                saved = commit_saved(self)
                if saved is not None:
                    board.mark(rank, int(saved.name.removeprefix("step_")))
                return saved

            Saver.commit = marked  # type: ignore[method-assign]

            def noted(self: Watchdog, step: int, phase: str) -> None:
                board.write(rank, step, phase)
                beat(self, step, phase)

            Watchdog.beat = noted  # type: ignore[method-assign]
            board.write(rank, 0, "load")
            if hurt is not None:
                hurt(rank, board)
            return pretrain.run(config)

        self.world = World(size, work, self.log)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: Any) -> None:
        self.world.__exit__(*error)

    def to_the_end(self) -> None:
        """Wait for a run that nothing is done to.

        Raises:
            RuntimeError: it did not end well.
        """
        ended = self.world.wait(LONGEST_RUN_S)
        codes = self.world.codes()
        if not ended or set(codes) != {0}:
            raise RuntimeError(f"a run that was left alone ended with {codes}: {self.tail()}")

    def wait_for(self, rank: int, step: int, phase: str) -> bool:
        """Until ``rank`` is in ``phase`` of ``step`` or later; False when the run ended first."""

        def reached() -> bool:
            at, where = self.board.read(rank)
            return at > step or (at == step and PHASES.index(where) >= PHASES.index(phase))

        return self.world.wait(LONGEST_RUN_S, reached)

    def tail(self) -> str:
        """The last the ranks said."""
        return self.log.read_text(errors="replace")[-3000:] if self.log.is_file() else ""


def committed(folder: Path) -> int:
    """Step of the newest checkpoint whose manifest is there; 0 without one."""
    found = sorted((folder / CHECKPOINTS).glob(f"step_*/{commit.MANIFEST}"))
    steps = [path.parent.name for path in found if path.parent.name.count(".") == 0]
    return max((int(name.removeprefix("step_")) for name in steps), default=0)


def outcome(folder: Path) -> dict[str, Any]:
    """Everything a finished run must have in common with another of the same seed: weights,
    optimizer and the loop's memory, byte for byte, and every number that is not a time."""
    root = folder / CHECKPOINTS
    newest = root / commit.checkpoint_name(committed(folder))
    manifest = commit.verify(newest)
    rows = [
        {name: value for name, value in row.items() if name not in MEASURED}
        for row in read_metrics(folder / "metrics.jsonl")
    ]
    return {
        "step": manifest["step"],
        "files": {name: about["sha256"] for name, about in manifest["files"].items()},
        "bytes": {name: about["bytes"] for name, about in manifest["files"].items()},
        "progress": manifest["state"]["progress"],
        "metrics": json.loads(json.dumps(rows)),
    }


def placed(config: RunConfig, output: Path) -> RunConfig:
    """The same run in another folder."""
    return replace(config, training=replace(config.training, output=str(output)))
