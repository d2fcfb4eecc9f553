"""Training survives kills and damage bit for bit, and its checkpoints fit every layout."""

from pathlib import Path
from typing import Any

import pytest

from megatron_cogview.testing.distributed import run_distributed
from megatron_cogview.testing.toy_run import NUM_RECORDS, write_tokens
from megatron_cogview.training.metrics import read_metrics
from megatron_cogview.training.throughput import MEASURED
from tests.parallel.training_cases import STEPS

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2_sp": {"tensor": 2, "sequence": True},
    "pp2_recompute": {"pipeline": 2, "recompute": "full"},
    "dp2_distributed": {"distributed_optimizer": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("training")
    write_tokens(path / "tokens")
    return path


@pytest.fixture(scope="module")
def resumed(folder: Path) -> list[dict[str, Any]]:
    arguments = {"folder": str(folder), "layouts": LAYOUTS}
    return run_distributed("tests.parallel.training_cases:resume", 2, arguments, 300)


def test_resumed_run_equals_uninterrupted_run_bitwise(resumed: list[dict[str, Any]]) -> None:
    for rank, results in enumerate(resumed):
        for name, digests in results.items():
            assert digests["resumed"] == digests["whole"], f"{name}, rank {rank}"
            assert digests["fresh"] != digests["whole"]


def _rows(run: Path) -> list[dict[str, float]]:
    """Everything a run told but its times."""
    found = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in found]


def test_metrics_of_a_resumed_run_read_as_one_run(
    resumed: list[dict[str, Any]], folder: Path
) -> None:
    whole = _rows(folder / "tp2_sp-whole")
    assert _rows(folder / "tp2_sp-killed") == whole
    losses = [row["step"] for row in whole if "loss" in row]
    assert losses == list(range(1, STEPS + 1))
    assert [row["step"] for row in whole if "validation_loss" in row] == [3, 6]


def test_checkpoint_loads_under_other_layouts(resumed: list[dict[str, Any]], folder: Path) -> None:
    several = {"tp2": {"tensor": 2}, "pp2": {"pipeline": 2}, "dp2": {}}
    arguments = {"folder": str(folder), "source": "tp2_sp", "layouts": several}
    two = run_distributed("tests.parallel.training_cases:reshard", 2, arguments, 180)[0]
    one = run_distributed(
        "tests.parallel.training_cases:reshard", 1, {**arguments, "layouts": {"single": {}}}, 120
    )[0]
    results = {**two, **one}
    assert len({r["weights"] for r in results.values()}) == 1, results
    for result in results.values():
        assert result["loss"] == pytest.approx(one["single"]["loss"], rel=1e-6)


def test_damaged_checkpoint_is_passed_over(resumed: list[dict[str, Any]], folder: Path) -> None:
    results = run_distributed(
        "tests.parallel.training_cases:damaged", 2, {"folder": str(folder)}, 180
    )
    for rank, result in enumerate(results):
        assert result["names"] == ["step_00000004", "step_00000006"]
        assert result["found"] == "step_00000004"
        assert "model.num_layers is 4 in the checkpoint and 3 here" in result["refusals"]["layers"]
        assert "data.seed is 1234 in the checkpoint and 99 here" in result["refusals"]["seed"]
        assert "text tokenizer t, and this is other" in result["refusals"]["tokenizer"]
        assert result["again"] == resumed[rank]["tp2_sp"]["whole"]
        assert result["absent"] is None


def test_what_one_rank_cannot_read_is_passed_over_by_all(
    resumed: list[dict[str, Any]], folder: Path
) -> None:
    target = "tests.parallel.training_cases:unreadable"
    for result in run_distributed(target, 2, {"folder": str(folder)}, 150):
        assert result["blob"] == result["manifest"] == {"start": 4, "digest": result["expected"]}
        assert "no checkpoint can be loaded" in result["none"]
        assert "step_00000006: division by zero" in result["none"]
        assert "step_00000004: division by zero" in result["none"]


def test_generation_is_the_same_for_any_layout_batch_and_cache(folder: Path) -> None:
    one, two = (
        run_distributed(
            "tests.parallel.training_cases:generate", n, {"folder": str(folder), "tensor": n}, 180
        )
        for n in (1, 2)
    )
    for kind in ("dense", "pivot"):
        codes = one[0][kind]
        assert one[0][f"{kind}_uncached"] == codes
        assert one[0][f"{kind}_batch_64"] == codes
        assert two[0][kind] == two[1][kind] == codes
        # Our kernels decode alike, also with half of the heads.
        assert one[0][f"{kind}_kernel"] == two[0][f"{kind}_kernel"] == codes[:2]
        assert len({str(picture) for picture in codes}) == len(codes)
    assert one[0]["dense"] != one[0]["pivot"]
    # A plan for each of four layers and two batches, for texts differ in length.
    assert one[0]["pivot_kernel_plans"] == 8
    assert one[0]["dense_kernel_plans"] == 0


def test_the_records_are_enough_for_the_run() -> None:
    """Otherwise the kill would fall on an epoch's edge only."""
    assert NUM_RECORDS < STEPS * 8


def test_new_optimizer_settings_hold_in_a_resumed_run(folder: Path) -> None:
    target = "tests.parallel.training_cases:settings"
    for result in run_distributed(target, 2, {"folder": str(folder)}, 150):
        assert result["start"] == 2
        assert sorted(result["groups"]) == [[0.0, 0.9, 1e-3], [0.5, 0.9, 1e-3]]


def test_a_validation_that_a_stop_cuts_short_is_made_up_for(folder: Path) -> None:
    target = "tests.parallel.recovery_cases:stop_while_validating"
    for result in run_distributed(target, 2, {"folder": str(folder)}, 150):
        assert not result["finished"]
        assert result["step"] == 3
        assert len(result["calls"]) == 1
        assert result["resumed"] == result["whole"]
    assert _rows(folder / "validated-stopped") == _rows(folder / "validated-whole")


@pytest.fixture(scope="module")
def hurt(folder: Path) -> list[dict[str, Any]]:
    target = "tests.parallel.recovery_cases:roll_back"
    return run_distributed(target, 2, {"folder": str(folder)}, 200)


def test_a_bad_batch_of_one_rank_is_left_out_by_all(hurt: list[dict[str, Any]]) -> None:
    for rank in hurt:
        assert rank["one"]["batches"] == list(range(STEPS))
        assert rank["one"]["progress"]["bad_steps"] == 1
        assert rank["one"]["digest"] == rank["told"]["digest"]
        assert rank["told"]["batches"] == [0, 1, 2, 4, 5]


def test_bad_batches_in_a_row_send_the_run_back_to_go_on_without_them(
    hurt: list[dict[str, Any]], folder: Path
) -> None:
    for rank in hurt:
        # Checkpoints after 2 and 4 steps: the second was made between the two bad steps.
        assert rank["two"]["batches"] == [0, 1, 2, 3, 4, 2, 5, 6, 7]
        assert rank["two"]["progress"]["left_out"] == [[3, 5]]
        assert rank["two"]["progress"]["rollbacks"] == 1
    events = (folder / "back-two" / "events.jsonl").read_text()
    assert "batches 4 to 5 are left out" in events
    rows = read_metrics(folder / "back-two" / "metrics.jsonl")
    losses = [row["step"] for row in rows if "loss" in row]
    assert losses == list(range(1, STEPS + 1))


def test_a_restart_remembers_what_was_left_out(hurt: list[dict[str, Any]]) -> None:
    for rank in hurt:
        assert rank["restarted"]["batches"] == [2, 5, 6, 7]
        assert rank["restarted"]["progress"] == rank["two"]["progress"]
        assert rank["restarted"]["digest"] == rank["two"]["digest"]


def test_a_run_that_goes_wrong_again_and_again_says_so(hurt: list[dict[str, Any]]) -> None:
    for rank in hurt:
        assert "went back 2 times already" in rank["all"]["message"]
        assert "batches 8 to 9" in rank["all"]["message"]
        assert "nothing to go back to" in rank["first"]["message"]
