"""How the image tokenizer is trained: data, schedule, losses (paper 2.2, appendix A)."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_cogview.configs.errors import refuse


@dataclass(frozen=True, kw_only=True, slots=True)
class AdversarialConfig:
    """The VQGAN's patch discriminator and its part in the loss; off at weight 0."""

    weight: float = 0.0
    """Factor on the adaptive weight of the adversarial loss."""
    start_step: int = 0
    """First step with the adversarial loss, below ``steps``; the discriminator learns from here on
    too."""
    channels: int = 64
    """Width of the discriminator's first layer; doubled at each of the next, up to 8 times."""
    layers: int = 3
    """Stride-2 convolutions of the discriminator."""
    lr_ratio: float = 1.0
    """The discriminator's learning rate over the generator's."""
    largest_weight: float = 1e4
    """Bound of the adaptive weight."""

    def __post_init__(self) -> None:
        for name in ("weight", "start_step"):
            if getattr(self, name) < 0:
                raise refuse(
                    f"tokenizer_training.adversarial.{name}",
                    getattr(self, name),
                    "must not be negative",
                )
        if self.channels % 8:
            raise refuse(
                "tokenizer_training.adversarial.channels", self.channels, "must be a multiple of 8"
            )
        for name in ("channels", "layers", "lr_ratio", "largest_weight"):
            if getattr(self, name) <= 0:
                raise refuse(
                    f"tokenizer_training.adversarial.{name}",
                    getattr(self, name),
                    "must be positive",
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerTrainingConfig:
    """How the image tokenizer is trained."""

    data: tuple[str, ...] = ()
    """Folders of WebDataset tars."""
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
    codebook_warmup_steps: int = 0
    """Steps in which the decoder sees the encoder's outputs themselves; after them the codebook is
    drawn (``image_tokenizer.codebook_init`` = ``data``) from an encoder that has learned."""
    reconstruction: Literal["l2", "l1"] = "l2"
    """Error of pixels that is trained on: L2 as the paper, or L1 as VQGANs do."""
    perceptual_weight: float = 0.0
    """Weight of the perceptual loss; above 0 it needs ``perceptual_weights``."""
    perceptual_weights: str = ""
    """File of VGG-16 weights, with or without LPIPS heads (docs/image_tokenizers.md)."""
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    """Discriminator and adversarial loss."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Networks: ``auto`` is bf16 on GPUs that have it, else fp32.  fp32 is without TF32.  Weights,
    codebook and moments are fp32 in any case."""
    validation_fraction: float = 0.05
    """Pictures kept out of training, chosen by a hash of their id."""
    random_crop: float = 0.125
    """Training pictures are stored larger by this share, and random windows are taken; 0: off."""
    flip: bool = True
    """Mirror training pictures at random."""
    seed: int = 1234
    """Seeds initialisation and the order of pictures."""
    log_every: int = 20
    """Steps between log lines."""
    validate_every: int = 1000
    """Steps between validations on held-out pictures."""
    validation_pictures: int = 256
    """Pictures of each validation on the way; the one at the end takes up to 2,048."""
    save_every: int = 200
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        names = ("steps", "batch_size", "log_every", "validate_every", "validation_pictures")
        for name in (*names, "save_every"):
            if getattr(self, name) < 1:
                raise refuse(
                    f"tokenizer_training.{name}", getattr(self, name), "must be at least 1"
                )
        if self.lr <= 0:
            raise refuse("tokenizer_training.lr", self.lr, "must be positive")
        if not 0 <= self.codebook_warmup_steps < self.steps:
            raise refuse(
                "tokenizer_training.codebook_warmup_steps",
                self.codebook_warmup_steps,
                f"must be in 0..{self.steps - 1}, below tokenizer_training.steps",
            )
        if self.adversarial.weight > 0 and self.adversarial.start_step >= self.steps:
            raise refuse(
                "tokenizer_training.adversarial.start_step",
                self.adversarial.start_step,
                f"must be below tokenizer_training.steps = {self.steps}, or the adversarial phase "
                "never begins; without one, set tokenizer_training.adversarial.weight to 0",
            )
        if not 0.0 < self.validation_fraction < 1.0:
            raise refuse(
                "tokenizer_training.validation_fraction",
                self.validation_fraction,
                "must be in (0, 1)",
            )
        if not 0.0 <= self.random_crop <= 1.0:
            raise refuse("tokenizer_training.random_crop", self.random_crop, "must be in [0, 1]")
        if self.perceptual_weight < 0:
            raise refuse(
                "tokenizer_training.perceptual_weight",
                self.perceptual_weight,
                "must not be negative",
            )
        if self.perceptual_weight > 0 and not self.perceptual_weights:
            raise refuse(
                "tokenizer_training.perceptual_weights",
                self.perceptual_weights,
                "name a file of VGG-16 weights, or set tokenizer_training.perceptual_weight to 0",
            )
