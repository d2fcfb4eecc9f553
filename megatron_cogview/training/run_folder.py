"""What a run was: its configuration, and for each start the command, versions, machines and commit.

``config.json`` holds every setting and restarts the run; ``versions.json`` is a list with one entry
for each time the run was started, oldest first.
"""

import datetime
import importlib.metadata
import json
import logging
import os
import platform
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megatron_cogview
from megatron_cogview.checkpoint.identity import differences
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.kernels.tuning import FIXED, VARIABLE, sizes_in_use
from megatron_cogview.parallel.topology import Topology
from megatron_cogview.storage.atomic import write_text

logger = logging.getLogger(__name__)

CONFIG, VERSIONS = "config.json", "versions.json"

_PACKAGES = ("torch", "numpy", "megatron-core", "triton", "transformer-engine", "sentencepiece")
_GIT_SECONDS = 30


def write(folder: Path, config: RunConfig, topology: Topology) -> None:
    """Write both files; all ranks call it together, and one writes.

    Raises:
        OSError: they cannot be written.
    """
    machines = _machines(topology)
    if not topology.is_main:
        return
    folder.mkdir(parents=True, exist_ok=True)
    start = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "working_directory": os.getcwd(),
        "changed_settings": _changes(folder / CONFIG, config),
        "source": source_of(Path(megatron_cogview.__file__).parent),
        "versions": versions(),
        **machines,
        "layout": {
            "world": topology.world_size,
            "tensor": topology.tensor_size,
            "pipeline": topology.pipeline_size,
            "data": topology.data_size,
        },
    }
    earlier = _earlier_starts(folder / VERSIONS)
    if earlier and set(earlier[-1].get("kernel_sizes", {FIXED})) != set(start["kernel_sizes"]):
        logger.warning(
            "kernels start with other sizes than at the last start (%s): results differ in the "
            "last bits",
            VARIABLE,
        )
    starts = [*earlier, start]
    write_text(folder / VERSIONS, json.dumps(starts, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / CONFIG, config.to_json())


def source_of(package: Path) -> dict[str, Any]:
    """The code that runs: package version, and commit if the package lies in a git checkout.

    ``dirty`` tells of changes to the package that the commit does not hold.  A package that is
    merely installed somewhere inside another project's checkout has no commit.
    """
    found: dict[str, Any] = {"version": megatron_cogview.__version__}
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return found
    commit = _git(package, "rev-parse", "HEAD")
    changes = _git(package, "status", "--porcelain", "--", ".")
    if commit is not None:
        found |= {"commit": commit, "dirty": None if changes is None else bool(changes)}
    return found


def _git(folder: Path, *words: str) -> str | None:
    """What git answers; None if it cannot."""
    # Looking at the state must not lock a checkout that somebody works in.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            ["git", *words],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=_GIT_SECONDS,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """What the run is computed with; a package that is not installed is left out."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        driver = Path("/proc/driver/nvidia/version")
        if driver.is_file():
            found["driver"] = driver.read_text(encoding="utf-8").splitlines()[0]
    return found


def _machines(topology: Topology) -> dict[str, Any]:
    """Hosts, devices and kernel sizes of all ranks, with the number of ranks of each.

    Raises:
        ConfigError: the file of kernel sizes cannot be used.
    """
    on_gpu = topology.device.type == "cuda"
    device = torch.cuda.get_device_name(topology.device) if on_gpu else "CPU"
    mine = (socket.gethostname(), device, torch.__version__, sizes_in_use())
    everyone: list[Any] = [mine] * topology.world_size
    if topology.world_size > 1:
        dist.all_gather_object(everyone, mine)
    hosts, devices, torches, sizes = (
        dict(sorted(Counter(c).items())) for c in zip(*everyone, strict=True)
    )
    named = {"devices": devices, "versions of torch": torches, "kernel sizes": sizes}
    for what, found in named.items():
        if len(found) > 1 and topology.is_main:
            logger.warning("the ranks have different %s: %s", what, found)
    return {"hosts": hosts, "devices": devices, "kernel_sizes": sizes}


def _earlier_starts(path: Path) -> list[dict[str, Any]]:
    """Entries of the starts before this one."""
    if not path.is_file():
        return []
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(starts, list):
            return starts
    except ValueError:
        pass
    aside = path.with_name(f"{path.name}.damaged")
    logger.warning("%s: no list of starts, so it is kept as %s", path, aside.name)
    os.replace(path, aside)
    return []


def _changes(path: Path, config: RunConfig) -> dict[str, list[Any]]:
    """Settings that differ from those of the last start, as ``[then, now]``."""
    try:
        then = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found = differences("", config.to_dict(), then)
    return {path: [theirs, mine] for path, mine, theirs in found}
