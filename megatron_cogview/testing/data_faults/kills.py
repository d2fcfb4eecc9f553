"""Kill a tokenisation at random moments, start it again, and compare every byte with a run that
was left alone.

One trial: a fresh output folder; kills (SIGKILL to the whole process group) at moments drawn from
the time an undisturbed run takes, of which at least one hit; then a run to the end.  Processes are
forked from one that has loaded everything, so a trial costs about a second.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import tarfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image

from megatron_cogview.configs.image_tokenizer import ImageTokenizerConfig
from megatron_cogview.configs.sequence import SequenceConfig
from megatron_cogview.data.encode import PairEncoder
from megatron_cogview.data.token_folder import LOCKS
from megatron_cogview.data.tokenize import Work, tokenize_dataset
from megatron_cogview.data.webdataset import WebDatasetTars
from megatron_cogview.testing.data_faults import journal
from megatron_cogview.tokenization.image import load_image_tokenizer, save_image_tokenizer
from megatron_cogview.tokenization.text import TextTokenizer, train
from megatron_cogview.tokenization.vq_model import VQModel

NUM_TARS, PAIRS_PER_TAR = 6, 24
BATCH_SIZE = 8
MOST_KILLS = 3
MOST_TRIES = 60
WITH_DECODER_EVERY = 10
"""Every so manieth trial has a decoding process of its own, which costs two seconds to start."""


class KillCampaign:
    """Input, tokenizers and the undisturbed result; made once."""

    def __init__(self, folder: Path) -> None:
        """Make small tars and tokenizers in ``folder`` and tokenise them undisturbed."""
        self._folder = folder
        self._tars = write_tars(folder / "pairs")
        self._few = folder / "beginning"
        self._few.mkdir()
        for path in sorted(self._tars.iterdir())[: NUM_TARS // 2]:
            (self._few / path.name).hardlink_to(path)
        self._encoder = make_encoder(folder)
        self._seconds: list[float] = []
        """Of an undisturbed run, without and with a decoding process."""
        for decode_workers in (0, 1):
            output = folder / f"undisturbed-{decode_workers}"
            begin = time.perf_counter()
            _ended(_started(self._run(self._tars, output, decode_workers)))
            self._seconds.append(time.perf_counter() - begin)
        self.expected = contents(folder / "undisturbed-0")
        if contents(folder / "undisturbed-1") != self.expected:
            raise RuntimeError("two undisturbed runs differ")

    def trial(self, number: int) -> dict[str, Any]:
        """One trial; the same number draws the same moments.

        By turns one worker, two at the same time, one that is killed near its end (where the
        manifest is written), and one whose data set grows between two kills.
        """
        rng = np.random.default_rng([number, 5])
        way = ("one", "two", "late", "grown")[number % 4]
        decode_workers = int(number % WITH_DECODER_EVERY == 0)
        span = self._seconds[decode_workers]
        kills = 0
        moments: list[float] = []
        with TemporaryDirectory(dir=self._folder) as name:
            output = Path(name) / "tokens"
            # Again until a kill hits: a run may be over before its moment comes.
            while not kills and len(moments) < MOST_TRIES:
                for share in rng.random(int(rng.integers(1, MOST_KILLS + 1))):
                    moment = float(span * (0.7 + 0.35 * share if way == "late" else 0.9 * share))
                    moments.append(round(moment, 4))
                    tars = self._few if way == "grown" and len(moments) == 1 else self._tars
                    kills += self._kill_at(moment, tars, output, decode_workers, way == "two")
                if not kills:
                    # The measured run may have been slower than all that follow.
                    span *= 0.95
                    shutil.rmtree(output, ignore_errors=True)
            _ended(_started(self._run(self._tars, output, decode_workers)))
            found = contents(output)
        line = {"trial": number, "kind": "kill", "way": way, "moments": moments, "killed": kills}
        return {**line, "ok": bool(kills) and found == self.expected}

    def _kill_at(
        self, moment: float, tars: Path, output: Path, decode_workers: int, two: bool
    ) -> int:
        """How many of the workers were still at work and died of it."""
        workers = [(0, 2), (1, 2)] if two else [(0, 1)]
        runs = [_started(self._run(tars, output, decode_workers, *each)) for each in workers]
        time.sleep(moment)
        for child in runs:
            # It may have ended, or not yet have its group.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        for child in runs:
            child.join()
        return sum(child.exitcode == -signal.SIGKILL for child in runs)

    def _run(
        self, tars: Path, output: Path, decode_workers: int, worker: int = 0, of: int = 1
    ) -> Callable[[], object]:
        work = Work(batch_size=BATCH_SIZE, decode_workers=decode_workers, worker=worker, of=of)
        source = WebDatasetTars(tars)
        return lambda: tokenize_dataset(source, self._encoder, output, work)


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the lock file, whose bytes mean nothing."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != LOCKS
    }


def write_tars(folder: Path) -> Path:
    """Pairs of smooth pictures and short captions; one in each tar cannot be used."""
    folder.mkdir(parents=True)
    for number in range(NUM_TARS):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for index in range(PAIRS_PER_TAR):
                key = number * PAIRS_PER_TAR + index
                about = {"id": f"pair-{key}", "caption": f"picture {key} 图"}
                picture = b"broken" if index == 7 else _picture(key)
                for extension, data in (
                    ("png" if key % 2 else "jpg", picture),
                    ("json", json.dumps(about).encode()),
                ):
                    member = tarfile.TarInfo(f"{key:06d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


def _picture(key: int) -> bytes:
    rng = np.random.default_rng(key)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize((96, 80), Image.Resampling.BICUBIC).save(buffer, "PNG" if key % 2 else "JPEG")
    return buffer.getvalue()


def make_encoder(folder: Path) -> PairEncoder:
    """Small tokenizers: 32 pixels to 8 x 8 codes, and a few dozen pieces."""
    config = ImageTokenizerConfig(
        image_size=32, downsampling_layers=2, hidden_size=16, code_dim=8, num_codes=64
    )
    torch.manual_seed(0)
    save_image_tokenizer(VQModel(config), config, folder / "image.safetensors")
    train([f"picture {n} 图" for n in range(200)], folder / "text.model", 60)
    return PairEncoder(
        TextTokenizer(folder / "text.model"),
        load_image_tokenizer(folder / "image.safetensors"),
        SequenceConfig(length=90, text_budget=20, codes_per_side=(8,)),
    )


def _started(run: Callable[[], object]) -> Any:
    """A forked process in a process group of its own."""

    def child() -> None:
        os.setsid()
        # Progress bars of hundreds of runs help nobody.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        torch.set_num_threads(1)
        journal.after_fork()
        run()

    process = get_context("fork").Process(target=child)
    process.start()
    return process


def _ended(process: Any) -> None:
    process.join(120)
    if process.exitcode != 0:
        raise RuntimeError(f"a run that was left alone ended with exit code {process.exitcode}")
