"""``--profile``: the right steps, on the right ranks, and never at the cost of the run."""

import gzip
import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_cogview.configs.presets import tiny
from megatron_cogview.training.profiling import profiler

pytestmark = pytest.mark.filterwarnings("ignore:Profiler won't be using warmup")


def groups(rank=0, tensor_rank=0, data_rank=0):
    return SimpleNamespace(
        rank=rank, tensor_rank=tensor_rank, data_rank=data_rank, device=torch.device("cpu")
    )


def config(first, count, on=True):
    base = tiny()
    training = replace(base.training, profile_from=first, profile_steps=count)
    return replace(base, profile=on, training=training)


def run(folder, first, count, steps, where=None):
    """Steps that a trace can tell apart."""
    with profiler(config(first, count), where or groups(), folder) as profile:
        for step in range(1, steps + 1):
            with torch.profiler.record_function(f"marked step {step}"):
                torch.ones(4, 4) @ torch.ones(4, 4)
            profile.step()


def seen(folder, name="rank_00000"):
    path = folder / "profile" / f"{name}.json.gz"
    names = {
        str(event["name"])
        for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    }
    assert "aten::mm" in names
    return sorted(int(name[12:]) for name in names if name.startswith("marked step "))


@pytest.mark.parametrize(
    ("first", "count", "steps", "traced"),
    [(3, 2, 6, [3, 4]), (1, 1, 3, [1]), (2, 3, 4, [2, 3, 4]), (2, 5, 3, [2, 3])],
)
def test_the_steps_asked_for_are_traced(tmp_path, first, count, steps, traced):
    run(tmp_path, first, count, steps)
    assert seen(tmp_path) == traced
    table = (tmp_path / "profile" / "rank_00000.txt").read_text()
    assert "aten::mm" in table and "Self CPU" in table


def test_too_short_a_run_is_told(tmp_path, caplog):
    run(tmp_path, 5, 2, 3)
    assert "ended after 3 steps, and training.profile_from = 5" in caplog.text
    assert not (tmp_path / "profile").exists()


def test_one_rank_of_each_stage(tmp_path):
    run(tmp_path, 1, 1, 1, groups(rank=4))
    assert seen(tmp_path, "rank_00004") == [1]
    for other in (groups(rank=1, tensor_rank=1), groups(rank=2, data_rank=1)):
        run(tmp_path / "other", 1, 1, 2, other)
    assert not (tmp_path / "other").exists()


def test_nothing_happens_unasked(tmp_path):
    with profiler(config(1, 1, on=False), groups(), tmp_path) as profile:
        profile.step()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_costs_the_trace_only(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "profile").write_text("no folder")
    run(tmp_path, 1, 1, 2)
    assert "the profile cannot be written" in caplog.text


def test_an_error_of_the_run_comes_through(tmp_path):
    with pytest.raises(KeyError), profiler(config(1, 3), groups(), tmp_path) as profile:
        profile.step()
        raise KeyError
