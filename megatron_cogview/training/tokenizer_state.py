"""Checkpoints of the image tokenizer's training: one safetensors file each, no pickle.

A file holds weights, codebook, Adam's moments and the step; order and random draws follow from
(seed, step), so this is all that an exact resume needs.  Knows nothing of data or logs.
"""

import json
import logging
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors_torch
from torch import nn

from megatron_cogview.configs.errors import CheckpointError
from megatron_cogview.storage.atomic import write_bytes

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{9})\.safetensors")
_METADATA_KEY = "megatron_cogview.tokenizer_checkpoint"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_KEPT = 2


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Adam, *, step: int, seconds: float
) -> None:
    """Write the state after ``step`` steps and remove all but the two newest checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for moment in _MOMENTS:
            tensors[f"adam.{moment}.{name}"] = optimizer.state[parameter][moment]
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    about = json.dumps({"step": step, "seconds": seconds})
    path = folder / f"step-{step:09d}.safetensors"
    write_bytes(path, safetensors_torch.save(tensors, metadata={_METADATA_KEY: about}))
    for old in _checkpoints(folder)[:-_KEPT]:
        old.unlink()


def load_newest(folder: Path, model: nn.Module, optimizer: torch.optim.Adam) -> tuple[int, float]:
    """Put the newest readable checkpoint into ``model`` and ``optimizer``.

    Returns:
        Steps done and seconds spent; (0, 0.0) without a checkpoint.

    Raises:
        CheckpointError: there are checkpoints, and none of them can be used.
    """
    paths = _checkpoints(folder)
    for path in reversed(paths):
        try:
            return _load(path, model, optimizer)
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
            logger.warning("%s: cannot be used (%s)", path, error)
    if paths:
        raise CheckpointError(f"{folder}: none of its {len(paths)} checkpoints can be used")
    return 0, 0.0


def _load(path: Path, model: nn.Module, optimizer: torch.optim.Adam) -> tuple[int, float]:
    with safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {})[_METADATA_KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    moments = {
        name: {moment: tensors[f"adam.{moment}.{name}"] for moment in _MOMENTS}
        for name, _ in model.named_parameters()
    }
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    model.load_state_dict(weights)
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        state["step"] = moments[name]["step"]
        for moment in ("exp_avg", "exp_avg_sq"):
            # In the parameter's own memory layout: another one may round differently.
            state[moment] = torch.empty_like(parameter, requires_grad=False).copy_(
                moments[name][moment]
            )
    return int(about["step"]), float(about["seconds"])


def _checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
