"""Put known weights into a sharded engine, and read its tensors back whole."""

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_cogview.engines.megatron import MegatronEngine
from megatron_cogview.testing.oracle import Weights

TIED = "embedding.word_embeddings.weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's state, as torch names it."""


def named_parameters(engine: MegatronEngine) -> Iterator[tuple[str, Any]]:
    """This rank's parameters under the whole model's names."""
    for chunk in engine.chunks:
        for name, parameter in chunk.named_parameters():
            parts = name.split(".")
            if name.startswith("decoder.layers."):
                # Layers are numbered within a stage; the layer itself knows its global number.
                parts[2] = str(chunk.decoder.layers[int(parts[2])].layer_number - 1)
            whole = ".".join(parts)
            # The last stage of a pipeline holds its own copy of the tied table.
            yield TIED if whole == "output_layer.weight" else whole, parameter


def load_weights(engine: MegatronEngine, weights: Weights) -> None:
    """Copy each parameter's slice of ``weights``, and refresh the optimizer's master copies."""
    for name, parameter in named_parameters(engine):
        whole = weights[name]
        if getattr(parameter, "tensor_model_parallel", False):
            t = engine.topology
            whole = whole.chunk(t.tensor_size, parameter.partition_dim)[t.tensor_rank]
        parameter.data.copy_(whole)
    engine.optimizer.reload_model_params()


def gather(
    engine: MegatronEngine, read: Callable[[Any], torch.Tensor], over_data: bool = False
) -> dict[str, torch.Tensor]:
    """Whole tensors of all stages, on every rank, in fp64 on the CPU.

    Both copies of the tied table must agree, and so must all replicas of unsharded parameters.

    Args:
        engine: all its ranks call this together.
        read: this rank's tensor of a parameter, of the parameter's size.
        over_data: each data rank reads its own part and zeros elsewhere.
    """
    t, mine = engine.topology, list(named_parameters(engine))
    flat = torch.cat([read(parameter).detach().float().flatten() for _, parameter in mine])
    if over_data:
        # As integers: adding a zero would turn -0.0 into 0.0.
        dist.all_reduce(flat.view(torch.int32), group=t.data_group)
    parts = [torch.empty_like(flat) for _ in range(t.tensor_size)]
    dist.all_gather(parts, flat, group=t.tensor_group)
    sizes = [parameter.numel() for _, parameter in mine]
    held: dict[str, torch.Tensor] = {}
    complaints = []
    pieces_of_each = zip(*(part.split(sizes) for part in parts), strict=True)
    for (name, parameter), pieces in zip(mine, pieces_of_each, strict=True):
        shaped = [piece.view(parameter.shape) for piece in pieces]
        if getattr(parameter, "tensor_model_parallel", False):
            held[name] = torch.cat(shaped, parameter.partition_dim)
        else:
            held[name] = shaped[0]
            if not all(torch.equal(other, shaped[0]) for other in shaped):
                complaints.append(name)
    return _over_stages_and_replicas(engine, held, complaints)


def _over_stages_and_replicas(
    engine: MegatronEngine, held: dict[str, torch.Tensor], complaints: list[str]
) -> dict[str, torch.Tensor]:
    """Bring together what the ranks hold, and compare what several of them do.

    Tensors travel as one sum in which each has one contributor: objects would be slow.
    """
    t = engine.topology
    about = {
        name: (tuple(value.shape), hashlib.sha256(value.cpu().numpy().tobytes()).hexdigest())
        for name, value in held.items()
    }
    everyone: list[Any] = [None] * t.world_size
    dist.all_gather_object(everyone, (about, complaints))
    found: set[str] = set()
    owners: dict[str, tuple[int, Any]] = {}
    for rank, (theirs, complained) in enumerate(everyone):
        found.update(complained)
        for name, what in theirs.items():
            if what != owners.setdefault(name, (rank, what))[1]:
                found.add(name)
    # Only now, when all ranks know of it: whoever raised earlier would leave the others waiting.
    assert not found, "copies differ: " + ", ".join(sorted(found))
    flat = torch.cat(
        [
            held[name].flatten()
            if rank == t.rank
            else torch.zeros(math.prod(shape), device=t.device)
            for name, (rank, (shape, _)) in owners.items()
        ]
    )
    # As integers: adding a zero would turn -0.0 into 0.0.
    dist.all_reduce(flat.view(torch.int32))
    sizes = [math.prod(shape) for _, (shape, _) in owners.values()]
    values = flat.double().cpu().split(sizes)
    return {
        name: value.view(shape)
        for (name, (_, (shape, _))), value in zip(owners.items(), values, strict=True)
    }


def _optimizer_tensors(engine: MegatronEngine) -> dict[Any, tuple[Any, dict[str, Any], slice]]:
    """Of each parameter that this rank updates: master weight, Adam state, and which part it is."""
    found = {}
    for part in engine.optimizer.chained_optimizers:
        inner = part.optimizer
        if hasattr(part, "model_param_group_index_map"):  # the distributed optimizer
            for parameter, (group, order) in part.model_param_group_index_map.items():
                master = inner.param_groups[group]["params"][order]
                own = part._get_model_param_range_map(parameter)["param"]
                found[parameter] = (master, inner.state[master], slice(own.start, own.end))
            continue
        for parameter in part.get_parameters():
            found[parameter] = (parameter, inner.state[parameter], slice(None))
    return found


def _gather_own_parts(
    engine: MegatronEngine, read: Callable[[Any, Any, dict[str, Any], slice], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Gather what only the rank holds that updates a part: ``read`` gives that part, flat."""
    held = _optimizer_tensors(engine)
    sharded = engine.config.parallel.distributed_optimizer

    def whole(parameter: Any) -> torch.Tensor:
        # Without the distributed optimizer the optimizer may know the parameter by its master copy.
        key = parameter if parameter in held else getattr(parameter, "main_param", None)
        values = torch.zeros(parameter.numel(), device=parameter.device)
        if key in held:
            master, state, part = held[key]
            values[part] = read(parameter, master, state, part).detach().float().flatten()
        else:
            assert sharded, "the optimizer does not know a parameter"
        return values

    return gather(engine, whole, over_data=sharded)


def gradients(engine: MegatronEngine) -> dict[str, torch.Tensor]:
    """Gradients of the last step; clipping must be off, for it scales them in place.

    The distributed optimizer leaves each data rank with the sums of its own part only.
    """
    return _gather_own_parts(
        engine, lambda parameter, master, state, part: parameter.main_grad.view(-1)[part]
    )


def weights(engine: MegatronEngine) -> dict[str, torch.Tensor]:
    """Current weights, in the precision that the model computes with."""
    if engine.config.parallel.overlap_parameters:
        # They are collected during the next forward pass, which may never come.
        for chunk in engine.model:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)
    return gather(engine, lambda parameter: parameter)


def master_weights(engine: MegatronEngine) -> dict[str, torch.Tensor]:
    """The weights that the optimizer keeps in fp32."""
    return _gather_own_parts(engine, lambda parameter, master, state, part: master)


def moments(engine: MegatronEngine, name: str) -> dict[str, torch.Tensor]:
    """One of Adam's :data:`MOMENTS`."""
    return _gather_own_parts(engine, lambda parameter, master, state, part: state[name])
