"""megatron-core's distributed checkpoints: saved under one (TP, PP, DP), loaded under another."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer import MegatronOptimizer

from megatron_cogview.configs.errors import CheckpointError
from megatron_cogview.model.cogview import CogViewModel
from megatron_cogview.parallel.topology import Topology


def _metadata(topology: Topology) -> dict[str, Any]:
    return {
        "dp_cp_group": topology.data_group,
        # The one form of optimizer state that loads under another layout.
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
    }


def _chunk_key(index: int, num_chunks: int) -> str:
    return "model" if num_chunks == 1 else f"model{index}"


def model_only(chunks: Sequence[CogViewModel], topology: Topology) -> dict[str, Any]:
    """Sharded description of the weights."""
    return {
        _chunk_key(i, len(chunks)): chunk.sharded_state_dict(metadata=_metadata(topology))
        for i, chunk in enumerate(chunks)
    }


def model_and_optimizer(
    chunks: Sequence[CogViewModel],
    optimizer: MegatronOptimizer,
    topology: Topology,
    is_loading: bool = False,
) -> dict[str, Any]:
    """Sharded description of weights and optimizer state."""
    state = model_only(chunks, topology)
    state["optimizer"] = optimizer.sharded_state_dict(
        state, is_loading=is_loading, metadata=_metadata(topology)
    )
    return state


def save(state: dict[str, Any], directory: Path) -> None:
    """Write ``state`` into an empty directory.  All ranks call it together."""
    # A writer is a process: on a CPU, where ranks share the memory, one for each rank is enough.
    writers = 2 if torch.cuda.is_available() else 1
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=writers)
    dist_checkpointing.save(state, str(directory), strategy)


def load(wanted: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Read what ``wanted`` describes.  All ranks call it together.

    Raises:
        CheckpointError: the checkpoint was made for another model.
    """
    try:
        found: dict[str, Any] = dist_checkpointing.load(wanted, str(directory))
        return found
    except (CheckpointingException, KeyError, ValueError) as error:
        raise CheckpointError(f"{directory}: does not fit this model: {error}") from error


def load_model(chunks: Sequence[CogViewModel], found: dict[str, Any]) -> None:
    """Put loaded weights into the model."""
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(found[_chunk_key(i, len(chunks))])
