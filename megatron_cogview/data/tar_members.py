"""The members of an uncompressed tar, by reading its headers only.

The standard library parses each header; the walk from one to the next is here, because that of
``tarfile`` trusts the sizes it reads: a damaged or hostile one makes it allocate gigabytes, walk
in a circle (CVE-2025-8194) or search for hours (CVE-2024-6232), and it takes a damaged header for
the end of the archive.  Here memory and time are bounded, and damage is reported.

Knows nothing of what members are for.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

BLOCK = tarfile.BLOCKSIZE
MAX_HEADER_BYTES = 64 << 10
"""Long names and extended headers; no path is as long."""
MAX_MEMBERS = 1_000_000
"""Members of one tar; bounds the memory of its table of contents."""
LOOK_BEHIND_END = 1 << 20
"""Bytes after the end mark in which another archive is looked for."""

_WITHOUT_DATA = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)
_EXTENSIONS = (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_COMPRESSIONS = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}


class TarDamage(Exception):
    """Where and why a tar cannot be read any further."""


@dataclass(frozen=True, slots=True)
class Member:
    """One entry of a tar."""

    name: str
    """As written; bytes that are not UTF-8 are half surrogate pairs."""
    kind: bytes
    """Type flag of the header; that of a sparse file also where an extended header says so."""
    offset: int
    """First byte of the content."""
    size: int
    """Bytes of content according to the header; the file may end before."""

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder."""
        return self.kind == tarfile.DIRTYPE

    @property
    def is_regular(self) -> bool:
        """Whether it is a plain file: no link, device, pipe or sparse file."""
        return self.kind in (tarfile.REGTYPE, tarfile.AREGTYPE)


def compression_of(path: Path) -> str:
    """What is wrong with a tar that is compressed, and the command that mends it; "" if it is not.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        start = file.read(8)
    for magic, (name, command) in _COMPRESSIONS.items():
        if start.startswith(magic):
            return f"compressed with {name}; uncompress it with {command}"
    return ""


def members(file: BinaryIO) -> Iterator[Member]:
    """Members in their order.

    Raises:
        TarDamage: the archive does not end with its end mark, or something lies behind it.
        OSError: the file cannot be read.
    """
    position = count = 0
    extended: dict[str, str] = {}
    while True:
        block = _read(file, position, BLOCK)
        if block == bytes(BLOCK):
            _check_end(file, position, count)
            return
        header = _parse(block, count)
        position += BLOCK
        if header.type in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            position += _padded(header.size, count)
            continue
        if header.type in _EXTENSIONS:
            extended |= _extension(file, position, header, count)
            position += _padded(header.size, count)
            continue
        if header.type == tarfile.GNUTYPE_SPARSE:
            raise TarDamage(f"member {count + 1} is a sparse file; the rest is left out")
        count += 1
        if count > MAX_MEMBERS:
            raise TarDamage(f"more than {MAX_MEMBERS} members; the rest is left out")
        size = 0 if header.type in _WITHOUT_DATA else _size(header, extended, count)
        kind = tarfile.GNUTYPE_SPARSE if "sparse" in extended else header.type
        following = position + _padded(size, count - 1)
        yield Member(extended.get("path", header.name), kind, position, size)
        position = following
        extended = {}


def _read(file: BinaryIO, position: int, size: int) -> bytes:
    file.seek(position)
    return file.read(size)


def _parse(block: bytes, count: int) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError, OverflowError):
        raise TarDamage(f"no end mark after member {count}; the rest is lost") from None


def _padded(size: int, count: int) -> int:
    # A size in base 256 can be negative, or larger than any file.
    if not 0 <= size < 1 << 62:
        raise TarDamage(f"impossible size after member {count}; the rest is lost")
    return -(-size // BLOCK) * BLOCK


def _size(header: tarfile.TarInfo, extended: dict[str, str], count: int) -> int:
    text = extended.get("size")
    if text is None:
        return header.size
    if not text.isascii() or not text.isdigit() or len(text) > 20:
        raise TarDamage(f"impossible size of member {count}; the rest is lost")
    return int(text)


def _extension(
    file: BinaryIO, position: int, header: tarfile.TarInfo, count: int
) -> dict[str, str]:
    """Path, size and whether it is sparse, as far as an extended header of any kind says so."""
    if not 0 <= header.size <= MAX_HEADER_BYTES:
        raise TarDamage(f"header of {header.size} bytes after member {count}; the rest is lost")
    data = _read(file, position, header.size)
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": _text(data.partition(b"\0")[0])}
    found: dict[str, str] = {}
    # Records "LENGTH KEY=VALUE\n", whose length counts all of it.
    start = 0
    while start < len(data):
        digits = data[start : start + 8].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        record = data[start + len(digits) + 1 : start + length]
        if length <= len(digits) + 1 or not record.endswith(b"\n"):
            raise TarDamage(f"damaged extended header after member {count}; the rest is lost")
        key, _, value = record[:-1].partition(b"=")
        if key in (b"path", b"size"):
            found[key.decode()] = _text(value)
        elif key.startswith(b"GNU.sparse."):
            found["sparse"] = ""
        start += length
    return found


def _check_end(file: BinaryIO, position: int, count: int) -> None:
    """Archives put one behind the other look like the first one alone."""
    if _read(file, position, LOOK_BEHIND_END).strip(b"\0"):
        raise TarDamage(
            f"more data behind the end mark after member {count}, as if tars had been "
            "concatenated; unpack them and pack them as one"
        )


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")
