"""Pictures of several sources, decoded once, and the order in which training sees them.

The order is a pure function of (seed, step): nothing is stored to resume it, and every process
computes the same global batch and takes its part.  Captions play no role here.

Shapes: N pictures, V of them held out, B batch, S side in pixels, L stored side, C = 3.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_cogview.configs.errors import DataError
from megatron_cogview.data import images
from megatron_cogview.data.permutation import derive_key, permute
from megatron_cogview.data.raw import PairSource, RawPair, Rejected
from megatron_cogview.storage.atomic import replacing
from megatron_cogview.storage.digest import (
    read_json_with_digest,
    sha256_bytes,
    write_json_with_digest,
)

logger = logging.getLogger(__name__)

MEMORY_LIMIT_BYTES = 2 * 2**30
"""Decoded pictures up to here stay in memory; more go to a memory-mapped file."""
LARGEST_VALIDATION = 2048
"""Held-out pictures kept for validation: the first ones in the order of the data."""


@dataclass(frozen=True)
class Pictures:
    """All usable pictures of a data set and their split."""

    pixels_NLLC: NDArray[np.uint8]
    """RGB, as stored; in memory or memory-mapped."""
    train_rows: NDArray[np.int64]
    """Rows of ``pixels_NLLC`` to train on."""
    validation_VSSC: NDArray[np.uint8]
    """Held-out pictures as the tokenisation tool sees them; at most ``LARGEST_VALIDATION``."""
    validation_ids: list[str]
    """Of each of those."""
    rejected: dict[str, int]
    """Skipped pairs by reason."""


@dataclass(frozen=True)
class Sizes:
    """Sides in pixels."""

    picture: int
    """S: what the network sees."""
    stored: int
    """L: what windows of side S are taken from."""


def digest_of(sources: Sequence[PairSource]) -> str:
    """SHA-256 over names and contents of all parts: what the data set is."""
    parts = [(source, part) for source in sources for part in source.parts()]
    lines = [
        f"{part.name} {source.digest(part)}\n"
        for source, part in tqdm(parts, desc="hashing data", unit="part", mininterval=1.0)
    ]
    return sha256_bytes("".join(lines).encode("utf-8"))


def load(
    sources: Sequence[PairSource],
    sizes: Sizes,
    fraction: float,
    cache_stem: Path,
    *,
    always_file: bool,
    memory_limit: int = MEMORY_LIMIT_BYTES,
) -> Pictures:
    """Decode every picture once, and split.

    Args:
        sources: where the pictures are; pairs without a caption count if a source gives them.
        sizes: sides they are brought to.
        fraction: share of held-out pictures; see :func:`split`.
        cache_stem: ``STEM.bin``, ``STEM.views.npy`` and ``STEM.json`` hold the pictures if they go
            to a file; the stem must name data set, sizes and fraction, because existing files are
            taken as they are.
        always_file: use the file even if memory would do, so that other processes can map it.
        memory_limit: bytes of decoded pictures kept in memory.

    Raises:
        DataError: no picture could be decoded, or fewer than two different ids.
    """
    if not cache_stem.with_suffix(".json").is_file():
        found = _decode_all(sources, sizes, fraction, cache_stem, always_file, memory_limit)
        if found is not None:
            return found
    return open_cache(cache_stem, sizes, fraction)


def _decode_all(
    sources: Sequence[PairSource],
    sizes: Sizes,
    fraction: float,
    cache_stem: Path,
    always_file: bool,
    memory_limit: int,
) -> Pictures | None:
    """The pictures, if memory holds them; else None, and the cache's files are complete."""
    held: list[NDArray[np.uint8]] = []
    ids: list[str] = []
    views: dict[int, NDArray[np.uint8]] = {}
    rejected: Counter[str] = Counter()
    with ExitStack() as stack:
        file = None
        for identity, data, pixels in _decoded(sources, sizes.stored, rejected):
            if _hash(identity) < fraction and len(views) < LARGEST_VALIDATION:
                views[len(ids)] = images.decode(data, sizes.picture)
            ids.append(identity)
            if file is None and (always_file or len(ids) * pixels.nbytes > memory_limit):
                cache_stem.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(replacing(cache_stem.with_suffix(".bin")))
                for earlier in held:
                    file.write(earlier.tobytes())
                held.clear()
            if file is None:
                held.append(pixels)
            else:
                file.write(pixels.tobytes())
        if not ids:
            counts = ", ".join(f"{n} x {reason}" for reason, n in rejected.items()) or "no pairs"
            folders = sorted({str(p.path.parent) for source in sources for p in source.parts()})
            raise DataError(f"{', '.join(folders)}: no usable picture ({counts})")
    if file is None:
        return _pictures(np.stack(held), ids, views, sizes, fraction, dict(rejected))
    pixels_NLLC = _map(cache_stem, len(ids), sizes)
    found = _pictures(pixels_NLLC, ids, views, sizes, fraction, dict(rejected))
    with replacing(cache_stem.with_suffix(".views.npy")) as file:
        np.save(file, found.validation_VSSC)
    # Last: it says that the others are whole.
    write_json_with_digest(
        cache_stem.with_suffix(".json"), {"ids": ids, "rejected": dict(rejected)}
    )
    return None


def open_cache(cache_stem: Path, sizes: Sizes, fraction: float) -> Pictures:
    """Map the pictures that :func:`load` wrote to files."""
    about = read_json_with_digest(cache_stem.with_suffix(".json"))
    ids: list[str] = about["ids"]
    pixels_NLLC = _map(cache_stem, len(ids), sizes)
    views = np.load(cache_stem.with_suffix(".views.npy"))
    train_rows, held_out = split(ids, fraction)
    shown = held_out[:LARGEST_VALIDATION]
    return Pictures(pixels_NLLC, train_rows, views, [ids[row] for row in shown], about["rejected"])


def _pictures(
    pixels_NLLC: NDArray[np.uint8],
    ids: list[str],
    views: dict[int, NDArray[np.uint8]],
    sizes: Sizes,
    fraction: float,
    rejected: dict[str, int],
) -> Pictures:
    train_rows, held_out = split(ids, fraction)
    shown = held_out[:LARGEST_VALIDATION]
    # A picture that only the smallness of the data set put here has no view of its own.
    chosen = [
        views[row] if row in views else images.shrink(pixels_NLLC[row], sizes.picture)
        for row in shown.tolist()
    ]
    return Pictures(pixels_NLLC, train_rows, np.stack(chosen), [ids[r] for r in shown], rejected)


def _map(cache_stem: Path, count: int, sizes: Sizes) -> NDArray[np.uint8]:
    shape = (count, sizes.stored, sizes.stored, 3)
    path = cache_stem.with_suffix(".bin")
    if not path.is_file() or path.stat().st_size != np.prod(shape, dtype=np.int64):
        raise DataError(f"{path}: does not have the size its .json states; delete its folder")
    return np.memmap(path, np.uint8, "r", shape=shape)


def split(ids: list[str], fraction: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows for training and for validation, by a hash of each id; pictures keep their side when
    others are added.  If a side would be empty, the lowest or highest hash is moved there.

    Raises:
        DataError: fewer than two different ids.
    """
    if len(set(ids)) < 2:
        raise DataError(
            f"{len(ids)} usable picture(s) with {len(set(ids))} different id(s): training needs at "
            "least 2, one of them for validation"
        )
    hashes = np.array([_hash(identity) for identity in ids])
    held_out = hashes < fraction
    if not held_out.any():
        held_out = hashes == hashes.min()
    elif held_out.all():
        held_out = hashes != hashes.max()
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def training_batch(
    pictures: Pictures,
    step: int,
    *,
    image_size: int,
    batch_size: int,
    seed: int,
    flip: bool,
    part: tuple[int, int] = (0, 1),
) -> NDArray[np.uint8]:
    """Pictures of one step, ``[B, S, S, 3]``, contiguous.

    Args:
        pictures: the data set.
        step: 0 for the first.
        image_size: S; from pictures that are stored larger, windows at random places are taken.
        batch_size: pictures over all processes.
        seed: with ``step``, all that decides order, windows and flips.  Each epoch has its own
            permutation.
        flip: mirror about half of them, left to right.
        part: (rank, number of processes); the parts in rank order are the whole batch.
    """
    start, stop = part_of_batch(batch_size, part)
    sample = step * batch_size + np.arange(start, stop, dtype=np.int64)
    count = len(pictures.train_rows)
    epochs = sample // count
    keys = np.array([derive_key(seed, 1, int(epoch)) for epoch in epochs], dtype=np.uint64)
    rows = pictures.train_rows[permute(sample % count, count, keys)]
    batch_BSSC = np.empty((len(rows), image_size, image_size, 3), dtype=np.uint8)
    places = pictures.pixels_NLLC.shape[1] - image_size + 1
    for index, row in enumerate(rows):
        top, left = divmod(int(derive_key(seed, 3, int(sample[index]))) % places**2, places)
        window = pictures.pixels_NLLC[row, top : top + image_size, left : left + image_size]
        mirrored = flip and int(derive_key(seed, 2, int(sample[index]))) & 1
        batch_BSSC[index] = window[:, ::-1] if mirrored else window
    return batch_BSSC


def part_of_batch(batch_size: int, part: tuple[int, int]) -> tuple[int, int]:
    """First picture, and the one after the last, of (rank, number of processes)."""
    rank, size = part
    return rank * batch_size // size, (rank + 1) * batch_size // size


def _decoded(
    sources: Sequence[PairSource], size: int, rejected: Counter[str]
) -> Iterator[tuple[str, bytes, NDArray[np.uint8]]]:
    """Id, file and pixels of each picture that can be decoded."""
    with tqdm(desc="decoding pictures", unit="pic", mininterval=1.0) as bar:
        for pair in _pairs(sources):
            bar.update(1)
            if isinstance(pair, Rejected):
                rejected[pair.reason] += 1
                continue
            try:
                pixels = images.decode(pair.image, size)
            except DataError as error:
                logger.warning("%s %s: skipped: %s", pair.source, pair.id, error)
                rejected["bad image"] += 1
                continue
            yield pair.id, pair.image, pixels


def _pairs(sources: Sequence[PairSource]) -> Iterator[RawPair | Rejected]:
    for source in sources:
        for part in source.parts():
            yield from source.read(part)


def _hash(identity: str) -> float:
    """Uniform in [0, 1)."""
    head = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).digest()[:6]
    return int.from_bytes(head, "big") / 2.0**48
