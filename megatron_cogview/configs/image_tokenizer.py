"""The image tokenizer's shape: network, codebook and how the codebook learns (paper 2.2)."""

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_cogview.configs.errors import refuse
from megatron_cogview.configs.from_json import build


@dataclass(frozen=True, kw_only=True, slots=True)
class GumbelConfig:
    """Temperature of the Gumbel codebook (P-TOK-7)."""

    start: float = 1.0
    """Temperature at the first step."""
    end: float = 0.0625
    """Temperature from the end of the annealing on; above 0."""
    anneal_fraction: float = 0.75
    """Share of the training over which the temperature falls, by a constant factor per step."""
    squared: bool = False
    """Squared distances instead of the printed norm, as the released code."""
    scale_noise: bool = False
    """Divide the noise by the temperature too, as the released code does."""

    def __post_init__(self) -> None:
        if not 0.0 < self.end <= self.start:
            raise refuse(
                "image_tokenizer.gumbel.end",
                self.end,
                f"must be above 0 and at most image_tokenizer.gumbel.start = {self.start}",
            )
        if not 0.0 < self.anneal_fraction <= 1.0:
            raise refuse(
                "image_tokenizer.gumbel.anneal_fraction", self.anneal_fraction, "must be in (0, 1]"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class VQGANConfig:
    """Residual encoder and decoder; read only if ``image_tokenizer.kind`` is ``vqgan``."""

    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels at each resolution, finest first, as multiples of ``hidden_size``; one more than
    ``downsampling_layers``."""
    residual_blocks: int = 2
    """Per resolution in the encoder; the decoder has one more."""
    attention_levels: int = 1
    """Coarsest resolutions whose residual blocks are each followed by self-attention."""
    norm_groups: int = 32
    """Groups of the group normalisation; must divide every width."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageTokenizerConfig:
    """Pictures to codes and back: a VQ-VAE as in the paper, or a VQGAN (P-FASH-1)."""

    kind: Literal["vqvae", "vqgan"] = "vqvae"
    """Network: strided convolutions (P-TOK-3), or residual blocks with attention."""
    image_size: int = 256
    """Side of the square input, pixels."""
    downsampling_layers: int = 3
    """Stride-2 convolutions; each halves the side (P-TOK-3: three)."""
    hidden_size: int = 512
    """Channels between convolutions; of the VQGAN at multiplier 1."""
    code_dim: int = 256
    """Width of a code vector."""
    num_codes: int = 8192
    """Codebook entries."""
    codebook: Literal["moving_average", "straight_through", "gumbel", "fixed"] = "moving_average"
    """How the codebook learns: P-TOK-8, P-TOK-6, P-TOK-7, P-TOK-9."""
    ema_decay: float = 0.99
    """Moving-average codebook: share of the old average that stays at each step (P-TOK-8), reached
    along (1 + step) / (10 + step), which at step 0 is 0.1; 0.99 is in force from step 890 on."""
    codebook_init: Literal["xavier", "data"] = "xavier"
    """``xavier`` as the paper (P-TOK-5); ``data``: encoder outputs of the first batches."""
    revive_dead_codes: bool = False
    """Moving-average codebook: put codes that nobody uses back among the encoder's outputs."""
    commitment: float = 0.25
    """Weight of the pull of encoder outputs towards their codes."""
    gumbel: GumbelConfig = field(default_factory=GumbelConfig)
    """Gumbel codebook: temperature."""
    vqgan: VQGANConfig = field(default_factory=VQGANConfig)
    """VQGAN: residual blocks and attention."""

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
        if self.revive_dead_codes and self.codebook != "moving_average":
            raise refuse(
                "image_tokenizer.revive_dead_codes",
                True,
                f"needs image_tokenizer.codebook = 'moving_average', not {self.codebook!r}",
            )
        if self.kind == "vqgan":
            self._check_vqgan()

    def _check_vqgan(self) -> None:
        vqgan, levels = self.vqgan, self.downsampling_layers + 1
        if len(vqgan.multipliers) != levels or min(vqgan.multipliers) < 1:
            raise refuse(
                "image_tokenizer.vqgan.multipliers",
                vqgan.multipliers,
                f"needs {levels} positive numbers (image_tokenizer.downsampling_layers + 1)",
            )
        if vqgan.residual_blocks < 1:
            raise refuse(
                "image_tokenizer.vqgan.residual_blocks", vqgan.residual_blocks, "must be at least 1"
            )
        if not 0 <= vqgan.attention_levels <= levels:
            raise refuse(
                "image_tokenizer.vqgan.attention_levels",
                vqgan.attention_levels,
                f"must be in 0..{levels}",
            )
        if vqgan.norm_groups < 1 or self.hidden_size % vqgan.norm_groups:
            raise refuse(
                "image_tokenizer.vqgan.norm_groups",
                vqgan.norm_groups,
                f"must divide image_tokenizer.hidden_size = {self.hidden_size}",
            )

    @property
    def codes_per_side(self) -> int:
        """Side of the code grid."""
        return self.image_size >> self.downsampling_layers

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "ImageTokenizerConfig":
        """From JSON values; unknown names and wrong types are errors, absent names take defaults.

        Raises:
            ConfigError: naming the field.
        """
        config = build(cls, value, "image_tokenizer")
        assert isinstance(config, cls)
        return config
