"""The image tokenizer's shape and its training (paper 2.2, appendix A)."""

from dataclasses import dataclass
from typing import Literal

from megatron_cogview.configs.errors import refuse


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageTokenizerConfig:
    """The paper's VQ-VAE: strided convolutions, a codebook, transposed convolutions."""

    kind: Literal["vqvae"] = "vqvae"
    """Network."""
    image_size: int = 256
    """Side of the square input, pixels."""
    downsampling_layers: int = 3
    """Stride-2 convolutions; each halves the side (P-TOK-3: three)."""
    hidden_size: int = 512
    """Channels between convolutions."""
    code_dim: int = 256
    """Width of a code vector."""
    num_codes: int = 8192
    """Codebook entries."""
    ema_decay: float = 0.99
    """Moving-average codebook: how much of the old average stays at each step (P-TOK-8)."""
    codebook_init: Literal["xavier", "data"] = "xavier"
    """``xavier`` as the paper (P-TOK-5); ``data``: encoder outputs of the first batches."""
    revive_dead_codes: bool = False
    """Put codes that nobody uses back among the encoder's outputs."""
    commitment: float = 0.25
    """Weight of the pull of encoder outputs towards their codes."""

    def __post_init__(self) -> None:
        names = ("image_size", "downsampling_layers", "hidden_size", "code_dim", "num_codes")
        for name in names:
            if getattr(self, name) < 1:
                raise refuse(f"image_tokenizer.{name}", getattr(self, name), "must be at least 1")
        if self.image_size % (1 << self.downsampling_layers):
            raise refuse(
                "image_tokenizer.image_size",
                self.image_size,
                f"must be a multiple of {1 << self.downsampling_layers} "
                f"(2 ** image_tokenizer.downsampling_layers)",
            )
        if not 0.0 < self.ema_decay < 1.0:
            raise refuse("image_tokenizer.ema_decay", self.ema_decay, "must be in (0, 1)")

    @property
    def codes_per_side(self) -> int:
        """Side of the code grid."""
        return self.image_size >> self.downsampling_layers


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerTrainingConfig:
    """How the image tokenizer is trained."""

    data: str = ""
    """Folder of WebDataset tars."""
    output: str = "runs/image_tokenizer"
    """Run folder: checkpoints, logs and ``image_tokenizer.safetensors``."""
    steps: int = 250_000
    """Optimizer steps."""
    batch_size: int = 128
    """Pictures per step, over all processes."""
    lr: float = 3e-4
    """Adam's learning rate after warm-up; it decays to a tenth along a cosine."""
    warmup_steps: int = 500
    """Steps of linear warm-up."""
    validation_fraction: float = 0.05
    """Pictures kept out of training, chosen by a hash of their id."""
    flip: bool = True
    """Mirror training pictures at random."""
    seed: int = 1234
    """Seeds initialisation and the order of pictures."""
    log_every: int = 20
    """Steps between log lines."""
    save_every: int = 200
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise refuse(
                    f"tokenizer_training.{name}", getattr(self, name), "must be at least 1"
                )
        if self.lr <= 0:
            raise refuse("tokenizer_training.lr", self.lr, "must be positive")
        if not 0.0 < self.validation_fraction < 1.0:
            raise refuse(
                "tokenizer_training.validation_fraction",
                self.validation_fraction,
                "must be in (0, 1)",
            )
