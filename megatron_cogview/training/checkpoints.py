"""A run's checkpoints: what they hold besides tensors, when one is due, and the way back to one."""

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_cogview.checkpoint import commit
from megatron_cogview.checkpoint.identity import check_belongs
from megatron_cogview.checkpoint.saver import Saver, Status
from megatron_cogview.configs.errors import CheckpointError, TrainingError
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.engines.base import Engine, TrainState
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

LOSS_LEVEL = ("data.weights", "training.text_weight", "training.image_weight")
"""Fields that may change, and with them the loss of one and the same model."""


def must_stay(config: RunConfig, fingerprints: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Fingerprints and fields that a resumed run must have in common with its checkpoint."""
    accepted = ("data", "data.weights") if config.data.accept_changes else ()
    wanted = {kind: value for kind, value in fingerprints.items() if kind not in accepted}
    return wanted, [field for field in CONTINUED if field not in accepted]


def _field(run: dict[str, Any], name: str) -> Any:
    part, _, field = name.partition(".")
    return run.get(part, {}).get(field)


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
        self.saves = 0
        """Checkpoints that this process has made."""
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
        found = self._load_newest(None)
        if found is None:
            return 0, Progress()
        if self.topology.is_main:
            logger.info("resumed from %s", self.root / commit.checkpoint_name(found[0]))
        return found

    def go_back(self, first: int) -> tuple[int, Progress]:
        """Load the newest checkpoint that was made before step ``first`` (0 = the first).

        Those made after it lose their names: what they hold led to where the run came back from.

        Raises:
            TrainingError: there is none.
        """
        self.finish()
        self._again_from = None
        found = self._load_newest(first + 1)
        if found is None:
            raise TrainingError(
                f"step {first + 1}: goes wrong before the first checkpoint, so there is nothing "
                "to go back to.  Lower optimizer.lr, raise optimizer.warmup_fraction, or set a "
                "smaller training.save_every"
            )
        commit.remove_newer(self.root, found[0], unreadable_to=first)
        return found

    def _load_newest(self, before: int | None) -> tuple[int, Progress] | None:
        """Load the newest checkpoint that every rank can load; None when there are none.

        Raises:
            CheckpointError: it belongs to another run, or there are some and none can be loaded.
        """
        problems: list[str] = []
        while (found := commit.newest_valid(self.root, before)) is not None:
            directory, manifest = found
            progress = self._checked(directory, manifest)
            problem = self._load_together(directory)
            if problem is None:
                self.saved_step = int(manifest["step"])
                return self.saved_step, progress
            problems.append(problem)
            if self.topology.is_main:
                logger.warning("checkpoint skipped, trying an older one: %s", problem)
            before = int(manifest["step"])
        if problems:
            raise CheckpointError(
                f"{self.root}: no checkpoint can be loaded: {'; '.join(problems)}"
            )
        return None

    def _checked(self, directory: Path, manifest: dict[str, Any]) -> Progress:
        """What the run remembered, if it is this run."""
        state = manifest["state"]
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
        changed = [
            field
            for field in LOSS_LEVEL
            if _field(self.config.to_dict(), field) != _field(state["run"], field)
        ]
        if self.fingerprints.get("data") != state["fingerprints"].get("data"):
            changed.append("data")
        if changed:
            # The loss may jump for a good reason.
            progress.forget_losses()
        if {"data", "data.weights"} & set(changed):
            # The same numbers are other batches now.
            progress.left_out = []
        return progress

    def _load_together(self, directory: Path) -> str | None:
        """Load on all ranks; gives the same on all: why not, if one could not."""
        problem: str | None = None
        try:
            self.engine.load(directory)
        except Exception as error:
            # Whatever it is, the other ranks must not wait for this one.
            problem = f"rank {self.topology.rank}: {directory}: {error}"
        everyone = [problem] * self.topology.world_size
        if len(everyone) > 1:
            dist.all_gather_object(everyone, problem)
        return next((each for each in everyone if each is not None), None)

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
        values = dataclasses.asdict(state)
        # What may be gone back to soon must not be pushed out.
        self.saver.begin(step, values, self.engine.sharded_state(), hold=progress.streak_start)

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
            self.saves += 1
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
