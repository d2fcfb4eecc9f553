"""The paper's networks (P-TOK-3, P-TOK-4): strided convolutions, and transposed ones back.

The module tree gives the released checkpoint's keys (``blocks.*``).  Pictures are float, channels
first.  Knows nothing of codebooks.

Shapes: B pictures, C = 3 channels, S side in pixels, D code width, H x W code grid.
"""

import math

from torch import Tensor, nn

from megatron_cogview.configs.image_tokenizer import ImageTokenizerConfig


class Encoder(nn.Module):
    """Stride-2 convolutions (kernel 4, padding 1) with ReLU, then 1 x 1 to the code width."""

    def __init__(self, downsampling_layers: int, hidden_size: int, code_dim: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        channels = 3
        for _ in range(downsampling_layers):
            blocks += [nn.Conv2d(channels, hidden_size, 4, 2, 1), nn.ReLU(inplace=True)]
            channels = hidden_size
        blocks.append(nn.Conv2d(hidden_size, code_dim, 1))
        self.blocks = nn.Sequential(*blocks)
        _keep_variance(self.blocks, taps=16)

    def forward(self, pictures_BCSS: Tensor) -> Tensor:
        """Latents ``[B, D, H, W]``."""
        latents: Tensor = self.blocks(pictures_BCSS)
        return latents


class Decoder(nn.Module):
    """Transposed convolutions (kernel 4, stride 2, padding 1) with ReLU, then 1 x 1 to RGB."""

    def __init__(self, upsampling_layers: int, hidden_size: int, code_dim: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        channels = code_dim
        for _ in range(upsampling_layers):
            blocks += [nn.ConvTranspose2d(channels, hidden_size, 4, 2, 1), nn.ReLU(inplace=True)]
            channels = hidden_size
        blocks.append(nn.Conv2d(hidden_size, 3, 1))
        self.blocks = nn.Sequential(*blocks)
        # Stride 2 over kernel 4: each output pixel sees 2 x 2 of the inputs.
        _keep_variance(self.blocks, taps=4)

    def forward(self, latents_BDHW: Tensor) -> Tensor:
        """Pictures ``[B, 3, S, S]``, not clamped."""
        pictures: Tensor = self.blocks(latents_BDHW)
        return pictures


def _keep_variance(blocks: nn.Sequential, taps: int) -> None:
    """He initialisation of the layers before a ReLU (not stated in the paper).

    torch's default shrinks the signal at every layer, and training starts the slower for it.
    """
    for layer in blocks:
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and layer.kernel_size == (4, 4):
            nn.init.normal_(layer.weight, std=math.sqrt(2.0 / (layer.in_channels * taps)))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def build_encoder(config: ImageTokenizerConfig) -> Encoder:
    """Encoder of these sizes."""
    return Encoder(config.downsampling_layers, config.hidden_size, config.code_dim)


def build_decoder(config: ImageTokenizerConfig) -> Decoder:
    """Decoder of these sizes."""
    return Decoder(config.downsampling_layers, config.hidden_size, config.code_dim)
