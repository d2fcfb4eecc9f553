"""Model and optimizer of one rank as pieces of whole tensors, under megatron-core's names.

The names do not depend on the layout: a piece is a box of a tensor of the whole model, so what was
saved under one (tensor, pipeline, data) layout, with or without the distributed optimizer, fills
any other.  Shards of the distributed optimizer are saved where they are; nothing is gathered.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer

from megatron_cogview.checkpoint.boxes import Box, boxes_of_range
from megatron_cogview.checkpoint.index import MASTER, OPTIMIZER, Index
from megatron_cogview.checkpoint.reader import CheckpointReader
from megatron_cogview.checkpoint.scalars import read_common
from megatron_cogview.checkpoint.snapshot import Piece, ShardedState
from megatron_cogview.configs.errors import CheckpointError
from megatron_cogview.model.cogview import CogViewModel
from megatron_cogview.parallel.topology import Topology

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class _Weight:
    """A parameter of this rank."""

    parameter: torch.nn.Parameter
    piece: Piece
    is_first_copy: bool
    """Whether, data replicas aside, no rank before this one holds the same."""


def model_pieces(chunks: Sequence[CogViewModel], topology: Topology) -> list[Piece]:
    """The weights."""
    return [weight.piece for weight in _weights(chunks, topology)]


def sharded_state(
    chunks: Sequence[CogViewModel], optimizer: MegatronOptimizer, topology: Topology
) -> ShardedState:
    """Weights and optimizer."""
    weights = list(_weights(chunks, topology))
    pieces = [weight.piece for weight in weights]
    for part in _parts(optimizer):
        pieces += _optimizer_pieces(part, {weight.parameter: weight for weight in weights})
    return ShardedState(pieces, _common(optimizer), _empty_objects(chunks, topology))


def load(
    chunks: Sequence[CogViewModel], optimizer: MegatronOptimizer, topology: Topology, folder: Path
) -> None:
    """Fill model and optimizer from a checkpoint, in place.

    Raises:
        CheckpointError: it was made for another model, or holds no optimizer.
    """
    state = sharded_state(chunks, optimizer, topology)
    reader = CheckpointReader(folder)
    reader.fill([_available(piece, reader.index) for piece in state.pieces])
    _set_common(optimizer, read_common(folder), folder)


def load_model(chunks: Sequence[CogViewModel], topology: Topology, folder: Path) -> None:
    """Fill the weights alone.

    Raises:
        CheckpointError: it was made for another model.
    """
    reader = CheckpointReader(folder)
    reader.fill([_available(piece, reader.index) for piece in model_pieces(chunks, topology)])


def _available(piece: Piece, index: Index) -> Piece:
    """Where a run of another number format finds its values: fp32 copies of weights and weights
    stand in for each other."""
    master = f"{OPTIMIZER}.{MASTER}."
    if piece.key.startswith(master) and piece.key not in index:
        return replace(piece, key=piece.key.removeprefix(master))
    stored = index.get(piece.key)
    converts = stored is None or stored.dtype != piece.data.dtype
    if converts and not piece.key.startswith(OPTIMIZER) and master + piece.key in index:
        # Rounded once, from the best there is.
        return replace(piece, key=master + piece.key)
    return piece


def _weights(chunks: Sequence[CogViewModel], topology: Topology) -> Iterator[_Weight]:
    """Every parameter of this rank; one that several hold alike is written by the first of them."""
    for chunk in chunks:
        for sharded in nested_values(_described(chunk, topology)):
            if not isinstance(sharded, ShardedTensor):
                continue
            assert isinstance(sharded.data, torch.nn.Parameter), sharded.key
            box = Box(tuple(sharded.global_offset), _box_sizes(sharded))
            piece = Piece(
                key=sharded.key,
                shape=tuple(sharded.global_shape),
                box=box,
                data=sharded.data.data.view(box.sizes),
                is_written=not any(sharded.replica_id),
            )
            # The last number counts data replicas.
            yield _Weight(sharded.data, piece, not any(sharded.replica_id[:-1]))


def _box_sizes(sharded: ShardedTensor) -> tuple[int, ...]:
    """Layers stand one after the other along axes that a layer's own tensor does not have."""
    layers: tuple[int, ...] = (1,) * sharded.prepend_axis_num
    return layers + tuple(sharded.local_shape)


def _described(chunk: CogViewModel, topology: Topology) -> dict[str, Any]:
    described: dict[str, Any] = chunk.sharded_state_dict(
        metadata={"dp_cp_group": topology.data_group}
    )
    return described


def _empty_objects(chunks: Sequence[CogViewModel], topology: Topology) -> list[str]:
    """megatron-core's layers have an extra state each, which is empty without its accelerators."""
    keys = []
    for chunk in chunks:
        for each in nested_values(_described(chunk, topology)):
            if isinstance(each, ShardedObject):
                assert each.data is None, f"{each.key}: an extra state that is not empty"
                if not any(each.replica_id):
                    keys.append(each.unique_key)
    return keys


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    parts: list[Any] = optimizer.chained_optimizers
    return [part for part in parts if not part.is_stub_optimizer]


def _optimizer_pieces(part: Any, weights: dict[torch.nn.Parameter, _Weight]) -> Iterator[Piece]:
    """Adam's moments, and the fp32 copies of half-precision weights."""
    if isinstance(part, DistributedOptimizer):
        for parameter in part.model_param_group_index_map:
            main = _main_parameter(part, parameter)
            owned = part._get_model_param_range_map(parameter)["param"]
            for name, data in _named_states(part, parameter, main):
                yield from _range_pieces(weights[parameter], name, data, owned.start, owned.end)
        return
    for parameter, main in _with_main_parameters(part):
        weight = weights[parameter].piece
        for name, data in _named_states(part, parameter, main):
            yield replace(
                weight, key=f"{OPTIMIZER}.{name}.{weight.key}", data=data.view(weight.box.sizes)
            )


def _main_parameter(part: Any, parameter: torch.nn.Parameter) -> torch.Tensor:
    """What a distributed optimizer updates for a parameter."""
    group, order = part.model_param_group_index_map[parameter]
    main: torch.Tensor = part.optimizer.param_groups[group]["params"][order]
    return main


def _with_main_parameters(part: Any) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Parameters of the model, each with what a plain optimizer updates for it."""
    if isinstance(part, FP32Optimizer):
        for group in part.optimizer.param_groups:
            yield from ((parameter, parameter) for parameter in group["params"])
        return
    for halves, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
        yield from zip(halves, mains, strict=True)
    for group in part.fp32_from_fp32_groups:
        yield from ((parameter, parameter) for parameter in group)


def _named_states(
    part: Any, parameter: torch.nn.Parameter, main: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    if parameter.dtype != torch.float32:
        yield MASTER, main.data
    state = part.optimizer.state[main]
    for name in MOMENTS:
        yield name, state[name]


def _range_pieces(
    weight: _Weight, name: str, data: torch.Tensor, start: int, end: int
) -> Iterator[Piece]:
    """A range of a flattened parameter, which this replica alone holds, as boxes of the tensor."""
    whole, at = weight.piece, 0
    flat = data.view(-1)
    for box in boxes_of_range(start, end, whole.box.sizes):
        yield Piece(
            key=f"{OPTIMIZER}.{name}.{whole.key}",
            shape=whole.shape,
            box=box.moved(whole.box.offsets),
            data=flat[at : at + box.numel].view(box.sizes),
            is_written=weight.is_first_copy,
        )
        at += box.numel


def _common(optimizer: MegatronOptimizer) -> dict[str, Any]:
    """Adam's count of steps, and an fp16 loss scale with its counters."""
    values: dict[str, Any] = {"adam_step": 0}
    for part in _parts(optimizer):
        for state in part.optimizer.state.values():
            if "step" in state:
                values["adam_step"] = int(state["step"])
                break
        for group in part.optimizer.param_groups:
            if "step" in group:
                values["adam_step"] = int(group["step"])
        scaler = getattr(part, "grad_scaler", None)
        if scaler is not None:
            about = scaler.state_dict()
            values["loss_scale"] = {**about, "scale": float(about["scale"])}
    return values


def _set_common(optimizer: MegatronOptimizer, values: dict[str, Any], folder: Path) -> None:
    try:
        step = int(values["adam_step"])
        scale = values.get("loss_scale")
        for part in _parts(optimizer):
            for state in part.optimizer.state.values():
                if "step" in state:
                    state["step"].fill_(step)
            if not isinstance(part.optimizer, torch.optim.AdamW):
                # apex and TransformerEngine count by group, and only from their first step on.
                for group in part.optimizer.param_groups:
                    group["step"] = step
            scaler = getattr(part, "grad_scaler", None)
            if scaler is not None and scale is not None:
                tensor = torch.full_like(scaler.state_dict()["scale"], float(scale["scale"]))
                scaler.load_state_dict({**scale, "scale": tensor})
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: its common.json lacks {error}") from error
