"""Batches of pairs to records: captions to ids, pictures to codes, and what must be rejected.

Knows neither sources nor files: only two tokenizers and the sequence the records are for.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_cogview.configs.errors import ConfigError, refuse
from megatron_cogview.configs.sequence import MAX_SHARD_TEXT, SequenceConfig
from megatron_cogview.configs.vocab import VocabConfig
from megatron_cogview.data.decode_pool import Decoder, Tray
from megatron_cogview.data.raw import RawPair, Rejected
from megatron_cogview.data.shards import Records, record_dtype, sample_id
from megatron_cogview.tokenization.text import TextTokenizer

if TYPE_CHECKING:
    from concurrent.futures import Future

    from megatron_cogview.tokenization.image import ImageTokenizer

MAX_BATCH_BYTES = 64 << 20
"""Encoded pictures of one batch: a batch ends early rather than hold more."""

Item = RawPair | Rejected


@dataclass(slots=True)
class Counts:
    """What happened to the records of one part, besides rejections."""

    truncated: int = 0
    """Captions cut to the budget."""
    unknown_ids: int = 0
    """Text ids that stand for something the text tokenizer does not know."""
    longest_text: int = 0
    """Most text ids of a record."""


@dataclass(slots=True)
class Encoded:
    """Records and rejections, in the order of the source."""

    records: list[Records] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)


@dataclass(slots=True)
class _Pending:
    """A pair whose picture is being decoded."""

    id: str
    source: str
    text: list[int]
    truncated: bool
    decoded: "Future[str]"


@dataclass(slots=True)
class Prepared:
    """A batch on its way: captions encoded, pictures being decoded into a tray."""

    tray: Tray
    items: list[_Pending | Rejected]
    num_bytes: int
    """Its share of the part, for progress: the encoded pictures, unless the source knows better."""


def batches(items: Iterable[Item], batch_size: int) -> Iterator[list[Item]]:
    """Cut a part into batches, by number of items and by their bytes."""
    batch: list[Item] = []
    held = 0
    for item in items:
        batch.append(item)
        held += len(item.image) if isinstance(item, RawPair) else 0
        if len(batch) == batch_size or held >= MAX_BATCH_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


class PairEncoder:
    """Both tokenizers, for one sequence."""

    def __init__(
        self,
        text: TextTokenizer,
        image: "ImageTokenizer",
        sequence: SequenceConfig,
        vocab: VocabConfig | None = None,
    ) -> None:
        """Check that the tokenizers fit the sequence and, if given, the model's vocabulary.

        Raises:
            ConfigError: they do not; the message names both numbers.
        """
        self.text, self.image, self.sequence = text, image, sequence
        _check_tokenizers(text, image, sequence, vocab)
        self.dtype = record_dtype(sequence.codes_per_side)
        pixels_per_code = image.config.image_size // image.config.codes_per_side
        self._sizes = [side * pixels_per_code for side in sequence.codes_per_side]

    @property
    def sides(self) -> list[int]:
        """Picture sides in pixels that a decoder has to deliver, largest first."""
        return sorted(set(self._sizes), reverse=True)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything here that decides the bytes of a record; manifests keep it."""
        return {
            "layout": layout_settings(self.sequence),
            "tokenizers": {
                "text": {
                    "fingerprint": self.text.fingerprint,
                    "vocab_size": self.text.vocab_size,
                },
                "image": {
                    "fingerprint": self.image.fingerprint,
                    "num_codes": self.image.config.num_codes,
                    "encoder_precision": self.image.encoder_precision,
                },
            },
        }

    def prepare(self, batch: list[Item], decoder: Decoder) -> Prepared:
        """Encode the captions, and let the decoder start on the pictures that are needed."""
        captions = [item.caption for item in batch if isinstance(item, RawPair)]
        texts = iter(self.text.encode_batch(captions))
        tray = decoder.take_tray()
        prepared = Prepared(tray, [], 0)
        for place, item in enumerate(batch):
            if isinstance(item, RawPair):
                prepared.num_bytes += len(item.image)
                checked = check_text(next(texts), item.id, item.source, self.sequence)
                if not isinstance(checked, Rejected):
                    ids, cut = checked
                    decoded = decoder.submit(item.image, tray, place)
                    prepared.items.append(_Pending(item.id, item.source, ids, cut, decoded))
                    continue
                item = checked
            prepared.items.append(item)
        return prepared

    def finish(self, prepared: Prepared, encoded: Encoded) -> None:
        """Wait for the pictures, encode them, and add the batch to its part."""
        kept: list[_Pending] = []
        places: list[int] = []
        for place, item in enumerate(prepared.items):
            if isinstance(item, Rejected):
                encoded.rejected.append(item)
            elif error := item.decoded.result():
                rejected = Rejected(item.id, "unusable image", item.source, error)
                encoded.rejected.append(rejected)
            else:
                kept.append(item)
                places.append(place)
        if not kept:
            return
        records: Records = np.zeros(len(kept), dtype=self.dtype)
        for record, item in zip(records, kept, strict=True):
            record["text"][: len(item.text)] = item.text
            record["text_length"] = len(item.text)
            record["sample_id"] = sample_id(item.id)
            encoded.counts.truncated += item.truncated
            encoded.counts.unknown_ids += item.text.count(self.text.unknown_id)
            encoded.counts.longest_text = max(encoded.counts.longest_text, len(item.text))
        for index, size in enumerate(self._sizes):
            pixels_BSSC = prepared.tray.pixels[self.sides.index(size)]
            # All places filled, the common case, needs no copy.
            whole = len(places) == places[-1] + 1
            chosen = pixels_BSSC[: len(places)] if whole else pixels_BSSC[places]
            records[f"image{index}"] = self._codes(torch.from_numpy(chosen), index)
        encoded.records.append(records)

    def _codes(self, pictures_BSSC: torch.Tensor, index: int) -> Any:
        side = self.sequence.codes_per_side[index]
        codes = self.image.encode(pictures_BSSC).cpu().numpy()
        if codes.shape != (len(pictures_BSSC), side, side):
            raise ConfigError(
                f"image tokenizer: gave codes of shape {codes.shape} for {self._sizes[index]} "
                f"pixels, expected {(len(pictures_BSSC), side, side)}"
            )
        if int(codes.min()) < 0 or int(codes.max()) >= self.image.config.num_codes:
            raise ConfigError(
                f"image tokenizer: gave codes {codes.min()}..{codes.max()}, but its "
                f"num_codes = {self.image.config.num_codes}"
            )
        return codes


def layout_settings(sequence: SequenceConfig) -> dict[str, Any]:
    """The fields of a sequence that decide what a record holds."""
    return {
        "text_ids": MAX_SHARD_TEXT,
        "text_budget": sequence.text_budget,
        "text_policy": sequence.text_policy,
        "codes_per_side": list(sequence.codes_per_side),
    }


def check_text(
    ids: list[int], name: str, source: str, sequence: SequenceConfig
) -> tuple[list[int], bool] | Rejected:
    """Ids within the budget and whether they were cut, or why the pair is left out."""
    if not ids:
        return Rejected(name, "empty caption", source)
    budget = sequence.text_budget
    if len(ids) > budget and sequence.text_policy == "reject":
        detail = f"{len(ids)} ids, budget {budget}"
        return Rejected(name, "caption over the text budget", source, detail)
    return ids[:budget], len(ids) > budget


def _check_tokenizers(
    text: TextTokenizer,
    image: "ImageTokenizer",
    sequence: SequenceConfig,
    vocab: VocabConfig | None,
) -> None:
    if image.config.codes_per_side != sequence.codes_per_side[-1]:
        raise refuse(
            "sequence.codes_per_side",
            sequence.codes_per_side,
            f"the image tokenizer gives {image.config.codes_per_side} codes a side",
        )
    if vocab is None:
        return
    text.check_fits(vocab)
    if image.config.num_codes != vocab.num_image_codes:
        raise refuse(
            "model.vocab.num_image_codes",
            vocab.num_image_codes,
            f"the image tokenizer has {image.config.num_codes} codes",
        )
