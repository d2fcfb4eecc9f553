"""``train-tokenizer``: train the image tokenizer on a folder of tars, on 1..N processes."""

import datetime

import torch
import torch.distributed as dist

from megatron_cogview.configs.run import RunConfig
from megatron_cogview.parallel import launch, topology
from megatron_cogview.training.tokenizer_trainer import World, train_tokenizer

# Rank 0 may decode pictures for hours while the others wait.
_LONGEST_WAIT = datetime.timedelta(days=2)


def run(config: RunConfig) -> None:
    """Train as ``config.image_tokenizer`` and ``config.tokenizer_training`` say.

    Raises:
        ConfigError, DataError, CheckpointError: see :func:`train_tokenizer`.
    """
    with_cuda = torch.cuda.is_available()
    if launch.detect().world_size == 1:
        train_tokenizer(config, World(device=torch.device("cuda" if with_cuda else "cpu")))
        return
    topology.init_world()
    device = torch.device("cuda", torch.cuda.current_device()) if with_cuda else torch.device("cpu")
    world = World(
        device=device,
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        group=dist.group.WORLD,
        waiting_group=dist.new_group(backend="gloo", timeout=_LONGEST_WAIT),
    )
    train_tokenizer(config, world)
    # After an error the group is left alone: leaving it would wait for the other processes.
    dist.destroy_process_group()
