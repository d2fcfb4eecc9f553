"""Checkpoint directories that are either whole or absent.

A checkpoint is written into a temporary directory, hashed, fsynced, described by a manifest and
renamed.  "Valid" means that the manifest verifies, never that a directory exists.
"""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_cogview.configs.errors import CheckpointError, DataError
from megatron_cogview.storage.atomic import fsync_directory
from megatron_cogview.storage.digest import (
    read_json_with_digest,
    sha256_file,
    write_json_with_digest,
)

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_TEMPORARY = ".incomplete"


def checkpoint_name(step: int) -> str:
    """Directory of the checkpoint after ``step`` steps."""
    return f"step_{step:08d}"


@contextmanager
def committing(root: Path, step: int, state: dict[str, Any], keep: int) -> Iterator[Path]:
    """Collect a checkpoint in a temporary directory and commit it at the end of the block.

    All ranks enter together and write their parts; rank 0 does the rest.

    Args:
        root: folder of a run's checkpoints.
        step: completed steps.
        state: JSON values kept in the manifest.
        keep: newest checkpoints to keep.

    Yields:
        The directory to write into.
    """
    final = root / checkpoint_name(step)
    temporary = root / (checkpoint_name(step) + _TEMPORARY)
    if dist.get_rank() == 0:
        root.mkdir(parents=True, exist_ok=True)
        for stale in root.glob(f"*{_TEMPORARY}"):
            shutil.rmtree(stale)
        temporary.mkdir()
    dist.barrier()
    yield temporary
    dist.barrier()
    if dist.get_rank() == 0:
        _commit(temporary, final, step, state)
        _retain(root, keep)
    dist.barrier()


def _files(directory: Path) -> list[Path]:
    return sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)


def _commit(temporary: Path, final: Path, step: int, state: dict[str, Any]) -> None:
    """Hash, fsync, rename."""
    files = {}
    for path in _files(temporary):
        with path.open("rb+") as f:
            os.fsync(f.fileno())
        files[str(path.relative_to(temporary))] = {
            "bytes": path.stat().st_size,
            "sha256": sha256_file(path),
        }
    write_json_with_digest(temporary / MANIFEST, {"step": step, "state": state, "files": files})
    fsync_directory(temporary)
    if final.exists():
        # A resumed run saves this step again; older checkpoints stand by until the rename.
        shutil.rmtree(final)
    os.replace(temporary, final)
    fsync_directory(final.parent)


def _retain(root: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints."""
    for old in _candidates(root)[keep:]:
        shutil.rmtree(old)


def _candidates(root: Path) -> list[Path]:
    """Checkpoint directories, newest first."""
    found = [p for p in root.glob("step_*") if p.is_dir() and not p.name.endswith(_TEMPORARY)]
    return sorted(found, reverse=True)


def verify(directory: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest and compare every file with it.

    Returns:
        The manifest.

    Raises:
        CheckpointError: naming the file that is missing or damaged.
    """
    try:
        manifest = read_json_with_digest(directory / MANIFEST)
    except (DataError, OSError) as error:
        raise CheckpointError(f"{directory}: manifest cannot be read: {error}") from error
    expected: dict[str, Any] = manifest["files"]
    actual = {str(p.relative_to(directory)): p for p in _files(directory)}
    # Files the manifest does not name, such as those a network file system leaves, do no harm.
    for name in sorted(expected):
        if name not in actual:
            raise CheckpointError(f"{directory / name}: missing")
        path = actual[name]
        if path.stat().st_size != expected[name]["bytes"]:
            raise CheckpointError(f"{path}: size differs from the manifest's")
        if sha256_file(path) != expected[name]["sha256"]:
            raise CheckpointError(f"{path}: content differs from the manifest's SHA-256")
    return manifest


def newest_valid(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that verifies, with its manifest; None when there are none.

    All ranks call it together; rank 0 looks.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged.
    """
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        answer[0] = _search(root)
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], CheckpointError):
        raise answer[0]
    return answer[0]  # type: ignore[no-any-return]


def _search(root: Path) -> tuple[Path, dict[str, Any]] | CheckpointError | None:
    candidates = _candidates(root)
    problems = []
    for directory in candidates:
        try:
            return directory, verify(directory)
        except CheckpointError as error:
            problems.append(str(error))
            logger.warning("checkpoint skipped, trying an older one: %s", error)
    if problems:
        return CheckpointError(f"{root}: no checkpoint is whole: " + "; ".join(problems))
    return None
