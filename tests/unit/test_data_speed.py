"""analysis.data_speed: every study runs at a small size and compares what it says it compares."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from megatron_cogview.analysis.data_speed import opening, preparing, reading, workers
from megatron_cogview.analysis.data_speed.report import Settings, measure, rows, table
from megatron_cogview.configs.errors import ConfigError, DataError
from megatron_cogview.data.shard_set import ShardSet
from megatron_cogview.data.webdataset import WebDatasetTars
from megatron_cogview.testing.data_faults.kills import make_encoder, write_tars
from megatron_cogview.tokenization.text import train


def pictures(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (60, 80, 3), dtype=np.uint8) for _ in range(count)]


def test_decoding_and_captions(tmp_path: Path) -> None:
    for row in preparing.decoding(pictures(2), repeats=1):
        assert row["ratio"] == pytest.approx(row["ours_per_second"] / row["pillow_per_second"])
        # Noise is the worst case for the decoder's own scaling, and still close.
        assert 0 < row["mean_levels_apart"] < 4
    train(["a red square"], tmp_path / "t.model", 300)
    result = preparing.captions(["a red square", "b"] * 40, tmp_path / "t.model", repeats=1)
    assert result["captions"] == 80
    assert result["ratio"] > 0


def test_alternately_runs_each_way_once_more_than_it_counts() -> None:
    calls: list[str] = []
    ways = {name: (lambda name=name: calls.append(name)) for name in "ab"}  # type: ignore[misc]
    preparing.alternately(ways, repeats=3)
    assert calls == ["a", "b"] * 4


def test_sparse_sets_are_real_ones_of_the_right_size(tmp_path: Path) -> None:
    opening.write_sparse_set(tmp_path, 5000, 5)
    shards = ShardSet(tmp_path, verify_crc=False)
    assert len(shards) == 5000
    assert shards.split(0.01).num_validation == 50
    assert not shards.read(np.array([4999, 0]))["text"].any()
    assert all(p.stat().st_blocks * 512 < p.stat().st_size / 2 for p in tmp_path.glob("shard-*"))


def test_opening_against_megatron_core() -> None:
    ours, peer = opening.ours(3000, 3, sample=10**6), opening.peer(1000)
    for row in (ours, peer):
        assert row["seconds"] > 0
        assert row["bytes"] > 0
    assert ours["records"] == 3000


def test_a_failed_measurement_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="NameError"):
        opening._measure(("", "nonsense"))


def noise(records: np.ndarray) -> np.ndarray:
    return np.random.default_rng().integers(0, 9999, (len(records), 1088)).astype("u2")


def test_reading_compares_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    result = reading.comparison(256, 2, repeats=1, web_records=128)
    assert result["times_megatron_core"] == pytest.approx(
        result["ours_per_second"] / result["megatron_core_per_second"]
    )
    monkeypatch.setattr(reading, "_tokens", noise)
    with pytest.raises(RuntimeError, match="same tokens"):
        reading.comparison(128, 1, repeats=1, web_records=64)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_workers(tmp_path: Path) -> None:
    source = WebDatasetTars(write_tars(tmp_path / "pairs"))
    pairs = [item for part in source.parts() for item in source.read(part)]
    result = workers.scaling(pairs, make_encoder(tmp_path), repeats=1, batch_size=8)
    assert result["pairs"] == len(pairs) == 144
    assert result["ratio"] == pytest.approx(
        result["one_worker_seconds"] / result["two_workers_seconds"]
    )


def test_the_report_is_a_table_of_figures_and_targets(tmp_path: Path) -> None:
    data = write_tars(tmp_path / "pairs")
    train(["picture 1 图"], tmp_path / "t.model", 60)
    settings = Settings(
        data=data, text_tokenizer=tmp_path / "t.model", studies=("decoding", "captions"),
        repeats=1, pictures=2,
    )  # fmt: skip
    results = measure(settings)
    assert json.loads(json.dumps(results))["commit"] == results["commit"]
    assert len(list(rows(results))) == 3
    results["captions"]["ratio"] = 0.5
    assert "| 0.9 x | **no** |" in table(results)
    results["captions"]["ratio"] = 0.95
    assert "| 0.9 x | yes |" in table(results)
    with pytest.raises(DataError, match="pairs, 500 are needed"):
        measure(Settings(data=data, text_tokenizer=tmp_path / "t.model", pictures=500))
    with pytest.raises(ConfigError, match="repeats"):
        measure(Settings(data=data, text_tokenizer=tmp_path / "t.model", repeats=0))
