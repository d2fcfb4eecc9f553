"""Sampling pictures from captions."""

from dataclasses import dataclass

from megatron_cogview.configs.errors import refuse


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationConfig:
    """Settings of ``generate``; they are written beside the pictures."""

    checkpoint: str = ""
    """Folder of checkpoints of a training run (``RUN/checkpoints``).  Its index is a pickle of
    torch's: load checkpoints you trust."""
    text_tokenizer: str = ""
    """SentencePiece ``.model`` file the model was trained with."""
    image_tokenizer: str = ""
    """``image_tokenizer.safetensors`` the model was trained with."""
    prompts: str = ""
    """JSON lines with ``id`` and ``caption``, or a text file with one caption per line."""
    output: str = "runs/generated"
    """Folder for the pictures, ``grid.png`` and ``samples.json``."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable code always."""
    top_k: int = 200
    """Only the k most probable codes are drawn; 0 keeps all."""
    batch_size: int = 64
    """Pictures generated together; the result does not depend on it."""
    seed: int = 1234
    """Pictures depend on it and on their place in the prompt file, on nothing else."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise refuse("generation.temperature", self.temperature, "must not be negative")
        if self.top_k < 0:
            raise refuse("generation.top_k", self.top_k, "must not be negative")
        if self.batch_size < 1:
            raise refuse("generation.batch_size", self.batch_size, "must be at least 1")
