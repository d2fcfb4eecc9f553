"""Checkpoint directories that are either whole or absent.

Ranks write into a temporary directory; when all have, it gets an index and a manifest of hashes, is
flushed to the disk and renamed, and a pointer to it is written last.  "Valid" means that the
manifest verifies, never that a directory exists.
"""

import json
import logging
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_cogview.checkpoint.index import read_bytes
from megatron_cogview.configs.errors import CheckpointError
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
MAX_MANIFEST_BYTES = 1 << 26
MOST_STEPS = 1 << 53
SMALL_BYTES = 1 << 24
"""Files up to this size are hashed by every rank that will read them."""
TEMPORARY = ".incomplete"
_REPLACED = ".replaced"


def checkpoint_name(step: int) -> str:
    """Directory of the checkpoint after ``step`` steps."""
    return f"step_{step:08d}"


def prepare(root: Path, step: int) -> Path:
    """Make the directory in which the checkpoint of ``step`` is written, and clear away what killed
    processes left.

    No two have the same name: of two runs that write here by mistake, as after a queue that started
    a job again too early, the first one's save fails, and nothing is mixed.
    """
    if not root.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        for made in (root.parent, root.parent.parent):
            fsync_directory(made)
    # A network file system may keep a file that someone has open; that is no reason not to save.
    for stale in root.glob(f"*{TEMPORARY}"):
        shutil.rmtree(stale, ignore_errors=True)
    for aside in root.glob(f"*{_REPLACED}"):
        final = root / aside.name.removesuffix(_REPLACED)
        if final.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(aside, final)
    temporary = root / f"{checkpoint_name(step)}.{secrets.token_hex(4)}{TEMPORARY}"
    temporary.mkdir()
    return temporary


def commit(
    temporary: Path,
    step: int,
    state: Mapping[str, Any],
    files: Mapping[str, tuple[int, str]],
) -> Path:
    """Make a directory of :func:`prepare` a checkpoint.  Called by one process.

    Args:
        temporary: the directory.
        step: completed steps.
        state: JSON values kept in the manifest.
        files: bytes and SHA-256 of files whose writers have flushed them; others are hashed and
            flushed here.

    Returns:
        The checkpoint.

    Raises:
        OSError: the disk refuses, or a file is gone.
    """
    root = temporary.parent
    final = root / checkpoint_name(step)
    found, listed = _files(temporary), {}
    gone = set(files) - {path.name for path in found}
    if gone:
        raise OSError(f"{temporary}: {min(gone)} is not there any more")
    for path in found:
        name = str(path.relative_to(temporary))
        size, digest = files[name] if name in files else flushed(path)
        listed[name] = {"bytes": size, "sha256": digest}
    manifest = {"step": step, "state": dict(state), "files": listed}
    write_json_with_digest(temporary / MANIFEST, manifest)
    fsync_directory(temporary)
    aside = root / (final.name + _REPLACED)
    if final.exists():
        # A resumed run saves this step again; the first one stands aside until the second is there.
        os.rename(final, aside)
    try:
        os.rename(temporary, final)
    except OSError:
        if aside.exists():
            os.rename(aside, final)
        raise
    try:
        fsync_directory(root)
    except OSError as error:
        # It is there and whole; only a power cut could still undo the renaming.
        logger.warning("%s: not flushed: %s", root, error)
    try:
        write_text(root / POINTER, final.name + "\n")
    except OSError as error:
        # It is for people; the checkpoint is there.
        logger.warning("%s: not updated: %s", root / POINTER, error)
    if aside.exists():
        shutil.rmtree(aside, ignore_errors=True)
    return final


def flushed(path: Path) -> tuple[int, str]:
    """Put a file on the disk; gives its bytes and SHA-256."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return path.stat().st_size, sha256_file(path)


def discard(temporary: Path) -> None:
    """Remove what there is of a checkpoint that is not to be."""
    shutil.rmtree(temporary, ignore_errors=True)


def retain(
    root: Path,
    keep: int,
    keep_every: int = 0,
    newest: int = MOST_STEPS,
    hold: int | None = None,
) -> list[Path]:
    """Keep the newest ``keep`` checkpoints, those of multiples of ``keep_every``, and the newest of
    no more than ``hold`` steps.

    The others are renamed, so that nobody finds them; gives them, for :func:`remove`.

    Those of more than ``newest`` steps do not count and stay: a run that goes on from an older one
    has found them damaged.
    """
    known = [p for p in _candidates(root) if _step_of(p) <= newest and (p / MANIFEST).is_file()]
    held = [] if hold is None else [p for p in known if _step_of(p) <= hold][:1]
    old = [p for p in known[keep:] if not (keep_every and _step_of(p) % keep_every == 0)]
    return [_taken_out(directory) for directory in old if directory not in held]


def _taken_out(directory: Path) -> Path:
    # A removal that is interrupted must not leave half a checkpoint under a good name.
    doomed = directory.with_name(directory.name + TEMPORARY)
    os.rename(directory, doomed)
    return doomed


def remove(directories: Sequence[Path]) -> None:
    """Remove them, as far as the disk lets us; the next save tries again."""
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


def remove_newer(root: Path, step: int, unreadable_to: int) -> None:
    """Let the checkpoint of ``step`` be the newest.  All ranks call it together.

    Later ones are removed; those up to ``unreadable_to`` steps, which could not be read now but may
    be sound all the same, lose their names only.

    Raises:
        CheckpointError: the disk refuses.
    """
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            newer = [p for p in _candidates(root) if _step_of(p) > step]
            for directory in newer:
                if _step_of(directory) <= unreadable_to:
                    aside = directory.with_name(
                        f"{directory.name}.{secrets.token_hex(4)}.unreadable"
                    )
                    os.rename(directory, aside)
            remove([_taken_out(p) for p in newer if _step_of(p) > unreadable_to])
            write_text(root / POINTER, checkpoint_name(step) + "\n")
        except OSError as error:
            problem[0] = str(error)
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise CheckpointError(f"{root}: newer checkpoints cannot be removed: {problem[0]}")


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
    path = directory / MANIFEST
    # Not a pipe, no link, and of a size that can be looked at.
    if len(read_bytes(path, MAX_MANIFEST_BYTES + 1)) > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{path}: larger than any manifest")
    try:
        manifest = read_json_with_digest(path)
    # One that carries its digest may still be anything.
    except (ValueError, TypeError, LookupError, OSError, RecursionError) as error:
        raise CheckpointError(f"{directory}: manifest cannot be read: {error}") from error
    files, step = manifest.get("files"), manifest.get("step")
    if not isinstance(files, dict) or type(step) is not int or not 0 <= step < MOST_STEPS:
        raise CheckpointError(f"{path}: names no files or no step")
    if not isinstance(manifest.get("state"), dict):
        raise CheckpointError(f"{path}: says nothing about the run")
    for name, about in files.items():
        # Nor one of a folder inside it, which could be a link.
        if name in ("", "..") or name != Path(name).name:
            raise CheckpointError(f"{path}: {name!r} is no file of its folder")
        if not isinstance(about, dict) or type(about.get("bytes")) is not int:
            raise CheckpointError(f"{path}: {name!r} has no size")
        if not isinstance(about.get("sha256"), str):
            raise CheckpointError(f"{path}: {name!r} has no hash")
    return manifest


def check_file(directory: Path, name: str, about: Mapping[str, Any]) -> None:
    """Compare one file with what the manifest says of it.

    Raises:
        CheckpointError: it is missing, a link, or damaged.
    """
    path = directory / name
    try:
        # A link leads to what this manifest does not answer for.
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{path}: missing")
        if path.stat().st_size != about["bytes"]:
            raise CheckpointError(f"{path}: size differs from the manifest's")
        digest = sha256_file(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
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

    All ranks call it together, each hashes a share of the large files and all small ones; or one
    process without ranks.

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
        if _rank_and_size()[0] == 0:
            logger.warning("checkpoint skipped, trying an older one: %s", problem)
    if problems:
        raise CheckpointError(f"{root}: no checkpoint is whole: " + "; ".join(problems))
    return None


def _names(root: Path, before: int | None) -> list[str]:
    return [p.name for p in _candidates(root) if before is None or _step_of(p) < before]


def _rank_and_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _agreed(mine: Sequence[str]) -> list[str]:
    """What rank 0 sees."""
    box = [list(mine)]
    if _rank_and_size()[1] > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def _verified_together(directory: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The manifest, and what is wrong with the checkpoint as far as any rank can see."""
    manifest, problem = None, None
    try:
        manifest = read_manifest(directory)
        if manifest["step"] != _step_of(directory):
            raise CheckpointError(f"{directory}: holds the checkpoint of step {manifest['step']}")
        files = manifest["files"]
        # By size, so that the few large files go to different ranks.
        names = sorted(files, key=lambda name: (-files[name]["bytes"], name))
        large = [name for name in names if files[name]["bytes"] > SMALL_BYTES]
        rank, size = _rank_and_size()
        for name in [*large[rank::size], *names[len(large) :]]:
            check_file(directory, name, files[name])
    except (CheckpointError, OSError, ValueError) as error:
        problem = str(error)
    mine = (problem, json.dumps(manifest, sort_keys=True))
    everyone: list[tuple[str | None, str]] = [mine] * _rank_and_size()[1]
    if len(everyone) > 1:
        dist.all_gather_object(everyone, mine)
    problem = next((each for each, _ in everyone if each is not None), None)
    if problem is None and len({seen for _, seen in everyone}) > 1:
        # A network file system may show one machine what was there before.
        problem = f"{directory}: the ranks see different manifests"
    return manifest, problem
