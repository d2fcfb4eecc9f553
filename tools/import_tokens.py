"""Turn the original CogView's token data into shards, without running anything in it.

    python tools/import_tokens.py --binary merge.bin --text-tokenizer cog-pretrain.model \\
        --image-tokenizer image_tokenizer.safetensors --output tokens --preset base_4b

Name the tokenizers that made the data: it does not say which they were, and the shards will.
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
from megatron_cogview.data.import_tokens import import_tokens
from megatron_cogview.data.released import CompactBinary, LmdbRows
from megatron_cogview.data.tokenize import Work
from megatron_cogview.tokenization.image import load_image_tokenizer
from megatron_cogview.tokenization.text import TextTokenizer


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Import token data."""

    binary: tuple[Path, ...] = ()
    """Files of int32 records (64 text ids, 1,024 codes), or a folder of *.bin."""
    lmdb: Path | None = None
    """LMDB of pickled rows; needs the extra "import"."""
    text_tokenizer: Path
    """SentencePiece model that the data was made with."""
    image_tokenizer: Path
    """Image tokenizer that the data was made with, as tools/import_tokenizer.py writes it."""
    output: Path
    """Folder for the shards; several workers share it."""
    preset: str = "base_4b"
    """Preset whose sequence and vocabulary the shards are for."""
    text_policy: Literal["reject", "truncate"] | None = None
    """What happens to a text over the budget; the preset's policy if not given."""
    work: Annotated[Work, tyro.conf.arg(name="")] = field(default_factory=Work)


def run_import(arguments: Arguments) -> dict[str, Any] | None:
    """Import as asked; the manifest, if every part is done."""
    if bool(arguments.binary) == (arguments.lmdb is not None):
        raise ConfigError("--binary and --lmdb: name exactly one of them")
    run = preset(arguments.preset)
    policy = arguments.text_policy or run.sequence.text_policy
    encoder = PairEncoder(
        TextTokenizer(arguments.text_tokenizer),
        load_image_tokenizer(arguments.image_tokenizer),
        dataclasses.replace(run.sequence, text_policy=policy),
        run.model.vocab,
    )
    source = LmdbRows(arguments.lmdb) if arguments.lmdb else CompactBinary(arguments.binary)
    return import_tokens(source, encoder, arguments.output, arguments.work)


def main() -> None:
    """Run; one line on stderr and exit code 1 on wrong input."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        manifest = run_import(tyro.cli(Arguments, description=__doc__))
    except (ConfigError, DataError, CheckpointError) as error:
        sys.exit(f"error: {error}")
    if manifest:
        print(f"{manifest['records']} records, rejected: {sum(manifest['rejected'].values())}")


if __name__ == "__main__":
    main()
