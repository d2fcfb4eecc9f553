"""Prompts drawn from captions: distinct, fixed, independent of order, within the budget."""

import json
from pathlib import Path

import pytest

from megatron_cogview.configs.errors import ConfigError, DataError
from megatron_cogview.data.prompts import TextLimit, sample_captions, write_prompts
from megatron_cogview.generation.prompts import read_prompts

CAPTIONS = [f"caption {i}" for i in range(100)]


class Characters:
    """Counts characters as ids."""

    def encode_batch(self, captions: list[str]) -> list[list[int]]:
        return [[0] * len(caption) for caption in captions]


def test_the_draw_depends_on_the_set_of_captions_and_the_seed_alone() -> None:
    drawn = sample_captions(CAPTIONS, 10)
    assert len(set(drawn)) == 10
    assert set(drawn) <= set(CAPTIONS)
    assert sample_captions([*reversed(CAPTIONS), *CAPTIONS, " caption 1 "], 10) == drawn
    assert sample_captions(CAPTIONS, 10, seed=1) != drawn
    assert sample_captions(CAPTIONS, 20)[:10] == drawn


def test_too_few_captions_give_all_and_none_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    assert sorted(sample_captions(["a", "b", "", "  "], 5)) == ["a", "b"]
    assert "only 2 distinct captions" in caplog.text
    with pytest.raises(DataError, match="no caption"):
        sample_captions(["", " "], 5)
    with pytest.raises(ConfigError, match="count = 0"):
        sample_captions(["a"], 0)


def test_captions_over_the_budget_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    limit = TextLimit(Characters(), 3)  # type: ignore[arg-type]
    assert sorted(sample_captions(["abc", "abcd", "a"], 2, limit=limit)) == ["a", "abc"]
    assert "1 captions over the text budget" in caplog.text


def test_generation_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "prompts.jsonl"
    write_prompts(path, ["红色的裙子", 'a "dress"'])
    assert [p.caption for p in read_prompts(path)] == ["红色的裙子", 'a "dress"']
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[0])["id"] == "prompt-0000"
