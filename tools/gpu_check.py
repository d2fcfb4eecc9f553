"""Run one part of the GPU check and write its table.  ``tools/gpu_check.sh`` is the entry.

python tools/gpu_check.py --part kernels --output results
"""

import logging
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

import tyro

from megatron_cogview.configs.errors import ConfigError
from megatron_cogview.testing.gpu_check.run import Part, run_part


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure this machine's GPU."""

    part: Part
    """Which rows."""
    output: Path
    """Folder for PART.jsonl and PART.md, and for kernels.png."""
    budget_seconds: float = 420.0
    """Time for all rows; one that would not fit is skipped and says so."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu rehearses at micro shapes; its table is labelled as no result."""


def _stop(number: int, frame: FrameType | None) -> None:
    # As an exception, so that the row it hits is recorded.
    raise SystemExit(128 + number)


def main() -> int:
    """0: all rows that ran are good; 1: a row failed; 2: nothing could be measured."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    signal.signal(signal.SIGTERM, _stop)
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        return run_part(
            arguments.part, arguments.output, arguments.budget_seconds, arguments.device
        )
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
