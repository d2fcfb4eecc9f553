"""Weights in the released VQ-VAE's layout, and a plain recomputation of its networks."""

import torch
from torch import Tensor
from torch.nn import functional


def released_weights(hidden: int, dim: int, codes: int, seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint with the released names and shapes (three stride-2 layers)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return 0.1 * torch.randn(*shape, generator=generator)

    weights = {}
    for part, first, last in (("enc_b", 3, dim), ("dec", dim, 3)):
        for index in (0, 2, 4):
            inputs = first if index == 0 else hidden
            shape = (hidden, inputs) if part == "enc_b" else (inputs, hidden)
            weights[f"{part}.blocks.{index}.weight"] = normal(*shape, 4, 4)
            weights[f"{part}.blocks.{index}.bias"] = normal(hidden)
        weights[f"{part}.blocks.6.weight"] = normal(last, hidden, 1, 1)
        weights[f"{part}.blocks.6.bias"] = normal(last)
    # Centred on the latents' bias, or most pictures would share few codes.
    weights["quantize_t.embed"] = 0.3 * normal(dim, codes) + weights["enc_b.blocks.6.bias"][:, None]
    weights["quantize_t.cluster_size"] = torch.ones(codes)
    weights["quantize_t.embed_avg"] = weights["quantize_t.embed"].clone()
    return weights


def plain_latents(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """Encoder outputs ``[B, D, H, W]`` of scaled pictures, in the weights' precision."""
    for index in (0, 2, 4):
        w, b = weights[f"enc_b.blocks.{index}.weight"], weights[f"enc_b.blocks.{index}.bias"]
        x = functional.conv2d(x, w, b, stride=2, padding=1).relu()
    return functional.conv2d(x, weights["enc_b.blocks.6.weight"], weights["enc_b.blocks.6.bias"])


def plain_decode(weights: dict[str, Tensor], codes: Tensor) -> Tensor:
    """Scaled pictures of codes ``[B, H, W]``."""
    x = weights["quantize_t.embed"].t()[codes].permute(0, 3, 1, 2)
    for index in (0, 2, 4):
        w, b = weights[f"dec.blocks.{index}.weight"], weights[f"dec.blocks.{index}.bias"]
        x = functional.conv_transpose2d(x, w, b, stride=2, padding=1).relu()
    return functional.conv2d(x, weights["dec.blocks.6.weight"], weights["dec.blocks.6.bias"])
