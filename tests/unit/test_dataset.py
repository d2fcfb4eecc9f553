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
from megatron_cogview.data.mixture import Mixture, quotas
from megatron_cogview.data.shard_set import ShardSet
from megatron_cogview.data.shards import (
    record_dtype,
    sample_id,
    shard_name,
    write_manifest,
    write_shard,
)
from megatron_cogview.tokenization.layout import SequenceLayout

VOCAB = VocabConfig(num_image_codes=40, num_text_ids=1000)
SEQUENCE = SequenceConfig(length=20, text_budget=6, codes_per_side=(3,))
LAYOUT = SequenceLayout(SEQUENCE, VOCAB)
COUNTS = (50, 33, 17)
TRAINING = TrainingConfig(
    global_batch_size=12, micro_batch_size=2, text_weight=2.0, image_weight=0.5
)


def write_set(path, counts, first=0, text="t"):
    """Records numbered through from ``first``; the first text id of one is its number."""
    path.mkdir(exist_ok=True)
    rng = np.random.default_rng(first)
    entries, number = [], first
    for index, count in enumerate(counts):
        records = np.zeros(count, dtype=record_dtype((3,)))
        records["image0"] = rng.integers(0, 40, (count, 3, 3))
        for record in records:
            length = 1 + number % 6
            record["text"][:length] = number
            record["text_length"] = length
            record["sample_id"] = sample_id(f"id{number}")
            number += 1
        entries.append(write_shard(path / shard_name(index), records))
    about = {
        "layout": {"codes_per_side": [3], "longest_text": 6},
        "tokenizers": {
            "text": {"fingerprint": text, "vocab_size": 1000},
            "image": {"fingerprint": "i", "num_codes": 40},
        },
    }
    write_manifest(path, entries, about)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("tokens"), COUNTS)


def loader(*folders, rank=0, size=1, fraction=0.2, seed=1, weights=(), prefetch=0, **training):
    data = DataConfig(
        shards=tuple(map(str, folders)),
        weights=weights,
        validation_fraction=fraction,
        seed=seed,
        prefetch=prefetch,
    )
    return TrainLoader(
        [ShardSet(folder) for folder in folders],
        LAYOUT,
        dataclasses.replace(TRAINING, **training),
        data,
        rank,
        size,
    )


def record_numbers(batches):
    """The record of each sequence, read back from its first text id."""
    return [int(t) - 40 for batch in batches for t in batch.tokens_BS[:, 1]]


def numbers_at(folder, records):
    """The numbers in the texts of these records."""
    return ShardSet(folder).read(records)["text"][:, 0].tolist()


def test_sequences_equal_single_builds(folder):
    shards = ShardSet(folder)
    dataset = TokenDataset([shards], LAYOUT, 2.0, 0.5)
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
        parts = [loader(folder, rank=rank, size=size).micro_batches(step) for rank in range(size)]
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
    size = train.sampler.splits[0].num_train
    expected = sorted(numbers_at(folder, train.sampler.splits[0].train(np.arange(size))))
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
    split = one.sampler.splits[0]
    held_out = numbers_at(folder, split.validation(np.arange(split.num_validation)))
    assert sorted(seen) == sorted(held_out)
    # By the hash of their ids, and nothing else.
    assert sorted(seen) == [n for n in range(100) if sample_id(f"id{n}") < (2**64 * 2) // 10]
    assert len(seen) % 16 > 0
    train = set(numbers_at(folder, split.train(np.arange(split.num_train))))
    assert train.isdisjoint(seen)
    again = one.validation(one.num_validation_batches)
    assert record_numbers(again) == record_numbers(one.validation(0))
    halves = [
        loader(folder, rank=r, size=2, global_batch_size=16, micro_batch_size=4) for r in range(2)
    ]
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
        loader(folder, size=5)
    shards = ShardSet(folder)
    for sequence, vocab, words in (
        (dataclasses.replace(SEQUENCE, codes_per_side=(2,)), VOCAB, r"codes_per_side = \(2,\)"),
        (dataclasses.replace(SEQUENCE, text_budget=5), VOCAB, "text_budget = 5.*6 ids"),
        (SEQUENCE, VocabConfig(num_image_codes=39, num_text_ids=1000), "num_image_codes = 39"),
        (SEQUENCE, VocabConfig(num_image_codes=40, num_text_ids=999), "num_text_ids = 999"),
    ):
        with pytest.raises(ConfigError, match=words):
            TokenDataset([shards], SequenceLayout(sequence, vocab))
    with pytest.raises(ConfigError, match="not set"):
        build_loader(LAYOUT, TRAINING, DataConfig())
    with pytest.raises(DataError, match="no finished token shards"):
        build_loader(LAYOUT, TRAINING, DataConfig(shards=(str(tmp_path),)))
    assert len(build_loader(LAYOUT, TRAINING, DataConfig(shards=(str(folder),))).dataset) == 100


def test_prefetching_changes_nothing(folder):
    plain, ahead = loader(folder), loader(folder, prefetch=3)
    for step in (0, 1, 2, 7, 3, 3, 8):
        for one, other in zip(plain.micro_batches(step), ahead.micro_batches(step), strict=True):
            for field in dataclasses.fields(one):
                assert torch.equal(getattr(one, field.name), getattr(other, field.name))
    assert len(ahead._pending) <= 4


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """Half of the records of ``folder`` once more, and as many others."""
    return write_set(tmp_path_factory.mktemp("more"), (30, 70), first=50)


def test_a_mixture_draws_by_weight_and_covers_each_set(folder, second):
    def consumed(steps, **options):
        train = loader(folder, second, **options)
        sizes = [split.num_train for split in train.sampler.splits]
        samples = np.arange(steps * 12)
        return train.sampler.records(samples), sizes

    records, sizes = consumed(4000, weights=(3.0, 1.0))
    first = records < 100
    assert abs(first.mean() - 0.75) < 0.01
    # Each set runs through its own epochs, whole, whatever the weights.
    epoch = records[first][: sizes[0]]
    assert len(set(epoch.tolist())) == sizes[0]
    assert len(set(records[~first][: sizes[1]].tolist())) == sizes[1]
    # Without weights every record is seen equally often: an epoch is one permutation of all.
    records, sizes = consumed(4000)
    epochs = records[: 2 * sum(sizes)].reshape(2, sum(sizes))
    assert len(set(epochs[0].tolist())) == len(set(epochs[1].tolist())) == sum(sizes)
    assert epochs[0].tolist() != epochs[1].tolist()


def test_a_mixture_splits_by_id_and_not_by_set(folder, second):
    """The records both sets hold are on one side, or training would see validation."""
    train = loader(folder, second, weights=(1.0, 1.0))
    seen = {n for step in range(60) for n in record_numbers(train.micro_batches(step))}
    held_out = set()
    for index in range(train.num_validation_batches):
        for batch in train.validation(index):
            counted = batch.loss_weights_BS.sum(1) > 0
            held_out |= set(np.array(record_numbers([batch]))[counted.numpy()].tolist())
    assert seen.isdisjoint(held_out)
    assert seen | held_out == set(range(150))
    assert held_out & set(range(50, 100))


@pytest.mark.parametrize("size", [2, 3])
def test_a_mixture_is_the_same_for_any_number_of_ranks(folder, second, size):
    options = {"weights": (1.0, 2.0)}
    whole = record_numbers(loader(folder, second, **options).micro_batches(5))
    parts = [loader(folder, second, rank=r, size=size, **options) for r in range(size)]
    assert [n for part in parts for n in record_numbers(part.micro_batches(5))] == whole


def test_a_set_too_small_for_its_share_is_named(caplog):
    with caplog.at_level("WARNING"):
        Mixture((1e6, 1.0), seed=0)
    assert "set 1 gets 0.0061 % of the samples instead of 0.0001 %" in caplog.text
    assert quotas((3.0, 1.0)).tolist() == [12288, 4096]
    assert quotas((1.0, 0.0)).tolist() == [16384, 0]


def test_a_tiny_set_keeps_to_the_split_of_the_large_one(folder, tmp_path):
    """Its ids are all in the other set; none may validate here and train there."""
    tiny = write_set(tmp_path / "tiny", (12,), first=20)
    train = loader(folder, tiny, fraction=0.01)
    seen = {n for step in range(60) for n in record_numbers(train.micro_batches(step))}
    held_out = {n for n in range(100) if sample_id(f"id{n}") < 2**64 // 100}
    assert seen == set(range(100)) - held_out
    alone = loader(tiny, fraction=0.01)
    assert alone.sampler.num_validation == len(held_out & set(range(20, 32)))


def test_mixtures_that_do_not_go_together(folder, second, tmp_path):
    other = write_set(tmp_path / "other", (5,), text="u")
    with pytest.raises(DataError, match=r"text tokenizer t and .*other with u"):
        loader(folder, other)
    with pytest.raises(ConfigError, match=r"one weight for each of the 2"):
        DataConfig(shards=("a", "b"), weights=(1.0,))
    with pytest.raises(ConfigError, match="folder twice"):
        DataConfig(shards=("a", "a"))
    with pytest.raises(ConfigError, match="at least 0"):
        DataConfig(shards=("a", "b"), weights=(0.0, 0.0))
    with pytest.raises(ConfigError, match=r"0\.012 or 0\.013"):
        DataConfig(validation_fraction=0.0124)
    zero = loader(folder, second, weights=(1.0, 0.0))
    assert (zero.sampler.records(np.arange(5000)) < 100).all()
