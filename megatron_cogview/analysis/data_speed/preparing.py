"""How fast pictures are decoded and captions encoded, against Pillow and plain SentencePiece.

Both ways of each comparison run alternately in one process on the same inputs; the median of the
repeats counts.
"""

import io
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece as spm
from numpy.typing import NDArray
from PIL import Image

from megatron_cogview.data import images
from megatron_cogview.tokenization.text import TextTokenizer

SIDE = 256
SIZES = ((500, 400), (1600, 1200))
CAPTIONS_AT_ONCE = 64


def alternately(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each way; round after round, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(repeats + 1):
        for name, run in ways.items():
            begin = time.perf_counter()
            run()
            if round_:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def drain(results: Iterable[object]) -> None:
    """Let each result go before the next, as a pipeline does: memory is used again."""
    deque(results, maxlen=0)


def decoding(pictures: Sequence[NDArray[np.uint8]], repeats: int) -> list[dict[str, Any]]:
    """JPEG to 256 x 256 pixels, against Pillow's open, convert and resize; one row a size.

    ``pictures`` are brought to each size and saved at quality 90, with some grain: enlarged
    pictures alone are smoother than what a camera gives.
    """
    rows = []
    for width, height in SIZES:
        files = [_jpeg(p, width, height, seed) for seed, p in enumerate(pictures)]
        seconds = alternately(
            {
                "ours": lambda files=files: drain(images.decode(f, SIDE) for f in files),  # type: ignore[misc]
                "pillow": lambda files=files: drain(map(_pillow, files)),  # type: ignore[misc]
            },
            repeats,
        )
        ours = np.stack([images.decode(f, SIDE) for f in files]).astype(np.int16)
        theirs = np.stack([_pillow(f) for f in files])
        rows.append(
            {
                "size": f"{width} x {height}",
                "bytes": int(np.mean([len(f) for f in files])),
                "ours_per_second": len(files) / seconds["ours"],
                "pillow_per_second": len(files) / seconds["pillow"],
                "ratio": seconds["pillow"] / seconds["ours"],
                "mean_levels_apart": float(np.abs(ours - theirs).mean()),
            }
        )
    return rows


def captions(texts: Sequence[str], model: Path, repeats: int) -> dict[str, Any]:
    """Captions to ids in batches, against SentencePiece's own batched call."""
    ours = TextTokenizer(model)
    plain = spm.SentencePieceProcessor(model_file=str(model))
    batches = [texts[at : at + CAPTIONS_AT_ONCE] for at in range(0, len(texts), CAPTIONS_AT_ONCE)]
    seconds = alternately(
        {
            "ours": lambda: drain(map(ours.encode_batch, batches)),
            "sentencepiece": lambda: drain(
                plain.encode(list(b), out_type=int, num_threads=1) for b in batches
            ),
        },
        repeats,
    )
    return {
        "captions": len(texts),
        "ours_per_second": len(texts) / seconds["ours"],
        "sentencepiece_per_second": len(texts) / seconds["sentencepiece"],
        "ratio": seconds["sentencepiece"] / seconds["ours"],
    }


def _jpeg(pixels: NDArray[np.uint8], width: int, height: int, seed: int) -> bytes:
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    grain = np.random.default_rng(seed).normal(0, 4, (height, width, 3))
    grained = (np.asarray(image) + grain).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grained).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _pillow(data: bytes) -> NDArray[np.uint8]:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box))
