"""What a measured figure must carry to be compared with another: hardware, versions, commit."""

import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_cogview.training.run_folder import source_of


def machine(device: torch.device) -> dict[str, Any]:
    """Plain values about this process and the device it measures."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "commit": _commit(),
    }


def _processor() -> str:
    """The CPU's name; Linux does not tell it through ``platform``."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "CPU"


def _commit() -> str | None:
    """Of the checkout this file is in, ``-dirty`` if changed; None for an installed package."""
    source = source_of(Path(__file__).parents[1])
    if "commit" not in source:
        return None
    return source["commit"][:12] + ("-dirty" if source["dirty"] else "")
