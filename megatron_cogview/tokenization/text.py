"""Captions to SentencePiece ids and back, and the training of such a model.

A caption is always plain text: whatever it spells, it never becomes a control or command id.  Knows
nothing of global ids or sequences.
"""

import io
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece as spm

from megatron_cogview.configs.errors import ConfigError, DataError
from megatron_cogview.configs.vocab import VocabConfig
from megatron_cogview.storage.atomic import write_bytes
from megatron_cogview.storage.digest import sha256_bytes

logger = logging.getLogger(__name__)

CONTROL_PIECES = 3
"""``<unk>``, ``<s>`` and ``</s>`` of a model trained here."""
BYTE_PIECES = 256
SPACES = re.compile(r"[\s\x00-\x1f\x7f-\x9f]+")
"""White space of any script, line breaks and control characters."""


def normalise(caption: str) -> str:
    """Unicode NFC; line breaks, control characters and runs of white space become one space."""
    return SPACES.sub(" ", unicodedata.normalize("NFC", caption)).strip()


def _all_normal(captions: Sequence[str]) -> bool:
    """Whether :func:`normalise` would surely change none of them; most captions are so already,
    and one look at all costs a tenth of normalising each."""
    # Between spaces, a space at either end of a caption makes two.
    text = f" {' '.join(captions)} "
    return "  " not in text and text.isprintable() and unicodedata.is_normalized("NFC", text)


class TextTokenizer:
    """A SentencePiece model (P-TOK-1)."""

    def __init__(self, path: Path) -> None:
        """Load a ``.model`` file.

        Raises:
            DataError: the file is missing, not a SentencePiece model, or one that turns text into
                control ids.
        """
        self.path = Path(path)
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise DataError(f"text tokenizer {path}: cannot be read ({error.strerror})") from None
        self._processor = spm.SentencePieceProcessor()
        try:
            if not data:
                raise RuntimeError("empty file")
            self._processor.LoadFromSerializedProto(data)
        except RuntimeError:
            raise DataError(f"text tokenizer {path}: not a SentencePiece model") from None
        self.fingerprint: str = sha256_bytes(data)
        """SHA-256 of the model file, hex."""
        self.vocab_size: int = self._processor.vocab_size()
        """Number of pieces; ids are ``0..vocab_size - 1``."""
        self.unknown_id: int = self._processor.unk_id()
        """Id of what has no piece, or -1."""
        self._refuse_leaks()

    def encode(self, caption: str) -> list[int]:
        """Local ids of a caption, without control ids; an empty caption gives none.

        Raises:
            DataError: the caption holds half of a surrogate pair.
        """
        return self.encode_batch([caption])[0]

    def encode_batch(self, captions: Sequence[str]) -> list[list[int]]:
        """:meth:`encode` of each caption, in order."""
        texts = list(captions)
        if not _all_normal(texts):
            texts = [normalise(caption) for caption in texts]
            try:
                "".join(texts).encode("utf-8")
            except UnicodeEncodeError:
                raise DataError("a caption is not valid Unicode (half a surrogate pair)") from None
        batch: list[list[int]] = self._processor.encode(texts, out_type=int, num_threads=1)
        return batch

    def _refuse_leaks(self) -> None:
        """The model may be the user's own; that text never becomes a control id is our promise.

        A piece is given only for text that spells it, so spelling each control piece is enough.
        """
        control = {i for i in range(self.vocab_size) if self._processor.is_control(i)}
        pieces = [self._processor.id_to_piece(i) for i in sorted(control)]
        for ids in self._processor.encode([*pieces, *(f"a {p}{p}b" for p in pieces)], out_type=int):
            if not control.isdisjoint(ids):
                raise DataError(
                    f"text tokenizer {self.path}: turns plain text into control ids; use another"
                )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of local ids; the inverse of :meth:`encode` up to the model's normalisation.

        Raises:
            DataError: an id outside the model's pieces.
        """
        values = [int(i) for i in ids]
        for value in values:
            if not 0 <= value < self.vocab_size:
                raise DataError(
                    f"text id {value}: {self.path} has 0..{self.vocab_size - 1}; "
                    f"it is not the tokenizer of this text"
                )
        text: str = self._processor.decode(values)
        return text

    def check_fits(self, vocab: VocabConfig) -> None:
        """Refuse a model with more pieces than the vocabulary has text ids.

        Raises:
            ConfigError: naming both numbers.
        """
        if self.vocab_size > vocab.num_text_ids:
            raise ConfigError(
                f"model.vocab.num_text_ids = {vocab.num_text_ids}: the text tokenizer {self.path} "
                f"has {self.vocab_size} pieces; train one with --vocab-size {vocab.num_text_ids} "
                f"or choose a preset with more text ids"
            )


def train(
    captions: Iterable[str],
    output: Path,
    vocab_size: int,
    character_coverage: float | None = None,
) -> TextTokenizer:
    """Train a BPE model on captions and write it atomically; same input, same bytes.

    The model never has more than ``vocab_size`` pieces and has fewer when the captions give no
    more.  Where the vocabulary allows it, characters that have no piece are spelled in bytes, so
    nothing is lost.  ``character_coverage``: share of character occurrences that get pieces of
    their own; by default 0.9995, or all for up to 1,000 different characters.

    Raises:
        DataError: no caption with text.
        ConfigError: ``vocab_size`` too small for any model.
    """
    lines = [line for line in map(normalise, captions) if line]
    if not lines:
        raise DataError("no captions to train a text tokenizer on: all are empty or missing")
    counts = Counter(c for line in lines for c in line if c != " ")
    # Below that, bytes would leave no room for characters.
    byte_fallback = vocab_size >= CONTROL_PIECES + BYTE_PIECES + 64
    room = vocab_size - CONTROL_PIECES - (BYTE_PIECES if byte_fallback else 0)
    if room < 2:
        raise ConfigError(f"vocab_size = {vocab_size}: must be at least {CONTROL_PIECES + 2}")
    kept = _covered_characters(counts, character_coverage, room * 3 // 4)
    data = _train_bpe(_only(lines, kept), vocab_size, byte_fallback)
    write_bytes(output, data)
    tokenizer = TextTokenizer(output)
    logger.info(
        "text tokenizer %s: %d pieces from %d captions; %d of %d characters have one; bytes: %s",
        output, tokenizer.vocab_size, len(lines), len(kept), len(counts), byte_fallback,
    )  # fmt: skip
    return tokenizer


def adopt(model: Path, output: Path) -> TextTokenizer:
    """Check a model the user brings and copy it to ``output``.

    Raises:
        DataError: not a SentencePiece model.
    """
    tokenizer = TextTokenizer(model)
    write_bytes(output, Path(model).read_bytes())
    copy = TextTokenizer(output)
    assert copy.fingerprint == tokenizer.fingerprint
    return copy


def _covered_characters(counts: Counter[str], coverage: float | None, most: int) -> set[str]:
    """The commonest characters, up to ``coverage`` of all occurrences and ``most`` of them.

    SentencePiece itself refuses a coverage below 0.98 and a vocabulary below the characters, so
    the choice is made here.
    """
    wanted = coverage or (1.0 if len(counts) <= 1000 else 0.9995)
    total, covered = counts.total(), 0
    kept: set[str] = set()
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if len(kept) >= most or covered >= wanted * total:
            break
        kept.add(character)
        covered += count
    return kept


def _only(lines: list[str], kept: set[str]) -> list[str]:
    """Training lines with every other character replaced by a space."""
    cut = ("".join(c if c in kept else " " for c in line).strip() for line in lines)
    return [line for line in cut if line]


def _train_bpe(lines: list[str], vocab_size: int, byte_fallback: bool) -> bytes:
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,
            byte_fallback=byte_fallback,
            hard_vocab_limit=False,
            # The caption is normalised already; any more could not be undone by decode().
            normalization_rule_name="identity",
            num_threads=1,
            max_sentence_length=1 << 16,
            pad_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise ConfigError(f"vocab_size = {vocab_size}: SentencePiece refused: {error}") from error
    return model.getvalue()
