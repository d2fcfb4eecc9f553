"""Check folders of token shards: every byte, every record, everything that can be wrong.

    python tools/verify_shards.py --shards tokens
    python tools/verify_shards.py --shards tokens more_tokens --quick

Ends with exit code 0 when all are sound, 1 when not.
"""

import logging
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro

from megatron_cogview.configs.errors import ConfigError, DataError, refuse
from megatron_cogview.data.verify import Report, verify_all


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Check token shards."""

    shards: tuple[Path, ...]
    """Folders with manifest.json."""
    quick: bool = False
    """Only the manifest, the split table, and each shard's size and header."""
    workers: int = len(os.sched_getaffinity(0))
    """Processes that read shards; all cores by default."""
    show: int = 50
    """Problems of each folder that are printed; the others are counted."""

    def __post_init__(self) -> None:
        for name in ("workers", "show"):
            if getattr(self, name) < 1:
                raise refuse(name, getattr(self, name), "must be at least 1")


def print_report(report: Report, arguments: Arguments) -> None:
    """The verdict first, then problems, then notes."""
    size = f"{report.shards:,} shards, {report.records:,} records, {report.num_bytes / 1e6:,.1f} MB"
    how = "quick check" if arguments.quick else "every byte checked"
    verdict = "sound" if report.sound else "NOT SOUND"
    print(f"{report.folder}: {verdict} ({size}; {how})")
    for finding in report.findings[: arguments.show]:
        print(f"  [{finding.check}] {finding}")
    if len(report.findings) > arguments.show:
        print(f"  and {len(report.findings) - arguments.show:,} more")
    if not report.sound:
        counts = Counter(finding.check for finding in report.findings)
        print("  problems: " + ", ".join(f"{n:,} {check}" for check, n in counts.most_common()))
    for note in report.notes:
        print(f"  note: {note}")


def main() -> None:
    """Run; one line on stderr and exit code 1 on wrong input."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        arguments = tyro.cli(Arguments, description=__doc__)
        reports = verify_all(arguments.shards, arguments.workers, arguments.quick)
    except (ConfigError, DataError) as error:
        sys.exit(f"error: {error}")
    for report in reports:
        print_report(report, arguments)
    sys.exit(0 if all(report.sound for report in reports) else 1)


if __name__ == "__main__":
    main()
