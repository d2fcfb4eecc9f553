"""data.dataset, batch and loader: shard records to batches, the same for any number of ranks."""

import dataclasses

import numpy as np
import pytest
import torch

from megatron_cogview.configs.data import DataConfig
from megatron_cogview.configs.errors import ConfigError, DataError
from megatron_cogview.configs.sequence import SequenceConfig
from megatron_cogview.configs.training import TrainingConfig
from megatron_cogview.configs.vocab import VocabConfig
from megatron_cogview.data.dataset import TokenDataset
from megatron_cogview.data.loader import TrainLoader, build_loader
from megatron_cogview.data.shards import MANIFEST, ShardSet, record_dtype, shard_name, write_shard
from megatron_cogview.storage.digest import write_json_with_digest
from megatron_cogview.tokenization.layout import SequenceLayout

VOCAB = VocabConfig(num_image_codes=40, num_text_ids=1000)
SEQUENCE = SequenceConfig(length=20, text_budget=6, codes_per_side=(3,))
LAYOUT = SequenceLayout(SEQUENCE, VOCAB)
COUNTS = (50, 33, 17)
TRAINING = TrainingConfig(
    global_batch_size=12, micro_batch_size=2, text_weight=2.0, image_weight=0.5
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """100 records; the first text id of a record is its number."""
    path = tmp_path_factory.mktemp("tokens")
    rng = np.random.default_rng(0)
    shards, number = [], 0
    for index, count in enumerate(COUNTS):
        records = np.zeros(count, dtype=record_dtype((3,)))
        records["image0"] = rng.integers(0, 40, (count, 3, 3))
        for record in records:
            length = 1 + number % 6
            record["text"][:length] = number
            record["text_length"] = length
            number += 1
        shards.append(write_shard(path / shard_name(index), records))
    manifest = {
        "version": 1,
        "records": 100,
        "layout": {"codes_per_side": [3], "longest_text": 6},
        "tokenizers": {
            "text": {"fingerprint": "t", "vocab_size": 1000},
            "image": {"fingerprint": "i", "num_codes": 40},
        },
        "shards": shards,
    }
    write_json_with_digest(path / MANIFEST, manifest)
    return path


def loader(folder, rank=0, size=1, fraction=0.2, seed=1, **training):
    return TrainLoader(
        ShardSet(folder),
        LAYOUT,
        dataclasses.replace(TRAINING, **training),
        DataConfig(validation_fraction=fraction, seed=seed),
        rank,
        size,
    )


def record_numbers(batches):
    """The record of each sequence, read back from its first text id."""
    return [int(t) - 40 for batch in batches for t in batch.tokens_BS[:, 1]]


def test_sequences_equal_single_builds(folder):
    shards = ShardSet(folder)
    dataset = TokenDataset(shards, LAYOUT, 2.0, 0.5)
    assert len(dataset) == 100
    numbers = np.array([99, 3, 60, 3])
    out = dataset.sequences(numbers)
    for row, number in enumerate(numbers):
        record = shards.read(np.array([number]))[0]
        ids = LAYOUT.build(record["text"][: record["text_length"]].tolist(), record["image0"])
        assert out.tokens_NS[row].tolist() == ids[:-1].tolist()
        assert out.labels_NS[row].tolist() == ids[1:].tolist()
        assert out.positions_NS[row].tolist() == list(range(19))
        weights = [0.0 if i == 1040 else 0.5 if i < 40 else 2.0 for i in ids[1:].tolist()]
        assert out.loss_weights_NS[row].tolist() == weights
        assert out.text_region_N[row] == 3 + record["text_length"]


def test_batch_types_shapes_and_pivot_key(folder):
    batches = loader(folder).micro_batches(3)
    assert len(batches) == 6
    for index, batch in enumerate(batches):
        for field in dataclasses.fields(batch):
            tensor = getattr(batch, field.name)
            floating = field.name == "loss_weights_BS"
            assert tensor.dtype == (torch.float32 if floating else torch.int64)
            assert tensor.shape == ((2, 2) if field.name == "pivot_key_B2" else (2, 19))
        first = 36 + 2 * index
        assert batch.pivot_key_B2[:, 0].tolist() == [first, first + 1]
        lengths = [3 + 1 + n % 6 for n in record_numbers([batch])]
        assert batch.pivot_key_B2[:, 1].tolist() == lengths
    moved = batches[0].to("cpu")
    assert torch.equal(moved.tokens_BS, batches[0].tokens_BS)


@pytest.mark.parametrize("size", [2, 3, 6])
def test_ranks_together_read_what_one_rank_reads(folder, size):
    for step in (0, 7):
        whole = loader(folder).micro_batches(step)
        parts = [loader(folder, rank, size).micro_batches(step) for rank in range(size)]
        for name in ("tokens_BS", "labels_BS", "loss_weights_BS", "pivot_key_B2"):
            together = torch.cat([getattr(b, name) for part in parts for b in part])
            assert torch.equal(together, torch.cat([getattr(b, name) for b in whole]))


def test_micro_batch_size_does_not_change_the_order(folder):
    assert record_numbers(loader(folder, micro_batch_size=4).micro_batches(5)) == record_numbers(
        loader(folder, micro_batch_size=1).micro_batches(5)
    )


def test_epochs_cover_the_training_part_and_resume_needs_the_step_only(folder):
    train = loader(folder)
    steps = [record_numbers(train.micro_batches(step)) for step in range(20)]
    stream = [number for step in steps for number in step]
    size = train.split.num_train
    expected = sorted(train.split.train(np.arange(size)).tolist())
    assert sorted(stream[:size]) == sorted(stream[size : 2 * size]) == expected
    assert stream[:size] != stream[size : 2 * size]
    assert record_numbers(loader(folder).micro_batches(13)) == steps[13]
    assert record_numbers(loader(folder, seed=2).micro_batches(0)) != steps[0]


def test_validation_counts_every_record_once_and_no_training_record(folder):
    """Also when the part does not fill a batch: the rest weighs nothing."""
    one = loader(folder, global_batch_size=16, micro_batch_size=4)
    seen = []
    for index in range(one.num_validation_batches):
        for batch in one.validation(index):
            counted = batch.loss_weights_BS.sum(1) > 0
            seen += np.array(record_numbers([batch]))[counted.numpy()].tolist()
    assert sorted(seen) == one.split.validation(np.arange(one.split.num_validation)).tolist()
    assert len(seen) == one.split.num_validation
    assert len(seen) % 16 > 0
    train = set(one.split.train(np.arange(one.split.num_train)).tolist())
    assert train.isdisjoint(seen)
    again = one.validation(one.num_validation_batches)
    assert record_numbers(again) == record_numbers(one.validation(0))
    halves = [loader(folder, r, 2, global_batch_size=16, micro_batch_size=4) for r in range(2)]
    together = [n for half in halves for n in record_numbers(half.validation(1))]
    assert together == record_numbers(one.validation(1))
    # The split does not depend on the shuffle's seed.
    assert record_numbers(loader(folder, seed=9).validation(0)) == record_numbers(
        loader(folder).validation(0)
    )


def test_refusals(folder, tmp_path):
    with pytest.raises(ConfigError, match="no validation records"):
        loader(folder, fraction=0.0).validation(0)
    with pytest.raises(ConfigError, match=r"multiple of training\.micro_batch_size"):
        loader(folder, 0, 5)
    shards = ShardSet(folder)
    for sequence, vocab, words in (
        (dataclasses.replace(SEQUENCE, codes_per_side=(2,)), VOCAB, r"codes_per_side = \(2,\)"),
        (dataclasses.replace(SEQUENCE, text_budget=5), VOCAB, "text_budget = 5.*6 ids"),
        (SEQUENCE, VocabConfig(num_image_codes=39, num_text_ids=1000), "num_image_codes = 39"),
        (SEQUENCE, VocabConfig(num_image_codes=40, num_text_ids=999), "num_text_ids = 999"),
    ):
        with pytest.raises(ConfigError, match=words):
            TokenDataset(shards, SequenceLayout(sequence, vocab))
    with pytest.raises(ConfigError, match="not set"):
        build_loader(LAYOUT, TRAINING, DataConfig())
    with pytest.raises(DataError, match="no finished token shards"):
        build_loader(LAYOUT, TRAINING, DataConfig(shards=str(tmp_path)))
    assert len(build_loader(LAYOUT, TRAINING, DataConfig(shards=str(folder))).dataset) == 100
