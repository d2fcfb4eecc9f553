"""Checkpoints of the image tokenizer's training: one safetensors file each, no pickle.

A file holds weights, codebook, discriminator, Adam's moments and the step; order and random draws
follow from (seed, step), so this is all that an exact resume needs.  Knows nothing of data or logs.
"""

import json
import logging
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors_torch
from torch import Tensor, nn

from megatron_cogview.configs.errors import CheckpointError
from megatron_cogview.storage.atomic import write_bytes

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{9})\.safetensors")
_METADATA_KEY = "megatron_cogview.tokenizer_checkpoint"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_KEPT = 2


class Part(NamedTuple):
    """A network with its optimizer."""

    module: nn.Module
    optimizer: torch.optim.Adam


def save_checkpoint(folder: Path, parts: dict[str, Part], *, step: int, seconds: float) -> None:
    """Write the state after ``step`` steps and remove all but the two newest checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for part, (module, optimizer) in parts.items():
        tensors |= {f"{part}.{name}": value for name, value in module.state_dict().items()}
        for name, parameter in module.named_parameters():
            # A network that has not begun to learn has no moments.
            for moment, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{part}.adam.{moment}.{name}"] = value
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    about = json.dumps({"step": step, "seconds": seconds})
    path = folder / f"step-{step:09d}.safetensors"
    write_bytes(path, safetensors_torch.save(tensors, metadata={_METADATA_KEY: about}))
    for old in _checkpoints(folder)[:-_KEPT]:
        old.unlink()


def load_newest(folder: Path, parts: dict[str, Part]) -> tuple[int, float]:
    """Put the newest readable checkpoint into ``parts``.

    Returns:
        Steps done and seconds spent; (0, 0.0) without a checkpoint.

    Raises:
        CheckpointError: there are checkpoints, and none of them can be used.
    """
    paths = _checkpoints(folder)
    for path in reversed(paths):
        try:
            return _load(path, parts)
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
            logger.warning("%s: cannot be used (%s)", path, error)
    if paths:
        raise CheckpointError(f"{folder}: none of its {len(paths)} checkpoints can be used")
    return 0, 0.0


def _load(path: Path, parts: dict[str, Part]) -> tuple[int, float]:
    with safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {})[_METADATA_KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for part, (module, optimizer) in parts.items():
        # A parameter that has had no gradient yet (a codebook before its start) has no moments.
        moments = {
            name: {moment: tensors[f"{part}.adam.{moment}.{name}"] for moment in _MOMENTS}
            for name, _ in module.named_parameters()
            if f"{part}.adam.step.{name}" in tensors
        }
        module.load_state_dict(
            {name: tensors[f"{part}.{name}"] for name in module.state_dict()}, strict=True
        )
        _set_moments(module, optimizer, moments)
    return int(about["step"]), float(about["seconds"])


def _set_moments(
    module: nn.Module, optimizer: torch.optim.Adam, moments: dict[str, dict[str, Tensor]]
) -> None:
    for name, parameter in module.named_parameters():
        if name not in moments:
            continue
        state = optimizer.state[parameter]
        state["step"] = moments[name]["step"]
        for moment in ("exp_avg", "exp_avg_sq"):
            # In the parameter's own memory layout: another one may round differently.
            state[moment] = torch.empty_like(parameter, requires_grad=False).copy_(
                moments[name][moment]
            )


def _checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
