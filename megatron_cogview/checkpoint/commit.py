"""Checkpoint directories that are either whole or absent.

Ranks write into a temporary directory; when all have, it gets an index and a manifest of hashes, is
flushed to the disk and renamed, and a pointer to it is written last.  "Valid" means that the
manifest verifies, never that a directory exists.
"""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_cogview.configs.errors import CheckpointError, DataError
from megatron_cogview.storage.atomic import fsync_directory, write_text
from megatron_cogview.storage.digest import (
    read_json_with_digest,
    sha256_file,
    write_json_with_digest,
)

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
POINTER = "latest"
"""A file with the name of the newest checkpoint, for people and scripts; loading looks itself."""
_TEMPORARY = ".incomplete"
_REPLACED = ".replaced"


def checkpoint_name(step: int) -> str:
    """Directory of the checkpoint after ``step`` steps."""
    return f"step_{step:08d}"


def temporary_directory(root: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is written."""
    return root / (checkpoint_name(step) + _TEMPORARY)


def prepare(root: Path, step: int) -> None:
    """Make the temporary directory, and clear away what killed processes left."""
    root.mkdir(parents=True, exist_ok=True)
    for stale in root.glob(f"*{_TEMPORARY}"):
        shutil.rmtree(stale)
    for aside in root.glob(f"*{_REPLACED}"):
        final = root / aside.name.removesuffix(_REPLACED)
        if final.exists():
            shutil.rmtree(aside)
        else:
            os.rename(aside, final)
    temporary_directory(root, step).mkdir()


def commit(
    root: Path,
    step: int,
    state: Mapping[str, Any],
    files: Mapping[str, tuple[int, str]],
) -> Path:
    """Make the temporary directory of ``step`` a checkpoint.  Called by one process.

    Args:
        root: folder of a run's checkpoints.
        step: completed steps.
        state: JSON values kept in the manifest.
        files: bytes and SHA-256 of files whose writers have flushed them; others are hashed and
            flushed here.

    Returns:
        The checkpoint.
    """
    temporary, final = temporary_directory(root, step), root / checkpoint_name(step)
    listed = {}
    for path in _files(temporary):
        name = str(path.relative_to(temporary))
        size, digest = files[name] if name in files else _flushed(path)
        listed[name] = {"bytes": size, "sha256": digest}
    manifest = {"step": step, "state": dict(state), "files": listed}
    write_json_with_digest(temporary / MANIFEST, manifest)
    fsync_directory(temporary)
    aside = root / (final.name + _REPLACED)
    if final.exists():
        # A resumed run saves this step again; the first one stands aside until the second is there.
        os.rename(final, aside)
    os.rename(temporary, final)
    fsync_directory(root)
    write_text(root / POINTER, final.name + "\n")
    if aside.exists():
        shutil.rmtree(aside, ignore_errors=True)
    return final


def _flushed(path: Path) -> tuple[int, str]:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return path.stat().st_size, sha256_file(path)


def discard(root: Path, step: int) -> None:
    """Remove what there is of a checkpoint that is not to be."""
    shutil.rmtree(temporary_directory(root, step), ignore_errors=True)


def retain(root: Path, keep: int, keep_every: int = 0) -> None:
    """Remove all but the newest ``keep`` checkpoints and those of multiples of ``keep_every``."""
    for old in [p for p in _candidates(root) if (p / MANIFEST).is_file()][keep:]:
        if not (keep_every and _step_of(old) % keep_every == 0):
            _remove(old)


def _remove(directory: Path) -> None:
    # A removal that is interrupted must not leave half a checkpoint under a good name.
    doomed = directory.with_name(directory.name + _TEMPORARY)
    os.rename(directory, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_newer(root: Path, step: int) -> None:
    """Remove checkpoints of more than ``step`` steps.  All ranks call it together."""
    if dist.get_rank() == 0:
        for directory in _candidates(root):
            if _step_of(directory) > step:
                _remove(directory)
        write_text(root / POINTER, checkpoint_name(step) + "\n")
    dist.barrier()


def _files(directory: Path) -> list[Path]:
    return sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)


def _candidates(root: Path) -> list[Path]:
    """Checkpoint directories, newest first; one that stands aside comes after its successor."""
    found = [p for p in root.glob("step_*") if p.is_dir() and _step_of(p) >= 0]
    return sorted(found, key=lambda p: (-_step_of(p), len(p.name)))


def _step_of(directory: Path) -> int:
    """Steps of a checkpoint by its name; -1 when the name is none of ours."""
    digits = directory.name.removeprefix("step_").removesuffix(_REPLACED)
    return int(digits) if digits.isdecimal() else -1


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, whose own digest holds.

    Raises:
        CheckpointError: it is missing, damaged, or names files outside of the folder.
    """
    try:
        manifest = read_json_with_digest(directory / MANIFEST)
    except (DataError, OSError) as error:
        raise CheckpointError(f"{directory}: manifest cannot be read: {error}") from error
    files = manifest.get("files")
    if not isinstance(files, dict) or not isinstance(manifest.get("step"), int):
        raise CheckpointError(f"{directory / MANIFEST}: names no files or no step")
    for name, about in files.items():
        parts = Path(name).parts
        if Path(name).is_absolute() or ".." in parts or not parts:
            raise CheckpointError(f"{directory / MANIFEST}: {name!r} is no file of its folder")
        if not isinstance(about, dict) or {"bytes", "sha256"} - set(about):
            raise CheckpointError(f"{directory / MANIFEST}: {name!r} has no size or no hash")
    return manifest


def check_file(directory: Path, name: str, about: Mapping[str, Any]) -> None:
    """Compare one file with what the manifest says of it.

    Raises:
        CheckpointError: it is missing, a link, or damaged.
    """
    path = directory / name
    # A link leads to what this manifest does not answer for.
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{path}: missing")
    if path.stat().st_size != about["bytes"]:
        raise CheckpointError(f"{path}: size differs from the manifest's")
    try:
        digest = sha256_file(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if digest != about["sha256"]:
        raise CheckpointError(f"{path}: content differs from the manifest's SHA-256")


def verify(directory: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest and compare every file with it.

    Files the manifest does not name, such as those a network file system leaves, do no harm.

    Returns:
        The manifest.

    Raises:
        CheckpointError: naming the file that is missing or damaged.
    """
    manifest = read_manifest(directory)
    for name in sorted(manifest["files"]):
        check_file(directory, name, manifest["files"][name])
    return manifest


def newest_valid(root: Path, before: int | None = None) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that verifies, with its manifest; None when there are none.

    All ranks call it together; each hashes a share of the files.

    Args:
        root: folder of a run's checkpoints.
        before: look only at checkpoints of fewer steps.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged.
    """
    problems: list[str] = []
    for name in _agreed(_names(root, before)):
        directory = root / name
        manifest, problem = _verified_together(directory)
        if problem is None:
            assert manifest is not None
            return directory, manifest
        problems.append(problem)
        if dist.get_rank() == 0:
            logger.warning("checkpoint skipped, trying an older one: %s", problem)
    if problems:
        raise CheckpointError(f"{root}: no checkpoint is whole: " + "; ".join(problems))
    return None


def _names(root: Path, before: int | None) -> list[str]:
    return [p.name for p in _candidates(root) if before is None or _step_of(p) < before]


def _agreed(mine: Sequence[str]) -> list[str]:
    """What rank 0 sees."""
    box = [list(mine)]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _verified_together(directory: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The manifest, and what is wrong with the checkpoint as far as any rank can see."""
    manifest, problem = None, None
    try:
        manifest = read_manifest(directory)
        names = sorted(manifest["files"])
        # By size, so that the few large files go to different ranks.
        names.sort(key=lambda name: -int(manifest["files"][name]["bytes"]))
        for name in names[dist.get_rank() :: dist.get_world_size()]:
            check_file(directory, name, manifest["files"][name])
    except (CheckpointError, OSError, ValueError) as error:
        problem = str(error)
    everyone: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, problem)
    return manifest, next((each for each in everyone if each is not None), None)
