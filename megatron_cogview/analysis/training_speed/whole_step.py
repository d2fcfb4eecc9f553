"""Whole steps of our engine as the training loop does them: batches, update and log."""

import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from megatron_cogview.analysis.training_speed.against import LR
from megatron_cogview.analysis.training_speed.split import PHASES, PhaseClock, clocked
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.data.loader import TrainLoader
from megatron_cogview.engines.base import StepObserver
from megatron_cogview.parallel.seeding import seed_step
from megatron_cogview.parallel.topology import Topology
from megatron_cogview.training.metrics import MetricsLog


class TrainingLoop:
    """One step after the other, without validation and checkpoints.

    Args:
        config: the run.
        groups: process groups.
        engine: trained.
        loader: gives the batches.
    """

    def __init__(
        self, config: RunConfig, groups: Topology, engine: Any, loader: TrainLoader
    ) -> None:
        self.config, self.groups, self.engine, self.loader = config, groups, engine, loader
        self.done = 0
        self.losses: list[float] = []

    def times(self, steps: int, warmup: int) -> list[float]:
        """Seconds of whole steps, undisturbed by clocks; batches and update, no log."""
        seconds = []
        for number in range(warmup + steps):
            self._synchronize()
            begin = time.perf_counter()
            self._step(self._batches())
            self._synchronize()
            if number >= warmup:
                seconds.append(time.perf_counter() - begin)
        return seconds

    def split(self, steps: int, warmup: int, folder: Path) -> dict[str, float]:
        """Mean seconds of each phase of a step, at the log's usual pace; the log is in ``folder``.

        A mean, because the log is written in some steps only; the slowest tenth of the steps is
        left out of the other phases, which takes out what other programs do to them.
        """
        clock = PhaseClock(self.groups.device)
        every, laps = self.config.training.log_every, []
        self.engine.observer = clock
        with MetricsLog(folder, 0, warmup + steps, True) as log, clocked(clock):
            for number in range(1, warmup + steps + 1):
                clock.enter("data")
                batches = self._batches()
                clock.enter("optimizer")
                result = self._step(batches)
                clock.enter("log")
                log.advance()
                if number % every == 0:
                    log.write(number, {"loss": result.losses.total, "grad_norm": result.grad_norm})
                lap = clock.lap()
                if number > warmup:
                    laps.append(lap)
        self.engine.observer = StepObserver()
        return {
            phase: statistics.fmean(values)
            if phase == "log"
            else statistics.fmean(sorted(values)[: max(1, len(values) * 9 // 10)])
            for phase, values in ((p, [lap[p] for lap in laps]) for p in PHASES)
        }

    def _batches(self) -> Any:
        return self.loader.micro_batches(self.done)

    def _step(self, batches: Any) -> Any:
        seed_step(self.config.training.seed, self.done, self.groups)
        result = self.engine.train_step(batches, LR)
        self.done += 1
        self.losses.append(result.losses.total)
        if not (math.isfinite(self.losses[-1]) and result.updated):
            raise RuntimeError(
                f"step {self.done}: loss {self.losses[-1]}, updated {result.updated}"
            )
        return result

    def _synchronize(self) -> None:
        if self.groups.device.type == "cuda":
            torch.cuda.synchronize(self.groups.device)
