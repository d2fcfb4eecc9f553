"""Dense against three-region attention: the same training with both, in one plot and one table.

    python tools/compare_attention.py --tokens runs/demo/tokens --output runs/attention --steps 800

Run again, it goes on where it was stopped.
"""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from megatron_cogview.analysis.attention_comparison import compare, setting, table
from megatron_cogview.configs.errors import CheckpointError, ConfigError, DataError, TrainingError
from megatron_cogview.configs.model import AttentionConfig


def _small() -> AttentionConfig:
    """For ``tiny``'s 88 tokens: less than half of the causal keys.  As in the paper the window
    reaches the code above, which on a picture of 8 x 8 codes is 8 tokens back."""
    return AttentionConfig(kind="pivot", window_block=2, window_blocks=5, num_pivots=22)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare two trainings."""

    tokens: Path
    """Folder of token shards."""
    output: Path
    """Folder for the runs, attention.png, comparison.json and comparison.md."""
    preset: str = "tiny"
    """Model, optimizer and batch."""
    steps: int = 0
    """Optimizer steps of each run; 0: the preset's."""
    attention: AttentionConfig = field(default_factory=_small)
    """Regions of the sparse run."""


def main() -> None:
    """Run; one line on stderr and exit code 1 on wrong input."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    a = tyro.cli(Arguments, description=__doc__)
    try:
        shared = setting(a.preset, a.tokens, a.steps, a.attention)
        print(table(compare(shared, a.output)))
    except (CheckpointError, ConfigError, DataError, TrainingError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
