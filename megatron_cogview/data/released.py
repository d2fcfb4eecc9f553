"""Token data of the original CogView: int32 records and LMDB rows, in parts.

Files are only ever opened for reading, and pickled rows run nothing (``inert_pickle``).  Knows no
tokenizer and no shards; what makes a row is in ``token_rows``.
"""

import hashlib
import logging
import re
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_cogview.configs.errors import ConfigError, DataError
from megatron_cogview.data import inert_pickle
from megatron_cogview.data.raw import Rejected, is_plain_file, mode_of, names_in, reading, size_of
from megatron_cogview.data.token_rows import (
    CODES_PER_SIDE,
    NUM_CODES,
    TEXT_PADDING,
    VOCAB,
    RowPart,
    TokenRow,
    check_beginning,
    cut_rows,
    make_row,
    parse_row,
)

logger = logging.getLogger(__name__)

TEXT_SLOTS = 64
RECORD_IDS = TEXT_SLOTS + NUM_CODES
RECORD_BYTES = 4 * RECORD_IDS
ROWS_PER_PART = 10_000
_LOOK_ONLY = {"readonly": True, "lock": False, "create": False, "readahead": False}
_LMDB_OPEN = threading.Lock()
"""LMDB opens a file once per process, and rows are hashed while they are read."""
ROWS_AT_ONCE = 256
"""Rows in memory; so many records stay near the processor (1.1 MB)."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """Rows of a binary file as arrays: N usable ones out of M consecutive ones."""

    ids: list[str]
    """N ids as in :class:`TokenRow`."""
    text: NDArray[np.uint16]
    """``[N, 64]`` SentencePiece ids; 0 after the row's length."""
    text_length: NDArray[np.uint16]
    """``[N]``, 0 to 64."""
    codes: NDArray[np.uint16]
    """``[N, 32, 32]``."""
    rejected: list[Rejected]
    """The other M - N, in file order."""
    usable: NDArray[np.bool_]
    """``[M]``, in file order."""


class CompactBinary:
    """Raw int32 records of 64 text ids (+ 8192, then -1) and 1,024 codes, without a header."""

    def __init__(
        self,
        paths: Path | Sequence[Path],
        pattern: str = "*.bin",
        rows_per_part: int = ROWS_PER_PART,
    ) -> None:
        """Take a file, several files in this order, or from a folder what fits ``pattern``."""
        self.paths = [Path(path) for path in ([paths] if isinstance(paths, Path) else paths)]
        self.pattern = pattern
        self.rows_per_part = rows_per_part

    @property
    def description(self) -> dict[str, Any]:
        """Kind and size of the parts."""
        return {"kind": "cogview_binary", "rows_per_part": self.rows_per_part}

    def parts(self) -> list[RowPart]:
        """Parts of all files, ``FILE#0``, ``FILE#1``, ...

        Raises:
            DataError: no file, two of one name, an empty one, or one that is not whole records.
        """
        return [part for path in self._files() for part in self._parts_of(path)]

    def read(self, part: RowPart) -> Iterator[TokenRow | Rejected]:
        """Rows of one part in file order; :meth:`read_batches` is several times as fast.

        Raises:
            DataError: the file ends before the part does.
        """
        for batch in self.read_batches(part):
            rejected = iter(batch.rejected)
            rows = zip(batch.ids, batch.text, batch.text_length, batch.codes, strict=True)
            for usable in batch.usable:
                if usable:
                    row_id, text, length, codes = next(rows)
                    yield TokenRow(row_id, text[:length], codes, part.name)
                else:
                    yield next(rejected)

    def read_batches(self, part: RowPart) -> Iterator[TokenBatch]:
        """The same rows, ``ROWS_AT_ONCE`` at a time.

        Raises:
            DataError: the file ends before the part does.
        """
        first = part.first_row
        for data in _blocks(part):
            block = np.frombuffer(data, "<i4").reshape(-1, RECORD_IDS)
            yield _convert(
                block, [f"{part.path.name}:{first + n}" for n in range(len(block))], part
            )
            first += len(block)

    def digest(self, part: RowPart) -> str:
        """SHA-256 of the part's bytes.

        Raises:
            DataError: the file ends before the part does.
        """
        sha256 = hashlib.sha256()
        for data in _blocks(part):
            sha256.update(data)
        return sha256.hexdigest()

    def check(self) -> None:
        """Look at every file's size and at the first rows.

        Raises:
            DataError: as :meth:`parts`, or none of the first rows can be used.
        """
        check_beginning(self, self.parts()[0])

    def _parts_of(self, path: Path) -> list[RowPart]:
        size = size_of(path)
        if size == 0 or size % RECORD_BYTES:
            raise DataError(
                f"{path}: {size} bytes are not one or more records of {RECORD_BYTES} bytes "
                f"(int32, {TEXT_SLOTS} + {NUM_CODES} ids), the remainder is "
                f"{size % RECORD_BYTES}; it has another format or was cut off: copy it again"
            )
        return [
            RowPart(
                name=f"{path.name}#{index}",
                path=path,
                num_bytes=count * RECORD_BYTES,
                start=first * RECORD_BYTES,
                first_row=first,
                num_pairs=count,
            )
            for index, first, count in cut_rows(size // RECORD_BYTES, self.rows_per_part)
        ]

    def _files(self) -> list[Path]:
        files: list[Path] = []
        for path in self.paths:
            mode = mode_of(path)
            if stat.S_ISDIR(mode):
                # What cannot be listed holds no file at all for glob.
                names_in(path)
                with reading(path):
                    inside = sorted(p for p in path.glob(self.pattern) if is_plain_file(p))
                if not inside:
                    raise DataError(
                        f"{path}: holds no {self.pattern}; name the files, or another pattern"
                    )
                files.extend(inside)
            elif stat.S_ISREG(mode):
                files.append(path)
            else:
                raise DataError(f"{path}: no such file or folder")
        if not files:
            raise DataError("no file of binary token records is named; name at least one")
        seen: dict[str, Path] = {}
        for path in files:
            if path.name in seen:
                raise DataError(
                    f"{path}: has the same name as {seen[path.name]}, and ids are made of file "
                    f"names; rename one"
                )
            seen[path.name] = path
        return files


def _blocks(part: RowPart) -> Iterator[bytes]:
    """Bytes of ``ROWS_AT_ONCE`` records at a time, the last block shorter."""
    with reading(part.path), open(part.path, "rb") as file:
        file.seek(part.start)
        for _, _, count in cut_rows(part.num_rows, ROWS_AT_ONCE):
            data = file.read(count * RECORD_BYTES)
            if len(data) != count * RECORD_BYTES:
                raise DataError(
                    f"{part.path}: ends inside part {part.name}; it was changed meanwhile; start "
                    f"again with files that stay as they are"
                )
            yield data


def _convert(block: NDArray[np.int32], ids: list[str], part: RowPart) -> TokenBatch:
    """Local ids of ``block [M, 1088]``; rows with a fault are looked at one by one."""
    text, codes = block[:, :TEXT_SLOTS], block[:, TEXT_SLOTS:]
    used = text != TEXT_PADDING
    # Read as unsigned, negative numbers are too large as well.
    local = (text - VOCAB.first_text_id).view(np.uint32)
    bad_text = (used & (local >= VOCAB.num_text_ids)).any(axis=1)
    bad_order = (used[:, 1:] & ~used[:, :-1]).any(axis=1)
    bad_codes = codes.view("<u4").max(axis=1) >= VOCAB.num_image_codes
    usable: NDArray[np.bool_] = ~(bad_text | bad_order | bad_codes)
    rejected = []
    if not usable.all():
        for n in np.flatnonzero(~usable):
            wide = block[n].astype(np.int64)
            row = make_row(ids[n], wide[:TEXT_SLOTS], wide[TEXT_SLOTS:], part.name)
            assert isinstance(row, Rejected)
            rejected.append(row)
        ids = [row_id for row_id, keep in zip(ids, usable, strict=True) if keep]
        local, used, codes = local[usable], used[usable], codes[usable]
    return TokenBatch(
        ids=ids,
        text=np.where(used, local, 0).astype(np.uint16),
        text_length=used.sum(axis=1, dtype=np.uint16),
        codes=codes.astype(np.uint16).reshape(-1, CODES_PER_SIDE, CODES_PER_SIDE),
        rejected=rejected,
        usable=usable,
    )


_Take = Callable[[memoryview], bytes]
_Getter = Callable[[bytes, _Take], bytes | None]
"""What ``take`` makes of a key's value in one transaction, None where the key is missing."""


class LmdbRows:
    """An LMDB of pickled rows under ``0``, ``1``, ..., and their number under ``length``.

    A row is one array of ids, ``[ROI1] text [BASE] [BOI1] 1024 codes [EOI1]`` and any ``[PAD]``,
    or ``(text, codes)`` with the text as a str or as ids (+ 8192).  LMDB itself trusts its file:
    one that was made to harm can crash the process, though nothing in its rows is run.
    """

    def __init__(self, path: Path, rows_per_part: int = ROWS_PER_PART) -> None:
        """Take the folder with ``data.mdb``, or the single file."""
        self.path = Path(path)
        self.rows_per_part = rows_per_part

    @property
    def description(self) -> dict[str, Any]:
        """Kind and size of the parts."""
        return {"kind": "cogview_lmdb", "rows_per_part": self.rows_per_part}

    def parts(self) -> list[RowPart]:
        """Parts ``NAME#0``, ``NAME#1``, ...

        LMDB does not say where in the file a row lies: a part's bytes count each row as 1,024
        int64, and its start is 0.  Its path is the data file's, as a folder's times stay.

        Raises:
            DataError: no LMDB, cut off, or without a usable ``length``.
            ConfigError: the package ``lmdb`` is missing.
        """
        file = self._file()
        return [
            RowPart(
                name=f"{self._name}#{index}",
                path=file,
                num_bytes=count * NUM_CODES * 8,
                first_row=first,
                num_pairs=count,
            )
            for index, first, count in cut_rows(self._length(), self.rows_per_part)
        ]

    def read(self, part: RowPart) -> Iterator[TokenRow | Rejected]:
        """Rows of one part in the order of their numbers.

        Raises:
            DataError, ConfigError: as :meth:`parts`.
        """

        # One byte too many is enough to see that a row is too long.
        def beginning(value: memoryview) -> bytes:
            return bytes(value[: inert_pickle.MAX_BYTES + 1])

        for number, data in self._rows(part, beginning):
            row_id = f"{self._name}:{number}"
            if data is None:
                yield Rejected(row_id, "missing row", part.name, f"no key {str(number)!r}")
                continue
            try:
                value = inert_pickle.loads(data)
            except DataError as error:
                yield Rejected(row_id, "damaged row", part.name, str(error))
            else:
                yield parse_row(value, row_id, part.name)

    def digest(self, part: RowPart) -> str:
        """SHA-256 of the SHA-256 of each row, missing ones as 32 zero bytes.

        Raises:
            DataError, ConfigError: as :meth:`parts`.
        """
        sha256 = hashlib.sha256()
        for _, row in self._rows(part, lambda value: hashlib.sha256(value).digest()):
            sha256.update(row or bytes(32))
        return sha256.hexdigest()

    def check(self) -> None:
        """Look at ``length`` and at the first rows.

        Raises:
            DataError: as :meth:`parts`, or none of the first rows can be used.
            ConfigError: the package ``lmdb`` is missing.
        """
        check_beginning(self, self.parts()[0])

    @property
    def _name(self) -> str:
        return self.path.resolve().name

    def _length(self) -> int:
        with self._open() as (entries, get):
            text = get(b"length", lambda value: bytes(value[:20]))
        length = int(text) if text and re.fullmatch(rb"[0-9]{1,15}", text) else 0
        if not 0 < length < entries:
            raise DataError(
                f"{self.path}: key 'length' is {text!r} among {entries} keys; it must be the "
                f"number of rows that lie under '0', '1', ...; this is another kind of LMDB, or "
                f"its writing was interrupted"
            )
        if entries > length + 1:
            logger.warning(
                "%s: %d keys beside the %d rows that 'length' counts are left out",
                *(self.path, entries - length - 1, length),
            )
        return length

    def _rows(self, part: RowPart, take: _Take) -> Iterator[tuple[int, bytes | None]]:
        """Numbers and what ``take`` makes of the values, None where there is none."""
        for _, first, count in cut_rows(part.num_rows, ROWS_AT_ONCE):
            numbers = range(part.first_row + first, part.first_row + first + count)
            # Not held over a yield: another reader may want the file, or the process may fork.
            with self._open() as (_, get):
                values = [get(b"%d" % number, take) for number in numbers]
            yield from zip(numbers, values, strict=True)

    @contextmanager
    def _open(self) -> Iterator[tuple[int, _Getter]]:
        """Number of keys, and the function that looks one up."""
        try:
            import lmdb
        except ImportError:
            raise ConfigError(
                f"{self.path}: rows in LMDB need the package lmdb, which is not installed: "
                f"pip install 'megatron-cogview[import]'"
            ) from None
        file = self._file()
        try:
            with (
                _LMDB_OPEN,
                lmdb.open(str(self.path), subdir=file != self.path, **_LOOK_ONLY) as environment,
                environment.begin(buffers=True) as transaction,
            ):
                self._refuse_cut_off(file, environment)

                def get(key: bytes, take: _Take) -> bytes | None:
                    value = transaction.get(key)
                    return None if value is None else take(value)

                yield environment.stat()["entries"], get
        except (lmdb.Error, OSError) as error:
            raise DataError(f"{file}: not a readable LMDB ({error})") from None

    def _file(self) -> Path:
        """That of the data, in the folder if one was named."""
        file = self.path / "data.mdb" if stat.S_ISDIR(mode_of(self.path)) else self.path
        if not stat.S_ISREG(mode_of(file)):
            raise DataError(f"{file}: no such file; name the LMDB's folder or its single file")
        return file

    def _refuse_cut_off(self, file: Path, environment: Any) -> None:
        """Reading behind the end of the file would end the process (SIGBUS)."""
        needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        if (size := size_of(file)) < needed:
            raise DataError(
                f"{file}: {size} bytes of {needed}, it was cut off; copy it again, or if it is "
                f"whole, rewrite it with mdb_copy -c"
            )
