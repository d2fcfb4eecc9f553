"""``--profile``: a trace of a few steps that Chrome, Perfetto and TensorBoard can show."""

import logging
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from megatron_cogview.configs.run import RunConfig
from megatron_cogview.parallel.topology import Topology

logger = logging.getLogger(__name__)

FOLDER = "profile"
ROWS = 40
"""Operators in the table beside a trace."""


class Profiler(Protocol):
    """What a training loop does with one."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def step(self) -> None:
        """One more step is done."""


def profiler(config: RunConfig, topology: Topology, folder: Path) -> Profiler:
    """A context manager whose ``step()`` follows every step of this process's run.

    It traces steps ``profile_from`` to ``profile_from + profile_steps - 1``, counted from this
    process's first, on the first rank of each pipeline stage: stages differ in what they do and
    when they wait for each other, which the ranks of one stage do not.  Without ``config.profile``
    it does nothing.

    Args:
        config: the run.
        topology: process groups.
        folder: run folder; a trace is ``profile/rank_00000.json.gz`` in it, a table of the most
            expensive operators ``profile/rank_00000.txt``.
    """
    if not config.profile or topology.tensor_rank or topology.data_rank:
        return _Nothing()
    training = config.training
    stem = folder / FOLDER / f"rank_{topology.rank:05}"
    return _Trace(training.profile_from, training.profile_steps, topology.device, stem)


class _Nothing:
    """No profile."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def step(self) -> None:
        pass


class _Trace:
    """torch's profiler, told of every step until its trace is written.

    Args:
        first: step of the trace's begin, counted from 1.
        count: steps of the trace.
        device: adds the device's own times where there is one.
        stem: path of the files without their endings.
    """

    def __init__(self, first: int, count: int, device: torch.device, stem: Path) -> None:
        self.first, self.count, self.stem = first, count, stem
        self.on_gpu = device.type == "cuda"
        self.steps = 0
        self._ended = False
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        # Starting costs the step in which it happens, so that one goes before.
        warmup = min(1, first - 1)
        self.profile = profile(
            activities=activities,
            schedule=schedule(wait=first - 1 - warmup, warmup=warmup, active=count, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
            # One cycle is all there is; torch warns of those that it would clear otherwise.
            acc_events=True,
        )

    def __enter__(self) -> Self:
        self.profile.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def step(self) -> None:
        """One more step is done."""
        if self._ended:
            return
        self.steps += 1
        self.profile.step()
        if self.steps == self.first + self.count - 1:
            self._end()

    def _end(self) -> None:
        """Stop; from here on a step costs nothing."""
        if self._ended:
            return
        self._ended = True
        self.profile.__exit__(None, None, None)
        if self.steps < self.first:
            logger.warning(
                "no profile: the run ended after %d steps, and training.profile_from = %d",
                self.steps,
                self.first,
            )

    def _write(self, done: Any) -> None:
        """Write both files; called by torch when the trace ends, be it too early."""
        if self.steps < self.first:
            return
        order = "self_device_time_total" if self.on_gpu else "self_cpu_time_total"
        try:
            self.stem.parent.mkdir(parents=True, exist_ok=True)
            path = self.stem.with_suffix(".json.gz")
            done.export_chrome_trace(str(path))
            table = done.key_averages().table(sort_by=order, row_limit=ROWS)
            self.stem.with_suffix(".txt").write_text(table, encoding="utf-8")
        except OSError as error:
            logger.warning("%s: the profile cannot be written (%s)", self.stem.parent, error)
            return
        last = min(self.steps, self.first + self.count - 1)
        logger.info("%s: profile of steps %d to %d of this run", path, self.first, last)
