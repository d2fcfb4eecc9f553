"""checkpoint.inert and checkpoint.index: what was written comes back; nothing does harm."""

import io
import os
import pickle
import pickletools
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cogview.checkpoint import index, inert
from megatron_cogview.checkpoint.boxes import Box
from megatron_cogview.checkpoint.index import DTYPES, FILE, Place, read_index, write_index
from megatron_cogview.configs.errors import CheckpointError

PLACE = Place("__0_0.distcp", 0, 2000)
BOX = Box((0, 2), (3, 1))
ENTRIES = [
    ("a.weight", torch.float32, (3, 4), Box((0, 0), (3, 2)), PLACE),
    ("a.weight", torch.float32, (3, 4), BOX, Place("__1_0.distcp", 64, 1700)),
    ("b", torch.bfloat16, (), Box((), ()), Place("__1_0.distcp", 1792, 1700)),
    ("empty", torch.int64, (0, 5), Box((0, 0), (0, 5)), Place("__1_0.distcp", 3840, 900)),
]


def written(folder: Path) -> bytes:
    path = folder / "written"
    path.unlink(missing_ok=True)
    write_index(path, ENTRIES, {"extra/shard_0_1": PLACE})
    return path.read_bytes()


def read(folder: Path, data: bytes) -> Any:
    (folder / FILE).write_bytes(data)
    return read_index(folder / FILE)


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    tensors = read(tmp_path, written(tmp_path))
    assert set(tensors) == {"a.weight", "b", "empty"}
    for key, dtype, shape, box, place in ENTRIES:
        assert (tensors[key].dtype, tensors[key].shape) == (dtype, shape)
        assert (box, place) in tensors[key].parts
    # torch's own reader sees the same, and the objects besides.
    theirs = pickle.loads(written(tmp_path))
    assert set(theirs.state_dict_metadata) == {*tensors, "extra/shard_0_1"}


@pytest.mark.parametrize("name", DTYPES)
def test_every_type(name: str, tmp_path: Path) -> None:
    write_index(tmp_path / FILE, [("x", DTYPES[name], (3, 4), BOX, PLACE)], {})
    assert read_index(tmp_path / FILE)["x"].dtype == getattr(torch, name)


def test_a_part_that_is_written_twice_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.weight is written twice"):
        write_index(tmp_path / FILE, [ENTRIES[0], ENTRIES[0]], {})


def test_no_more_parts_are_written_than_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "MAX_PARTS", 500)
    parts = [
        ("x", torch.float32, (501, 4), Box((row, 0), (1, 4)), Place(f"__{row}_0.distcp", row, 9))
        for row in range(501)
    ]
    with pytest.raises(ValueError, match="501 parts, and no more than 500"):
        write_index(tmp_path / FILE, parts, {})
    # At the real bounds the steps that reading takes are the narrower one.
    write_index(tmp_path / FILE, parts[:500], {})
    steps = sum(1 for _ in pickletools.genops((tmp_path / FILE).read_bytes()))
    assert steps / 500 < inert.MAX_OPCODES / 150_000
    assert (tmp_path / FILE).stat().st_size / 500 < inert.MAX_BYTES / 150_000


def text(value: str) -> bytes:
    """The opcode that pushes a text."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def called(module: str, name: str, *arguments: str) -> bytes:
    """A pickle that calls a function with texts."""
    values = b"".join(text(each) for each in arguments)
    return b"\x80\x04" + text(module) + text(name) + b"\x93(" + values + b"tR."


def attacks(command: str) -> dict[str, bytes]:
    """Pickles that run ``command``, or would if their names were looked up."""
    line = command.encode()
    return {
        "os.system": called("os", "system", command),
        "posix.system": called("posix", "system", command),
        "subprocess.Popen": called("subprocess", "Popen", "/bin/sh"),
        "builtins.eval": called("builtins", "eval", f"__import__('os').system({command!r})"),
        "builtins.exec": called("builtins", "exec", "pass"),
        "builtins.getattr": called("builtins", "getattr", "a", "b"),
        "torch.load": called("torch", "load", "/x"),
        "torch.storage._load_from_bytes": called("torch.storage", "_load_from_bytes", "x"),
        "torch.serialization.load": called("torch.serialization", "load", "x"),
        "os.system by line": b"cos\nsystem\n(X" + struct.pack("<I", len(line)) + line + b"tR.",
        "posix.system by INST": b"(X" + struct.pack("<I", len(line)) + line + b"iposix\nsystem\n.",
        "posix.system by OBJ": b"(cposix\nsystem\n" + text(command) + b"o.",
        "nested": b"\x80\x04}" + text("a") + b"]" + called("os", "system", command)[2:-1] + b"as.",
        "dotted": called("torch.distributed.checkpoint.metadata", "os.system", command),
        "dotted module": b"ctorch.distributed.checkpoint.metadata\npickle.loads\n)R.",
    }


@pytest.mark.parametrize("kind", attacks(""))
def test_foreign_names_are_named_and_nothing_runs(kind: str, tmp_path: Path) -> None:
    sentinel = tmp_path / "ran"
    command = f"touch {sentinel}"
    with pytest.raises(CheckpointError) as refused:
        read(tmp_path, attacks(command)[kind])
    if kind.count(".") and " " not in kind:
        assert kind in str(refused.value)
        assert "nothing was run" in str(refused.value)
    assert not sentinel.exists()
    if kind in ("os.system", "posix.system by INST", "posix.system by OBJ", "nested"):
        # The attacks are real ones.
        pickle.loads(attacks(command)[kind])
        assert sentinel.exists()


@pytest.mark.parametrize(
    ("opcode", "data"),
    {
        "PERSID": b"Pname\n.",
        "BINPERSID": text("name") + b"Q.",
        "EXT1": b"\x82\x01.",
        "EXT2": b"\x83\x01\x00.",
        "EXT4": b"\x84\x01\x00\x00\x00.",
        "NEWOBJ_EX": b"ccollections\nOrderedDict\n)}\x92.",
        "INST": b"(icollections\nOrderedDict\n.",
        "OBJ": b"(ccollections\nOrderedDict\no.",
        "DUP": b")2.",
        "POP": b")0.",
        "NEXT_BUFFER": b"\x97.",
        "EMPTY_SET": b"\x8f.",
        "STRING": b"S'os'\n.",
        "LONG4": b"\x8b\x01\x00\x00\x00\x01.",
    }.items(),
)
def test_other_opcodes_are_refused(opcode: str, data: bytes) -> None:
    with pytest.raises(CheckpointError, match=f"the opcode {opcode} does not belong"):
        inert.loads(data)


@pytest.mark.parametrize(
    "data",
    {
        "empty": b"",
        "only an end": b".",
        "two values": b"NN.",
        "open mark": b"(.",
        "call of a call": b"ccollections\nOrderedDict\n)R)R.",
        "call of a list": b"])R.",
        "state of a list": b"]}b.",
        "state twice": b"ccollections\nOrderedDict\n)R}b}b.",
        "item of a tuple": b")Na.",
        "pair of a list": b"]NNs.",
        "odd pairs": b"}(Nu.",
        "unknown memo": b"h\x05.",
        "memo of nothing": b"q\x00.",
        "name of a number": b"K\x01K\x02\x93.",
        "huge text": b"\x8d" + struct.pack("<Q", 1 << 62) + b"x.",
        "huge bytes": b"B" + struct.pack("<I", 0xFFFFFFFF) + b"x.",
        "huge frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b".",
        "negative length": b"\x8b\xff\xff\xff\xff.",
        "bad unicode": b"X\x02\x00\x00\x00\xff\xff.",
        "long integer": b"\x8a\x20" + b"\x7f" * 32 + b".",
        "no number": b"Iabc\n.",
        "trailing": b"N.N",
    }.items(),
    ids=lambda case: case[0],
)
def test_damage_is_an_error_and_never_another(data: tuple[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        read(tmp_path, data[1])


def test_a_text_that_is_a_thousand_tuples_is_not_written_out() -> None:
    """Tuples of the same tuples: small on the disk, without end when written out."""
    laughs = b")" + b"".join(b"q\x00h\x00\x86" for _ in range(200))
    for data in (laughs + text("system") + b"\x93.", text("os") + laughs + b"\x93."):
        with pytest.raises(CheckpointError, match="<tuple>"):
            inert.loads(data)
    root = b"ctorch.distributed.checkpoint.metadata\nMetadata\n)R}" + text("storage_data")
    for data in (root + laughs + b"sb.", root + b"}" + laughs + b"Nssb."):
        with pytest.raises(CheckpointError, match=r"in the place of|tuple"):
            index._index(inert.loads(data))


def test_deep_nesting(tmp_path: Path) -> None:
    for data in (b"]" * 50_000 + b"a" * 49_999 + b".", b")" + b"\x85" * 50_000 + b"."):
        with pytest.raises(CheckpointError):
            read(tmp_path, data)
    assert inert.loads(b")" + b"\x85" * 50_000 + b".")


def test_cut_anywhere(tmp_path: Path) -> None:
    data = written(tmp_path)
    for length in range(len(data)):
        with pytest.raises(CheckpointError):
            index._index(inert.loads(data[:length]))


def test_any_byte_changed(tmp_path: Path) -> None:
    """Either refused or read; the hash tells them apart from what was written."""
    data = written(tmp_path)
    refused = 0
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= (1, 0x80, 0xFF)[position % 3]
        try:
            index._index(inert.loads(bytes(changed)))
        except CheckpointError:
            refused += 1
    assert refused > len(data) / 2


def replaced(data: bytes, old: str, new: str) -> bytes:
    """The pickle with another text in it, at any length."""
    output, last = io.BytesIO(), 0
    for opcode, argument, position in pickletools.genops(data):
        assert position is not None
        if argument == old and opcode.name == "SHORT_BINUNICODE":
            output.write(data[last:position] + text(new))
            last = position + 2 + len(old.encode())
    output.write(data[last:])
    # Frames would have other lengths now.
    return b"".join(
        output.getvalue()[start:end]
        for name, start, end in _spans(output.getvalue())
        if name != "FRAME"
    )


def _spans(data: bytes) -> list[tuple[str, int, int]]:
    steps = [(op.name, pos) for op, _, pos in pickletools.genops(data)]
    ends = [pos for _, pos in steps[1:]] + [len(data)]
    return [(name, pos, end) for (name, pos), end in zip(steps, ends, strict=True)]  # type: ignore[misc]


@pytest.mark.parametrize(
    "name",
    [
        *("/etc/passwd", "..", ".", "", "../x.distcp", "a/../../x", "a\\b", "a\0b"),
        *("sub/x.distcp", "x" * 300, ".metadata", "猫.distcp", "a\nb"),
    ],
)
def test_paths_out_of_the_folder(name: str, tmp_path: Path) -> None:
    data = replaced(written(tmp_path), PLACE.file, "renamed.distcp")
    assert read(tmp_path, data)["a.weight"].parts[0][1].file == "renamed.distcp"
    with pytest.raises(CheckpointError, match="is no file of its own folder"):
        read(tmp_path, replaced(written(tmp_path), PLACE.file, name))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        *(("storage_data", "storage"), ("state_dict_metadata", "x"), ("chunks", "parts")),
        *(("properties", "p"), ("size", "s"), ("offsets", "o"), ("sizes", "z"), ("fqn", "f")),
        *(("relative_path", "r"), ("offset", "o"), ("length", "l"), ("a.weight", "other")),
        *(("float32", "float31"), ("float32", "device"), ("Metadata", "TensorProperties")),
        *(("ChunkStorageMetadata", "MetadataIndex"), ("TensorStorageMetadata", "Metadata")),
    ],
)
def test_fields_that_are_missing_or_wrong(old: str, new: str, tmp_path: Path) -> None:
    data = replaced(written(tmp_path), old, new)
    try:
        tensors = read(tmp_path, data)
    except CheckpointError:
        return
    assert old in ("state_dict_metadata", "a.weight") and "a.weight" not in tensors


def entries(*parts: tuple[tuple[int, ...], Box]) -> list[Any]:
    return [("x", torch.float32, shape, box, PLACE) for shape, box in parts]


@pytest.mark.parametrize(
    "box",
    [Box((0,), (3,)), Box((0, 0), (4, 4)), Box((4, 4), (1, 0)), Box((1, 1), (1 << 62, 1))],
)
def test_parts_outside_of_their_tensor(box: Box, tmp_path: Path) -> None:
    write_index(tmp_path / FILE, entries(((3, 4), box)), {})
    with pytest.raises(CheckpointError, match="lies outside of it"):
        read_index(tmp_path / FILE)


def test_too_many_dimensions(tmp_path: Path) -> None:
    write_index(tmp_path / FILE, entries(((1,) * 9, Box((0,) * 9, (1,) * 9))), {})
    with pytest.raises(CheckpointError, match="a shape that is none"):
        read_index(tmp_path / FILE)


def test_parts_that_many_tensors_share_are_not_read_for_each(tmp_path: Path) -> None:
    """A list of 20,000 parts in each of 20,000 tensors, all the same list."""
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    number, zero = 20_000, torch.Size([0])
    chunk = dcp.ChunkStorageMetadata(zero, torch.Size([1]))
    tensor = dcp.TensorProperties(torch.float32)
    shared = dcp.TensorStorageMetadata(tensor, torch.Size([1]), [chunk] * number)
    keys = [str(n) for n in range(number)]
    place = _StorageInfo("f", 0, 1)
    places = {dcp.MetadataIndex(key, zero): place for key in keys}
    metadata = dcp.Metadata(dict.fromkeys(keys, shared), storage_data=places)
    begin = time.process_time()
    with pytest.raises(CheckpointError, match="twice"):
        read(tmp_path, pickle.dumps(metadata))
    assert time.process_time() - begin < 10


def test_attributes_that_many_objects_share_are_not_read_for_each(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    place = _StorageInfo("f", 0, 1)
    place.__dict__.update({f"x{n}": n for n in range(20)})
    metadata = dcp.Metadata({}, storage_data={dcp.MetadataIndex("a", torch.Size([0])): place})
    with pytest.raises(CheckpointError, match="23 attributes"):
        read(tmp_path, pickle.dumps(metadata))


def _link(path: Path) -> None:
    path.symlink_to("/etc/passwd")


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, _link, lambda path: None])
def test_no_ordinary_file(make: Callable[[Path], Any], tmp_path: Path) -> None:
    make(tmp_path / FILE)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_index(tmp_path / FILE)


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inert, "MAX_BYTES", 100)
    with pytest.raises(CheckpointError, match="at most 100 are read"):
        read(tmp_path, bytes(200))
    monkeypatch.setattr(inert, "MAX_OPCODES", 10)
    with pytest.raises(CheckpointError, match="more than 10 steps"):
        inert.loads(b")" * 50)
