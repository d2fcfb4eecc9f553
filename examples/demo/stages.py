"""Runs commands one after another, and skips what is done: the demo's only machinery.

A stage is a few ordinary commands with the files they read and write.  It is skipped while its
stamp (``RUN/.stages/NAME.json``: a hash over commands, contents of inputs, the package's version
and the presets' values) holds and its outputs exist.  Knows nothing of what the commands do.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from processes import Child, end_leftovers, peak_of

from megatron_cogview import __version__
from megatron_cogview.storage.atomic import write_text
from megatron_cogview.storage.digest import sha256_file

ROOT = Path(__file__).resolve().parents[2]
NOTE_SECONDS = 3.0
"""Between two notes of a running stage's time and processes, for a run that is killed."""


class StageError(Exception):
    """A stage that cannot run or has failed."""


@dataclass(frozen=True)
class Command:
    """One command as a user would type it after ``python`` or ``torchrun``."""

    arguments: tuple[str, ...]
    processes: int = 1
    """More than one are started by torchrun."""

    def typed(self) -> str:
        """For the screen and the stamp."""
        head = ["python"]
        if self.processes > 1:
            head = ["torchrun", "--standalone", "--nproc-per-node", str(self.processes)]
        return shlex.join([*head, *self.arguments])

    def argv(self) -> list[str]:
        """The same, in the environment that runs this program."""
        if self.processes == 1:
            return [sys.executable, *self.arguments]
        options = ["--standalone", "--nproc-per-node", str(self.processes)]
        return [sys.executable, "-m", "torch.distributed.run", *options, *self.arguments]

    def environment(self) -> dict[str, str]:
        """The cores, shared out evenly; output as it comes."""
        cores = len(os.sched_getaffinity(0))
        threads = str(max(1, cores // self.processes))
        return {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Stage:
    """Commands that belong together."""

    name: str
    commands: tuple[Command, ...]
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]
    """Files or folders that belong to this stage alone; removed when its inputs change."""


@dataclass
class Runner:
    """Runs stages into one folder, which the caller has locked."""

    folder: Path
    settings: str = ""
    """Values that decide the results and are not in the commands."""
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Stamps of the stages so far, in order."""

    def __post_init__(self) -> None:
        self.notes = self.folder / ".stages"
        self.notes.mkdir(parents=True, exist_ok=True)
        self.hashes = FileHashes(self.notes / "hashes.json")

    def run(self, stage: Stage) -> None:
        """Run or skip one stage.

        Raises:
            StageError: an input is missing, an output is foreign, or a command failed.
        """
        key = self._key(stage)
        stamp = self._read(stage)
        whole = all(path.exists() for path in stage.outputs)
        if stamp.get("key") == key and stamp.get("finished") and whole:
            print(f"== {stage.name}: nothing changed, skipped", flush=True)
            self.done[stage.name] = stamp
            return
        if end_leftovers(stamp.get("processes", [])):
            print(f"== {stage.name}: ended what a killed run had left running", flush=True)
        account = self._prepare(stage, stamp, key)
        stamp = {"key": key, "finished": False, "seconds": 0.0, "peak_rss_bytes": 0, **account}
        print(f"== {stage.name}", flush=True)
        log = self.notes / f"{stage.name}.log"
        log.unlink(missing_ok=True)
        for command in stage.commands:
            self._run_command(stage, command, stamp, log)
        absent = [path for path in stage.outputs if not path.exists()]
        if absent:
            raise StageError(f"stage {stage.name} ended well, but wrote no {absent[0]}; see {log}")
        stamp |= {"finished": True, "processes": []}
        self._write(stage, stamp)
        self.done[stage.name] = stamp

    def _prepare(self, stage: Stage, stamp: dict[str, Any], key: str) -> dict[str, Any]:
        """Clear outputs made from other inputs; time and memory already spent on these inputs."""
        there = [path for path in stage.outputs if path.exists()]
        if stamp.get("key") == key:
            names = () if stamp["finished"] else ("seconds", "peak_rss_bytes")
            return {name: stamp[name] for name in names}
        if there and not stamp:
            raise StageError(
                f"{there[0]} was not made by this program; remove it or choose another --output"
            )
        for path in there:
            print(f"== {stage.name}: inputs changed, removing {path}", flush=True)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return {}

    def _run_command(
        self, stage: Stage, command: Command, stamp: dict[str, Any], log: Path
    ) -> None:
        """Run one command to its end, keeping the stamp's account of time and memory."""
        print(f"$ {command.typed()}", flush=True)
        before, started, noted = float(stamp["seconds"]), time.monotonic(), 0.0
        with Child(command.argv(), ROOT, command.environment(), log) as child:
            while True:
                code = child.wait(0.2)
                now = time.monotonic()
                stamp["seconds"] = before + now - started
                stamp["peak_rss_bytes"] = max(stamp["peak_rss_bytes"], peak_of(child))
                if now - noted >= NOTE_SECONDS or code is not None:
                    noted, stamp["processes"] = now, child.identities()
                    self._write(stage, stamp)
                if code is not None:
                    break
        if code:
            what = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise StageError(
                f"stage {stage.name} failed with {what}; its output is in {log}; "
                "the same command goes on from here"
            )

    def _key(self, stage: Stage) -> str:
        """What the outputs depend on, as one hash."""
        missing = [path for path in stage.inputs if not path.exists()]
        if missing:
            raise StageError(f"stage {stage.name}: no {missing[0]}")
        digest = hashlib.sha256()
        digest.update(f"{__version__}\n{self.settings}\n".encode())
        for command in stage.commands:
            digest.update(f"{command.typed()}\n".encode())
        for path in stage.inputs:
            for name, value in self.hashes.of(path):
                digest.update(f"{name}\0{value}\n".encode())
        self.hashes.save()
        return digest.hexdigest()

    def _read(self, stage: Stage) -> dict[str, Any]:
        path = self.notes / f"{stage.name}.json"
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise StageError(f"{path}: damaged ({error}); remove {self.folder}") from error
        return dict(value)

    def _write(self, stage: Stage, stamp: dict[str, Any]) -> None:
        write_text(self.notes / f"{stage.name}.json", json.dumps(stamp) + "\n")


class FileHashes:
    """SHA-256 of files; a file with the same size and time is not read again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.known: dict[str, list[Any]] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.known = {}

    def of(self, path: Path) -> list[tuple[str, str]]:
        """Names (within ``path``) and hashes of a file or of all files of a folder.

        Hidden files are left out: those are temporary files and notes.
        """
        if path.is_file():
            return [(path.name, self._hash(path))]
        files = [
            file
            for file in sorted(path.rglob("*"))
            if file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        return [(str(file.relative_to(path)), self._hash(file)) for file in files]

    def save(self) -> None:
        """Keep them for the next run."""
        write_text(self.path, json.dumps(self.known) + "\n")

    def _hash(self, path: Path) -> str:
        status = path.stat()
        mark = [status.st_size, status.st_mtime_ns]
        known = self.known.get(str(path))
        if known is None or known[:2] != mark:
            known = self.known[str(path)] = [*mark, sha256_file(path)]
        return str(known[2])


def shown(path: Path) -> str:
    """A path as typed in the repository's root, where the commands run."""
    relative = os.path.relpath(path, ROOT)
    return str(path.resolve()) if relative.startswith(f"..{os.sep}..") else relative
