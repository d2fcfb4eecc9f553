"""What only a CUDA device can show: kernels against fp64 and the CPU, half-precision training.

Shapes: B batch, N heads, S sequence, D head dim, H hidden.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cogview.configs.parallel import ParallelConfig
from megatron_cogview.configs.precision import PrecisionConfig
from megatron_cogview.kernels.codebook_lookup.operator import nearest_code
from megatron_cogview.kernels.pb_relax_attention.reference import (
    causal_mask,
    fused_attention,
    pb_relax_attention,
)
from megatron_cogview.kernels.pivot_attention.sampler import pivot_mask
from megatron_cogview.kernels.scaled_layer_norm.reference import scaled_layer_norm
from megatron_cogview.testing.closeness import assert_close_by_name, relative_rms, split_qkv_bias
from megatron_cogview.testing.distributed import run_distributed
from megatron_cogview.testing.oracle import random_weights
from tests.parallel.cases import LR, MODELS, micro_batches, run_config
from tests.parallel.test_parity import oracle_run

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
LOSS_BOUND = {"fp16": 2e-3, "bf16": 1.5e-2}
GRADIENT_BOUND = {"fp16": 2e-2, "bf16": 1.5e-1}
"""Relative RMS against fp64.  Estimates: to be tightened once a GPU has measured them."""


def normal(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("length", [63, 128])
@pytest.mark.parametrize("name", sorted(DTYPES))
def test_both_attentions_against_fp64(name: str, length: int) -> None:
    """A few roundings of the format, outputs and gradients, at an ordinary size of scores."""
    dtype = DTYPES[name]
    exact = [normal(2, 3, length, 64, seed=i).to(dtype).double().requires_grad_() for i in range(3)]
    gradient = normal(2, 3, length, 64, seed=9).to(dtype)
    visible = causal_mask(length, length, torch.device("cpu"))
    scores = exact[0] @ exact[1].transpose(-1, -2) / 8.0
    wanted = torch.softmax(scores.masked_fill(~visible, float("-inf")), -1) @ exact[2]
    wanted_gradients = torch.autograd.grad(wanted, exact, gradient.double())
    bound = 8 * torch.finfo(dtype).eps
    for kind in ("reference", "fused"):
        inputs = [x.detach().to(DEVICE, dtype).requires_grad_() for x in exact]
        if kind == "fused":
            out = fused_attention(*inputs)
        else:
            out = pb_relax_attention(*inputs, visible.to(DEVICE), 32.0, "row")
        gradients = torch.autograd.grad(out, inputs, gradient.to(DEVICE))
        assert relative_rms(out.cpu(), wanted) < bound, kind
        for actual, expected in zip(gradients, wanted_gradients, strict=True):
            assert relative_rms(actual.cpu(), expected) < bound, kind


@pytest.mark.parametrize("rule", ["none", "token_max", "tensor_max_over_8"])
@pytest.mark.parametrize("name", sorted(DTYPES))
def test_scaled_layer_norm_against_fp64(name: str, rule: Any) -> None:
    dtype = DTYPES[name]
    x, weight, bias = (normal(*s, seed=i) for i, s in enumerate([(5, 3, 60), (60,), (60,)]))
    x, weight, bias = (v.to(dtype).double() for v in (x, weight, bias))
    wanted = scaled_layer_norm(x, weight, bias, 1e-5, rule)
    actual = scaled_layer_norm(*(v.to(DEVICE, dtype) for v in (x, weight, bias)), 1e-5, rule)
    assert relative_rms(actual.cpu(), wanted) < 4 * torch.finfo(dtype).eps


def test_pivots_are_those_of_the_cpu() -> None:
    keys = torch.tensor([[0, 7], [2**40 + 3, 64], [12345, 1]])
    for layer in (1, 48):
        wanted = pivot_mask(keys, 1088, 300, layer, 1234)
        assert torch.equal(pivot_mask(keys.to(DEVICE), 1088, 300, layer, 1234).cpu(), wanted)


def test_codes_are_those_of_the_cpu() -> None:
    vectors, codes = normal(3000, 48, seed=0).float(), normal(500, 48, seed=1).float()
    codes[77] = codes[12]  # a tie goes to the lower index everywhere
    vectors[:50] = codes[12]
    wanted = nearest_code(vectors, codes)
    assert set(wanted[:50].tolist()) == {12}
    assert torch.equal(nearest_code(vectors.to(DEVICE), codes.to(DEVICE)).cpu(), wanted)


def build(arguments: dict[str, Any], **precision: Any) -> tuple[Any, Any]:
    """Engine and configuration of the small model on one rank, with the weights of the file."""
    from megatron_cogview.engines.megatron import MegatronEngine
    from megatron_cogview.parallel.seeding import seed_initialization
    from megatron_cogview.parallel.topology import initialize
    from megatron_cogview.testing import fixtures

    topology = initialize(ParallelConfig())
    config = replace(
        run_config("paper", ParallelConfig(), 4),
        precision=PrecisionConfig(dtype=arguments["dtype"], **precision),
    )
    seed_initialization(1, topology)
    engine = MegatronEngine(config, topology)
    fixtures.load_weights(engine, load_file(arguments["weights"]))
    return engine, config


def three_steps(arguments: dict[str, Any]) -> list[list[float]]:
    """Losses of three steps; gradients of the first go to a file."""
    from megatron_cogview.testing import fixtures

    engine, config = build(arguments, initial_loss_scale=1024.0)
    steps = []
    for step in range(3):
        result = engine.train_step(micro_batches(step, config, 0, 1), LR)
        assert result.updated
        steps.append([result.losses.total, result.losses.text, result.losses.image])
        if step == 0:
            save_file(fixtures.gradients(engine), arguments["gradients"])
    return steps


def overflow(arguments: dict[str, Any]) -> dict[str, Any]:
    """One step whose scaled gradients cannot be held in fp16."""
    from megatron_cogview.testing import fixtures

    scale = 2.0**40
    engine, config = build(arguments, initial_loss_scale=scale, hysteresis=1)
    before = fixtures.weights(engine)
    result = engine.train_step(micro_batches(0, config, 0, 1), LR)
    after = fixtures.weights(engine)
    return {
        "updated": result.updated,
        "factor": result.loss_scale / scale,
        "same": all(torch.equal(before[name], after[name]) for name in before),
    }


def save_and_load(arguments: dict[str, Any]) -> dict[str, Any]:
    """Two steps, a checkpoint and a third step, against a fresh engine that loads it."""
    from megatron_cogview.checkpoint.saver import Saver
    from megatron_cogview.testing import fixtures

    engine, config = build(arguments)
    for step in range(2):
        engine.train_step(micro_batches(step, config, 0, 1), LR)
    saver = Saver(Path(arguments["folder"]), engine.topology, keep=2)
    saver.begin(2, {}, engine.sharded_state())
    folder = saver.wait()
    assert folder is not None
    results = [engine.train_step(micro_batches(2, config, 0, 1), LR)]
    whole = fixtures.weights(engine)
    engine, config = build(arguments)
    fresh = fixtures.weights(engine)
    engine.load(folder)
    results.append(engine.train_step(micro_batches(2, config, 0, 1), LR))
    resumed = fixtures.weights(engine)
    return {
        "losses": [result.losses.total for result in results],
        "worst": max(relative_rms(resumed[name], whole[name]) for name in whole),
        "moved": max(relative_rms(fresh[name], whole[name]) for name in whole),
    }


@pytest.fixture
def arguments(tmp_path: Path) -> dict[str, Any]:
    """Weights that every format holds exactly are not needed: each test rounds its own."""
    weights = {k: v.float() for k, v in random_weights(MODELS["paper"], seed=3).items()}
    save_file(weights, tmp_path / "w.safetensors")
    return {
        "weights": str(tmp_path / "w.safetensors"),
        "gradients": str(tmp_path / "g.safetensors"),
        "folder": str(tmp_path / "checkpoint"),
    }


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_engine_tracks_the_fp64_oracle(arguments: dict[str, Any], dtype: str) -> None:
    start = {
        name: value.to(DTYPES[dtype]).double()
        for name, value in load_file(arguments["weights"]).items()
    }
    expected = oracle_run(MODELS["paper"], start)
    steps = run_distributed("tests.parallel.test_gpu:three_steps", 1, arguments | {"dtype": dtype})
    for actual, wanted in zip(steps[0], expected["steps"][:3], strict=True):
        assert actual == pytest.approx(wanted[:3], rel=LOSS_BOUND[dtype])
    heads = MODELS["paper"].num_heads
    gradients, _ = split_qkv_bias(load_file(arguments["gradients"]), heads)
    wanted_gradients, _ = split_qkv_bias(expected["gradients"], heads)
    assert_close_by_name(gradients, wanted_gradients, GRADIENT_BOUND[dtype])


def test_overflow_skips_the_step_and_halves_the_scale(arguments: dict[str, Any]) -> None:
    result = run_distributed("tests.parallel.test_gpu:overflow", 1, arguments | {"dtype": "fp16"})
    assert result[0] == {"updated": False, "factor": 0.5, "same": True}


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_training_goes_on_from_a_checkpoint(arguments: dict[str, Any], dtype: str) -> None:
    """Closely and not bit for bit: some CUDA gradients are sums in no fixed order."""
    result = run_distributed(
        "tests.parallel.test_gpu:save_and_load", 1, arguments | {"dtype": dtype}
    )
    result = result[0]
    assert result["losses"][1] == pytest.approx(result["losses"][0], rel=1e-4)
    assert result["worst"] < 1e-2
    assert result["moved"] > result["worst"]
