"""Pictures through an image tokenizer and back: each result as a file, with its PSNR and SSIM.

Knows tars and tokenizers; judges nothing but the error in pixels.
"""

import itertools
import json
import logging
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from tqdm import tqdm

from megatron_cogview.configs.errors import DataError, refuse
from megatron_cogview.data import images
from megatron_cogview.data.raw import MAX_CAPTION_BYTES, RawPair
from megatron_cogview.data.sources import open_pictures
from megatron_cogview.storage.atomic import replacing, write_text
from megatron_cogview.storage.digest import sha256_bytes
from megatron_cogview.tokenization import fidelity
from megatron_cogview.tokenization.image import ImageTokenizer

logger = logging.getLogger(__name__)

BATCH = 64
SHEET_PAIRS = 16
SHEET_COLUMNS = 4
CAPTION_PIXELS = 14

_SAFE_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")


@dataclass
class _Outcome:
    """What has been done so far."""

    records: list[dict[str, Any]] = field(default_factory=list)
    shown: list[tuple[NDArray[np.uint8], NDArray[np.uint8], str]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


def reconstruct(
    folders: Sequence[Path], tokenizer: ImageTokenizer, output: Path, limit: int = 500
) -> dict[str, Any]:
    """Reconstruct the first ``limit`` usable pictures of folders of tars, or of tables.

    Writes ``ID.png`` (the reconstruction), ``records.jsonl`` (each pair's JSON with its ``file``,
    ``psnr`` in dB and ``ssim``), ``sheet.png`` (originals beside reconstructions) and
    ``summary.json``.

    Returns:
        The summary: ``psnr`` and ``ssim`` (means over pictures), ``pictures``, ``skipped`` by
        reason, and the tokenizer's ``fingerprint``.

    Raises:
        ConfigError: ``limit`` below 1, or no folder.
        DataError: no data, no usable picture, or an id that occurs twice.
    """
    if limit < 1:
        raise refuse("limit", limit, "must be at least 1")
    if not folders:
        raise refuse("data", folders, "name at least one folder of tars, or a table of pictures")
    sources = [open_pictures(folder) for folder in folders]
    for source in sources:
        source.check()
    output.mkdir(parents=True, exist_ok=True)
    outcome = _Outcome()
    with tqdm(total=limit, desc="reconstruct", unit="picture", mininterval=1.0) as bar:
        for source, part in ((s, part) for s in sources for part in s.parts()):
            # Counted here: a progress bar that is switched off does not count.
            if len(outcome.records) == limit:
                break
            metadata = _metadata(part.path) if part.path.suffix == ".tar" else {}
            items = source.read(part)
            while chunk := list(itertools.islice(items, min(BATCH, limit - len(outcome.records)))):
                bar.update(_reconstruct_chunk(chunk, metadata, tokenizer, output, outcome))
    if not outcome.records:
        where = ", ".join(str(folder) for folder in folders)
        raise DataError(f"{where}: no usable pair; skipped: {dict(outcome.skipped)}")
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in outcome.records)
    write_text(output / "records.jsonl", "".join(lines))
    _save(output / "sheet.png", _sheet(outcome))
    summary = {
        "psnr": float(np.mean([record["psnr"] for record in outcome.records])),
        "ssim": float(np.mean([record["ssim"] for record in outcome.records])),
        "pictures": len(outcome.records),
        "skipped": dict(sorted(outcome.skipped.items())),
        "fingerprint": tokenizer.fingerprint,
    }
    write_text(output / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def _reconstruct_chunk(
    chunk: list[Any],
    metadata: dict[str, dict[str, Any]],
    tokenizer: ImageTokenizer,
    output: Path,
    outcome: _Outcome,
) -> int:
    """Write the pictures of some pairs; how many there were."""
    done = {record["id"] for record in outcome.records}
    pairs: list[tuple[RawPair, NDArray[np.uint8]]] = []
    for item in chunk:
        if not isinstance(item, RawPair):
            outcome.skipped[item.reason] += 1
            continue
        if item.id in done:
            raise DataError(f"{item.source}: id {item.id!r} occurs twice; each needs its own")
        done.add(item.id)
        try:
            pairs.append((item, images.decode(item.image, tokenizer.config.image_size)))
        except DataError as error:
            logger.warning("%s: %s left out: %s", item.source, item.id, error)
            outcome.skipped["unusable image"] += 1
    if not pairs:
        return 0
    originals = np.stack([picture for _, picture in pairs])
    decoded = tokenizer.decode(tokenizer.encode(torch.from_numpy(originals))).numpy()
    psnr = fidelity.psnr(originals, decoded).tolist()
    ssim = fidelity.ssim(originals, decoded).tolist()
    for (pair, original), copy, p, s in zip(pairs, decoded, psnr, ssim, strict=True):
        name = _file_name(pair.id)
        _save(output / name, Image.fromarray(copy))
        outcome.records.append(
            {**metadata.get(pair.id, {}), "id": pair.id, "file": name, "psnr": p, "ssim": s}
        )
        if len(outcome.shown) < SHEET_PAIRS:
            outcome.shown.append((original, copy, f"{p:.1f} dB  {s:.2f}"))
    return len(pairs)


def _file_name(identity: str) -> str:
    """``ID.png``, or where the id cannot name a file, what is left of it and its hash."""
    if _SAFE_ID.fullmatch(identity):
        return f"{identity}.png"
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", identity)[:100].strip("._")
    return f"{plain}-{sha256_bytes(identity.encode('utf-8'))[:8]}.png"


def _metadata(path: Path) -> dict[str, dict[str, Any]]:
    """JSON objects of one tar by their ``id``; the reader gives captions only."""
    found: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                if member.isfile() and member.name.lower().endswith(".json"):
                    file = tar.extractfile(member) if member.size <= MAX_CAPTION_BYTES else None
                    value = json.loads(file.read()) if file else None
                    if isinstance(value, dict) and "id" in value:
                        found[str(value["id"])] = value
    except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
        # The reader rejects the same damage pair by pair and counts it.
        logger.warning("%s: metadata read up to the damage only (%s)", path, error)
    return found


def _sheet(outcome: _Outcome) -> Image.Image:
    """Original, reconstruction, PSNR and SSIM of the first pairs, four a row."""
    side = max(64, outcome.shown[0][0].shape[0])
    width, height = 2 * side + 10, side + CAPTION_PIXELS
    rows = -(-len(outcome.shown) // SHEET_COLUMNS)
    canvas = Image.new("RGB", (SHEET_COLUMNS * width, rows * height), "white")
    draw = ImageDraw.Draw(canvas)
    for index, (original, copy, caption) in enumerate(outcome.shown):
        left, top = (index % SHEET_COLUMNS) * width, (index // SHEET_COLUMNS) * height
        canvas.paste(Image.fromarray(original), (left, top))
        canvas.paste(Image.fromarray(copy), (left + side + 2, top))
        draw.text((left, top + side), caption, fill="black")
    return canvas


def _save(path: Path, image: Image.Image) -> None:
    with replacing(path) as file:
        image.save(file, "PNG")
