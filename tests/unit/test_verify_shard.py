"""data.verify_shard: damage of files and impossible values in records, each where it is."""

import numpy as np
import pytest

from megatron_cogview.data import verify_shard
from megatron_cogview.data.shards import MANIFEST, compute_crc32, npy_header, shard_name
from megatron_cogview.data.verify import verify
from megatron_cogview.storage.digest import (
    read_json_with_digest,
    sha256_file,
    write_json_with_digest,
)
from megatron_cogview.testing.data_faults.small_set import (
    NUM_CODES,
    TEXT_BUDGET,
    VOCAB_SIZE,
    random_records,
)
from tests.unit import test_verify as base
from tests.unit.test_verify import SIDES, checks, damage, rewrite_manifest

# A fixture of that file.
tokens = base.tokens


def rewrite_shard(folder, change, index=0, crc=True):
    """What a faulty writer leaves: every hash is right, and what ``change`` did is wrong."""
    path = folder / shard_name(index)
    records = np.load(path)
    change(records)
    if crc:
        records["crc32"] = compute_crc32(records)
    path.write_bytes(npy_header(records.dtype, len(records)) + records.tobytes())
    digest = sha256_file(path)
    sidecar = read_json_with_digest(path.with_suffix(".json"))
    sidecar["shard"]["sha256"] = digest
    write_json_with_digest(path.with_suffix(".json"), sidecar)
    manifest = read_json_with_digest(folder / MANIFEST)
    manifest["shards"][index]["sha256"] = digest
    write_json_with_digest(folder / MANIFEST, manifest)


def test_chunks_change_nothing(tokens, monkeypatch):
    rewrite_shard(tokens, lambda r: r["sample_id"].__setitem__(5, 0))
    whole = verify(tokens).findings
    assert [(f.check, f.record) for f in whole] == [("order", 5)]
    for records in (1, 2, 5):
        monkeypatch.setattr(verify_shard, "CHUNK_BYTES", records * random_records(1, SIDES).nbytes)
        assert verify(tokens).findings == whole


def test_size_is_compared(tokens):
    path = tokens / shard_name(2)
    path.write_bytes(path.read_bytes()[:-1])
    assert checks(tokens) == checks(tokens, quick=True) == [("size", path.name, None)]
    path.write_bytes(path.read_bytes() + b"xy")
    assert checks(tokens) == [("size", path.name, None)]


def test_header_is_compared_also_when_quick(tokens):
    damage(tokens / shard_name(0), 20)
    assert checks(tokens, quick=True) == [("header", shard_name(0), None)]
    assert [c for c, _, _ in checks(tokens)] == ["header", "sha256"]


def test_quick_leaves_records_alone(tokens):
    damage(tokens / shard_name(0), -30)
    assert checks(tokens, quick=True) == []


def test_crc_of_the_right_record_is_reported(tokens):
    stride = random_records(1, SIDES).nbytes
    damage(tokens / shard_name(0), -4 * stride)
    assert ("crc32", shard_name(0), 5) in checks(tokens)
    report = verify(tokens)
    assert "copy the file again" in report.findings[0].remedy


def test_a_wrong_crc_that_was_written_so(tokens):
    rewrite_shard(tokens, lambda r: r["crc32"].__setitem__(3, 7), crc=False)
    assert checks(tokens) == [("crc32", shard_name(0), 3)]
    assert "what wrote it is at fault" in verify(tokens).findings[0].remedy


def set_text(row, column, value):
    def change(records):
        records["text"][row, column] = value

    return change


def set_length(row, value):
    def change(records):
        records["text"][row, min(value, 64) :] = 0
        records["text_length"][row] = value

    return change


def set_code(image, row, value):
    def change(records):
        records[image][row, 1, 0] = value

    return change


def set_text_length(value):
    def change(records):
        records["text"][4] = np.arange(64) < value
        records["text_length"][4] = value

    return change


def set_first_padding(records):
    records["text"][2, records["text_length"][2]] = 1


@pytest.mark.parametrize(
    ("change", "check", "row"),
    [
        (set_text(2, 0, VOCAB_SIZE), "text_id", 2),
        (set_text(2, 0, VOCAB_SIZE - 1), None, 2),
        (set_length(1, 0), "text_length", 1),
        (set_length(1, 1), None, 1),
        (set_length(1, TEXT_BUDGET + 1), "text_length", 1),
        (set_text(6, 63, 5), "padding", 6),
        (set_first_padding, "padding", 2),
        (set_code("image0", 3, NUM_CODES), "code", 3),
        (set_code("image1", 7, NUM_CODES), "code", 7),
        (set_code("image1", 7, NUM_CODES - 1), None, 7),
    ],
)
def test_impossible_values(tokens, change, check, row):
    rewrite_shard(tokens, change)
    assert checks(tokens) == ([] if check is None else [(check, shard_name(0), row)])


def test_text_length_is_bounded_by_the_longest_text_stated(tokens):
    longest = read_json_with_digest(tokens / MANIFEST)["layout"]["longest_text"]
    rewrite_manifest(tokens, layout__longest_text=longest - 1)
    assert {check for check, _, _ in checks(tokens)} == {"text_length"}
    # The budget counts where it is the smaller of the two.
    rewrite_manifest(tokens, layout__longest_text=64)
    rewrite_shard(tokens, set_text_length(TEXT_BUDGET))
    assert checks(tokens) == []
    rewrite_shard(tokens, set_text_length(TEXT_BUDGET + 1))
    assert checks(tokens) == [("text_length", shard_name(0), 4)]


def test_order_and_split_of_unsorted_records(tokens):
    rewrite_shard(tokens, lambda r: r.__setitem__(slice(None), r[::-1].copy()))
    found = checks(tokens)
    assert found == [("order", shard_name(0), row) for row in range(1, 9)]
    # Found although the ids are in disorder.
    assert verify(tokens).duplicates == 0


def test_many_bad_records_are_counted(tokens, monkeypatch):
    monkeypatch.setattr(verify_shard, "MAX_LISTED", 3)
    monkeypatch.setattr(verify_shard, "CHUNK_BYTES", 2 * random_records(1, SIDES).nbytes)
    rewrite_shard(tokens, lambda r: r["image0"].__setitem__(slice(None), NUM_CODES))
    findings = verify(tokens).findings
    assert [f.record for f in findings] == [0, 1, 2, None]
    assert "6 more records" in findings[-1].what


def test_a_shard_that_cannot_be_read_is_reported(tokens, monkeypatch):
    def failing(target, file):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(verify_shard, "_fill", failing)
    found = verify(tokens).findings
    assert [(f.check, f.file) for f in found] == [("unreadable", shard_name(k)) for k in (0, 2)]
    assert "Input/output error" in found[0].what
    monkeypatch.setattr(verify_shard, "_fill", lambda target, file: False)
    assert [c for c, _, _ in checks(tokens)] == ["size", "size"]
