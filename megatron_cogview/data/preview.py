"""A few records decoded back to captions and pictures, and a summary of their data set.

Gathers; ``preview_page.py`` draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_cogview.configs.data import DataConfig
from megatron_cogview.configs.errors import DataError, refuse
from megatron_cogview.data.shard_set import ShardSet
from megatron_cogview.data.shards import Records
from megatron_cogview.tokenization.image import ImageTokenizer, VQTokenizer
from megatron_cogview.tokenization.text import TextTokenizer

LENGTHS_SAMPLE = 1000
"""Random records whose text lengths are counted; few, because each may cost a disk access."""
AT_ONCE = 64
"""Records in memory at a time, with their pictures."""

Pixels = NDArray[np.uint8]


@dataclass(slots=True)
class Shown:
    """One record."""

    number: int
    """Within the set."""
    place: str
    """Shard, and number within it."""
    sample_id: int
    """Hash of the source's id."""
    part: str
    """``training`` or ``validation``, at the default fraction."""
    text_ids: list[int]
    """Without padding."""
    caption: str | None
    """Decoded; None without a text tokenizer."""
    pictures: list[Pixels]
    """One a grid: uint8 ``[side, side, 3]`` decoded, or ``[side, side]``, a grey map of codes."""
    faults: list[str] = field(default_factory=list)
    """Why something could not be decoded."""


@dataclass(slots=True)
class Preview:
    """A data set at a glance."""

    folder: Path
    """Of the shards."""
    manifest: dict[str, Any]
    """As read."""
    num_bytes: int
    """Of all files of the folder."""
    fraction: float
    """Validation part."""
    num_train: int
    """Records for training."""
    num_validation: int
    """Records for validation."""
    text_lengths: list[int]
    """Of a random sample."""
    shown: list[Shown]
    """Decoded records."""


def preview(
    folder: Path,
    text: TextTokenizer | None = None,
    image: ImageTokenizer | None = None,
    records: Sequence[int] = (),
    count: int = 64,
    seed: int = 0,
) -> Preview:
    """Read a summary and some records.

    Args:
        folder: with ``manifest.json``.
        text: decodes captions; without it there are ids only.
        image: decodes pictures; without it codes are drawn as shades of grey.
        records: numbers of the records to show; by default ``count`` random ones.
        count: how many.
        seed: which.

    Raises:
        ConfigError: a negative ``count``, a record number outside the set.
        DataError: damaged shards, or tokenizers other than those that made them.
    """
    shards = ShardSet(folder)
    shards.check_tokenizers(
        text.fingerprint if text else None,
        image.fingerprint if image else None,
    )
    chosen = _chosen(len(shards), records, count, seed)
    fraction = DataConfig().validation_fraction
    split = shards.split(fraction)
    is_validation = np.isin(chosen, split.validation(np.arange(split.num_validation)))
    shown: list[Shown] = []
    for first in range(0, len(chosen), AT_ONCE):
        numbers = chosen[first : first + AT_ONCE]
        parts = np.where(is_validation[first : first + AT_ONCE], "validation", "training")
        shown += _decode(shards, numbers, parts.tolist(), text, image)
    sample = _chosen(len(shards), (), LENGTHS_SAMPLE, seed)
    return Preview(
        folder=shards.folder,
        manifest=shards.manifest,
        num_bytes=sum(p.stat().st_size for p in shards.folder.iterdir() if p.is_file()),
        fraction=fraction,
        num_train=split.num_train,
        num_validation=split.num_validation,
        text_lengths=shards.read(np.sort(sample))["text_length"].tolist(),
        shown=shown,
    )


def _chosen(size: int, records: Sequence[int], count: int, seed: int) -> NDArray[np.int64]:
    if count < 0:
        raise refuse("count", count, "must be at least 0")
    for number in records:
        if not 0 <= number < size:
            raise refuse("records", number, f"the set has records 0..{size - 1}")
    if records:
        return np.array(records, dtype=np.int64)
    picked = np.random.default_rng(seed).choice(size, min(count, size), replace=False)
    return np.sort(picked.astype(np.int64))


def _decode(
    shards: ShardSet,
    numbers: NDArray[np.int64],
    parts: list[str],
    text: TextTokenizer | None,
    image: ImageTokenizer | None,
) -> list[Shown]:
    records = shards.read(numbers)
    ends = np.cumsum([entry["records"] for entry in shards.manifest["shards"]])
    shown = []
    for number, part, record in zip(numbers.tolist(), parts, records, strict=True):
        shard = int(np.searchsorted(ends, number, side="right"))
        entry = shards.manifest["shards"][shard]
        row = number - (int(ends[shard]) - entry["records"])
        item = Shown(
            number=number,
            place=f"{entry['name']}, record {row}",
            sample_id=int(record["sample_id"]),
            part=part,
            text_ids=record["text"][: int(record["text_length"])].tolist(),
            caption=None,
            pictures=[],
        )
        if text is not None:
            try:
                item.caption = text.decode(item.text_ids)
            except DataError as error:
                item.faults.append(str(error))
        shown.append(item)
    for index in range(len(shards.codes_per_side)):
        _add_pictures(shown, records, f"image{index}", _num_codes(shards), image)
    return shown


def _num_codes(shards: ShardSet) -> int:
    """For shades of grey; a manifest of another writer may not say."""
    return int(shards.manifest["tokenizers"]["image"].get("num_codes", 1 << 16))


def _add_pictures(
    shown: list[Shown],
    records: Records,
    name: str,
    num_codes: int,
    image: ImageTokenizer | None,
) -> None:
    codes_NSS = np.ascontiguousarray(records[name])
    decoded = _pictures(codes_NSS, image)
    for index, item in enumerate(shown):
        picture = decoded.get(index)
        if picture is None:
            shades = codes_NSS[index].astype(np.int64) * 255 // max(1, num_codes - 1)
            picture = np.minimum(shades, 255).astype(np.uint8)
            if image is not None:
                largest, side = int(codes_NSS[index].max()), codes_NSS.shape[1]
                item.faults.append(
                    f"{name}: {side} x {side} codes up to {largest} cannot be decoded by this "
                    f"tokenizer ({image.config.codes_per_side} a side, {image.config.num_codes} "
                    "codes); drawn as shades of grey"
                )
        item.pictures.append(picture)


def _pictures(codes_NSS: NDArray[np.uint16], image: ImageTokenizer | None) -> dict[int, Pixels]:
    """Pictures by place; none for codes that the tokenizer does not have."""
    if image is None:
        return {}
    good = np.flatnonzero(codes_NSS.max(axis=(1, 2)) < image.config.num_codes)
    if not good.size:
        return {}
    codes = torch.from_numpy(codes_NSS[good].astype(np.int64))
    if codes.shape[1] == image.config.codes_per_side:
        pictures = image.decode(codes)
    elif isinstance(image, VQTokenizer):
        # The other grid of a super-resolution record: the network is the same at any side.
        device = image.model.quantize_t.embed.device
        with torch.no_grad():
            pictures = image.pixels.to_uint8(image.model.decode(codes.to(device))).cpu()
    else:
        return {}
    return dict(zip(good.tolist(), pictures.numpy(), strict=True))
