"""Take a fixed sample of distinct captions as prompts.

    python tools/sample_prompts.py --data pairs --count 64 --output prompts.jsonl \\
        --text-tokenizer text.model --preset tiny
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from megatron_cogview.configs.errors import ConfigError, DataError
from megatron_cogview.configs.presets import preset
from megatron_cogview.data.prompts import TextLimit, sample_captions, write_prompts
from megatron_cogview.data.sources import read_captions
from megatron_cogview.tokenization.text import TextTokenizer


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Sample prompts."""

    data: Path
    """Folder of WebDataset tars, or a table (.jsonl, .csv, .tsv)."""
    output: Path
    """JSON lines to write, each with id and caption."""
    count: int = 64
    """Prompts to draw."""
    seed: int = 0
    """Another seed draws other captions."""
    caption_key: str = "caption"
    """Field of the JSON, or column of the table, that holds the caption."""
    text_tokenizer: Path | None = None
    """Leave out captions over the text budget, counted with this SentencePiece model."""
    preset: str = "tiny"
    """Preset whose text budget counts."""


def sample(arguments: Arguments) -> int:
    """Sample as asked; the number of prompts."""
    limit = None
    if arguments.text_tokenizer is not None:
        budget = preset(arguments.preset).sequence.text_budget
        limit = TextLimit(TextTokenizer(arguments.text_tokenizer), budget)
    captions = read_captions(arguments.data, (arguments.caption_key,))
    drawn = sample_captions(captions, arguments.count, arguments.seed, limit)
    write_prompts(arguments.output, drawn)
    return len(drawn)


def main() -> None:
    """Run; one line on stderr and exit code 1 on wrong input."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        count = sample(arguments)
    except (ConfigError, DataError) as error:
        sys.exit(f"error: {error}")
    print(f"{arguments.output}: {count} prompts")


if __name__ == "__main__":
    main()
