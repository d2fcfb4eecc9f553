"""Reader of tables (JSONL, CSV, TSV) that name pictures in a folder.

Looks at names, sizes and captions; decodes no picture and knows no tokenizer.
"""

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from megatron_cogview.configs.errors import DataError, refuse
from megatron_cogview.data.captions import DEFAULT_CAPTIONS, CaptionRule
from megatron_cogview.data.fields import Trouble, given_id
from megatron_cogview.data.raw import (
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
from megatron_cogview.data.table_rows import DELIMITERS, Fields, TableFile

ROWS_PER_PART = 10_000
IMAGE_KEY = "image"
OTHER_IMAGE_KEYS = ("file_name", "path", "filepath")
"""Looked for where ``image`` is missing, because other programs write them."""

_ABOUT_ONE_PICTURE = (
    errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES, errno.EISDIR
)  # fmt: skip
"""Errors that are the picture's own, as long as its folder is there; all others stop the run."""
_LOOKED_AT = 1000
"""Rows at the beginning of which one must be usable."""


class TableSource:
    """One table, or all tables of a folder in name order, with the pictures beside them.

    Columns: the picture's file name, relative to the table's folder; the caption; optionally
    ``id``, else the file name as written is the id.

    Rows are cut into parts of a fixed number, so rows added to the end of a table change its last,
    incomplete part and add new ones.  A data set that is already tokenised to its end keeps that
    incomplete part and refuses another content of it: put later rows into a new file of the folder,
    with a name that sorts behind the others.

    The digest of a part covers header and rows, not the pictures.

    A picture that is missing is rejected, but only while the folder of pictures is what it was at
    the beginning: a file system that went away stops the run.
    """

    def __init__(
        self,
        path: Path,
        captions: CaptionRule = DEFAULT_CAPTIONS,
        *,
        image_key: str = IMAGE_KEY,
        image_root: Path | None = None,
        rows_per_part: int = ROWS_PER_PART,
    ) -> None:
        """Take one table or a folder.

        Args:
            path: ``.jsonl``, ``.csv`` or ``.tsv``, or a folder that holds tables of one kind.
            captions: which column is the caption.
            image_key: column of file names; ``file_name``, ``path`` and ``filepath`` are taken too
                if it is ``image`` and not there.
            image_root: folder that file names are relative to; that of the table if None.
            rows_per_part: rows that become one shard.

        Raises:
            ConfigError: an option that cannot work.
            DataError: no such folder of pictures.
        """
        if rows_per_part < 1:
            raise refuse("rows_per_part", rows_per_part, "must be at least 1")
        if not image_key:
            raise refuse("image_key", image_key, "must not be empty")
        if captions.caption_from != "auto":
            raise refuse(
                "caption_from", captions.caption_from, "is for tars; a table has its columns"
            )
        self.path, self.captions = Path(path), captions
        self.image_key, self.rows_per_part = image_key, rows_per_part
        folder = self.path if stat.S_ISDIR(mode_of(self.path)) else self.path.parent
        root = folder if image_root is None else Path(image_root)
        mode = mode_of(root)
        if image_root is not None and not stat.S_ISDIR(mode):
            raise DataError(f"{root}: no such folder of pictures (image_root)")
        # Relative, so that moving table and pictures together changes nothing.
        self._root_from_folder = os.path.relpath(root, folder)
        there = stat.S_ISDIR(mode)
        with reading(root):
            self._root = os.path.realpath(root, strict=there)
            self._root_before = _look_at(self._root) if there else None
        self._tables: dict[Path, TableFile] = {}

    @property
    def description(self) -> dict[str, Any]:
        """Kind, columns, and how rows are cut."""
        return {
            "kind": "table",
            **self.captions.description,
            "image_key": self.image_key,
            "image_root": self._root_from_folder,
            "rows_per_part": self.rows_per_part,
        }

    def parts(self) -> list[Part]:
        """Byte ranges of the tables, ``NAME#0`` first.

        Raises:
            DataError: no table, no row in any, or one that cannot be read.
        """
        found = []
        for path in tables_of(self.path):
            ranges = self._table(path).cut(self.rows_per_part)
            found += [
                Part(f"{path.name}#{index}", path, stop - start, start, rows)
                for index, (start, stop, rows) in enumerate(ranges)
            ]
        if not found:
            raise DataError(f"{self.path}: holds no row")
        return found

    def digest(self, part: Part) -> str:
        """SHA-256 of the table's header and the part's rows.

        Raises:
            DataError: the table cannot be read, or has become shorter.
        """
        return self._table(part.path).digest(part.start, part.start + part.num_bytes)

    def check(self) -> None:
        """Look for the columns in all headers, and for a usable row at the beginning.

        Raises:
            DataError: a column is missing, or none of the first rows can be used; the message
                counts reasons and lists columns.
        """
        tables = [self._table(path) for path in tables_of(self.path)]
        for table in tables:
            if table.columns:
                self._check_header(table)
        reasons: Counter[str] = Counter()
        columns: set[str] = set()
        first: Rejected | None = None
        for table in tables:
            part = Part(f"{table.path.name}#0", table.path, size_of(table.path))
            for row, number in islice(self._rows(part, table.first_row), _LOOKED_AT):
                item = self._pair(row, number, part)
                if isinstance(item, RawPair):
                    return
                reasons[item.reason] += 1
                first = first or item
                columns.update(row if isinstance(row, dict) else ())
            if first is not None:
                raise DataError(
                    f"{table.path}: none of the first {reasons.total()} rows can be used: "
                    f"{', '.join(f'{n} x {reason}' for reason, n in sorted(reasons.items()))}; the "
                    f"first: {first.detail}; columns there: "
                    f"{_listed(columns)}; pictures are looked "
                    f"for in {self._root}"
                )

    def check_captions(self) -> None:
        """Look for a caption in the first rows, without touching the pictures.

        Raises:
            DataError: none has one; the message lists the columns.
        """
        table = self._table(tables_of(self.path)[0])
        columns: set[str] = set()
        for row in islice(table.rows(table.first_row, size_of(table.path)), _LOOKED_AT):
            if isinstance(row, dict):
                if not isinstance(self.captions.find(row), Trouble):
                    return
                columns.update(row)
        raise DataError(
            f"{table.path}: no row at its beginning has a caption in column "
            f"{self.captions.field!r}; columns there: {_listed(columns)}"
        )

    def read(self, part: Part) -> Iterator[RawPair | Rejected]:
        """Pairs of one part, in the order of the rows.

        Raises:
            DataError: the table, or a picture for another reason than its own, cannot be read; the
                table has become shorter; or the folder of pictures is not there any more.
        """
        for row, number in self._rows(part, part.start):
            yield self._pair(row, number, part)

    def texts(self, part: Part, rules: Sequence[CaptionRule]) -> Iterator[str]:
        """Captions of one part by each of some rules, without touching the pictures."""
        for row, _ in self._rows(part, part.start):
            for rule in rules:
                caption = row if isinstance(row, Trouble) else rule.find(row)
                if isinstance(caption, str):
                    yield caption

    def _table(self, path: Path) -> TableFile:
        if path not in self._tables:
            self._tables[path] = TableFile(path)
        return self._tables[path]

    def _check_header(self, table: TableFile) -> None:
        image = self.image_key
        if image == IMAGE_KEY and image not in table.columns:
            image = next((k for k in OTHER_IMAGE_KEYS if k in table.columns), image)
        wanted = {"image_key": image}
        if self.captions.required:
            wanted["caption_key"] = self.captions.field
        for option, column in wanted.items():
            if table.columns.count(column) != 1:
                there = "no column" if column not in table.columns else "several columns"
                raise DataError(
                    f"{table.path}: its first row, the header, has {there} {column!r} ({option}); "
                    f"columns there: {', '.join(table.columns[:40])}"
                )

    def _rows(self, part: Part, start: int) -> Iterator[tuple[Fields | Trouble, int]]:
        """Rows with their numbers in the file, from 1; empty ones are left out."""
        first = int(part.name.rpartition("#")[2]) * self.rows_per_part + 1
        rows = self._table(part.path).rows(start, part.start + part.num_bytes)
        return ((row, number) for number, row in enumerate(rows, first) if row is not None)

    def _pair(self, row: Fields | Trouble, number: int, part: Part) -> RawPair | Rejected:
        where = f"row {number}"
        name = f"{part.path.name}:{number}"
        if isinstance(row, Trouble):
            return _rejected(name, row, part, where)
        image = self._image_name(row)
        if not isinstance(image, str) or not image:
            name = given_id(row.get("id")) or name
            return _rejected(name, Trouble("no image name"), part, where)
        name = given_id(row.get("id")) or printable(image)
        caption = self.captions.find(row)
        if isinstance(caption, Trouble):
            return _rejected(name, caption, part, where)
        data = self._load(image)
        if isinstance(data, Trouble):
            return _rejected(name, data, part, where)
        return RawPair(name, data, caption, part.name)

    def _image_name(self, row: Fields) -> object:
        if self.image_key in row or self.image_key != IMAGE_KEY:
            return row.get(self.image_key)
        return next((row[key] for key in OTHER_IMAGE_KEYS if key in row), None)

    def _load(self, image: str) -> bytes | Trouble:
        """A picture's bytes; nothing outside the root, and nothing but a plain file, is opened.

        Raises:
            DataError: the machine could not read it, which says nothing about the picture.
        """
        name = PurePosixPath(image)
        if name.is_absolute() or ".." in name.parts or "\0" in image or printable(image) != image:
            return Trouble("unsafe path", image)
        with reading(os.path.join(self._root, image)):
            try:
                return self._load_inside(image)
            except OSError as error:
                if error.errno not in _ABOUT_ONE_PICTURE:
                    raise
                why = error
        self._refuse_another_root()
        if why.errno in (errno.ENOENT, errno.ENOTDIR):
            return Trouble("no image file", image)
        return Trouble("unreadable image file", f"{image}: {why.strerror}")

    def _load_inside(self, image: str) -> bytes | Trouble:
        # Strict: otherwise a link that cannot be read just now would pass for a plain name.
        path = os.path.realpath(os.path.join(self._root, image), strict=True)
        if os.path.commonpath([path, self._root]) != self._root:
            return Trouble("unsafe path", f"{image} leads out of the folder")
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode):
            return Trouble("not a plain file", image)
        if about.st_size > MAX_IMAGE_BYTES:
            return Trouble("file too large", f"{image}: {about.st_size} bytes")
        # Not to wait, should a pipe have taken the file's place since.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            return file.read(MAX_IMAGE_BYTES)

    def _refuse_another_root(self) -> None:
        """Where a mount went away its mount point stays, another folder and mostly an empty one."""
        with reading(self._root):
            now = _look_at(self._root)
        before = self._root_before = self._root_before or now
        if now.inode != before.inode or (before.has_entries and not now.has_entries):
            raise DataError(
                f"{self._root}: the folder of pictures was replaced or emptied, or its file system "
                "is gone; bring it back, and run the same command again"
            )


class _Look(NamedTuple):
    """By what a folder is known again."""

    inode: int
    has_entries: bool
    """Of which one could be listed."""


def _look_at(folder: str) -> _Look:
    inode = os.stat(folder).st_ino
    try:
        with os.scandir(folder) as entries:
            return _Look(inode, next(entries, None) is not None)
    except PermissionError:
        # Pictures can be opened by name all the same.
        return _Look(inode, False)


def tables_of(path: Path) -> list[Path]:
    """The tables of a folder in name order, or the one that is named.

    Raises:
        DataError: none; several kinds, which may well be the same rows twice; or what there is
            cannot be found out.
    """
    mode = mode_of(path)
    if not stat.S_ISDIR(mode):
        if not stat.S_ISREG(mode) or path.suffix.lower() not in DELIMITERS:
            raise DataError(f"{path}: no such folder, or table ({', '.join(DELIMITERS)})")
        return [path]
    tables = (path / name for name in names_in(path))
    found = [p for p in tables if p.suffix.lower() in DELIMITERS and is_plain_file(p)]
    kinds = sorted({p.suffix.lower() for p in found})
    if not found:
        raise DataError(f"{path}: holds no table ({', '.join(DELIMITERS)})")
    if len(kinds) > 1:
        raise DataError(
            f"{path}: holds tables of several kinds ({', '.join(p.name for p in found[:5])}), "
            "perhaps the same rows twice; name one file, or keep one kind"
        )
    return found


def _listed(columns: set[str]) -> str:
    return printable(", ".join(sorted(columns)[:40])) or "none"


def _rejected(name: str, trouble: Trouble, part: Part, where: str) -> Rejected:
    detail = f"{where}: {trouble.detail}" if trouble.detail else where
    return Rejected(name, trouble.reason, part.name, printable(detail))
