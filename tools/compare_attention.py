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
    """For ``tiny``'s 88 tokens: a little less than half of the causal keys."""
    return AttentionConfig(kind="pivot", window_block=4, window_blocks=2, num_pivots=22)


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
    text_length: int = 16
    """Tokens of a usual text, for the share of keys that is seen."""
    attention: AttentionConfig = field(default_factory=_small)
    """Regions of the sparse run."""


def main() -> None:
    """Run; one line on stderr and exit code 1 on wrong input."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    a = tyro.cli(Arguments, description=__doc__)
    try:
        shared = setting(a.preset, a.tokens, a.steps, a.attention)
        print(table(compare(shared, a.output, a.text_length)))
    except (CheckpointError, ConfigError, DataError, TrainingError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
