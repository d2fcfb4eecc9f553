"""Encoded pictures to square RGB arrays.  Knows neither tars nor tokenizers.

Resampling is Pillow's antialiased bicubic filter; colour profiles are not applied.
"""

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from megatron_cogview.configs.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP")
"""Tried by content, whatever the file's name; other Pillow plugins are never reached."""
MAX_PIXELS = 64_000_000
"""Refused above this before anything is decoded: about 256 MB as RGBA."""


def decode(data: bytes, size: int) -> NDArray[np.uint8]:
    """Picture ``[size, size, 3]``, 0..255: upright, on white, short side scaled, centre kept.

    EXIF orientation is applied, transparency is laid on white, and greyscale, palette, CMYK and
    16-bit pictures become 8-bit RGB.

    Raises:
        DataError: not a PNG, JPEG or WebP file, damaged, truncated, or more than 64 million pixels.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures; the limit below refuses them.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{image.width} x {image.height} pixels: more than {MAX_PIXELS}")
            image.load()
            return np.array(_square(_to_rgb(ImageOps.exif_transpose(image)), size))
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError("not a PNG, JPEG or WebP file") from None
    except Exception as error:  # Pillow's decoders raise nearly any type on hostile input.
        raise DataError(f"cannot be decoded: {_stable(error)}") from error


def shrink(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """A square picture at a smaller side, for the low-resolution half of a pair (P-SR-2)."""
    return np.array(_square(Image.fromarray(pixels), size))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey; Pillow's own conversion would clip everything above 255.
        wide = np.asarray(image).astype(np.int64).clip(0, 65_535)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _square(image: Image.Image, size: int) -> Image.Image:
    """Scale the centre square in one step; the same as scaling the short side and cropping."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    if image.size == (size, size):
        return image
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def _stable(error: Exception) -> str:
    """The error's words, without memory addresses: the rejection log is the same on every run."""
    text = str(error).splitlines()[0] if str(error) else ""
    return type(error).__name__ if " at 0x" in text or not text else text
