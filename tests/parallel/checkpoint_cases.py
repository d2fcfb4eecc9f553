"""What the ranks of the checkpoint tests run.  Results are JSON values."""

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from megatron_cogview.checkpoint import blobs, commit
from megatron_cogview.checkpoint.boxes import Box
from megatron_cogview.checkpoint.reader import CheckpointReader
from megatron_cogview.checkpoint.saver import Saver, Status
from megatron_cogview.checkpoint.snapshot import Piece, ShardedState
from megatron_cogview.configs.errors import CheckpointError
from megatron_cogview.configs.parallel import ParallelConfig
from megatron_cogview.parallel.topology import Topology, initialize

ROWS, WIDTH = 6, 50


class State:
    """A tensor of which each rank holds rows, and one that all hold alike."""

    def __init__(self, topology: Topology) -> None:
        rank, ranks = topology.rank, topology.world_size
        self.rows = torch.zeros(ROWS, WIDTH)
        self.same = torch.zeros(7, dtype=torch.bfloat16)
        whole = (ROWS * ranks, WIDTH)
        mine, all_of_it = Box((ROWS * rank, 0), (ROWS, WIDTH)), Box((0,), (7,))
        self.pieces = [
            Piece("rows", whole, mine, self.rows, True),
            Piece("same", (7,), all_of_it, self.same, rank == 0),
        ]

    def set(self, number: int) -> None:
        """The values of step ``number``."""
        rank = dist.get_rank()
        generator = torch.Generator().manual_seed(1000 * number + rank)
        self.rows.copy_(torch.rand(ROWS, WIDTH, generator=generator))
        self.same.fill_(number)

    def sharded(self) -> ShardedState:
        return ShardedState(self.pieces, {"adam_step": 1}, ["extra/shard_0_1"])

    def is_of(self, folder: Path, number: int) -> bool:
        """Whether a checkpoint holds the values of step ``number``, bit for bit."""
        self.rows.fill_(torch.nan)
        self.same.fill_(torch.nan)
        CheckpointReader(folder).fill(self.pieces)
        found = self.rows.clone(), self.same.clone()
        self.set(number)
        return torch.equal(found[0], self.rows) and torch.equal(found[1], self.same)


def save(saver: Saver, state: State, step: int) -> Path | None:
    """A save during which the live tensors change."""
    state.set(step)
    saver.begin(step, {"n": step}, state.sharded())
    state.rows.fill_(torch.nan)
    state.same.fill_(torch.nan)
    return saver.wait()


def newest(root: Path, before: int | None = None) -> int | None:
    """Step of the newest whole checkpoint."""
    found = commit.newest_valid(root, before)
    return None if found is None else int(found[1]["step"])


def snapshots(root: Path, topology: Topology) -> dict[str, Any]:
    """What is saved is the step it names, whatever comes after."""
    state, results = State(topology), []
    for asynchronous in (True, False):
        folder = root / str(asynchronous)
        saver = Saver(folder, topology, keep=3, keep_every=4, asynchronous=asynchronous)
        assert saver.status is Status.IDLE and saver.wait() is None
        for step in range(1, 10):
            path = save(saver, state, step)
            results.append(path is not None and state.is_of(path, step))
            dist.barrier()
    kept = sorted(p.name for p in (root / "True").glob("step_*"))
    steps = [newest(root / "True", before) for before in (None, 9, 8, 7, 5, 4)]
    left = []
    for step in (7, 4):
        commit.remove_newer(root / "True", step, unreadable_to=7)
        left.append(sorted(p.name[:13] + p.suffix for p in (root / "True").glob("step_*")))
        assert newest(root / "True") == step
        assert (root / "True" / commit.POINTER).read_text() == f"step_0000000{step}\n"
    return {"bitwise": all(results), "kept": kept, "before": steps, "left": left}


Patch = tuple[Any, str]
PLACES: dict[str, Patch] = {
    "write": (blobs, "write_some"),
    "sync": (blobs, "sync"),
    "fsync": (os, "fsync"),
    "rename": (os, "rename"),
    "replace": (os, "replace"),
    "mkdir": (os, "mkdir"),
}


@contextlib.contextmanager
def fault(place: str, at: int, error: Exception | None) -> Iterator[list[int]]:
    """The call number ``at`` of a function fails, and all after it; gives the count of calls."""
    module, name = PLACES[place]
    real, calls = getattr(module, name), [0]

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if error is not None and calls[0] >= at:
            if place == "write" and calls[0] == at:
                # The disk takes a part of it first.
                real(args[0], args[1][: len(args[1]) // 2])
            raise error
        return real(*args, **kwargs)

    with mock.patch.object(module, name, failing):
        yield calls


def faults(root: Path, topology: Topology) -> dict[str, Any]:
    """Saves that go wrong at every tenth of their calls, on either rank."""
    logging.getLogger("megatron_cogview").setLevel(logging.CRITICAL)
    state, wrong, trials, failed = State(topology), [], 0, 0
    for asynchronous in (True, False):
        for place in PLACES:
            with fault(place, 0, None) as calls:
                save(Saver(root / f"count-{place}-{asynchronous}", topology, keep=1), state, 1)
            box = [calls[0]]
            dist.broadcast_object_list(box, src=0)
            moments = sorted({max(1, round(box[0] * part / 10)) for part in range(1, 11)})
            for at in moments:
                for victim in range(topology.world_size):
                    folder = root / f"{place}-{at}-{victim}-{asynchronous}"
                    saver = Saver(folder, topology, keep=2, asynchronous=asynchronous)
                    found = _fault(saver, state, place, at, victim)
                    trials += 1
                    failed += saver.failures
                    if found:
                        wrong.append([folder.name, *found])
    return {"wrong": wrong, "trials": trials, "failed": failed}


def _fault(saver: Saver, state: State, place: str, at: int, victim: int) -> list[str]:
    code = (errno.ENOSPC, errno.EIO)[at % 2]
    error = OSError(code, os.strerror(code)) if dist.get_rank() == victim else None
    assert save(saver, state, 1) is not None
    with fault(place, at, error):
        path = save(saver, state, 2)
    problems = []
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (path is None, saver.failures))
    if len(set(everyone)) != 1 or saver.failures != (path is None):
        problems.append(f"ranks disagree: {everyone}")
    if path is None and list(saver.root.glob("*.incomplete")):
        problems.append("a temporary folder is left")
    if path is None and not (saver.last_error and os.strerror(code) in saver.last_error):
        problems.append(f"said {saver.last_error}")
    step = newest(saver.root)
    # What failed behind the rename is there nevertheless.
    if step not in (1, 2) or (path is not None and step != 2):
        problems.append(f"newest is {step}")
    elif not state.is_of(saver.root / commit.checkpoint_name(step), step):
        problems.append("other values")
    if saver.status is not Status.IDLE or save(saver, state, 3) is None or newest(saver.root) != 3:
        problems.append("the next save does not work")
    return problems


CALLS = ("rename", "replace", "mkdir", "fsync", "open", "unlink", "rmdir", "close")


def crashes(root: Path, topology: Topology) -> dict[str, Any]:
    """The process that commits ends before and after each of its system calls."""
    wrong, trials, outcomes = [], 0, set()
    for again in (False, True):
        for moment in range(1, 200):
            folder = root / f"{again}-{moment}"
            done = [True]
            if topology.is_main:
                _content(folder, 1)
                done[0] = _crash(folder, 1 if again else 2, moment)
            dist.broadcast_object_list(done, src=0)
            for prepared in (False, True):
                if prepared and topology.is_main:
                    commit.prepare(folder, 3)
                dist.barrier()
                found = commit.newest_valid(folder)
                number = found and found[1]["state"]["n"]
                held = found and (found[0] / "data").read_text()
                outcomes.add(number)
                if number not in (1, 2) or held != str(number) * 100:
                    wrong.append([folder.name, prepared, number])
                dist.barrier()
            trials += 1
            if topology.is_main:
                _content(folder, 2, 1 if again else 3)
            dist.barrier()
            if (newest(folder), commit.newest_valid(folder)[1]["state"]["n"]) not in (
                (3, 2),
                (1, 2),
            ):
                wrong.append([folder.name, "the next one"])
            if done[0]:
                break
    return {"wrong": wrong, "trials": trials, "outcomes": sorted(outcomes)}


def _content(root: Path, number: int, step: int | None = None) -> None:
    step = number if step is None else step
    temporary = commit.prepare(root, step)
    (temporary / "data").write_text(str(number) * 100)
    commit.commit(temporary, step, {"n": number}, {})


def _crash(root: Path, step: int, moment: int) -> bool:
    """Save ``step`` in a process that ends at a moment; whether it came to its end before."""
    temporary = commit.prepare(root, step)
    (temporary / "data").write_text("2" * 100)
    child = os.fork()
    if child == 0:
        count = [0]

        def dying(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                count[0] += 1
                if count[0] == moment:
                    os._exit(1)
                return real(*args, **kwargs)

            return call

        for name in CALLS:
            setattr(os, name, dying(getattr(os, name)))
        try:
            commit.commit(temporary, step, {"n": 2}, {})
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def damage(root: Path, topology: Topology) -> dict[str, Any]:
    """Flipped bits, and files that are missing, cut or exchanged."""
    logging.getLogger("megatron_cogview").setLevel(logging.CRITICAL)
    state, unseen, trials = State(topology), [], 0
    saver = Saver(root / "run", topology, keep=3)
    for step in (1, 2):
        save(saver, state, step)
    old, new = (root / "run" / commit.checkpoint_name(step) for step in (1, 2))
    shutil.copytree(new, root / f"copy-{topology.rank}")
    dist.barrier()
    copy, rng = root / f"copy-{topology.rank}", np.random.default_rng(5)
    files = sorted(p.name for p in copy.iterdir())
    for name in files:
        data = (copy / name).read_bytes()
        changed = [data[:-1], data + b"x", data[: len(data) // 2], b"", None]
        for position in rng.integers(0, len(data) * 8, 12):
            flipped = bytearray(data)
            flipped[position // 8] ^= 1 << position % 8
            changed.append(bytes(flipped))
        if name in ("__0_0.distcp", "__1_0.distcp", "common.json", ".metadata", "manifest.json"):
            other = (old / name).read_bytes()
            changed += [other] if other != data else []
        for number, content in enumerate(changed):
            if topology.is_main:
                (new / name).unlink() if content is None else (new / name).write_bytes(content)
            dist.barrier()
            trials += 1
            if newest(root / "run") != 1:
                unseen.append([name, number])
            if topology.is_main:
                (new / name).write_bytes(data)
            dist.barrier()
    whole = newest(root / "run")
    results = {"unseen": unseen, "trials": trials, "files": files, "whole": whole}
    if topology.is_main:
        os.rename(new, root / "run" / "step_00000003")
    dist.barrier()
    results["renamed"] = newest(root / "run")
    if topology.is_main:
        (old / "common.json").unlink()
    dist.barrier()
    try:
        newest(root / "run")
    except CheckpointError as error:
        results["none"] = str(error)
    return results


def stock(root: Path, topology: Topology) -> dict[str, Any]:
    """megatron-core's own functions read what is written here, and the other way round."""
    from tests.parallel import checkpoint_stock_cases

    return checkpoint_stock_cases.run(root)


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """All of it."""
    topology, results = initialize(ParallelConfig()), {}
    for case in (snapshots, faults, crashes, damage, stock):
        folder = Path(arguments["folder"]) / case.__name__
        if topology.is_main:
            folder.mkdir()
        dist.barrier()
        results[case.__name__] = case(folder, topology)
        dist.barrier()
    return results
