"""What a source of token rows is, and which ids of the original CogView make a row.

Knows no files and no tokenizer; how much text is too much is decided by whoever writes shards.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_cogview.configs.errors import DataError
from megatron_cogview.configs.vocab import COMMAND_TOKENS, VocabConfig
from megatron_cogview.data.raw import Part, Rejected, printable
from megatron_cogview.tokenization import vocab as ids_of

VOCAB = VocabConfig(num_image_codes=8192, num_text_ids=50_000)
"""Id ranges of the original."""
CODES_PER_SIDE = 32
NUM_CODES = CODES_PER_SIDE**2
TEXT_PADDING = -1
CHECKED_ROWS = 100
"""If none of the first so many can be used, a source is refused."""

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPart(Part):
    """Consecutive rows of one file."""

    first_row: int
    """Number of its first row, counted from 0."""
    num_pairs: int
    """Rows in it; each is a pair."""

    @property
    def num_rows(self) -> int:
        """Another name of ``num_pairs``."""
        return self.num_pairs


@dataclass(frozen=True, slots=True, eq=False)
class TokenRow:
    """One caption and the codes of its picture."""

    id: str
    """``FILE:ROW``; its hash goes into the shard and decides the split."""
    text: NDArray[np.uint16] | str
    """SentencePiece ids (without the offset 8192), or a text that is still to be tokenised."""
    codes: NDArray[np.uint16]
    """``[32, 32]``, 0 to 8191."""
    source: str
    """Name of the part it came from."""


class TokenSource(Protocol):
    """Token rows in parts that are each read from start to end."""

    @property
    def description(self) -> dict[str, Any]:
        """Plain values that decide what is read; a part of the shards' provenance."""

    def parts(self) -> list[RowPart]:
        """All parts in a fixed order, to which data added later is appended."""

    def read(self, part: RowPart) -> Iterator[TokenRow | Rejected]:
        """Rows of one part in a fixed order."""

    def digest(self, part: RowPart) -> str:
        """SHA-256 of what :meth:`read` reads, lower-case hex."""

    def check(self) -> None:
        """Refuse a source whose beginning shows that nothing can be read."""


def cut_rows(num_rows: int, rows_per_part: int) -> list[tuple[int, int, int]]:
    """Index, first row and number of rows of each part."""
    firsts = range(0, num_rows, rows_per_part)
    return [(i, at, min(rows_per_part, num_rows - at)) for i, at in enumerate(firsts)]


def check_beginning(source: TokenSource, part: RowPart) -> None:
    """Read the first rows of a part.

    Raises:
        DataError: all of them are rejected; the message says why the first was.
    """
    first: Rejected | None = None
    for row in islice(source.read(part), CHECKED_ROWS):
        if isinstance(row, TokenRow):
            return
        first = first or row
    if first is not None:
        raise DataError(
            f"{part.path}: none of the first {min(CHECKED_ROWS, part.num_rows)} rows can be used; "
            f"{first.id}: {first.reason} ({first.detail}); name another file or kind of source"
        )


def make_row(row_id: str, text: Ids, codes: Ids, source: str) -> TokenRow | Rejected:
    """A row from its text ids (+ 8192, then any -1) and its codes, flat."""

    def rejected(reason: str, detail: str) -> Rejected:
        return Rejected(row_id, reason, source, detail)

    if len(codes) != NUM_CODES:
        return rejected("wrong length", f"{len(codes)} image codes instead of {NUM_CODES}")
    used = text != TEXT_PADDING
    length = int(used.sum())
    foreign = np.flatnonzero(used & ~ids_of.is_text(text, VOCAB))
    if foreign.size:
        value, at = int(text[foreign[0]]), int(foreign[0])
        if ids_of.is_command(value, VOCAB):
            return rejected("command token in text", f"{name_of(value)} at text position {at}")
        limits = f"{VOCAB.first_text_id} to {VOCAB.first_command_id - 1}"
        return rejected("text id out of range", f"{value} at text position {at}, not {limits}")
    if not used[:length].all():
        at = int(np.argmin(used))
        return rejected("text after padding", f"padding from text position {at} on, then text")
    wrong = np.flatnonzero(~ids_of.is_image(codes, VOCAB))
    if wrong.size:
        value, at = int(codes[wrong[0]]), int(wrong[0])
        limits = f"0 to {VOCAB.num_image_codes - 1}"
        return rejected("image code out of range", f"{value} at image position {at}, not {limits}")
    local = (text[:length] - VOCAB.first_text_id).astype(np.uint16)
    grid = codes.astype(np.uint16).reshape(CODES_PER_SIDE, CODES_PER_SIDE)
    return TokenRow(row_id, local, grid, source)


def parse_row(value: object, row_id: str, source: str) -> TokenRow | Rejected:
    """A row from what LMDB holds: ``(text, codes)``, or all ids of the template."""
    if isinstance(value, tuple | list) and len(value) == 2 and not isinstance(value[1], int):
        text, codes = value[0], _flat_ids(value[1])
        if codes is None:
            detail = f"the codes are a {type(value[1]).__name__}, not integers"
            return Rejected(row_id, "not a token row", source, detail)
        if isinstance(text, str):
            return _text_row(row_id, text, codes, source)
        text_ids = _flat_ids(text)
        if text_ids is None:
            detail = f"the text is a {type(text).__name__}, neither a str nor integers"
            return Rejected(row_id, "not a token row", source, detail)
        return make_row(row_id, text_ids, codes, source)
    ids = _flat_ids(value)
    if ids is None:
        detail = f"a {type(value).__name__}, neither ids nor (text, codes)"
        return Rejected(row_id, "not a token row", source, detail)
    return _templated_row(row_id, ids, source)


def name_of(value: int) -> str:
    """An id as messages show it: commands by name."""
    if ids_of.is_command(value, VOCAB):
        return COMMAND_TOKENS[value - VOCAB.first_command_id]
    return str(value)


def _text_row(row_id: str, text: str, codes: Ids, source: str) -> TokenRow | Rejected:
    if printable(text) != text:
        return Rejected(row_id, "caption is not valid Unicode", source)
    row = make_row(row_id, np.empty(0, np.int64), codes, source)
    return row if isinstance(row, Rejected) else TokenRow(row_id, text, row.codes, source)


def _templated_row(row_id: str, ids: Ids, source: str) -> TokenRow | Rejected:
    """``[ROI1] text [BASE] [BOI1] codes [EOI1]``, then any ``[PAD]``."""
    used = np.flatnonzero(ids != VOCAB.command_id("[PAD]"))
    ids = ids[: used[-1] + 1] if used.size else ids[:0]
    image = len(ids) - 1 - NUM_CODES
    if image < 3:
        detail = f"{len(ids)} ids before [PAD]; a picture and its commands have {NUM_CODES + 4}"
        return Rejected(row_id, "wrong length", source, detail)
    places = {0: "[ROI1]", image - 2: "[BASE]", image - 1: "[BOI1]", len(ids) - 1: "[EOI1]"}
    for at, token in places.items():
        if ids[at] != VOCAB.command_id(token):
            detail = f"{name_of(int(ids[at]))} at position {at} of {len(ids)}, not {token}"
            return Rejected(row_id, "not a text-to-image row", source, detail)
    return make_row(row_id, ids[1 : image - 2], ids[image:-1], source)


def _flat_ids(value: object) -> Ids | None:
    """Integers as a flat array, None for anything else; too large ones stay out of range."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
        if value.dtype.kind == "u":
            # The largest ones would wrap round, perhaps to ids.
            value = np.minimum(value.astype(np.uint64), np.uint64(np.iinfo(np.int64).max))
        return value.astype(np.int64).reshape(-1)
    if isinstance(value, tuple | list) and all(type(number) is int for number in value):
        limit = np.iinfo(np.int64)
        return np.array([max(limit.min, min(n, limit.max)) for n in value], dtype=np.int64)
    return None
