"""Rows of JSONL, CSV and TSV files: where they begin, and what they hold, by byte ranges.

Rows are cut and read with the same parser, so a range that begins at a row's first byte gives the
same rows as the whole file.  Memory is that of one row.  Knows neither pictures nor captions.
"""

import csv
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_cogview.configs.errors import DataError
from megatron_cogview.data.fields import Trouble, parse_object
from megatron_cogview.data.raw import MAX_CAPTION_BYTES

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
        try:
            with open(path, "rb") as file:
                self._read_header(file)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None

    def cut(self, rows_per_range: int) -> list[tuple[int, int]]:
        """Byte ranges of ``rows_per_range`` rows each; the last may have fewer.

        Raises:
            OSError: the file cannot be read to its end.
        """
        with open(self.path, "rb") as file:
            file.seek(self.first_row)
            find = self._ends_of_csv if self._delimiter else self._ends_of_lines
            ends = list(find(file, rows_per_range))
            size = file.seek(0, 2)
        starts = [self.first_row, *ends]
        if starts[-1] < size:
            ends.append(size)
        return list(zip(starts, ends, strict=False))

    def rows(self, start: int, stop: int) -> Iterator[Fields | Trouble | None]:
        """Rows of a range: their fields by name, what is wrong with them, or None if empty.

        Raises:
            OSError: the file cannot be read.
        """
        with open(self.path, "rb") as file:
            lines = _Lines(file, start, stop)
            yield from self._csv_rows(lines) if self._delimiter else _json_rows(lines)

    def digest(self, start: int, stop: int) -> str:
        """SHA-256 of the header and a range."""
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            digest.update(file.read(self.first_row))
            file.seek(start)
            while start < stop and (chunk := file.read(min(_CHUNK_BYTES, stop - start))):
                digest.update(chunk)
                start += len(chunk)
        return digest.hexdigest()

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

    def _ends_of_lines(self, file: BinaryIO, rows_per_range: int) -> Iterator[int]:
        position, missing = file.tell(), rows_per_range
        while chunk := file.read(_CHUNK_BYTES):
            breaks = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n"))
            for index in range(missing - 1, len(breaks), rows_per_range):
                yield position + int(breaks[index]) + 1
            missing = rows_per_range - (len(breaks) - missing) % rows_per_range
            position += len(chunk)

    def _ends_of_csv(self, file: BinaryIO, rows_per_range: int) -> Iterator[int]:
        start = file.tell()
        lines = _Lines(file, start, file.seek(0, 2))
        for number, _ in enumerate(_split(lines, self._delimiter), start=1):
            if number % rows_per_range == 0:
                yield lines.position

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
