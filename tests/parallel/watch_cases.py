"""What the ranks of the watch's tests run.  Results are JSON values."""

import contextlib
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_cogview.configs.parallel import ParallelConfig
from megatron_cogview.configs.run import RunConfig
from tests.parallel.cases import LR, micro_batches, run_config


def watched(arguments: dict[str, Any]) -> dict[str, Any]:
    """For each layout: what an armed step sees, and bits of armed and plain steps.

    The bits are those of two steps with dropout: gradients, weights, losses, random states.
    """
    from safetensors.torch import load_file

    from megatron_cogview.engines.megatron import MegatronEngine
    from megatron_cogview.model.watch import ActivationWatch
    from megatron_cogview.parallel.seeding import seed_initialization
    from megatron_cogview.parallel.topology import initialize
    from megatron_cogview.testing import fixtures

    results: dict[str, Any] = {}
    for name, layout in arguments["layouts"].items():
        parallel = ParallelConfig(**layout["parallel"])
        topology = initialize(parallel)
        config = run_config(layout["model"], parallel, layout["micro_batch"])
        seed_initialization(1, topology)
        engine = MegatronEngine(config, topology)
        fixtures.load_weights(
            engine, load_file(Path(arguments["folder"]) / f"{layout['model']}.safetensors")
        )
        watch = ActivationWatch(engine.chunks, config)
        hooks_before = _num_hooks(engine)
        watch.arm()
        engine.train_step(micro_batches(0, config, topology.data_rank, topology.data_size), LR)
        seen = watch.read()
        watch.arm()
        results[name] = {
            "seen": seen,
            "unseen": max(watch.read().values()),
            "hooks_left": _num_hooks(engine) - hooks_before,
            "plain": _bits(config, topology, armed=False),
            "armed": _bits(config, topology, armed=True),
        }
    return results


def _num_hooks(engine: Any) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for chunk in engine.chunks
        for module in chunk.modules()
    )


def _bits(config: RunConfig, topology: Any, armed: bool) -> list[str]:
    from megatron.core import tensor_parallel

    from megatron_cogview.engines.megatron import MegatronEngine
    from megatron_cogview.model.watch import ActivationWatch
    from megatron_cogview.parallel.seeding import seed_initialization, seed_step

    model = replace(config.model, hidden_dropout=0.1, attention_dropout=0.1)
    config = replace(config, model=model)
    seed_initialization(1, topology)
    engine = MegatronEngine(config, topology)
    watch = ActivationWatch(engine.chunks, config)
    bits = []
    for step in range(2):
        seed_step(1, step, topology)
        if armed:
            watch.arm()
        batches = micro_batches(step, config, topology.data_rank, topology.data_size)
        result = engine.train_step(batches, LR)
        if armed:
            watch.read()
        h = hashlib.sha256(json.dumps([result.losses.total, result.grad_norm]).encode())
        for chunk in engine.chunks:
            for parameter in chunk.parameters():
                h.update(parameter.main_grad.cpu().numpy().tobytes())
                h.update(parameter.detach().cpu().numpy().tobytes())
        h.update(torch.get_rng_state().numpy().tobytes())
        states = tensor_parallel.get_cuda_rng_tracker().get_states()
        for key in sorted(states):
            h.update(states[key].cpu().numpy().tobytes())
        bits.append(h.hexdigest())
    return bits


def starts(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """A run folder written by two ranks; only one of them writes."""
    from megatron_cogview.parallel.topology import initialize
    from megatron_cogview.training import run_folder

    parallel = ParallelConfig(tensor=2)
    topology = initialize(parallel)
    folder = Path(arguments["folder"]) / f"run-{topology.rank}"
    run_folder.write(folder, run_config("paper", parallel, 2), topology)
    path = folder / "versions.json"
    with contextlib.suppress(FileNotFoundError):
        found: list[dict[str, Any]] = json.loads(path.read_text())
        return found
    return []


def everything(arguments: dict[str, Any]) -> dict[str, Any]:
    """Both, in one launch."""
    found: dict[str, Any] = {"watched": watched(arguments)}
    if arguments["world"] > 1:
        found["starts"] = starts(arguments)
    return found
