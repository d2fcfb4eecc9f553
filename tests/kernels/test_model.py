"""A step of the whole model with every kernel equals one without, under every kind of layout.

Without kernels and in one process it is held to the fp64 oracle by tests/parallel/test_parity.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_cogview.configs.presets import PRESETS
from megatron_cogview.testing.closeness import relative_rms
from megatron_cogview.testing.forked import run_forked

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="several processes on gloo; tests/parallel/test_gpu.py"
)

TARGET = "tests.kernels.model_cases:step"
BOUND = 1e-5
Settings = dict[str, Any]


def layout(
    kind: str, backend: str = "triton", micro_batch: int = 2, layers: int = 2, **parallel: Any
) -> Settings:
    return {
        "kind": kind,
        "backend": backend,
        "micro_batch": micro_batch,
        "layers": layers,
        "parallel": parallel,
    }


ALONE = {
    "dense": layout("dense", "reference"),
    "pivot": layout("pivot", "reference"),
    "pivot of four": layout("pivot", "reference", layers=4),
    "pivot, one process": layout("pivot"),
}
ON_KERNELS = ["pivot, one process"]
"""Of those, to be compared with the others."""
PAIRS = {
    "dense, tensor and sequence": layout("dense", tensor=2, sequence=True),
    "pivot, tensor": layout("pivot", tensor=2),
    # A layer for each of two virtual stages of two processes.
    "pivot of four, pipeline, full recompute": layout(
        "pivot", micro_batch=1, layers=4, pipeline=2, virtual_pipeline=2, recompute="full"
    ),
    "pivot, parameters collected late": layout(
        "pivot",
        micro_batch=1,
        distributed_optimizer=True,
        overlap_parameters=True,
        overlap_gradients=True,
    ),
}
DROPPED = {
    f"dropout, {recompute}": {
        **layout("pivot", micro_batch=1, pipeline=2, recompute=recompute),
        "dropout": 0.1,
    }
    for recompute in ("none", "full")
}
MADE_AHEAD = {
    # Each of two layers twice, but for the first norm of all; the final norm too.
    "pivot, one process": [4],
    "dense, tensor and sequence": [4, 4],
    "pivot, tensor": [4, 4],
    # Inside layers only; in each micro-batch twice, because all is computed again.
    "pivot of four, pipeline, full recompute": [8, 8],
    "pivot, parameters collected late": [0, 0],
    # One layer a stage, in two micro-batches; the second stage has the final norm.
    "dropout, none": [2, 4],
}

CHOICES = [(kind, backend) for kind in ("dense", "pivot") for backend in ("reference", "triton")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    steps = [
        (TARGET, processes, {"folder": str(folder), "layouts": layouts})
        for processes, layouts in ((1, ALONE), (2, PAIRS | DROPPED))
    ]
    arguments = {"presets": sorted(PRESETS), "choices": CHOICES}
    steps.append(("tests.kernels.model_cases:preset_steps", 1, arguments))
    alone, pairs, presets = run_forked(steps, timeout_s=400)
    return {**alone, **pairs, "presets": presets}


@pytest.mark.parametrize("name", [*ON_KERNELS, *PAIRS])
def test_losses_gradients_and_weights(name: str, folder: Path, results: dict[str, Any]) -> None:
    kind = name.split(",")[0]
    assert results[name]["losses"] == pytest.approx(results[kind]["losses"], rel=BOUND)
    found, expected = (load_file(folder / f"{which}.safetensors") for which in (name, kind))
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        if key.endswith("linear_qkv.bias"):
            # The key part's true gradient is zero.
            continue
        assert relative_rms(found[key], tensor) < BOUND, key


@pytest.mark.parametrize("name", MADE_AHEAD)
def test_norms_are_made_ahead_where_they_can_be(name: str, results: dict[str, Any]) -> None:
    assert results[name]["made_ahead"] == MADE_AHEAD[name]


def test_recomputation_draws_the_same_dropout(folder: Path, results: dict[str, Any]) -> None:
    """Gradients are added up in another order where the next layer's norm is not made ahead."""
    plain, again = (load_file(folder / f"{name}.safetensors") for name in DROPPED)
    losses = [results[name]["losses"][:3] for name in DROPPED]
    assert losses[0] == losses[1]
    assert losses[0][0] != pytest.approx(results["pivot"]["losses"][0], rel=1e-3)
    for key, tensor in plain.items():
        if not key.endswith("linear_qkv.bias"):
            assert relative_rms(again[key], tensor) < 1e-6, key


@pytest.mark.parametrize("kind", ["dense", "pivot"])
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_with_every_choice(preset: str, kind: str, results: dict[str, Any]) -> None:
    found = results["presets"]
    kernels, reference = (found[f"{preset}, {kind}, {b}"] for b in ("triton", "reference"))
    assert kernels == pytest.approx(reference, rel=BOUND)
    # The choice reaches the model: other keys give another loss.
    other = found[f"{preset}, {'pivot' if kind == 'dense' else 'dense'}, reference"]
    assert kernels[0] != pytest.approx(other[0], rel=10 * BOUND)
