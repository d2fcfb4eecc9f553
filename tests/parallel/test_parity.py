"""Every parallel layout trains as the unsharded fp64 oracle does, from one set of weights."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cogview.configs.model import ModelConfig
from megatron_cogview.kernels.pivot_attention.reference import visible_keys
from megatron_cogview.testing.closeness import assert_close_by_name, relative_rms, split_qkv_bias
from megatron_cogview.testing.distributed import run_distributed
from megatron_cogview.testing.oracle import Oracle, Weights, random_weights
from tests.parallel.cases import IMAGE_WEIGHT, LR, MODELS, STEPS, TEXT_WEIGHT, VOCAB, global_batch

BOUND = 1e-5
"""Relative RMS of losses, gradients and weights, fp32 against fp64."""


def layout(model: str = "paper", micro_batch: int = 4, **parallel: Any) -> dict[str, Any]:
    return {"model": model, "micro_batch": micro_batch, "parallel": parallel}


LAYOUTS = {
    1: {
        "single": layout(),
        "single_micro_batch_2": layout(micro_batch=2),
        "single_recompute": layout(recompute=True),
        "single_eq4": layout("eq4"),
        "single_pre": layout("pre"),
        "single_pivot": layout("pivot", micro_batch=8),
        "single_released_norm": layout("released_norm", micro_batch=8),
    },
    2: {
        "tp2": layout(tensor=2),
        "tp2_sp": layout(tensor=2, sequence=True),
        "tp2_sp_recompute": layout(tensor=2, sequence=True, recompute=True),
        "pp2": layout(pipeline=2, micro_batch=2),
        "pp2_interleaved": layout(pipeline=2, virtual_pipeline=2, micro_batch=2),
        "dp2": layout(),
        "dp2_distributed_optimizer": layout(distributed_optimizer=True, micro_batch=2),
        "tp2_eq4": layout("eq4", tensor=2),
        "tp2_pre_sp": layout("pre", tensor=2, sequence=True),
        "tp2_pivot_sp": layout("pivot", micro_batch=8, tensor=2, sequence=True),
        "pp2_pivot_recompute": layout("pivot", micro_batch=2, pipeline=2, recompute=True),
        "tp2_released_norm_sp": layout("released_norm", micro_batch=8, tensor=2, sequence=True),
    },
}


def pivot_masks(model: ModelConfig, step: int) -> list[torch.Tensor] | None:
    a = model.attention
    if a.kind == "dense":
        return None
    batch = global_batch(step)
    length = batch.tokens_BS.shape[1]
    return [
        visible_keys(
            batch.pivot_key_B2,
            length,
            length,
            length,
            window_block=a.window_block,
            window_blocks=a.window_blocks,
            num_pivots=a.num_pivots,
            layer_number=layer + 1,
            seed=a.pivot_seed,
        )
        for layer in range(model.num_layers)
    ]


def oracle_run(model: ModelConfig, weights: Weights) -> dict[str, Any]:
    """Five AdamW steps in fp64; decay off norms and biases."""
    weights = {name: w.clone().requires_grad_() for name, w in weights.items()}
    decayed = [w for w in weights.values() if w.dim() > 1]
    exempt = [w for w in weights.values() if w.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.04}, {"params": exempt, "weight_decay": 0.0}],
        lr=LR,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    oracle = Oracle(model, weights)

    def loss_of(step: int, text: float, image: float) -> torch.Tensor:
        b = global_batch(step)
        is_image = b.labels_BS < VOCAB.num_image_codes
        is_padding = b.labels_BS == VOCAB.command_id("[PAD]")
        scale = torch.where(is_image, image, text).double().masked_fill(is_padding, 0.0)
        return oracle.loss(
            b.tokens_BS, b.positions_BS, b.labels_BS, scale, pivot_masks(model, step)
        )

    steps, gradients = [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(step, TEXT_WEIGHT, IMAGE_WEIGHT)
        loss.backward()
        with torch.no_grad():
            text, image = loss_of(step, 1.0, 0.0), loss_of(step, 0.0, 1.0)
        grads = {name: w.grad.clone() for name, w in weights.items() if w.grad is not None}
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        steps.append([float(loss.detach()), float(text), float(image), norm])
        if step == 0:
            gradients = grads
        optimizer.step()
    with torch.no_grad():
        steps.append([float(loss_of(STEPS, TEXT_WEIGHT, IMAGE_WEIGHT))])
    return {
        "steps": steps,
        "gradients": gradients,
        "weights": {name: w.detach() for name, w in weights.items()},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parity")
    for name, model in MODELS.items():
        # The ranks start from fp32; the oracle must start from the same rounded values.
        weights = {k: v.float() for k, v in random_weights(model, seed=3).items()}
        save_file(weights, path / f"{name}.safetensors")
    return path


@pytest.fixture(scope="module")
def oracles(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        name: oracle_run(
            model, {k: v.double() for k, v in load_file(folder / f"{name}.safetensors").items()}
        )
        for name, model in MODELS.items()
    }


@pytest.fixture(scope="module", params=sorted(LAYOUTS))
def ranks(request: pytest.FixtureRequest, folder: Path) -> tuple[int, dict[str, Any]]:
    arguments = {"folder": str(folder), "layouts": LAYOUTS[request.param]}
    results = run_distributed("tests.parallel.cases:parity", request.param, arguments, 240)
    assert all(result == results[0] for result in results), "ranks report different losses"
    return request.param, results[0]


def test_layouts_equal_the_unsharded_oracle(
    ranks: tuple[int, dict[str, Any]], folder: Path, oracles: dict[str, dict[str, Any]]
) -> None:
    world_size, results = ranks
    problems = []
    for name, spec in LAYOUTS[world_size].items():
        expected, model = oracles[spec["model"]], MODELS[spec["model"]]
        try:
            for step, (actual, wanted) in enumerate(
                zip(results[name], expected["steps"], strict=True)
            ):
                assert actual == pytest.approx(wanted, rel=BOUND), f"step {step}"
            if not spec["parallel"].get("distributed_optimizer"):
                compare(folder, name, "gradients", expected, model)
            compare(folder, name, "weights", expected, model)
        except AssertionError as error:
            problems.append(f"== {name}\n{error}")
    assert not problems, "\n".join(problems)


def compare(
    folder: Path, name: str, what: str, expected: dict[str, Any], model: ModelConfig
) -> None:
    """All tensors within the bound; the key parts of qkv biases by magnitude only.

    A constant added to all keys moves every score of a row alike, so the true gradient of a key
    bias is zero; Adam turns its rounding noise into steps of the learning rate's size.
    """
    actual, actual_keys = split_qkv_bias(
        load_file(folder / f"{name}.{what}.safetensors"), model.num_heads
    )
    wanted, wanted_keys = split_qkv_bias(expected[what], model.num_heads)
    assert_close_by_name(actual, wanted, BOUND)
    assert set(actual) == set(wanted)
    for key, value in actual_keys.items():
        if what == "gradients":
            scale = wanted[key].abs().max()
            assert value.abs().max() < BOUND * scale, f"{key}: key part has a gradient"
        else:
            drift = (value - wanted_keys[key]).abs().max()
            assert drift <= 2.5 * LR * STEPS, f"{key}: key part moved by {drift:.1e}"


def test_the_comparison_can_fail(oracles: dict[str, dict[str, Any]]) -> None:
    """An error of 1e-4 in one tensor is seen, and models differ by far more than the bound."""
    gradients = oracles["paper"]["gradients"]
    name = "decoder.layers.2.mlp_bda.norm.weight"
    damaged = {**gradients, name: gradients[name] * 1.0001}
    with pytest.raises(AssertionError, match="mlp_bda"):
        assert_close_by_name(damaged, gradients, BOUND)
    for other in ("pivot", "released_norm", "pre"):
        table = "embedding.position_embeddings.weight"
        assert relative_rms(oracles[other]["gradients"][table], gradients[table]) > 10 * BOUND
