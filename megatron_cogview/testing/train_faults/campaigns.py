"""The campaigns by name, and how many trials each usually has."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from megatron_cogview.testing.train_faults.bad_files import FlipCampaign, HostileCampaign
from megatron_cogview.testing.train_faults.bad_numbers import BadNumbers
from megatron_cogview.testing.train_faults.interruptions import (
    CutCampaign,
    DiskCampaign,
    HangCampaign,
    KillCampaign,
    StopCampaign,
)


class Campaign(Protocol):
    """Trials that a journal can go on with."""

    def trial(self, number: int) -> dict[str, Any]:
        """The line of one trial; the number seeds whatever it draws."""


CAMPAIGNS: dict[str, tuple[Callable[[Path], Campaign], int]] = {
    "kill": (KillCampaign, 100),
    "cut": (CutCampaign, CutCampaign.trials),
    "stop": (StopCampaign, 50),
    "hang": (HangCampaign, 20),
    "disk": (DiskCampaign, DiskCampaign.trials),
    "number": (BadNumbers, 1000),
    "flip": (FlipCampaign, 1000),
    "hostile": (HostileCampaign, 200),
}


def preload() -> None:
    """Import now what every forked rank would import again."""
    for module in ("engines.megatron", "training.trainer", "tasks.pretrain"):
        importlib.import_module(f"megatron_cogview.{module}")
