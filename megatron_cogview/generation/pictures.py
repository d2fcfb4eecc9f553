"""Write pictures to a folder: one PNG each, and all of them on one sheet."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megatron_cogview.storage.atomic import write_bytes

MAX_SHEET_SIDE = 8192
"""Pixels; a sheet of more pictures than fit shows the first ones."""


def png(picture_HWC: NDArray[np.uint8]) -> bytes:
    """A picture as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture_HWC).save(buffer, "PNG")
    return buffer.getvalue()


def write_pictures(
    folder: Path, names: Sequence[str], pictures_NHWC: NDArray[np.uint8]
) -> list[str]:
    """Write ``NAME.png`` for each picture; the file names."""
    files = [f"{name}.png" for name in names]
    for file, picture in zip(files, pictures_NHWC, strict=True):
        write_bytes(folder / file, png(picture))
    return files


def sheet(pictures_NHWC: NDArray[np.uint8], gap: int = 2) -> NDArray[np.uint8]:
    """Pictures side by side on a white, nearly square sheet."""
    side = pictures_NHWC.shape[1] + gap
    most = MAX_SHEET_SIDE // side
    count = min(len(pictures_NHWC), most * most)
    columns = math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    canvas = np.full((rows * side + gap, columns * side + gap, 3), 255, np.uint8)
    for i in range(count):
        y, x = gap + (i // columns) * side, gap + (i % columns) * side
        canvas[y : y + side - gap, x : x + side - gap] = pictures_NHWC[i]
    return canvas
