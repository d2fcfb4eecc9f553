"""Which implementation of an operation runs: chosen by name, said once, never changed silently.

``reference`` is PyTorch, obvious and slow, and right on every device.  ``triton`` needs Triton and
a GPU, or Triton's interpreter (``TRITON_INTERPRET=1``), which tests use.  ``auto`` takes Triton on
a GPU that it is made for and the reference elsewhere.
"""

import functools
import importlib.util
import logging
import os
from typing import Literal

import torch

from megatron_cogview.configs.errors import ConfigError

logger = logging.getLogger(__name__)

Wanted = Literal["auto", "reference", "triton"]
Implementation = Literal["reference", "triton"]

LEAST_CAPABILITY = (8, 0)
"""The kernels use bf16 and asynchronous copies, which came with it."""


def is_interpreted() -> bool:
    """Whether Triton was asked to run kernels on the CPU, step by step."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_problem(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on a device; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if is_interpreted():
        return None
    if device.type != "cuda":
        return f"a {device.type} device has no Triton, except under TRITON_INTERPRET=1"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        return f"the GPU has compute capability {'.'.join(map(str, capability))}, below {least}"
    return None


# So that a function torch.compile traces may ask: the answer never changes within a process.
@torch.compiler.assume_constant_result
def choose(operation: str, wanted: Wanted, device: torch.device) -> Implementation:
    """The implementation of an operation on a device; logs the choice the first time.

    Args:
        operation: name of the operation, for the log and the error.
        wanted: what the configuration asks for.
        device: where its tensors lie.

    Raises:
        ConfigError: Triton is asked for by name and cannot run.
    """
    return _choose(operation, wanted, device.type, device.index or 0)


@functools.cache
def _choose(operation: str, wanted: Wanted, kind: str, index: int) -> Implementation:
    device = torch.device(kind, index)
    problem = triton_problem(device)
    if wanted == "triton" and problem is not None:
        raise ConfigError(
            f"{operation}: triton was asked for, and {problem}; choose auto or reference"
        )
    # The interpreter is for tests, which ask for it by name.
    takes_triton = problem is None and not (wanted == "auto" and is_interpreted())
    if wanted == "reference" or not takes_triton:
        chosen: Implementation = "reference"
        why = "as asked for" if wanted == "reference" else problem or "the interpreter is for tests"
    else:
        chosen, why = "triton", "as asked for" if wanted == "triton" else f"on {kind}"
    logger.info("%s: %s (%s)", operation, chosen, why)
    return chosen
