"""data.images: every mode becomes upright RGB on white; bad files become DataError."""

import io
import re
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from megatron_cogview.configs.errors import DataError
from megatron_cogview.data import images

ROOT = Path(__file__).resolve().parents[2]


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_same_size_rgb_is_untouched():
    pixels = noise(16, 16, 3)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        out = images.decode(encoded(Image.fromarray(pixels), kind, **options), 16)
        assert out.dtype == np.uint8
        assert (out == pixels).all()


def test_centre_crop():
    pixels = noise(8, 20, 3)
    assert (images.decode(encoded(Image.fromarray(pixels)), 8) == pixels[:, 6:14]).all()
    assert (
        images.decode(encoded(Image.fromarray(pixels.swapaxes(0, 1))), 8)
        == pixels.swapaxes(0, 1)[6:14]
    ).all()


def test_resize_is_antialiased_and_equals_scale_then_crop():
    # One-pixel stripes: without antialiasing some stripe survives.
    stripes = np.zeros((64, 96, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(images.decode(encoded(Image.fromarray(stripes)), 8).astype(int) - 127).max() < 20
    y, x = np.mgrid[0:60, 0:90] / 10
    smooth = np.stack([np.sin(x) + np.cos(y)] * 3, -1)
    picture = Image.fromarray((127 + 60 * smooth).astype(np.uint8))
    oracle = np.asarray(picture.resize((30, 20), Image.Resampling.BICUBIC))[:, 5:25]
    difference = images.decode(encoded(picture), 20).astype(int) - oracle
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    upright = np.zeros((16, 16, 3), dtype=np.uint8)
    upright[:8, :8] = 255
    turn = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(turn(upright)))
    assert (images.decode(encoded(stored, exif=exif), 16) == upright).all()


def test_alpha_is_laid_on_white():
    rgba = noise(9, 9, 4)
    alpha = rgba[..., 3:].astype(float) / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    out = images.decode(encoded(Image.fromarray(rgba)), 9)
    assert np.abs(out - expected).max() <= 1
    la = Image.fromarray(rgba[..., :2])
    assert la.mode == "LA"
    alpha = rgba[..., 1].astype(float) / 255
    out = images.decode(encoded(la), 9)
    assert np.abs(out[..., 1] - (rgba[..., 0] * alpha + 255 * (1 - alpha))).max() <= 1


def test_palette_with_transparency():
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], dtype=np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    plain = images.decode(encoded(palette), 2)
    assert plain[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    clear = images.decode(encoded(palette, transparency=1), 2)
    assert clear[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_grey_one_bit_and_sixteen_bit():
    grey = noise(5, 5)
    out = images.decode(encoded(Image.fromarray(grey)), 5)
    assert (out == grey[..., None]).all()
    bits = Image.fromarray(grey > 127)
    assert bits.mode == "1"
    assert set(np.unique(images.decode(encoded(bits), 5))) == {0, 255}
    wide = grey.astype(np.uint16) * 257
    out = images.decode(encoded(Image.fromarray(wide)), 5)
    assert (out == grey[..., None]).all()


def test_cmyk_jpeg():
    for colour in ((255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)):
        cmyk = Image.new("RGB", (16, 16), colour).convert("CMYK")
        out = images.decode(encoded(cmyk, "JPEG", quality=95), 16)
        assert np.abs(out.astype(int) - colour).max() <= 3
    data = encoded(lifelike("CMYK"), "JPEG")
    oracle = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))[:, 80:560]
    assert (images.decode(data, 480) == oracle).all()


def test_bombs_are_refused_before_decoding(monkeypatch):
    data = encoded(Image.new("1", (9000, 9000)))
    assert len(data) < 20_000
    with pytest.raises(DataError, match="9000 x 9000 pixels"):
        images.decode(data, 8)
    # Pillow's own, higher limit raises at open.
    with pytest.raises(DataError):
        images.decode(encoded(Image.new("1", (15_000, 15_000))), 8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_and_foreign_files(kind):
    data = encoded(Image.fromarray(noise(32, 32, 3)), kind)
    for length in (0, 1, 10, len(data) // 3, len(data) - 60):
        with pytest.raises(DataError) as caught:
            images.decode(data[:length], 8)
        # The message goes into a log that must not differ between runs.
        assert "0x" not in str(caught.value)
    with pytest.raises(DataError, match="not a PNG"):
        images.decode(encoded(Image.fromarray(noise(8, 8, 3)), "BMP"), 8)


def test_random_damage_gives_a_picture_or_a_data_error():
    rng = np.random.default_rng(1)
    for kind in ("PNG", "JPEG", "WEBP"):
        data = np.frombuffer(encoded(Image.fromarray(noise(24, 24, 3)), kind), dtype=np.uint8)
        refused = 0
        for _ in range(60):
            damaged = data.copy()
            damaged[rng.integers(0, len(data), 8)] = rng.integers(0, 256, 8)
            try:
                assert images.decode(damaged.tobytes(), 8).shape == (8, 8, 3)
            except DataError:
                refused += 1
        assert refused > 0


def test_thin_picture_and_shrink():
    thin = images.decode(encoded(Image.new("RGB", (1, 500), "red")), 4)
    assert thin[0, 0].tolist() == [255, 0, 0]
    flat = np.full((16, 16, 3), 77, dtype=np.uint8)
    assert (images.shrink(flat, 8) == np.full((8, 8, 3), 77)).all()


@pytest.mark.parametrize(("width", "height"), [(500, 400), (400, 500), (1600, 1200), (257, 256)])
def test_jpeg_pixels_are_pillows_within_one_level(width, height):
    """Also where the decoder works at half size or less: 0.25 levels on average, 1 allowed."""
    y, x = np.mgrid[0:height, 0:width] / 37.0
    smooth = np.stack([np.sin(x + k) + np.cos(y - k) for k in range(3)], -1)
    grain = np.random.default_rng(0).normal(0, 6, (height, width, 3))
    picture = Image.fromarray((127 + 50 * smooth + grain).clip(0, 255).astype(np.uint8))
    data = encoded(picture, "JPEG", quality=90)
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    oracle = Image.open(io.BytesIO(data)).resize((256, 256), Image.Resampling.BICUBIC, box=box)
    difference = np.abs(images.decode(data, 256).astype(int) - np.asarray(oracle))
    assert difference.mean() <= 1.0


def test_jpeg_grey_and_progressive():
    grey = Image.fromarray(noise(40, 40))
    out = images.decode(encoded(grey, "JPEG", quality=95), 40)
    assert (out[..., 0] == out[..., 1]).all()
    progressive = encoded(Image.fromarray(noise(64, 64, 3)), "JPEG", progressive=True)
    assert images.decode(progressive, 16).shape == (16, 16, 3)


def test_damaged_exif_does_not_cost_the_picture():
    exif = Image.Exif()
    exif[0x0112] = 6
    flat = Image.fromarray(np.full((8, 8, 3), 90, dtype=np.uint8))
    good = encoded(flat, "JPEG", exif=exif)
    start = good.index(b"Exif\0\0") + 6
    for at in range(start, start + 23, 2):
        damaged = bytearray(good)
        damaged[at : at + 4] = b"\xff\xfe\xff\xfe"
        assert np.abs(images.decode(bytes(damaged), 8).astype(int) - 90).max() <= 1


def png_chunk(name, content):
    checksum = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + checksum


def png_2x2(depth, colour, row, *chunks):
    """Both rows alike; for kinds that Pillow cannot write."""
    header = struct.pack(">IIBBBBB", 2, 2, depth, colour, 0, 0, 0)
    parts = [png_chunk(b"IHDR", header), *(png_chunk(*chunk) for chunk in chunks)]
    parts.append(png_chunk(b"IDAT", zlib.compress((b"\0" + row) * 2)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + png_chunk(b"IEND", b"")


GREY, RGB, PALETTE, GREY_ALPHA = 0, 2, 3, 4
COLOURS = (b"PLTE", bytes([10, 20, 30, 40, 50, 60]))


@pytest.mark.parametrize(
    ("depth", "colour", "row", "chunks", "expected"),
    [
        (16, GREY, struct.pack(">HH", 1000, 2000), [(b"tRNS", b"\x03\xe8")], [255, 8]),
        (16, GREY, struct.pack(">HH", 1000, 2000), [], [4, 8]),
        (8, GREY, b"\x07\x08", [(b"tRNS", b"\0\x07")], [255, 8]),
        (4, GREY, b"\x78", [(b"tRNS", b"\0\x07")], [255, 136]),
        (2, GREY, b"\x10", [(b"tRNS", b"\0\0")], [255, 85]),
        (1, GREY, b"\x40", [(b"tRNS", b"\0\0")], [255, 255]),
        (1, GREY, b"\x40", [(b"tRNS", b"\0\1")], [0, 255]),
        (16, GREY_ALPHA, struct.pack(">HHHH", 1000, 0, 2000, 65535), [], [255, 7]),
        (16, RGB, bytes(range(12)), [(b"tRNS", bytes(range(6)))], [255, 6]),
        (8, PALETTE, b"\0\1", [COLOURS, (b"tRNS", b"\x80\0")], [132, 255]),
        (1, PALETTE, b"\x40", [COLOURS, (b"tRNS", b"\x80")], [132, 40]),
    ],
)  # fmt: skip
def test_transparency_of_every_depth(depth, colour, row, chunks, expected):
    out = images.decode(png_2x2(depth, colour, row, *chunks), 2)
    assert out[0, :, 0].tolist() == expected
    assert out[1, :, 0].tolist() == expected


def lifelike(mode="RGB"):
    """640 x 480: smooth and noisy, as a photograph is to a decoder."""
    y, x = np.mgrid[0:480, 0:640] / 37.0
    smooth = np.stack([np.sin(x + k) + np.cos(y - k) for k in range(3)], -1)
    grain = np.random.default_rng(0).normal(0, 20, smooth.shape)
    return Image.fromarray((127 + 50 * smooth + grain).clip(0, 255).astype(np.uint8)).convert(mode)


JPEG_KINDS = [
    ("RGB", {"quality": 75}),
    ("RGB", {"quality": 92}),
    ("RGB", {"quality": 92, "progressive": True}),
    ("RGB", {"quality": 75, "restart_marker_blocks": 20}),
    ("L", {"quality": 92}),
    ("CMYK", {"quality": 92}),
]


@pytest.mark.parametrize(("mode", "options"), JPEG_KINDS)
def test_damaged_jpegs_are_refused_in_the_decoders_words(mode, options):
    whole = encoded(lifelike(mode), "JPEG", **options)
    garbage = np.random.default_rng(1).bytes(4096)
    middle = len(whole) // 2
    damaged = {
        "half, then the end marker": whole[:middle] + b"\xff\xd9",
        "zeros": whole[:middle] + bytes(4096) + whole[middle + 4096 :],
        "garbage over it": whole[:middle] + garbage + whole[middle + 4096 :],
        "garbage between": whole[:middle] + garbage + whole[middle:],
        "cut": whole[:middle],
    }
    for name, data in damaged.items():
        with pytest.raises(DataError, match=r"^cannot be decoded: \w"):
            pytest.fail(f"{name}: {images.decode(data, 256).shape}")


@pytest.mark.parametrize(("mode", "options"), JPEG_KINDS)
def test_every_flipped_bit_that_libjpeg_reports_is_refused(mode, options):
    whole = encoded(lifelike(mode).crop((0, 0, 200, 150)), "JPEG", **options)
    rng = np.random.default_rng(2)
    reported = 0
    for _ in range(150):
        data = bytearray(whole)
        data[int(rng.integers(700, len(data)))] ^= 1 << int(rng.integers(8))
        try:
            simplejpeg.decode_jpeg(bytes(data), "CMYK" if mode == "CMYK" else "RGB")
        except ValueError as error:
            stray = re.search(r"\b(\d|1[0-6]) extraneous bytes", str(error))
            if stray:
                continue
            reported += 1
            with pytest.raises(DataError):
                images.decode(bytes(data), 64)
    assert reported >= 3


def test_harmless_oddities_of_jpegs_cost_nothing():
    rgb = lifelike().crop((0, 0, 96, 64))
    whole = encoded(rgb, "JPEG", quality=90)
    expected = images.decode(whole, 64)
    profile = bytearray(encoded(rgb, "JPEG", quality=90, icc_profile=b"x" * 500))
    profile[profile.index(b"ICC_PROFILE\0") + 12] = 7
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64" + bytes(4) + b"\x05"
    odd = {
        "stray bytes at the end": whole[:-2] + b"\0\1\2\3" + whole[-2:],
        "stray bytes between segments": whole[:20] + bytes(3) + whole[20:],
        "both": whole[:20] + bytes(3) + whole[20:-2] + b"\1\2\3\4\5" + whole[-2:],
        "bytes behind the end": whole + b"\xff\xda" * 500,
        "fill bytes": whole[:20] + b"\xff" * 40 + whole[20:],
        "JFIF 2": whole[:11] + b"\2" + whole[12:],
        "Adobe transform 5": whole[:2] + adobe + whole[20:],
        "profile out of order": bytes(profile),
    }
    assert [name for name in odd if (images.decode(odd[name], 64) != expected).any()] == []
    for damaged in (
        whole[:-2] + b"\1" * 40 + whole[-2:],
        whole[:20] + bytes(40) + whole[20:],
        # What is behind the oddity is looked at as well.
        whole[:20] + bytes(3) + whole[20 : len(whole) // 2] + b"\xff\xd9",
    ):
        with pytest.raises(DataError):
            images.decode(damaged, 64)


def test_sampling_factors_that_only_pillow_knows():
    data = bytearray(encoded(Image.new("RGB", (16, 16), (200, 10, 20)), "JPEG", subsampling=2))
    start = data.index(b"\xff\xc0")
    data[start + 11] = 0x42
    with pytest.raises(ValueError, match="subsampling"):
        simplejpeg.decode_jpeg(bytes(data))
    assert images.decode(bytes(data), 8).shape == (8, 8, 3)


def scan_bomb(num_scans, side=6300):
    """A progressive JPEG of few bytes whose last scan stands there again and again."""
    data = encoded(Image.new("RGB", (side, side), (200, 10, 20)), "JPEG", progressive=True)
    starts = [found.start() for found in re.finditer(rb"\xff\xda", data)]
    again = num_scans - len(starts)
    return data[:-2] + data[starts[-1] : -2] * again + data[-2:]


def test_jpegs_of_too_many_scans_are_refused_before_they_are_decoded():
    large = scan_bomb(120)
    assert len(large) < 1_000_000
    begin = time.process_time()
    with pytest.raises(DataError, match="120 scans of 6300 x 6300 pixels"):
        images.decode(large, 64)
    assert time.process_time() - begin < 0.5
    with pytest.raises(DataError, match="65 scans"):
        images.decode(scan_bomb(65, 32), 16)
    # As many as are allowed take no longer than they should.
    with pytest.raises(DataError, match="progression"):
        images.decode(scan_bomb(images.MAX_SCAN_PIXELS // 6300**2), 64)
    assert images.decode(scan_bomb(10), 64).shape == (64, 64, 3)


def test_files_of_countless_pieces_are_refused_at_once():
    jpeg = encoded(Image.new("RGB", (8, 8)), "JPEG")
    png = encoded(Image.new("RGB", (8, 8)))
    empty = png_chunk(b"abCd", b"")
    begin = time.process_time()
    with pytest.raises(DataError, match="more than 20000 segments"):
        images.decode(jpeg[:2] + b"\xff\xe5\0\2" * 2_000_000 + jpeg[2:], 8)
    with pytest.raises(DataError, match="more than 20000 chunks"):
        images.decode(png[:33] + empty * 2_000_000 + png[33:], 8)
    assert time.process_time() - begin < 1
    assert images.decode(png[:33] + empty * 15_000 + png[33:], 8).shape == (8, 8, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_large_pictures_are_decoded_within_bounds(kind):
    """40 million pixels, with transparency where the format has it: about 280 MB at most."""
    code = (
        "import io, resource, sys\n"
        "from PIL import Image\n"
        "from megatron_cogview.data import images\n"
        "mode = 'RGB' if sys.argv[1] == 'JPEG' else 'RGBA'\n"
        "side = 2500 if sys.argv[1] == 'WEBP' else 6300\n"
        "image = Image.new(mode, (side, side), (200, 10, 20, 128)[: len(mode)])\n"
        "buffer = io.BytesIO()\n"
        "image.save(buffer, sys.argv[1])\n"
        "del image\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "before = peak()\n"
        "out = images.decode(buffer.getvalue(), 256)\n"
        "print((peak() - before) // 1024, out.shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, kind], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    megabytes, shape = done.stdout.split(maxsplit=1)
    assert shape.strip() == "(256, 256, 3)"
    assert int(megabytes) < 320
