"""Captions by id from one file of any size, in 16 bytes of memory a line.

Knows ids and captions, no source.
"""

import hashlib
import logging
import os
import weakref
from array import array
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_cogview.configs.errors import DataError
from megatron_cogview.data.fields import given_id, parse_object
from megatron_cogview.data.raw import MAX_CAPTION_BYTES, printable, reading
from megatron_cogview.data.shards import sample_id

logger = logging.getLogger(__name__)

_BOM = b"\xef\xbb\xbf"
_READ_BYTES = 4096
"""First read of a line; most captions are shorter."""


class CaptionMap:
    """Lines of a ``.jsonl`` (``{"id": ..., "caption": ...}``) or ``.tsv`` (id, tab, caption; no
    header, no quoting), found by id.

    Memory holds a hash and the place of each line, 16 bytes together and twice as much while the
    file is being indexed; captions stay in the file, which must not change meanwhile.
    """

    def __init__(self, path: Path) -> None:
        """Read the file once, to index it and to hash it.

        Raises:
            DataError: cannot be read, is empty, has a line that is no entry, or two with one id.
        """
        self.path = Path(path)
        if self.path.suffix.lower() not in (".jsonl", ".tsv"):
            raise DataError(f"{self.path}: a caption map must be a .jsonl or a .tsv file")
        self._is_json = self.path.suffix.lower() == ".jsonl"
        self.first_id = ""
        """Id of the first line, for messages."""
        self.fingerprint = ""
        """SHA-256 of the file."""
        with reading(self.path):
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._descriptor)
            self._hashes_N, self._offsets_N = self._index()
            self._refuse_repeated_ids()

    def __len__(self) -> int:
        """Entries."""
        return len(self._hashes_N)

    def replace(self, name: str, caption: str) -> tuple[str, bool]:
        """The caption for an id and True; if the map has none, the given one and False.

        Raises:
            DataError: the file cannot be read, or has been changed or cut since it was indexed.
        """
        wanted = np.uint64(sample_id(name))
        place = int(np.searchsorted(self._hashes_N, wanted))
        while place < len(self) and self._hashes_N[place] == wanted:
            found, new = self._entry(int(self._offsets_N[place]))
            if found == name:
                return new, True
            place += 1
        return caption, False

    def _index(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        hashes, offsets = array("Q"), array("q")
        digest = hashlib.sha256()
        position = 0
        # Its own descriptor: that of lookups has no position.
        with (
            open(self.path, "rb") as file,
            tqdm(
                total=os.fstat(self._descriptor).st_size,
                desc=f"indexing {self.path.name}",
                unit="B",
                unit_scale=True,
                mininterval=1.0,
                delay=5.0,
            ) as bar,
        ):
            number = 0
            while line := file.readline(MAX_CAPTION_BYTES + 1):
                number += 1
                digest.update(line)
                if line.strip():
                    entry = self._parse(line, first=position == 0)
                    if isinstance(entry, str):
                        raise DataError(f"{self.path}: line {number}: {entry}")
                    self.first_id = self.first_id or entry[0]
                    hashes.append(sample_id(entry[0]))
                    offsets.append(position)
                position += len(line)
                bar.update(len(line))
        if not hashes:
            raise DataError(f"{self.path}: holds no captions")
        self.fingerprint = digest.hexdigest()
        return _sorted(hashes, offsets)

    def _refuse_repeated_ids(self) -> None:
        """Different ids may share a hash; the same id may not stand in two lines."""
        hashes = self._hashes_N
        run: dict[str, int] = {}
        previous = -1
        for place in np.flatnonzero(hashes[1:] == hashes[:-1]).tolist():
            if place != previous + 1:
                run = {self._entry(int(self._offsets_N[place]))[0]: place}
            name = self._entry(int(self._offsets_N[place + 1]))[0]
            if name in run:
                lines = [self._line_number(int(self._offsets_N[p])) for p in (run[name], place + 1)]
                raise DataError(
                    f"{self.path}: lines {min(lines)} and {max(lines)} have the same id {name!r}; "
                    "keep one of them"
                )
            run[name] = place + 1
            previous = place

    def _entry(self, offset: int) -> tuple[str, str]:
        line, size = b"", _READ_BYTES
        while b"\n" not in line and len(line) <= MAX_CAPTION_BYTES:
            with reading(self.path):
                more = os.pread(self._descriptor, size, offset + len(line))
            if not more:
                break
            line += more
            size *= 4
        entry = self._parse(line.partition(b"\n")[0], first=offset == 0)
        if isinstance(entry, str):
            raise DataError(f"{self.path}: was changed while it was used; start again")
        return entry

    def _parse(self, line: bytes, first: bool) -> tuple[str, str] | str:
        """Id and caption, or what is wrong with the line."""
        if len(line) > MAX_CAPTION_BYTES:
            return f"is longer than {MAX_CAPTION_BYTES} bytes"
        if first:
            line = line.removeprefix(_BOM)
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            return "is not valid UTF-8; save the file as UTF-8"
        if self._is_json:
            fields = parse_object(text)
            if fields is None:
                return 'is no JSON object; expected {"id": ..., "caption": ...}'
        else:
            values = text.rstrip("\r\n").split("\t")
            if len(values) != 2:
                return f"has {len(values)} columns; expected id, tab, caption"
            fields = {"id": values[0], "caption": values[1]}
        name, caption = given_id(fields.get("id")), fields.get("caption")
        if name is None:
            return "has no id"
        if not isinstance(caption, str) or printable(caption) != caption:
            return "has no caption that is valid text"
        return name, caption

    def _line_number(self, offset: int) -> int:
        """From 1; slow, for messages."""
        with open(self.path, "rb") as file:
            number = 1
            while offset > 0 and (chunk := file.read(min(offset, 1 << 20))):
                number += chunk.count(b"\n")
                offset -= len(chunk)
        return number


def _sorted(
    hashes: "array[int]", offsets: "array[int]"
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Both in the order of the hashes."""
    unsorted = np.frombuffer(hashes, dtype=np.uint64)
    order = np.argsort(unsorted)
    return unsorted[order], np.frombuffer(offsets, dtype=np.int64)[order]
