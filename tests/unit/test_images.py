"""data.images: every mode becomes upright RGB on white; bad files become DataError."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
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
    assert images.decode(encoded(Image.new("RGB", (1, 500), "red")), 4)[0, 0].tolist() == [
        255,
        0,
        0,
    ]
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


def test_jpeg_colours_grey_and_oddities():
    grey = Image.fromarray(noise(40, 40))
    out = images.decode(encoded(grey, "JPEG", quality=95), 40)
    assert (out[..., 0] == out[..., 1]).all()
    rgb = encoded(Image.fromarray(noise(32, 32, 3)), "JPEG", quality=95)
    # Stray bytes before the end marker: the strict decoder refuses, the picture is whole.
    odd = rgb[:-2] + b"\x00\x01\x02\x03" + rgb[-2:]
    assert np.abs(images.decode(odd, 32).astype(int) - images.decode(rgb, 32)).mean() < 3
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
