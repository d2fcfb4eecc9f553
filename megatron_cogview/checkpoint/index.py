"""The index of a checkpoint: which part of which tensor lies where in which file.

On the disk it is ``.metadata``, the pickle that torch's and megatron-core's readers expect.  It is
written with torch's classes and read by :mod:`~megatron_cogview.checkpoint.inert`, which runs
nothing of it.
"""

import os
import pickle
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_cogview.checkpoint import inert
from megatron_cogview.checkpoint.boxes import Box
from megatron_cogview.configs.errors import CheckpointError

FILE = ".metadata"
OPTIMIZER = "optimizer.state"
"""What megatron-core's names of optimizer tensors begin with."""
MASTER = "fp32_param"
"""megatron-core's name of the fp32 copy of a half-precision weight."""
MAX_DIMENSIONS = 8
MAX_FIELDS = 16
"""Attributes of an object, which many objects could share."""
MAX_PARTS = 150_000
"""More are not written, for :mod:`~megatron_cogview.checkpoint.inert` would not read them again: it
takes 71 steps for each.  4,096 ranks with a distributed optimizer write about half as many."""
MAX_TEXT = 1000
"""Characters of a tensor's key."""
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}")

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.bool),
        *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
        *(torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2),
    )
}


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes of a file inside the checkpoint's folder."""

    file: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: list[tuple[Box, Place]] = field(default_factory=list)


Index = dict[str, Stored]
Entry = tuple[str, torch.dtype, tuple[int, ...], Box, Place]
"""Key, type and shape of a tensor, and a part of it with its place."""


def write_index(path: Path, entries: Iterable[Entry], objects: Mapping[str, Place]) -> None:
    """Write ``.metadata``.

    Args:
        path: the file; must not exist yet.
        entries: every part of every tensor.
        objects: further blobs by key, which other readers may ask for.

    Raises:
        ValueError: two parts of a tensor begin in the same place, so that neither can be found, or
            there are more than can be read again.
    """
    tensors: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    for key, dtype, shape, box, place in entries:
        if key not in tensors:
            properties = dcp.TensorProperties(dtype)
            tensors[key] = dcp.TensorStorageMetadata(properties, torch.Size(shape), [])
        offsets = torch.Size(box.offsets)
        if dcp.MetadataIndex(key, offsets) in places:
            raise ValueError(f"{key} is written twice at {box.offsets}")
        tensors[key].chunks.append(dcp.ChunkStorageMetadata(offsets, torch.Size(box.sizes)))
        places[dcp.MetadataIndex(key, offsets)] = _StorageInfo(
            place.file, place.start, place.length
        )
    if len(places) + len(objects) > MAX_PARTS:
        raise ValueError(
            f"a checkpoint of {len(places):,} parts, and no more than {MAX_PARTS:,} can be read "
            "again; save under a layout of fewer ranks"
        )
    for key, place in objects.items():
        tensors[key] = dcp.BytesStorageMetadata()
        places[dcp.MetadataIndex(key)] = _StorageInfo(place.file, place.start, place.length)
    with path.open("xb") as file:
        pickle.dump(dcp.Metadata(tensors, storage_data=places), file)


def read_index(path: Path) -> Index:
    """Tensors of a checkpoint by key; nothing of the file is run.

    Raises:
        CheckpointError: it cannot be read, is damaged, or speaks of anything but tensors in files
            of its own folder.
    """
    # A byte more than is allowed is enough to refuse it.
    data = read_bytes(path, inert.MAX_BYTES + 1)
    try:
        return _index(inert.loads(data))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def open_regular(path: Path) -> int:
    """A descriptor for reading a file that is no link, and nothing that waits or never ends.

    Raises:
        CheckpointError: there is none.
    """
    try:
        # A link could lead anywhere; a pipe would wait for its other end.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise CheckpointError(f"{path}: cannot be read (not a file)")


def read_bytes(path: Path, most: int) -> bytes:
    """The first ``most`` bytes of such a file.

    Raises:
        CheckpointError: it cannot be read.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        try:
            # What is asked for is allocated, also for a file of ten bytes.
            return file.read(min(most, os.fstat(file.fileno()).st_size))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


def _index(root: Any) -> Index:
    fields = _fields(root, "Metadata")
    places: dict[tuple[str, tuple[int, ...]], Place] = {}
    for key, value in _items(fields.get("storage_data")):
        about = _fields(key, "MetadataIndex")
        if about.get("offset") is not None:
            name, offsets = _text(about.get("fqn")), _sizes(about["offset"])
            if (name, offsets) in places:
                raise CheckpointError(f"{name!r} has two places for one part")
            places[name, offsets] = _place(value)
    index: Index = {}
    for key, value in _items(fields.get("state_dict_metadata")):
        if _text(key) in index:
            raise CheckpointError(f"{key!r} stands there twice")
        if _is(value, "TensorStorageMetadata"):
            index[key] = _stored(key, _fields(value, "TensorStorageMetadata"), places)
        elif not _is(value, "BytesStorageMetadata"):
            raise CheckpointError(f"{_text(key)!r} is neither a tensor nor an object")
    return index


def _stored(
    key: str, fields: dict[str, Any], places: dict[tuple[str, tuple[int, ...]], Place]
) -> Stored:
    shape = _sizes(fields.get("size"))
    stored = Stored(_dtype(fields.get("properties")), shape)
    chunks = fields.get("chunks")
    if not isinstance(chunks, list):
        raise CheckpointError(f"{key!r} has no list of parts")
    for chunk in chunks:
        about = _fields(chunk, "ChunkStorageMetadata")
        box = Box(_sizes(about.get("offsets")), _sizes(about.get("sizes")))
        inside = len(box.offsets) == len(box.sizes) == len(shape) and all(
            a + n <= whole for a, n, whole in zip(box.offsets, box.sizes, shape, strict=True)
        )
        # Taken out, or a list of parts that many tensors share would be read for each of them.
        place = places.pop((key, box.offsets), None)
        if not inside or place is None:
            raise CheckpointError(f"{key!r} has a part that lies outside of it, twice, or nowhere")
        stored.parts.append((box, place))
    return stored


def _place(value: Any) -> Place:
    fields = _fields(value, "_StorageInfo")
    name = _text(fields.get("relative_path"))
    if not FILE_NAME.fullmatch(name):
        raise CheckpointError(f"it points to {name!r}, which is no file of its own folder")
    if fields.get("transform_descriptors"):
        raise CheckpointError(f"{name!r} is compressed or otherwise transformed")
    return Place(name, _count(fields.get("offset")), _count(fields.get("length")))


def _dtype(properties: Any) -> torch.dtype:
    state = properties.state if _is(properties, "TensorProperties") else None
    # torch writes a tuple that begins with the type; its constructor's argument is the same.
    first = state[0] if isinstance(state, tuple) and state else None
    if isinstance(first, inert.Name) and first.module == "torch" and first.name in DTYPES:
        return DTYPES[first.name]
    raise CheckpointError("a tensor without a type that is known")


def _is(value: Any, name: str) -> bool:
    return isinstance(value, inert.Made) and value.maker.name == name


def _fields(value: Any, name: str) -> dict[str, Any]:
    """Attributes of an object of a class that is expected in this place."""
    if not _is(value, name):
        raise CheckpointError(f"{type(value).__name__} in the place of a {name}")
    items = _items(value.state)
    if len(items) > MAX_FIELDS:
        raise CheckpointError(f"a {name} with {len(items)} attributes")
    return {_text(key): each for key, each in items}


def _items(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, inert.Pairs):
        return value.items
    if value is None:
        return []
    raise CheckpointError(f"{type(value).__name__} in the place of a dictionary")


def _text(value: Any) -> str:
    if isinstance(value, str) and len(value) <= MAX_TEXT:
        return value
    raise CheckpointError(f"{type(value).__name__} in the place of a text, or a very long one")


def _count(value: Any) -> int:
    if type(value) is int and value >= 0:
        return value
    raise CheckpointError("a size or position that is no count")


def _sizes(value: Any) -> tuple[int, ...]:
    """A ``torch.Size``."""
    if _is(value, "Size") and len(value.arguments) == 1:
        value = value.arguments[0]
        if isinstance(value, tuple) and len(value) <= MAX_DIMENSIONS:
            return tuple(_count(each) for each in value)
    raise CheckpointError("a shape that is none")
