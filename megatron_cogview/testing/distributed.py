"""Run one function on several ranks, with a hard timeout, on gloo here and nccl on GPUs.

A test hands over the *name* of a function ``case(arguments) -> results``.  Each rank is a fresh
process in its own process group, so that a hang is ended with everything it started.
"""

import argparse
import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

POLL_SECONDS = 0.05
_WORD_SECONDS = 2.0
"""Before the end of its time a rank that hangs says where."""


class RankFailure(AssertionError):
    """A rank failed or did not end in time; the message holds every rank's last words."""


def run_distributed(
    target: str, world_size: int, arguments: dict[str, Any] | None = None, timeout_s: float = 120.0
) -> list[Any]:
    """Call ``module:function(arguments)`` on ``world_size`` ranks.

    Args:
        target: ``package.module:function``; imported after the CPU backend is installed.
        world_size: number of processes.
        arguments: JSON values, the same for every rank.
        timeout_s: after it every process group is killed.

    Returns:
        Each rank's result, which must be JSON values.

    Raises:
        RankFailure: a rank raised, died or hung.
    """
    with tempfile.TemporaryDirectory(prefix="cogview-ranks-") as folder:
        spec = Path(folder) / "spec.json"
        spec.write_text(
            json.dumps(
                {
                    "target": target,
                    "arguments": arguments or {},
                    "deadline": time.time() + timeout_s,
                }
            )
        )
        ranks = [_start(spec, rank, world_size) for rank in range(world_size)]
        try:
            _wait(ranks, timeout_s, Path(folder))
        finally:
            _kill(ranks)
        return [
            json.loads((Path(folder) / f"result-{r}.json").read_text()) for r in range(world_size)
        ]


def _start(spec: Path, rank: int, world_size: int) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(p for p in (os.getcwd(), *sys.path) if p),
    }
    if torch.cuda.device_count() < world_size:
        # Fewer devices than ranks: all on the CPU, or the product would find CUDA and the
        # processes could not meet over it.
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with (spec.parent / f"log-{rank}.txt").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "megatron_cogview.testing.distributed", str(spec)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(ranks: list[subprocess.Popen[bytes]], timeout_s: float, folder: Path) -> None:
    """Until all ranks ended well; the first failure ends the wait, for the rest would hang."""
    deadline = time.monotonic() + timeout_s
    while True:
        codes = [rank.poll() for rank in ranks]
        if all(code == 0 for code in codes):
            return
        timed_out = time.monotonic() > deadline
        if timed_out or any(code not in (None, 0) for code in codes):
            # The others get a moment to say what they saw.
            time.sleep(0.0 if timed_out else 1.0)
            reason = f"no end after {timeout_s} s" if timed_out else f"exit codes {codes}"
            logs = [
                f"--- rank {r}\n{(folder / f'log-{r}.txt').read_text(errors='replace')[-6000:]}"
                for r in range(len(ranks))
            ]
            raise RankFailure("\n".join([reason, *logs]))
        time.sleep(POLL_SECONDS)


def _kill(ranks: list[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        try:
            os.killpg(rank.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        finally:
            rank.wait()


def _function(target: str) -> Callable[[dict[str, Any]], Any]:
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def main() -> None:
    """One rank: join the world through a file, run the case, write its result."""
    parser = argparse.ArgumentParser(description="One rank of a multi-process test.")
    parser.add_argument("spec", type=Path)
    path = parser.parse_args().spec
    spec = json.loads(path.read_text())
    # Before the parent gives up, however long this process took to start.
    left = spec["deadline"] - time.time() - _WORD_SECONDS
    faulthandler.dump_traceback_later(max(left, 0.1), exit=True)

    from megatron_cogview.parallel import cpu_backend

    cpu_backend.install()
    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with_cuda = torch.cuda.is_available()
    if with_cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if with_cuda else "gloo",
        init_method=f"file://{path.parent / 'store'}",
        rank=rank,
        world_size=world_size,
    )
    result = _function(spec["target"])(spec["arguments"])
    (path.parent / f"result-{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
