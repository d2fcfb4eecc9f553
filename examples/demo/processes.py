"""One child process with all its descendants: output copied, memory measured, none left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

GRACE_SECONDS = 10.0
"""Between the request to end and the kill."""
_PR_SET_PDEATHSIG = 1


class Child:
    """A command in a session of its own; whatever it started ends with the ``with`` block.

    Its output goes to this program's and, appended, to a log.
    """

    def __init__(self, argv: list[str], cwd: Path, environment: dict[str, str], log: Path) -> None:
        self.log = log.open("ab")
        self.process = subprocess.Popen(
            argv,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        # torchrun's workers have sessions of their own and outlive a killed launcher, so each
        # descendant is remembered from the moment it is seen.
        self.seen: dict[int, psutil.Process] = {}
        self.copier = threading.Thread(target=self._copy, daemon=True)
        self.copier.start()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.family()
        _end(list(self.seen.values()))
        self.process.wait()
        self.copier.join(timeout=GRACE_SECONDS)
        self.log.close()

    def wait(self, seconds: float) -> int | None:
        """The exit code, or None if it still runs after so long."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def family(self) -> list[psutil.Process]:
        """The child and its descendants that live."""
        with contextlib.suppress(psutil.NoSuchProcess):
            head = psutil.Process(self.process.pid)
            for process in (head, *head.children(recursive=True)):
                self.seen.setdefault(process.pid, process)
        self.seen = {pid: process for pid, process in self.seen.items() if process.is_running()}
        return list(self.seen.values())

    def identities(self) -> list[tuple[int, float]]:
        """Process ids with start times, which together name a process for good."""
        found = []
        for process in self.seen.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append((process.pid, process.create_time()))
        return found

    def _copy(self) -> None:
        assert self.process.stdout is not None
        while data := os.read(self.process.stdout.fileno(), 1 << 16):
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
            self.log.write(data)
            self.log.flush()


def peak_of(child: Child) -> int:
    """Bytes of memory (RSS) of the child, its descendants and this program, added up, now."""
    total = 0
    for process in (psutil.Process(), *child.family()):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += process.memory_info().rss
    return total


def end_leftovers(identities: list[tuple[int, float]]) -> bool:
    """End those of the processes that still run; whether there were any."""
    alive = []
    for pid, started in identities:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            # A dead process that nobody has waited for keeps its place in the table.
            dead = process.status() == psutil.STATUS_ZOMBIE
            if abs(process.create_time() - started) < 0.01 and not dead:
                alive.append(process)
    _end(alive)
    return bool(alive)


def _end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, stubborn = psutil.wait_procs(processes, timeout=GRACE_SECONDS)
    for process in stubborn:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(stubborn, timeout=GRACE_SECONDS)


def _die_with_parent() -> None:
    """In the child: the kernel ends it when the demo is killed and cannot."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
