"""Files and folders that appear whole or not at all, also after ``kill -9`` or a power cut.

Everything is written under a temporary name in the target's own folder, flushed to the disk and
renamed.  Knows nothing of what is written.
"""

import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megatron_cogview.configs.errors import DataError

logger = logging.getLogger(__name__)

TEMPORARY_NAME = re.compile(r"\.(.+)\.[0-9a-f]{16}\.tmp")
"""Names used while writing; what a killed process leaves behind."""


def fsync_directory(path: Path) -> None:
    """Flush a folder's entries, so that a rename inside it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that takes the place of ``path`` when the block ends without an error.

    Until then ``path`` keeps its old content.  The file gets ordinary permissions (the umask's).
    """
    path = Path(path)
    temporary = _temporary_sibling(path)
    # 0o666 under the umask: tempfile's 0o600 would hide shards from the user's colleagues.
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``."""
    with replacing(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


@contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes ``path`` when the block ends without an error.

    Raises:
        FileExistsError: ``path`` exists, before or after the block; nothing is ever overwritten.
    """
    path = Path(path)
    _refuse_existing(path)
    temporary = _temporary_sibling(path)
    temporary.mkdir()
    try:
        yield temporary
        _fsync_tree(temporary)
        _refuse_existing(path)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_directory(path.parent)


def remove_stale(folder: Path, is_ours: Callable[[str], bool]) -> int:
    """Remove what killed processes left of files with our names; call only under their lock."""
    removed = 0
    for entry in folder.iterdir():
        found = TEMPORARY_NAME.fullmatch(entry.name)
        if found and is_ours(found[1]) and entry.is_file():
            entry.unlink()
            removed += 1
    return removed


@contextmanager
def locked_directory(folder: Path) -> Iterator[None]:
    """Keep other processes of this kind out of ``folder``; the kernel frees it when we die.

    Raises:
        DataError: another live process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{folder}: another process is writing here; wait for it or choose another folder"
            ) from None
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            # Some network file systems cannot lock a folder.
            logger.warning("%s: cannot be locked (%s); run one writer only", folder, error)
        yield
    finally:
        os.close(descriptor)


def _temporary_sibling(path: Path) -> Path:
    return path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"


def _refuse_existing(path: Path) -> None:
    # rename(2) would replace an empty folder without a word.
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, "already exists", str(path))


def _fsync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        fsync_directory(Path(folder))
