"""Tile sizes and warps that were measured on a GPU, in the place of the fixed ones.

Kernels start with fixed sizes unless the environment variable :data:`VARIABLE` names a file, which
``tools/tune_kernels.py`` writes.  Nothing is tuned while a model runs: ranks of a job that read one
file start their kernels alike.  Each start of a run records the sizes (``training/run_folder.py``).
"""

import contextlib
import functools
import json
import logging
import os
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megatron_cogview.configs.errors import ConfigError

logger = logging.getLogger(__name__)

VARIABLE = "MEGATRON_COGVIEW_KERNEL_SIZES"
FIXED = "fixed"
"""Said where no measured sizes are in use."""
Sizes = tuple[int, ...]
_MOST = 1024


class Trial:
    """What the tuner asks for, and what it learns: the file does not count."""

    def __init__(self) -> None:
        self.asked: dict[str, Sizes] = {}
        """Fixed sizes of every kernel that was started."""
        self.sizes: dict[str, Sizes] = {}
        """Sizes to start a kernel with; others keep their fixed ones."""


_trial: Trial | None = None


def tuned(kernel: str, fixed: Sizes) -> Sizes:
    """The sizes to start a kernel with: those of the file if it has some, else ``fixed``.

    Args:
        kernel: name of the kernel and of what its best sizes depend on.
        fixed: their meaning is the kernel's.

    Raises:
        ConfigError: the file cannot be used, or has something else for this kernel.
    """
    if _trial is not None:
        _trial.asked[kernel] = fixed
        return _trial.sizes.get(kernel, fixed)
    found = measured_sizes().get(kernel, fixed)
    if len(found) != len(fixed):
        raise ConfigError(
            f"{VARIABLE}: {kernel} has {list(found)}, expected {len(fixed)} numbers; "
            "tune again with tools/tune_kernels.py"
        )
    return found


@contextlib.contextmanager
def trial() -> Iterator[Trial]:
    """Start kernels as the tuner says, in all threads."""
    global _trial
    _trial = Trial()
    try:
        yield _trial
    finally:
        _trial = None


@functools.cache
def measured_sizes() -> Mapping[str, Sizes]:
    """What the file holds, read once; nothing without one, or if it is for another machine."""
    name = os.environ.get(VARIABLE)
    if not name:
        return {}
    content = read_sizes(Path(name))
    here = made_for()
    for field, value in here.items():
        if content[field] != value:
            logger.warning(
                "%s=%s was measured with %s %s, and this is %s: fixed sizes are used; "
                "tools/tune_kernels.py measures this one",
                *(VARIABLE, name, field, content[field], value),
            )
            return {}
    logger.info("kernel sizes: %d measured ones from %s", len(content["sizes"]), name)
    return {kernel: tuple(sizes) for kernel, sizes in content["sizes"].items()}


def sizes_in_use() -> str:
    """For what is reported beside figures: ``fixed``, or the measured sizes."""
    table = measured_sizes()
    return json.dumps(table, sort_keys=True) if table else FIXED


def made_for() -> dict[str, str]:
    """What sizes depend on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    try:
        return {"gpu": gpu, "triton": version("triton")}
    except PackageNotFoundError:
        return {"gpu": gpu, "triton": "absent"}


def read_sizes(path: Path) -> dict[str, Any]:
    """A file of sizes.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{VARIABLE}: {path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("sizes"), dict):
        raise ConfigError(
            f'{VARIABLE}: {path} has no table "sizes"; tools/tune_kernels.py writes it'
        )
    for field in ("gpu", "triton"):
        if not isinstance(content.get(field), str):
            raise ConfigError(f'{VARIABLE}: {path} does not say its "{field}"')
    for kernel, sizes in content["sizes"].items():
        numbers = isinstance(sizes, list) and all(type(n) is int and 0 < n <= _MOST for n in sizes)
        if not numbers:
            raise ConfigError(
                f"{VARIABLE}: {path}: {kernel} = {sizes!r} must be whole numbers from 1 to {_MOST}"
            )
    return content
