"""data.import_tokens: the original's rows become records, the same from both of its formats."""

import dataclasses
import os
import pickle

import numpy as np
import pytest

from megatron_cogview.configs.errors import ConfigError, DataError
from megatron_cogview.configs.sequence import SequenceConfig
from megatron_cogview.data.encode import PairEncoder
from megatron_cogview.data.import_tokens import import_tokens
from megatron_cogview.data.released import CompactBinary, LmdbRows
from megatron_cogview.data.shard_set import ShardSet
from megatron_cogview.data.shards import sample_id
from megatron_cogview.data.tokenize import Work
from megatron_cogview.tokenization.text import TextTokenizer, train
from tests.unit.released_files import make_rows, templated, write_binary, write_lmdb
from tests.unit.test_tokenize import FakeImageTokenizer, content

SEQUENCE = SequenceConfig()
COUNT = 40


class BigText(TextTokenizer):
    """A small model that claims 50,000 pieces, as ids of the original need."""

    def __init__(self, path):
        super().__init__(path)
        self.vocab_size = 50_000


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "t.model"
    train(["a red square 图"], path, 400)
    return BigText(path)


def encoder_of(text, **sequence):
    changed = dataclasses.replace(SEQUENCE, **sequence)
    return PairEncoder(text, FakeImageTokenizer(256, 32, 8192), changed)


def records_of(folder):
    shards = ShardSet(folder)
    return {int(r["sample_id"]): r for r in shards.read(np.arange(len(shards)))}


@pytest.mark.parametrize("kind", ["binary", "lmdb"])
def test_rows_become_records(text, tmp_path, kind):
    texts, codes = make_rows(COUNT)
    if kind == "binary":
        write_binary(tmp_path / "m.bin", texts, codes)
        source, name = CompactBinary(tmp_path / "m.bin", rows_per_part=16), "m.bin"
    else:
        rows = [templated(t, c) for t, c in zip(texts, codes, strict=True)]
        source, name = LmdbRows(write_lmdb(tmp_path / "m", rows), rows_per_part=16), "m"
    manifest = import_tokens(source, encoder_of(text), tmp_path / "out", Work())
    assert [entry["source"] for entry in manifest["shards"]] == [f"{name}#{k}" for k in range(3)]
    records = records_of(tmp_path / "out")
    over = [n for n, t in enumerate(texts) if len(t) > 61]
    empty = [n for n, t in enumerate(texts) if len(t) == 0]
    assert over and empty
    assert manifest["rejected"] == {
        "caption over the text budget": len(over),
        "empty caption": len(empty),
    }
    for n in sorted({*range(COUNT)} - {*over, *empty}):
        record = records.pop(sample_id(f"{name}:{n}"))
        assert record["text"][: record["text_length"]].tolist() == texts[n].tolist()
        assert not record["text"][record["text_length"] :].any()
        assert (record["image0"] == codes[n]).all()
    assert not records
    lines = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    rejected = sorted([*over, *empty])
    assert all(f'"{name}:{n}"' in line for n, line in zip(rejected, lines, strict=True))


def test_truncation_cuts_text_and_never_codes(text, tmp_path):
    texts, codes = make_rows(COUNT)
    write_binary(tmp_path / "m.bin", texts, codes)
    encoder = encoder_of(text, text_policy="truncate", text_budget=10)
    manifest = import_tokens(CompactBinary(tmp_path / "m.bin"), encoder, tmp_path / "out", Work())
    records = records_of(tmp_path / "out")
    assert manifest["counts"]["truncated"] == sum(len(t) > 10 for t in texts)
    assert manifest["layout"]["longest_text"] == 10
    for n, ids in enumerate(texts):
        if len(ids):
            record = records[sample_id(f"m.bin:{n}")]
            assert record["text"].tolist() == [*ids[:10], *[0] * (64 - min(10, len(ids)))]
            assert (record["image0"] == codes[n]).all()


def test_texts_in_an_lmdb_are_tokenised(text, tmp_path):
    _, codes = make_rows(3)
    rows = [("a red square", codes[0].ravel()), ("", codes[1].ravel()), ("图", codes[2].ravel())]
    path = write_lmdb(tmp_path / "m", rows)
    manifest = import_tokens(LmdbRows(path), encoder_of(text), tmp_path / "out", Work())
    assert manifest["rejected"] == {"empty caption": 1}
    record = records_of(tmp_path / "out")[sample_id("m:0")]
    assert record["text"][: record["text_length"]].tolist() == text.encode("a red square")


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("was-run",)


def test_a_hostile_row_is_rejected_and_nothing_is_run(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts, codes = make_rows(4)
    rows = [templated(t[:9], c) for t, c in zip(texts, codes, strict=True)]
    rows[1], rows[2] = pickle.dumps(Hostile()), templated(np.array([5]), codes[2])
    manifest = import_tokens(
        LmdbRows(write_lmdb(tmp_path / "m", rows)), encoder_of(text), tmp_path / "out", Work()
    )
    assert manifest["rejected"] == {"damaged row": 1}
    assert not (tmp_path / "was-run").exists()
    assert "mkdir" in (tmp_path / "out" / "rejected.jsonl").read_text()


def test_several_workers_and_a_second_run(text, tmp_path):
    texts, codes = make_rows(COUNT, seed=1)
    write_binary(tmp_path / "m.bin", texts, codes)
    source = CompactBinary(tmp_path / "m.bin", rows_per_part=7)
    import_tokens(source, encoder_of(text), tmp_path / "one", Work())
    for worker in (2, 0, 1):
        last = import_tokens(
            source, encoder_of(text), tmp_path / "three", Work(worker=worker, of=3)
        )
        assert (last is None) == (worker != 1)
    assert content(tmp_path / "one") == content(tmp_path / "three")
    import_tokens(source, encoder_of(text), tmp_path / "one", Work())
    assert content(tmp_path / "one") == content(tmp_path / "three")


def test_refusals(text, tmp_path):
    texts, codes = make_rows(3)
    write_binary(tmp_path / "m.bin", texts, codes)
    source = CompactBinary(tmp_path / "m.bin")
    small = TextTokenizer(text.path)
    encoder = PairEncoder(small, FakeImageTokenizer(256, 32, 8192), SEQUENCE)
    with pytest.raises(DataError, match=r"text id \d+: the text tokenizer .* pieces"):
        import_tokens(source, encoder, tmp_path / "out", Work())
    grid = dataclasses.replace(SEQUENCE, codes_per_side=(16,))
    encoder = PairEncoder(text, FakeImageTokenizer(256, 16, 8192), grid)
    with pytest.raises(ConfigError, match="one grid of 32 codes"):
        import_tokens(source, encoder, tmp_path / "out2", Work())
