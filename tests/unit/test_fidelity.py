"""Picture metrics against scikit-image's values, written-out formulas and known spectra."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_cogview.tokenization import fidelity

Pictures = NDArray[np.uint8]


def pairs() -> tuple[Pictures, Pictures]:
    """Noise with less contrast, a noisy ramp with less contrast, and a picture with itself."""
    rng = np.random.default_rng(7)
    original = rng.integers(0, 256, (3, 24, 24, 3)).astype(np.uint8)
    ramp = np.linspace(20, 230, 24)
    original[1] = (ramp[:, None, None] + rng.normal(0, 5, (24, 24, 3))).clip(0, 255)
    copy = (original.astype(float) * 0.8 + rng.normal(10, 20, original.shape)).clip(0, 255)
    copy[2] = original[2]
    return original, copy.astype(np.uint8)


def test_ssim_is_scikit_images() -> None:
    """scikit-image 0.26.0, gaussian_weights, sigma 1.5, use_sample_covariance False, range 255."""
    values = fidelity.ssim(*pairs())
    assert values == pytest.approx([0.9212478251482178, 0.5062566976313165, 1.0], abs=1e-12)


@pytest.mark.parametrize(("side", "width"), [(1, 1), (6, 5), (7, 7), (10, 9), (11, 11), (15, 11)])
def test_ssim_written_out_with_the_largest_window_that_fits(side: int, width: int) -> None:
    original, copy = (p[:1, :side, :side] for p in pairs())
    offsets = np.arange(width) - width // 2
    line = np.exp(-(offsets**2) / 4.5)
    weights = np.outer(line, line) / line.sum() ** 2
    values = []
    places = range(side - width + 1)
    for top, left, channel in itertools.product(places, places, range(3)):
        window = (0, slice(top, top + width), slice(left, left + width), channel)
        x, y = original[window].astype(float), copy[window].astype(float)
        mx, my = (weights * x).sum(), (weights * y).sum()
        vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
        cov = (weights * (x - mx) * (y - my)).sum()
        c1, c2 = 2.55**2, 7.65**2
        near = (2 * mx * my + c1) * (2 * cov + c2)
        values.append(near / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    assert fidelity.ssim(original, copy)[0] == pytest.approx(np.mean(values), abs=1e-10)


def test_pixel_errors_by_formula() -> None:
    original, copy = pairs()
    difference = (original.astype(float) - copy) / 255
    assert fidelity.l1(original, copy) == pytest.approx(abs(difference).mean((1, 2, 3)))
    assert fidelity.l2(original, copy) == pytest.approx((difference**2).mean((1, 2, 3)))
    expected = 10 * np.log10(255**2 / np.mean((255 * difference[:2]) ** 2, axis=(1, 2, 3)))
    assert fidelity.psnr(original, copy) == pytest.approx([*expected, 100.0])
    black = np.zeros((1, 2, 2, 3), np.uint8)
    assert fidelity.psnr(black, black + 255)[0] == 0.0
    assert fidelity.psnr(black, black + 16)[0] == pytest.approx(20 * np.log10(255 / 16))


def test_batches_do_not_change_values(monkeypatch: pytest.MonkeyPatch) -> None:
    original, copy = pairs()
    functions = (fidelity.l1, fidelity.psnr, fidelity.ssim, fidelity.spectrum_distance)
    whole = [f(original, copy) for f in functions]
    monkeypatch.setattr(fidelity, "_VALUES_PER_BATCH", 1)
    for function, value in zip(functions, whole, strict=True):
        assert function(original, copy) == pytest.approx(value)


@pytest.mark.parametrize("measure", [fidelity.l1, fidelity.l2, fidelity.psnr, fidelity.ssim])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_originals_without_a_copy_are_refused(
    measure: Callable[[Pictures, Pictures], NDArray[np.float64]], count: int
) -> None:
    original, copy = pairs()
    for given in ((original, copy[:count]), (original[:count], copy)):
        with pytest.raises(ValueError, match="must be alike"):
            measure(*given)
    with pytest.raises(ValueError, match="not empty"):
        measure(original[:0], copy[:0])


def test_power_spectrum_against_the_sum_written_out() -> None:
    picture = pairs()[0][1:2, :8, :8]
    grey = picture[0] @ [0.299, 0.587, 0.114]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(8) / 7)
    grey = (grey - grey.mean()) * np.outer(hann, hann)
    place = np.arange(8)
    rings: dict[int, list[float]] = {}
    for u in range(-4, 4):
        for v in range(-4, 4):
            phase = np.exp(-2j * np.pi * (u * place[:, None] + v * place[None, :]) / 8)
            power = abs((grey * phase).sum()) ** 2 / 64
            rings.setdefault(round(float(np.hypot(u, v))), []).append(power)
    expected = [np.mean(rings[radius]) for radius in (1, 2, 3)]
    assert fidelity.power_spectrum(picture) == pytest.approx(expected)


def test_noise_is_flat_and_blur_shows_as_missing_high_frequencies() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (200, 32, 32, 1)).repeat(3, axis=3).astype(np.uint8)
    spectrum = fidelity.power_spectrum(noise)
    assert spectrum.shape == (15,)
    # The window passes on the square of its mean square.
    level = noise.var() * (np.hanning(32) ** 2).mean() ** 2
    assert spectrum[1:] == pytest.approx(level, rel=0.1)
    blurred = (noise // 2 + np.roll(noise, 1, axis=2) // 2).astype(np.uint8)
    loss = fidelity.power_spectrum(blurred) / spectrum
    assert loss[-1] < 0.6 * loss[1]
    assert fidelity.spectrum_distance(noise, noise) == 0.0
    assert fidelity.spectrum_distance(noise, noise // 2) == pytest.approx(6.02, abs=0.1)
