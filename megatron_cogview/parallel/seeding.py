"""Random states as a function of (seed, step): nothing to store, so resuming is exact.

Weights are drawn from one seed on every rank; dropout differs between data-parallel ranks, which
see different sequences, and between tensor-parallel ranks, which hold different heads.
"""

import hashlib
import random

import numpy as np
import torch

from megatron_cogview.parallel.topology import Topology


def seed_initialization(seed: int, topology: Topology) -> None:
    """Seed everything before the model is built.

    With CPU initialisation every rank draws whole matrices and keeps its slices, so that the
    weights do not depend on the tensor-parallel size.
    """
    _seed(_mix(seed, "initialization", topology.pipeline_rank))


def seed_step(seed: int, step: int, topology: Topology) -> None:
    """Seed dropout for one training step."""
    _seed(_mix(seed, "step", step, topology.pipeline_rank, topology.data_rank))


def _mix(*parts: object) -> int:
    """A 31-bit seed from any parts; neighbouring parts give unrelated seeds."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def _seed(seed: int) -> None:
    from megatron.core import tensor_parallel

    random.seed(seed)
    np.random.seed(seed)
    # The tracker's states of this and other tensor-parallel ranks are derived from it.
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    torch.manual_seed(seed)
