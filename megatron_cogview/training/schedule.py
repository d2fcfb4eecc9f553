"""Learning rate as a pure function of the step: linear warm-up, then a cosine (P-OPT-3)."""

import math

from megatron_cogview.configs.optimizer import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Rate of step ``step`` (0 = the first) out of ``total_steps``.

    It rises linearly to ``lr`` over the first ``warmup_fraction`` of the steps and falls along half
    a cosine to ``lr * min_lr_ratio`` at the last one.
    """
    warmup = math.ceil(total_steps * config.warmup_fraction)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = min(1.0, (step + 1 - warmup) / max(1, total_steps - warmup))
    floor = config.lr * config.min_lr_ratio
    return floor + (config.lr - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
