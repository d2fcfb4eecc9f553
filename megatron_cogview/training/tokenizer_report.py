"""What a trained image tokenizer is worth: PSNR on held-out pictures, code use, a picture sheet.

Works on the finished file through :class:`ImageTokenizer`, as every later user does.

Shapes: V held-out pictures, S side, C = 3.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from megatron_cogview.storage.atomic import replacing, write_text
from megatron_cogview.tokenization.image import ImageTokenizer
from megatron_cogview.training.picture_stream import Pictures

LARGEST_SAMPLE = 2048
"""Held-out pictures judged at most: the first ones in the order of the data."""
HIGHEST_PSNR = 100.0
"""Given for a picture without any error, where the formula has no value."""
_ON_SHEET = 16
_PER_ROW = 8


def psnr(original_VSSC: NDArray[np.uint8], other_VSSC: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio of each picture in dB, peak 255, at most ``HIGHEST_PSNR``."""
    difference = original_VSSC.astype(np.float32) - other_VSSC.astype(np.float32)
    mse_V = np.square(difference, dtype=np.float64).mean(axis=(1, 2, 3))
    floor = 255.0**2 / 10 ** (HIGHEST_PSNR / 10)
    return np.asarray(10.0 * np.log10(255.0**2 / np.maximum(mse_V, floor)))


def perplexity(counts: torch.Tensor) -> float:
    """exp of the entropy of the code distribution: how many codes are used as if evenly."""
    share = counts[counts > 0].double() / counts.sum()
    return math.exp(-float((share * share.log()).sum()))


def judge(tokenizer: ImageTokenizer, pictures: Pictures, folder: Path) -> dict[str, Any]:
    """Reconstruct held-out pictures; write ``reconstructions.png`` and ``reconstructions.json``.

    Returns:
        ``psnr`` (mean of the pictures' PSNR), ``psnr_pooled`` (of the mean squared error over all),
        ``codes_used``, ``perplexity`` and ``pictures_judged``.
    """
    rows = pictures.validation_rows[:LARGEST_SAMPLE]
    counts = torch.zeros(tokenizer.config.num_codes, dtype=torch.int64)
    values: list[NDArray[np.float64]] = []
    squares = 0.0
    shown: list[NDArray[np.uint8]] = []
    for start in range(0, len(rows), 64):
        original = np.asarray(pictures.pixels_NSSC[rows[start : start + 64]])
        codes = tokenizer.encode(torch.from_numpy(original))
        counts += torch.bincount(codes.flatten(), minlength=len(counts))
        copy = tokenizer.decode(codes).numpy()
        values.append(psnr(original, copy))
        squares += float(np.square(original.astype(np.float64) - copy).sum())
        shown.extend(np.stack([original, copy], axis=1)[: max(0, _ON_SHEET - len(shown))])
    all_values = np.concatenate(values)
    _write_sheet(shown, folder / "reconstructions.png")
    listing = [
        {"id": pictures.ids[row], "psnr": round(float(value), 3)}
        for row, value in zip(rows[: len(shown)], all_values, strict=False)
    ]
    write_text(
        folder / "reconstructions.json", json.dumps(listing, indent=1, ensure_ascii=False) + "\n"
    )
    mse = squares / (len(rows) * pictures.pixels_NSSC[0].size)
    return {
        "psnr": float(all_values.mean()),
        "psnr_pooled": min(HIGHEST_PSNR, 10 * math.log10(255.0**2 / mse)) if mse else HIGHEST_PSNR,
        "codes_used": int((counts > 0).sum()),
        "perplexity": perplexity(counts),
        "pictures_judged": len(rows),
    }


def _write_sheet(pairs: list[NDArray[np.uint8]], path: Path) -> None:
    """Originals with their reconstructions below, a pixel row of white between pairs."""
    side, gap = pairs[0].shape[1], 4
    columns = min(_PER_ROW, len(pairs))
    lines = -(-len(pairs) // columns)
    sheet = Image.new("RGB", (columns * (side + gap), lines * (2 * side + gap)), "white")
    for index, (original, copy) in enumerate(pairs):
        left, top = index % columns * (side + gap), index // columns * (2 * side + gap)
        sheet.paste(Image.fromarray(original), (left, top))
        sheet.paste(Image.fromarray(copy), (left, top + side))
    with replacing(path) as file:
        sheet.save(file, format="PNG")
