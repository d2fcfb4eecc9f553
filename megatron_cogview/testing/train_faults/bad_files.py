"""Checkpoints with flipped bits, and checkpoints that someone made to do harm.

A flipped bit must be seen before anything is loaded.  A hostile checkpoint, whose hashes are
right, must be refused or read, and must do nothing else: start no process, open nothing for
writing and nothing outside its folder, import nothing, and take little time and memory.
"""

import codecs
import os
import pickle
import resource
import shutil
import struct
import time
from collections import Counter
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from megatron_cogview.checkpoint import commit
from megatron_cogview.checkpoint.index import FILE as INDEX
from megatron_cogview.checkpoint.reader import CheckpointReader
from megatron_cogview.checkpoint.scalars import FILE as COMMON
from megatron_cogview.checkpoint.scalars import read_common
from megatron_cogview.configs.errors import CheckpointError
from megatron_cogview.configs.parallel import ParallelConfig
from megatron_cogview.storage.digest import sha256_file, write_json_with_digest
from megatron_cogview.testing.audit import Audit
from megatron_cogview.testing.data_faults import journal
from megatron_cogview.testing.toy_run import toy_config, write_tokens
from megatron_cogview.testing.train_faults.runs import Run, committed
from megatron_cogview.training.checkpoints import CHECKPOINTS

FLIPS_PER_TRIAL, CASES_PER_TRIAL = 20, 100
MOST_CPU_SECONDS = 5.0
MOST_MEMORY_BYTES = 1 << 29

_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_FORBIDDEN = {
    *("os.system", "subprocess.Popen", "os.exec", "os.fork", "os.posix_spawn", "socket.connect"),
    *("pickle.find_class", "exec", "compile", "import", "os.remove", "os.rename", "os.mkdir"),
    *("os.symlink", "os.link", "os.truncate", "os.rmdir", "os.chmod", "ctypes.dlopen"),
}


def toy_checkpoint(folder: Path) -> Path:
    """The checkpoint of two ranks after two steps, with the optimizer in pieces."""
    write_tokens(folder / "tokens")
    layout = ParallelConfig(distributed_optimizer=True)
    config = toy_config(
        folder / "tokens", folder / "run", layout, steps=2, save_every=2, validate_every=2
    )
    with Run(config, 2) as run:
        run.to_the_end()
    name = commit.checkpoint_name(committed(folder / "run"))
    return folder / "run" / CHECKPOINTS / name


class FlipCampaign:
    """A trial flips some bits, one after the other, of files drawn by their size and by turns."""

    def __init__(self, folder: Path) -> None:
        """Train the toy run."""
        self._source = toy_checkpoint(folder)
        commit.verify(self._source)
        self._files = sorted(p.name for p in self._source.iterdir())

    def trial(self, number: int) -> dict[str, Any]:
        """One trial; the same number flips the same bits."""
        rng = np.random.default_rng([number, 37])
        sizes = np.array([(self._source / name).stat().st_size for name in self._files], float)
        missed, seen = [], Counter[str]()
        for flip in range(FLIPS_PER_TRIAL):
            # Else the small files would hardly ever be hit.
            weights = sizes / sizes.sum() if flip % 2 else None
            name = str(rng.choice(self._files, p=weights))
            path, bit = self._source / name, 0
            with path.open("rb+") as file:
                bit = int(rng.integers(path.stat().st_size * 8))
                self._flip(file, bit)
                file.flush()
                try:
                    commit.verify(self._source)
                    missed.append([name, bit])
                except CheckpointError:
                    seen[name] += 1
                self._flip(file, bit)
        commit.verify(self._source)
        line = {"trial": number, "kind": "flip", "flips": FLIPS_PER_TRIAL, "seen": dict(seen)}
        return {**line, "missed": missed, "ok": not missed}

    @staticmethod
    def _flip(file: Any, bit: int) -> None:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


class HostileCampaign:
    """A trial reads some mutations of a checkpoint in a process of its own."""

    def __init__(self, folder: Path) -> None:
        """Train the toy run."""
        self._folder, self._source = folder, toy_checkpoint(folder)
        # What an archive's names may be written in; loaded on demand, which would look like harm.
        codecs.lookup("cp437")

    def trial(self, number: int) -> dict[str, Any]:
        """One trial; the same number draws the same mutations."""
        context = get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=self._run, args=(number, sender))
        child.start()
        sender.close()
        last: dict[str, Any] = {}
        try:
            # A case announces itself, so that one that kills its process is known.
            while receiver.poll(60):
                last = receiver.recv()
        except EOFError:
            pass
        child.kill() if not last.get("done") else None
        child.join()
        ok = bool(last.get("done")) and not last["findings"] and child.exitcode == 0
        line = {"trial": number, "kind": "hostile", "cases": CASES_PER_TRIAL, **last}
        return {**line, "exit_code": child.exitcode, "ok": ok}

    def _run(self, number: int, sender: Any) -> None:
        torch.set_num_threads(1)
        journal.after_fork()
        findings: list[str] = []
        outcomes = Counter[str]()
        before, slowest = _peak(), 0.0
        with TemporaryDirectory(dir=self._folder) as name:
            target = Path(name) / self._source.name
            watch = Audit(_Judge(target))
            for case in range(CASES_PER_TRIAL):
                rng = np.random.default_rng([number, case, 41])
                shutil.copytree(self._source, target)
                kind = mutate(target, rng)
                sender.send({"case": case, "mutation": kind, "findings": findings})
                begin = time.process_time()
                with watch:
                    outcome = read_all(target)
                seconds = time.process_time() - begin
                slowest = max(slowest, seconds)
                seen = watch.take() + ([outcome] if outcome not in ("read", "refused") else [])
                seen += [f"{seconds:.1f} s"] if seconds > MOST_CPU_SECONDS else []
                findings += [f"case {case} ({kind}): {each}" for each in seen]
                outcomes[f"{kind} {outcome}"] += 1
                shutil.rmtree(target)
        grown = _peak() - before
        if grown > MOST_MEMORY_BYTES:
            findings.append(f"memory grew by {grown} bytes")
        figures = {"slowest_s": round(slowest, 2), "memory_bytes": grown}
        sender.send({"done": True, "findings": findings, "outcomes": dict(outcomes), **figures})
        sender.close()


def read_all(folder: Path) -> str:
    """Verify a checkpoint and read all that a run would read; ``read``, ``refused`` or an error."""
    try:
        commit.verify(folder)
        read_common(folder)
        reader = CheckpointReader(folder)
        for key in reader.index:
            reader.whole(key)
    except CheckpointError:
        return "refused"
    except Exception as error:  # What the campaign looks for.
        return f"{type(error).__name__}: {error}"[:300]
    return "read"


def mutate(folder: Path, rng: np.random.Generator) -> str:
    """Change one file of a checkpoint and make the hashes right; gives the kind of change."""
    blobs = sorted(p.name for p in folder.glob("*.distcp"))
    file = [INDEX, INDEX, str(rng.choice(blobs)), COMMON][int(rng.integers(4))]
    path = folder / file
    data, manifest = path.read_bytes(), commit.read_manifest(folder)
    kind = str(rng.choice(["bytes", "cut", "grow", "number", "splice", "text"]))
    if file == INDEX and rng.random() < 0.3:
        kind = "payload"
        data = _payload(data, folder.parent / "ran", rng)
    else:
        data = _changed(data, kind, rng)
    path.write_bytes(data)
    manifest["files"][file] = {"bytes": len(data), "sha256": sha256_file(path)}
    if rng.random() < 0.1:
        kind += " and manifest"
        names = ["../x", "/etc/passwd", "a\0b", "absent", ""]
        changes: list[Any] = [{"step": -1}, {"state": 3}, {"files": []}, {"step": 1e300}]
        changes += [{"files": manifest["files"] | {name: {"bytes": 0}}} for name in names]
        manifest |= changes[int(rng.integers(len(changes)))]
    write_json_with_digest(folder / commit.MANIFEST, manifest)
    return f"{'blob' if file in blobs else file}: {kind}"


def _changed(data: bytes, kind: str, rng: np.random.Generator) -> bytes:
    """One structured change at a random place."""
    at = int(rng.integers(len(data)))
    changed = bytearray(data)
    if kind == "bytes":
        for _ in range(int(rng.integers(1, 8))):
            changed[int(rng.integers(len(data)))] = int(rng.integers(256))
    elif kind == "cut":
        del changed[at : at + int(rng.integers(1, 64))]
    elif kind == "grow":
        changed[at:at] = bytes(rng.integers(0, 256, int(rng.integers(1, 64)), dtype=np.uint8))
    elif kind == "number":
        # Sizes and positions as pickles and archives write them, at their extremes.
        number = int(rng.choice([0, 1, (1 << 31) - 1, (1 << 32) - 1, (1 << 62)]))
        encoded = struct.pack("<Q", number)[: int(rng.choice([1, 2, 4, 8]))]
        changed[at : at + len(encoded)] = encoded
    elif kind == "splice":
        start = int(rng.integers(len(data)))
        changed[at : at + 64] = data[start : start + int(rng.integers(1, 200))]
    else:
        words = [b"NaN", b"1e999", b"-1", b"../../x", b"/etc/passwd", b"\0", b"[" * 5000, b"}"]
        changed[at:at] = words[int(rng.integers(len(words)))]
    return bytes(changed)


def _payload(data: bytes, sentinel: Path, rng: np.random.Generator) -> bytes:
    """A call of a dangerous function in the place of a random value or in front of everything."""
    names = ["os system", "posix system", "builtins eval", "subprocess Popen", "torch load"]
    names += ["builtins __import__", "torch.storage _load_from_bytes", "shutil rmtree"]
    names += ["torch.distributed.checkpoint.metadata os.system", "importlib import_module"]
    module, name = str(rng.choice(names)).split(" ")
    argument = pickle.dumps(f"touch {sentinel}", 2)[2:-1]
    call = f"c{module}\n{name}\n".encode() + b"(" + argument + b"tR"
    laughs = b")" + b"q\xfeh\xfe\x86" * 300
    call = [call, laughs, b"]" * 3000, laughs + b"X\1\0\0\0x\x93"][int(rng.integers(4))]
    at = 2 if rng.random() < 0.5 else int(rng.integers(2, len(data)))
    return data[:at] + call + (b"0" if rng.random() < 0.5 else b"") + data[at:]


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Judge:
    """Whether reading a checkpoint may do something: look into its folder, and nothing else."""

    def __init__(self, folder: Path) -> None:
        self._folder = os.path.realpath(folder)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> str | None:
        if event in _FORBIDDEN:
            return f"{event} {arguments!r}"[:200]
        if event != "open" or not isinstance(arguments[0], str | bytes):
            return None
        path, flags = os.path.realpath(os.fsdecode(arguments[0])), arguments[2]
        is_write = isinstance(flags, int) and flags & _WRITE_FLAGS
        if is_write or not (path + os.sep).startswith(self._folder + os.sep):
            return f"open of {path} with flags {flags}"
        return None
