"""Locks on numbered pieces of work, shared by processes on one or several machines.

Each number is one byte of a lock file, held as a POSIX record lock: the kernel gives it back when
its holder dies, however that happens, and network file systems carry it from machine to machine.
Locks save double work; what is written under them must be harmless to write twice.
"""

import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path

from megatron_cogview.configs.errors import DataError

logger = logging.getLogger(__name__)

_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class WorkLocks:
    """The lock file of one folder.

    A process must open it only once: POSIX gives all locks back when any handle is closed.
    """

    def __init__(self, path: Path) -> None:
        """Open the lock file, creating it if there is none; nothing is locked yet."""
        self.path = Path(path)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.supported = True
        """Whether the file system can lock, as far as is known; without, every lock is granted."""

    def close(self) -> None:
        """Give everything back."""
        os.close(self._descriptor)

    def take(self, numbers: Iterable[int], patience_seconds: float = 0.0) -> None:
        """Take all of these numbers or none, trying for a while if need be.

        Raises:
            DataError: another live process holds one of them.
        """
        wanted = list(numbers)
        deadline = time.monotonic() + patience_seconds
        while (held := self._take(wanted)) is not None:
            if time.monotonic() >= deadline:
                raise DataError(
                    f"{self.path.parent}: piece {held} is being worked on by another live process; "
                    "wait for it, give each process its own --worker, or, if its machine has just "
                    "died and the folder is on a network, --wait-for-locks 180"
                )
            logger.info("%s: piece %d is held by another process; waiting", self.path, held)
            time.sleep(min(5.0, max(0.1, deadline - time.monotonic())))

    def _take(self, numbers: list[int]) -> int | None:
        """The number that stood in the way, or None."""
        for place, number in enumerate(numbers):
            if not self._lock(number, fcntl.LOCK_EX | fcntl.LOCK_NB):
                self.give_back(numbers[:place])
                return number
        return None

    def wait_for(self, number: int) -> None:
        """Take one number, waiting for its holder."""
        if not self._lock(number, fcntl.LOCK_EX | fcntl.LOCK_NB):
            logger.info("%s: waiting for another process", self.path)
            self._lock(number, fcntl.LOCK_EX)

    def give_back(self, numbers: Iterable[int]) -> None:
        """Release numbers; one that is not held is passed over."""
        for number in numbers:
            self._lock(number, fcntl.LOCK_UN)

    def _lock(self, number: int, operation: int) -> bool:
        try:
            fcntl.lockf(self._descriptor, operation, 1, number)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in _UNSUPPORTED:
                raise
            if self.supported:
                logger.warning("%s: this file system cannot lock (%s)", self.path, error)
                self.supported = False
        return True
