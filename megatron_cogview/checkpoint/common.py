"""The part of a training state that is no sharded tensor, as JSON: steps, and a loss scale."""

import json
from pathlib import Path
from typing import Any

from megatron_cogview.configs.errors import CheckpointError

FILE = "common.json"
MAX_BYTES = 1 << 20


def write_common(folder: Path, values: dict[str, Any]) -> None:
    """Write ``common.json``."""
    text = json.dumps(values, indent=1, allow_nan=False)
    with (folder / FILE).open("x", encoding="utf-8") as file:
        file.write(text + "\n")


def read_common(folder: Path) -> dict[str, Any]:
    """Read ``common.json``.

    Raises:
        CheckpointError: it is missing, too large, or not a JSON object.
    """
    path = folder / FILE
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        values = json.loads(data) if len(data) <= MAX_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a JSON object of reasonable size")
    return values
