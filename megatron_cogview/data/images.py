"""Encoded pictures to square RGB arrays.  Knows neither tars nor tokenizers.

JPEG is decoded by libjpeg-turbo, at half, quarter or eighth size where the picture is much larger
than what is asked for, and refused where that decoder so much as warns, but for a short list of
oddities; everything else is decoded by Pillow.  Resampling is the antialiased bicubic filter of
torch, within one level of Pillow's; colour profiles are not applied.
"""

import io
import re
import warnings
from collections.abc import Iterator
from itertools import pairwise
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
laid on white, or an ordinary progressive JPEG decoded; at most 560 MB, for one in CMYK."""
MAX_SIDE = 65_535
"""Of any picture, as JPEG has it: a line of 40 million pixels takes twice the time of a square."""
MAX_SCANS = 64
"""Of a JPEG; encoders make 1 to about 15."""
MAX_SCAN_PIXELS = 20 * MAX_PIXELS
"""Scans times pixels of a JPEG: each scan goes over the whole picture, 45 ms at 40 million pixels,
however few bytes it has."""
MAX_SEGMENTS = 20_000
"""Of a JPEG, or chunks of a PNG: Pillow takes 1.5 to 3 microseconds for each, and 64 MB have room
for 15 million.  A PNG of that size in blocks of 4 KB has 16,384."""
MAX_STRAY_BYTES = 16
"""Bytes that belong to nothing in a JPEG, which some cameras and programs leave behind."""
DECODED_SIDE_RATIO = 2
"""A JPEG is decoded at a scale at which its short side is at least this many times the result's:
what the decoder's own averaging changes is then below the resolution."""

_BAND_PIXELS = 1 << 20
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_JFIF, _ICC, _ADOBE, _SCAN, _END = 0xE0, 0xE2, 0xEE, 0xDA, 0xD9
_MARKER = re.compile(rb"\xff[^\x00\xff]", re.DOTALL)
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
_UNSUPPORTED = "Could not determine subsampling level"
"""Words of libjpeg-turbo for sampling factors that it does not know, and Pillow does."""
_STRAY = re.compile(r"Corrupt JPEG data: (\d+) extraneous bytes before marker 0x([0-9a-f]{2})")
_HARMLESS = (
    "Warning: unknown JFIF revision number",
    "Unknown Adobe color transform code",
    "Corrupt JPEG data: bad ICC marker",
)
"""Warnings about what does not change a pixel."""

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
        DataError: not a PNG, JPEG or WebP file, damaged, truncated, more than 40 million pixels, or
            made of so many pieces that decoding would take long.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures; the limit below refuses them.
            warnings.simplefilter("ignore")
            scans = _count_scans(data)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            num_pixels = image.width * image.height
            if num_pixels > MAX_PIXELS or max(image.size) > MAX_SIDE:
                raise DataError(
                    f"{image.width} x {image.height} pixels: more than {MAX_PIXELS}, or a side of "
                    f"more than {MAX_SIDE}"
                )
            if scans > min(MAX_SCANS, MAX_SCAN_PIXELS // num_pixels):
                raise DataError(
                    f"{scans} scans of {image.width} x {image.height} pixels: more than "
                    f"{MAX_SCANS}, or than {MAX_SCAN_PIXELS} pixels together"
                )
            orientation = _orientation(image)
            if image.format == "PNG":
                _scale_transparency(image, depth=data[24])
            pixels = _jpeg(data, image, size) if image.format == "JPEG" else None
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


def _count_scans(data: bytes) -> int:
    """Scans of a JPEG, 0 for other formats.

    Raises:
        DataError: more segments or chunks than any encoder makes.
    """
    scans = segments = 0
    if data.startswith(_JPEG):
        for marker, _, _ in _segments(data):
            segments += 1
            scans += marker == _SCAN
            if segments > MAX_SEGMENTS:
                raise DataError(f"more than {MAX_SEGMENTS} segments")
    elif data.startswith(_PNG):
        at = len(_PNG)
        while at + 8 <= len(data):
            segments += 1
            at += 12 + int.from_bytes(data[at : at + 4], "big")
            if segments > MAX_SEGMENTS:
                raise DataError(f"more than {MAX_SEGMENTS} chunks")
    return scans


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment of a JPEG, found as libjpeg finds them.

    A scan's segment ends behind its coded data.  Ends at the end marker, or where the next segment
    would not fit.
    """
    at = 2
    while found := _MARKER.search(data, at):
        start, at = found.span()
        marker = data[start + 1]
        if 0xD0 <= marker <= _END or marker == 0x01:
            yield marker, start, at
            if marker == _END:
                return
            continue
        length = int.from_bytes(data[at : at + 2], "big")
        at += length
        if length < 2 or at > len(data):
            return
        if marker == _SCAN:
            ended = _END_OF_SCAN.search(data, at)
            at = ended.start() if ended else len(data)
        yield marker, start, at


def _jpeg(data: bytes, image: Image.Image, size: int) -> Pixels | None:
    """Pixels by libjpeg-turbo, or None where only Pillow can decode this kind.

    Raises:
        ValueError: damaged, in libjpeg's words.
    """
    try:
        return _strict_jpeg(data, image, size)
    except ValueError as error:
        words = str(error)
    # The decoder stops counting at its first warning: what is behind an oddity is only known once
    # that is out of the way.  There may be one in the header and one at the end.
    for _ in range(2):
        if _UNSUPPORTED in words:
            return None
        mended = _mended(data, words, transform=2 if image.mode == "CMYK" else 1)
        if mended is None:
            break
        data = mended
        try:
            return _strict_jpeg(data, image, size)
        except ValueError as error:
            words = str(error)
    raise ValueError(words)


def _strict_jpeg(data: bytes, image: Image.Image, size: int) -> Pixels:
    share = min(1.0, DECODED_SIDE_RATIO * size / min(image.height, image.width))
    pixels = simplejpeg.decode_jpeg(
        data,
        colorspace="CMYK" if image.mode == "CMYK" else "RGB",
        min_height=max(1, int(image.height * share)),
        min_width=max(1, int(image.width * share)),
        min_factor=1,
    )
    if image.mode != "CMYK":
        return cast("Pixels", pixels)
    # Stored inverted, by a convention of Adobe's that everybody follows.
    return _to_rgb(Image.fromarray(np.subtract(255, pixels, out=pixels), "CMYK"))


def _mended(data: bytes, words: str, transform: int) -> bytes | None:
    """The JPEG without the oddity that libjpeg warns of, None if that is damage.

    ``transform`` is what libjpeg takes for an unknown Adobe colour transform.
    """
    stray = _STRAY.fullmatch(words)
    if stray is None and not words.startswith(_HARMLESS):
        return None
    if stray and int(stray[1]) > MAX_STRAY_BYTES:
        return None
    segments = list(_segments(data))
    if not segments or segments[-1][0] != _END:
        return None
    edges = [2, *(edge for _, start, end in segments for edge in (start, end))]
    between = sum(start - end for end, start in list(pairwise(edges))[::2])
    if between > MAX_STRAY_BYTES:
        return None
    pieces = [_plain(data, segment, transform) for segment in segments]
    if stray and not between:
        if int(stray[2], 16) != _END or len(pieces) < 2:
            return None
        pieces[-2] = pieces[-2][: -int(stray[1])]
    return b"".join([data[:2], *pieces])


def _plain(data: bytes, segment: tuple[int, int, int], transform: int) -> bytes:
    """A segment as libjpeg takes it anyway, without what it warns of."""
    marker, start, end = segment
    piece = bytearray(data[start:end])
    if marker == _JFIF and piece[4:9] == b"JFIF\0":
        piece[9:10] = b"\1"
    elif marker == _ADOBE and piece[4:9] == b"Adobe" and len(piece) >= 16:
        if piece[15] not in (0, transform):
            piece[15] = transform
    elif marker == _ICC:
        return b""
    return bytes(piece)


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


def _scale_transparency(image: Image.Image, depth: int) -> None:
    """Bring the transparent colour of a PNG to the range in which Pillow gives its pixels.

    Of 16-bit colours Pillow keeps the upper byte, so a few neighbours become transparent as well.
    """
    key = image.info.get("transparency")
    if isinstance(key, int) and image.mode in ("1", "L") and depth in (1, 2, 4):
        image.info["transparency"] = (key & (1 << depth) - 1) * 255 // ((1 << depth) - 1)
    elif isinstance(key, tuple) and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _band_to_rgb(image: Image.Image) -> Pixels:
    if image.mode.startswith("I"):
        # 16-bit grey; Pillow's own conversion would clip everything above 255.
        wide = np.asarray(image).astype(np.int64).clip(0, 65_535)
        grey = ((wide + 128) // 257).astype(np.uint8)
        if "transparency" in image.info:
            grey[wide == image.info["transparency"]] = 255
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGB", layer.size, "white")
        # The same pixels as alpha_composite, in half the time.
        white.paste(layer.convert("RGB"), mask=layer.getchannel("A"))
        return np.asarray(white)
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
