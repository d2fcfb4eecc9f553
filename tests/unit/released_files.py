"""Files as the original CogView wrote them, made up: binary records and LMDBs, and their check."""

import pickle

import lmdb
import numpy as np

from megatron_cogview.data.token_rows import TokenRow

ROI1, BASE, BOI1, EOI1, PAD, EOI2 = 58199, 58208, 58193, 58196, 58192, 58197
FIRST_TEXT, FIRST_COMMAND = 8192, 58192


def make_rows(count, seed=0):
    """Text ids (local, 0 to 64 of them) and codes."""
    chance = np.random.default_rng(seed)
    texts = [chance.integers(0, 50_000, chance.integers(0, 65)) for _ in range(count)]
    codes = chance.integers(0, 8192, (count, 32, 32))
    # The ends of each range, and the longest and shortest text.
    texts[0] = np.array([0, 49_999] * 32)
    codes[0, 0, :2] = 0, 8191
    if count > 1:
        texts[1] = texts[1][:0]
    return texts, codes


def record(text, codes):
    """One binary record, id by id."""
    ids = [int(i) + FIRST_TEXT for i in text]
    return np.array(ids + [-1] * (64 - len(ids)) + [int(c) for c in codes.ravel()], dtype="<i4")


def templated(text, codes):
    """[ROI1] text [BASE] [BOI1] codes [EOI1]"""
    ids = [ROI1, *(int(i) + FIRST_TEXT for i in text), BASE, BOI1, *codes.ravel().tolist(), EOI1]
    return np.array(ids)


def write_binary(path, texts, codes):
    records = [record(t, c) for t, c in zip(texts, codes, strict=True)]
    path.write_bytes(b"".join(r.tobytes() for r in records))
    return np.stack(records)


def write_lmdb(path, rows, length=None, subdir=True, extra=()):
    """Rows as pickles (bytes go in as they are)."""
    with (
        lmdb.open(str(path), map_size=1 << 28, subdir=subdir) as environment,
        environment.begin(write=True) as transaction,
    ):
        for number, row in enumerate(rows):
            if row is not None:
                data = row if isinstance(row, bytes) else pickle.dumps(row)
                transaction.put(str(number).encode(), data)
        text = str(len(rows)) if length is None else length
        transaction.put(b"length", text.encode())
        for key in extra:
            transaction.put(key, b"x")
    return path


def read_all(source):
    return [row for part in source.parts() for row in source.read(part)]


def assert_rows(found, name, texts, codes):
    """All rows are there, in order, with what was written."""
    assert len(found) == len(texts)
    for number, row in enumerate(found):
        assert isinstance(row, TokenRow), row
        assert row.id == f"{name}:{number}"
        assert row.text.dtype == row.codes.dtype == np.uint16
        assert row.text.tolist() == list(texts[number])
        assert row.codes.shape == (32, 32)
        assert (row.codes == codes[number]).all()
