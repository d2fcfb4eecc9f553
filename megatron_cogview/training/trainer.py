"""The pretraining loop: batches in, steps of an engine, logs, validation and checkpoints.

It owns time, and no tensors: an engine owns those.  A step is a function of its number and the
weights, so that a run that was interrupted anywhere ends as one that was not.
"""

import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_cogview.configs.run import RunConfig
from megatron_cogview.data.loader import TrainLoader
from megatron_cogview.engines.base import Engine, StepObserver, StepResult
from megatron_cogview.model.loss import Losses
from megatron_cogview.model.watch import ActivationWatch
from megatron_cogview.parallel import agreement
from megatron_cogview.parallel.seeding import seed_step
from megatron_cogview.parallel.topology import Topology
from megatron_cogview.training import run_folder
from megatron_cogview.training.checkpoints import Checkpoints
from megatron_cogview.training.guards import Guard, Progress, Verdict
from megatron_cogview.training.metrics import MetricsLog
from megatron_cogview.training.profiling import profiler
from megatron_cogview.training.schedule import learning_rate
from megatron_cogview.training.signals import StopRequest
from megatron_cogview.training.stragglers import StragglerWatch
from megatron_cogview.training.throughput import Throughput
from megatron_cogview.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

PATIENCE_FACTOR = 4.0
"""How many times the hang timeout loading and waiting for a disk may take."""


class _Observer(StepObserver):
    """Tells watchdog and straggler report where a step stands."""

    def __init__(self, watchdog: Watchdog, stragglers: StragglerWatch) -> None:
        self.watchdog, self.stragglers = watchdog, stragglers
        self.step = 0

    def entered(self, phase: str) -> None:
        self.watchdog.beat(self.step, phase)

    def waiting(self) -> contextlib.AbstractContextManager[Any]:
        return self.stragglers.waiting()


class Trainer:
    """Runs ``config.training.steps`` steps, from the newest whole checkpoint on.

    Args:
        config: the run.
        topology: process groups.
        engine: model and optimizer.
        loader: batches by number.
        fingerprints: SHA-256 of both tokenizers and of the shards, kept in every checkpoint.
        stop: says when somebody asked this process to stop.
        watch: records activations; without it there are none to record.
    """

    def __init__(
        self,
        config: RunConfig,
        topology: Topology,
        engine: Engine,
        loader: TrainLoader,
        fingerprints: dict[str, str],
        stop: StopRequest,
        watch: ActivationWatch | None = None,
    ) -> None:
        self.config, self.topology, self.engine, self.loader = config, topology, engine, loader
        self.stop, self.watch = stop, watch
        self.folder = Path(config.training.output)
        self.checkpoints = Checkpoints(config, topology, engine, fingerprints)
        self.progress = Progress()

    def run(self) -> bool:
        """Train to the last step, or until a rank is asked to stop.

        Returns:
            Whether the last step is done; otherwise it was asked to stop, and has saved.

        Raises:
            CheckpointError: the folder's checkpoints belong to another run, or the last one could
                not be written.
            TrainingError: it went back too often, or has nothing to go back to.
        """
        total = self.config.training.steps
        survival = self.config.survival
        with contextlib.ExitStack() as held:
            self.watchdog = held.enter_context(
                Watchdog(self.topology, survival.hang_timeout_seconds, self.folder)
            )
            with self._patient():
                start, self.progress = self.checkpoints.resume()
                # Only now is it known that the folder is this run's.
                run_folder.write(self.folder, self.config, self.topology)
                self.checkpoints.reserve()
            self.stragglers = StragglerWatch(self.topology, survival.straggler_factor)
            self.observer = _Observer(self.watchdog, self.stragglers)
            self.engine.observer = self.observer
            # Whatever ends the run: a thread that writes must not be cut off by the interpreter.
            held.callback(self.checkpoints.saver.close)
            self.log = held.enter_context(self._new_log(start))
            self.profile = held.enter_context(profiler(self.config, self.topology, self.folder))
            self.throughput = Throughput(self.config, self.topology, total, start)
            self.guard = Guard(survival, self.config.precision, self.progress)
            step, stopping = start, self._agree()
            if self.progress.owes_validation and not stopping:
                stopping = not self._validate(start)
            while step < total and not stopping:
                step, stopping = self._advance(step, first=step == start)
            self._finish(step)
        return step == total

    def _new_log(self, start: int) -> MetricsLog:
        training = self.config.training
        again = "validation_loss" if self.progress.owes_validation else ""
        main = self.topology.is_main
        return MetricsLog(self.folder, start, training.steps, main, "pretrain", again=again)

    def _advance(self, step: int, first: bool) -> tuple[int, bool]:
        """One step and what falls due after it.

        Returns:
            The next step, and whether to stop before it.
        """
        training, done = self.config.training, step + 1
        result = self._step(step)
        if result is not None and not self._judge(step, result):
            return self._go_back(step), False
        self.log.advance()
        self.profile.step()
        last = done == training.steps
        if result is not None and (done % training.log_every == 0 or first or last):
            self.log.write(done, self._numbers(step, result))
            self._report_stragglers(done)
        stopping = self._agree()
        if training.validate_every and (done % training.validate_every == 0 or last):
            # Whoever asks to stop may not wait for long.
            self.progress.owes_validation = stopping and not last
            if not self.progress.owes_validation:
                stopping = not self._validate(done) or stopping
        if stopping or last:
            self._save(done)
        elif self.checkpoints.is_due(done):
            if self.progress.streak_start is None:
                self._save(done)
            else:
                # What may be gone back from soon must not push out what to go back to.
                self.checkpoints.postpone(done + 1)
        return done, stopping

    def _step(self, step: int) -> StepResult | None:
        """Train on the batch of this step; None when the step is to be left out."""
        self.observer.step = step + 1
        self.observer.entered("data")
        if self.progress.batch(step) + 1 in self.config.survival.skip_steps:
            self.log.event(step + 1, "skipped", "left out as survival.skip_steps says")
            self.throughput.leave_out()
            return None
        started = time.perf_counter()
        seed_step(self.config.training.seed, step, self.topology)
        lr = learning_rate(self.config.optimizer, step, self.config.training.steps)
        batches = self.loader.micro_batches(self.progress.batch(step))
        every = self.config.training.log_activations_every
        watch = self.watch if every and (step + 1) % every == 0 else None
        if watch is not None:
            watch.arm()
        result = self.engine.train_step(batches, lr)
        if watch is not None:
            self.log.write(step + 1, watch.read())
        self.stragglers.step_done(time.perf_counter() - started)
        return result

    def _judge(self, step: int, result: StepResult) -> bool:
        """Tell of a step that went wrong; False when the run must go back."""
        verdict = self.guard.judge(step, result)
        if verdict is not Verdict.GOOD:
            self.log.event(
                step + 1,
                verdict.value,
                f"batch {self.progress.batch(step) + 1}: loss {result.losses.total:.4g}, "
                f"gradient norm {result.grad_norm:.4g}, loss scale {result.loss_scale:g}, "
                f"{'weights moved' if result.updated else 'nothing changed'}; "
                f"{self.progress.bad_steps} bad steps so far",
            )
        return verdict is not Verdict.GO_BACK

    def _go_back(self, step: int) -> int:
        """Return to the last checkpoint before things went wrong, and leave their batches out."""
        first = self.progress.streak_start
        assert first is not None
        batches = (self.progress.batch(first) + 1, self.progress.batch(step) + 1)
        self.guard.may_go_back(first, step)
        with self._patient():
            self._tell_of_save(self.checkpoints.finish)
            again, found = self.checkpoints.go_back(first)
        self.progress = self.guard.after_going_back(found, first, step)
        self.guard = Guard(self.config.survival, self.config.precision, self.progress)
        self.log.event(
            step + 1,
            "rollback",
            f"back to step {again}; batches {batches[0]} to {batches[1]} are left out from now on "
            f"(rollback {self.progress.rollbacks} of {self.config.survival.max_rollbacks})",
        )
        self.log.rewind(again)
        self.throughput = Throughput(self.config, self.topology, self.config.training.steps, again)
        # The same tensors again, with the batches that are left out: a restart must not go through
        # all of this once more.
        self._save(again)
        return again

    def _patient(self) -> contextlib.AbstractContextManager[Any]:
        """Around what may take longer than a step."""
        return self.watchdog.allow(PATIENCE_FACTOR * self.config.survival.hang_timeout_seconds)

    def _agree(self) -> bool:
        """Whether any rank was asked to stop; ends a save that all ranks have written."""
        with self.observer.waiting():
            urgency, writing = agreement.largest(
                [self.stop.urgency, float(self.checkpoints.is_writing)], self.topology
            )
        self.stop.agreed(urgency)
        if not writing and self.checkpoints.in_flight:
            # A slow disk is no hang.
            with self._patient(), self.throughput.pause():
                self._tell_of_save(self.checkpoints.commit_written)
        return bool(urgency)

    def _save(self, step: int) -> None:
        """Start to write a checkpoint."""
        self.observer.entered("save")
        with self._patient(), self.throughput.pause():
            self._tell_of_save(self.checkpoints.finish)
            self._tell_of_save(lambda: self.checkpoints.begin(step, self.progress))

    def _tell_of_save(self, act: Callable[[], object]) -> None:
        """Do something that may end a save, and tell how it ended."""
        saves, failed = self.checkpoints.saves, self.checkpoints.saver.failures
        act()
        if self.checkpoints.saver.failures > failed:
            self.log.event(
                self.observer.step,
                "save failed",
                f"{self.checkpoints.saver.last_error}; the checkpoints that were there are whole, "
                "training goes on, and it is tried again soon",
            )
        elif self.checkpoints.saves > saves:
            self.log.event(
                self.observer.step, "saved", f"checkpoint of step {self.checkpoints.saved_step}"
            )

    def _finish(self, step: int) -> None:
        """Wait for the last checkpoint, without which nothing done may count as done."""
        self.observer.entered("save")
        with self._patient():
            self._tell_of_save(self.checkpoints.finish)
        if step and self.checkpoints.saved_step != step:
            # There is no later one to make up for it.
            self._save(step)
            self._tell_of_save(self.checkpoints.finish)
        if step:
            self.checkpoints.must_have(step)

    def _numbers(self, step: int, result: StepResult) -> dict[str, float]:
        return {
            "loss": result.losses.total,
            "text_loss": result.losses.text,
            "image_loss": result.losses.image,
            "grad_norm": result.grad_norm,
            "lr": learning_rate(self.config.optimizer, step, self.config.training.steps),
            "loss_scale": result.loss_scale,
            "bad_steps": float(self.progress.bad_steps),
            **self.throughput.lap(step + 1),
        }

    def _report_stragglers(self, step: int) -> None:
        for slow in self.stragglers.report():
            self.log.event(step, "straggler", str(slow))

    def _validate(self, step: int) -> bool:
        """Losses on held-out records, if there are any.

        Returns:
            False when somebody asked to stop meanwhile: then it is left for the next start.
        """
        training = self.config.training
        count = min(training.validation_batches, self.loader.num_validation_batches)
        self.progress.owes_validation = False
        if count == 0:
            return True
        self.observer.entered("validate")
        parts = []
        for number in range(count):
            with self._patient(), self.throughput.pause():
                parts.append(self.engine.eval_step(self.loader.validation(number)).losses)
            rest = count - len(parts)
            # After the last step there is no next start.
            if rest and step < training.steps and self._agree():
                self.progress.owes_validation = True
                return False
        losses = Losses.of_all(parts)
        values = {"": losses.total, "text_": losses.text, "image_": losses.image}
        self.log.write(step, {f"validation_{kind}loss": v for kind, v in values.items()})
        return True
