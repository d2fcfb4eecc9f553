"""Adam and its schedule (P-OPT-2, P-OPT-3)."""

from dataclasses import dataclass

from megatron_cogview.configs.errors import refuse


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """Adam with decoupled weight decay off norms and biases; warm-up, then cosine decay."""

    lr: float = 3e-4
    """Highest learning rate."""
    min_lr_ratio: float = 0.1
    """Last learning rate as a fraction of ``lr`` (the paper states no floor; released: 0.1)."""
    warmup_fraction: float = 0.02
    """Part of all steps in which the rate rises linearly from 0."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.04
    """Decoupled; LayerNorm weights and all biases are exempt."""
    clip_grad: float = 1.0
    """Global gradient norm is cut to this; 0 turns clipping off."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise refuse("optimizer.lr", self.lr, "must be positive")
        for name in ("min_lr_ratio", "warmup_fraction"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise refuse(f"optimizer.{name}", getattr(self, name), "must be in [0, 1]")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise refuse(f"optimizer.{name}", getattr(self, name), "must be in [0, 1)")
        if not 0 < self.epsilon < 1:
            raise refuse("optimizer.epsilon", self.epsilon, "must be in (0, 1)")
        for name in ("weight_decay", "clip_grad"):
            if getattr(self, name) < 0:
                raise refuse(f"optimizer.{name}", getattr(self, name), "must not be negative")
