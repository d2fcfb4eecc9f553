"""Import of the VQ-VAE that CogView released: a bare state dict, on pixels scaled its own way.

Knows the file's layout; networks and files of ours are elsewhere.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_cogview.configs.errors import DataError
from megatron_cogview.configs.image_tokenizer import ImageTokenizerConfig
from megatron_cogview.tokenization.state_dict_file import read_state_dict
from megatron_cogview.tokenization.vq_model import VQModel, use_channels_last

_PREFIX = "module."
_ENCODER_WEIGHT = re.compile(r"enc_b\.blocks\.(\d+)\.weight")


def read_released_vqvae(path: Path, image_size: int = 256) -> tuple[VQModel, ImageTokenizerConfig]:
    """Read a checkpoint of the released layout; sizes follow from its shapes.

    Args:
        path: ``.pt`` for ``torch.load(weights_only=True)``, or ``.safetensors``; keys
            ``enc_b.blocks.*``, ``quantize_t.{embed,cluster_size,embed_avg}``, ``dec.blocks.*``, all
            or none of them behind ``module.``.
        image_size: side of the pictures, which the file does not say.

    Returns:
        the model, fp32, and its configuration.  It works on pixels scaled by ``pixels.RELEASED``.

    Raises:
        DataError: not such a file; names what is missing, unknown or of the wrong shape or type.
        ConfigError: ``image_size`` does not fit the number of layers.
    """
    weights = _without_prefix(path, read_state_dict(path))
    config = _config(path, weights, image_size)
    with torch.device("meta"):
        model = VQModel(config)
    expected = model.state_dict()
    if weights.keys() != expected.keys():
        raise DataError(
            f"{path}: not the released VQ-VAE; missing {sorted(expected.keys() - weights.keys())}, "
            f"unknown {sorted(weights.keys() - expected.keys())}"
        )
    for name, value in expected.items():
        _check(path, name, weights[name], value.shape)
    model.load_state_dict({name: weights[name].float() for name in expected}, assign=True)
    use_channels_last(model)
    return model, config


def _without_prefix(path: Path, weights: dict[str, Any]) -> dict[str, Any]:
    prefixed = [key for key in weights if key.startswith(_PREFIX)]
    if prefixed and len(prefixed) != len(weights):
        plain = sorted(weights.keys() - set(prefixed))
        raise DataError(f"{path}: some keys begin with {_PREFIX!r} and others do not: {plain[:3]}")
    return {key.removeprefix(_PREFIX): value for key, value in weights.items()}


def _config(path: Path, weights: dict[str, Any], image_size: int) -> ImageTokenizerConfig:
    """Sizes from the codebook and the encoder; the other shapes are checked against them."""
    layers = [int(found[1]) for key in weights if (found := _ENCODER_WEIGHT.fullmatch(key))]
    codebook = weights.get("quantize_t.embed")
    if len(layers) < 2 or not isinstance(codebook, Tensor) or codebook.dim() != 2:
        raise DataError(
            f"{path}: not the released VQ-VAE; it needs enc_b.blocks.*.weight and a matrix "
            f"quantize_t.embed, and has {sorted(weights)[:5]}"
        )
    last = weights[f"enc_b.blocks.{max(layers)}.weight"]
    if not isinstance(last, Tensor) or last.dim() != 4:
        raise DataError(f"{path}: enc_b.blocks.{max(layers)}.weight is not a convolution's weight")
    return ImageTokenizerConfig(
        image_size=image_size,
        downsampling_layers=len(layers) - 1,
        hidden_size=last.shape[1],
        code_dim=codebook.shape[0],
        num_codes=codebook.shape[1],
    )


def _check(path: Path, name: str, value: Any, shape: torch.Size) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise DataError(f"{path}: {name} is not a floating-point tensor")
    if value.shape != shape:
        raise DataError(f"{path}: {name} is {list(value.shape)}, expected {list(shape)}")
    if not bool(torch.isfinite(value).all()):
        raise DataError(f"{path}: {name} holds values that are not finite")
