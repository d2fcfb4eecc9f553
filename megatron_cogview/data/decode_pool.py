"""Pictures decoded by other processes into shared memory, or by this one.

A decoder hands out trays, arrays for the pictures of one batch, and fills their places.  The number
of trays bounds the memory of everything that is on its way.

Shapes: B pictures of a batch, S side in pixels.
"""

import mmap
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_cogview.configs.errors import DataError
from megatron_cogview.data import images
from megatron_cogview.data.decode_worker import CPU_SECONDS, READY, REPLY, REQUEST

Pixels = NDArray[np.uint8]

COMMAND = [sys.executable, "-P", "-m", "megatron_cogview.data.decode_worker"]
"""Starts one decoding process, which must not import what lies in the user's current folder."""

_ATTEMPTS = 2
"""A picture is to blame only if a second process dies of it too, except of the time it took."""
_NOT_THE_PICTURE = (signal.SIGKILL, signal.SIGTERM)
"""Ends that come from outside."""


@dataclass(frozen=True)
class Tray:
    """Places for the pictures of one batch, at every side asked for."""

    pixels: list[Pixels]
    """For each side, largest first: ``[B, S, S, 3]``."""
    offset: int
    """Of the tray in the shared memory."""


class Decoder(Protocol):
    """What the pipeline needs."""

    def take_tray(self) -> Tray:
        """A free tray, waiting for one if need be."""

    def give_back(self, tray: Tray) -> None:
        """The tray's pictures are no longer needed."""

    def submit(self, data: bytes, tray: Tray, place: int) -> "Future[str]":
        """Decode one picture into a place; the future gives the reason it cannot be, or ''."""

    def close(self) -> None:
        """End all processes."""


def _layout(memory: Pixels, batch_size: int, sides: Sequence[int], num_trays: int) -> list[Tray]:
    """Trays over one block of memory; a picture's sides lie one after the other."""
    per_picture = sum(side * side * 3 for side in sides)
    trays = []
    for number in range(num_trays):
        start = number * batch_size * per_picture
        block = memory[start : start + batch_size * per_picture].reshape(batch_size, per_picture)
        pixels, at = [], 0
        for side in sides:
            count = side * side * 3
            pixels.append(block[:, at : at + count].reshape(batch_size, side, side, 3))
            at += count
        trays.append(Tray(pixels, start))
    return trays


class _Trays:
    """The free trays of a decoder."""

    def __init__(self, trays: list[Tray]) -> None:
        self._free: queue.SimpleQueue[Tray] = queue.SimpleQueue()
        for tray in trays:
            self._free.put(tray)

    def take_tray(self) -> Tray:
        """A free tray, waiting for one if need be."""
        return self._free.get()

    def give_back(self, tray: Tray) -> None:
        """The tray's pictures are no longer needed."""
        self._free.put(tray)


class InlineDecoder(_Trays):
    """Decodes in the thread that submits: for small jobs, tests, and data that is trusted."""

    def __init__(self, batch_size: int, sides: Sequence[int], num_trays: int) -> None:
        """Take the largest batch, the sides in pixels (largest first) and the number of trays."""
        self.sides = list(sides)
        size = num_trays * batch_size * sum(side * side * 3 for side in sides)
        super().__init__(_layout(np.empty(size, np.uint8), batch_size, sides, num_trays))

    def submit(self, data: bytes, tray: Tray, place: int) -> "Future[str]":
        """Decode now."""
        done: Future[str] = Future()
        try:
            pixels = images.decode(data, self.sides[0])
            for target, side in zip(tray.pixels, self.sides, strict=True):
                target[place] = pixels if side == self.sides[0] else images.shrink(pixels, side)
            done.set_result("")
        except DataError as error:
            done.set_result(str(error))
        return done

    def close(self) -> None:
        """Nothing to end."""


class DecodePool(_Trays):
    """Decodes in processes of their own, one picture at a time each."""

    def __init__(
        self, num_processes: int, batch_size: int, sides: Sequence[int], num_trays: int
    ) -> None:
        """Start ``num_processes``; see :class:`InlineDecoder` for the rest."""
        self._sides = list(sides)
        per_picture = sum(side * side * 3 for side in sides)
        self._per_picture = per_picture
        self._size = num_trays * batch_size * per_picture
        # A memory file rather than /dev/shm, of which containers have 64 MB.
        self._descriptor = os.memfd_create("decoded-pictures")
        os.ftruncate(self._descriptor, self._size)
        memory = np.frombuffer(mmap.mmap(self._descriptor, self._size), dtype=np.uint8)
        super().__init__(_layout(memory, batch_size, sides, num_trays))
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        for _ in range(num_processes):
            self._idle.put(self._start())
        self._threads = ThreadPoolExecutor(num_processes, "decode")

    def submit(self, data: bytes, tray: Tray, place: int) -> "Future[str]":
        """Decode in the next process that is free.

        The future raises :class:`DataError` where no process can be kept alive, for lack of memory
        perhaps: that is no picture's fault.
        """
        return self._threads.submit(self._decode, data, tray.offset + place * self._per_picture)

    def close(self) -> None:
        """End all processes."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().end()
        os.close(self._descriptor)

    def _start(self) -> "_Process":
        return _Process(self._descriptor, self._size, self._sides)

    def _decode(self, data: bytes, offset: int) -> str:
        process = self._idle.get()
        try:
            for _ in range(_ATTEMPTS):
                answer = process.ask(data, offset)
                if answer is not None:
                    return answer
                code = process.exit_code()
                process = self._start()
                if code == -signal.SIGPROF:
                    break
        finally:
            self._idle.put(process)
        if -code in _NOT_THE_PICTURE:
            raise DataError(
                f"decoding processes are killed from outside ({signal.Signals(-code).name}), "
                "perhaps for lack of memory; start fewer (--decode-workers)"
            )
        return _cause_of_death(code)


def _cause_of_death(code: int) -> str:
    """Why the process ended, in words that are the same on every run."""
    if code == -signal.SIGPROF:
        return f"cannot be decoded: takes more than {CPU_SECONDS} s"
    if code < 0:
        return f"cannot be decoded: the decoder died of {signal.Signals(-code).name}"
    return f"cannot be decoded: the decoder ended with exit code {code}"


def _import_paths() -> list[str]:
    """This package's folder, and those of PYTHONPATH that do not follow the current folder.

    An empty entry means the current folder, as "." does: a file of the user's data must not be
    imported because it is called like a library.
    """
    package = str(Path(__file__).resolve().parents[2])
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [package, *filter(os.path.isabs, given)]


class _Process:
    """One decoding process."""

    def __init__(self, descriptor: int, size: int, sides: list[int]) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(_import_paths()),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        numbers = [str(number) for number in (descriptor, size, *sides)]
        self._popen = subprocess.Popen(
            [*COMMAND, *numbers],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(descriptor,),
            env=environment,
        )
        self._ready = False

    def ask(self, data: bytes, offset: int) -> str | None:
        """The answer to one request, or None if the process died of it.

        Raises:
            DataError: the process died before it was asked anything.
        """
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        if not self._ready:
            if self._popen.stdout.read(len(READY)) != READY:
                code = self._popen.wait()
                raise DataError(
                    f"a decoding process ended at its start (exit code {code}), perhaps for lack "
                    "of memory; start fewer (--decode-workers), or none with 0"
                )
            self._ready = True
        try:
            self._popen.stdin.write(REQUEST.pack(len(data), offset))
            self._popen.stdin.write(data)
            self._popen.stdin.flush()
        except BrokenPipeError:
            return None
        head = self._popen.stdout.read(REPLY.size)
        if len(head) < REPLY.size:
            return None
        (length,) = REPLY.unpack(head)
        text = self._popen.stdout.read(length)
        return text.decode("utf-8") if len(text) == length else None

    def exit_code(self) -> int:
        """How the process ended; minus the signal that ended it."""
        self.end()
        return self._popen.returncode

    def end(self) -> None:
        """Close its standard input, of which it dies, and wait."""
        try:
            self._popen.communicate(timeout=10)
        except (subprocess.TimeoutExpired, BrokenPipeError, ValueError):
            self._popen.kill()
            self._popen.wait()
