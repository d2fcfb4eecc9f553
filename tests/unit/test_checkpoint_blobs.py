"""checkpoint.blobs, snapshot and reader: values bit for bit, or a refusal."""

import io
import os
import pickle
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cogview.checkpoint import blobs
from megatron_cogview.checkpoint.blobs import BlobFile, BlobReader
from megatron_cogview.checkpoint.boxes import Box
from megatron_cogview.checkpoint.index import DTYPES, FILE, Place, write_index
from megatron_cogview.checkpoint.reader import CheckpointReader
from megatron_cogview.checkpoint.snapshot import Piece, Snapshot
from megatron_cogview.configs.errors import CheckpointError


def bits(value: torch.Tensor) -> bytes:
    return value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def values(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random bits, NaNs and all."""
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8)
    return (raw.view(dtype) if size else torch.empty(0, dtype=dtype)).view(shape)


def stored(folder: Path, *tensors: torch.Tensor | None) -> list[Place]:
    with BlobFile(folder / "blobs") as file:
        places = [file.add(tensor) for tensor in tensors]
        file.finish()
    return places


@pytest.mark.parametrize("name", DTYPES)
def test_every_type_and_shape_bit_for_bit(name: str, tmp_path: Path) -> None:
    dtype = DTYPES[name]
    shapes: list[tuple[int, ...]] = [(), (1,), (0,), (3, 0, 2), (5, 7), (1, 2, 3, 4), (70_001,)]
    tensors = [values(dtype, *shape) for shape in shapes]
    reader = BlobReader(tmp_path)
    for tensor, place in zip(tensors, stored(tmp_path, *tensors), strict=True):
        assert place.start % blobs.ALIGNMENT == 0
        again = reader.read(place, dtype, tensor.numel()).view(tensor.shape)
        assert again.dtype == dtype
        assert not tensor.numel() or bits(again) == bits(tensor)
        with (tmp_path / place.file).open("rb") as file:
            file.seek(place.start)
            theirs = torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
        assert theirs.shape == tensor.shape and theirs.dtype == dtype


def placed(folder: Path, data: bytes, before: int = 0) -> Place:
    (folder / "blobs").write_bytes(bytes(before) + data)
    return Place("blobs", before, len(data))


def saved(tensor: torch.Tensor) -> bytes:
    file = io.BytesIO()
    torch.save(tensor, file)
    return file.getvalue()


@pytest.mark.parametrize("before", [1, 2, 3, 63])
def test_values_at_any_byte(before: int, tmp_path: Path) -> None:
    tensor = values(torch.float32, 10)
    place = placed(tmp_path, saved(tensor), before)
    assert bits(BlobReader(tmp_path).read(place, torch.float32, 10)) == bits(tensor)


def archive(
    *members: tuple[str, bytes], how: int = zipfile.ZIP_STORED, comment: bytes = b""
) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as target:
        for name, data in members:
            target.writestr(name, data)
        target.comment = comment
    return file.getvalue()


FORTY = bytes(range(40))


@pytest.mark.parametrize(
    ("data", "message"),
    {
        "compressed": (archive(("a/data/0", bytes(40)), how=zipfile.ZIP_DEFLATED), "compressed"),
        "two members": (archive(("a/data/0", FORTY), ("b/data/0", FORTY)), "2 members"),
        "none": (archive(("a/data/1", FORTY)), "0 members"),
        "too long": (archive(("a/data/0", FORTY + b"x")), "41 bytes of values"),
        "too short": (archive(("a/data/0", FORTY[1:]), ("pad", bytes(9))), "39 bytes of values"),
        "a comment": (archive(("a/data/0", FORTY), comment=b"x" * 9), "does not end"),
        "no archive": (bytes(100), "does not end"),
        "a pickle": (pickle.dumps(FORTY) + bytes(50), "does not end"),
    }.values(),
)
def test_other_archives_are_refused(data: bytes, message: str, tmp_path: Path) -> None:
    place = placed(tmp_path, data)
    with pytest.raises(CheckpointError, match=message):
        BlobReader(tmp_path).read(place, torch.float32, 10)


def test_a_long_list_of_members_is_not_read(tmp_path: Path) -> None:
    """Each of them would take ten times its size in memory."""
    members = [(f"{n}", b"") for n in range(3000)]
    data = archive(("a/data/0", bytes(400_000)), *members)
    place = placed(tmp_path, data)
    with pytest.raises(CheckpointError, match=r"too long|bytes for"):
        BlobReader(tmp_path).read(place, torch.float32, 100_000)
    with pytest.raises(CheckpointError, match="too long"):
        BlobReader(tmp_path).read(place, torch.uint8, len(data) - 100)


def test_a_blob_cut_or_changed_anywhere(tmp_path: Path) -> None:
    tensor = values(torch.float32, 10)
    data = saved(tensor)
    for length in range(len(data)):
        place = placed(tmp_path, data[:length])
        with pytest.raises(CheckpointError):
            BlobReader(tmp_path).read(place, torch.float32, 10)
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= (1, 0x80, 0xFF)[position % 3]
        place = placed(tmp_path, bytes(changed))
        try:
            # Its checksum covers the values; a change of what is beside them may do nothing.
            assert bits(BlobReader(tmp_path).read(place, torch.float32, 10)) == bits(tensor)
        except CheckpointError:
            continue


@pytest.mark.parametrize(
    ("start", "length"),
    [(0, 10_000), (5000, 1500), (0, 10), (1 << 62, 1500), (-1, 1500), (64, 1500)],
)
def test_places_that_lie(start: int, length: int, tmp_path: Path) -> None:
    placed(tmp_path, saved(values(torch.float32, 10)))
    with pytest.raises(CheckpointError):
        BlobReader(tmp_path).read(Place("blobs", start, length), torch.float32, 10)


def _link(path: Path) -> None:
    target = path.parent / "target"
    target.write_bytes(saved(torch.zeros(10)))
    path.symlink_to(target)


@pytest.mark.parametrize(
    "make", [os.mkfifo, Path.mkdir, Path.touch, _link, lambda path: None], ids=str
)
def test_no_ordinary_file(make: Callable[[Path], Any], tmp_path: Path) -> None:
    make(tmp_path / "blobs")
    with pytest.raises(CheckpointError, match="cannot be read"):
        BlobReader(tmp_path).read(Place("blobs", 0, 1500), torch.float32, 10)


def test_a_name_twice_is_not_overwritten(tmp_path: Path) -> None:
    stored(tmp_path, torch.zeros(1))
    with pytest.raises(FileExistsError):
        BlobFile(tmp_path / "blobs")


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "write_some", lambda file, data: file.write(data[:7]))
    tensor = values(torch.float16, 333)
    (place,) = stored(tmp_path, tensor)
    assert bits(BlobReader(tmp_path).read(place, torch.float16, 333)) == bits(tensor)


def pieces(tensor: torch.Tensor, *boxes: Box) -> list[Piece]:
    whole = Box((0,) * tensor.dim(), tuple(tensor.shape))
    return [
        Piece("x", tuple(tensor.shape), box, tensor[box.slices_in(whole)], True) for box in boxes
    ]


def checkpoint(folder: Path, *pieces_of_ranks: list[Piece]) -> CheckpointReader:
    entries = []
    for rank, mine in enumerate(pieces_of_ranks):
        snapshot = Snapshot(with_cuda=False)
        snapshot.take(mine)
        entries += snapshot.write(folder, rank).entries
    write_index(folder / FILE, entries, {})
    return CheckpointReader(folder)


def test_a_snapshot_keeps_what_was(tmp_path: Path) -> None:
    snapshot, tensor = Snapshot(with_cuda=False), values(torch.float32, 6, 4)
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        tensor.copy_(values(torch.float32, 6, 4))
        before = bits(tensor)
        snapshot.take([*pieces(tensor, Box((0, 0), (3, 4)), Box((3, 0), (3, 2)))])
        tensor.zero_()
        written = snapshot.write(folder, 3, ["extra"])
        assert set(written.files) == {"__3_0.distcp"} and set(written.objects) == {"extra"}
        reader = BlobReader(folder)
        first, second = written.entries
        assert bits(reader.read(first[4], torch.float32, 12)) == before[:48]
        assert reader.read(second[4], torch.float32, 6).shape == (6,)


def test_a_snapshot_in_several_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_cogview.checkpoint.snapshot.CHUNK_BYTES", 100)
    tensors = [values(torch.float16, rows, 7) for rows in (2, 5, 1, 30, 2, 0)]
    boxes = [Box((0, 0), tuple(tensor.shape)) for tensor in tensors]
    mine = [
        Piece(str(number), tuple(tensor.shape), box, tensor, True)
        for number, (tensor, box) in enumerate(zip(tensors, boxes, strict=True))
    ]
    snapshot = Snapshot(with_cuda=False)
    snapshot.reserve(mine)
    # Each piece begins at a multiple of 64 bytes; the last one is empty.
    assert [chunk.numel() for chunk in snapshot._chunks] == [28, 70, 14, 420, 64]
    snapshot.take(mine)
    written = snapshot.write(tmp_path, 0)
    reader = BlobReader(tmp_path)
    for tensor, entry in zip(tensors, written.entries, strict=True):
        assert bits(reader.read(entry[4], torch.float16, tensor.numel())) == bits(tensor)


def test_parts_of_any_cut_fill_any_other(tmp_path: Path) -> None:
    tensor = values(torch.float64, 5, 6)
    reader = checkpoint(
        tmp_path,
        pieces(tensor, Box((0, 0), (1, 6)), Box((1, 0), (1, 2))),
        pieces(tensor, Box((1, 2), (1, 4)), Box((2, 0), (3, 6))),
    )
    assert bits(reader.whole("x")) == bits(tensor)
    for box in (Box((0, 0), (5, 3)), Box((1, 1), (3, 4)), Box((4, 5), (1, 1)), Box((2, 0), (0, 6))):
        target = values(torch.float64, *box.sizes)
        reader.fill([Piece("x", (5, 6), box, target, False)])
        assert bits(target) == bits(tensor[box.slices_in(Box((0, 0), (5, 6)))])


def test_holes_overlaps_and_strangers_are_refused(tmp_path: Path) -> None:
    tensor = values(torch.float32, 4, 4)
    cuts = {
        "hole": [Box((0, 0), (2, 4)), Box((3, 0), (1, 4))],
        "overlap": [Box((0, 0), (3, 4)), Box((1, 0), (3, 4))],
        # As many values as are wanted, and still a hole.
        "both": [Box((0, 0), (2, 4)), Box((1, 0), (2, 4))],
    }
    for name, boxes in cuts.items():
        (tmp_path / name).mkdir()
        reader = checkpoint(tmp_path / name, pieces(tensor, *boxes))
        with pytest.raises(CheckpointError, match=r"lacks some|overlap|too few"):
            reader.whole("x")
        with pytest.raises(CheckpointError, match=r"lacks some|overlap"):
            reader.fill(pieces(tensor, Box((0, 0), (4, 4))))
    with pytest.raises(CheckpointError, match="holds no 'y'"):
        reader.whole("y")
    with pytest.raises(CheckpointError, match="has shape"):
        reader.fill([Piece("x", (4, 5), Box((0, 0), (4, 4)), tensor, False)])


BOUNDED = """
import resource, sys, torch
from pathlib import Path
from megatron_cogview.checkpoint.reader import CheckpointReader
from megatron_cogview.configs.errors import CheckpointError
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (128 << 20)
resource.setrlimit(resource.RLIMIT_AS, (size, size))
for folder in sys.argv[1:]:
    try:
        reader = CheckpointReader(Path(folder))
        reader.whole("x")
    except CheckpointError as error:
        print("refused", error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_declared_sizes_take_no_memory(tmp_path: Path) -> None:
    """Shapes of terabytes in files of kilobytes, read with little memory to spare."""
    huge, real = 1 << 40, Place("blobs", 0, 1500)
    lies: list[list[tuple[Box, tuple[int, ...], Place]]] = [
        [(Box((0,), (huge,)), (huge,), real)],
        [(Box((0,), (huge,)), (huge,), Place("blobs", 0, huge * 4 + 1000))],
        [(Box((n,), (huge,)), (huge * 9,), Place("blobs", 0, huge * 4)) for n in range(0, 9, 1)],
        [(Box((0, 0), (1 << 31, 1 << 31)), (1 << 31, 1 << 31), real)],
        # As large together as it should be, by naming the same bytes again and again.
        [(Box((n * 10,), (10,)), (200_000_000,), real) for n in range(3000)],
        [(Box((0,), (0,)), (huge,), real)],
    ]
    folders = []
    for number, parts in enumerate(lies):
        folder = tmp_path / str(number)
        folder.mkdir()
        placed(folder, saved(values(torch.float32, 10)))
        entries = [("x", torch.float32, shape, box, place) for box, shape, place in parts]
        write_index(folder / FILE, entries, {})
        folders.append(str(folder))
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED, *folders], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    *refused, peak = done.stdout.splitlines()
    assert len(refused) == len(lies)
    mine = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert int(peak) < mine + (128 << 10)
