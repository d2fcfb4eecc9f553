"""Two tokenising processes against one, a core and a thread each, start-up excluded."""

import os
import statistics
import tempfile
import time
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch

from megatron_cogview.data.encode import PairEncoder
from megatron_cogview.data.raw import PairSource
from megatron_cogview.data.tokenize import Work, tokenize_dataset


def scaling(
    source: PairSource, encoder: PairEncoder, repeats: int, batch_size: int = 64
) -> dict[str, Any]:
    """Seconds of one and of two workers over the same parts, alternately."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(repeats):
        for count in (1, 2):
            with tempfile.TemporaryDirectory() as folder:
                run = _Run(source, encoder, Path(folder), batch_size, cores)
                seconds[count].append(run.timed(count))
    one, two = (statistics.median(seconds[count]) for count in (1, 2))
    return {
        "parts": len(source.parts()),
        "one_worker_seconds": one,
        "two_workers_seconds": two,
        "ratio": one / two,
    }


class _Run:
    """One tokenisation by some workers; the processes are forked, so nothing is loaded twice."""

    def __init__(
        self,
        source: PairSource,
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
