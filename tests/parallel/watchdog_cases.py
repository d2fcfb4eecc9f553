"""What ranks do whose watchdog is tested: a loop like a trainer's, and what goes wrong in it."""

import ctypes
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_cogview.parallel.topology import Topology
from megatron_cogview.training.watchdog import Watchdog

TIMEOUT_S = 2.0
READY_STEP = 3
LONG_S = 30.0

Fault = Callable[[Watchdog, int, int], None]
"""Called with watchdog, rank and step, before what all ranks do together."""


def topology(rank: int, size: int) -> Topology:
    """Replicas of a model on one device each, by hand: on the CPU also beside a GPU."""
    world = dist.group.WORLD
    assert world is not None
    alone = [dist.new_group([each]) for each in range(size)][rank]
    return Topology(
        rank=rank,
        world_size=size,
        device=torch.device("cpu"),
        tensor_group=alone,
        tensor_rank=0,
        tensor_size=1,
        pipeline_group=alone,
        pipeline_rank=0,
        pipeline_size=1,
        data_group=world,
        data_rank=rank,
        data_size=size,
        last_stage_rank=rank,
    )


def train(folder: Path, size: int, fault: Fault, steps: int = 10_000) -> Callable[[int], int]:
    """Work for ``World``: a loop of steps with one sum over all ranks in each."""

    def work(rank: int) -> int:
        # What pytest put there is of no use in a forked process.
        sys.stderr = os.fdopen(2, "w", buffering=1)
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
        numbers = torch.ones(4)
        with Watchdog(topology(rank, size), TIMEOUT_S, folder) as watchdog:
            for step in range(1, steps + 1):
                watchdog.beat(step, "data")
                fault(watchdog, rank, step)
                watchdog.beat(step, "forward")
                dist.all_reduce(numbers)
                if step == READY_STEP:
                    (folder / f"ready-{rank}").touch()
                time.sleep(0.01)
        return 0

    return work


def nothing(watchdog: Watchdog, rank: int, step: int) -> None:
    """All is well."""


def spin(watchdog: Watchdog, rank: int, step: int) -> None:
    """The last rank is caught in a loop of Python."""
    end = time.monotonic() + LONG_S
    while rank == 2 and step == 5 and time.monotonic() < end:
        sum(range(1000))


def hold_gil(watchdog: Watchdog, rank: int, step: int) -> None:
    """Rank 1 is in foreign code that does not let any other thread of it run."""
    if rank == 1 and step == 5:
        # PyDLL calls without letting go of the interpreter.
        ctypes.PyDLL(None).sleep(int(LONG_S))


def fail(watchdog: Watchdog, rank: int, step: int) -> None:
    """Rank 1 raises."""
    if rank == 1 and step == 5:
        raise ValueError("a bad record")


def broadcast_alone(watchdog: Watchdog, rank: int, step: int) -> None:
    """Rank 1 calls another collective than the others."""
    if rank == 1 and step == 5:
        dist.broadcast(torch.ones(4), 1)


def wait_for_a_message(watchdog: Watchdog, rank: int, step: int) -> None:
    """Rank 1 waits for a message that nobody sends, the others for rank 1."""
    if step == 5:
        if rank == 1:
            dist.recv(torch.ones(4), 0)
        else:
            dist.barrier()


def sleep_alone(watchdog: Watchdog, rank: int, step: int) -> None:
    """A process that runs alone is stuck."""
    time.sleep(LONG_S if step == 5 else 0.0)


def patience(watchdog: Watchdog, rank: int, step: int) -> None:
    """Rank 1 needs long for what may take long; the others are through with it and wait."""
    if step == 5:
        with watchdog.allow(4 * TIMEOUT_S):
            time.sleep(1.6 * TIMEOUT_S if rank == 1 else 0.0)


def leaving(rank_order: tuple[int, ...]) -> Callable[[Path], Callable[[int], int]]:
    """Work of ranks that end one after the other, with so much time between that it would show."""

    def make(folder: Path) -> Callable[[int], int]:
        def work(rank: int) -> int:
            sys.stderr = os.fdopen(2, "w", buffering=1)
            logging.basicConfig(
                level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True
            )
            with Watchdog(topology(rank, len(rank_order)), TIMEOUT_S, folder) as watchdog:
                dist.all_reduce(torch.ones(1))
                for step in range(rank_order.index(rank) * 16):
                    watchdog.beat(step, "validate")
                    time.sleep(0.1)
            return 0

        return work

    return make
