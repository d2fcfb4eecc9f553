"""Where the time of a step goes: data, forward, backward, communication, optimizer, log.

The engine is measured as it is: it tells its observer where a step stands, and around the two
functions of megatron-core's schedule and around collectives a clock is put for the time of the
measurement.
"""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_cogview.engines.base import StepObserver

PHASES = ("data", "forward", "backward", "communication", "optimizer", "log")

COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "reduce_scatter_tensor",
)
"""Functions of ``torch.distributed`` whose time is communication, in whatever phase."""

_OF_ENGINE = {"forward": "forward", "gradients": "communication", "update": "optimizer"}
"""Our names for the phases an engine tells of; what it does in ``gradients`` is to add them up."""


class PhaseClock(StepObserver):
    """Cuts a step into intervals; every moment belongs to one phase.

    On CUDA the marks are events in the stream, so that an interval is the device's time and not
    that of the launches.
    """

    def __init__(self, device: torch.device) -> None:
        self._with_cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self._phase = ""

    def entered(self, phase: str) -> None:
        """See :class:`~megatron_cogview.engines.base.StepObserver`."""
        self.enter(_OF_ENGINE.get(phase, phase))

    def waiting(self) -> contextlib.AbstractContextManager[Any]:
        """See :class:`~megatron_cogview.engines.base.StepObserver`."""
        return self.inside("communication")

    def enter(self, phase: str) -> None:
        """What follows belongs to ``phase``."""
        self._phase = phase
        self._marks.append((phase, self._now()))

    @contextlib.contextmanager
    def inside(self, phase: str) -> Iterator[None]:
        """What is done inside belongs to ``phase``, what follows to the one before."""
        before = self._phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def _now(self) -> Any:
        if not self._with_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self) -> dict[str, float]:
        """Seconds of each phase since the last lap, which this call ends."""
        self.enter("")
        if self._with_cuda:
            torch.cuda.synchronize()
        seconds = dict.fromkeys(PHASES, 0.0)
        for (phase, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            span = begin.elapsed_time(end) / 1e3 if self._with_cuda else end - begin
            seconds[phase] = seconds.get(phase, 0.0) + span
        self._marks.clear()
        return seconds


@contextlib.contextmanager
def clocked(clock: PhaseClock) -> Iterator[None]:
    """Tell the clock of forward and backward passes and of collectives, whoever calls them."""
    from megatron.core.pipeline_parallel import schedules

    with contextlib.ExitStack() as undo:
        for name, phase in (("forward_step", "forward"), ("backward_step", "backward")):
            undo.enter_context(_replaced(schedules, name, _timed(clock, phase, schedules, name)))
        for name in COLLECTIVES:
            original, timed = getattr(dist, name), _timed(clock, "communication", dist, name)
            undo.enter_context(_replaced(dist, name, timed))
            # megatron-core keeps some of them under names of its own.
            for module, alias in _holders(original):
                undo.enter_context(_replaced(module, alias, timed))
        yield


def _timed(clock: PhaseClock, phase: str, module: Any, name: str) -> Callable[..., Any]:
    function = getattr(module, name)

    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with clock.inside(phase):
            return function(*args, **kwargs)

    return timed


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def _holders(function: Any) -> list[tuple[Any, str]]:
    """Modules of megatron-core, and names in them, that hold ``function`` itself."""
    return [
        (module, alias)
        for name, module in list(sys.modules.items())
        if name.startswith("megatron.core") and module is not None
        for alias, held in list(vars(module).items())
        if held is function
    ]
