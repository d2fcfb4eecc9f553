"""An armed step sees what the unsharded oracle has, under any layout, and changes no bit."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cogview.configs.model import ModelConfig
from megatron_cogview.testing.distributed import run_distributed
from megatron_cogview.testing.oracle import Oracle, random_weights
from tests.parallel.cases import MODELS, global_batch
from tests.parallel.parity_oracle import pivot_masks


def layout(model: str = "paper", micro_batch: int = 4, **parallel: Any) -> dict[str, Any]:
    return {"model": model, "micro_batch": micro_batch, "parallel": parallel}


LAYOUTS: dict[int, dict[str, Any]] = {
    1: {
        "single_recompute": layout(recompute="full"),
        "single_eq4_micro_batch_2": layout("eq4", micro_batch=2),
        "single_pivot": layout("pivot"),
    },
    2: {
        "tp2_sp": layout(tensor=2, sequence=True),
        "tp2_pivot_sp": layout("pivot", tensor=2, sequence=True),
        "pp2_pivot_recompute": layout("pivot", micro_batch=2, pipeline=2, recompute="full"),
        "pp2_interleaved": layout(pipeline=2, virtual_pipeline=2, micro_batch=2),
        "dp2": layout(),
    },
}


class Watched(Oracle):
    """Notes the largest activation between layers, and the largest score that is seen."""

    def __init__(self, config: ModelConfig, weights: dict[str, torch.Tensor]) -> None:
        super().__init__(config, weights)
        self.seen: dict[str, float] = {}

    def _norm(self, x: torch.Tensor, name: str, is_final: bool = False) -> torch.Tensor:
        layer = self.config.num_layers if is_final else 0
        if name.endswith(".input_layernorm"):
            layer = int(name.split(".")[2])
        if layer:
            self.seen[f"activation_max/layer_{layer:02}"] = x.abs().max().item()
        return super()._norm(x, name, is_final)

    def _attention(self, x_BSH: torch.Tensor, name: str, visible: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x_BSH.shape
        heads, dim = self.config.num_heads, self.config.head_dim
        qkv = self._linear(x_BSH, f"{name}.linear_qkv").view(batch, length, heads, 3, dim)
        scores = torch.einsum("bsnd,bknd->bnsk", qkv[..., 0, :], qkv[..., 1, :]) / math.sqrt(dim)
        layer = int(name.split(".")[2]) + 1
        largest = scores.abs().masked_fill(~visible, 0.0).max().item()
        self.seen[f"attention_score_max/layer_{layer:02}"] = largest
        return super()._attention(x_BSH, name, visible)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("watch")
    for name in ("paper", "eq4", "pivot"):
        weights = {k: v.float() for k, v in random_weights(MODELS[name], seed=3).items()}
        save_file(weights, path / f"{name}.safetensors")
    return path


def oracle(folder: Path, model: str) -> dict[str, float]:
    weights = {k: v.double() for k, v in load_file(folder / f"{model}.safetensors").items()}
    watched, batch = Watched(MODELS[model], weights), global_batch(0)
    with torch.no_grad():
        masks = pivot_masks(MODELS[model], batch.pivot_key_B2)
        watched.logits(batch.tokens_BS, batch.positions_BS, masks)
    assert len(watched.seen) == 2 * MODELS[model].num_layers
    return watched.seen


@pytest.mark.parametrize("world_size", sorted(LAYOUTS))
def test_an_armed_step_sees_everything_and_changes_nothing(world_size: int, folder: Path) -> None:
    arguments = {"folder": str(folder), "layouts": LAYOUTS[world_size], "world": world_size}
    ranks = run_distributed(
        "tests.parallel.watch_cases:everything", world_size, arguments, timeout_s=150
    )
    for name, spec in LAYOUTS[world_size].items():
        expected = oracle(folder, spec["model"])
        for found in (rank["watched"][name] for rank in ranks):
            assert found["seen"] == pytest.approx(expected, rel=1e-5), name
            assert found["armed"] == found["plain"], name
            assert found["plain"][0] != found["plain"][1]
            assert found["hooks_left"] == 0
            assert found["unseen"] == 0.0, "the last step's maxima must not stay"
    if world_size > 1:
        one_start, nothing = (rank["starts"] for rank in ranks)
        assert [start["devices"] for start in one_start] == [{"CPU": 2}]
        assert sum(one_start[0]["hosts"].values()) == 2
        assert nothing == []
