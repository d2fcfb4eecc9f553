"""What the ranks of the model tests run: one step with our kernels, or without, under a layout."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_cogview.configs.model import AttentionConfig, ModelConfig, NormConfig
from megatron_cogview.configs.parallel import ParallelConfig
from megatron_cogview.configs.presets import preset
from megatron_cogview.testing.oracle import random_weights
from tests.parallel.cases import LR, PIVOT, micro_batches, run_config, small_model

SAMPLES = 2


def model(kind: str, backend: Any, dropout: float, num_layers: int) -> ModelConfig:
    """Layers with every kernel, and PB-relax on all norms."""
    attention = PIVOT if kind == "pivot" else AttentionConfig()
    return small_model(
        num_layers=num_layers,
        attention=replace(attention, backend=backend),
        norm=NormConfig(backend=backend, relax_scope="all"),
        hidden_dropout=dropout,
        attention_dropout=dropout,
    )


def step(arguments: dict[str, Any]) -> dict[str, Any]:
    """Losses of each layout, and how many norms were made ahead; gathered gradients and weights go
    to files."""
    from megatron_cogview.parallel.topology import initialize
    from megatron_cogview.testing import fixtures

    results: dict[str, Any] = {}
    for name, settings in arguments["layouts"].items():
        parallel = ParallelConfig(**settings["parallel"])
        topology = initialize(parallel)
        backend, dropout = settings["backend"], settings.get("dropout", 0.0)
        base = run_config("paper", parallel, settings["micro_batch"], SAMPLES)
        shape = model(settings["kind"], backend, dropout, settings["layers"])
        config = replace(base, model=shape)
        config.check_layout(topology.world_size)
        engine, result, taken = _trained(config, topology)
        tensors = {f"gradient.{k}": v for k, v in fixtures.gradients(engine).items()}
        tensors |= {f"weight.{k}": v for k, v in fixtures.master_weights(engine).items()}
        if topology.rank == 0:
            save_file(tensors, Path(arguments["folder"]) / f"{name}.safetensors")
        counts: list[int] = [0] * topology.world_size
        dist.all_gather_object(counts, taken)
        losses = result.losses
        results[name] = {
            "losses": [losses.total, losses.text, losses.image, result.grad_norm],
            "made_ahead": counts,
        }
    return results


def _trained(config: Any, topology: Any) -> tuple[Any, Any, int]:
    from megatron_cogview.engines.megatron import MegatronEngine
    from megatron_cogview.model import norm
    from megatron_cogview.parallel.seeding import seed_initialization, seed_step
    from megatron_cogview.testing import fixtures

    seed_initialization(1, topology)
    engine = MegatronEngine(config, topology)
    exact = random_weights(config.model, seed=3)
    fixtures.load_weights(engine, {key: value.float() for key, value in exact.items()})
    seed_step(1, 0, topology)
    is_same, taken = norm._is_same, 0

    def counted(*tensors: torch.Tensor) -> bool:
        nonlocal taken
        taken += (found := is_same(*tensors))
        return found

    norm._is_same = counted
    try:
        batches = micro_batches(0, config, topology.data_rank, topology.data_size)
        result = engine.train_step(batches, LR)
    finally:
        norm._is_same = is_same
    assert result.updated
    return engine, result, taken


def preset_steps(arguments: dict[str, Any]) -> dict[str, list[float]]:
    """Losses and gradient norm of one step of every preset's model, cut down to one small layer,
    with every choice of kernels."""
    from megatron_cogview.parallel.topology import initialize

    topology = initialize(ParallelConfig())
    results = {}
    for name in arguments["presets"]:
        for kind, backend in arguments["choices"]:
            base = run_config("paper", ParallelConfig(), 1, 1)
            config = replace(base, model=_cut_down(preset(name).model, kind, backend))
            _, result, _ = _trained(config, topology)
            losses = result.losses
            found = [losses.total, losses.text, losses.image, result.grad_norm]
            results[f"{name}, {kind}, {backend}"] = found
    return results


def _cut_down(model: ModelConfig, kind: str, backend: Any) -> ModelConfig:
    """The preset's numerics at the size of the tests' models."""
    small = small_model()
    regions = {n: getattr(PIVOT, n) for n in ("window_block", "window_blocks", "num_pivots")}
    return replace(
        model,
        num_layers=1,
        hidden_size=small.head_dim,
        num_heads=1,
        max_positions=small.max_positions,
        vocab=small.vocab,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention=replace(model.attention, kind=kind, backend=backend, **regions),
        norm=replace(model.norm, backend=backend),
    )
