"""The part of a training state that is no sharded tensor, as JSON: steps, and a loss scale."""

import json
import math
from pathlib import Path
from typing import Any

from megatron_cogview.checkpoint.index import read_bytes
from megatron_cogview.configs.errors import CheckpointError

FILE = "common.json"
MAX_BYTES = 1 << 20
MOST_STEPS = 1 << 53
"""Adam counts them in a floating-point number."""


def write_common(folder: Path, values: dict[str, Any]) -> None:
    """Write ``common.json``."""
    text = json.dumps(values, indent=1, allow_nan=False)
    with (folder / FILE).open("x", encoding="utf-8") as file:
        file.write(text + "\n")


def read_common(folder: Path) -> dict[str, Any]:
    """Read ``common.json``.

    Raises:
        CheckpointError: it is missing, too large, not a JSON object, or holds what is no number of
            steps or no loss scale.
    """
    path = folder / FILE
    data = read_bytes(path, MAX_BYTES + 1)
    try:
        values = json.loads(data.decode("utf-8")) if len(data) <= MAX_BYTES else None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a JSON object of reasonable size")
    if "adam_step" in values and not _is_number(values["adam_step"], whole=True):
        raise CheckpointError(f"{path}: adam_step is no number of steps")
    scale = values.get("loss_scale")
    if scale is not None and not _is_scale(scale):
        raise CheckpointError(f"{path}: loss_scale is none")
    return values


def _is_scale(value: Any) -> bool:
    """Whether it is a positive scale and counters, as megatron-core's scaler keeps them."""
    if not isinstance(value, dict) or not _is_number(value.get("scale")) or value["scale"] <= 0:
        return False
    return all(_is_number(value[name], whole=True) for name in value if name != "scale")


def _is_number(value: Any, whole: bool = False) -> bool:
    kinds = (int,) if whole else (int, float)
    return type(value) in kinds and 0 <= value <= MOST_STEPS and math.isfinite(value)
