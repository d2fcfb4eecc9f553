"""A training step: where its time goes, how near it is to the hardware, and against its rivals.

    python tools/bench_training.py --output runs/bench_training
    python tools/bench_training.py --device cuda --output runs/bench_training
    python tools/bench_training.py --device cpu --shapes micro micro:2 --steps 3

The first, on a CPU, is a toy and ``tiny`` against plain PyTorch and megatron-core's own GPT; the
second, on one GPU, the paper's model and a slice of four layers of it; the third rehearses the
second without a GPU.  Tokens are random.  Nothing else should run beside it.
"""

import json
import logging
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import tyro

from megatron_cogview.analysis.training_speed.report import Settings, measure
from megatron_cogview.analysis.training_speed.tables import tables
from megatron_cogview.configs.errors import ConfigError
from megatron_cogview.storage.atomic import write_text


@dataclass(frozen=True, kw_only=True)
class Arguments(Settings):
    """Measure training steps."""

    output: Path | None = None
    """Folder for bench_training.json and bench_training.md."""


def main() -> None:
    """Run; one line on stderr and exit code 1 on wrong input."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        results = measure(arguments)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print(f"{results['device']}, torch {results['torch']}, commit {results['commit']}")
    print(tables(results), end="")
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        write_text(arguments.output / "bench_training.json", json.dumps(results, indent=1) + "\n")
        write_text(arguments.output / "bench_training.md", tables(results))


if __name__ == "__main__":
    main()
