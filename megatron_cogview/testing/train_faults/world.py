"""Worlds of ranks that start in a tenth of a second: forked from a process that has loaded all.

The parent must never run a backward pass or start a thread: neither survives a fork.  A campaign
therefore is a process of its own.
"""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist

from megatron_cogview.testing.data_faults import journal

Rank = Callable[[int], int]
"""What a rank does; gets its number and gives its exit code."""

_DIED_OF_AN_ERROR = 99


class World:
    """Ranks at work; leaving the block kills what is left of them.

    Args:
        size: how many.
        work: what each does, with ``torch.distributed`` set up.
        log: file that takes what they print.
    """

    def __init__(self, size: int, work: Rank, log: Path) -> None:
        self.size, self.log = size, log
        self._store = tempfile.mkdtemp(prefix="cogview-world-")
        self._codes: dict[int, int] = {}
        sys.stdout.flush()
        self.pids = [self._fork(rank, work) for rank in range(size)]

    def _fork(self, rank: int, work: Rank) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = _DIED_OF_AN_ERROR
        try:
            os.setsid()
            output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(output, 1)
            os.dup2(output, 2)
            torch.set_num_threads(1)
            journal.after_fork()
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(self.size), LOCAL_RANK=str(rank))
            dist.init_process_group(
                "gloo", init_method=f"file://{self._store}/store", rank=rank, world_size=self.size
            )
            code = work(rank)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            # Past every handler and destructor of the parent that this process has copies of.
            os._exit(code)

    def signal(self, number: int, *ranks: int) -> None:
        """Send a signal to these ranks and what they started, or to all."""
        for rank in ranks or range(self.size):
            # It may have ended, or not yet have its group.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pids[rank], number)

    def codes(self) -> list[int | None]:
        """Exit code of each rank (minus the signal that killed it); None while it runs."""
        for rank, pid in enumerate(self.pids):
            if rank not in self._codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self._codes[rank] = os.waitstatus_to_exitcode(status)
        return [self._codes.get(rank) for rank in range(self.size)]

    def wait(self, seconds: float, until: Callable[[], bool] | None = None) -> bool:
        """Until ``until`` holds, without one until all ranks have ended.

        Returns:
            False when that took too long, or when they ended before ``until`` held.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if until is not None and until():
                return True
            codes = self.codes()
            if None not in codes:
                return until is None
            time.sleep(0.002)
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.signal(signal.SIGKILL)
        self.signal(signal.SIGCONT)
        while None in self.codes():
            time.sleep(0.002)
        shutil.rmtree(self._store, ignore_errors=True)
