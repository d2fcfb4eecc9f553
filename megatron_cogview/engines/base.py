"""The seam between training loop and engine.  The engine owns state; the trainer owns time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_cogview.data.batch import Batch
from megatron_cogview.model.loss import Losses


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one step tells the trainer; equal on all ranks."""

    losses: Losses
    """Means over the global batch."""
    updated: bool
    """False when the optimizer refused the gradients (an fp16 overflow); weights are untouched."""
    grad_norm: float
    """Global gradient norm before clipping."""
    loss_scale: float
    """Dynamic loss scale; 1 outside fp16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """What a checkpoint's manifest keeps besides the step, from which the data position follows."""

    run: dict[str, Any]
    """The resolved configuration."""
    fingerprints: dict[str, str]
    """SHA-256 of the text and image tokenizer the model was trained with."""


class Engine(Protocol):
    """A model that can be trained, evaluated, saved and loaded."""

    def train_step(self, micro_batches: Sequence[Batch], lr: float) -> StepResult:
        """Run all micro-batches of this rank, reduce gradients and update the weights."""

    def eval_step(self, micro_batches: Sequence[Batch]) -> StepResult:
        """Losses without gradients or dropout."""

    def save(self, directory: Path) -> None:
        """Write model and optimizer into an empty directory.  All ranks call it together."""

    def load(self, directory: Path) -> None:
        """Restore model and optimizer, under this engine's own parallel layout."""
