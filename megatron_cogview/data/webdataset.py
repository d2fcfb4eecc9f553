"""Reader of WebDataset tars, also as img2dataset writes them.

Looks at names, sizes and captions; decodes no picture and knows no tokenizer.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from megatron_cogview.configs.errors import DataError
from megatron_cogview.data.captions import DEFAULT_CAPTIONS, CaptionRule
from megatron_cogview.data.fields import Trouble, given_id, parse_object
from megatron_cogview.data.raw import (
    MAX_CAPTION_BYTES,
    MAX_IMAGE_BYTES,
    Part,
    RawPair,
    Rejected,
    is_plain_file,
    mode_of,
    names_in,
    printable,
    reading,
    size_of,
)
from megatron_cogview.data.tar_members import BLOCK, Member, TarDamage, compression_of, members
from megatron_cogview.storage.digest import sha256_file

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")

_BYTES_PER_PAIR = 100_000
"""Of a tar that says nothing of it itself; about what pictures of 256 to 512 pixels need."""
_LOOKED_AT = 1000
"""Pairs at the beginning in which a caption is looked for."""


class WebDatasetTars:
    """A folder of uncompressed tars with a picture (png, jpg, jpeg, webp) and ``.json`` or ``.txt``
    for each key; other members, and other files of the folder, are left alone.

    The id of a pair is the ``id`` of its JSON; without one it is ``TAR/KEY``, the name of the tar
    without ``.tar`` and the key, because two tars may hold the same key.  One tar is one part.
    """

    def __init__(self, path: Path, captions: CaptionRule = DEFAULT_CAPTIONS) -> None:
        """Take all ``*.tar`` of a folder, or one tar."""
        self.path = Path(path)
        self.captions = captions

    @property
    def description(self) -> dict[str, Any]:
        """Kind and caption rule."""
        return {"kind": "webdataset", **self.captions.description}

    def parts(self) -> list[Part]:
        """The tars in name order.

        Raises:
            DataError: no such folder, no tar in it, compressed ones, or one that cannot be read.
        """
        return [Part(p.name, p, size_of(p)) for p in tars_of(self.path)]

    def digest(self, part: Part) -> str:
        """SHA-256 of the tar.

        Raises:
            DataError: it cannot be read.
        """
        with reading(part.path):
            return sha256_file(part.path)

    def check(self) -> None:
        """Refuse a first tar that is compressed, and see :meth:`check_captions`.

        Raises:
            DataError: see there.
        """
        first = self.parts()[0].path
        with reading(first):
            problem = compression_of(first)
        if problem:
            raise DataError(f"{first}: {problem}")
        if self.captions.required:
            self.check_captions()

    def check_captions(self) -> None:
        """Look for a caption in the first tar that holds any text.

        Raises:
            DataError: none there; the message lists the JSON's keys.
        """
        for part in self.parts():
            seen: set[str] = set()
            texts = 0
            for fields, text in _texts(part.path, _LOOKED_AT):
                if not isinstance(self.captions.find(fields, text), Trouble):
                    return
                seen.update(fields or ())
                texts += 1
            if texts:
                break
        keys = printable(", ".join(sorted(seen)[:40])) or "none: it holds no readable .json"
        raise DataError(
            f"{part.path}: no pair has a caption; looked for the caption key "
            f"{self.captions.field!r} (caption_from = {self.captions.place!r}); keys there: {keys}"
        )

    def read(self, part: Part) -> Iterator[RawPair | Rejected]:
        """Pairs of one tar, in the order in which their keys first appear.

        Damage of the tar comes last, as one rejection of as many pairs as may lie behind it.

        Raises:
            DataError: the tar cannot be read, whatever its bytes are.
        """
        contents = _list(part.path)
        prefix = part.name.removesuffix(".tar")
        if contents.groups:
            with reading(part.path), open(part.path, "rb") as file:
                for key, group in contents.groups.items():
                    yield self._pair(file, part.name, f"{prefix}/{key}", group)
        for name in contents.unsafe:
            yield Rejected(name, "unsafe member name", part.name)
        if contents.damage:
            lost = contents.lost_pairs()
            yield Rejected(part.name, "damaged tar", part.name, contents.damage, lost)

    def texts(self, part: Part, rules: Sequence[CaptionRule]) -> Iterator[str]:
        """Captions of one tar by each of some rules, without touching its pictures."""
        for fields, text in _texts(part.path):
            for rule in rules:
                caption = rule.find(fields, text)
                if isinstance(caption, str):
                    yield caption

    def _pair(self, file: BinaryIO, source: str, name: str, group: "_Group") -> RawPair | Rejected:
        if group.duplicate:
            return Rejected(name, "duplicate member", source, group.duplicate)
        if large := group.too_large():
            return Rejected(name, "file too large", source, large)
        fields = None
        if group.json is not None:
            fields = parse_object(_content(file, group.json) or b"")
            if fields is None and self.captions.required:
                return Rejected(name, "invalid json", source)
            name = given_id((fields or {}).get("id")) or name
        if group.image is None:
            status = (fields or {}).get("status")
            # What img2dataset says of a picture that it could not fetch.
            detail = f"status {status!r}" if isinstance(status, str) else ""
            return Rejected(name, "no image", source, printable(detail))
        text = None
        if group.txt is not None:
            text = _content(file, group.txt)
            if text is None and self.captions.required:
                return Rejected(name, "truncated text", source)
        caption = self.captions.find(fields, text)
        if isinstance(caption, Trouble):
            return Rejected(name, caption.reason, source, printable(caption.detail))
        image = _content(file, group.image)
        if image is None:
            return Rejected(name, "truncated image", source)
        return RawPair(name, image, caption, source)


def tars_of(path: Path) -> list[Path]:
    """The tars of a folder in name order, or the one tar that is named.

    Raises:
        DataError: neither, compressed ones, or what there is cannot be found out.
    """
    mode = mode_of(path)
    if not stat.S_ISDIR(mode):
        if not stat.S_ISREG(mode):
            raise DataError(f"{path}: no such folder or tar")
        found, compressed = [path], path if path.name.endswith(COMPRESSED_SUFFIXES) else None
    else:
        names = names_in(path)
        tars = (path / name for name in names if name.endswith(".tar"))
        found = [tar for tar in tars if is_plain_file(tar)]
        compressed = next((path / n for n in names if n.endswith(COMPRESSED_SUFFIXES)), None)
    if compressed is not None:
        raise DataError(
            f"{compressed}: compressed tars are not read; uncompress them (gunzip, bunzip2, unxz, "
            "unzstd) or move them away"
        )
    if not found:
        raise DataError(f"{path}: holds no *.tar; expected WebDataset tars")
    return found


class _Place(NamedTuple):
    """Where a member's content lies."""

    offset: int
    size: int


@dataclass(slots=True)
class _Group:
    """Members of one key."""

    image: _Place | None = None
    json: _Place | None = None
    txt: _Place | None = None
    duplicate: str = ""

    def add(self, extension: str, place: _Place) -> None:
        slot = "image" if extension in IMAGE_EXTENSIONS else extension
        if slot not in ("image", "json", "txt"):
            return
        if getattr(self, slot) is not None:
            self.duplicate = "two images" if slot == "image" else f"two .{slot}"
        setattr(self, slot, place)

    def too_large(self) -> str:
        """What is over its limit, according to the headers."""
        limits = {"image": MAX_IMAGE_BYTES, "json": MAX_CAPTION_BYTES, "txt": MAX_CAPTION_BYTES}
        for slot, limit in limits.items():
            place = getattr(self, slot)
            if place is not None and place.size > limit:
                return f"{slot} of {place.size} bytes, limit {limit}"
        return ""


@dataclass(slots=True)
class _Contents:
    """Table of contents of one tar."""

    groups: dict[str, _Group] = field(default_factory=dict)
    unsafe: list[str] = field(default_factory=list)
    damage: str = ""
    readable: int = 0
    """Bytes before the damage."""
    unreadable: int = 0
    """Bytes behind it."""

    def lost_pairs(self) -> int:
        """Pairs that the bytes behind the damage may hold, by the mean of those before it.

        At least 1.  What a tar that was cut off has lost is not in its bytes, and does not count.
        """
        ends = (g.image.offset + g.image.size for g in self.groups.values() if g.image is not None)
        pairs = sum(end <= self.readable for end in ends)
        mean = self.readable / pairs if pairs else _BYTES_PER_PAIR
        return max(1, round(self.unreadable / mean))


def _list(path: Path) -> _Contents:
    """Read the headers only; stop at damage and say where.

    Raises:
        DataError: the file cannot be read.
    """
    contents = _Contents()
    with reading(path):
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            try:
                for member in members(file):
                    _sort_in(contents, member)
                    end = member.offset + member.size
                    # What claims to end behind the file's end is damaged itself.
                    if end <= size:
                        contents.readable = min(-(-end // BLOCK) * BLOCK, size)
            except TarDamage as damage:
                contents.damage = str(damage)
                contents.unreadable = size - contents.readable
        if contents.damage and not contents.groups:
            contents.damage = compression_of(path) or contents.damage
    return contents


def _sort_in(contents: _Contents, member: Member) -> None:
    if member.is_folder:
        return
    name = PurePosixPath(member.name)
    if not member.is_regular or name.is_absolute() or ".." in name.parts or "\0" in member.name:
        contents.unsafe.append(printable(member.name))
        return
    # WebDataset's rule: the key ends at the first dot of the file name.
    stem, _, extension = name.name.partition(".")
    key = printable(str(name.parent / stem))
    place = _Place(member.offset, member.size)
    contents.groups.setdefault(key, _Group()).add(extension.lower(), place)


def _texts(
    path: Path, limit: int | None = None
) -> Iterator[tuple[dict[str, Any] | None, bytes | None]]:
    """JSON object and text file of each key that has one of them, of the first ``limit`` keys."""
    groups = _list(path).groups
    if not groups:
        return
    with reading(path), open(path, "rb") as file:
        for group in islice(groups.values(), limit):
            if group.duplicate or group.too_large():
                continue
            fields = parse_object(_content(file, group.json) or b"") if group.json else None
            text = _content(file, group.txt) if group.txt else None
            if fields is not None or text is not None:
                yield fields, text


def _content(file: BinaryIO, place: _Place) -> bytes | None:
    """Content of a member, or None where the tar ends before it does."""
    file.seek(place.offset)
    data = file.read(place.size)
    return data if len(data) == place.size else None
