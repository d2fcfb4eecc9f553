"""The training loop: batches, loss weights, checkpoints, logs."""

from dataclasses import dataclass

from megatron_cogview.configs.errors import refuse
from megatron_cogview.configs.nearest import advice, nearest


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """Loop settings of ``pretrain``."""

    output: str = "runs/pretrain"
    """Run folder: ``checkpoints/``, ``metrics.jsonl``, TensorBoard, ``config.json``."""
    steps: int = 144_000
    """Optimizer steps (P-OPT-1)."""
    global_batch_size: int = 6144
    """Sequences per step, over all processes."""
    micro_batch_size: int = 4
    """Sequences per forward pass of one process."""
    text_weight: float = 1.0
    """Weight of each text label in the loss (P-LOSS-1: equal)."""
    image_weight: float = 1.0
    """Weight of each image label in the loss."""
    seed: int = 1234
    """Seeds initialisation and dropout."""
    log_every: int = 10
    """Steps between log lines."""
    save_every: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    validate_every: int = 1000
    """Steps between validation losses; 0 turns them off."""
    validation_batches: int = 4
    """Global batches per validation."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; older ones are removed."""
    keep_every: int = 0
    """Checkpoints of steps that are multiples of it are kept for good; 0: none is."""
    async_save: bool = True
    """Write checkpoints in the background, from a copy in host memory."""
    deterministic: bool = False
    """Only operations that give the same bits every time, at some cost in speed on a GPU."""
    profile_from: int = 10
    """With ``--profile``: first step (counted from 1) of the trace."""
    profile_steps: int = 3
    """With ``--profile``: steps of the trace."""
    log_activations_every: int = 0
    """Steps between records of each layer's largest activation and attention score, the early
    warning of an fp16 overflow; 0: none.  Such a step is slower."""

    def __post_init__(self) -> None:
        positive = ("steps", "global_batch_size", "micro_batch_size", "log_every", "save_every")
        for name in (*positive, "profile_from", "profile_steps"):
            if getattr(self, name) < 1:
                raise refuse(f"training.{name}", getattr(self, name), "must be at least 1")
        for name in ("validate_every", "validation_batches", "keep_every", "log_activations_every"):
            if getattr(self, name) < 0:
                raise refuse(f"training.{name}", getattr(self, name), "must not be negative")
        if self.keep_checkpoints < 2:
            raise refuse(
                "training.keep_checkpoints",
                self.keep_checkpoints,
                "must be at least 2, or one damaged checkpoint loses the run",
            )
        if (
            min(self.text_weight, self.image_weight) < 0
            or self.text_weight + self.image_weight <= 0
        ):
            raise refuse(
                "training.text_weight, training.image_weight",
                (self.text_weight, self.image_weight),
                "must not be negative, nor both 0",
            )

    def num_micro_batches(self, data_parallel: int) -> int:
        """Micro-batches of one process per step.

        Raises:
            ConfigError: the global batch does not divide evenly.
        """
        total, size = self.global_batch_size, self.micro_batch_size
        per_pass = size * data_parallel
        if total % per_pass:
            totals = nearest(total, lambda n: n % per_pass == 0, total + per_pass)
            sizes = nearest(size, lambda n: total % (n * data_parallel) == 0, total)
            others = {"training.micro_batch_size": sizes} if sizes else {}
            raise refuse(
                "training.global_batch_size",
                total,
                f"must be a multiple of training.micro_batch_size x data-parallel size = "
                f"{size} x {data_parallel} = {per_pass}; {advice(totals, others)}",
            )
        return total // per_pass
