"""Checkpoints of the image tokenizer's training: one safetensors file each, no pickle.

A file holds weights, codebook, discriminator, Adam's moments, the step, and how often each code has
been used since the last log line; order and random draws follow from (seed, step), so this is all
that an exact resume needs.  Knows nothing of data or logs.
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
from megatron_cogview.training.world import World

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{9})\.safetensors")
_METADATA_KEY = "megatron_cogview.tokenizer_checkpoint"
_CODE_COUNTS = "code_counts"
_UNUSABLE = (SafetensorError, OSError, KeyError, ValueError, RuntimeError)
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_KEPT = 2


class Part(NamedTuple):
    """A network with its optimizer."""

    module: nn.Module
    optimizer: torch.optim.Adam


class Progress(NamedTuple):
    """Where a run stands."""

    step: int
    """Steps done."""
    seconds: float
    """Time spent."""
    code_counts: Tensor
    """``[K]``: uses of each code since the last log line, over all processes."""


def save_checkpoint(folder: Path, parts: dict[str, Part], progress: Progress) -> None:
    """Write the state and remove all but the two newest checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {_CODE_COUNTS: progress.code_counts}
    for part, (module, optimizer) in parts.items():
        tensors |= {f"{part}.{name}": value for name, value in module.state_dict().items()}
        for name, parameter in module.named_parameters():
            # A network that has not begun to learn has no moments.
            for moment, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{part}.adam.{moment}.{name}"] = value
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    about = json.dumps({"step": progress.step, "seconds": progress.seconds})
    path = folder / f"step-{progress.step:09d}.safetensors"
    write_bytes(path, safetensors_torch.save(tensors, metadata={_METADATA_KEY: about}))
    for old in _checkpoints(folder)[:-_KEPT]:
        old.unlink()


def resume(folder: Path, parts: dict[str, Part], world: World) -> Progress | None:
    """Put the newest checkpoint that the first process can read into ``parts``, on every process.

    Returns:
        Where the run stood, the codes' counts on the first process alone; None without a
        checkpoint.

    Raises:
        CheckpointError: there are checkpoints, and the first process can use none of them, or
            another process not the one that it has chosen.
    """
    chosen, progress = _load_newest(folder, parts) if world.rank == 0 else (None, None)
    # The first process decides for all: each by itself might begin at another step.
    name, found = world.from_rank_0((chosen and chosen.name, len(_checkpoints(folder))))
    if name is None:
        if found:
            raise CheckpointError(f"{folder}: none of its {found} checkpoints can be used")
        return None
    if world.rank > 0:
        try:
            progress = _load(folder / name, parts)
        except _UNUSABLE as error:
            raise CheckpointError(
                f"{folder / name}: process {world.rank} cannot use the checkpoint that process 0 "
                f"goes on from ({error}); all processes must see the same files"
            ) from error
        progress.code_counts.zero_()
    return progress


def _load_newest(folder: Path, parts: dict[str, Part]) -> tuple[Path | None, Progress | None]:
    for path in reversed(_checkpoints(folder)):
        try:
            return path, _load(path, parts)
        except _UNUSABLE as error:
            logger.warning("%s: cannot be used (%s)", path, error)
    return None, None


def _load(path: Path, parts: dict[str, Part]) -> Progress:
    with safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {})[_METADATA_KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    progress = Progress(int(about["step"]), float(about["seconds"]), tensors[_CODE_COUNTS])
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
    return progress


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
