"""Reading, decoding and encoding at the same time, with bounded memory.

One thread reads and encodes captions, the decoder's processes decode, the caller's thread encodes
pictures, another hashes the inputs.  Order is that of the parts, and nothing depends on who was
faster.  What is on its way is bounded by the decoder's trays.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from megatron_cogview.configs.errors import DataError
from megatron_cogview.data.captions import Recaptioned
from megatron_cogview.data.decode_pool import Decoder
from megatron_cogview.data.encode import Encoded, PairEncoder, Prepared, batches
from megatron_cogview.data.raw import PairSource, Part

READ_AHEAD = 2
"""Batches that are read and being decoded while another is encoded."""
NUM_TRAYS = READ_AHEAD + 2
"""One more is with the reader, and one with the encoder."""


Identity = tuple[int, int, int]
"""Of a file as it was: size, time of change, inode."""


def identity(part: Part) -> Identity:
    """What :func:`check_unchanged` compares; taken before a part is read.

    Raises:
        DataError: its file is gone.
    """
    try:
        status = part.path.stat()
    except OSError as error:
        raise DataError(f"{part.path}: cannot be read ({error.strerror})") from None
    return status.st_size, status.st_mtime_ns, status.st_ino


def check_unchanged(part: Part, before: Identity) -> None:
    """The hash of an input speaks of the bytes that were read only if nobody wrote meanwhile.

    Raises:
        DataError: its file is no longer what it was.
    """
    if identity(part) != before:
        raise DataError(
            f"{part.path}: changed while it was read; let it be written to its end, then run the "
            "same command again"
        )


@dataclass(frozen=True, slots=True)
class EncodedPart:
    """All of one part."""

    index: int
    """Its number."""
    part: Part
    digest: str
    """Of its input."""
    encoded: Encoded
    captions: dict[str, int] = field(default_factory=dict)
    """With a caption map: pairs whose caption was replaced, and kept."""


@dataclass(frozen=True, slots=True)
class _End:
    """All batches of a part have been sent."""

    index: int
    part: Part
    before: Identity
    digest: "Future[str]"
    captions: dict[str, int]


_Event = Prepared | _End | BaseException | None


def encode_parts(
    parts: Sequence[tuple[int, Part]],
    source: PairSource,
    encoder: PairEncoder,
    decoder: Decoder,
    batch_size: int,
    advance: Callable[[int], object],
) -> Iterator[EncodedPart]:
    """Encode parts one after the other.

    Args:
        parts: numbers and parts, in the order wanted.
        source: reads them.
        encoder: both tokenizers.
        decoder: for pictures; with ``NUM_TRAYS`` trays.
        batch_size: pairs of one batch.
        advance: hears of the bytes of parts that are done.
    """
    reader = _Reader(parts, source, encoder, decoder, batch_size)
    try:
        encoded = Encoded()
        while (event := reader.next()) is not None:
            if isinstance(event, _End):
                digest = event.digest.result()
                check_unchanged(event.part, event.before)
                yield EncodedPart(event.index, event.part, digest, encoded, event.captions)
                encoded = Encoded()
                continue
            encoder.finish(event, encoded)
            decoder.give_back(event.tray)
            advance(event.num_bytes)
    finally:
        reader.stop()


class _Reader:
    """The thread that reads, and the queue of what it has prepared."""

    def __init__(
        self,
        parts: Sequence[tuple[int, Part]],
        source: PairSource,
        encoder: PairEncoder,
        decoder: Decoder,
        batch_size: int,
    ) -> None:
        self._source, self._encoder, self._decoder = source, encoder, decoder
        self._batch_size = batch_size
        self._events: queue.Queue[_Event] = queue.Queue(READ_AHEAD)
        self._stopped = threading.Event()
        self._hashing = ThreadPoolExecutor(1, "hash inputs")
        self._thread = threading.Thread(target=self._run, args=(parts,), name="read pairs")
        self._thread.start()

    def next(self) -> Prepared | _End | None:
        """What comes next; None at the end.  An error of the thread is raised here."""
        event = self._events.get()
        if isinstance(event, BaseException):
            raise event
        return event

    def stop(self) -> None:
        """End the thread wherever it is."""
        self._stopped.set()
        while self._thread.is_alive():
            try:
                event = self._events.get(timeout=0.05)
            except queue.Empty:
                continue
            if isinstance(event, Prepared):
                # The thread may be waiting for a tray.
                self._decoder.give_back(event.tray)
        self._hashing.shutdown(wait=True, cancel_futures=True)

    def _run(self, parts: Sequence[tuple[int, Part]]) -> None:
        try:
            for index, part in parts:
                # Beside the reading, so that the file passes through the page cache once.
                before = identity(part)
                digest = self._hashing.submit(self._source.digest, part)
                for batch in batches(self._source.read(part), self._batch_size):
                    if self._stopped.is_set():
                        return
                    prepared = self._encoder.prepare(batch, self._decoder)
                    if part.num_pairs:
                        # A table's bytes are not those of its pictures.
                        prepared.num_bytes = part.num_bytes * len(batch) // part.num_pairs
                    self._events.put(prepared)
                source = self._source
                captions = source.counts(part.name) if isinstance(source, Recaptioned) else {}
                self._events.put(_End(index, part, before, digest, captions))
            self._events.put(None)
        except BaseException as error:  # Whatever it is, the caller's thread must hear of it.
            self._events.put(error)
