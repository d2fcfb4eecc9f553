"""State dicts that others saved: read as plain tensors, without running anything in the file."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_cogview.configs.errors import DataError


def read_state_dict(path: Path) -> dict[str, Any]:
    """What the file holds by name; the values of a ``torch.save`` file may be anything plain.

    Args:
        path: ``.safetensors``, or a file for ``torch.load(weights_only=True)``.

    Raises:
        DataError: no such file, not readable as weights only, or not a dict with names.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        value = torch.load(path, map_location="cpu", weights_only=True)
    # Both raise nearly any type on a foreign file.
    except Exception as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: cannot be read as weights only ({line})") from None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise DataError(f"{path}: holds a {type(value).__name__}, not a state dict")
    return value
