"""Checkpoints written by two ranks: faults, crashes, damage, and megatron-core's own functions."""

from typing import Any

import pytest

from megatron_cogview.testing.distributed import run_distributed


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One launch for all of them."""
    arguments = {"folder": str(tmp_path_factory.mktemp("checkpoints"))}
    return run_distributed("tests.parallel.checkpoint_cases:run", 2, arguments, timeout_s=150)


def test_what_is_saved_is_the_step_it_names(results: list[dict[str, Any]]) -> None:
    for rank in results:
        found = rank["snapshots"]
        assert found["bitwise"]
        assert found["kept"] == [f"step_0000000{n}" for n in (4, 7, 8, 9)]
        assert found["before"] == [9, 8, 7, 4, 4, None]
        # One that could not be read when the run went back to step 4 is only set aside.
        assert found["left"] == [
            ["step_00000004", "step_00000007"],
            ["step_00000004", "step_00000007.unreadable"],
        ]


def test_a_disk_that_refuses_ends_a_save_and_nothing_else(results: list[dict[str, Any]]) -> None:
    for rank in results:
        assert rank["faults"]["wrong"] == []
        assert rank["faults"]["trials"] > 100
        # The other faults hit calls that the victim does not make, or what is done afterwards.
        assert rank["faults"]["failed"] > rank["faults"]["trials"] / 2


def test_a_crash_while_committing_leaves_the_old_or_the_new(results: list[dict[str, Any]]) -> None:
    for rank in results:
        assert rank["crashes"]["wrong"] == []
        assert rank["crashes"]["trials"] > 20
        assert rank["crashes"]["outcomes"] == [1, 2]


def test_damage_is_passed_over(results: list[dict[str, Any]]) -> None:
    for rank in results:
        found = rank["damage"]
        assert found["unseen"] == []
        assert found["trials"] > 100
        assert {"__0_0.distcp", "__1_0.distcp", ".metadata"} < set(found["files"])
        assert (found["whole"], found["renamed"]) == (2, 1)
        assert "no checkpoint is whole" in found["none"]


@pytest.mark.parametrize("layout", ["tensor", "pipeline", "distributed"])
def test_megatron_core_reads_and_is_read(results: list[dict[str, Any]], layout: str) -> None:
    for rank in results:
        found = rank["stock"][layout]
        assert all(found[what] for what in ("reads", "written", "same keys", "whole"))
        if layout != "distributed":
            keys, right = found["optimizer"]
            assert keys == ["optimizer.state.exp_avg", "optimizer.state.exp_avg_sq"]
            assert right
