"""Small trainings of image tokenizers for several test modules."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_cogview.configs.image_tokenizer import ImageTokenizerConfig, VQGANConfig
from megatron_cogview.configs.presets import tiny
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.configs.tokenizer_training import AdversarialConfig, TokenizerTrainingConfig
from megatron_cogview.training import tokenizer_trainer
from megatron_cogview.training.metrics import read_metrics
from megatron_cogview.training.world import World

VARIANTS = ("moving_average", "straight_through", "gumbel", "fixed", "vqgan")
CPU = World(device=torch.device("cpu"))
MICRO: dict[str, Any] = {
    "steps": 12,
    # Does not divide by two processes.
    "batch_size": 7,
    "lr": 1e-2,
    "warmup_steps": 2,
    "validation_fraction": 0.2,
    "log_every": 4,
    "save_every": 5,
    "validate_every": 6,
    "random_crop": 0.0,
}


def config(data: Path, output: Path, variant: str = "moving_average", **training: Any) -> RunConfig:
    """Micro size: 16-pixel pictures, 8 x 8 codes of the demo's vocabulary."""
    base = tiny()
    tokenizer: dict[str, Any] = {
        "image_size": 16,
        "downsampling_layers": 1,
        "hidden_size": 8,
        "code_dim": 4,
        "num_codes": 256,
        "codebook_init": "data",
        "revive_dead_codes": True,
    }
    if variant == "vqgan":
        tokenizer |= {"kind": "vqgan", "vqgan": VQGANConfig(multipliers=(1, 2), norm_groups=4)}
        critic = AdversarialConfig(weight=0.8, start_step=3, channels=8, layers=1)
        training = {"adversarial": critic, "random_crop": 0.25, "lr": 1e-3, **training}
    elif variant != "moving_average":
        tokenizer |= {"codebook": variant, "revive_dead_codes": False}
    if variant == "gumbel":
        # Codes on top of vectors would make the norm's slope, and so a draw, a matter of rounding.
        tokenizer |= {"codebook_init": "xavier"}
    return dataclasses.replace(
        base,
        image_tokenizer=ImageTokenizerConfig(**tokenizer),
        tokenizer_training=TokenizerTrainingConfig(
            **{"data": (str(data),), "output": str(output), **MICRO, **training}
        ),
    )


def rows(path: Path) -> list[dict[str, float]]:
    """Metrics without the clock."""
    kept = read_metrics(path / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k != "pictures_per_second"} for r in kept]


@contextmanager
def killed_at(step: int | None) -> Iterator[list[int]]:
    """Steps that are done; a run that comes to ``step`` ends there."""
    plain, done = tokenizer_trainer._Run._step, []

    def noted(self: Any, number: int) -> dict[str, Tensor]:
        if number == step:
            raise KeyboardInterrupt
        done.append(number)
        return plain(self, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_trainer._Run, "_step", noted)
        yield done
