"""Number formats (P-PREC-1, OP-7)."""

from dataclasses import dataclass
from typing import Literal

from megatron_cogview.configs.errors import refuse


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionConfig:
    """Weights and activations; master weights and optimizer state are fp32 always."""

    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """``auto``: bf16 where the device has it, fp32 on a CPU.  ``fp16`` is the paper's O2."""
    initial_loss_scale: float = 65_536.0
    """fp16 only: first dynamic loss scale."""
    min_loss_scale: float = 1.0
    """fp16 only: the scale never falls below it."""
    loss_scale_window: int = 1000
    """fp16 only: clean steps before the scale doubles."""
    hysteresis: int = 2
    """fp16 only: overflows in a row before the scale halves."""

    def __post_init__(self) -> None:
        for name in ("loss_scale_window", "hysteresis"):
            if getattr(self, name) < 1:
                raise refuse(f"precision.{name}", getattr(self, name), "must be at least 1")
        if not self.initial_loss_scale < 2.0**60:
            raise refuse(
                "precision.initial_loss_scale", self.initial_loss_scale, "must be below 2^60"
            )
        if not 0 < self.min_loss_scale <= self.initial_loss_scale:
            raise refuse(
                "precision.min_loss_scale",
                self.min_loss_scale,
                f"must be in (0, precision.initial_loss_scale = {self.initial_loss_scale}]",
            )
