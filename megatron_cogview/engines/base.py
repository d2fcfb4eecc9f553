"""The seam between training loop and engine.  The engine owns state; the trainer owns time."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_cogview.checkpoint.snapshot import ShardedState
from megatron_cogview.data.batch import Batch
from megatron_cogview.model.loss import Losses


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one step tells the trainer; equal on all ranks."""

    losses: Losses
    """Means over the global batch."""
    updated: bool
    """False when loss or gradients were not finite on some rank; weights are untouched on all."""
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
    progress: dict[str, Any]
    """What the loop remembers besides the step (``training/guards.py``)."""


class StepObserver:
    """Is told where a step stands.  This one does nothing with it."""

    def entered(self, phase: str) -> None:
        """A phase of the step begins: ``forward``, ``gradients``, ``update``."""

    def waiting(self) -> contextlib.AbstractContextManager[Any]:
        """Around a point where this rank waits for others."""
        return contextlib.nullcontext()


class Engine(Protocol):
    """A model that can be trained, evaluated, saved and loaded."""

    observer: StepObserver
    """Told of every step's phases; replaced by whoever wants to know."""

    def train_step(self, micro_batches: Sequence[Batch], lr: float) -> StepResult:
        """Run all micro-batches of this rank, reduce gradients and update the weights."""

    def eval_step(self, micro_batches: Sequence[Batch]) -> StepResult:
        """Losses without gradients or dropout."""

    def sharded_state(self) -> ShardedState:
        """This rank's part of model and optimizer, as ``checkpoint.saver`` takes it.

        All ranks call it together.  The tensors are the live ones.
        """

    def load(self, directory: Path) -> None:
        """Restore model and optimizer, under this engine's own parallel layout."""
