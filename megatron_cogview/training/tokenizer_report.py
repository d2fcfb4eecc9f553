"""What a trained image tokenizer is worth: errors on held-out pictures, code use, a picture sheet.

Works through :class:`ImageTokenizer`, as every later user does.

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
from megatron_cogview.tokenization import fidelity
from megatron_cogview.tokenization.image import ImageTokenizer
from megatron_cogview.training.picture_stream import Pictures

_ON_SHEET = 16
_PER_ROW = 8
_BATCH = 64


def perplexity(counts: torch.Tensor) -> float:
    """exp of the entropy of the code distribution: how many codes are used as if evenly.

    NaN without any count.
    """
    if not bool(counts.any()):
        return math.nan
    share = counts[counts > 0].double() / counts.sum()
    return math.exp(-float((share * share.log()).sum()))


def judge(
    tokenizer: ImageTokenizer, pictures_VSSC: NDArray[np.uint8]
) -> tuple[dict[str, float], NDArray[np.uint8]]:
    """Send pictures through the tokenizer and back.

    Returns:
        ``l1``, ``l2``, ``psnr`` and ``ssim`` (means over the pictures; see :mod:`fidelity`),
        ``psnr_pooled`` (of the mean squared error over all), ``spectrum_distance`` (dB),
        ``codes_used``, ``perplexity`` and ``pictures_judged``; and the first pictures with their
        reconstructions below.
    """
    counts = torch.zeros(tokenizer.config.num_codes, dtype=torch.int64)
    copies = []
    for start in range(0, len(pictures_VSSC), _BATCH):
        codes = tokenizer.encode(torch.from_numpy(pictures_VSSC[start : start + _BATCH]))
        counts += torch.bincount(codes.flatten(), minlength=len(counts))
        copies.append(tokenizer.decode(codes).numpy())
    copies_VSSC = np.concatenate(copies)
    l2 = float(fidelity.l2(pictures_VSSC, copies_VSSC).mean())
    pooled = -10 * math.log10(l2) if l2 else fidelity.HIGHEST_PSNR
    numbers = {
        "l1": float(fidelity.l1(pictures_VSSC, copies_VSSC).mean()),
        "l2": l2,
        "psnr": float(fidelity.psnr(pictures_VSSC, copies_VSSC).mean()),
        "psnr_pooled": min(fidelity.HIGHEST_PSNR, pooled),
        "ssim": float(fidelity.ssim(pictures_VSSC, copies_VSSC).mean()),
        "spectrum_distance": fidelity.spectrum_distance(pictures_VSSC, copies_VSSC),
        "codes_used": int((counts > 0).sum()),
        "perplexity": perplexity(counts),
        "pictures_judged": len(pictures_VSSC),
    }
    return numbers, _sheet(pictures_VSSC[:_ON_SHEET], copies_VSSC[:_ON_SHEET])


def write_report(tokenizer: ImageTokenizer, pictures: Pictures, folder: Path) -> dict[str, Any]:
    """Judge all held-out pictures; write ``reconstructions.png`` and ``reconstructions.json``.

    Returns:
        the numbers of :func:`judge`.
    """
    originals = pictures.validation_VSSC
    numbers, sheet = judge(tokenizer, originals)
    with replacing(folder / "reconstructions.png") as file:
        Image.fromarray(sheet).save(file, format="PNG")
    shown = originals[:_ON_SHEET]
    copies = tokenizer.decode(tokenizer.encode(torch.from_numpy(shown))).numpy()
    listing = [
        {"id": identity, "psnr": round(float(psnr), 3), "ssim": round(float(ssim), 4)}
        for identity, psnr, ssim in zip(
            pictures.validation_ids,
            fidelity.psnr(shown, copies),
            fidelity.ssim(shown, copies),
            strict=False,
        )
    ]
    write_text(
        folder / "reconstructions.json", json.dumps(listing, indent=1, ensure_ascii=False) + "\n"
    )
    return numbers


def _sheet(originals_VSSC: NDArray[np.uint8], copies_VSSC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Originals with their reconstructions below, a few pixels of white between pairs."""
    side, gap = originals_VSSC.shape[1], 4
    columns = min(_PER_ROW, len(originals_VSSC))
    lines = -(-len(originals_VSSC) // columns)
    shape = (lines * (2 * side + gap), columns * (side + gap), 3)
    sheet = np.full(shape, 255, dtype=np.uint8)
    for index, pair in enumerate(zip(originals_VSSC, copies_VSSC, strict=True)):
        left, top = index % columns * (side + gap), index // columns * (2 * side + gap)
        sheet[top : top + 2 * side, left : left + side] = np.concatenate(pair)
    return sheet
