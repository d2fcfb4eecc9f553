"""Rows of JSONL, CSV and TSV files: where they begin, and what they hold, by byte ranges.

Rows are cut and read with the same parser, so a range that begins at a row's first byte gives the
same rows as the whole file.  Memory is that of one row.  Knows neither pictures nor captions.
"""

import csv
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_cogview.configs.errors import DataError
from megatron_cogview.data.fields import Trouble, parse_object
from megatron_cogview.data.raw import MAX_CAPTION_BYTES, reading

DELIMITERS = {".jsonl": "", ".csv": ",", ".tsv": "\t"}
"""Column separator by suffix."""

_BOM = b"\xef\xbb\xbf"
_CHUNK_BYTES = 4 << 20

Fields = dict[str, Any]


class TableFile:
    """One table.  CSV and TSV have a header row and quote as Excel, pandas and Python's csv do:
    a field that begins with a quotation mark ends with one, and holds doubled ones in between.

    Rows are counted from the header on; empty lines count, and hold nothing.
    """

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            DataError: cannot be read, is UTF-16, or begins with something that is no header.
        """
        self.path = path
        self._delimiter = DELIMITERS[path.suffix.lower()]
        self.columns: tuple[str, ...] = ()
        """Names in the header; none in JSONL."""
        self.first_row = 0
        """First byte after mark and header."""
        with reading(path), open(path, "rb") as file:
            self._read_header(file)

    def cut(self, rows_per_range: int) -> list[tuple[int, int, int]]:
        """Byte ranges of ``rows_per_range`` rows each, and their rows; the last may have fewer.

        Raises:
            DataError: the file cannot be read to its end.
        """
        with reading(self.path), open(self.path, "rb") as file:
            file.seek(self.first_row)
            find = self._ends_of_csv if self._delimiter else self._ends_of_lines
            ends = list(find(file, rows_per_range))
        starts = [self.first_row, *(end for end, _ in ends)]
        return [(start, *end) for start, end in zip(starts, ends, strict=False)]

    def rows(self, start: int, stop: int) -> Iterator[Fields | Trouble | None]:
        """Rows of a range: their fields by name, what is wrong with them, or None if empty.

        Raises:
            DataError: the file cannot be read, or ends before the range does.
        """
        with reading(self.path), open(self.path, "rb") as file:
            self._refuse_shorter(file, stop)
            lines = _Lines(file, start, stop)
            yield from self._csv_rows(lines) if self._delimiter else _json_rows(lines)

    def digest(self, start: int, stop: int) -> str:
        """SHA-256 of the header and a range.

        Raises:
            DataError: as :meth:`rows`.
        """
        digest = hashlib.sha256()
        with reading(self.path), open(self.path, "rb") as file:
            self._refuse_shorter(file, stop)
            digest.update(file.read(self.first_row))
            file.seek(start)
            while start < stop and (chunk := file.read(min(_CHUNK_BYTES, stop - start))):
                digest.update(chunk)
                start += len(chunk)
        return digest.hexdigest()

    def _refuse_shorter(self, file: BinaryIO, stop: int) -> None:
        """Rows that are gone would be missed by nobody."""
        if os.fstat(file.fileno()).st_size < stop:
            raise DataError(
                f"{self.path}: has become shorter since its rows were counted; let it be written "
                "to the end, and run the same command again"
            )

    def _read_header(self, file: BinaryIO) -> None:
        mark = file.read(3)
        if mark[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{self.path}: is UTF-16; save it as UTF-8")
        self.first_row = len(mark) if mark == _BOM else 0
        if not self._delimiter:
            return
        lines = _Lines(file, self.first_row, file.seek(0, 2))
        names = next(_parsed(lines, self._delimiter), None)
        if not isinstance(names, list) or not names:
            why = names.detail or names.reason if isinstance(names, Trouble) else "there is none"
            raise DataError(
                f"{self.path}: its first row is no header ({why}); it must name the columns"
            )
        self.columns = tuple(name.strip() for name in names)
        self.first_row = lines.position

    def _ends_of_lines(self, file: BinaryIO, rows_per_range: int) -> Iterator[tuple[int, int]]:
        """End and number of rows of each range."""
        end = position = file.tell()
        rows, last = 0, b"\n"
        while chunk := file.read(_CHUNK_BYTES):
            breaks = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n"))
            for index in range(rows_per_range - rows - 1, len(breaks), rows_per_range):
                end = position + int(breaks[index]) + 1
                yield end, rows_per_range
            rows = (rows + len(breaks)) % rows_per_range
            position += len(chunk)
            last = chunk[-1:]
        if end < position:
            yield position, rows + (last != b"\n")

    def _ends_of_csv(self, file: BinaryIO, rows_per_range: int) -> Iterator[tuple[int, int]]:
        """End and number of rows of each range."""
        end = file.tell()
        size = file.seek(0, 2)
        lines = _Lines(file, end, size)
        rows = 0
        for _ in _split(lines, self._delimiter):
            rows += 1
            if rows == rows_per_range:
                end, rows = lines.position, 0
                yield end, rows_per_range
        if end < size:
            yield size, rows

    def _csv_rows(self, lines: "_Lines") -> Iterator[Fields | Trouble | None]:
        for values in _parsed(lines, self._delimiter):
            if isinstance(values, Trouble):
                yield values
            elif not values:
                yield None
            elif len(values) != len(self.columns):
                yield Trouble(
                    "wrong number of columns", f"{len(values)}, the header has {len(self.columns)}"
                )
            else:
                yield dict(zip(self.columns, values, strict=True))


class _RowTooLarge(Exception):
    """More bytes than a row may have; the line has been skipped to its end."""


class _Lines:
    """Lines of a byte range, for the csv module; a row of several lines has a size limit.

    They are decoded as Latin-1, byte for byte: the characters that csv looks at are the same in
    UTF-8, and one bad byte spoils one row only.
    """

    def __init__(self, file: BinaryIO, start: int, stop: int) -> None:
        self._file, self.position, self._stop = file, start, stop
        self._held = 0
        file.seek(start)

    def begin_row(self) -> None:
        """Lines from here on are another row."""
        self._held = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self.read()
        if not line:
            raise StopIteration
        return line.decode("latin-1")

    def read(self) -> bytes:
        """The next line with its end; nothing at the end of the range.

        Raises:
            _RowTooLarge: with this line the row exceeds its limit.
        """
        line = self._readline(MAX_CAPTION_BYTES + 1 - self._held)
        self._held += len(line)
        if self._held > MAX_CAPTION_BYTES:
            while line and not line.endswith(b"\n"):
                line = self._readline(MAX_CAPTION_BYTES)
            raise _RowTooLarge
        return line

    def _readline(self, limit: int) -> bytes:
        line = self._file.readline(min(limit, self._stop - self.position))
        self.position += len(line)
        return line


def _split(lines: _Lines, delimiter: str) -> Iterator[list[str] | Trouble]:
    """Rows in Latin-1."""
    # The limit is the whole process's: it may be raised, and lowering it could break others.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_CAPTION_BYTES + 1))
    # Strict: what is quoted wrongly is reported, and not turned into another text.
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.begin_row()
        try:
            values = next(reader)
        except StopIteration:
            return
        except _RowTooLarge:
            yield _too_large("; is a quotation mark not closed?")
        except csv.Error as error:
            yield Trouble("invalid row", str(error))
        else:
            yield values


def _parsed(lines: _Lines, delimiter: str) -> Iterator[list[str] | Trouble]:
    """Rows in UTF-8."""
    for values in _split(lines, delimiter):
        if isinstance(values, Trouble):
            yield values
            continue
        try:
            yield [v if v.isascii() else v.encode("latin-1").decode("utf-8") for v in values]
        except UnicodeDecodeError:
            yield Trouble("row is not valid UTF-8")


def _json_rows(lines: _Lines) -> Iterator[Fields | Trouble | None]:
    while True:
        lines.begin_row()
        try:
            line = lines.read()
        except _RowTooLarge:
            yield _too_large("")
            continue
        if not line:
            return
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError:
            yield Trouble("row is not valid UTF-8")
            continue
        fields = parse_object(text) if text else None
        yield Trouble("invalid json") if text and fields is None else fields


def _too_large(hint: str) -> Trouble:
    return Trouble("row too large", f"more than {MAX_CAPTION_BYTES} bytes{hint}")
