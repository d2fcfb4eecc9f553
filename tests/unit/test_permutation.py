"""data.permutation, split and sampler: bijections, disjoint parts, one global order."""

import numpy as np
import pytest

from megatron_cogview.configs.errors import ConfigError, DataError
from megatron_cogview.data.permutation import derive_key, permute
from megatron_cogview.data.sampler import Sampler, rank_samples
from megatron_cogview.data.split import Split, split_counts, split_row


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 255, 256, 257, 1000, 4097])
def test_permutation_is_a_bijection(size):
    for key in (0, 1, derive_key(7, 8)):
        image = permute(np.arange(size), size, key)
        assert sorted(image.tolist()) == list(range(size))


def test_large_range_stays_inside_and_has_no_repeats():
    size = 10**9 + 7
    index = np.unique(np.random.default_rng(0).integers(0, size, 200_000))
    image = permute(index, size, derive_key(1))
    assert len(np.unique(image)) == len(index)
    assert image.min() >= 0
    assert image.max() < size
    # A uniform sample of this many fills 100 bins with a deviation of about 45 each.
    counts = np.bincount(image * 100 // size, minlength=100)
    assert abs(counts - len(index) / 100).max() < 250


def test_keys_may_differ_per_index_and_change_the_order():
    index = np.tile(np.arange(50), 2)
    keys = np.repeat(np.array([3, 4], dtype=np.uint64), 50)
    both = permute(index, 50, keys)
    assert both[:50].tolist() == permute(np.arange(50), 50, 3).tolist()
    assert both[50:].tolist() == permute(np.arange(50), 50, 4).tolist()
    assert both[:50].tolist() != both[50:].tolist()
    assert permute(index.reshape(4, 25), 50, 3).shape == (4, 25)


def test_first_place_is_uniform_over_keys():
    """Chi-square with 99 degrees of freedom: 1 in 10^4 lies above 160."""
    index = np.zeros(20_000, dtype=np.int64)
    keys = np.array([derive_key(k) for k in range(20_000)])
    counts = np.bincount(permute(index, 100, keys), minlength=100)
    assert ((counts - 200) ** 2 / 200).sum() < 160


def test_neighbours_do_not_stay_neighbours():
    image = permute(np.arange(10_000), 10_000, derive_key(5))
    assert np.mean(np.abs(np.diff(image)) < 10) < 0.01
    assert abs(np.corrcoef(np.arange(10_000), image)[0, 1]) < 0.05


def test_derived_keys_depend_on_every_part_and_its_place():
    keys = {int(derive_key(*parts)) for parts in ((1, 2), (2, 1), (1,), (1, 2, 0), (-1,), ())}
    assert len(keys) == 6


def test_permutation_refuses():
    with pytest.raises(IndexError):
        permute([5], 5, 0)
    with pytest.raises(IndexError):
        permute([-1], 5, 0)
    with pytest.raises(ValueError, match="size"):
        permute([0], 0, 0)
    assert permute(np.zeros(0, dtype=np.int64), 5, 0).shape == (0,)


def split_of(ids_by_shard, fraction):
    """A split of shards of sorted ids, as their table of counts gives it."""
    ids = [np.sort(np.asarray(ids, dtype=np.uint64)) for ids in ids_by_shard]
    held_out = [split_counts(each)[split_row(fraction)] for each in ids]
    return Split([len(each) for each in ids], held_out), np.concatenate(ids)


@pytest.mark.parametrize("fraction", [0.0, 0.0001, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_split_is_disjoint_exhaustive_and_by_id(fraction):
    rng = np.random.default_rng(3)
    shards = [rng.integers(0, 2**64, n, dtype=np.uint64) for n in (0, 1, 700, 0, 5000, 33)]
    split, ids = split_of(shards, fraction)
    train = split.train(np.arange(split.num_train))
    validation = split.validation(np.arange(split.num_validation))
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(len(ids)))
    limit = round(fraction * 10_000) * 2**64 // 10_000
    assert all(int(i) < limit for i in ids[validation])
    assert all(int(i) >= limit for i in ids[train])
    with pytest.raises(IndexError):
        split.train([split.num_train])
    with pytest.raises(IndexError):
        split.validation([-1])


def test_split_at_the_edges_of_the_id_range():
    edges = [0, 2**64 // 2 - 1, 2**64 // 2, 2**64 - 1]
    split, _ = split_of([edges], 0.5)
    assert split.validation(np.arange(2)).tolist() == [0, 1]
    assert split_counts(np.array(edges, dtype=np.uint64))[-1] == 4


def test_split_keeps_sides_when_shards_are_added():
    rng = np.random.default_rng(4)
    shards = [rng.integers(0, 2**64, 300, dtype=np.uint64) for _ in range(4)]
    few, _ = split_of(shards[:2], 0.1)
    more, _ = split_of(shards, 0.1)
    before = few.validation(np.arange(few.num_validation))
    after = more.validation(np.arange(more.num_validation))
    assert before.tolist() == after[after < 600].tolist()


def test_every_epoch_visits_every_training_record_once_in_a_new_order():
    split = Split([200, 300], [20, 30])
    n = split.num_train
    sampler = Sampler([split], seed=3)
    epochs = sampler.records(np.arange(3 * n)).reshape(3, n)
    expected = sorted(split.train(np.arange(n)).tolist())
    assert all(sorted(e.tolist()) == expected for e in epochs)
    assert not (epochs[0] == epochs[1]).all()
    assert not (epochs[1] == epochs[2]).all()
    other = Sampler([split], seed=4).records(np.arange(n))
    assert not (other == epochs[0]).all()
    # Any part of the stream alone is the same as within the whole: resume needs one number.
    part = sampler.records(np.arange(n - 5, n + 5))
    assert part.tolist() == epochs.ravel()[n - 5 : n + 5].tolist()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 12])
def test_global_order_does_not_depend_on_the_number_of_ranks(ranks):
    parts = [rank_samples(120, 12, rank, ranks) for rank in range(ranks)]
    assert np.concatenate(parts).tolist() == list(range(120, 132))


def test_sampler_refuses():
    with pytest.raises(ConfigError, match="global_batch_size = 12"):
        rank_samples(0, 12, 0, 5)
    with pytest.raises(DataError, match="no training records"):
        Sampler([Split([0], [0])], 1)
