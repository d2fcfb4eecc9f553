"""Turn image-text pairs into token shards; run again to finish an interrupted run.

    python tools/tokenize_dataset.py --data pairs --text-tokenizer text.model \\
        --image-tokenizer image_tokenizer.safetensors --output tokens --preset base_4b

On several machines, give each process its number: --worker $SLURM_ARRAY_TASK_ID --of 96.
"""

import dataclasses
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from megatron_cogview.configs.errors import CheckpointError, ConfigError, DataError
from megatron_cogview.configs.presets import preset
from megatron_cogview.data.encode import PairEncoder
from megatron_cogview.data.sources import SourceOptions, open_source
from megatron_cogview.data.tokenize import Work, tokenize_dataset
from megatron_cogview.tokenization.image import load_image_tokenizer
from megatron_cogview.tokenization.text import TextTokenizer


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Tokenise pairs."""

    data: Path
    """Folder of WebDataset tars, or a table (.jsonl, .csv, .tsv) that names pictures."""
    text_tokenizer: Path
    """SentencePiece model."""
    image_tokenizer: Path
    """Image tokenizer weights (.safetensors)."""
    output: Path
    """Folder for the shards; several workers share it."""
    preset: str
    """Preset whose sequence and vocabulary the shards are for."""
    text_policy: Literal["reject", "truncate"] | None = None
    """What happens to a caption over the budget; the preset's policy if not given."""
    device: str = "cpu"
    """Where pictures are encoded."""
    encoder_precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is faster on GPUs; a few codes in a thousand differ, and may depend on the batch."""
    source: Annotated[SourceOptions, tyro.conf.arg(name="")] = field(default_factory=SourceOptions)
    work: Annotated[Work, tyro.conf.arg(name="")] = field(default_factory=Work)


def tokenize(arguments: Arguments) -> dict[str, Any] | None:
    """Tokenise as asked; the manifest, if every part is done."""
    run = preset(arguments.preset)
    policy = arguments.text_policy or run.sequence.text_policy
    encoder = PairEncoder(
        TextTokenizer(arguments.text_tokenizer),
        load_image_tokenizer(
            arguments.image_tokenizer, arguments.device, arguments.encoder_precision
        ),
        dataclasses.replace(run.sequence, text_policy=policy),
        run.model.vocab,
    )
    source = open_source(arguments.data, arguments.source)
    return tokenize_dataset(source, encoder, arguments.output, arguments.work)


def main() -> None:
    """Run; one line on stderr and exit code 1 on wrong input."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        manifest = tokenize(tyro.cli(Arguments, description=__doc__))
    except (ConfigError, DataError, CheckpointError) as error:
        sys.exit(f"error: {error}")
    if manifest:
        print(f"{manifest['records']} records, rejected: {sum(manifest['rejected'].values())}")


if __name__ == "__main__":
    main()
