"""The most memory that a function holds at once, on a GPU or on a CPU.

On a CPU the function runs in a forked child, and what counts is how far the child's resident set
grows.  malloc has a say in that: freed blocks that it keeps are in the set without being held, and
of two blocks in turn the second may not fit into the hole that the first one left, by an alignment.
So the child gives back what is free, occupies the holes, and has every larger block come from the
kernel and go back there at once.  glibc only.
"""

import ctypes
import gc
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from megatron_cogview.analysis.timing import extra_bytes

_STATUS = Path("/proc/self/status")
_BLOCK = 1 << 16
"""Bytes; larger blocks come from the kernel."""
_M_MMAP_THRESHOLD = -3
"""mallopt(3)."""


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Most memory of ``device`` that ``run`` held beyond what was held before.

    On a GPU by torch's allocator; on a CPU as the growth of the resident set of a child process, in
    which torch has one thread.

    Raises:
        RuntimeError: ``run`` failed in the child, or its memory cannot be read there.
    """
    # By the device that is measured: a machine with a GPU measures its CPU too.
    on_gpu = extra_bytes(run, device)
    if on_gpu is not None:
        return on_gpu
    gc.collect()
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_in_child, args=(run, sender))
    child.start()
    sender.close()
    try:
        value: int = receiver.recv()
    except EOFError:
        raise RuntimeError("the process that measures memory died") from None
    finally:
        child.join()
    return value


def _in_child(run: Callable[[], Any], sender: Any) -> None:
    # A forked process has no threads of the parent's pool, and waiting for them would never end.
    torch.set_num_threads(1)
    _start_with_a_full_heap()
    with Path("/proc/self/clear_refs").open("w") as file:
        # Sets the high-water mark back to the present size (proc(5)).
        file.write("5")
    before = _status("VmRSS")
    run()
    sender.send(_status("VmHWM") - before)
    sender.close()


def _start_with_a_full_heap() -> None:
    """Leave no free block of ``_BLOCK`` bytes in the heap.  Costs address space, not memory."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    libc.malloc_trim(0)
    libc.mallopt(_M_MMAP_THRESHOLD, _BLOCK)
    size = 1 << 34
    while size >= _BLOCK:
        end = libc.sbrk(0)
        block = libc.malloc(size)
        if block is None or block > end or libc.sbrk(0) != end:
            # It came from the kernel: no hole is as large.
            libc.free(block)
            size //= 2


def _status(name: str) -> int:
    """A size out of /proc/self/status, bytes."""
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {name}")
