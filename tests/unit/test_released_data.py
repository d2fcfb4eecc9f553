"""data.released, binary records: made here in the original's layout, and what can be wrong."""

import errno
import hashlib
import os

import numpy as np
import pytest

from megatron_cogview.configs.errors import DataError
from megatron_cogview.data import released
from megatron_cogview.data.raw import Rejected
from megatron_cogview.data.released import CompactBinary, LmdbRows
from megatron_cogview.data.token_rows import TokenRow
from tests.unit.released_files import PAD, ROI1, assert_rows, make_rows, read_all, write_binary


@pytest.mark.parametrize("rows_per_part", [1, 7, 300, 10_000])
def test_binary_records_come_out_as_written(tmp_path, rows_per_part):
    texts, codes = make_rows(600)
    write_binary(tmp_path / "merge.bin", texts, codes)
    source = CompactBinary(tmp_path / "merge.bin", rows_per_part=rows_per_part)
    source.check()
    parts = source.parts()
    assert [p.name for p in parts] == [f"merge.bin#{i}" for i in range(-(-600 // rows_per_part))]
    assert [p.start for p in parts] == [i * rows_per_part * 4352 for i in range(len(parts))]
    assert sum(p.num_bytes for p in parts) == 600 * 4352
    assert_rows(read_all(source), "merge.bin", texts, codes)
    assert {row.source for part in parts[:3] for row in source.read(part)} == {
        p.name for p in parts[:3]
    }


def test_binary_digest_is_that_of_the_bytes(tmp_path):
    path = tmp_path / "a.bin"
    write_binary(path, *make_rows(9))
    source = CompactBinary(path, rows_per_part=4)
    data = path.read_bytes()
    assert [source.digest(p) for p in source.parts()] == [
        hashlib.sha256(data[at : at + 4 * 4352]).hexdigest() for at in range(0, 9 * 4352, 4 * 4352)
    ]


def test_binary_files_in_their_order(tmp_path):
    rows = {name: make_rows(3, seed) for seed, name in enumerate(["b.bin", "a.bin", "c.dat"])}
    for name, (texts, codes) in rows.items():
        write_binary(tmp_path / name, texts, codes)
    (tmp_path / "readme.txt").write_text("not data")

    def order(*arguments):
        return [p.name for p in CompactBinary(*arguments).parts()]

    assert order(tmp_path) == ["a.bin#0", "b.bin#0"]
    assert order(tmp_path, "*.dat") == ["c.dat#0"]
    given = [tmp_path / "c.dat", tmp_path / "b.bin"]
    assert order(given) == ["c.dat#0", "b.bin#0"]
    assert read_all(CompactBinary(given))[3].id == "b.bin:0"


@pytest.mark.parametrize(
    ("place", "value", "reason", "detail"),
    [
        (0, 8191, "text id out of range", "8191 at text position 0, not 8192 to 58191"),
        (3, 0, "text id out of range", "0 at text position 3, not 8192 to 58191"),
        (3, -2, "text id out of range", "-2 at text position 3, not 8192 to 58191"),
        (3, -(2**31), "text id out of range", "-2147483648 at text position 3, not 8192 to 58191"),
        (3, 58219, "text id out of range", "58219 at text position 3, not 8192 to 58191"),
        (4, ROI1, "command token in text", "[ROI1] at text position 4"),
        (63, PAD, "command token in text", "[PAD] at text position 63"),
        (9, 8200, "text after padding", "padding from text position 5 on, then text"),
        (64, -1, "image code out of range", "-1 at image position 0, not 0 to 8191"),
        (1087, 8192, "image code out of range", "8192 at image position 1023, not 0 to 8191"),
        (70, 2**31 - 1, "image code out of range", "2147483647 at image position 6, not 0 to 8191"),
    ],
)
def test_faulty_records_are_rejected_at_their_place(tmp_path, place, value, reason, detail):
    texts, codes = make_rows(5)
    texts[2] = np.arange(5)
    records = write_binary(tmp_path / "a.bin", texts, codes)
    records[2, place] = value
    records.tofile(tmp_path / "a.bin")
    source = CompactBinary(tmp_path / "a.bin")
    source.check()
    found = read_all(source)
    assert found[2] == Rejected("a.bin:2", reason, "a.bin#0", detail)
    assert [row.id for row in found] == [f"a.bin:{n}" for n in range(5)]
    assert_rows(found[:2], "a.bin", texts[:2], codes[:2])
    (batch,) = source.read_batches(source.parts()[0])
    assert batch.ids == ["a.bin:0", "a.bin:1", "a.bin:3", "a.bin:4"]
    assert batch.rejected == [found[2]]
    assert batch.usable.tolist() == [True, True, False, True, True]
    assert (batch.codes == codes[[0, 1, 3, 4]]).all()
    assert batch.text_length.tolist() == [len(texts[n]) for n in (0, 1, 3, 4)]


def test_random_records_against_a_loop(tmp_path):
    """Ids from just outside and inside every range; which rows are good, said the slow way."""
    chance = np.random.default_rng(5)
    texts, codes = make_rows(400, seed=3)
    records = write_binary(tmp_path / "a.bin", texts, codes)
    edges = [-2, -1, 0, 8191, 8192, 58191, 58192, 58218, 58219, 2**31 - 1, -(2**31)]
    for row in records[::2]:
        row[chance.integers(1088)] = chance.choice(edges)
        row[chance.integers(64)] = chance.choice(edges)
    records.tofile(tmp_path / "a.bin")
    found = read_all(CompactBinary(tmp_path / "a.bin"))
    for row, ids in zip(found, records.tolist(), strict=True):
        text = ids[:64]
        while text and text[-1] == -1:
            text.pop()
        good = all(8192 <= i < 58192 for i in text) and all(0 <= i < 8192 for i in ids[64:])
        assert isinstance(row, TokenRow) == good
        if good:
            assert row.text.tolist() == [i - 8192 for i in text]
            assert row.codes.ravel().tolist() == ids[64:]
    assert 100 < sum(isinstance(row, Rejected) for row in found) < 200


@pytest.mark.parametrize("size", [0, 1, 4351, 4353, 4352 * 3 + 4])
def test_size_must_be_whole_records(tmp_path, size):
    path = tmp_path / "cut.bin"
    path.write_bytes(bytes(size))
    with pytest.raises(DataError, match=rf"cut\.bin: {size} bytes .* remainder is {size % 4352}"):
        CompactBinary(path).parts()


def test_binary_paths_must_make_sense(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        CompactBinary(tmp_path / "absent.bin").parts()
    with pytest.raises(DataError, match=r"holds no \*\.bin"):
        CompactBinary(tmp_path).parts()
    with pytest.raises(DataError, match="name at least one"):
        CompactBinary([]).parts()
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_binary(tmp_path / folder / "x.bin", *make_rows(1))
    with pytest.raises(DataError, match=r"b/x\.bin: has the same name as .*a/x\.bin"):
        CompactBinary([tmp_path / "a", tmp_path / "b"]).parts()


def test_a_file_of_another_type_is_refused_at_once(tmp_path):
    """int64 ids of the right total size: every record is wrong."""
    np.full((4, 1088), 9000, dtype="<i8").tofile(tmp_path / "a.bin")
    with pytest.raises(DataError, match=r"none of the first 8 rows can be used; a\.bin:0: text id"):
        CompactBinary(tmp_path / "a.bin").check()


def test_a_file_that_shrinks_is_noticed(tmp_path):
    path = tmp_path / "a.bin"
    write_binary(path, *make_rows(4))
    source = CompactBinary(path)
    (part,) = source.parts()
    os.truncate(path, 4352 * 3)
    with pytest.raises(DataError, match=r"a\.bin: ends inside part a\.bin#0"):
        list(source.read(part))
    with pytest.raises(DataError, match="ends inside"):
        source.digest(part)


def test_what_the_machine_cannot_read_is_an_error_that_names_it(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    write_binary(path, *make_rows(4))
    source = CompactBinary(path)
    (part,) = source.parts()
    assert (part.num_pairs, part.num_rows) == (4, 4)

    def fail(*_, **__):
        raise OSError(errno.ESTALE, "Stale file handle")

    message = r"a\.bin: cannot be read \(Stale file handle\).*run the same command again"
    with monkeypatch.context() as patch:
        patch.setattr(released, "open", fail, raising=False)
        for call in (lambda: list(source.read(part)), lambda: source.digest(part), source.check):
            with pytest.raises(DataError, match=message):
                call()
    for name in ("stat", "listdir"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(DataError, match=r"cannot be read \(Stale file handle\)"):
                CompactBinary(tmp_path).parts()


def test_binary_files_that_cannot_be_written_can_be_read(tmp_path):
    path = tmp_path / "a.bin"
    write_binary(path, *make_rows(2))
    before = path.stat()
    path.chmod(0o400)
    assert len(read_all(CompactBinary(path))) == 2
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_descriptions_are_plain(tmp_path):
    assert CompactBinary(tmp_path).description == {
        "kind": "cogview_binary",
        "rows_per_part": released.ROWS_PER_PART,
    }
    assert LmdbRows(tmp_path, 5).description == {"kind": "cogview_lmdb", "rows_per_part": 5}
