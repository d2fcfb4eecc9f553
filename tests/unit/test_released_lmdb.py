"""data.released, LMDB rows: made here as the original made them, and what can be wrong."""

import errno
import logging
import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import lmdb
import numpy as np
import pytest

from megatron_cogview.configs.errors import ConfigError, DataError
from megatron_cogview.configs.sequence import SequenceConfig
from megatron_cogview.configs.vocab import VocabConfig
from megatron_cogview.data import inert_pickle
from megatron_cogview.data.released import LmdbRows
from megatron_cogview.data.token_rows import TokenRow
from megatron_cogview.tokenization.layout import SequenceLayout
from tests.unit.released_files import (
    EOI2,
    FIRST_TEXT,
    PAD,
    assert_rows,
    make_rows,
    read_all,
    record,
    templated,
    write_lmdb,
)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", ["templated", "padded", "list", "ids", "padded ids", "text"])
def test_lmdb_rows_come_out_as_written(tmp_path, kind, protocol):
    texts, codes = make_rows(12, seed=protocol)
    make = {
        "templated": lambda t, c: templated(t, c),
        "padded": lambda t, c: np.append(templated(t, c), np.full(64 - len(t), PAD))[None],
        "list": lambda t, c: templated(t, c).tolist(),
        "ids": lambda t, c: (t + FIRST_TEXT, c.astype(np.int32)),
        "padded ids": lambda t, c: [record(t, c)[:64], c.reshape(1, -1).astype(np.uint16)],
        "text": lambda t, c: (f"caption 猫 {len(t)}", c.ravel()),
    }[kind]
    rows = [pickle.dumps(make(t, c), protocol) for t, c in zip(texts, codes, strict=True)]
    source = LmdbRows(write_lmdb(tmp_path / "train.lmdb", rows), rows_per_part=5)
    source.check()
    assert [p.name for p in source.parts()] == [f"train.lmdb#{n}" for n in range(3)]
    found = read_all(source)
    if kind == "text":
        assert [row.text for row in found] == [f"caption 猫 {len(t)}" for t in texts]
        assert all((row.codes == c).all() for row, c in zip(found, codes, strict=True))
        assert [row.id for row in found] == [f"train.lmdb:{n}" for n in range(12)]
    else:
        assert_rows(found, "train.lmdb", texts, codes)
    assert [row.source for row in found[4:6]] == ["train.lmdb#0", "train.lmdb#1"]


def test_lmdb_rows_of_our_own_layout(tmp_path):
    """What SequenceLayout builds for training is a row of the original."""
    layout = SequenceLayout(SequenceConfig(), VocabConfig())
    texts, codes = make_rows(4)
    texts = [text[:61] for text in texts]
    rows = [layout.build(t, c) for t, c in zip(texts, codes, strict=True)]
    assert_rows(read_all(LmdbRows(write_lmdb(tmp_path / "x", rows))), "x", texts, codes)


def test_lmdb_in_a_single_file_and_read_only(tmp_path):
    texts, codes = make_rows(3)
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [(t + FIRST_TEXT, c) for t, c in zip(texts, codes, strict=True)]
    path = write_lmdb(folder / "single.mdb", rows, subdir=False)
    (folder / "single.mdb-lock").unlink()
    before = path.read_bytes()
    path.chmod(0o400)
    folder.chmod(0o500)
    assert_rows(read_all(LmdbRows(path)), "single.mdb", texts, codes)
    folder.chmod(0o700)
    assert os.listdir(folder) == ["single.mdb"]
    assert path.read_bytes() == before


def test_lmdb_readers_may_overlap(tmp_path):
    """LMDB forbids to open a file twice in one process; reading does not hold it open."""
    texts, codes = make_rows(600)
    rows = [(t + FIRST_TEXT, c.astype(np.uint16)) for t, c in zip(texts, codes, strict=True)]
    first = LmdbRows(write_lmdb(tmp_path / "x", rows))
    second = LmdbRows(tmp_path / "x", rows_per_part=100)
    (part,) = first.parts()
    pairs = zip(first.read(part), read_all(second), strict=True)
    assert all(a.id == b.id and (a.codes == b.codes).all() for a, b in pairs)


GOOD = templated([1, 2], np.arange(1024))
CODES = np.arange(1024)


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        (None, "missing row", "no key '1'"),
        (b"", "damaged row", "damaged pickle"),
        (pickle.dumps(GOOD)[:-20], "damaged row", "damaged pickle"),
        (b"x" * (inert_pickle.MAX_BYTES + 1), "damaged row", "over 1048576 bytes"),
        (b"cposix\nsystem\n(Vtrue\ntR.", "damaged row", "posix.system"),
        (np.zeros(1028, dtype=np.float32), "damaged row", "NumPy type f4"),
        ("only a text", "not a token row", "a str, neither ids nor"),
        (type(None), "damaged row", "the name builtins.type, which was not run"),
        (pickle.dumps(None), "not a token row", "a NoneType"),
        (7, "not a token row", "a int, neither ids nor"),
        ((b"text", CODES), "not a token row", "the text is a bytes"),
        (("text", "codes"), "not a token row", "the codes are a str"),
        (("text", [None] * 1024), "not a token row", "the codes are a list"),
        (("text", CODES, 1), "not a token row", "a tuple"),
        ([True] * 1028, "not a token row", "a list"),
        ([], "wrong length", "0 ids"),
        (CODES, "wrong length", "1024 ids before [PAD]; a picture and its commands have 1028"),
        (np.full(1089, PAD), "wrong length", "0 ids"),
        (GOOD[3:], "wrong length", "1027 ids"),
        (GOOD[:-1], "not a text-to-image row", "8194 at position 2 of 1029, not [BASE]"),
        (("text", CODES[:-1]), "wrong length", "1023 image codes instead of 1024"),
        (("text", np.arange(2500) % 99), "wrong length", "2500 image codes instead of 1024"),
        (np.append(GOOD, 5), "not a text-to-image row", "[BOI1] at position 4 of 1031, not [BASE]"),
        (np.append(5, GOOD), "not a text-to-image row", "5 at position 0 of 1031, not [ROI1]"),
        (np.append(GOOD[:-1], EOI2), "not a text-to-image row", "[EOI2] at position 1029 of 1030"),
        (np.append(GOOD, GOOD), "command token in text", "[BASE] at text position 2"),
        (templated([50_000], CODES), "command token in text", "[PAD] at text position 0"),
        (templated([3, -1], CODES), "text id out of range", "8191 at text position 1"),
        (([8192, -1, 8192], CODES), "text after padding", "from text position 1 on"),
        (([8192, 1 << 63], CODES), "text id out of range", "9223372036854775807"),
        (([1, 2, 3], CODES), "text id out of range", "1 at text position 0"),
        (("text", CODES - 1), "image code out of range", "-1 at image position 0"),
        (("text", np.full(1024, 2**64 - 1, np.uint64)), "image code out of range", "92233720368"),
        (templated([3], np.full(1024, 8192)), "image code out of range", "8192 at image position"),
        (("half \ud83d", CODES), "caption is not valid Unicode", ""),
    ],
)
def test_faulty_lmdb_rows_are_rejected_at_their_place(tmp_path, row, reason, detail):
    source = LmdbRows(write_lmdb(tmp_path / "x", [GOOD, row, GOOD], extra=[b"k"] * (row is None)))
    first, found, last = read_all(source)
    assert isinstance(first, TokenRow)
    assert isinstance(last, TokenRow)
    assert (found.id, found.reason, found.source) == ("x:1", reason, "x#0")
    assert detail in found.detail
    found.detail.encode()


def test_torch_rows_say_how_to_go_on(tmp_path):
    torch = pytest.importorskip("torch")
    path = write_lmdb(tmp_path / "x", [("text", torch.arange(1024))])
    with pytest.raises(DataError, match=r"none of the first 1 rows.*torch tensor.*tensor\.numpy"):
        LmdbRows(path).check()


class Touch:
    """A row that makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_rows_that_would_run_code_are_rejected_and_do_not_run(tmp_path):
    rows = [pickle.dumps(("text", Touch(tmp_path / "made")), protocol) for protocol in range(6)]
    path = write_lmdb(tmp_path / "x", [GOOD, *rows])
    found = read_all(LmdbRows(path))
    assert [row.reason for row in found[1:]] == ["damaged row"] * 6
    assert all("posix.system" in row.detail for row in found[1:])
    assert not (tmp_path / "made").exists()
    pickle.loads(rows[0])
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("subdir", [True, False])
def test_lmdb_parts_name_the_file_that_changes(tmp_path, subdir):
    """They named the folder, whose time of change stays when rows are written."""
    path = write_lmdb(tmp_path / "x", [GOOD] * 3, subdir=subdir)
    (part,) = LmdbRows(path).parts()
    assert part.path == (path / "data.mdb" if subdir else path)
    assert (part.name, part.num_pairs, part.num_rows) == ("x#0", 3, 3)
    os.utime(part.path, ns=(0, 0))
    folder_before = path.stat().st_mtime_ns
    with lmdb.open(str(path), subdir=subdir) as environment, environment.begin(write=True) as txn:
        txn.put(b"1", pickle.dumps(GOOD + 0))
    assert part.path.stat().st_mtime_ns > 0
    if subdir:
        assert path.stat().st_mtime_ns == folder_before
    LmdbRows(path).check()


def test_lmdb_on_a_file_system_that_is_gone(tmp_path, monkeypatch):
    source = LmdbRows(write_lmdb(tmp_path / "x", [GOOD]))
    (part,) = source.parts()

    def fail(*_, **__):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "stat", fail)
    for call in (
        source.parts,
        source.check,
        lambda: list(source.read(part)),
        lambda: source.digest(part),
    ):
        with pytest.raises(DataError, match=r"x: cannot be read \(Stale file handle\)"):
            call()


def test_lmdb_digest_sees_every_row(tmp_path):
    def digests(name, rows, **options):
        source = LmdbRows(write_lmdb(tmp_path / name, rows, **options), rows_per_part=3)
        return [source.digest(part) for part in source.parts()]

    texts, codes = make_rows(5)
    rows = [(t + FIRST_TEXT, c) for t, c in zip(texts, codes, strict=True)]
    plain = digests("a", rows)
    assert plain == digests("b", rows)
    assert plain[0] != plain[1]
    assert digests("c", [*rows[:4], rows[0]])[0] == plain[0]
    assert digests("d", [*rows[:4], rows[0]])[1] != plain[1]
    assert digests("e", [rows[1], rows[0], *rows[2:]])[0] != plain[0]
    assert digests("f", [None, *rows[1:]], extra=[b"x"])[0] != plain[0]
    assert all(len(d) == 64 for d in plain)


def test_lmdb_rows_may_be_hashed_while_they_are_read(tmp_path):
    texts, codes = make_rows(1_000)
    rows = [(t + FIRST_TEXT, c.astype(np.uint16)) for t, c in zip(texts, codes, strict=True)]
    source = LmdbRows(write_lmdb(tmp_path / "x", rows))
    (part,) = source.parts()
    alone = source.digest(part)
    with ThreadPoolExecutor(2) as pool:
        digests = [pool.submit(source.digest, part) for _ in range(4)]
        assert_rows(list(source.read(part)), "x", texts, codes)
        assert {digest.result() for digest in digests} == {alone}


@pytest.mark.parametrize("length", ["", "0", "-1", "x", "3", "9" * 30, "1e0", "٣"])
def test_lmdb_length_must_fit(tmp_path, length):
    path = write_lmdb(tmp_path / "x", [GOOD, GOOD], length=length or "a")
    with pytest.raises(DataError, match=r"key 'length' is .* among 3 keys"):
        LmdbRows(path).parts()


def test_lmdb_rows_beyond_length_are_left_out_aloud(tmp_path, caplog):
    path = write_lmdb(tmp_path / "x", [GOOD] * 3, length="2")
    with caplog.at_level(logging.WARNING):
        assert [p.num_rows for p in LmdbRows(path).parts()] == [2]
    assert "1 keys beside the 2 rows" in caplog.text


def test_lmdb_paths_must_make_sense(tmp_path):
    with pytest.raises(DataError, match="absent: no such file"):
        LmdbRows(tmp_path / "absent").parts()
    with pytest.raises(DataError, match=r"data\.mdb: no such file"):
        LmdbRows(tmp_path).parts()
    for data in (b"", b"x" * 50, b"x" * 20_000):
        (tmp_path / "other").write_bytes(data)
        with pytest.raises(DataError, match="other: not a readable LMDB"):
            LmdbRows(tmp_path / "other").parts()
    assert os.listdir(tmp_path) == ["other"]


def test_lmdb_without_length(tmp_path):
    with lmdb.open(str(tmp_path / "x")) as environment, environment.begin(write=True) as txn:
        txn.put(b"0", pickle.dumps(GOOD))
    with pytest.raises(DataError, match="key 'length' is None among 1 keys"):
        LmdbRows(tmp_path / "x").parts()


def test_lmdb_that_was_cut_off_is_refused(tmp_path):
    """Reading on would end the process with a bus error."""
    path = write_lmdb(tmp_path / "x", [GOOD] * 200)
    file = path / "data.mdb"
    size = file.stat().st_size
    for part in (2, 3, 10, 100):
        os.truncate(file, size * (part - 1) // part // 4096 * 4096)
        with pytest.raises(DataError, match=rf"data\.mdb: \d+ bytes of {size}, it was cut off"):
            LmdbRows(path).parts()
        with open(file, "r+b") as data:
            data.truncate(size)


def test_missing_lmdb_package(tmp_path, monkeypatch):
    path = write_lmdb(tmp_path / "x", [GOOD])
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ConfigError, match=r"pip install 'megatron-cogview\[import\]'"):
        LmdbRows(path).parts()
