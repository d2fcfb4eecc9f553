"""Pictures to codes and back for everyone else: the protocol, and trained tokenizers as files.

A tokenizer is one safetensors file: weights, and the configuration as JSON in its metadata.  Knows
nothing of training.
"""

import dataclasses
import json
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors_torch
from torch import Tensor

from megatron_cogview.configs.errors import ConfigError, DataError
from megatron_cogview.configs.image_tokenizer import ImageTokenizerConfig
from megatron_cogview.storage.atomic import write_bytes
from megatron_cogview.storage.digest import sha256_file
from megatron_cogview.tokenization.pixels import OURS, SCALINGS, PixelScaling
from megatron_cogview.tokenization.vq_model import VQModel, use_channels_last

METADATA_KEY = "megatron_cogview.image_tokenizer"
"""The one metadata entry: ``{"config": {...}, "pixels": "name of a PixelScaling"}``.

One entry only: the order of several is not fixed, and the fingerprint covers every byte.
"""


@runtime_checkable
class ImageTokenizer(Protocol):
    """Square RGB pictures <-> grids of codes."""

    @property
    def config(self) -> ImageTokenizerConfig:
        """Sizes: picture side, grid side, number of codes."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's file, lower-case hex; shards record it."""

    @property
    def encoder_precision(self) -> Literal["fp32", "bf16"]:
        """What decides codes; shards record it."""

    def encode(self, images_NHWC: Tensor) -> Tensor:
        """uint8 ``[N, side, side, 3]`` -> int64 codes ``[N, grid, grid]`` on the CPU."""

    def decode(self, codes_NHW: Tensor) -> Tensor:
        """Integer codes ``[N, grid, grid]`` in [0, num_codes) -> uint8 ``[N, side, side, 3]``."""


class VQTokenizer:
    """:class:`ImageTokenizer` by a trained :class:`VQModel`.

    ``model`` and ``pixels``, the networks and the scaling they want, are there for studies.
    """

    def __init__(
        self,
        model: VQModel,
        config: ImageTokenizerConfig,
        fingerprint: str,
        pixels: PixelScaling = OURS,
        encoder_precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        """See :func:`load_image_tokenizer`."""
        self.model = model
        self._config = config
        self._fingerprint = fingerprint
        self.pixels = pixels
        self._encoder_precision: Literal["fp32", "bf16"] = encoder_precision
        bf16 = encoder_precision == "bf16"
        self._encode_pass = self.model.encode_bf16 if bf16 else self.model.encode

    @property
    def config(self) -> ImageTokenizerConfig:
        """Sizes: picture side, grid side, number of codes."""
        return self._config

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's file."""
        return self._fingerprint

    @property
    def encoder_precision(self) -> Literal["fp32", "bf16"]:
        """What decides codes."""
        return self._encoder_precision

    def encode(self, images_NHWC: Tensor) -> Tensor:
        """Codes of pictures; those of one do not depend on the others.

        Args:
            images_NHWC: uint8 ``[N, side, side, 3]``, RGB, ``side = config.image_size``.

        Returns:
            int64 ``[N, grid, grid]`` on the CPU, ``grid = config.codes_per_side``.

        Raises:
            DataError: another shape or dtype.
        """
        side, grid = self._config.image_size, self._config.codes_per_side
        if images_NHWC.dtype != torch.uint8 or tuple(images_NHWC.shape[1:]) != (side, side, 3):
            raise DataError(
                f"pictures to encode: expected uint8 [N, {side}, {side}, 3], got "
                f"{images_NHWC.dtype} {list(images_NHWC.shape)}; resize them to "
                f"image_tokenizer.image_size = {side}"
            )
        if images_NHWC.shape[0] == 0:
            return torch.empty((0, grid, grid), dtype=torch.int64)
        passes = torch.split(images_NHWC, self.model.pictures_per_pass)
        scaled = (self.pixels.to_float(part.to(self._device)) for part in passes)
        return torch.cat([self._encode_pass(part).cpu() for part in scaled])

    def decode(self, codes_NHW: Tensor) -> Tensor:
        """Pictures of codes.

        Args:
            codes_NHW: integers ``[N, grid, grid]`` in [0, ``config.num_codes``).

        Returns:
            uint8 ``[N, side, side, 3]`` on the CPU; the network's output is clamped, not stretched.

        Raises:
            DataError: another shape or dtype, or a code outside the codebook.
        """
        side, grid, codes = (
            self._config.image_size,
            self._config.codes_per_side,
            self._config.num_codes,
        )
        integers = (torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64)
        if codes_NHW.dtype not in integers or tuple(codes_NHW.shape[1:]) != (grid, grid):
            raise DataError(
                f"codes to decode: expected integers [N, {grid}, {grid}], got "
                f"{codes_NHW.dtype} {list(codes_NHW.shape)}"
            )
        if codes_NHW.shape[0] == 0:
            return torch.empty((0, side, side, 3), dtype=torch.uint8)
        codes_NHW = codes_NHW.long()
        low, high = int(codes_NHW.min()), int(codes_NHW.max())
        if low < 0 or high >= codes:
            raise DataError(
                f"codes to decode: values {low}..{high} are outside the codebook, 0..{codes - 1}; "
                "pass image codes without the vocabulary's offset"
            )
        passes = torch.split(codes_NHW, self.model.pictures_per_pass)
        pictures = (self.model.decode(part.to(self._device)) for part in passes)
        return torch.cat([self.pixels.to_uint8(part).cpu() for part in pictures])

    @property
    def _device(self) -> torch.device:
        return self.model.quantize_t.embed.device


def save_image_tokenizer(
    model: VQModel, config: ImageTokenizerConfig, path: Path, pixels: PixelScaling = OURS
) -> None:
    """Write weights and configuration to ``path``; the file appears whole or not at all."""
    tensors = {
        name: value.detach().to("cpu", torch.float32).contiguous()
        for name, value in model.state_dict().items()
    }
    about = {"config": dataclasses.asdict(config), "pixels": pixels.name}
    text = json.dumps(about, sort_keys=True)
    write_bytes(path, safetensors_torch.save(tensors, metadata={METADATA_KEY: text}))


def load_image_tokenizer(
    path: Path, device: str = "cpu", encoder_precision: Literal["fp32", "bf16"] = "fp32"
) -> VQTokenizer:
    """Read what :func:`save_image_tokenizer` wrote.

    Args:
        path: the file.
        device: where the networks run.
        encoder_precision: ``bf16`` is faster on GPUs, but near-ties fall differently; shards are
            made with ``fp32``.

    Raises:
        DataError: no such file, not a safetensors file, no configuration inside, or weights that
            do not fit that configuration.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such image tokenizer; train one with train-tokenizer")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: not a readable safetensors file ({error})") from None
    config, pixels = _about(path, metadata)
    with torch.device("meta"):
        model = VQModel(config)
    _check_tensors(path, tensors, model.state_dict())
    model.load_state_dict(tensors, assign=True)
    use_channels_last(model.to(device).eval().requires_grad_(False))
    return VQTokenizer(model, config, sha256_file(path), pixels, encoder_precision)


def _about(path: Path, metadata: dict[str, str]) -> tuple[ImageTokenizerConfig, PixelScaling]:
    if METADATA_KEY not in metadata:
        raise DataError(
            f"{path}: has no {METADATA_KEY!r} in its metadata; it is not an image tokenizer of "
            "this package"
        )
    try:
        about = json.loads(metadata[METADATA_KEY])
        config = ImageTokenizerConfig.from_dict(about["config"])
        pixels = about["pixels"]
    except (ValueError, TypeError, KeyError, ConfigError) as error:
        raise DataError(f"{path}: its configuration cannot be used ({error})") from None
    if pixels not in SCALINGS:
        raise DataError(f"{path}: pixel scaling {pixels!r} is none of {sorted(SCALINGS)}")
    return config, SCALINGS[pixels]


def _check_tensors(path: Path, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Names, shapes and types must be exactly those of the configuration."""
    if found.keys() != expected.keys():
        raise DataError(
            f"{path}: weights do not fit its configuration; missing "
            f"{sorted(expected.keys() - found.keys())}, unknown {sorted(found.keys() - expected)}"
        )
    for name, value in expected.items():
        if found[name].shape != value.shape or found[name].dtype != torch.float32:
            raise DataError(
                f"{path}: {name} is {found[name].dtype} {list(found[name].shape)}, expected "
                f"float32 {list(value.shape)}"
            )
