"""Random states: one seed for the run, a different dropout stream on each tensor-parallel rank."""

import random

import numpy as np
import torch

from megatron_cogview.parallel.topology import Topology


def seed_everything(seed: int, topology: Topology) -> None:
    """Seed Python, NumPy, torch and megatron-core's tracker.

    Weights are drawn from torch's generator, which starts equal on all ranks: with CPU
    initialisation every rank draws the whole matrix and keeps its slice, so that the model does not
    depend on the tensor-parallel size.
    """
    from megatron.core import tensor_parallel

    stage_seed = seed + 100 * topology.pipeline_rank
    random.seed(stage_seed)
    np.random.seed(stage_seed % 2**32)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)
    torch.manual_seed(stage_seed)
