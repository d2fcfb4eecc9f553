"""data.shards: records come back exactly, and damage never comes back at all."""

import hashlib
import io
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from megatron_cogview.configs.errors import DataError
from megatron_cogview.data.shard_set import ShardSet
from megatron_cogview.data.shards import (
    MANIFEST,
    compute_crc32,
    record_dtype,
    shard_name,
    write_manifest,
    write_shard,
)
from megatron_cogview.storage.digest import (
    read_json_with_digest,
    write_json_with_digest,
)

ROOT = Path(__file__).resolve().parents[2]


def random_records(count, sides=(3,), seed=0):
    dtype = record_dtype(sides)
    raw = np.random.default_rng(seed).integers(0, 256, count * dtype.itemsize, dtype=np.uint8)
    records = raw.view(dtype)
    records["text_length"] = 5
    return records


def write_set(folder, counts=(7, 0, 4, 1), sides=(3,)):
    parts = [random_records(n, sides, seed=i) for i, n in enumerate(counts)]
    entries = [write_shard(folder / shard_name(i), part) for i, part in enumerate(parts)]
    about = {
        "layout": {"codes_per_side": list(sides), "longest_text": 5},
        "tokenizers": {"text": {"fingerprint": "t" * 64}, "image": {"fingerprint": "i" * 64}},
    }
    write_manifest(folder, entries, about)
    return np.concatenate([np.load(folder / entry["name"]) for entry in entries])


@pytest.mark.parametrize("sides", [(3,), (2, 3), (32,)])
def test_records_come_back_in_any_order(tmp_path, sides):
    expected = write_set(tmp_path, sides=sides)
    for verify in (True, False):
        shards = ShardSet(tmp_path, verify_crc=verify)
        assert len(shards) == 12
        assert shards.codes_per_side == sides
        for indices in ([11, 0, 6, 7, 7, 10], list(range(12)), []):
            assert shards.read(np.array(indices, dtype=np.int64)).tobytes() == (
                expected[indices].tobytes() if indices else b""
            )
        for wrong in (-1, 12):
            with pytest.raises(IndexError):
                shards.read(np.array([wrong]))


def test_record_layout_is_packed_and_as_documented():
    dtype = record_dtype((16, 32))
    assert dtype.itemsize == 128 + 2 + 2 * 256 + 2 * 1024 + 8 + 4
    assert dtype.names == ("text", "text_length", "image0", "image1", "sample_id", "crc32")
    assert all(dtype[name].base.byteorder in "<=" for name in dtype.names)


def test_crc_is_zlibs_over_all_but_the_last_four_bytes():
    records = random_records(5)
    sums = [zlib.crc32(r.tobytes()[:-4]) for r in records]
    assert compute_crc32(records).tolist() == sums
    assert compute_crc32(records[::2]).tolist() == sums[::2]


def test_shard_file_is_plain_npy(tmp_path):
    records = random_records(4)
    entry = write_shard(tmp_path / "shard-000000.npy", records)
    data = (tmp_path / "shard-000000.npy").read_bytes()
    split = entry.pop("split")
    assert entry == {
        "name": "shard-000000.npy",
        "records": 4,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    back = np.load(tmp_path / "shard-000000.npy")
    # Sorted by id, for the split; nothing else has changed.
    records["crc32"] = compute_crc32(records)
    assert back.tobytes() == records[np.argsort(records["sample_id"])].tobytes()
    # NumPy's own writer would have written the same file.
    buffer = io.BytesIO()
    np.save(buffer, back)
    assert buffer.getvalue() == data
    assert split[0] == 0
    assert split[-1] == 4
    assert split == sorted(split)


def test_no_single_bit_flip_is_ever_returned(tmp_path):
    expected = write_set(tmp_path, counts=(2,))
    path = tmp_path / shard_name(0)
    data = path.read_bytes()
    header = len(data) - expected.nbytes
    rng = np.random.default_rng(0)
    bits = [*range(0, header * 8, 5), *rng.integers(header * 8, len(data) * 8, 400).tolist()]
    indices = np.arange(2)
    for bit in bits:
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            back = ShardSet(tmp_path).read(indices)
        except DataError:
            continue
        raise AssertionError(
            f"bit {bit} came back unnoticed: {back.tobytes() == expected.tobytes()}"
        )


def test_crc_error_names_shard_and_record(tmp_path):
    write_set(tmp_path)
    path = tmp_path / shard_name(2)
    data = bytearray(path.read_bytes())
    data[-3 * record_dtype((3,)).itemsize] ^= 1
    path.write_bytes(data)
    shards = ShardSet(tmp_path)
    shards.read(np.array([0, 7, 9]))
    with pytest.raises(DataError, match=r"shard-000002.npy: record 1 fails"):
        shards.read(np.array([0, 8]))
    ShardSet(tmp_path, verify_crc=False).read(np.array([8]))


def test_truncation_and_missing_files_are_found_at_open(tmp_path):
    write_set(tmp_path)
    path = tmp_path / shard_name(0)
    data = path.read_bytes()
    for length in [0, *range(1, len(data), 64), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(DataError, match="truncated"):
            ShardSet(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"shard-000000.npy: cannot be read"):
        ShardSet(tmp_path)


def test_manifest_errors(tmp_path):
    with pytest.raises(DataError, match="no finished token shards"):
        ShardSet(tmp_path)
    write_set(tmp_path)
    manifest = read_json_with_digest(tmp_path / MANIFEST)
    write_json_with_digest(tmp_path / MANIFEST, manifest | {"version": 1})
    with pytest.raises(DataError, match="format version 1"):
        ShardSet(tmp_path)
    outside = [manifest["shards"][0] | {"name": "../shard-000000.npy"}]
    write_json_with_digest(tmp_path / MANIFEST, manifest | {"shards": outside})
    with pytest.raises(DataError, match="not a shard's name"):
        ShardSet(tmp_path)
    other = [manifest["shards"][0] | {"records": 6}, *manifest["shards"][1:]]
    write_json_with_digest(tmp_path / MANIFEST, manifest | {"shards": other})
    with pytest.raises(DataError, match="do not add up"):
        ShardSet(tmp_path).read(np.array([0]))


def test_tokenizers_are_compared_and_both_named(tmp_path):
    write_set(tmp_path)
    shards = ShardSet(tmp_path)
    shards.check_tokenizers()
    shards.check_tokenizers(text_fingerprint="t" * 64, image_fingerprint="i" * 64)
    with pytest.raises(DataError, match=f"text tokenizer {'t' * 64}.*{'x' * 64}"):
        shards.check_tokenizers(text_fingerprint="x" * 64)
    with pytest.raises(DataError, match="image tokenizer"):
        shards.check_tokenizers(image_fingerprint="t" * 64)


def test_a_folder_may_be_moved(tmp_path):
    (tmp_path / "a").mkdir()
    expected = write_set(tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert ShardSet(tmp_path / "b").read(np.arange(12)).tobytes() == expected.tobytes()


LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np
from megatron_cogview.data.shard_set import ShardSet
hard = int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
shards = ShardSet(Path(sys.argv[1]))
records = shards.read(np.arange(len(shards)))
again = shards.read(np.arange(len(shards))[::-1].copy())
assert (again[::-1] == records).all()
sys.stdout.buffer.write(records.tobytes())
"""


@pytest.mark.parametrize("hard", [64, 4096])
def test_more_shards_than_open_files(tmp_path, hard):
    """The soft limit is raised as far as it goes; where it does not, maps are let go."""
    expected = write_set(tmp_path, counts=(2,) * 150)
    command = [sys.executable, "-c", LIMITED, str(tmp_path), "150", str(hard)]
    done = subprocess.run(command, capture_output=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr.decode()[-800:]
    assert done.stdout == expected.tobytes()


@pytest.mark.parametrize(
    "change",
    [
        {"layout": None},
        {"shards": 5},
        {"shards": [{"records": 1}]},
        {"records": "many"},
        {"format": "something else"},
        {"split_table": {"name": "../x.npy", "sha256": "0" * 64}},
    ],
)
def test_manifests_of_other_programs_are_refused(tmp_path, change):
    """A digest shows that nobody damaged the file, not that it is ours."""
    write_set(tmp_path)
    manifest = read_json_with_digest(tmp_path / MANIFEST)
    write_json_with_digest(tmp_path / MANIFEST, manifest | change)
    with pytest.raises(DataError, match=r"manifest\.json"):
        ShardSet(tmp_path).split(0.01)
