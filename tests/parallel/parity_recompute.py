"""What the ranks of the recomputation test run: a step with dropout, bit for bit."""

import gc
import hashlib
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from megatron_cogview.configs.parallel import ParallelConfig
from tests.parallel.cases import LR, MODELS, micro_batches, run_config

DROPOUT, GLOBAL_BATCH, MICRO_BATCH = 0.1, 4, 2


def recompute(arguments: dict[str, Any]) -> dict[str, Any]:
    """Of each layout: the loss, and a hash of each rank's gradients and weights.

    Under the settings of ``training.deterministic``, which must refuse none of the operations.
    """
    from megatron_cogview.parallel.determinism import make_deterministic
    from megatron_cogview.parallel.topology import initialize

    make_deterministic()
    results: dict[str, Any] = {}
    axes, topology = None, None
    gc.freeze()  # what is imported stays: each collection below would look through it again
    for name, settings in arguments["layouts"].items():
        p = ParallelConfig(**settings["parallel"])
        if axes != (p.tensor, p.pipeline, p.virtual_pipeline):
            topology, axes = initialize(p), (p.tensor, p.pipeline, p.virtual_pipeline)
        results[name] = _step(settings, p, topology)
        gc.collect()
    return results


def _step(settings: dict[str, Any], parallel: ParallelConfig, topology: Any) -> dict[str, Any]:
    from megatron_cogview.engines.megatron import MegatronEngine
    from megatron_cogview.parallel.seeding import seed_initialization, seed_step

    base = run_config(settings["model"], parallel, MICRO_BATCH, GLOBAL_BATCH)
    model = replace(MODELS[settings["model"]], hidden_dropout=DROPOUT, attention_dropout=DROPOUT)
    config = replace(base, model=model, training=replace(base.training, deterministic=True))
    seed_initialization(1, topology)
    engine = MegatronEngine(config, topology)
    seed_step(settings.get("seed", 1), 0, topology)
    batches = micro_batches(0, config, topology.data_rank, topology.data_size)
    loss = engine.train_step(batches, LR).losses.total
    digest = hashlib.sha256()
    for chunk in engine.chunks:
        for parameter in chunk.parameters():
            for tensor in (parameter.main_grad, parameter.detach()):
                digest.update(tensor.contiguous().numpy().tobytes())
    everyone: list[str] = [""] * topology.world_size
    dist.all_gather_object(everyone, digest.hexdigest())
    return {"loss": loss, "tensors": everyone}
