"""An image tokenizer's networks around its codebook: pictures to codes and back.

Encoder and decoder are the paper's VQ-VAE or a VQGAN's.  With the former the state dict has the
released checkpoint's keys (``enc_b.*``, ``quantize_t.*``, ``dec.*``).  Pictures are float, channels
first, scaled by a :class:`PixelScaling`.  Knows nothing of files or of training.

Shapes: B pictures, C = 3 channels, S side in pixels, D code width, H x W code grid.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_cogview.configs.image_tokenizer import ImageTokenizerConfig
from megatron_cogview.kernels.codebook_lookup.reference import (
    nearest_code,
    nearest_code_with_margin,
)
from megatron_cogview.tokenization import vqgan, vqvae
from megatron_cogview.tokenization.quantizer import (
    Place,
    build_quantizer,
    flatten_latents,
    pass_by,
)

# fp32 networks at different batch sizes were seen to differ by up to 3e-6 of the latents' length;
# a decision that an error of this share could change is taken again on the picture alone.
_LATENT_ERROR = 1e-5
# Pictures with as many values fill a CPU's cores one by one, and its caches better than a batch.
_LARGE_PICTURE = 3 * 256 * 256


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

    @torch.no_grad()
    def encode_bf16(self, pictures_BCSS: Tensor) -> Tensor:
        """Codes ``[B, H, W]`` by a bf16 encoder: fast, but near-ties fall differently from fp32
        and from one batch size to another.

        The first convolution, whose pixels bf16 would round, and the last, whose outputs are the
        latents, stay fp32; they are a few hundredths of the arithmetic.
        """
        blocks = self.enc_b.blocks if isinstance(self.enc_b, vqvae.Encoder) else self.enc_b
        assert isinstance(blocks, nn.Sequential)
        device = pictures_BCSS.device.type
        with torch.autocast(device, enabled=False):
            hidden = blocks[0](pictures_BCSS.contiguous(memory_format=torch.channels_last))
        with torch.autocast(device, torch.bfloat16):
            hidden = blocks[1:-1](hidden)
        with torch.autocast(device, enabled=False):
            latents_BDHW = blocks[-1](hidden.float())
        codes_N = nearest_code(flatten_latents(latents_BDHW), self.quantize_t.embed.t())
        batch, _, height, width = latents_BDHW.shape
        return codes_N.view(batch, height, width)

    @torch.no_grad()
    def encode(self, pictures_BCSS: Tensor) -> Tensor:
        """Codes ``[B, H, W]``, int64; a picture's codes do not depend on its batch.

        Convolutions round differently in different batches.  Pictures in which that could change
        the nearest code of any vector are encoded again, alone, so that every batch agrees.  Large
        pictures on a CPU are encoded alone from the start, which is faster there anyway.
        """
        codebook_KD = self.quantize_t.embed.t().contiguous()
        large = pictures_BCSS[:1].numel() >= _LARGE_PICTURE
        if len(pictures_BCSS) > 1 and large and pictures_BCSS.device.type == "cpu":
            return torch.cat([self._encode_alone(p[None], codebook_KD) for p in pictures_BCSS])
        # One layout and fresh memory: what the caller's tensor is a view of must not matter.
        pictures = pictures_BCSS.clone(memory_format=torch.channels_last)
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
            alone = self._encode_alone(pictures[index : index + 1], codebook_KD)
            codes_BHW[index] = alone[0]
        return codes_BHW

    def _encode_alone(self, picture_1CSS: Tensor, codebook_KD: Tensor) -> Tensor:
        latents_1DHW = self._latents(picture_1CSS.clone(memory_format=torch.channels_last))
        codes_N = nearest_code(flatten_latents(latents_1DHW), codebook_KD)
        return codes_N.view(1, *latents_1DHW.shape[2:])

    @torch.no_grad()
    def decode(self, codes_BHW: Tensor) -> Tensor:
        """Scaled pictures ``[B, 3, S, S]`` of int64 codes, not clamped."""
        latents = self.quantize_t.lookup(codes_BHW)
        pictures: Tensor = self.dec(latents.contiguous(memory_format=torch.channels_last))
        return pictures

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
