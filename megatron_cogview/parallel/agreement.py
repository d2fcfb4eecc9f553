"""What all ranks must decide alike."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_cogview.parallel.topology import Topology


def largest(values: Sequence[float], topology: Topology) -> list[float]:
    """The largest of each value over all ranks, which call it together; none may be NaN."""
    if topology.world_size == 1:
        return [float(value) for value in values]
    numbers = torch.tensor(values, dtype=torch.float64, device=topology.device)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return [float(each) for each in numbers.tolist()]
