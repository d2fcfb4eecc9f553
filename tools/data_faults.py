"""Campaigns against the data path.  Run again with the same folder, they go on where they stopped.

    python tools/data_faults.py kills --output runs/kills
    python tools/data_faults.py flips --output runs/flips

Each trial is one JSON line of journal.jsonl.  Ends with exit code 1 if any trial failed.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro

from megatron_cogview.testing.data_faults import journal
from megatron_cogview.testing.data_faults.flips import FlipCampaign, TruncationCampaign
from megatron_cogview.testing.data_faults.fuzz import FuzzCampaign
from megatron_cogview.testing.data_faults.kills import KillCampaign


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """What all campaigns have in common."""

    output: Path
    """Folder of journal.jsonl."""
    minutes: float = 60.0
    """Stop after this time; run again to go on."""
    trials: int = 0
    """Trials in all; 0: as many as this campaign usually has."""


class Kills(Campaign):
    """Kill tokenisations at random moments; started again they must end with the same bytes."""

    usual, make = 200, KillCampaign


class Flips(Campaign):
    """Flip random bits of a set of shards: verify must notice, no reader may get wrong data."""

    usual, make = 10_000, FlipCampaign


class Truncations(Campaign):
    """Cut shards at every 4 KB, manifest and split table at every 64 bytes."""

    usual, make = 0, TruncationCampaign


class Fuzz(Campaign):
    """Hostile tars, tables, maps, pictures and rows, 500 a trial: no crash, hang or escape."""

    usual, make = 200, FuzzCampaign


def main() -> None:
    """Run one campaign and count its results."""
    arguments: Kills | Flips | Truncations | Fuzz
    arguments = tyro.cli(Kills | Flips | Truncations | Fuzz, description=__doc__)
    with TemporaryDirectory() as folder:
        campaign = arguments.make(Path(folder))
        trials = arguments.trials or arguments.usual or getattr(campaign, "trials", 0)
        path = arguments.output / "journal.jsonl"
        lines = journal.run(path, campaign.trial, trials, arguments.minutes)
    for name in ("detected_by", "reader", "noticed_at", "killed"):
        for value, count in Counter(str(line.get(name)) for line in lines).most_common():
            if value != "None":
                print(f"{count:7,}  {name.replace('_', ' ')}: {value}")
    failed = [line for line in lines if not line["ok"]]
    print(f"{len(lines):,} trials, {len(failed)} failed {failed[:3] or ''}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
