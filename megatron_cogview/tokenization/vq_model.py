"""An image tokenizer's networks around its codebook: pictures to codes and back.

Encoder and decoder are the paper's VQ-VAE or a VQGAN's.  With the former the state dict has the
released checkpoint's keys (``enc_b.*``, ``quantize_t.*``, ``dec.*``).  Pictures are float, channels
first, scaled by a :class:`PixelScaling`.  Knows nothing of files or of training.

Shapes: B pictures, C = 3 channels, S side in pixels, D code width, H x W code grid.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_cogview.configs.image_tokenizer import ImageTokenizerConfig
from megatron_cogview.kernels.codebook_lookup.operator import nearest_code
from megatron_cogview.tokenization import vqgan, vqvae
from megatron_cogview.tokenization.exactness import exact
from megatron_cogview.tokenization.quantizer import (
    Place,
    build_quantizer,
    flatten_latents,
    pass_by,
)

# Pictures of a pass have at most so many activations of one layer, in bytes; a network needs some
# seven times that.  On a CPU more would not fit the caches.
_PASS_BYTES, _PASS_BYTES_ON_CPU = 2 << 30, 8 << 20
# A single picture costs a whole pass, too.
_MOST_PICTURES, _MOST_PICTURES_ON_CPU = 64, 8


class VQModelOutput(NamedTuple):
    """One training pass."""

    reconstruction_BCSS: Tensor
    """Decoder output, fp32, not clamped."""
    latents_BDHW: Tensor
    """Encoder output, before the codebook, fp32."""
    codes_BHW: Tensor
    """int64."""
    commitment: Tensor
    """Scalar, not yet weighted."""
    codebook_loss: Tensor
    """Scalar of weight 1."""


class VQModel(nn.Module):
    """Encoder, codebook and decoder of one :class:`ImageTokenizerConfig`."""

    def __init__(self, config: ImageTokenizerConfig, *, seed: int = 0) -> None:
        """Weights from torch's current generator; ``seed`` keys the codebook's own draws."""
        super().__init__()
        network = vqgan if config.kind == "vqgan" else vqvae
        self._activation_bytes = _largest_activation(config)
        self.enc_b: nn.Module = network.build_encoder(config)
        self.quantize_t = build_quantizer(config, seed=seed)
        self.dec: nn.Module = network.build_decoder(config)
        use_channels_last(self)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the decoder's last convolution."""
        convolutions = [m for m in self.dec.modules() if isinstance(m, nn.Conv2d)]
        return convolutions[-1].weight

    def forward(
        self,
        pictures_BCSS: Tensor,
        place: Place | None = None,
        *,
        bf16: bool = False,
        through_codes: bool = True,
    ) -> VQModelOutput:
        """Reconstruct pictures; the codebook does not change.

        Args:
            pictures_BCSS: scaled as the model was trained.
            place: where in the training this pass stands; see :meth:`Quantizer.quantize`.
            bf16: run the networks in bf16; codebook and outputs are fp32 in any case.
            through_codes: give the decoder codes; else it sees the latents, nothing is lost to the
                codebook, and the quantiser's losses are 0.
        """
        device = pictures_BCSS.device.type
        pictures_BCSS = pictures_BCSS.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            latents_BDHW = self.enc_b(pictures_BCSS)
        with torch.autocast(device, enabled=False):
            latents_BDHW = latents_BDHW.float()
            if through_codes:
                quantized = self.quantize_t.quantize(latents_BDHW, place)
            else:
                quantized = pass_by(latents_BDHW)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            reconstruction_BCSS = self.dec(quantized.latents_BDHW)
        return VQModelOutput(
            reconstruction_BCSS.float(),
            latents_BDHW,
            quantized.codes_BHW,
            quantized.commitment,
            quantized.codebook_loss,
        )

    @property
    def pictures_per_pass(self) -> int:
        """Pictures that :meth:`encode` and :meth:`decode` send through the networks at a time.

        A power of two that follows from the configuration and the device, not from the batch.
        """
        room, most = _PASS_BYTES, _MOST_PICTURES
        if self.quantize_t.embed.device.type == "cpu":
            threads = torch.get_num_threads()
            # Group normalisation deals out all positions of a pass evenly to the threads.  With 3
            # of them a picture and its neighbour would be cut, and so rounded, differently.
            most = _MOST_PICTURES_ON_CPU if threads & (threads - 1) == 0 else 1
            room = _PASS_BYTES_ON_CPU
        number = max(1, min(most, room // self._activation_bytes))
        return 1 << (number.bit_length() - 1)

    @torch.no_grad()
    def encode(self, pictures_BCSS: Tensor) -> Tensor:
        """Codes ``[B, H, W]``, int64; a picture's codes do not depend on its batch.

        Networks round differently in batches of different sizes, so that every pass has one size.
        """
        parts = [
            self._nearest(self._latents(padded)[:number])
            for padded, number in self._passes(pictures_BCSS)
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def encode_bf16(self, pictures_BCSS: Tensor) -> Tensor:
        """Codes ``[B, H, W]`` by a bf16 encoder: fast, but near-ties fall differently from fp32.

        The first convolution, whose pixels bf16 would round, and the last, whose outputs are the
        latents, stay fp32; they are a few hundredths of the arithmetic.
        """
        parts = [
            self._nearest(self._latents_bf16(padded)[:number])
            for padded, number in self._passes(pictures_BCSS)
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def decode(self, codes_BHW: Tensor) -> Tensor:
        """Scaled pictures ``[B, 3, S, S]`` of int64 codes, not clamped."""
        parts = []
        for padded, number in self._passes(codes_BHW):
            latents = self.quantize_t.lookup(padded).contiguous(memory_format=torch.channels_last)
            parts.append(self.dec(latents)[:number])
        return torch.cat(parts)

    def _passes(self, batch: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Parts of one size, the last filled up with zeros, and how many of each count."""
        size = self.pictures_per_pass
        for part in torch.split(batch, size):
            padded = part.new_zeros((size, *part.shape[1:]))
            padded[: len(part)] = part
            yield padded, len(part)

    def _nearest(self, latents_BDHW: Tensor) -> Tensor:
        batch, _, height, width = latents_BDHW.shape
        codes_N = nearest_code(flatten_latents(latents_BDHW), self.quantize_t.embed.t())
        return codes_N.view(batch, height, width)

    def _latents(self, pictures_BCSS: Tensor) -> Tensor:
        """Encoder outputs in full fp32, whatever the caller's autocast says."""
        pictures = pictures_BCSS.float().contiguous(memory_format=torch.channels_last)
        with exact(pictures.device), torch.autocast(pictures.device.type, enabled=False):
            latents: Tensor = self.enc_b(pictures)
        return latents

    def _latents_bf16(self, pictures_BCSS: Tensor) -> Tensor:
        blocks = self.enc_b.blocks if isinstance(self.enc_b, vqvae.Encoder) else self.enc_b
        assert isinstance(blocks, nn.Sequential)
        pictures = pictures_BCSS.float().contiguous(memory_format=torch.channels_last)
        device = pictures.device
        with exact(device), torch.autocast(device.type, enabled=False):
            hidden = blocks[0](pictures)
            with torch.autocast(device.type, torch.bfloat16):
                hidden = blocks[1:-1](hidden)
            latents: Tensor = blocks[-1](hidden.float())
        return latents


def _largest_activation(config: ImageTokenizerConfig) -> int:
    """fp32 bytes of the widest layer's output, of one picture."""
    multipliers = config.vqgan.multipliers if config.kind == "vqgan" else (1, 1)
    # On the way up a resolution begins with the coarser one's width.
    per_level = [
        max(multipliers[level : level + 2]) * (config.image_size >> level) ** 2
        for level in range(len(multipliers))
    ]
    return 4 * config.hidden_size * max(per_level)


def use_channels_last(model: nn.Module) -> None:
    """Lay out the convolutions' weights as CPUs compute them fastest."""
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
