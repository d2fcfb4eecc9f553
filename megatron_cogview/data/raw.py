"""What a source of image-text pairs is: the values it yields and the protocol it follows.

A source cuts its data into parts.  A part becomes one shard, is read by one worker from start to
end, and is committed as a whole.  Sources look at names, sizes and captions; they decode no
picture and know no tokenizer.  A further source is one class with the methods of
:class:`PairSource`.

A rejection is committed for ever, so only what the data themselves say may become one.  What the
machine says (a disk, a network, no more files) stops the run: see :func:`reading`.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_cogview.configs.errors import DataError

MAX_IMAGE_BYTES = 64 << 20
"""A larger encoded picture is rejected before it is read."""
MAX_CAPTION_BYTES = 1 << 20
"""A larger caption file or table row is rejected."""


@dataclass(frozen=True, slots=True)
class Part:
    """One unit of work."""

    name: str
    """Name that does not depend on where the data lies: ``00001.tar``, ``pairs.csv#3``."""
    path: Path
    """File to read."""
    num_bytes: int
    """Size of the part in that file, for progress and as a first check that it is the same."""
    start: int = 0
    """First byte of the part in the file."""
    num_pairs: int = 0
    """Pairs in it, rejected ones included, where the source knows without reading them; else 0.
    For progress: empty rows of a table count, though they give no pair."""


@dataclass(frozen=True, slots=True)
class RawPair:
    """One picture, still encoded, and its caption."""

    id: str
    """Stable name of the pair; its hash goes into the shard and decides the split."""
    image: bytes
    """PNG, JPEG or WebP."""
    caption: str
    """As it stands in the source."""
    source: str
    """Name of the part it came from."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A pair that cannot be used."""

    id: str
    """Its id, or its key where the id is unknown."""
    reason: str
    """One of a few fixed phrases, by which rejections are counted."""
    source: str
    """Name of the part it came from."""
    detail: str = ""
    """What exactly; the same on every run."""
    pairs: int = 1
    """Pairs that are lost with it; an estimate where they cannot be counted."""


class PairSource(Protocol):
    """Pairs in parts that are each read from start to end.

    All methods raise :class:`DataError`, and no ``OSError``, where a file cannot be read.
    """

    @property
    def description(self) -> dict[str, Any]:
        """Plain values that decide what is read; a part of the shards' provenance."""

    def parts(self) -> list[Part]:
        """All parts in a fixed order, to which data added later is appended."""

    def read(self, part: Part) -> Iterator[RawPair | Rejected]:
        """Pairs of one part in a fixed order."""

    def digest(self, part: Part) -> str:
        """SHA-256 of the bytes that decide what :meth:`read` gives, lower-case hex."""

    def check(self) -> None:
        """Refuse a source whose beginning shows that nothing can be read."""


def printable(text: str) -> str:
    """Text without half surrogate pairs (from bad UTF-8 or bad JSON), which cannot be written."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Read ``path``: an ``OSError`` stops the run, because it may be over when that is repeated.

    Raises:
        DataError: instead of any ``OSError``, with the file and the system's words.
    """
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}); see to the file or what it lies "
            "on, and run the same command again"
        ) from None


def mode_of(path: Path) -> int:
    """Type and permissions as ``stat`` gives them, of what a link leads to; 0 where nothing is.

    Raises:
        DataError: it cannot be found out, which does not mean that nothing is there.
    """
    with reading(path):
        try:
            return os.stat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return 0


def names_in(folder: Path) -> list[str]:
    """Names in a folder, sorted.

    Raises:
        DataError: it cannot be listed.
    """
    with reading(folder):
        return sorted(os.listdir(folder))


def is_plain_file(path: Path) -> bool:
    """Whether a path that was listed is a plain file, or a link to one.

    Raises:
        DataError: it cannot be found out; so for a link that leads nowhere, perhaps for now.
    """
    with reading(path):
        return stat.S_ISREG(os.stat(path).st_mode)


def size_of(path: Path) -> int:
    """Bytes of a file.

    Raises:
        DataError: it cannot be found out.
    """
    with reading(path):
        return os.stat(path).st_size
