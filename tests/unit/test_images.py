"""data.images: every mode becomes upright RGB on white; bad files become DataError."""

import io

import numpy as np
import pytest
from PIL import Image

from megatron_cogview.configs.errors import DataError
from megatron_cogview.data import images


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
