"""One process that decodes pictures for :mod:`megatron_cogview.data.decode_pool`.

It reads requests from standard input, writes pixels into shared memory and answers on standard
output.  A picture that crashes a decoder, or takes too long or too much memory, costs this process
and nothing else.  It ends when its standard input does, so it never outlives its parent.
"""

import mmap
import os
import resource
import signal
import struct
import sys
from typing import BinaryIO

import numpy as np

REQUEST = struct.Struct("<IQ")
"""Bytes of the encoded picture that follow; offset of its pixels in the shared memory."""
REPLY = struct.Struct("<I")
"""Bytes of the error text that follow; 0: decoded."""
READY = b"ready\n"
"""Sent once, when the libraries are loaded."""

MEMORY_BYTES = 1 << 30
"""Memory one picture may take before it is refused."""
CPU_SECONDS = 10
"""Processor time one picture may take before the kernel ends this process; the slowest kinds take 1
to 2 s at 40 million pixels."""


def serve(requests: BinaryIO, replies: BinaryIO, memory: mmap.mmap, sides: list[int]) -> None:
    """Decode until the requests end; each picture at every one of ``sides``, largest first."""
    # Late: the parent imports this module for its constants.
    import torch

    from megatron_cogview.configs.errors import DataError
    from megatron_cogview.data import images

    torch.set_num_threads(1)
    _limit_memory()
    pool = np.frombuffer(memory, dtype=np.uint8)
    replies.write(READY)
    replies.flush()
    while head := requests.read(REQUEST.size):
        length, offset = REQUEST.unpack(head)
        data = requests.read(length)
        if len(data) < length:
            return
        # Processor time, not time on the clock: a busy machine must not change what is rejected.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        error = b""
        try:
            pixels = images.decode(data, sides[0])
            for side in sides:
                scaled = pixels if side == sides[0] else images.shrink(pixels, side)
                pool[offset : offset + scaled.size] = scaled.reshape(-1)
                offset += scaled.size
        except DataError as refused:
            error = str(refused).encode("utf-8", "backslashreplace")
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(REPLY.pack(len(error)) + error)
        replies.flush()


def _limit_memory() -> None:
    with open("/proc/self/statm", encoding="ascii") as file:
        data_pages = int(file.read().split()[5])
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = data_pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_BYTES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))


def main() -> None:
    """Arguments: descriptor of the shared memory, its size, sides in pixels."""
    # The terminal's Ctrl-C is the parent's to answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    descriptor, size, *sides = (int(argument) for argument in sys.argv[1:])
    memory = mmap.mmap(descriptor, size)
    # What libraries print must not end up among the replies.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.stdin.buffer, replies, memory, sides)


if __name__ == "__main__":
    main()
