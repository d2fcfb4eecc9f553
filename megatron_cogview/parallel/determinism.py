"""The same bits every time: what ``training.deterministic`` asks of torch, cuBLAS and NCCL.

On a CPU the same program computes the same bits already; there only torch's own switch is set.
Results still depend on the layout, on the devices and on the versions of all libraries.
"""

import logging
import os
from collections.abc import MutableMapping
from typing import Any

import torch
import torch.distributed as dist

from megatron_cogview.configs.errors import ConfigError, refuse

logger = logging.getLogger(__name__)

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_SETTINGS = (":4096:8", ":16:8")
"""Workspaces with which cuBLAS promises the same sums every time; the second is small and slow."""
NCCL = "NCCL_ALGO"
NCCL_SETTING = "^NVLS,NVLSTree"
"""Every algorithm but those that add up inside the switch, in the order of arrival."""


def make_deterministic(environment: MutableMapping[str, str] = os.environ) -> None:
    """Only operations that give the same bits every time; one that has no such form raises.

    Call it before the first CUDA operation and before the process groups are built, for cuBLAS and
    NCCL read their settings once.  An operation raises, where torch could warn, because a run that
    is told to repeat exactly must not go on otherwise, and because some kernels of torch choose
    their deterministic form only then.

    Args:
        environment: of this process; a setting that is missing is added.

    Raises:
        ConfigError: it comes too late, or the environment asks for the opposite.
    """
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory would show who reads it too early; it costs time and changes no result.
    memory: Any = torch.utils.deterministic
    memory.fill_uninitialized_memory = False
    if not torch.cuda.is_available():
        return
    if torch.cuda.is_initialized() or dist.is_initialized():
        raise ConfigError(
            "training.deterministic = True: make_deterministic must come before the first use of "
            "CUDA and before the process groups"
        )
    cublas = environment.setdefault(CUBLAS, CUBLAS_SETTINGS[0])
    if cublas not in CUBLAS_SETTINGS:
        raise _contradiction(CUBLAS, cublas, f"must be {' or '.join(CUBLAS_SETTINGS)}")
    nccl = environment.setdefault(NCCL, NCCL_SETTING)
    if "NVLS" in nccl and not nccl.startswith("^"):
        raise _contradiction(NCCL, nccl, f"must leave out NVLS, as {NCCL_SETTING} does")
    torch.backends.cudnn.deterministic = True
    # Which kernel wins a benchmark may change from run to run, and its sums with it.
    torch.backends.cudnn.benchmark = False
    # TF32 repeats its bits too, but depends on the device; here "fp32" shall mean fp32.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    logger.info("deterministic: %s = %s, %s = %s, no TF32", CUBLAS, cublas, NCCL, nccl)


def _contradiction(variable: str, value: str, why: str) -> ConfigError:
    """An environment that was set up for something else."""
    return refuse("training.deterministic", True, f"{variable} is {value!r}; it {why}, or be unset")
