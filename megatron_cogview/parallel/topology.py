"""Process groups as a value: who holds which part of the model, and of the batch.

This is the one place that initialises ``torch.distributed`` and ``megatron.core.parallel_state``.
New code takes the :class:`Topology` and never asks megatron-core's globals.
"""

import contextlib
import datetime
import logging
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_cogview.configs.errors import ConfigError
from megatron_cogview.configs.parallel import ParallelConfig
from megatron_cogview.parallel import cpu_backend, launch

logger = logging.getLogger(__name__)

GROUP_TIMEOUT_S = 1800.0
"""torch's own for gloo."""
FOREVER_S = 365 * 86400.0


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Groups, ranks and sizes of this process."""

    rank: int
    world_size: int
    device: torch.device
    tensor_group: dist.ProcessGroup
    tensor_rank: int
    tensor_size: int
    pipeline_group: dist.ProcessGroup
    pipeline_rank: int
    pipeline_size: int
    data_group: dist.ProcessGroup
    data_rank: int
    data_size: int
    last_stage_rank: int
    """Global rank of the last pipeline stage of this process's pipeline: it knows the loss."""
    timeout_s: float = GROUP_TIMEOUT_S
    """After it a collective of these groups that somebody did not come to raises."""

    @property
    def is_main(self) -> bool:
        """The process that writes logs and metadata."""
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether the loss is computed here."""
        return self.pipeline_rank == self.pipeline_size - 1


def init_world(timeout_s: float = GROUP_TIMEOUT_S) -> launch.Launch:
    """Join the world of processes: nccl with CUDA, gloo without.  Safe to call again.

    Raises:
        ConfigError: more processes on this machine than GPUs.
    """
    place = launch.detect()
    if dist.is_initialized():
        return place
    with_cuda = torch.cuda.is_available()
    if with_cuda:
        devices = torch.cuda.device_count()
        # Slurm may show each task one device only; torchrun shows every process all of them.
        if place.init_method == "env://" and place.local_rank >= devices:
            raise ConfigError(
                f"local rank {place.local_rank}: this machine shows {devices} GPU(s); start one "
                "process per GPU and set parallel.* to match"
            )
        torch.cuda.set_device(place.local_rank % devices)
    init_method = place.init_method
    if not init_method:
        # One process meets only itself: a store in a private folder needs no port.
        init_method = f"file://{Path(tempfile.mkdtemp(prefix='cogview-')) / 'store'}"
    store = _store_of_this_attempt(place) if init_method == "env://" else None
    dist.init_process_group(
        "nccl" if with_cuda else "gloo",
        init_method=None if store else init_method,
        store=store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    return place


def _store_of_this_attempt(place: launch.Launch) -> dist.Store | None:
    """What torchrun's processes meet over when it has started them again; None: the usual store.

    torchrun keeps its store from attempt to attempt, and gloo would find the addresses of processes
    that are gone.  Only on one machine do all know the attempt's number; on several, torchrun must
    be told not to share its store (``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1``, see docs/training.md).
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return None
    store, _, _ = next(dist.rendezvous("env://", place.rank, place.world_size))
    return dist.PrefixStore(f"attempt_{attempt}", store)


def initialize(parallel: ParallelConfig, timeout_s: float = GROUP_TIMEOUT_S) -> Topology:
    """Build the process groups of ``parallel`` in the world that was started.

    Args:
        parallel: sizes of the axes.
        timeout_s: after it a collective that somebody did not come to raises.

    Raises:
        ConfigError: the world does not hold a whole number of model copies.
    """
    cpu_backend.install()
    init_world(timeout_s)
    parallel.data(dist.get_world_size())
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    virtual = parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
    parallel_state.initialize_model_parallel(
        parallel.tensor,
        parallel.pipeline,
        virtual,
        create_gloo_process_groups=True,
        distributed_timeout_minutes=math.ceil(timeout_s / 60),
    )
    return _current(timeout_s)


def _current(timeout_s: float) -> Topology:
    """Read megatron-core's globals once, into a value."""
    from megatron.core import parallel_state as state

    with_cuda = torch.cuda.is_available()
    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=torch.device("cuda", torch.cuda.current_device())
        if with_cuda
        else torch.device("cpu"),
        tensor_group=state.get_tensor_model_parallel_group(),
        tensor_rank=state.get_tensor_model_parallel_rank(),
        tensor_size=state.get_tensor_model_parallel_world_size(),
        pipeline_group=state.get_pipeline_model_parallel_group(),
        pipeline_rank=state.get_pipeline_model_parallel_rank(),
        pipeline_size=state.get_pipeline_model_parallel_world_size(),
        data_group=state.get_data_parallel_group(with_context_parallel=True),
        data_rank=state.get_data_parallel_rank(),
        data_size=state.get_data_parallel_world_size(),
        last_stage_rank=state.get_pipeline_model_parallel_last_rank(),
        timeout_s=timeout_s,
    )


def shutdown() -> None:
    """Leave the world."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def running(parallel: ParallelConfig, timeout_s: float = GROUP_TIMEOUT_S) -> Iterator[Topology]:
    """:func:`initialize`, and :func:`shutdown` when the work ended without an error.

    After an error the groups are left alone: destroying them would wait for ranks that may be
    stuck in a collective, and hide the error behind a hang.
    """
    topology = initialize(parallel, timeout_s)
    yield topology
    shutdown()
