"""Time and peak memory of the kernels against their peers.

    python tools/bench_kernels.py --output runs/bench_kernels
    python tools/bench_kernels.py --output runs/rehearsal --device cpu

The first on one GPU, with nothing else beside it; the second rehearses it without one, at tiny
shapes, and measures nothing.  DIR gets bench_kernels.md (tables, and what must be reached),
bench_kernels.png (time and memory against length), bench_kernels.json (everything) and
bench_kernels.jsonl, a line a row, written as it ends: started again, an interrupted benchmark goes
on where it stopped.  Peers that are not installed or cannot run are named with the reason.
"""

import logging
import sys
import warnings
from dataclasses import dataclass

import tyro

from megatron_cogview.analysis.kernel_speed.report import NAME, Settings, run
from megatron_cogview.analysis.kernel_speed.tables import problems_of
from megatron_cogview.configs.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Arguments(Settings):
    """Measure kernels."""


def main() -> int:
    """0: all rows are good; 1: one failed, or a peer computes something else; 2: wrong input."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        rows = run(arguments)
    except (ConfigError, DataError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    problems = [f"{row['row']}: {problem}" for row in rows for problem in problems_of(row)]
    for problem in problems:
        sys.stderr.write(f"error: {problem}\n")
    print(arguments.output / f"{NAME}.md")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
