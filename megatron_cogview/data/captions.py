"""Which field of a source is the caption, and replacing captions by id.

Knows JSON fields and texts; opens no picture.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from megatron_cogview.configs.errors import ConfigError, DataError, refuse
from megatron_cogview.data.caption_map import CaptionMap
from megatron_cogview.data.fields import Trouble
from megatron_cogview.data.raw import PairSource, Part, RawPair, Rejected, printable

logger = logging.getLogger(__name__)

CaptionFrom = Literal["auto", "json", "txt"]

_LOOKED_AT = 256
"""Pairs at the beginning of a source by which a caption map is judged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionRule:
    """Where a caption stands.

    Raises:
        ConfigError: a language together with ``.txt`` files, which have none, or an empty name.
    """

    key: str = "caption"
    """Field of the JSON, or column of the table."""
    language: str | None = None
    """With ``zh`` the field is ``caption_zh``."""
    caption_from: CaptionFrom = "auto"
    """``json``: the field alone; ``txt``: the text file; ``auto``: the field if it holds text, else
    the text file, except with a language, because a text file does not say which is its own."""
    required: bool = True
    """Whether a pair without a caption is rejected; otherwise its caption is empty."""

    def __post_init__(self) -> None:
        if not self.key:
            raise refuse("caption_key", self.key, "must not be empty")
        if self.language is not None and not self.language:
            raise refuse("language", self.language, "must not be empty; leave it out")
        if self.language is not None and self.caption_from == "txt":
            raise refuse(
                "language", self.language, "a .txt has no language; use caption_from = 'json'"
            )

    @property
    def field(self) -> str:
        """Name of the field or column."""
        return self.key if self.language is None else f"{self.key}_{self.language}"

    @property
    def place(self) -> CaptionFrom:
        """``caption_from`` with the language taken into account."""
        return "json" if self.language is not None else self.caption_from

    @property
    def description(self) -> dict[str, Any]:
        """Plain values for provenance; equal where the same captions are read."""
        return {
            "caption_key": self.field,
            "caption_from": self.place,
            "caption_required": self.required,
        }

    def find(self, fields: Mapping[str, Any] | None, text: bytes | None = None) -> str | Trouble:
        """The caption of one pair, or why there is none.

        Args:
            fields: its JSON or its row of the table.
            text: content of its ``.txt``.

        Returns:
            The field's text as it stands, or that of the file without white space around it.  If no
            caption is required, "" instead of trouble.
        """
        caption = self._find(fields, text)
        return "" if isinstance(caption, Trouble) and not self.required else caption

    def _find(self, fields: Mapping[str, Any] | None, text: bytes | None) -> str | Trouble:
        value = None if fields is None or self.place == "txt" else fields.get(self.field)
        if text is not None and self.place != "json" and not isinstance(value, str):
            return _decode(text)
        if self.place == "txt":
            return Trouble("no caption", "no .txt")
        if fields is None:
            return Trouble("no caption", "no .json" + ", no .txt" * (self.place == "auto"))
        if value is None:
            there = "is null" if self.field in fields else "is missing"
            return Trouble("no caption", f"{self.field!r} {there}")
        if not isinstance(value, str):
            return Trouble("caption is not text", type(value).__name__)
        if printable(value) != value:
            return Trouble("caption is not valid Unicode")
        return value


def _decode(text: bytes) -> str | Trouble:
    try:
        return text.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        return Trouble("caption is not valid Unicode", f"byte {error.start} of the .txt")


DEFAULT_CAPTIONS = CaptionRule()
"""The field ``caption``, else the text file."""
PICTURES_ONLY = CaptionRule(required=False)
"""For readers to whom captions do not matter."""


class Recaptioned:
    """A source whose captions are replaced by those of a map, where it has one.

    A pair that is not in the map keeps its caption; if it has none either, it is rejected.
    """

    def __init__(self, source: PairSource, caption_map: CaptionMap) -> None:
        """Take a source that reads with captions not required.

        Otherwise pairs without a caption of their own would be rejected before the map is asked.

        Raises:
            ConfigError: ``source`` requires captions.
        """
        if source.description.get("caption_required", False):
            raise ConfigError(
                "caption_map: the source below it must be opened with CaptionRule(required=False)"
            )
        self._source, self._map = source, caption_map
        self._counts: dict[str, dict[str, int]] = {}

    @property
    def description(self) -> dict[str, Any]:
        """That of the source, and the map's fingerprint."""
        return {**self._source.description, "caption_map": self._map.fingerprint}

    def parts(self) -> list[Part]:
        """Those of the source."""
        return self._source.parts()

    def digest(self, part: Part) -> str:
        """That of the source; the map is in the description."""
        return self._source.digest(part)

    def read(self, part: Part) -> Iterator[RawPair | Rejected]:
        """Pairs of one part with their new captions."""
        counts = self._counts[part.name] = {"replaced": 0, "kept": 0}
        for item in self._source.read(part):
            if isinstance(item, Rejected):
                yield item
                continue
            caption, replaced = self._map.replace(item.id, item.caption)
            if not replaced and not caption:
                yield Rejected(
                    item.id, "no caption", item.source, "neither of its own nor in the caption map"
                )
                continue
            counts["replaced" if replaced else "kept"] += 1
            yield RawPair(item.id, item.image, caption, item.source)

    def counts(self, part_name: str) -> dict[str, int]:
        """Pairs of a part that has been read: ``replaced``, and ``kept`` (not in the map)."""
        return dict(self._counts[part_name])

    def check(self) -> None:
        """Check the source, and that its first pairs get captions at all.

        Raises:
            DataError: none of them does; the message shows an id of either side.
        """
        self._source.check()
        first = self._source.parts()[0]
        pairs = [p for p in islice(self.read(first), _LOOKED_AT) if _is_judged(p)]
        if not pairs:
            return
        example = f"a pair is {pairs[0].id!r}, a line of the map {self._map.first_id!r}"
        if not any(isinstance(p, RawPair) for p in pairs):
            raise DataError(
                f"{self._map.path}: holds no caption for the first {len(pairs)} pairs of "
                f"{first.name}, which have none of their own; the ids must be the same: {example}"
            )
        if not self._counts[first.name]["replaced"]:
            logger.warning(
                "%s: none of the first %d pairs of %s is in the map; %s",
                self._map.path, len(pairs), first.name, example,
            )  # fmt: skip


def _is_judged(item: RawPair | Rejected) -> bool:
    """Not what was rejected for another reason than its caption."""
    return isinstance(item, RawPair) or item.reason == "no caption"
