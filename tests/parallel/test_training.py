"""Training survives kills and damage bit for bit, and its checkpoints fit every layout."""

from pathlib import Path
from typing import Any

import pytest

from megatron_cogview.testing.distributed import run_distributed
from megatron_cogview.training.metrics import read_metrics
from tests.parallel.training_cases import NUM_RECORDS, STEPS, write_tokens

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2_sp": {"tensor": 2, "sequence": True},
    "pp2_recompute": {"pipeline": 2, "recompute": True},
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


def test_metrics_of_a_resumed_run_read_as_one_run(
    resumed: list[dict[str, Any]], folder: Path
) -> None:
    def rows(kind: str) -> list[dict[str, float]]:
        found = read_metrics(folder / f"tp2_sp-{kind}" / "metrics.jsonl")
        return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in found]

    whole = rows("whole")
    assert rows("killed") == whole
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
        assert len({str(picture) for picture in codes}) == len(codes)
    assert one[0]["dense"] != one[0]["pivot"]


def test_the_records_are_enough_for_the_run() -> None:
    """Otherwise the kill would fall on an epoch's edge only."""
    assert NUM_RECORDS < STEPS * 8


def test_nan_stops_the_run_unsaved_and_new_optimizer_settings_hold(folder: Path) -> None:
    target = "tests.parallel.training_cases:spoilt"
    for result in run_distributed(target, 2, {"folder": str(folder)}, 150):
        assert result["start"] == 2
        assert sorted(result["groups"]) == [[0.0, 0.9, 1e-3], [0.5, 0.9, 1e-3]]
        assert result["message"].startswith("step 3: loss nan")
        assert result["saved"] == ["step_00000002"]
