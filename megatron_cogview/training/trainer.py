"""The pretraining loop: batches in, steps of an engine, logs, validation and checkpoints.

It owns time, and no tensors: an engine owns those.
"""

import dataclasses
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_cogview.checkpoint import commit
from megatron_cogview.checkpoint.identity import check_belongs
from megatron_cogview.configs.errors import TrainingError
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.data.loader import TrainLoader
from megatron_cogview.engines.base import Engine, StepResult, TrainState
from megatron_cogview.parallel.seeding import seed_step
from megatron_cogview.parallel.topology import Topology
from megatron_cogview.storage.atomic import write_text
from megatron_cogview.training.metrics import MetricsLog
from megatron_cogview.training.schedule import learning_rate

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"

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


@dataclass
class _Interval:
    """Since the last log line."""

    started: float
    steps: int = 0


class Trainer:
    """Runs ``config.training.steps`` steps, from the newest whole checkpoint on.

    Args:
        config: the run.
        topology: process groups.
        engine: model and optimizer.
        loader: batches by step number.
        fingerprints: SHA-256 of both tokenizers and of the shards, kept in every checkpoint.
    """

    def __init__(
        self,
        config: RunConfig,
        topology: Topology,
        engine: Engine,
        loader: TrainLoader,
        fingerprints: dict[str, str],
    ) -> None:
        self.config, self.topology, self.engine = config, topology, engine
        self.loader, self.fingerprints = loader, fingerprints
        self.folder = Path(config.training.output)

    def run(self) -> None:
        """Train to the last step; every step depends on its number and the weights alone.

        Raises:
            CheckpointError: the folder's checkpoints belong to another run.
            TrainingError: a loss or gradient that is not finite.
        """
        training = self.config.training
        start = self._resume()
        if self.topology.is_main:
            # Only now is it known that the folder is this run's.
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / "config.json", self.config.to_json())
        with MetricsLog(
            self.folder, start, training.steps, self.topology.is_main, "pretrain"
        ) as log:
            interval = _Interval(time.perf_counter())
            for step in range(start, training.steps):
                result = self._step(step)
                done = step + 1
                interval.steps += 1
                log.advance()
                last = done == training.steps
                if done % training.log_every == 0 or done == start + 1 or last:
                    log.write(done, self._numbers(step, result, interval))
                    interval = _Interval(time.perf_counter())
                if training.validate_every and (done % training.validate_every == 0 or last):
                    log.write(done, self._validate())
                    interval = _Interval(time.perf_counter())
                if done % training.save_every == 0 or last:
                    self._save(done)
                    interval = _Interval(time.perf_counter())

    def _step(self, step: int) -> StepResult:
        seed_step(self.config.training.seed, step, self.topology)
        lr = learning_rate(self.config.optimizer, step, self.config.training.steps)
        result = self.engine.train_step(self.loader.micro_batches(step), lr)
        # fp16 refuses such a step by itself; elsewhere the weights are spoilt, and saving them
        # would push the last good checkpoint out.
        if result.updated and not (
            math.isfinite(result.losses.total) and math.isfinite(result.grad_norm)
        ):
            raise TrainingError(
                f"step {step + 1}: loss {result.losses.total}, gradient norm {result.grad_norm}; "
                f"it was not saved, and what {self.folder / CHECKPOINTS} holds is older.  Lower "
                "optimizer.lr, or set model.norm.relax_scope all"
            )
        return result

    def _numbers(self, step: int, result: StepResult, interval: _Interval) -> dict[str, float]:
        seconds = time.perf_counter() - interval.started
        tokens = self.config.training.global_batch_size * self.config.sequence.model_length
        return {
            "loss": result.losses.total,
            "text_loss": result.losses.text,
            "image_loss": result.losses.image,
            "grad_norm": result.grad_norm,
            "lr": learning_rate(self.config.optimizer, step, self.config.training.steps),
            "loss_scale": result.loss_scale,
            "tokens_per_second": tokens * interval.steps / seconds,
        }

    def _validate(self) -> dict[str, float]:
        """Losses on held-out records; nothing when there are none."""
        count = min(self.config.training.validation_batches, self.loader.num_validation_batches)
        if count == 0:
            return {}
        # In one call: the engine divides by the weights of all of them, padding rows included.
        micro_batches = [b for i in range(count) for b in self.loader.validation(i)]
        losses = self.engine.eval_step(micro_batches).losses
        return {
            "validation_loss": losses.total,
            "validation_text_loss": losses.text,
            "validation_image_loss": losses.image,
        }

    def _save(self, step: int) -> None:
        state = TrainState(run=self.config.to_dict(), fingerprints=self.fingerprints)
        root = self.folder / CHECKPOINTS
        self.loader.settle()
        keep = self.config.training.keep_checkpoints
        with commit.committing(root, step, dataclasses.asdict(state), keep) as directory:
            self.engine.save(directory)

    def _resume(self) -> int:
        """Load the newest whole checkpoint of this run's folder.

        Returns:
            The number of completed steps.

        Raises:
            CheckpointError: it belongs to another model or other tokenizers, naming what differs.
        """
        found = commit.newest_valid(self.folder / CHECKPOINTS)
        if found is None:
            return 0
        directory, manifest = found
        wanted, continued = must_stay(self.config, self.fingerprints)
        check_belongs(directory, manifest["state"], self.config, wanted, continued)
        self.engine.load(directory)
        step = int(manifest["step"])
        if self.topology.is_main:
            logger.info("resumed from %s", directory)
        return step
