"""The paper's Figure 2: four codebook trainings on the same data, in one plot and one table.

    python tools/compare_codebooks.py --data photographs --output runs/codebooks
    torchrun --nproc-per-node 8 tools/compare_codebooks.py --setting full --data ... --output ...

Run again, it goes on where it was stopped.
"""

import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from megatron_cogview.analysis.codebook_comparison import METHODS, compare, setting
from megatron_cogview.configs.errors import CheckpointError, ConfigError, DataError
from megatron_cogview.training.world import joined


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare codebook trainings."""

    data: tuple[str, ...]
    """Folders of WebDataset tars."""
    output: Path
    """Folder for the runs, figure2.png, comparison.json and comparison.md."""
    setting: Literal["small", "full"] = "small"
    """small: 64 pixels, two CPU cores, 20 minutes; full: the paper's tokenizer, for GPUs."""
    steps: int = 0
    """Optimizer steps of each run; 0: the setting's."""
    seed: int = 1234
    """Seeds all runs alike."""
    with_revival: bool = False
    """A fifth run: moving averages that put unused codes back."""


def main() -> None:
    """Run; one line on stderr and exit code 1 on wrong input."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        shared = setting(arguments.setting)
        training = replace(shared.tokenizer_training, data=arguments.data, seed=arguments.seed)
        if arguments.steps:
            training = replace(training, steps=arguments.steps)
        names = tuple(METHODS) if arguments.with_revival else tuple(METHODS)[:4]
        with joined() as world:
            compare(replace(shared, tokenizer_training=training), names, arguments.output, world)
    except (ConfigError, DataError, CheckpointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
