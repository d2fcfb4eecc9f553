"""checkpoint.identity and training.trainer: which data a resumed run may read."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_cogview.checkpoint.identity import check_belongs
from megatron_cogview.configs.data import DataConfig
from megatron_cogview.configs.errors import CheckpointError
from megatron_cogview.configs.presets import tiny
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.training.checkpoints import must_stay

PRINTS = {"text": "t", "image": "i", "data": "d"}


def resume(before: RunConfig, after: RunConfig, prints: dict[str, str]) -> None:
    wanted, continued = must_stay(after, prints)
    state = {"run": before.to_dict(), "fingerprints": PRINTS}
    check_belongs(Path("checkpoint"), state, after, wanted, continued)


def with_data(**fields: object) -> RunConfig:
    return replace(tiny(), data=DataConfig(**fields))  # type: ignore[arg-type]


def test_other_shards_are_refused_unless_accepted() -> None:
    run = with_data(shards=("a",))
    resume(run, run, PRINTS)
    other = {**PRINTS, "data": "e"}
    with pytest.raises(CheckpointError, match=r"other shards .*--data\.accept-changes"):
        resume(run, run, other)
    accepting = with_data(shards=("a",), accept_changes=True)
    resume(run, accepting, other)
    with pytest.raises(CheckpointError, match="text tokenizer"):
        resume(run, accepting, {**other, "text": "u"})


def test_a_folder_can_be_added_to_a_weighted_mixture() -> None:
    before = with_data(shards=("zh", "en"), weights=(2.0, 1.0))
    after = with_data(shards=("zh", "en", "art"), weights=(2.0, 1.0, 1.0))
    with pytest.raises(CheckpointError, match=r"data\.weights"):
        resume(before, after, PRINTS)
    accepting = replace(after, data=replace(after.data, accept_changes=True))
    resume(before, accepting, {**PRINTS, "data": "e"})
    with pytest.raises(CheckpointError, match=r"data\.seed"):
        resume(before, replace(accepting, data=replace(accepting.data, seed=5)), PRINTS)
