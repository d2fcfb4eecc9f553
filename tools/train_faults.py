"""Campaigns of faults against training.  Run again with the same folder, they go on where they
stopped, as long as the package's code is the same.

    python tools/train_faults.py --output runs/faults --only kill cut
    python tools/train_faults.py --output runs/faults --minutes 90

Each trial is one JSON line of OUTPUT/CAMPAIGN-CODE.jsonl.  Ends with exit code 1 if one failed.
"""

import logging
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro

from megatron_cogview.parallel import cpu_backend
from megatron_cogview.testing.data_faults import journal

warnings.filterwarnings("ignore", module=r"megatron\.")
cpu_backend.install()

from megatron_cogview.testing.train_faults.campaigns import CAMPAIGNS, preload  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to run, and for how long."""

    output: Path
    """Folder of the journals."""
    only: tuple[str, ...] = ()
    """Campaigns to run; all of them without."""
    minutes: float = 600.0
    """Stop after this time; run again to go on."""
    trials: int = 0
    """Trials of each campaign; 0: as many as it usually has."""


def main() -> None:
    """Run the campaigns one after the other and count their results."""
    arguments = tyro.cli(Arguments, description=__doc__)
    unknown = set(arguments.only) - set(CAMPAIGNS)
    if unknown:
        sys.exit(f"error: --only {sorted(unknown)}: must be some of {', '.join(CAMPAIGNS)}")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    preload()
    failed, deadline = 0, time.monotonic() + 60 * arguments.minutes
    code = journal.code_digest()
    for name in arguments.only or CAMPAIGNS:
        campaign, usual = CAMPAIGNS[name]
        path = arguments.output / f"{name}-{code}.jsonl"
        with TemporaryDirectory() as folder:
            trial = campaign(Path(folder)).trial
            minutes = (deadline - time.monotonic()) / 60
            lines = journal.run(path, trial, arguments.trials or usual, minutes)
        bad = [line for line in lines if not line["ok"]]
        failed += len(bad)
        print(f"{name}: {len(lines):,} trials, {len(bad)} failed {bad[:2] or ''}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
