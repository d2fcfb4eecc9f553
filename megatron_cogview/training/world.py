"""This process among those that train an image tokenizer together."""

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cogview.parallel import launch, topology

# Rank 0 may decode pictures for hours while the others wait.
_LONGEST_WAIT = datetime.timedelta(days=2)


@dataclass(frozen=True)
class World:
    """Device and process groups."""

    device: torch.device
    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    """Carries gradients and codebook sums; None for a single process."""
    waiting_group: dist.ProcessGroup | None = None
    """A gloo group with a long timeout, for the hours in which rank 0 may decode pictures."""

    def sum(self, tensors: list[Tensor]) -> None:
        """Add up over the processes, in place and in one reduction."""
        if self.group is None:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat, group=self.group)
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))

    def from_rank_0(self, value: Any) -> Any:
        """The value that rank 0 has; everyone waits for it."""
        if self.waiting_group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.waiting_group)
        return box[0]


@contextmanager
def joined() -> Iterator[World]:
    """The processes that the launcher started: one, or as many as torchrun says."""
    with_cuda = torch.cuda.is_available()
    if launch.detect().world_size == 1:
        yield World(device=torch.device("cuda" if with_cuda else "cpu"))
        return
    topology.init_world()
    yield World(
        device=torch.device("cuda", torch.cuda.current_device()) if with_cuda else _CPU,
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        group=dist.group.WORLD,
        waiting_group=dist.new_group(backend="gloo", timeout=_LONGEST_WAIT),
    )
    # After an error the group is left alone: leaving it would wait for the other processes.
    dist.destroy_process_group()


_CPU = torch.device("cpu")
