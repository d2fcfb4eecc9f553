"""The paper's VQ-VAE (P-TOK-2..4): strided convolutions, codebook, transposed convolutions.

The module tree gives the released checkpoint's keys (``enc_b.blocks.*``, ``quantize_t.*``,
``dec.blocks.*``).  Pictures are float, channels first, in [-1, 1]: ``uint8 / 127.5 - 1``.  Knows
nothing of files or of training.

Shapes: B pictures, C = 3 channels, S side in pixels, D code width, H x W code grid.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_cogview.configs.image_tokenizer import ImageTokenizerConfig
from megatron_cogview.kernels.codebook_lookup.reference import (
    nearest_code,
    nearest_code_with_margin,
)
from megatron_cogview.tokenization.quantizer import MovingAverageQuantizer, flatten_latents

# fp32 convolutions of different batch sizes were seen to differ by about 1e-7 of the latents'
# length; a decision that an error of this share could change is taken again on the picture alone.
_LATENT_ERROR = 1e-5


class VQVAEOutput(NamedTuple):
    """One training pass."""

    reconstruction_BCSS: Tensor
    """Decoder output, not clamped."""
    latents_BDHW: Tensor
    """Encoder output, before the codebook."""
    codes_BHW: Tensor
    """int64."""
    commitment: Tensor
    """Scalar, not yet weighted."""


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


class VQVAE(nn.Module):
    """Encoder, moving-average codebook and decoder of one :class:`ImageTokenizerConfig`."""

    def __init__(self, config: ImageTokenizerConfig, *, seed: int = 0) -> None:
        """Weights from torch's current generator; ``seed`` keys the codebook's own draws."""
        super().__init__()
        sizes = (config.downsampling_layers, config.hidden_size, config.code_dim)
        self.enc_b = Encoder(*sizes)
        self.quantize_t = MovingAverageQuantizer(
            config.code_dim,
            config.num_codes,
            decay=config.ema_decay,
            revive_dead_codes=config.revive_dead_codes,
            seed=seed,
        )
        self.dec = Decoder(*sizes)
        use_channels_last(self)

    def forward(self, pictures_BCSS: Tensor) -> VQVAEOutput:
        """Reconstruct pictures; the codebook does not change."""
        latents_BDHW = self.enc_b(pictures_BCSS.contiguous(memory_format=torch.channels_last))
        quantized = self.quantize_t.quantize(latents_BDHW)
        reconstruction = self.dec(quantized.latents_BDHW)
        return VQVAEOutput(reconstruction, latents_BDHW, quantized.codes_BHW, quantized.loss)

    @torch.no_grad()
    def encode(self, pictures_BCSS: Tensor) -> Tensor:
        """Codes ``[B, H, W]``, int64; a picture's codes do not depend on its batch.

        Convolutions round differently in different batches.  Pictures in which that could change
        the nearest code of any vector are encoded again, alone, so that every batch agrees.
        """
        # One layout and fresh memory: what the caller's tensor is a view of must not matter.
        pictures = pictures_BCSS.clone(memory_format=torch.channels_last)
        codebook_KD = self.quantize_t.embed.t().contiguous()
        latents_BDHW = self._latents(pictures)
        batch, _, height, width = latents_BDHW.shape
        vectors_ND = flatten_latents(latents_BDHW)
        found = nearest_code_with_margin(vectors_ND, codebook_KD)
        codes_BHW = found.indices_N.view(batch, height, width)
        if batch == 1:
            return codes_BHW
        longest_B1 = vectors_ND.norm(dim=1).view(batch, -1).amax(1, keepdim=True)
        # Moving a vector by e changes the margin by at most 2 |e| times the codes' distance, which
        # is at most the sum of their distances to the vector; twice that for the two batches.
        reach_BN = (found.distance_N.sqrt() + (found.distance_N + found.margin_N).sqrt()).view(
            batch, -1
        )
        doubt_BN = found.margin_N.view(batch, -1) <= 4 * _LATENT_ERROR * longest_B1 * reach_BN
        for index in torch.nonzero(doubt_BN.any(1)).flatten().tolist():
            alone = pictures[index : index + 1].clone(memory_format=torch.channels_last)
            vectors = flatten_latents(self._latents(alone))
            codes_BHW[index] = nearest_code(vectors, codebook_KD).view(height, width)
        return codes_BHW

    @torch.no_grad()
    def decode(self, codes_BHW: Tensor) -> Tensor:
        """Pictures ``[B, 3, S, S]`` in [-1, 1] of int64 codes; clamped, never stretched."""
        latents = self.quantize_t.lookup(codes_BHW)
        pictures: Tensor = self.dec(latents.contiguous(memory_format=torch.channels_last))
        return pictures.clamp_(-1.0, 1.0)

    def _latents(self, pictures_BCSS: Tensor) -> Tensor:
        """Encoder outputs in full fp32, whatever the caller's autocast says."""
        device = pictures_BCSS.device.type
        exact = torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        )
        with torch.autocast(device, enabled=False), exact:
            latents: Tensor = self.enc_b(pictures_BCSS.float())
        return latents


def use_channels_last(model: nn.Module) -> None:
    """Lay out the convolutions' weights as CPUs compute them fastest."""
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def to_float(pictures_BSSC: Tensor) -> Tensor:
    """uint8 ``[B, S, S, 3]`` -> fp32 ``[B, 3, S, S]`` in [-1, 1] (mean 0.5, deviation 0.5)."""
    return pictures_BSSC.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def to_uint8(pictures_BCSS: Tensor) -> Tensor:
    """The inverse of :func:`to_float`, clamped and rounded; contiguous ``[B, S, S, 3]``."""
    scaled = pictures_BCSS.float().clamp(-1.0, 1.0).add_(1.0).mul_(127.5).round_()
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
