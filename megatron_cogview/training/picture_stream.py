"""Pictures of a folder of tars, decoded once, and the order in which training sees them.

The order is a pure function of (seed, step): nothing is stored to resume it, and every process
computes the same global batch and takes its part.  Captions play no role here.

Shapes: N pictures, B batch, S side in pixels, C = 3.
"""

import hashlib
import logging
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_cogview.configs.errors import DataError
from megatron_cogview.data import images
from megatron_cogview.data.permutation import derive_key, permute
from megatron_cogview.data.raw import (
    DAMAGED,
    MAX_IMAGE_BYTES,
    RawPair,
    Rejected,
    WebDatasetTars,
    _Group,
)
from megatron_cogview.storage.atomic import replacing
from megatron_cogview.storage.digest import (
    read_json_with_digest,
    sha256_bytes,
    sha256_file,
    write_json_with_digest,
)

logger = logging.getLogger(__name__)

MEMORY_LIMIT_BYTES = 2 * 2**30
"""Decoded pictures up to here stay in memory; more go to a memory-mapped file."""

_CAPTION_TROUBLE = (
    "no json",
    "invalid json",
    "no caption",
    "caption is not text",
    "caption is not valid Unicode",
)


class PictureTars(WebDatasetTars):
    """A folder of tars of which only the pictures matter: pairs without a caption are taken too."""

    def _pair(
        self, tar: tarfile.TarFile, source: str, key: str, group: _Group
    ) -> RawPair | Rejected:
        pair = super()._pair(tar, source, key, group)
        if isinstance(pair, RawPair) or pair.reason not in _CAPTION_TROUBLE or group.image is None:
            return pair
        if group.image.size > MAX_IMAGE_BYTES:
            return Rejected(pair.id, "file too large", source, f"image {group.image.size} bytes")
        try:
            file = tar.extractfile(group.image)
            data = file.read() if file is not None else b""
        except DAMAGED:
            data = b""
        if len(data) != group.image.size:
            return Rejected(pair.id, "truncated image", source)
        return RawPair(pair.id, data, "", source)


@dataclass(frozen=True)
class Pictures:
    """All usable pictures of a data set and their split."""

    pixels_NSSC: NDArray[np.uint8]
    """RGB; in memory or memory-mapped."""
    ids: list[str]
    """Of each picture."""
    train_rows: NDArray[np.int64]
    """Rows of ``pixels_NSSC`` to train on."""
    validation_rows: NDArray[np.int64]
    """Rows kept out of training."""
    rejected: dict[str, int]
    """Skipped pairs by reason."""


def digest_of(shards: list[Path]) -> str:
    """SHA-256 over names and contents of the tars: what the data set is."""
    lines = [
        f"{path.name} {sha256_file(path)}\n"
        for path in tqdm(shards, desc="hashing tars", unit="tar", mininterval=1.0)
    ]
    return sha256_bytes("".join(lines).encode("utf-8"))


def decode_all(
    source: WebDatasetTars,
    image_size: int,
    cache_stem: Path,
    *,
    always_file: bool,
    memory_limit: int = MEMORY_LIMIT_BYTES,
) -> tuple[NDArray[np.uint8], list[str], dict[str, int]]:
    """Decode every picture once.

    Args:
        source: where the pictures are.
        image_size: side S they are brought to.
        cache_stem: ``STEM.bin`` and ``STEM.json`` hold the pictures if they go to a file; the stem
            must name data set and size, because an existing pair is taken as it is.
        always_file: use the file even if memory would do, so that other processes can map it.
        memory_limit: bytes of decoded pictures kept in memory.

    Returns:
        pixels ``[N, S, S, 3]``, ids, and the number of skipped pairs by reason.

    Raises:
        DataError: no picture could be decoded.
    """
    if _is_complete(cache_stem):
        return open_cache(cache_stem, image_size)
    held: list[NDArray[np.uint8]] = []
    ids: list[str] = []
    rejected: Counter[str] = Counter()
    with ExitStack() as stack:
        file = None
        for identity, pixels in _decoded(source, image_size, rejected):
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
            raise DataError(f"{source.folder}: no usable picture ({counts})")
    if file is None:
        return np.stack(held), ids, dict(rejected)
    write_json_with_digest(
        cache_stem.with_suffix(".json"), {"ids": ids, "rejected": dict(rejected)}
    )
    return open_cache(cache_stem, image_size)


def open_cache(
    cache_stem: Path, image_size: int
) -> tuple[NDArray[np.uint8], list[str], dict[str, int]]:
    """Map the pictures that :func:`decode_all` wrote to a file."""
    about = read_json_with_digest(cache_stem.with_suffix(".json"))
    shape = (len(about["ids"]), image_size, image_size, 3)
    path = cache_stem.with_suffix(".bin")
    if path.stat().st_size != np.prod(shape, dtype=np.int64):
        raise DataError(f"{path}: does not have the size its .json states; delete both")
    return np.memmap(path, np.uint8, "r", shape=shape), about["ids"], about["rejected"]


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
    batch_size: int,
    seed: int,
    flip: bool,
    part: tuple[int, int] = (0, 1),
) -> NDArray[np.uint8]:
    """Pictures of one step, ``[B, S, S, 3]``, contiguous.

    Args:
        pictures: the data set.
        step: 0 for the first.
        batch_size: pictures over all processes.
        seed: with ``step``, all that decides order and flips.  Each epoch has its own permutation.
        flip: mirror about half of them, left to right.
        part: (rank, number of processes); the parts in rank order are the whole batch.
    """
    rank, size = part
    start, stop = rank * batch_size // size, (rank + 1) * batch_size // size
    sample = step * batch_size + np.arange(start, stop, dtype=np.int64)
    count = len(pictures.train_rows)
    epochs = sample // count
    keys = np.array([derive_key(seed, 1, int(epoch)) for epoch in epochs], dtype=np.uint64)
    rows = pictures.train_rows[permute(sample % count, count, keys)]
    batch_BSSC = pictures.pixels_NSSC[rows]
    if flip:
        coin = np.array([int(derive_key(seed, 2, int(s))) & 1 for s in sample], dtype=bool)
        batch_BSSC[coin] = batch_BSSC[coin][:, :, ::-1]
    return np.ascontiguousarray(batch_BSSC)


def _decoded(
    source: WebDatasetTars, image_size: int, rejected: Counter[str]
) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    with tqdm(desc="decoding pictures", unit="pic", mininterval=1.0) as bar:
        for path in source.shards():
            for pair in source.read(path):
                bar.update(1)
                if isinstance(pair, Rejected):
                    rejected[pair.reason] += 1
                    continue
                try:
                    pixels = images.decode(pair.image, image_size)
                except DataError as error:
                    logger.warning("%s %s: skipped: %s", pair.source, pair.id, error)
                    rejected["bad image"] += 1
                    continue
                yield pair.id, pixels


def _hash(identity: str) -> float:
    """Uniform in [0, 1)."""
    head = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).digest()[:6]
    return int.from_bytes(head, "big") / 2.0**48


def _is_complete(cache_stem: Path) -> bool:
    # The JSON is written last.
    return cache_stem.with_suffix(".json").is_file() and cache_stem.with_suffix(".bin").is_file()
