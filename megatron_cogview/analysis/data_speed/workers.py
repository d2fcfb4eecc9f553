"""Two tokenising processes against one, a core and a thread each, start-up excluded."""

import io
import json
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch

from megatron_cogview.data.encode import PairEncoder
from megatron_cogview.data.raw import RawPair
from megatron_cogview.data.tokenize import Work, tokenize_dataset
from megatron_cogview.data.webdataset import WebDatasetTars

NUM_PARTS = 12


def scaling(
    pairs: Sequence[RawPair], encoder: PairEncoder, repeats: int, batch_size: int = 64
) -> dict[str, Any]:
    """Seconds of one and of two workers over the same tars, alternately.

    The pairs are packed into tars of equal numbers first: with unequal ones the larger half would
    be measured.
    """
    cores = sorted(os.sched_getaffinity(0))[:2]
    seconds: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as packed:
        source = _pack(pairs, Path(packed))
        for _ in range(repeats):
            _both(source, encoder, batch_size, cores, seconds)
    one, two = (statistics.median(seconds[count]) for count in (1, 2))
    return {
        "pairs": len(pairs) // NUM_PARTS * NUM_PARTS,
        "parts": NUM_PARTS,
        "one_worker_seconds": one,
        "two_workers_seconds": two,
        "ratio": one / two,
    }


def _both(
    source: WebDatasetTars,
    encoder: PairEncoder,
    batch_size: int,
    cores: list[int],
    seconds: dict[int, list[float]],
) -> None:
    for count in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            run = _Run(source, encoder, Path(folder), batch_size, cores)
            seconds[count].append(run.timed(count))


def _pack(pairs: Sequence[RawPair], folder: Path) -> WebDatasetTars:
    each = len(pairs) // NUM_PARTS
    for number in range(NUM_PARTS):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for index, pair in enumerate(pairs[number * each : (number + 1) * each]):
                about = json.dumps({"id": pair.id, "caption": pair.caption}).encode()
                # Pictures are told apart by their content; the ending only has to be one.
                for ending, data in (("jpg", pair.image), ("json", about)):
                    member = tarfile.TarInfo(f"{index:06d}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return WebDatasetTars(folder)


class _Run:
    """One tokenisation by some workers; the processes are forked, so nothing is loaded twice."""

    def __init__(
        self,
        source: WebDatasetTars,
        encoder: PairEncoder,
        output: Path,
        batch_size: int,
        cores: list[int],
    ) -> None:
        self.source, self.encoder, self.output = source, encoder, output
        self.batch_size, self.cores = batch_size, cores

    def timed(self, count: int) -> float:
        """Seconds from the moment all workers are ready to the end of the last."""
        context = get_context("fork")
        barrier = context.Barrier(count + 1)
        workers = [
            context.Process(target=self._work, args=(k, count, barrier)) for k in range(count)
        ]
        for worker in workers:
            worker.start()
        barrier.wait(60)
        begin = time.perf_counter()
        for worker in workers:
            worker.join()
        seconds = time.perf_counter() - begin
        if any(worker.exitcode for worker in workers):
            raise RuntimeError("a tokenising process failed")
        return seconds

    def _work(self, worker: int, count: int, barrier: Barrier) -> None:
        # All threads of a worker share one core; otherwise one worker would use both.
        os.sched_setaffinity(0, {self.cores[worker % len(self.cores)]})
        torch.set_num_threads(1)
        work = Work(worker=worker, of=count, decode_workers=0, batch_size=self.batch_size)
        barrier.wait(60)
        tokenize_dataset(self.source, self.encoder, self.output, work)
