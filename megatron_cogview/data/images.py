"""Encoded pictures to square RGB arrays.  Knows neither tars nor tokenizers.

JPEG is decoded by libjpeg-turbo, at half, quarter or eighth size where the picture is much larger
than what is asked for; everything else, and what that decoder refuses, by Pillow.  Resampling is
the antialiased bicubic filter of torch, within one level of Pillow's; colour profiles are not
applied.
"""

import io
import warnings
from typing import cast

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from megatron_cogview.configs.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP")
"""Tried by content, whatever the file's name; other Pillow plugins are never reached."""
MAX_PIXELS = 40_000_000
"""Refused above this before anything is decoded: about 280 MB while a picture with transparency is
laid on white, or a progressive JPEG decoded."""
DECODED_SIDE_RATIO = 2
"""A JPEG is decoded at a scale at which its short side is at least this many times the result's:
what the decoder's own averaging changes is then below the resolution."""

_BAND_PIXELS = 1 << 20
_STRAIGHT = ("YCbCr", "Gray", "RGB")
"""JPEG colours that become RGB without a further convention; CMYK ones are left to Pillow."""

# How to turn the pixels of each EXIF orientation upright: transposed?, then flipped along these.
_UPRIGHT: dict[int, tuple[bool, tuple[int, ...]]] = {
    2: (False, (1,)),
    3: (False, (0, 1)),
    4: (False, (0,)),
    5: (True, ()),
    6: (True, (1,)),
    7: (True, (0, 1)),
    8: (True, (0,)),
}

Pixels = NDArray[np.uint8]


def decode(data: bytes, size: int) -> Pixels:
    """Picture ``[size, size, 3]``, 0..255: upright, on white, short side scaled, centre kept.

    EXIF orientation is applied, transparency is laid on white, and greyscale, palette, CMYK and
    16-bit pictures become 8-bit RGB.  Of an animation the first frame is taken.

    Raises:
        DataError: not a PNG, JPEG or WebP file, damaged, truncated, or more than 40 million pixels.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures; the limit below refuses them.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{image.width} x {image.height} pixels: more than {MAX_PIXELS}")
            orientation = _orientation(image)
            pixels = _jpeg(data, size) if image.format == "JPEG" else None
            if pixels is None:
                pixels = _to_rgb(image)
            return _upright(_square(pixels, size), orientation)
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError("not a PNG, JPEG or WebP file") from None
    except Exception as error:  # Pillow's decoders raise nearly any type on hostile input.
        raise DataError(f"cannot be decoded: {_stable(error)}") from error


def shrink(pixels: Pixels, size: int) -> Pixels:
    """A square picture at a smaller side, for the low-resolution half of a pair (P-SR-2)."""
    return _square(pixels, size)


def _orientation(image: Image.Image) -> int:
    """1 (upright) where the tag is missing or makes no sense: it must not cost the picture."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Damaged EXIF raises nearly any type.
        return 1
    return value if isinstance(value, int) else 1


def _jpeg(data: bytes, size: int) -> Pixels | None:
    """Pixels by libjpeg-turbo, or None where Pillow has to decide."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in _STRAIGHT:
            return None
        share = min(1.0, DECODED_SIDE_RATIO * size / min(height, width))
        return cast(
            "Pixels",
            simplejpeg.decode_jpeg(
                data,
                min_height=max(1, int(height * share)),
                min_width=max(1, int(width * share)),
                min_factor=1,
            ),
        )
    except ValueError:
        # Strict decoding also refuses harmless oddities, such as stray bytes between segments;
        # Pillow takes those and refuses what is truncated.
        return None


def _to_rgb(image: Image.Image) -> Pixels:
    """RGB pixels of a whole picture, converted a band at a time to bound the memory."""
    image.load()
    if image.mode == "RGB" and "transparency" not in image.info:
        return np.asarray(image)
    rgb = np.empty((image.height, image.width, 3), dtype=np.uint8)
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        bottom = min(image.height, top + rows)
        rgb[top:bottom] = _band_to_rgb(image.crop((0, top, image.width, bottom)))
    return rgb


def _band_to_rgb(image: Image.Image) -> Pixels:
    if image.mode.startswith("I"):
        # 16-bit grey; Pillow's own conversion would clip everything above 255.
        wide = np.asarray(image).astype(np.int64).clip(0, 65_535)
        grey = ((wide + 128) // 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return np.asarray(Image.alpha_composite(white, layer).convert("RGB"))
    return np.asarray(image.convert("RGB"))


def _square(pixels: Pixels, size: int) -> Pixels:
    """Scale the centre square in one step; the same as scaling the short side and cropping."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    centre = pixels[top : top + side, left : left + side]
    if side == size:
        return np.ascontiguousarray(centre)
    # Channels last in memory, as the fast filter wants them.
    picture_1CSS = torch.from_numpy(np.ascontiguousarray(centre)).permute(2, 0, 1)[None]
    scaled_1CSS = torch.nn.functional.interpolate(
        picture_1CSS, size=(size, size), mode="bicubic", antialias=True
    )
    return cast("Pixels", scaled_1CSS[0].permute(1, 2, 0).contiguous().numpy())


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    if orientation not in _UPRIGHT:
        return pixels
    transposed, axes = _UPRIGHT[orientation]
    turned = pixels.swapaxes(0, 1) if transposed else pixels
    return np.ascontiguousarray(np.flip(turned, axes) if axes else turned)


def _stable(error: Exception) -> str:
    """The error's words, without memory addresses: the rejection log is the same on every run."""
    text = str(error).splitlines()[0] if str(error) else ""
    return type(error).__name__ if " at 0x" in text or not text else text
