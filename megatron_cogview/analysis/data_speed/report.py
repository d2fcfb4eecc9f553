"""All measurements of the data path in one report: a table of figures against their targets."""

import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from megatron_cogview.analysis.data_speed import opening, preparing, reading, workers
from megatron_cogview.analysis.machine import machine
from megatron_cogview.configs.errors import DataError, refuse
from megatron_cogview.configs.presets import preset
from megatron_cogview.data.encode import PairEncoder
from megatron_cogview.data.raw import RawPair
from megatron_cogview.data.sources import open_source
from megatron_cogview.tokenization.image import load_image_tokenizer
from megatron_cogview.tokenization.text import TextTokenizer

logger = logging.getLogger(__name__)

_CAPTIONS = 40_000
_PAIRS = 4_800

Study = Literal["decoding", "captions", "workers", "opening", "reading"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure, and on what."""

    data: Path
    """Pairs, as ``tokenize_dataset.py`` takes them: pictures and captions come from there."""
    text_tokenizer: Path
    """SentencePiece model."""
    image_tokenizer: Path | None = None
    """Image tokenizer for the study of workers, which is left out without it."""
    preset: str = "photos_64"
    """Preset that the image tokenizer belongs to."""
    studies: tuple[Study, ...] = ("decoding", "captions", "workers", "opening", "reading")
    """Which to run."""
    repeats: int = 5
    """Rounds of each comparison; medians count."""
    pictures: int = 24
    """Pictures for the study of decoding."""
    records: int = 100_000
    """Records for the study of reading."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    what: str
    figure: str
    target: str
    met: bool


def measure(settings: Settings) -> dict[str, Any]:
    """Run the studies one after the other, on one thread.

    Raises:
        ConfigError: a number below 1.
        DataError: too few pairs.
    """
    for name in ("repeats", "pictures", "records"):
        if getattr(settings, name) < 1:
            raise refuse(name, getattr(settings, name), "must be at least 1")
    torch.set_num_threads(1)
    runs: dict[str, Callable[[Settings], Any]] = {
        "decoding": lambda s: preparing.decoding(_pictures(s), s.repeats),
        "captions": lambda s: preparing.captions(_captions(s), s.text_tokenizer, s.repeats),
        "workers": _workers,
        "opening": lambda s: opening.comparison(s.repeats),
        "reading": lambda s: [
            reading.comparison(s.records, shards, s.repeats) for shards in (1, 100)
        ],
    }
    results: dict[str, Any] = {**machine(torch.device("cpu")), "data": settings.data.name}
    for study in settings.studies:
        if study == "workers" and settings.image_tokenizer is None:
            logger.info("workers: left out, no --image-tokenizer")
            continue
        logger.info("%s ...", study)
        results[study] = runs[study](settings)
    return results


def table(results: dict[str, Any]) -> str:
    """Markdown: figure, target, and whether it is met."""
    lines = ["| what | measured | target | met |", "|---|---|---|---|"]
    for row in rows(results):
        met = "yes" if row.met else "**no**"
        lines.append(f"| {row.what} | {row.figure} | {row.target} | {met} |")
    return "\n".join(lines) + "\n"


def rows(results: dict[str, Any]) -> Iterator[Row]:
    """The lines of the studies that were run."""
    for row, target in zip(results.get("decoding", []), (1.3, 2.5), strict=False):
        figure = (
            f"{row['ratio']:.2f} x ({row['ours_per_second']:.0f} against "
            f"{row['pillow_per_second']:.0f} a second); {row['mean_levels_apart']:.2f} levels apart"
        )
        good = row["ratio"] >= target and row["mean_levels_apart"] <= 1.0
        yield Row(f"JPEG {row['size']} to 256 x 256, against Pillow", figure,
                  f"{target} x, 1 level", good)  # fmt: skip
    if "captions" in results:
        ratio = results["captions"]["ratio"]
        figure = f"{ratio:.2f} x ({results['captions']['ours_per_second']:,.0f} a second)"
        yield Row("captions, against SentencePiece's batched encode", figure, "0.9 x", ratio >= 0.9)
    if "workers" in results:
        one = results["workers"]
        figure = (
            f"{one['ratio']:.2f} x ({one['one_worker_seconds']:.1f} to "
            f"{one['two_workers_seconds']:.1f} s)"
        )
        yield Row("two workers, against one", figure, "1.8 x", one["ratio"] >= 1.8)
    if "opening" in results:
        yield from _opening_rows(results["opening"])
    for read in results.get("reading", []):
        yield from _reading_rows(read)


def _opening_rows(found: dict[str, Any]) -> Iterator[Row]:
    for name, what, limit in (
        ("ours_30m", "30 million records", 0.05),
        ("ours_1b", "1 billion records", 1.0),
        ("ours_resumed", "1 billion records, going on at sample 900 million", 1.0),
    ):
        row = found[name]
        figure = f"{row['seconds'] * 1e3:.0f} ms, {row['bytes'] / 1e6:.1f} MB"
        good = row["seconds"] <= limit and row["bytes"] <= 10e6
        yield Row(f"open, shuffle, first batch: {what}, {row['shards']:,} shards", figure,
                  f"{limit * 1e3:.0f} ms, 10 MB", good)  # fmt: skip
    line = found["megatron_core_30m_by_line"]
    figure = f"{found['times_as_fast']:,.0f} x ({line['seconds']:.1f} s by a line through three)"
    yield Row("the same, against megatron-core's first build: time", figure, "100 x",
              found["times_as_fast"] >= 100)  # fmt: skip
    figure = f"{found['times_as_lean']:,.0f} x ({line['bytes'] / 1e9:.2f} GB by that line)"
    yield Row("the same: memory", figure, "50 x", found["times_as_lean"] >= 50)


def _reading_rows(read: dict[str, Any]) -> Iterator[Row]:
    where = f"random batches of 64, {read['shards']} shard(s)"
    for key, what, limit in (
        ("ours_with_crc_per_second", "with CRC", 350_000),
        ("ours_per_second", "without CRC", 900_000),
    ):
        yield Row(f"{where}, {what}", f"{read[key]:,.0f} records/s", f"{limit:,}",
                  read[key] >= limit)  # fmt: skip
    for key, what, factor in (
        ("times_megatron_core", "megatron-core's IndexedDataset", 2),
        ("times_webdataset", "WebDataset", 10),
    ):
        yield Row(f"{where}, against {what}", f"{read[key]:.1f} x", f"{factor} x",
                  read[key] >= factor)  # fmt: skip


def _pairs(settings: Settings) -> Iterator[RawPair]:
    source = open_source(settings.data)
    source.check()
    for part in source.parts():
        yield from (item for item in source.read(part) if isinstance(item, RawPair))


def _pictures(settings: Settings) -> list[NDArray[np.uint8]]:
    chosen = list(islice(_pairs(settings), settings.pictures))
    if len(chosen) < settings.pictures:
        raise DataError(f"{settings.data}: {len(chosen)} pairs, {settings.pictures} are needed")
    return [np.asarray(Image.open(io.BytesIO(p.image)).convert("RGB")) for p in chosen]


def _captions(settings: Settings) -> list[str]:
    """So many that one round takes a tenth of a second; a small data set's over and over."""
    found = [pair.caption for pair in islice(_pairs(settings), _CAPTIONS)]
    return list(islice(cycle(found), _CAPTIONS))


def _workers(settings: Settings) -> dict[str, Any]:
    assert settings.image_tokenizer is not None
    run = preset(settings.preset)
    encoder = PairEncoder(
        TextTokenizer(settings.text_tokenizer),
        load_image_tokenizer(settings.image_tokenizer),
        run.sequence,
    )
    return workers.scaling(list(islice(_pairs(settings), _PAIRS)), encoder, settings.repeats)
