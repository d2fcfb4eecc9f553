"""Which process am I: read the rank from torchrun, from Slurm, or be a single process."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_cogview.configs.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """Place of this process in the world."""

    rank: int
    world_size: int
    local_rank: int
    init_method: str
    """For ``torch.distributed``: ``env://``, or a ``tcp://`` address derived from Slurm."""


def detect(environment: Mapping[str, str] = os.environ) -> Launch:
    """Find rank and address; torchrun's variables win over Slurm's.

    Raises:
        ConfigError: a Slurm job of several tasks without ``MASTER_ADDR`` and ``MASTER_PORT``.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return Launch(
            rank=int(environment["RANK"]),
            world_size=int(environment["WORLD_SIZE"]),
            local_rank=int(environment.get("LOCAL_RANK", environment["RANK"])),
            init_method="env://",
        )
    # SLURM_NTASKS is set inside `salloc` too, where only `srun` starts the tasks; SLURM_STEP_ID
    # tells the two apart.
    tasks = int(environment.get("SLURM_NTASKS", "1")) if "SLURM_STEP_ID" in environment else 1
    if tasks > 1:
        if "MASTER_ADDR" not in environment or "MASTER_PORT" not in environment:
            raise ConfigError(
                f"SLURM_NTASKS = {tasks}: set MASTER_ADDR to the first node and MASTER_PORT to a "
                "free port, or start the tasks with torchrun"
            )
        return Launch(
            rank=int(environment["SLURM_PROCID"]),
            world_size=tasks,
            local_rank=int(environment.get("SLURM_LOCALID", "0")),
            init_method=f"tcp://{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}",
        )
    return Launch(rank=0, world_size=1, local_rank=0, init_method="")
