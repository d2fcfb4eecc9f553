"""data.duplicate_ids: the count is that of a set of Python integers."""

import numpy as np
import pytest

from megatron_cogview.data.duplicate_ids import SampleIds


@pytest.mark.parametrize("ids_at_once", [1, 7, 1000])
def test_duplicates_by_ranges_are_those_of_a_set(ids_at_once):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**64, 40, dtype=np.uint64)
    values[:2] = 0, 2**64 - 1
    shards = [np.sort(rng.choice(values, size)) for size in (30, 0, 50, 1)]
    with SampleIds(sum(map(len, shards)), ids_at_once) as ids:
        for shard in shards:
            ids.add(shard)
        everything = np.concatenate(shards)
        assert ids.count_duplicates() == len(everything) - len(set(everything.tolist()))


def test_nothing_at_all():
    with SampleIds(0) as ids:
        assert ids.count_duplicates() == 0


def test_little_is_in_memory_at_a_time(monkeypatch):
    values = np.random.default_rng(0).integers(0, 2**64, (10, 1000), dtype=np.uint64)
    read, original = [], SampleIds._read

    def recording(self, start, end):
        read.append(end - start)
        return original(self, start, end)

    monkeypatch.setattr(SampleIds, "_read", recording)
    with SampleIds(values.size, ids_at_once=1000) as ids:
        for shard in values:
            ids.add(np.sort(shard))
        ids.count_duplicates()
    by_range = np.array(read).reshape(10, 10).sum(axis=1)
    assert by_range.sum() == values.size
    assert by_range.max() < 1200
