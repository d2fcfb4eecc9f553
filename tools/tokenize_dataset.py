"""Turn a folder of image-text tars into token shards; run again to finish an interrupted run.

    python tools/tokenize_dataset.py --data pairs --text-tokenizer text.model \\
        --image-tokenizer image_tokenizer.safetensors --output tokens --preset tiny
"""

import dataclasses
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from megatron_cogview.configs.errors import CheckpointError, ConfigError, DataError
from megatron_cogview.configs.presets import preset
from megatron_cogview.data.raw import WebDatasetTars
from megatron_cogview.data.tokenize import tokenize_dataset
from megatron_cogview.tokenization.image import load_image_tokenizer
from megatron_cogview.tokenization.text import TextTokenizer


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Tokenise pairs."""

    data: Path
    """Folder of WebDataset tars (.png, .jpg, .jpeg or .webp beside .json)."""
    text_tokenizer: Path
    """SentencePiece model."""
    image_tokenizer: Path
    """Image tokenizer weights (.safetensors)."""
    output: Path
    """Folder for the shards."""
    preset: str
    """Preset whose sequence and vocabulary the shards are for."""
    caption_key: str = "caption"
    """Field of the JSON that holds the caption."""
    text_policy: Literal["reject", "truncate"] | None = None
    """What happens to a caption over the budget; the preset's policy if not given."""
    batch_size: int = 64
    """Pictures encoded at a time."""
    max_rejected: float = 1.0
    """Share of rejected pairs, 0..1, above which the run fails."""
    device: str = "cpu"
    """Where pictures are encoded."""


def tokenize(arguments: Arguments) -> dict[str, Any]:
    """Tokenise as asked; the manifest."""
    run = preset(arguments.preset)
    policy = arguments.text_policy or run.sequence.text_policy
    return tokenize_dataset(
        WebDatasetTars(arguments.data, arguments.caption_key),
        TextTokenizer(arguments.text_tokenizer),
        load_image_tokenizer(arguments.image_tokenizer, device=arguments.device),
        arguments.output,
        dataclasses.replace(run.sequence, text_policy=policy),
        batch_size=arguments.batch_size,
        max_rejected=arguments.max_rejected,
        vocab=run.model.vocab,
    )


def main() -> None:
    """Run; one line on stderr and exit code 1 on wrong input."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        manifest = tokenize(tyro.cli(Arguments, description=__doc__))
    except (ConfigError, DataError, CheckpointError) as error:
        sys.exit(f"error: {error}")
    print(f"{manifest['records']} records, rejected: {sum(manifest['rejected'].values())}")


if __name__ == "__main__":
    main()
