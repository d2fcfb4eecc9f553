"""Readers of image-text pairs: WebDataset tars.

A reader yields :class:`RawPair` or :class:`Rejected` and raises only where the job cannot go on.
It looks at names, sizes and JSON; it decodes no picture and knows no tokenizer.  A further source
is one class with the methods of :class:`PairSource`.
"""

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from megatron_cogview.configs.errors import DataError

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
MAX_IMAGE_BYTES = 64 << 20
MAX_JSON_BYTES = 1 << 20
MAX_MEMBERS = 1_000_000
"""Members of one tar; bounds the memory of its table of contents."""

DAMAGED = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, RecursionError)
"""What tarfile raises on damaged input."""


@dataclass(frozen=True, slots=True)
class RawPair:
    """One picture, still encoded, and its caption."""

    id: str
    """Stable name of the pair; its hash goes into the shard."""
    image: bytes
    """PNG, JPEG or WebP."""
    caption: str
    """As it stands in the source."""
    source: str
    """Name of the file it came from."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A pair that cannot be used."""

    id: str
    """Its id, or its key where the id is unknown."""
    reason: str
    """One of a few fixed phrases, by which rejections are counted."""
    source: str
    """Name of the file it came from."""
    detail: str = ""
    """What exactly; the same on every run."""


class PairSource(Protocol):
    """Pairs in files that are each read from start to end."""

    @property
    def description(self) -> dict[str, Any]:
        """Plain values that decide what is read; a part of the shards' provenance."""

    def shards(self) -> list[Path]:
        """Input files in a fixed order."""

    def read(self, path: Path) -> Iterator[RawPair | Rejected]:
        """Pairs of one file in a fixed order."""

    def check(self) -> None:
        """Refuse a source whose first file shows that nothing can be read."""


class WebDatasetTars:
    """A folder of uncompressed tars with ``KEY.jpg`` (png, jpeg, webp) and ``KEY.json``."""

    def __init__(self, folder: Path, caption_key: str = "caption") -> None:
        """Take all ``*.tar`` of ``folder``; the caption is the JSON's ``caption_key``."""
        self.folder = Path(folder)
        self.caption_key = caption_key

    @property
    def description(self) -> dict[str, Any]:
        """Kind and caption key."""
        return {"kind": "webdataset", "caption_key": self.caption_key}

    def shards(self) -> list[Path]:
        """The tars in name order.

        Raises:
            DataError: no such folder, or no tar in it.
        """
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: no such folder")
        tars = sorted(p for p in self.folder.glob("*.tar") if p.is_file())
        if not tars:
            raise DataError(f"{self.folder}: holds no *.tar; expected WebDataset tars")
        return tars

    def check(self) -> None:
        """Look for the caption key in the first tar.

        Raises:
            DataError: no JSON of the first tar has it; the message lists the keys there are.
        """
        first = self.shards()[0]
        seen: set[str] = set()
        for _, value in _json_members(first):
            if self.caption_key in value:
                return
            seen.update(value)
        keys = ", ".join(sorted(seen)[:40]) or "none: it holds no readable .json"
        raise DataError(
            f"{first}: no pair has the caption key {self.caption_key!r}; keys there: {keys}"
        )

    def read(self, path: Path) -> Iterator[RawPair | Rejected]:
        """Pairs of one tar, in the order in which their keys first appear."""
        contents = _list(path)
        if contents.groups:
            with tarfile.open(path, mode="r:") as tar:
                for key, group in contents.groups.items():
                    yield self._pair(tar, path.name, key, group)
        for name in contents.unsafe:
            yield Rejected(name, "unsafe member name", path.name)
        if contents.damage:
            yield Rejected(path.name, "damaged tar", path.name, contents.damage)

    def _pair(
        self, tar: tarfile.TarFile, source: str, key: str, group: "_Group"
    ) -> RawPair | Rejected:
        if group.duplicate:
            return Rejected(key, "duplicate member", source, group.duplicate)
        if group.image is None:
            return Rejected(key, "no image", source)
        if group.json is None:
            return Rejected(key, "no json", source)
        if group.image.size > MAX_IMAGE_BYTES or group.json.size > MAX_JSON_BYTES:
            sizes = f"image {group.image.size} bytes, json {group.json.size} bytes"
            return Rejected(key, "file too large", source, sizes)
        text, image = _extract(tar, group.json), _extract(tar, group.image)
        value = _parse_object(text) if text is not None else None
        if value is None:
            return Rejected(key, "invalid json", source)
        given = value.get("id")
        name = _printable(str(given)) if isinstance(given, str | int) and given != "" else key
        if image is None:
            return Rejected(name, "truncated image", source)
        if self.caption_key not in value:
            return Rejected(name, "no caption", source, f"no key {self.caption_key!r}")
        caption = value[self.caption_key]
        if not isinstance(caption, str):
            return Rejected(name, "caption is not text", source, type(caption).__name__)
        if _printable(caption) != caption:
            return Rejected(name, "caption is not valid Unicode", source)
        return RawPair(name, image, caption, source)


def read_captions(folder: Path, keys: Sequence[str]) -> Iterator[str]:
    """Captions under each of ``keys`` from all tars of a folder, without touching the pictures.

    Raises:
        DataError: no tars, or a key that no pair of the first tar has.
    """
    sources = [WebDatasetTars(folder, key) for key in keys]
    for source in sources:
        source.check()
    for path in sources[0].shards():
        for _, value in _json_members(path):
            for key in keys:
                caption = value.get(key)
                if isinstance(caption, str) and _printable(caption) == caption:
                    yield caption


@dataclass(slots=True)
class _Group:
    """Members of one key."""

    image: tarfile.TarInfo | None = None
    json: tarfile.TarInfo | None = None
    duplicate: str = ""

    def add(self, extension: str, member: tarfile.TarInfo) -> None:
        if extension == "json":
            if self.json is not None:
                self.duplicate = "two .json"
            self.json = member
        elif extension in IMAGE_EXTENSIONS:
            if self.image is not None:
                self.duplicate = "two images"
            self.image = member


@dataclass(slots=True)
class _Contents:
    """Table of contents of one tar."""

    groups: dict[str, _Group] = field(default_factory=dict)
    unsafe: list[str] = field(default_factory=list)
    damage: str = ""


def _list(path: Path) -> _Contents:
    """Read the headers only; stop at damage and say where."""
    contents = _Contents()
    count = 0
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                count += 1
                if count > MAX_MEMBERS:
                    contents.damage = f"more than {MAX_MEMBERS} members; the rest is left out"
                    return contents
                _sort_in(contents, member)
            end = tar.offset
        # tarfile takes a damaged header for the end of the archive and says nothing.
        with open(path, "rb") as file:
            file.seek(end)
            if file.read(512) != bytes(512):
                contents.damage = f"no end mark after member {count}; the rest is lost"
    except DAMAGED:
        contents.damage = f"unreadable after member {count}"
    return contents


def _sort_in(contents: _Contents, member: tarfile.TarInfo) -> None:
    if member.isdir():
        return
    name = PurePosixPath(member.name)
    regular = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE)
    if not regular or name.is_absolute() or ".." in name.parts or "\0" in member.name:
        contents.unsafe.append(_printable(member.name))
        return
    # WebDataset's rule: the key ends at the first dot of the file name.
    stem, _, extension = name.name.partition(".")
    key = _printable(str(name.parent / stem))
    contents.groups.setdefault(key, _Group()).add(extension.lower(), member)


def _json_members(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Readable JSON objects of one tar with their keys."""
    groups = _list(path).groups
    if not groups:
        return
    with tarfile.open(path, mode="r:") as tar:
        for key, group in groups.items():
            if group.json is None or group.json.size > MAX_JSON_BYTES:
                continue
            text = _extract(tar, group.json)
            value = _parse_object(text) if text is not None else None
            if value is not None:
                yield key, value


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    """Content of a regular member, or None where the tar ends before it does."""
    try:
        file = tar.extractfile(member)
        data = file.read() if file is not None else None
    except DAMAGED:
        return None
    return data if data is not None and len(data) == member.size else None


def _parse_object(text: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _printable(text: str) -> str:
    """Text without half surrogate pairs (from bad UTF-8 or bad JSON), which cannot be written."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
