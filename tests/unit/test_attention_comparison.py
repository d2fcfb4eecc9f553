"""analysis.attention_comparison: the share of keys, and what two finished runs are made into."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_cogview.analysis.attention_comparison import (
    compare,
    curve,
    keys_seen,
    setting,
    table,
    text_regions,
)
from megatron_cogview.configs.errors import ConfigError, DataError, TrainingError
from megatron_cogview.configs.model import AttentionConfig
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.data.shards import shard_name
from megatron_cogview.testing.toy_run import toy_config, write_tokens

SPARSE = AttentionConfig(kind="pivot", window_block=4, window_blocks=2, num_pivots=22)
BY_NAME = replace(SPARSE, backend="reference")
"""At any length."""


def shared(attention: AttentionConfig = SPARSE, steps: int = 60) -> RunConfig:
    return setting("tiny", Path("tokens"), steps, attention)


def test_share_of_keys() -> None:
    # All text and the window, counted by hand: no place is left for pivots.
    config = shared(replace(SPARSE, num_pivots=16))
    length = config.sequence.model_length
    pairs = 0
    for query in range(length):
        window = set(range(max(0, query // 4 * 4 - 4), query + 1))
        pairs += len(window | {key for key in range(16) if key <= query})
    assert keys_seen(config, [16, 16]) == pytest.approx(pairs / (length * (length + 1) / 2))
    assert keys_seen(shared(replace(SPARSE, window_blocks=99)), [16, 16]) == 1.0
    # A longer text is seen by more queries.
    short, long = (keys_seen(shared(), [text] * 4) for text in (9, 14))
    assert keys_seen(shared(), [9, 14] * 2) == pytest.approx((short + long) / 2, rel=0.02)
    assert short < long < 0.5


def on_shards(folder: Path) -> RunConfig:
    """A run on random records, of which the first epoch's are all looked at."""
    write_tokens(folder / "tokens")
    config = toy_config(folder / "tokens", folder / "run", steps=60)
    return replace(config, model=replace(config.model, attention=BY_NAME))


def test_texts_are_those_of_the_shards(tmp_path: Path) -> None:
    config = on_shards(tmp_path)
    records = np.load(tmp_path / "tokens" / shard_name(0))
    # [ROI1], the text, [BASE], [BOI1].
    assert text_regions(config) == [int(n) + 3 for n in records["text_length"]]


class Trainings:
    """In the place of two trainings: writes their rows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: dict[str, int]) -> None:
        self.configs: dict[str, RunConfig] = {}
        self.steps, self.code, self.real = steps, 0, subprocess.run
        monkeypatch.setattr(subprocess, "run", self)

    def __call__(self, words: list[str], **more: Any) -> Any:
        if "pretrain" not in words:  # git tells the commit
            return self.real(words, **more)
        config = RunConfig.from_json(Path(words[-1]).read_text())
        kind = config.model.attention.kind
        self.configs[kind] = config
        offset = 0.0 if kind == "dense" else 0.01
        rows: list[dict[str, float]] = []
        for step in range(1, self.steps[kind] + 1):
            loss = 5.0 / step + offset
            rows.append({"step": step, "loss": loss, "text_loss": loss, "image_loss": 2 * loss})
        rows.append({"step": self.steps[kind], "validation_loss": 1.0 + offset})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (Path(config.training.output) / "metrics.jsonl").write_text(lines)
        return subprocess.CompletedProcess(words, self.code)


def test_two_runs_that_differ_in_attention_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings = Trainings(monkeypatch, {"dense": 60, "pivot": 60})
    results = compare(on_shards(tmp_path), tmp_path)
    dense, pivot = trainings.configs["dense"], trainings.configs["pivot"]
    assert dense.model.attention == replace(pivot.model.attention, kind="dense")
    assert replace(pivot.model, attention=dense.model.attention) == dense.model
    assert (dense.data, dense.optimizer, dense.training.seed) == (
        *(pivot.data, pivot.optimizer, pivot.training.seed),
    )
    # Means over the last six steps.
    mean = sum(5.0 / step for step in range(55, 61)) / 6
    assert results["dense"]["loss"] == pytest.approx(mean)
    assert results["pivot"]["validation_loss"] == pytest.approx(1.01)
    assert "| validation_loss | 1.0000 | 1.0100 | +1.00 % |" in table(results)
    assert len(results["course"]["loss"]) == 10
    step, first, second = results["course"]["loss"][0]
    assert (step, second - first) == (6, pytest.approx(0.01))
    assert results["course"]["validation_loss"] == [[60, 1.0, 1.01]]
    assert results["torch"] in table(results)
    assert json.loads((tmp_path / "comparison.json").read_text()) == results
    with Image.open(tmp_path / "attention.png") as picture:
        assert picture.width > 600
        assert len(set(picture.convert("RGB").get_flattened_data())) > 50


def test_runs_that_cannot_be_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainings, config = Trainings(monkeypatch, {"dense": 60, "pivot": 59}), on_shards(tmp_path)
    with pytest.raises(DataError, match="different steps"):
        compare(config, tmp_path)
    trainings.code = 1
    with pytest.raises(TrainingError, match=r"dense\.json: its training ended with exit code 1"):
        compare(config, tmp_path)


def test_two_dense_runs_are_not_a_comparison(tmp_path: Path) -> None:
    """At this length ``auto`` takes dense attention for regions that see nearly everything."""
    config = on_shards(tmp_path)
    wide = replace(SPARSE, window_block=16, window_blocks=4, num_pivots=40)
    config = replace(config, model=replace(config.model, attention=wide))
    with pytest.raises(ConfigError, match="takes dense attention"):
        compare(config, tmp_path)


def test_rows_without_a_number_are_left_out() -> None:
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 2, "x": 1.0}]
    assert curve(rows, "loss").tolist() == [[1.0, 2.0]]  # type: ignore[arg-type]
