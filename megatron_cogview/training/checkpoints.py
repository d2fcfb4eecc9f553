"""A run's checkpoints: what they hold besides tensors, when one is due, and the way back to one."""

import dataclasses
import logging
import math
from pathlib import Path

from megatron_cogview.checkpoint import commit
from megatron_cogview.checkpoint.identity import check_belongs
from megatron_cogview.checkpoint.saver import Saver, Status
from megatron_cogview.configs.errors import CheckpointError, TrainingError
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.engines.base import Engine, TrainState
from megatron_cogview.parallel import agreement
from megatron_cogview.parallel.topology import Topology
from megatron_cogview.training.guards import Progress

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""Their folder inside the run's."""

CONTINUED = (
    "data.seed",
    "data.validation_fraction",
    "data.weights",
    "training.global_batch_size",
    "training.seed",
)
"""Fields that must stay for a run to go on: they choose a step's records and its dropout."""


def must_stay(config: RunConfig, fingerprints: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Fingerprints and fields that a resumed run must have in common with its checkpoint."""
    accepted = ("data", "data.weights") if config.data.accept_changes else ()
    wanted = {kind: value for kind, value in fingerprints.items() if kind not in accepted}
    return wanted, [field for field in CONTINUED if field not in accepted]


class Checkpoints:
    """Saves and restores one run; every call is made by all ranks together.

    Args:
        config: the run.
        topology: process groups.
        engine: holds what is saved.
        fingerprints: SHA-256 of both tokenizers and of the shards, kept in every checkpoint.
    """

    def __init__(
        self, config: RunConfig, topology: Topology, engine: Engine, fingerprints: dict[str, str]
    ) -> None:
        self.config, self.topology, self.engine = config, topology, engine
        self.fingerprints = fingerprints
        self.root = Path(config.training.output) / CHECKPOINTS
        training = config.training
        self.saver = Saver(
            self.root,
            topology,
            keep=training.keep_checkpoints,
            keep_every=training.keep_every,
            asynchronous=training.async_save,
        )
        self.saved_step = -1
        """Step of the newest checkpoint that is on the disk, as far as this process knows."""
        self._saving_step = -1
        self._again_from: int | None = None

    def reserve(self) -> None:
        """Get the host memory that saving takes, before training begins."""
        self.saver.reserve(self.engine.sharded_state())

    def resume(self) -> tuple[int, Progress]:
        """Load the newest whole checkpoint of the run's folder.

        Returns:
            The number of completed steps and what the run remembers; 0 and nothing without one.

        Raises:
            CheckpointError: it belongs to another run, naming what differs, or none is whole.
        """
        found = commit.newest_valid(self.root)
        if found is None:
            return 0, Progress()
        step, progress = self._load(*found)
        if self.topology.is_main:
            logger.info("resumed from %s", found[0])
        return step, progress

    def go_back(self, first: int) -> tuple[int, Progress]:
        """Load the newest whole checkpoint that was made before step ``first`` (0 = the first).

        Those made after it are removed: what they hold led to where the run came back from.

        Raises:
            TrainingError: there is none.
        """
        self.finish()
        self._again_from = None
        found = commit.newest_valid(self.root, before=first + 1)
        if found is None:
            raise TrainingError(
                f"step {first + 1}: goes wrong before the first checkpoint, so there is nothing "
                "to go back to.  Lower optimizer.lr, raise optimizer.warmup_fraction, or set a "
                "smaller training.save_every"
            )
        step, progress = self._load(*found)
        # One between the two that could not be read now may be sound all the same: it stays.
        commit.remove_newer(self.root, first)
        return step, progress

    def _load(self, directory: Path, manifest: dict[str, object]) -> tuple[int, Progress]:
        state = manifest["state"]
        assert isinstance(state, dict)
        wanted, continued = must_stay(self.config, self.fingerprints)
        check_belongs(directory, state, self.config, wanted, continued)
        if state.get("weights_only"):
            raise CheckpointError(
                f"{directory}: holds weights alone (tools/convert_checkpoint.py import), which "
                "generate can use; a run cannot go on from it without an optimizer's state"
            )
        try:
            progress = Progress.from_dict(state["progress"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{directory}: its manifest does not say how far the run was ({error!r}); it was "
                "made by another version of this package"
            ) from error
        self._load_together(directory)
        self.saved_step = int(str(manifest["step"]))
        return self.saved_step, progress

    def _load_together(self, directory: Path) -> None:
        """Load on all ranks, or raise on all of them: none may go on to where the others wait."""
        problem: Exception | None = None
        try:
            self.engine.load(directory)
        except (CheckpointError, OSError) as error:
            problem = error
        failed = agreement.largest([float(problem is not None)], self.topology)[0]
        if problem is not None:
            raise problem
        if failed:
            raise CheckpointError(f"{directory}: another rank could not load it")

    def postpone(self, step: int) -> None:
        """A checkpoint that is due after ``step`` steps is made as soon as it can be."""
        self._again_from = step

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint should be made after ``step`` steps."""
        training = self.config.training
        if self._again_from is not None and step >= self._again_from:
            return True
        return step % training.save_every == 0

    def begin(self, step: int, progress: Progress) -> None:
        """Start to save; the disk is written to while training goes on."""
        self.finish()
        state = TrainState(
            run=self.config.to_dict(), fingerprints=self.fingerprints, progress=progress.to_dict()
        )
        self._saving_step, self._again_from = step, None
        self.saver.begin(step, dataclasses.asdict(state), self.engine.sharded_state())

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes."""
        return self.saver.status is Status.WRITING

    def commit_written(self) -> None:
        """End a save whose files all ranks have written, if there is one."""
        if self.saver.status is not Status.IDLE:
            self._ended(self.saver.commit())

    @property
    def in_flight(self) -> bool:
        """Whether a save is under way, on whatever rank."""
        return self.saver.status is not Status.IDLE

    def finish(self) -> None:
        """Wait for a save, and end it."""
        if self.saver.status is not Status.IDLE:
            self._ended(self.saver.wait())

    def _ended(self, directory: Path | None) -> None:
        if directory is not None:
            self.saved_step = self._saving_step
            return
        # The next regular one may be hours away.
        pause = math.ceil(self.config.training.save_every / 10)
        self._again_from = self._saving_step + pause

    def must_have(self, step: int) -> None:
        """Refuse to end well without the checkpoint of ``step``.

        Raises:
            CheckpointError: it could not be written.
        """
        if self.saved_step != step:
            raise CheckpointError(
                f"{self.root}: the checkpoint of step {step} could not be written "
                f"({self.saver.last_error}); step {self.saved_step} is the newest there.  Make "
                "room or mend the disk and run the same command again"
                if self.saved_step >= 0
                else f"{self.root}: no checkpoint could be written ({self.saver.last_error})"
            )
