"""How 8-bit pixels become the floats a network sees, and back.

A tokenizer's file names its scaling: weights trained with one are useless with another.

Shapes: B pictures, S side, C = 3 channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class PixelScaling(NamedTuple):
    """``(uint8 / 255 - mean) / deviation`` for each channel."""

    name: str
    """As files record it."""
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]

    def to_float(self, pictures_BSSC: Tensor) -> Tensor:
        """uint8 ``[B, S, S, 3]`` -> fp32 ``[B, 3, S, S]``."""
        scale_C, shift_C = self._line(pictures_BSSC.device)
        return pictures_BSSC.permute(0, 3, 1, 2).float().div_(scale_C).sub_(shift_C)

    def to_uint8(self, pictures_BCSS: Tensor) -> Tensor:
        """The inverse of :meth:`to_float`: clamped to 0..255 and rounded, never stretched.

        Returns:
            contiguous ``[B, S, S, 3]``.
        """
        scale_C, shift_C = self._line(pictures_BCSS.device)
        levels = pictures_BCSS.float().add(shift_C).mul_(scale_C).round_().clamp_(0.0, 255.0)
        return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def _line(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``[3, 1, 1]`` each: levels per unit, and the middle in units."""
        deviation_C = torch.tensor(self.deviation, dtype=torch.float64)
        shift_C = torch.tensor(self.mean, dtype=torch.float64) / deviation_C
        scale_C = 255.0 * deviation_C
        return (
            scale_C.float().view(3, 1, 1).to(device),
            shift_C.float().view(3, 1, 1).to(device),
        )


OURS = PixelScaling("uint8 / 127.5 - 1", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""[-1, 1]; what our training uses."""

RELEASED = PixelScaling(
    "(uint8 / 255 - mean) / deviation of the released VQ-VAE",
    (0.79093, 0.76271, 0.75340),
    (0.30379, 0.32279, 0.32800),
)
"""What CogView's released tokenizer was trained with."""

SCALINGS = {scaling.name: scaling for scaling in (OURS, RELEASED)}
"""By name."""
