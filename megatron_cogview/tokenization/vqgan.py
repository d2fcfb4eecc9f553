"""The VQGAN's networks (P-FASH-1): residual blocks, with self-attention where pictures are small.

Pictures are float, channels first.  Group normalisation keeps a picture's result apart from the
rest of its batch.  Knows nothing of codebooks or of the discriminator.

Shapes: B pictures, C channels, S side in pixels, D code width, H x W grid.
"""

import itertools

from torch import Tensor, nn
from torch.nn import functional

from megatron_cogview.configs.image_tokenizer import ImageTokenizerConfig


class ResidualBlock(nn.Module):
    """Two normalised 3 x 3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        same = inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1)

    def forward(self, hidden_BCHW: Tensor) -> Tensor:
        """Same grid, ``outputs`` channels."""
        inner = self.conv1(functional.silu(self.norm1(hidden_BCHW)))
        inner = self.conv2(functional.silu(self.norm2(inner)))
        result: Tensor = self.shortcut(hidden_BCHW) + inner
        return result


class SelfAttention(nn.Module):
    """One head over all positions of the grid, added to its input."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        # No bias: softmax cancels the key's, and Adam would blow its rounding noise up.
        self.query_key_value = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.projection = nn.Conv2d(channels, channels, 1)

    def forward(self, hidden_BCHW: Tensor) -> Tensor:
        """Same shape."""
        batch, channels, height, width = hidden_BCHW.shape
        packed = self.query_key_value(self.norm(hidden_BCHW)).flatten(2).transpose(1, 2)
        query, key, value = (part.unsqueeze(1) for part in packed.chunk(3, dim=2))
        mixed = functional.scaled_dot_product_attention(query, key, value).squeeze(1)
        mixed_BCHW = mixed.transpose(1, 2).reshape(batch, channels, height, width)
        result: Tensor = hidden_BCHW + self.projection(mixed_BCHW)
        return result


class Downsample(nn.Module):
    """Halve the grid by a stride-2 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, hidden_BCHW: Tensor) -> Tensor:
        """``[B, C, H / 2, W / 2]``."""
        result: Tensor = self.conv(hidden_BCHW)
        return result


class Upsample(nn.Module):
    """Double the grid: repeat each position, then a convolution; leaves no checkerboard."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_BCHW: Tensor) -> Tensor:
        """``[B, C, 2 H, 2 W]``."""
        result: Tensor = self.conv(functional.interpolate(hidden_BCHW, scale_factor=2.0))
        return result


def build_encoder(config: ImageTokenizerConfig) -> nn.Sequential:
    """``[B, 3, S, S]`` -> latents ``[B, D, H, W]``."""
    vqgan, widths = config.vqgan, _widths(config)
    blocks: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1)]
    for level, (before, width) in enumerate(itertools.pairwise([widths[0], *widths])):
        for index in range(vqgan.residual_blocks):
            blocks += _block(config, before if index == 0 else width, width, level)
        if level < config.downsampling_layers:
            blocks.append(Downsample(width))
    blocks += _middle(widths[-1], vqgan.norm_groups)
    blocks += _head(widths[-1], config.code_dim, vqgan.norm_groups)
    return nn.Sequential(*blocks)


def build_decoder(config: ImageTokenizerConfig) -> nn.Sequential:
    """Code vectors ``[B, D, H, W]`` -> ``[B, 3, S, S]``, not clamped."""
    vqgan, widths = config.vqgan, _widths(config)
    blocks: list[nn.Module] = [nn.Conv2d(config.code_dim, widths[-1], 3, padding=1)]
    blocks += _middle(widths[-1], vqgan.norm_groups)
    coarse_first = list(reversed(widths))
    for level, (before, width) in enumerate(itertools.pairwise([widths[-1], *coarse_first])):
        depth = config.downsampling_layers - level
        for index in range(vqgan.residual_blocks + 1):
            blocks += _block(config, before if index == 0 else width, width, depth)
        if depth > 0:
            blocks.append(Upsample(width))
    blocks += _head(widths[0], 3, vqgan.norm_groups)
    return nn.Sequential(*blocks)


def _widths(config: ImageTokenizerConfig) -> list[int]:
    return [config.hidden_size * multiplier for multiplier in config.vqgan.multipliers]


def _block(config: ImageTokenizerConfig, inputs: int, outputs: int, level: int) -> list[nn.Module]:
    """A residual block, and attention if ``level`` (0: full size) is among the coarsest."""
    groups = config.vqgan.norm_groups
    block: list[nn.Module] = [ResidualBlock(inputs, outputs, groups)]
    if level > config.downsampling_layers - config.vqgan.attention_levels:
        block.append(SelfAttention(outputs, groups))
    return block


def _middle(width: int, groups: int) -> list[nn.Module]:
    return [
        ResidualBlock(width, width, groups),
        SelfAttention(width, groups),
        ResidualBlock(width, width, groups),
    ]


def _head(inputs: int, outputs: int, groups: int) -> list[nn.Module]:
    norm = nn.GroupNorm(groups, inputs)
    return [norm, nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1)]
