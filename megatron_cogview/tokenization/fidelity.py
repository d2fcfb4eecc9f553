"""How near reconstructions are to their pictures: pixel errors, SSIM, and power spectra.

All functions take uint8 pictures ``[V, S, S, 3]``, as many copies as originals (ValueError
otherwise), and work in small batches.  Knows nothing of networks.

Shapes: V pictures, S side, C = 3 channels, R whole spatial frequencies.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

HIGHEST_PSNR = 100.0
"""Given for a picture without any error, where the formula has no value."""

# Few enough that SSIM's intermediate pictures stay in a processor's cache: twice as fast.
_VALUES_PER_BATCH = 1 << 19
# SSIM as published: window of 11 with deviation 1.5, constants of 1 % and 3 % of the peak.
_WINDOW = 11
_DEVIATION = 1.5
_C1, _C2 = (0.01 * 255.0) ** 2, (0.03 * 255.0) ** 2
# Far below the rounding of pixels to whole levels, which gives 1 / 12; flat pictures have less.
_NO_POWER = 1e-6
# Rec. 601.
_LUMINANCE = np.array([0.299, 0.587, 0.114])


def l1(original_VSSC: NDArray[np.uint8], copy_VSSC: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean absolute difference of each picture, in units of pixels in [0, 1]."""
    return _mean_over_pictures(original_VSSC, copy_VSSC, np.abs)


def l2(original_VSSC: NDArray[np.uint8], copy_VSSC: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean squared difference of each picture, in units of pixels in [0, 1]."""
    return _mean_over_pictures(original_VSSC, copy_VSSC, np.square)


def psnr(original_VSSC: NDArray[np.uint8], copy_VSSC: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio of each picture in dB, at most ``HIGHEST_PSNR``."""
    floor = 10.0 ** (-HIGHEST_PSNR / 10.0)
    return np.asarray(-10.0 * np.log10(np.maximum(l2(original_VSSC, copy_VSSC), floor)))


def ssim(original_VSSC: NDArray[np.uint8], copy_VSSC: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Structural similarity of each picture (Wang et al. 2004), mean over channels.

    Gaussian window of 11 pixels (of the largest odd number that fits into a smaller picture), only
    where it lies inside the picture.
    """
    values = []
    for rows in _batches(original_VSSC, copy_VSSC):
        pair = (original_VSSC[rows], copy_VSSC[rows])
        x_BCSS, y_BCSS = (torch.from_numpy(p).permute(0, 3, 1, 2).double() for p in pair)
        side = min(x_BCSS.shape[2:])
        kernel_W = _gaussian(min(_WINDOW, side - 1 + side % 2))
        mean_x, mean_y = _blur(x_BCSS, kernel_W), _blur(y_BCSS, kernel_W)
        variance_x = _blur(x_BCSS * x_BCSS, kernel_W) - mean_x * mean_x
        variance_y = _blur(y_BCSS * y_BCSS, kernel_W) - mean_y * mean_y
        covariance = _blur(x_BCSS * y_BCSS, kernel_W) - mean_x * mean_y
        luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
        structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
        values.append((luminance * structure).mean((1, 2, 3)).numpy())
    return np.concatenate(values)


def power_spectrum(pictures_VSSC: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Radially averaged power of the luminance, mean over pictures, ``[S / 2 - 1]``.

    Each picture's mean is removed and a Hann window laid over it.  Entry i is the mean of
    ``|DFT|^2 / S^2`` over frequencies whose radius rounds to i + 1 cycles per picture.
    """
    side = pictures_VSSC.shape[1]
    hann_S = np.hanning(side)
    window_SS = np.outer(hann_S, hann_S)
    cycles_S = np.fft.fftfreq(side, 1.0 / side)
    radius_SS = np.rint(np.hypot(cycles_S[:, None], cycles_S[None, :])).astype(np.int64)
    power_SS = np.zeros((side, side))
    for rows in _batches(pictures_VSSC):
        grey_BSS = pictures_VSSC[rows] @ _LUMINANCE
        grey_BSS -= grey_BSS.mean((1, 2), keepdims=True)
        power_SS += np.square(np.abs(np.fft.fft2(grey_BSS * window_SS))).sum(0)
    sums = np.bincount(radius_SS.ravel(), power_SS.ravel())
    counts = np.bincount(radius_SS.ravel())
    mean_R = sums / counts / (len(pictures_VSSC) * side**2)
    return np.asarray(mean_R[1 : side // 2])


def spectrum_distance(original_VSSC: NDArray[np.uint8], copy_VSSC: NDArray[np.uint8]) -> float:
    """Root mean square over the frequencies of how far two power spectra are apart, in dB."""
    quotient_R = (power_spectrum(copy_VSSC) + _NO_POWER) / (
        power_spectrum(original_VSSC) + _NO_POWER
    )
    return float(np.sqrt(np.mean(np.square(10.0 * np.log10(quotient_R)))))


def _mean_over_pictures(
    original_VSSC: NDArray[np.uint8], copy_VSSC: NDArray[np.uint8], measure: np.ufunc
) -> NDArray[np.float64]:
    values = [
        measure((original_VSSC[rows].astype(np.float64) - copy_VSSC[rows]) / 255.0).mean((1, 2, 3))
        for rows in _batches(original_VSSC, copy_VSSC)
    ]
    return np.concatenate(values)


def _batches(*pictures_VSSC: NDArray[np.uint8]) -> Iterator[slice]:
    shapes = [pictures.shape for pictures in pictures_VSSC]
    # Else numpy would repeat a single picture, and the batches leave out what has no partner.
    if len(set(shapes)) > 1 or 0 in shapes[0]:
        raise ValueError(f"pictures of shapes {shapes}: must be alike and not empty")
    step = max(1, _VALUES_PER_BATCH // pictures_VSSC[0][0].size)
    return (slice(start, start + step) for start in range(0, len(pictures_VSSC[0]), step))


def _gaussian(width: int) -> Tensor:
    offset_W = torch.arange(width, dtype=torch.float64) - width // 2
    weight_W = torch.exp(-(offset_W**2) / (2 * _DEVIATION**2))
    return weight_W / weight_W.sum()


def _blur(image_BCSS: Tensor, kernel_W: Tensor) -> Tensor:
    """Both directions, channel by channel, without padding."""
    # A sum of shifted pictures: in fp64 torch's grouped convolution is ten times slower.
    weights = kernel_W.tolist()
    for axis in (2, 3):
        length = image_BCSS.shape[axis] - len(weights) + 1
        blurred = image_BCSS.narrow(axis, 0, length) * weights[0]
        for start, weight in enumerate(weights[1:], 1):
            blurred.add_(image_BCSS.narrow(axis, start, length), alpha=weight)
        image_BCSS = blurred
    return image_BCSS
