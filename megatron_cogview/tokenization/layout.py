"""SequenceLayout: the only place that knows templates and positions.

A template is a list of segments.  Text follows its command at once, without padding in between;
``[PAD]`` fills the end.  Training, evaluation and generation all ask this module.  It knows
neither files nor tokenizers.

Shapes: N records, L layout length, T text slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_cogview.configs.errors import ConfigError, DataError
from megatron_cogview.configs.sequence import SequenceConfig
from megatron_cogview.configs.vocab import VocabConfig
from megatron_cogview.tokenization import vocab as ids_of


@dataclass(frozen=True, slots=True)
class Command:
    """One command token."""

    token: str
    """Its name, such as ``[BOI1]``."""
    restarts_positions: bool = False
    """Positions are counted again from 0 at this token (P-SR-4)."""


@dataclass(frozen=True, slots=True)
class Text:
    """The caption, 0 to ``text_budget`` ids."""


@dataclass(frozen=True, slots=True)
class Image:
    """All codes of one grid, row by row."""

    index: int
    """Which of ``sequence.codes_per_side``."""


Segment = Command | Text | Image


def template(name: str) -> tuple[Segment, ...]:
    """Segments of ``text_to_image`` (P-SEQ-1), ``super_resolution`` (P-SR-3), ``image_to_text``
    (P-CAP-1); each holds one :class:`Text`."""
    caption = (Command("[ROI1]"), Text())
    first_image = (Command("[BASE]"), Command("[BOI1]"), Image(0), Command("[EOI1]"))
    if name == "text_to_image":
        return (*caption, *first_image)
    if name == "super_resolution":
        restart = Command("[ROI2]", restarts_positions=True)
        second_image = (Command("[BASE]"), Command("[BOI2]"), Image(1), Command("[EOI2]"))
        return (*caption, *first_image, restart, *second_image)
    if name == "image_to_text":
        return (*first_image, *caption, Command("[SEP]"))
    raise ConfigError(
        f"sequence.template = {name!r}: must be text_to_image, super_resolution or image_to_text"
    )


class SequenceLayout:
    """Builds and reads id sequences of one template and one vocabulary."""

    def __init__(self, sequence: SequenceConfig, vocab: VocabConfig) -> None:
        """Check that the template fits.

        Raises:
            ConfigError: commands + codes + text budget exceed ``sequence.length``.
        """
        self.sequence = sequence
        self.vocab = vocab
        self.segments = template(sequence.template)
        at = self.segments.index(Text())
        self._before = self.segments[:at]
        self._after = self.segments[at + 1 :]
        self._pad = vocab.command_id("[PAD]")
        self._restarts = [
            vocab.command_id(s.token)
            for s in self.segments
            if isinstance(s, Command) and s.restarts_positions
        ]
        self.fixed_length = sum(self._length(s) for s in self.segments if not isinstance(s, Text))
        """Ids of a sequence that are not text."""
        needed = self.fixed_length + sequence.text_budget
        if needed > sequence.length:
            raise ConfigError(
                f"sequence.length = {sequence.length}: the template {sequence.template!r} has "
                f"{self.fixed_length} fixed ids and sequence.text_budget = {sequence.text_budget}, "
                f"together {needed}; raise the length or lower the budget to at most "
                f"{sequence.length - self.fixed_length}"
            )

    def build(self, text_ids: Sequence[int], *image_codes: ArrayLike) -> NDArray[np.int64]:
        """One sequence ``[L]`` from local text ids and one grid of local codes per image.

        Grids may be ``[side, side]`` or flat.

        Raises:
            DataError: text over the budget, an id out of range, a grid of another size.
        """
        text_1T = np.asarray(text_ids, dtype=np.int64).reshape(1, -1)
        grids = [np.asarray(codes)[None] for codes in image_codes]
        ids_1L = self.build_batch(text_1T, np.array([text_1T.shape[1]]), *grids)
        return ids_1L.reshape(-1)

    def build_batch(
        self, text_NT: ArrayLike, text_length_N: ArrayLike, *image_codes: ArrayLike
    ) -> NDArray[np.int64]:
        """Sequences ``[N, L]`` from local text ids, their numbers, and one ``[N, ...]`` per image.

        Text beyond a record's length is not looked at.

        Raises:
            DataError: as :meth:`build`.
        """
        text_NT, length_N = np.asarray(text_NT), np.asarray(text_length_N, dtype=np.int64)
        slots = self._check_lengths(text_NT, length_N)
        grids = self._check_grids(image_codes, len(text_NT))
        column = np.arange(slots)
        text_NT = np.where(column < length_N[:, None], text_NT[:, :slots], 0)
        before = [self._global(s, grids, len(text_NT)) for s in self._before]
        after = [self._global(s, grids, len(text_NT)) for s in self._after]
        pad_N1 = np.full((len(text_NT), 1), self._pad)
        wide_NW = np.concatenate(
            [*before, ids_of.text_to_global(text_NT, self.vocab), *after, pad_N1], axis=1
        )
        # Every record skips its unused text slots; past the end, all read the [PAD] column.
        text_end_N1 = sum(b.shape[1] for b in before) + length_N[:, None]
        column_1L = np.arange(self.sequence.length)[None]
        skipped_NL = np.where(column_1L < text_end_N1, 0, slots - length_N[:, None])
        source_NL = np.minimum(column_1L + skipped_NL, wide_NW.shape[1] - 1)
        return np.take_along_axis(wide_NW, source_NL, axis=1)

    def positions(self, ids: ArrayLike) -> NDArray[np.int64]:
        """Position of each id of ``[..., S]``, S up to L: counted from 0, again at each restart.

        Works on a beginning of a sequence too, so that generation and training agree.  Positions
        stay below ``length - 1``, the number of positions that the model has.
        """
        array = np.asarray(ids)
        index = np.broadcast_to(np.arange(array.shape[-1]), array.shape)
        start = np.zeros_like(index)
        if self._restarts:
            marks = np.where(np.isin(array, self._restarts), index, 0)
            start = np.maximum.accumulate(marks, axis=-1)
        return np.asarray(np.minimum(index - start, self.sequence.model_length - 1))

    def parse(self, ids: ArrayLike) -> tuple[list[int], list[NDArray[np.int64]]]:
        """The inverse of :meth:`build`: local text ids and ``[side, side]`` local codes.

        Raises:
            DataError: ``ids`` was not built by this layout.
        """
        array = np.asarray(ids, dtype=np.int64)
        used = int((array != self._pad).sum()) if array.ndim == 1 else 0
        num_text = used - self.fixed_length
        if array.shape != (self.sequence.length,) or num_text < 0:
            raise DataError(
                f"ids of shape {array.shape}: not a sequence of {self.sequence.template}"
            )
        text: list[int] = []
        codes: list[NDArray[np.int64]] = []
        at = 0
        for segment in self.segments:
            part = array[
                at : at + (num_text if isinstance(segment, Text) else self._length(segment))
            ]
            at += len(part)
            if isinstance(segment, Text):
                text = ids_of.text_to_local(part, self.vocab).tolist()
            elif isinstance(segment, Image):
                side = self.sequence.codes_per_side[segment.index]
                codes.append(ids_of.image_to_local(part, self.vocab).reshape(side, side))
            elif part[0] != self.vocab.command_id(segment.token):
                raise DataError(f"id {part[0]} at {at - 1}: expected {segment.token}")
        if (array[at:] != self._pad).any():
            raise DataError("ids after the end of the sequence are not [PAD]")
        return text, codes

    def prompt(
        self, text_ids: Sequence[int] = (), *image_codes: ArrayLike
    ) -> tuple[NDArray[np.int64], int]:
        """What stands before the template's last content, and how many ids to generate at most.

        For pictures this ends with the last ``[BOI*]`` and the number is that grid's codes; for
        ``image_to_text`` it ends with ``[ROI1]`` and the number is the text budget.
        ``image_codes`` are the grids that are given, in the template's order.

        Raises:
            DataError: text over the budget, a given grid missing or too many.
        """
        last = max(i for i, s in enumerate(self.segments) if not isinstance(s, Command))
        target = self.segments[last]
        given = [s for s in self.segments[:last] if isinstance(s, Image)]
        grids = self._check_grids([np.asarray(c)[None] for c in image_codes], 1, len(given))
        if isinstance(target, Text) and len(text_ids):
            raise DataError(f"template {self.sequence.template!r} generates the text; give none")
        text_1T = np.asarray(text_ids, dtype=np.int64).reshape(1, -1)
        self._check_lengths(text_1T, np.array([text_1T.shape[1]]))
        parts = [
            ids_of.text_to_global(text_1T, self.vocab)
            if isinstance(s, Text)
            else self._global(s, grids, 1)
            for s in self.segments[:last]
        ]
        count = self.sequence.text_budget if isinstance(target, Text) else self._length(target)
        return np.concatenate(parts, axis=1)[0], count

    def loss_weights(
        self, labels: ArrayLike, text_weight: float, image_weight: float
    ) -> NDArray[np.float32]:
        """Weight of each label: image code, any other id (commands count as text), ``[PAD]`` 0."""
        array = np.asarray(labels)
        weights = np.where(ids_of.is_image(array, self.vocab), image_weight, text_weight)
        return np.where(array == self._pad, 0.0, weights).astype(np.float32)

    def text_region(self, ids: ArrayLike) -> NDArray[np.int64]:
        """Ids before the first image code, ``[..., S] -> [...]``.

        For ``text_to_image`` that is ``[ROI1]``, the text, ``[BASE]`` and ``[BOI1]``: the keys
        that sparse attention never drops (P-ATT-1).
        """
        image = ids_of.is_image(ids, self.vocab)
        first = np.where(image.any(-1), image.argmax(-1), image.shape[-1])
        return np.asarray(first, dtype=np.int64)

    def _length(self, segment: Segment) -> int:
        if isinstance(segment, Image):
            return self.sequence.codes_per_side[segment.index] ** 2
        return 1

    def _global(
        self, segment: Segment, grids: list[NDArray[np.int64]], n: int
    ) -> NDArray[np.int64]:
        if isinstance(segment, Image):
            return grids[segment.index]
        assert isinstance(segment, Command)
        return np.full((n, 1), self.vocab.command_id(segment.token))

    def _check_lengths(self, text_NT: NDArray[np.generic], length_N: NDArray[np.int64]) -> int:
        """Text slots to look at, at most the budget."""
        slots = min(int(text_NT.shape[1]), self.sequence.text_budget)
        longest = int(length_N.max(initial=0))
        if longest > slots or int(length_N.min(initial=0)) < 0:
            raise DataError(
                f"text of {longest} ids: sequence.text_budget = {self.sequence.text_budget}; "
                f"apply the text policy when tokenising"
            )
        return slots

    def _check_grids(
        self, image_codes: Sequence[ArrayLike], n: int, expected: int | None = None
    ) -> list[NDArray[np.int64]]:
        """Grids as global ids ``[N, side * side]``."""
        sides = self.sequence.codes_per_side[:expected]
        if len(image_codes) != len(sides):
            raise DataError(
                f"{len(image_codes)} image grid(s): template {self.sequence.template!r} takes "
                f"{len(sides)} here"
            )
        grids = []
        for side, codes in zip(sides, image_codes, strict=True):
            array = np.asarray(codes)
            if array.shape not in ((n, side, side), (n, side * side)):
                raise DataError(f"image codes of shape {array.shape}: expected {(n, side, side)}")
            grids.append(ids_of.image_to_global(array.reshape(n, side * side), self.vocab))
        return grids
