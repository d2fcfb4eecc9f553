"""How long a save in the background keeps training waiting, against one that is waited for.

The two kinds alternate, so that a slow moment of the disk hits both; figures are medians.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_cogview.checkpoint.boxes import Box
from megatron_cogview.checkpoint.saver import Saver, Status
from megatron_cogview.checkpoint.snapshot import Piece, ShardedState
from megatron_cogview.parallel.topology import Topology

STATE_BYTES = 200_000_000
TENSORS = 24
REPETITIONS = 5
BASELINE_STEPS = 10


def toy_state(num_bytes: int = STATE_BYTES, tensors: int = TENSORS) -> ShardedState:
    """Random fp32 tensors of about ``num_bytes`` together."""
    shape = (num_bytes // 4 // tensors // 1000, 1000)
    box = Box((0, 0), shape)
    pieces = [Piece(f"layer.{n}", shape, box, torch.rand(shape), True) for n in range(tensors)]
    return ShardedState(pieces, {"adam_step": 1}, [])


def measure(
    folder: Path,
    topology: Topology,
    state: ShardedState | None = None,
    repetitions: int = REPETITIONS,
) -> dict[str, Any]:
    """Save both ways in ``folder``, on the disk that it lies on; all ranks call it together.

    Returns:
        Medians in seconds: ``blocking_s`` (everything, flushed to the disk), ``stall_s`` (what
        training waits for in the background kind, the first save left out), ``first_stall_s``,
        ``writing_s``, ``step_s`` and ``step_while_writing_s`` of a fixed piece of arithmetic.
    """
    state = state or toy_state()
    savers = {
        kind: Saver(folder / kind, topology, keep=1, asynchronous=kind == "background")
        for kind in ("blocking", "background")
    }
    for each in savers.values():
        # As a run does before its first step.
        each.reserve(state)
    step = _Work()
    idle = [step.seconds() for _ in range(BASELINE_STEPS)]
    blocking, begins, commits, writing, busy = [], [], [], [], []
    saver = savers["background"]
    for number in range(1, repetitions + 2):
        blocking.append(_timed(partial(_blocking, savers["blocking"], number, state)))
        begin = time.perf_counter()
        begins.append(_timed(partial(saver.begin, number, {}, state)))
        while _anyone_writes(saver):
            busy.append(step.seconds())
        writing.append(time.perf_counter() - begin)
        commits.append(_timed(partial(_committed, saver)))
        idle.append(step.seconds())
    stalls = [a + b for a, b in zip(begins, commits, strict=True)]
    return {
        "state_bytes": sum(p.data.numel() * p.data.element_size() for p in state.pieces),
        "ranks": topology.world_size,
        "repetitions": repetitions,
        "blocking_s": statistics.median(blocking[1:]),
        "stall_s": statistics.median(stalls[1:]),
        "begin_s": statistics.median(begins[1:]),
        "commit_s": statistics.median(commits[1:]),
        "first_stall_s": stalls[0],
        "writing_s": statistics.median(writing[1:]),
        "step_s": statistics.median(idle),
        "step_while_writing_s": statistics.median(busy) if busy else None,
        "stall_of_blocking": statistics.median(stalls[1:]) / statistics.median(blocking[1:]),
    }


class _Work:
    """Arithmetic with the main thread's share of Python in it, as in a training step."""

    def __init__(self) -> None:
        self._left, self._right = torch.rand(192, 192), torch.rand(192, 192)

    def seconds(self) -> float:
        """Time of one step, some tens of milliseconds."""
        begin = time.perf_counter()
        value = self._left
        for _ in range(100):
            value = torch.tanh(value @ self._right)
        return time.perf_counter() - begin


def _timed(act: Callable[[], object]) -> float:
    dist.barrier()
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin


def _blocking(saver: Saver, number: int, state: ShardedState) -> None:
    saver.begin(number, {}, state)
    _committed(saver)


def _committed(saver: Saver) -> None:
    if saver.commit() is None:
        raise OSError(f"{saver.root}: {saver.last_error}")


def _anyone_writes(saver: Saver) -> bool:
    flag = torch.tensor(float(saver.status is Status.WRITING))
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def table(results: dict[str, Any]) -> str:
    """The figures as Markdown."""
    size, ranks = results["state_bytes"] / 1e6, results["ranks"]
    rows = [
        ("save that is waited for", results["blocking_s"]),
        ("save in the background, training waits", results["stall_s"]),
        ("of that, copying the state (`begin`)", results["begin_s"]),
        ("of that, index and rename (`commit`)", results["commit_s"]),
        ("the same, first save of a run", results["first_stall_s"]),
        ("writing in the background", results["writing_s"]),
        ("a step of arithmetic", results["step_s"]),
        ("the same step during writing", results["step_while_writing_s"]),
    ]
    lines = [f"| {size:,.0f} MB on {ranks} process(es) | milliseconds |", "|---|---:|"]
    lines += [f"| {name} | {1e3 * s:,.1f} |" for name, s in rows if s is not None]
    share = f"{100 * results['stall_of_blocking']:.1f} %"
    return "\n".join([*lines, f"| waiting, of the save that is waited for | {share} |"]) + "\n"
