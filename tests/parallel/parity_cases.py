"""What the ranks of the parity tests run: layouts, one after another, against the oracle's tensors.

Results are JSON values, the same on all ranks.
"""

import gc
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_cogview.configs.optimizer import OptimizerConfig
from megatron_cogview.configs.parallel import ParallelConfig
from megatron_cogview.configs.precision import PrecisionConfig
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.testing.closeness import relative_rms, split_qkv_bias
from tests.parallel import parity_faults
from tests.parallel.cases import LR, STEPS, micro_batches, run_config
from tests.parallel.parity_layouts import GLOBAL_BATCH

KINDS = ("gradients", "weights", "exp_avg", "exp_avg_sq")
"""What is compared: the first step's gradients, and the optimizer's tensors after the last."""
EPSILON = 1e-6
"""Adam's.  Under its usual 1e-8 the few gradients that are zero but for rounding move weights by as
much as all others, in a direction that each layout draws anew."""
BUCKET = 9_000
"""Elements of a gradient bucket: several per chunk, so that there is something to overlap."""


def case_config(settings: dict[str, Any]) -> RunConfig:
    """The run of one layout, from its JSON values."""
    return run_config(
        settings["model"],
        ParallelConfig(**settings["parallel"]),
        settings["micro_batch"],
        global_batch=GLOBAL_BATCH,
        optimizer=OptimizerConfig(clip_grad=0.0, epsilon=EPSILON),
        # fp16 gradients of so small a model need little scale; 65,536 would overflow.
        precision=PrecisionConfig(dtype=settings["dtype"], initial_loss_scale=1024.0),
    )


def parity(arguments: dict[str, Any]) -> dict[str, Any]:
    """Of each layout: losses and gradient norms, and every tensor's distance from the oracle.

    One launch serves many layouts; process groups are kept while the axes stay the same.
    """
    folder = Path(arguments["folder"])
    results: dict[str, Any] = {}
    axes, topology = None, None
    from megatron_cogview.parallel.topology import initialize

    gc.freeze()  # what is imported stays: each collection below would look through it again
    for name, settings in arguments["layouts"].items():
        config = case_config(settings)
        p = config.parallel
        if axes != (p.tensor, p.pipeline, p.virtual_pipeline):
            topology, axes = initialize(p), (p.tensor, p.pipeline, p.virtual_pipeline)
        assert topology is not None
        with parity_faults.FAULTS[settings.get("fault", "none")]():
            try:
                results[name] = _layout(config, topology, folder, settings)
            except AssertionError as error:
                # All ranks see what the fixtures see, so none of them is left behind.
                results[name] = {"refused": str(error)[:1000]}
            except Exception as error:
                error.add_note(f"in layout {name}")
                raise
        gc.collect()
    return results


def _layout(
    config: RunConfig, topology: Any, folder: Path, settings: dict[str, Any]
) -> dict[str, Any]:
    from megatron_cogview.parallel.seeding import seed_initialization
    from megatron_cogview.testing import fixtures

    config.check_layout(topology.world_size)
    seed_initialization(1, topology)
    engine = _engine(config, topology)
    stem = f"{settings['model']}.{settings['dtype']}"
    fixtures.load_weights(engine, load_file(folder / f"{stem}.start.safetensors"))
    steps, tensors = [], {}
    for step in range(STEPS):
        batches = micro_batches(step, config, topology.data_rank, topology.data_size)
        result = engine.train_step(parity_faults.spoil(batches), LR)
        assert result.updated, f"step {step} was left out"
        losses = result.losses
        steps.append([losses.total, losses.text, losses.image, result.grad_norm])
        if step == 0:
            tensors["gradients"] = fixtures.gradients(engine)
    tensors["weights"] = fixtures.master_weights(engine)
    _check_copies(tensors["weights"], fixtures.weights(engine), engine.dtype)
    for moment in fixtures.MOMENTS:
        tensors[moment] = fixtures.moments(engine, moment)
    batches = micro_batches(STEPS, config, topology.data_rank, topology.data_size)
    steps.append([engine.eval_step(parity_faults.spoil(batches)).losses.total])
    # One rank compares for all.
    told = [_distances(tensors, folder, stem, config) if topology.rank == 0 else None]
    dist.broadcast_object_list(told)
    return {"steps": steps, "distances": told[0]}


def _engine(config: RunConfig, topology: Any) -> Any:
    """An engine with small buckets, which must do what the configuration says."""
    from megatron_cogview.engines import megatron

    small = partial(megatron.DistributedDataParallelConfig, bucket_size=BUCKET)
    with mock.patch.object(megatron, "DistributedDataParallelConfig", small):
        engine = megatron.MegatronEngine(config, topology)
    p, shared = config.parallel, topology.data_size > 1
    for chunk in engine.model:
        ddp = chunk.ddp_config
        assert ddp.overlap_grad_reduce == (p.overlap_gradients and shared)
        assert ddp.overlap_param_gather == (p.overlap_parameters and shared)
        if ddp.overlap_grad_reduce and topology.pipeline_rank == 0:
            assert len(chunk.bucket_groups) > 1, "one bucket has nothing to overlap with"
    return engine


def _check_copies(
    masters: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """The model computes with the rounded master weights, on every rank."""
    for name, master in masters.items():
        assert torch.equal(master.to(dtype).double(), weights[name]), f"{name}: stale weights"


def _distances(
    tensors: dict[str, dict[str, torch.Tensor]], folder: Path, stem: str, config: RunConfig
) -> dict[str, Any]:
    """Relative RMS of every tensor, and apart from them the key parts of the qkv biases.

    A constant added to all keys moves every score of a row alike, so the true gradient of a key
    bias is zero: its gradient is compared in size with the largest of the bias, and its weights by
    how far they moved, because Adam turns rounding noise into steps of the learning rate's size.
    """
    heads, result = config.model.num_heads, {}
    for kind, actual in tensors.items():
        wanted = load_file(folder / f"{stem}.{kind}.safetensors")
        assert set(actual) == set(wanted), f"{kind}: other tensors than the oracle's"
        (mine, my_keys), (true, true_keys) = (split_qkv_bias(t, heads) for t in (actual, wanted))
        result[kind] = {name: relative_rms(mine[name], true[name]) for name in true}
        if kind == "weights":
            start, _ = split_qkv_bias(load_file(folder / f"{stem}.start.safetensors"), heads)
            result["movement"] = {
                name: relative_rms(mine[name] - start[name], true[name] - start[name])
                for name in true
            }
        if kind == "gradients":
            result["key gradients"] = {
                name: float(value.abs().max() / true[name].abs().max())
                for name, value in my_keys.items()
            }
        if kind == "weights":
            result["key drift"] = {
                name: float((value - true_keys[name]).abs().max() / (LR * STEPS))
                for name, value in my_keys.items()
            }
    return result
