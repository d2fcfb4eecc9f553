"""Prompts taken from a data set: a fixed sample of its distinct captions.

Knows captions, not pictures.
"""

import hashlib
import heapq
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_cogview.configs.errors import DataError, refuse
from megatron_cogview.storage.atomic import write_text
from megatron_cogview.tokenization.text import TextTokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TextLimit:
    """Captions longer than a budget cannot be drawn under policy ``reject``."""

    tokenizer: TextTokenizer
    """Counts the ids."""
    budget: int
    """Most ids of a caption."""

    def keeps(self, captions: list[str]) -> list[str]:
        """Those within the budget."""
        ids = self.tokenizer.encode_batch(captions)
        return [c for c, each in zip(captions, ids, strict=True) if len(each) <= self.budget]


def sample_captions(
    captions: Iterable[str], count: int, seed: int = 0, limit: TextLimit | None = None
) -> list[str]:
    """Draw ``count`` distinct captions; all of them, with a word about it, if there are fewer.

    A caption's rank is the hash of seed and text, so the draw depends neither on the order of the
    captions nor on how often each occurs.

    Raises:
        ConfigError: ``count`` below 1.
        DataError: no caption can be used.
    """
    if count < 1:
        raise refuse("count", count, "must be at least 1")
    distinct = sorted({stripped for caption in captions if (stripped := caption.strip())})
    kept = limit.keeps(distinct) if limit else distinct
    if len(kept) < len(distinct):
        logger.warning("%d captions over the text budget left out", len(distinct) - len(kept))
    if not kept:
        raise DataError("no caption to draw from: all are empty or over the text budget")
    if len(kept) < count:
        logger.warning("only %d distinct captions, %d were asked for", len(kept), count)

    def rank(caption: str) -> bytes:
        return hashlib.sha256(f"{seed}:{caption}".encode()).digest()

    return heapq.nsmallest(count, kept, key=rank)


def write_prompts(path: Path, captions: list[str]) -> None:
    """Write JSON lines ``{"id": "prompt-0000", "caption": ...}``, as ``generate`` reads them."""
    rows = ({"id": f"prompt-{i:04d}", "caption": c} for i, c in enumerate(captions))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
