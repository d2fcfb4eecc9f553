"""Which ranks need longer than others for the same work.

A rank's own work in a step is the step's time less what it spends at the points where all wait for
each other (``waiting``).  It is compared within a pipeline stage, for stages do different work.

What this can tell apart: model replicas.  Ranks of one tensor-parallel group wait for each other in
every layer, and pipeline stages of one replica at every micro-batch; none of these waits is
measured, so a slow rank shows as the whole of its replica.  A stage that has one rank only is
compared with nobody.
"""

import contextlib
import socket
import statistics
import time
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_cogview.parallel.topology import Topology

MIN_STEPS = 5
"""A median over fewer says little; such an interval is added to the next."""
MIN_DIFFERENCE_S = 0.02
"""Below, it is noise of a short step and worth nobody's time."""


class Slow(NamedTuple):
    """A rank that is slower than others of its stage."""

    rank: int
    host: str
    seconds: float
    """Its own work in a step: the median over the interval."""
    usual: float
    """The same for the stage."""

    def __str__(self) -> str:
        ratio = self.seconds / max(self.usual, 1e-9)
        return (
            f"rank {self.rank} ({self.host}) needs {ratio:.2f} x the median of "
            f"its stage ({self.seconds:.3f} s against {self.usual:.3f} s per step)"
        )


class _Wait:
    """One wait; on CUDA its length is known only when the device has come so far."""

    def __init__(self, cuda: bool) -> None:
        self.begin = time.perf_counter()
        self.seconds: float | None = None
        self._events: tuple[Any, Any] | None = None
        if cuda:
            # On the stream, so that the host need not wait: what the device still has to do when
            # the host gets here is no wait for others.
            self._events = (
                torch.cuda.Event(enable_timing=True),
                torch.cuda.Event(enable_timing=True),
            )
            self._events[0].record()

    def end(self) -> None:
        """The others have come."""
        if self._events is None:
            self.seconds = time.perf_counter() - self.begin
        else:
            self._events[1].record()

    def read(self) -> float:
        """Its length."""
        if self.seconds is None:
            assert self._events is not None
            begin, end = self._events
            end.synchronize()
            self.seconds = begin.elapsed_time(end) / 1000
        return self.seconds


class _Waiting:
    """The context manager of :meth:`StragglerWatch.waiting`; a wait inside a wait counts once."""

    def __init__(self, cuda: bool) -> None:
        self.waits: list[_Wait] = []
        self._cuda, self._depth = cuda, 0

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth == 1:
            self.waits.append(_Wait(self._cuda))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.waits[-1].end()


class StragglerWatch:
    """Measures this rank's own work, and compares it with others' when asked.

    Args:
        topology: process groups.
        factor: how many times the median of its stage a rank must need to be called slow.  A
            difference can only be found when it is clearly larger.  0: nothing is measured.
    """

    def __init__(self, topology: Topology, factor: float) -> None:
        self._topology, self._factor = topology, factor
        self._waiting = _Waiting(topology.device.type == "cuda")
        self._steps: list[tuple[float, list[_Wait]]] = []
        self._warm = False

    def waiting(self) -> contextlib.AbstractContextManager[Any]:
        """Around a point where this rank waits for others."""
        return self._waiting if self._factor else contextlib.nullcontext()

    def step_done(self, seconds: float) -> None:
        """A step ends now that took so long; all ranks call it equally often."""
        if not self._factor:
            return
        begin = time.perf_counter() - seconds
        # Waits between two steps are no part of either.
        waits = [wait for wait in self._waiting.waits if wait.begin >= begin]
        self._waiting.waits = []
        # The first step of a process allocates, compiles and opens files.
        if self._warm:
            self._steps.append((seconds, waits))
        self._warm = True

    def report(self) -> list[Slow]:
        """Slow ranks since the last report, the same on all ranks, which call it together."""
        if not self._factor or len(self._steps) < MIN_STEPS:
            return []
        mine = statistics.median(
            max(seconds - sum(wait.read() for wait in waits), 0.0) for seconds, waits in self._steps
        )
        self._steps = []
        topology = self._topology
        numbers = torch.tensor(
            [mine, topology.pipeline_rank], dtype=torch.float64, device=topology.device
        )
        gathered = [torch.empty_like(numbers) for _ in range(topology.world_size)]
        dist.all_gather(gathered, numbers)
        own, stages = zip(*(each.tolist() for each in gathered), strict=True)
        slow = slow_ranks(own, stages, self._factor)
        if not slow:
            return []
        # All ranks know of the slow one, so all come here.
        hosts = [""] * topology.world_size
        dist.all_gather_object(hosts, socket.gethostname())
        return [Slow(rank, hosts[rank], own[rank], usual) for rank, usual in slow.items()]


def slow_ranks(
    own: tuple[float, ...], stages: tuple[float, ...], factor: float
) -> dict[int, float]:
    """Ranks whose own work exceeds ``factor`` times the median of their stage, and that median."""
    slow = {}
    for rank, (seconds, stage) in enumerate(zip(own, stages, strict=True)):
        # Of two ranks the faster one, rather than what lies between.
        usual = statistics.median_low(s for s, its in zip(own, stages, strict=True) if its == stage)
        if seconds > factor * usual and seconds - usual > MIN_DIFFERENCE_S:
            slow[rank] = usual
    return slow
