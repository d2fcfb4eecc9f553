"""Decode some records of token shards back to captions and pictures, in one HTML page.

    python tools/inspect_shards.py --shards tokens --text-tokenizer text.model \\
        --image-tokenizer image_tokenizer.safetensors --output tokens.html
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from megatron_cogview.configs.errors import CheckpointError, ConfigError, DataError
from megatron_cogview.data.preview import preview
from megatron_cogview.data.preview_page import render
from megatron_cogview.storage.atomic import write_text
from megatron_cogview.tokenization.image import load_image_tokenizer
from megatron_cogview.tokenization.text import TextTokenizer


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Look into token shards."""

    shards: Path
    """Folder with manifest.json."""
    output: Path
    """Page to write (.html)."""
    text_tokenizer: Path | None = None
    """SentencePiece model the shards were made with; without it, text is shown as ids."""
    image_tokenizer: Path | None = None
    """Image tokenizer they were made with; without it, codes are drawn as shades of grey."""
    records: tuple[int, ...] = ()
    """Numbers of the records to show, instead of random ones."""
    count: int = 64
    """How many random records to show."""
    seed: int = 0
    """Which random records."""
    device: str = "cpu"
    """Where pictures are decoded."""


def main() -> None:
    """Run; one line on stderr and exit code 1 on wrong input."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = tyro.cli(Arguments, description=__doc__)
    text_path, image_path = arguments.text_tokenizer, arguments.image_tokenizer
    try:
        text = TextTokenizer(text_path) if text_path else None
        image = load_image_tokenizer(image_path, arguments.device) if image_path else None
        found = preview(
            arguments.shards,
            text,
            image,
            records=arguments.records,
            count=arguments.count,
            seed=arguments.seed,
        )
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(arguments.output, render(found))
    except (ConfigError, DataError, CheckpointError) as error:
        sys.exit(f"error: {error}")
    print(f"{arguments.output}: {len(found.shown)} of {found.manifest['records']:,} records")


if __name__ == "__main__":
    main()
