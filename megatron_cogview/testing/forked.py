"""Several multi-process cases from one start: each world is forked from a process that has loaded
everything, which saves the seconds that a fresh interpreter takes.  For CPUs only.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_cogview.testing.distributed import RankFailure

Step = tuple[str, int, dict[str, Any]]
"""``module:function``, number of ranks, and arguments (JSON values, the same for every rank)."""

PRELOADED = ("engines.megatron", "training.trainer", "checkpoint.saver", "data.loader")


def run_forked(steps: list[Step], timeout_s: float) -> list[Any]:
    """Call each step's ``function(arguments)`` on its ranks, one step after the other.

    Returns:
        The results of each step, which must be JSON values and the same on all its ranks.

    Raises:
        RankFailure: a rank raised, died or hung, or two ranks gave different results.
    """
    with tempfile.TemporaryDirectory(prefix="cogview-forked-") as name:
        folder = Path(name)
        (folder / "steps.json").write_text(json.dumps(steps))
        command = [sys.executable, "-W", "ignore", "-m", "megatron_cogview.testing.forked", name]
        paths = os.pathsep.join(p for p in (os.getcwd(), *sys.path) if p)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        with (folder / "log.txt").open("wb") as log:
            process = subprocess.Popen(
                [*command, "--timeout", str(timeout_s)],
                env={**environment, "CUDA_VISIBLE_DEVICES": ""},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout_s + 60)
            except subprocess.TimeoutExpired:
                code = -signal.SIGKILL
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if code != 0:
            said = (folder / "log.txt").read_text(errors="replace")
            raise RankFailure(f"exit code {code}\n{said[-8000:]}")
        return [json.loads((folder / f"result-{n}.json").read_text()) for n in range(len(steps))]


def _function(target: str) -> Callable[[dict[str, Any]], Any]:
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def main() -> None:
    """The process that forks the worlds."""
    parser = argparse.ArgumentParser(description="Worlds of ranks, one after the other.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--timeout", type=float)
    arguments = parser.parse_args()

    from megatron_cogview.parallel import cpu_backend

    cpu_backend.install()
    for module in PRELOADED:
        importlib.import_module(f"megatron_cogview.{module}")
    from megatron_cogview.testing.train_faults.world import World

    steps = json.loads((arguments.folder / "steps.json").read_text())
    # All at once: what a step imports in its ranks every rank would import again.
    functions = [_function(target) for target, _, _ in steps]
    for number, (target, size, values) in enumerate(steps):

        def work(rank: int, number: int = number, values: dict[str, Any] = values) -> int:
            result = functions[number](values)
            (arguments.folder / f"rank-{number}-{rank}.json").write_text(json.dumps(result))
            return 0

        with World(size, work, arguments.folder / "log.txt") as world:
            ended = world.wait(arguments.timeout)
            if not ended or set(world.codes()) != {0}:
                sys.exit(f"{target} on {size} ranks: exit codes {world.codes()}")
        texts = {(arguments.folder / f"rank-{number}-{r}.json").read_text() for r in range(size)}
        if len(texts) != 1:
            sys.exit(f"{target} on {size} ranks: they give different results")
        (arguments.folder / f"result-{number}.json").write_text(texts.pop())


if __name__ == "__main__":
    main()
