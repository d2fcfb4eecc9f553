"""Write checkpoints while training goes on.

:meth:`Saver.begin` copies the state to host memory and gives the copy to a thread; the ranks find
out in passing when all are done and then :meth:`Saver.commit`.  The thread talks to no other rank.
It is a thread and no forked process, because a fork in the middle of what another thread does can
leave a lock locked in the child for ever.

What a disk refuses ends a save, never a run, and never harms the checkpoints that are there.
"""

import datetime
import logging
import threading
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_cogview.checkpoint import commit
from megatron_cogview.checkpoint.index import FILE as INDEX
from megatron_cogview.checkpoint.index import write_index
from megatron_cogview.checkpoint.scalars import FILE as COMMON
from megatron_cogview.checkpoint.scalars import write_common
from megatron_cogview.checkpoint.snapshot import ShardedState, Snapshot, Written
from megatron_cogview.parallel.topology import Topology

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


LONGEST_CLOSE_S = 120.0
"""For a thread that is left over when a run ends in an error."""


class Status(Enum):
    """How far this rank's save is."""

    IDLE = "idle"
    WRITING = "writing"
    WRITTEN = "written"
    FAILED = "failed"


class Saver:
    """Saves one run, one checkpoint at a time.

    Args:
        root: folder of the run's checkpoints.
        topology: process groups.
        keep: newest checkpoints to keep.
        keep_every: checkpoints of multiples of it are kept for good.
        asynchronous: write in a thread; otherwise :meth:`begin` returns when all is written.
    """

    def __init__(
        self,
        root: Path,
        topology: Topology,
        *,
        keep: int,
        keep_every: int = 0,
        asynchronous: bool = True,
    ) -> None:
        self.root, self.topology = root, topology
        self.keep, self.keep_every, self.asynchronous = keep, keep_every, asynchronous
        self.failures = 0
        """Saves that came to nothing."""
        self.last_error: str | None = None
        with_cuda = topology.device.type == "cuda"
        self._group: dist.ProcessGroup | None = None
        if with_cuda:
            # Over nccl the index would pass through the GPUs, whose memory is spoken for.
            timeout = datetime.timedelta(seconds=topology.timeout_s)
            self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._snapshot = Snapshot(with_cuda)
        self._thread: threading.Thread | None = None
        self._removal: threading.Thread | None = None
        self._step = 0
        self._hold: int | None = None
        self._folder: Path | None = None
        """Where the save in flight is written; None when it could not be made."""
        self._manifest_state: dict[str, Any] = {}
        self._common: dict[str, Any] = {}
        self._written: Written | None = None
        self._error: str | None = None
        self._in_flight = False

    @property
    def status(self) -> Status:
        """How far this rank is; the trainer asks all of them."""
        if not self._in_flight:
            return Status.IDLE
        if self._thread is not None and self._thread.is_alive():
            return Status.WRITING
        return Status.WRITTEN if self._error is None else Status.FAILED

    def reserve(self, state: ShardedState) -> None:
        """Get the memory for copies of such a state now: the first save needs it in a hurry."""
        error = self._with_memory(lambda: self._snapshot.reserve(state.pieces))
        if error is not None:
            logger.warning("rank %d: %s", self.topology.rank, error)

    def begin(
        self,
        step: int,
        manifest_state: dict[str, Any],
        state: ShardedState,
        hold: int | None = None,
    ) -> None:
        """Start to save.  All ranks call it together, with nothing in flight.

        When it returns, ``state`` may change: what is written is what it is now.

        Args:
            step: completed steps.
            manifest_state: JSON values for the manifest.
            state: this rank's part.
            hold: the newest checkpoint of no more steps is kept, whatever ``keep`` says.
        """
        assert not self._in_flight, "a save is in flight"
        self._in_flight, self._step, self._hold = True, step, hold
        self._manifest_state, self._common = manifest_state, state.common
        self._written, self._thread = None, None
        self._error = self._prepare()
        if self._error is None:
            self._error = self._with_memory(lambda: self._snapshot.take(state.pieces))
        if self._error is not None:
            return
        objects = list(state.objects)
        if not self.asynchronous:
            self._write(objects)
            return
        thread = threading.Thread(
            target=self._write, args=(objects,), name="checkpoint", daemon=True
        )
        try:
            thread.start()
            self._thread = thread
        except RuntimeError as error:
            self._error = f"rank {self.topology.rank}: {error}"

    def _prepare(self) -> str | None:
        """Rank 0 makes the folder; everyone learns whether there is one."""
        name: str | None = None
        problem: str | None = None
        if self.topology.is_main:
            self._finish_removal()
            try:
                name = commit.prepare(self.root, self._step).name
            except OSError as error:
                problem = str(error)
        name, problem = self._from_main((name, problem))
        self._folder = None if name is None else self.root / name
        return problem

    def _from_main(self, said: _T) -> _T:
        """What rank 0 says, on every rank."""
        box = [said]
        if self.topology.world_size > 1:
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    @staticmethod
    def _with_memory(act: Callable[[], None]) -> str | None:
        try:
            act()
        except (MemoryError, RuntimeError) as error:
            # Host memory may be short; the next save may find more.
            return f"no host memory for a copy of the state: {error}"
        return None

    def _write(self, objects: list[str]) -> None:
        folder = self._folder
        assert folder is not None
        try:
            written = self._snapshot.write(folder, self.topology.rank, objects)
            if self.topology.is_main:
                written.files.update(describe(folder, self._common))
            self._written = written
        except Exception as error:
            # Whatever it is, it is this save's end and not the run's.
            self._error = f"rank {self.topology.rank}: {error}"

    def commit(self) -> Path | None:
        """End a save that every rank has written or failed at.  All ranks call it together.

        Returns:
            The checkpoint; None when it came to nothing, which is logged and counted.
        """
        if self._thread is not None:
            self._thread.join()
        mine = (self._written, self._error)
        everyone = [mine] * self.topology.world_size if self.topology.is_main else None
        if self.topology.world_size > 1:
            dist.gather_object(mine, everyone, dst=0, group=self._group)
        problem = self._from_main(None if everyone is None else self._commit_all(everyone))
        self._in_flight, self._thread, self._written = False, None, None
        if problem is None:
            return self.root / commit.checkpoint_name(self._step)
        self.failures += 1
        self.last_error = problem
        return None

    def wait(self) -> Path | None:
        """:meth:`commit` as soon as this and every other rank has written; None without a save.

        Old checkpoints are gone when it returns.
        """
        saved = self.commit() if self._in_flight else None
        self._finish_removal()
        return saved

    def close(self) -> None:
        """Wait a while for this rank's threads, whatever becomes of what they write."""
        for thread in (self._thread, self._removal):
            if thread is not None and thread.ident is not None:
                thread.join(LONGEST_CLOSE_S)

    def _finish_removal(self) -> None:
        if self._removal is not None and self._removal.ident is not None:
            self._removal.join()

    def _commit_all(self, everyone: list[tuple[Written | None, str | None]]) -> str | None:
        """Rank 0's part; gives what went wrong."""
        try:
            problems = [
                error or f"rank {rank}: wrote nothing"
                for rank, (written, error) in enumerate(everyone)
                if written is None
            ]
            if problems:
                raise OSError("; ".join(dict.fromkeys(problems)))
            assert self._folder is not None
            parts = [written for written, _ in everyone if written is not None]
            objects = {key: place for part in parts for key, place in part.objects.items()}
            entries = [entry for part in parts for entry in part.entries]
            write_index(self._folder / INDEX, entries, objects)
            files = {name: about for part in parts for name, about in part.files.items()}
            commit.commit(self._folder, self._step, self._manifest_state, files)
        except Exception as error:
            # The other ranks wait for the outcome, whatever it is.
            if self._folder is not None:
                commit.discard(self._folder)
            logger.error("checkpoint of step %d: not saved: %s", self._step, error)
            return str(error)
        try:
            old = commit.retain(self.root, self.keep, self.keep_every, self._step, self._hold)
            # The removal of large files takes longer than all of the above.
            self._removal = threading.Thread(
                target=commit.remove, args=(old,), name="old checkpoints", daemon=True
            )
            self._removal.start()
        except (OSError, RuntimeError) as error:
            logger.warning("%s: old checkpoints could not be removed: %s", self.root, error)
        return None


def describe(folder: Path, common: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """Write what a checkpoint needs beside tensors and their index.

    Args:
        folder: the checkpoint to be.
        common: JSON values that are the same on all ranks.

    Returns:
        Bytes and SHA-256 by name.
    """
    write_common(folder, dict(common))
    (folder / "metadata.json").write_text(_BACKEND, encoding="utf-8")
    # megatron-core does not read a checkpoint without it; nobody here ever opens it.
    torch.save({}, folder / "common.pt")
    names = (COMMON, "metadata.json", "common.pt")
    return {name: commit.flushed(folder / name) for name in names}


_BACKEND = (
    '{"sharded_backend": "torch_dist", "sharded_backend_version": 1, '
    '"common_backend": "torch", "common_backend_version": 1}'
)
"""``metadata.json``: what megatron-core reads a checkpoint with."""
