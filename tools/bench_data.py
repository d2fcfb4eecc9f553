"""Measure the data path against its peers, on this machine, and print the table.

    python tools/bench_data.py --data clothing --text-tokenizer cog-pretrain.model \\
        --image-tokenizer image_tokenizer.safetensors --output runs/bench_data

Needs the extra "bench" (WebDataset).  Runs on one thread; nothing else should.
"""

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from megatron_cogview.analysis.data_speed.report import Settings, measure, table
from megatron_cogview.configs.errors import ConfigError, DataError
from megatron_cogview.storage.atomic import write_text


@dataclass(frozen=True, kw_only=True)
class Arguments(Settings):
    """Measure the data path."""

    output: Path | None = None
    """Folder for bench_data.json and bench_data.md."""


def main() -> None:
    """Run; one line on stderr and exit code 1 on wrong input."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        results = measure(arguments)
    except (ConfigError, DataError) as error:
        sys.exit(f"error: {error}")
    print(f"{results['device']}, torch {results['torch']}, commit {results['commit']}")
    print(table(results), end="")
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        write_text(arguments.output / "bench_data.json", json.dumps(results, indent=1) + "\n")
        write_text(arguments.output / "bench_data.md", table(results))


if __name__ == "__main__":
    main()
