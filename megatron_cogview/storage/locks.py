"""Locks on numbered pieces of work, shared by processes on one or several machines.

Each number is one byte of a lock file, held as a POSIX record lock: the kernel gives it back when
its holder dies, however that happens, and network file systems carry it from machine to machine.
Locks save double work; what is written under them must be harmless to write twice.
"""

import errno
import fcntl
import logging
import os
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
        self._warned = False

    def close(self) -> None:
        """Give everything back."""
        os.close(self._descriptor)

    def take(self, numbers: Iterable[int]) -> None:
        """Take all of these numbers or none.

        Raises:
            DataError: another live process holds one of them.
        """
        taken: list[int] = []
        for number in numbers:
            if not self._lock(number, fcntl.LOCK_EX | fcntl.LOCK_NB):
                self.give_back(taken)
                raise DataError(
                    f"{self.path.parent}: piece {number} is being worked on by another live "
                    "process; wait for it, or give each process its own --worker"
                )
            taken.append(number)

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
            if not self._warned:
                logger.warning("%s: this file system cannot lock (%s)", self.path, error)
                self._warned = True
        return True
