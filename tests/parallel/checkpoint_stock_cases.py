"""megatron-core's own checkpoint functions against ours, on real models."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_cogview.checkpoint import sharded
from megatron_cogview.checkpoint.reader import CheckpointReader
from megatron_cogview.checkpoint.saver import Saver
from megatron_cogview.configs.parallel import ParallelConfig
from megatron_cogview.engines.megatron import MegatronEngine
from megatron_cogview.parallel.topology import initialize
from tests.parallel.cases import run_config

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor": 2, "sequence": True},
    "pipeline": {"pipeline": 2},
    "distributed": {"distributed_optimizer": True},
}


def run(root: Path) -> dict[str, Any]:
    """Both directions under several layouts."""
    return {name: _layout(root / name, ParallelConfig(**of)) for name, of in LAYOUTS.items()}


def _layout(root: Path, parallel: ParallelConfig) -> dict[str, Any]:
    topology = initialize(parallel)
    torch.manual_seed(7 + topology.rank)
    engine = MegatronEngine(run_config("paper", parallel, 2), topology)
    state = engine.sharded_state()
    for piece in state.pieces:
        if piece.is_written:
            piece.data.normal_()
    saver = Saver(root / "ours", topology, keep=1)
    saver.begin(1, {}, state)
    folder = saver.commit()
    assert folder is not None
    # What every rank now holds is what was written, copies included.
    engine.load(folder)
    before = [piece.data.clone() for piece in state.pieces]
    results = {"reads": _stock_reads(engine, folder, before)}
    if not parallel.distributed_optimizer:
        results["optimizer"] = _stock_reads_optimizer(engine, folder)
    theirs = root / "theirs"
    if topology.is_main:
        theirs.mkdir()
    dist.barrier()
    sharded.load(engine.chunks, engine.optimizer, topology, folder)
    dist_checkpointing.save(_described(engine), str(theirs))
    pieces = sharded.model_pieces(engine.chunks, topology)
    wanted = [piece.data.clone() for piece in pieces]
    for piece in pieces:
        piece.data.fill_(torch.nan)
    sharded.load_model(engine.chunks, topology, theirs)
    results["written"] = _equal(pieces, wanted)
    reader, other = CheckpointReader(folder), CheckpointReader(theirs)
    results["same keys"] = set(other.index) <= set(reader.index)
    results["whole"] = all(torch.equal(reader.whole(k), other.whole(k)) for k in other.index)
    return results


def _described(engine: MegatronEngine) -> dict[str, Any]:
    """megatron-core's description of the model, which its functions take apart."""
    group = {"dp_cp_group": engine.topology.data_group}
    chunks = enumerate(engine.chunks)
    return {f"model{n}": chunk.sharded_state_dict(metadata=group) for n, chunk in chunks}


def _equal(pieces: list[Any], wanted: list[torch.Tensor]) -> bool:
    return all(torch.equal(p.data, each) for p, each in zip(pieces, wanted, strict=True))


def _stock_reads(engine: MegatronEngine, folder: Path, before: list[torch.Tensor]) -> bool:
    weights = sharded.model_pieces(engine.chunks, engine.topology)
    for piece in weights:
        piece.data.fill_(torch.nan)
    loaded = dist_checkpointing.load(_described(engine), str(folder))
    for number, chunk in enumerate(engine.chunks):
        chunk.load_state_dict(loaded[f"model{number}"])
    return bool(weights) and _equal(weights, before[: len(weights)])


def _stock_reads_optimizer(engine: MegatronEngine, folder: Path) -> list[Any]:
    """Keys of megatron-core's description of the optimizer, and whether its values come back."""
    wanted = {(p.key, p.box.offsets): p.data.clone() for p in engine.sharded_state().pieces}
    state = engine.optimizer.sharded_state_dict(_described(engine))
    tensors = [each for each in nested_values(state) if isinstance(each, ShardedTensor)]
    tensors = [each for each in tensors if "exp_avg" in each.key]
    for each in tensors:
        each.data.fill_(torch.nan)
    places = [(each.key, tuple(each.global_offset)) for each in tensors]
    loaded = dist_checkpointing.load({str(n): each for n, each in enumerate(tensors)}, str(folder))
    right = all(
        torch.equal(loaded[str(n)].flatten(), wanted[place].flatten())
        for n, place in enumerate(places)
    )
    return [sorted({key.split(".decoder")[0].split(".embedding")[0] for key, _ in places}), right]
