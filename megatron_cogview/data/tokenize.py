"""Offline tokenisation: pairs of one source to token shards.

Puts source, tokenizers, decoder and output folder together; one process of one or many.
"""

import logging
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from tqdm import tqdm

from megatron_cogview.configs.errors import refuse
from megatron_cogview.data.decode_pool import DecodePool, Decoder, InlineDecoder
from megatron_cogview.data.encode import PairEncoder
from megatron_cogview.data.pipeline import NUM_TRAYS, EncodedPart, encode_parts
from megatron_cogview.data.raw import PairSource, Part
from megatron_cogview.data.shards import FORMAT_VERSION
from megatron_cogview.data.token_folder import Digest, TokenFolder, check_share, shown
from megatron_cogview.data.token_rows import TokenSource

logger = logging.getLogger(__name__)

Chosen = list[tuple[int, Part]]
"""Parts to make, with their numbers."""
Advance = Callable[[int], object]
"""Hears of bytes that are done."""
Encode = Callable[[Chosen, Advance], Generator[EncodedPart]]
"""Gives parts in the order asked for."""

MIN_PAIRS_TO_ABORT = 1000
"""Pairs seen before a high rejected share stops the run early."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """How a run goes about it; nothing here changes a byte of the result."""

    batch_size: int = 64
    """Pictures encoded at a time."""
    max_rejected: float = 1.0
    """Share of rejected pairs, 0..1, of this process and of all, above which the run fails."""
    worker: int = 0
    """Number of this process among those that share the output, from 0: of the input's parts it
    takes every OF-th."""
    of: int = 1
    """How many processes share the output."""
    decode_workers: int = 1
    """Processes that decode pictures, a core each; 0: this one, and a picture that crashes a
    decoder ends the run."""
    wait_for_locks: float = 0.0
    """Seconds to wait for parts that another process holds: a network file system may take minutes
    to notice that a machine has died."""
    verify_inputs: bool = False
    """Hash the inputs of finished shards again, not only compare their sizes and times."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise refuse("batch_size", self.batch_size, "must be at least 1")
        if not 0 <= self.worker < self.of:
            raise refuse("worker", self.worker, f"must be in 0..{self.of - 1}, below of")
        if not 0.0 <= self.max_rejected <= 1.0:
            raise refuse("max_rejected", self.max_rejected, "must be in [0, 1]")
        if self.decode_workers < 0:
            raise refuse("decode_workers", self.decode_workers, "must be at least 0")
        if self.wait_for_locks < 0:
            raise refuse("wait_for_locks", self.wait_for_locks, "must be at least 0")


def tokenize_dataset(
    source: PairSource, encoder: PairEncoder, output: Path, work: Work | None = None
) -> dict[str, Any] | None:
    """Write shards, ``rejected.jsonl`` and ``manifest.json`` to ``output``; give the manifest.

    Run again with the same arguments it finishes what is missing; with parts added at the end it
    appends.  With several workers the last one to finish writes the manifest; the others get None.

    Raises:
        DataError: nothing usable, too much rejected, ``output`` holds other data, or another
            process works on the same parts.
    """
    work = work or Work()

    def encode(chosen: Chosen, advance: Advance) -> Generator[EncodedPart]:
        with _decoder(encoder, work) as decoder:
            yield from encode_parts(chosen, source, encoder, decoder, work.batch_size, advance)

    return write_parts(source, encoder, output, work, encode)


def write_parts(
    source: PairSource | TokenSource,
    encoder: PairEncoder,
    output: Path,
    work: Work,
    encode: Encode,
) -> dict[str, Any] | None:
    """Everything around the encoding: which parts, their commits, limits, and the manifest.

    Args:
        source: whose parts they are.
        encoder: for its settings and its record type.
        output: folder of the shards.
        work: how to go about it.
        encode: gives the parts asked for, in order, and tells how many bytes are done.
    """
    source.check()
    parts: list[Part] = list(source.parts())
    settings = {"version": FORMAT_VERSION, "source": source.description, **encoder.settings}
    # A source is only ever asked about its own parts.
    digest = cast("Digest", source.digest)
    folder = TokenFolder(output, parts, settings, digest, work.verify_inputs, work.max_rejected)
    with closing(folder):
        mine = range(work.worker, len(parts), work.of)
        missing = folder.claim(mine, work.wait_for_locks)
        tally = _Tally(work.max_rejected)
        for index in set(mine) - set(missing):
            tally.add(*folder.summary(index))
        if missing:
            chosen = [(index, parts[index]) for index in missing]
            _make(chosen, encode, encoder.dtype, folder, tally)
        manifest = folder.finish()
    if manifest:
        logger.info(
            "%s: %d records, rejected: %s",
            output, manifest["records"], shown(Counter(manifest["rejected"])),
        )  # fmt: skip
    return manifest


def _make(
    chosen: Chosen,
    encode: Encode,
    dtype: np.dtype[np.void],
    folder: TokenFolder,
    tally: "_Tally",
) -> None:
    """Encode what is missing; write each part while the next is encoded."""
    total = sum(part.num_bytes for _, part in chosen)
    with ThreadPoolExecutor(1, "write shards") as writer, _progress(total) as bar:
        done = 0
        writing: Future[None] | None = None
        with closing(encode(chosen, bar.update)) as encoded:
            for part in encoded:
                done += part.part.num_bytes
                bar.update(done - bar.n)
                if writing is not None:
                    writing.result()
                writing = writer.submit(_commit, folder, dtype, part)
                rejected = part.encoded.rejected
                records = sum(len(r) for r in part.encoded.records)
                reasons: Counter[str] = Counter()
                for item in rejected:
                    reasons[item.reason] += item.pairs
                tally.add(records, reasons)
                bar.set_postfix(records=tally.records, rejected=tally.reasons.total())
        if writing is not None:
            writing.result()


def _commit(folder: TokenFolder, dtype: np.dtype[np.void], part: EncodedPart) -> None:
    encoded = part.encoded
    records = np.concatenate([np.zeros(0, dtype=dtype), *encoded.records])
    counts = asdict(encoded.counts) | {f"captions_{k}": n for k, n in part.captions.items()}
    folder.commit(part.index, records, encoded.rejected, counts, part.digest)


@contextmanager
def _decoder(encoder: PairEncoder, work: Work) -> Iterator[Decoder]:
    sizes = (work.batch_size, encoder.sides, NUM_TRAYS)
    decoder: Decoder = (
        DecodePool(work.decode_workers, *sizes) if work.decode_workers else InlineDecoder(*sizes)
    )
    with closing(decoder):
        yield decoder


def _progress(total: int) -> Any:
    return tqdm(
        total=total,
        desc="tokenise",
        unit="B",
        unit_scale=True,
        mininterval=0.5 if sys.stderr.isatty() else 15.0,
    )


class _Tally:
    """Records and rejections of this process, against the share that is allowed."""

    def __init__(self, max_rejected: float) -> None:
        self.records = 0
        self.reasons: Counter[str] = Counter()
        self._max_rejected = max_rejected

    def add(self, records: int, reasons: Counter[str]) -> None:
        """Count one part, and stop above the share once there are enough pairs to judge by."""
        self.records += records
        self.reasons.update(reasons)
        if self.records + self.reasons.total() >= MIN_PAIRS_TO_ABORT:
            check_share(self.records, self.reasons, self._max_rejected)
