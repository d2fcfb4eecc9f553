"""Hostile input by the hundred thousand: mutated tars, tables, maps, pictures and token rows.

Each case goes through the code that a tokenisation would run on it: reader, caption encoding,
decoding; every so manieth through a whole tokenisation.  Cases run in a child process, a batch at a
time, so that a crash is seen and named.  An audit hook sees every file that is opened for writing
outside the output folder, every process that is started and every name that a pickle asks for.
"""

import os
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from megatron_cogview.configs.errors import ConfigError, DataError
from megatron_cogview.data import images, inert_pickle
from megatron_cogview.data.decode_pool import COMMAND
from megatron_cogview.data.encode import PairEncoder
from megatron_cogview.data.raw import PairSource, RawPair
from megatron_cogview.data.released import CompactBinary
from megatron_cogview.data.sources import SourceOptions, open_source
from megatron_cogview.data.token_rows import parse_row
from megatron_cogview.data.tokenize import Work, tokenize_dataset
from megatron_cogview.testing.audit import Audit
from megatron_cogview.testing.data_faults import journal
from megatron_cogview.testing.data_faults.kills import make_encoder
from megatron_cogview.testing.data_faults.mutations import Mutator, large_seeds, seeds

CASES_PER_TRIAL = 500
WHOLE_EVERY = 50
"""Every so manieth tar, table or map is tokenised whole, into shards."""
DECODER_EVERY = 850
"""Every so manieth tar is tokenised with a decoding process of its own, two seconds to start."""
HANG_CPU_SECONDS = 2.0
HANG_WALL_SECONDS = 10.0
"""A machine with other work on it is slow without hanging."""
MEMORY_BYTES = 1 << 30
KINDS = ("tar", "table", "image", "pickle", "binary", "caption_map")

_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_FORBIDDEN = ("os.system", "subprocess.Popen", "pickle.find_class", "socket.connect")
_WRITES = ("os.mkdir", "os.rename", "os.remove", "os.symlink", "os.link", "os.truncate", "os.rmdir")


class FuzzCampaign:
    """Seeds and tokenizers; a trial is a batch of cases in a child process."""

    def __init__(self, folder: Path, cases_per_trial: int = CASES_PER_TRIAL) -> None:
        """Make the tokenizers in ``folder``."""
        self._folder = folder
        self._encoder = make_encoder(folder)
        self._cases = cases_per_trial
        # Once, before processes are forked that would each make their own.
        seeds()
        large_seeds()

    def trial(self, number: int) -> dict[str, Any]:
        """Cases ``number * n ... (number + 1) * n - 1``."""
        context = get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        with TemporaryDirectory(dir=self._folder) as name:
            child = context.Process(target=self._run, args=(number, Path(name), sender))
            child.start()
            sender.close()
            last: dict[str, Any] = {}
            # A case announces itself before it runs: what is known last names the culprit.
            while True:
                try:
                    if not receiver.poll(30):
                        child.kill()
                        break
                    last = receiver.recv()
                except EOFError:
                    break
            child.join()
        done = last.get("done", False)
        line = {"trial": number, "kind": "fuzz", "cases": self._cases, **last}
        line["exit_code"] = child.exitcode
        line["ok"] = bool(done and not last["findings"])
        return line

    def _run(self, number: int, folder: Path, sender: Any) -> None:
        torch.set_num_threads(1)
        journal.after_fork()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
        before = _memory("VmRSS")
        findings: list[str] = []
        slowest = 0.0
        taken, refused = Counter[str](), Counter[str]()
        output = folder / "output"
        output.mkdir()
        watch = Audit(_Judge(output))
        for case in range(number * self._cases, (number + 1) * self._cases):
            kind = KINDS[case % len(KINDS)]
            sender.send({"case": case, "case_kind": kind, "findings": findings})
            case_folder = folder / str(case)
            case_folder.mkdir()
            run = self._prepare(case, kind, case_folder, output)
            begin, begin_wall = time.process_time(), time.perf_counter()
            with watch:
                try:
                    run()
                    taken[kind] += 1
                except (DataError, ConfigError):
                    refused[kind] += 1
                except Exception as error:  # Anything else is what the campaign looks for.
                    findings.append(f"case {case} ({kind}): {type(error).__name__}: {error}"[:300])
            seconds, wall = time.process_time() - begin, time.perf_counter() - begin_wall
            slowest = max(slowest, seconds)
            if seconds > HANG_CPU_SECONDS or wall > HANG_WALL_SECONDS:
                findings.append(f"case {case} ({kind}): {seconds:.1f} s of {wall:.1f} s")
            findings.extend(f"case {case} ({kind}): {event}" for event in watch.take())
        grown = _memory("VmHWM") - before
        if grown > MEMORY_BYTES:
            findings.append(f"memory grew by {grown} bytes")
        sender.send(
            {
                "done": True,
                "findings": findings,
                "taken": dict(taken),
                "refused": dict(refused),
                "slowest_seconds": round(slowest, 3),
                "memory_bytes": grown,
            }
        )
        sender.close()

    def _prepare(self, case: int, kind: str, folder: Path, output: Path) -> Callable[[], object]:
        """Write the input of a case to ``folder``; what is returned may write to ``output``."""
        mutator = Mutator(np.random.default_rng([case, 11]))
        if kind == "image":
            picture = mutator.picture()
            return lambda: images.decode(picture, 32)
        if kind == "pickle":
            row = mutator.row()
            return lambda: parse_row(inert_pickle.loads(row), "id", "part")
        data = folder / "data"
        data.mkdir()
        if kind == "binary":
            mutator.write_binary(data)
            return lambda: _read_binary(CompactBinary(data, rows_per_part=3))
        options = SourceOptions()
        if kind == "caption_map":
            options = SourceOptions(caption_map=mutator.write_caption_map(data, folder / "map"))
        elif kind == "tar":
            mutator.write_tar(data)
        else:
            mutator.write_table(data)
        number = case // len(KINDS)
        if number % WHOLE_EVERY:
            return lambda: _read(open_source(data, options), self._encoder)
        workers = int(kind == "tar" and number % DECODER_EVERY == 0)
        work = Work(decode_workers=workers, batch_size=8)
        target = output / str(case)
        return lambda: tokenize_dataset(open_source(data, options), self._encoder, target, work)


def _read_binary(source: CompactBinary) -> None:
    source.check()
    for part in source.parts():
        source.digest(part)
        for _ in source.read(part):
            pass


def _read(source: PairSource, encoder: PairEncoder) -> None:
    source.check()
    for part in source.parts():
        for item in source.read(part):
            if isinstance(item, RawPair):
                encoder.text.encode(item.caption)
                try:
                    images.decode(item.image, 32)
                except DataError:
                    continue


def _memory(name: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


class _Judge:
    """Whether a case may do something to the world outside the output folder."""

    def __init__(self, allowed: Path) -> None:
        self._allowed = str(allowed.resolve())

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> str | None:
        if event == "subprocess.Popen" and list(arguments[1])[: len(COMMAND)] == COMMAND:
            return None
        if event in _FORBIDDEN:
            return f"{event} {arguments!r}"[:200]
        paths: tuple[Any, ...] = arguments if event in _WRITES else ()
        if event == "open":
            path, _, flags = arguments
            paths = (path,) if isinstance(flags, int) and flags & _WRITE_FLAGS else ()
        for path in paths:
            if isinstance(path, str | bytes) and path and not self._is_inside(os.fsdecode(path)):
                return f"{event} of {os.path.abspath(os.fsdecode(path))}"
        return None

    def _is_inside(self, path: str) -> bool:
        full = os.path.abspath(path)
        return full == os.devnull or (full + os.sep).startswith(self._allowed + os.sep)
