"""Train a SentencePiece model on the captions of a data set, or bring one.

python tools/train_text_tokenizer.py --data pairs --output text.model --vocab-size 485
python tools/train_text_tokenizer.py --model mine.model --output text.model
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from megatron_cogview.configs.errors import ConfigError, DataError
from megatron_cogview.data.sources import read_captions
from megatron_cogview.tokenization.text import TextTokenizer, adopt, train


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Make a text tokenizer."""

    output: Path
    """Model file to write."""
    data: Path | None = None
    """Folder of WebDataset tars, or a table (.jsonl, .csv, .tsv), whose captions to learn from."""
    model: Path | None = None
    """A SentencePiece model to check and copy instead of training one."""
    vocab_size: int = 485
    """Most pieces; the preset's model.vocab.num_text_ids is the limit."""
    caption_keys: tuple[str, ...] = ("caption",)
    """Fields or columns to learn from; several are allowed, such as one per language."""


def make(arguments: Arguments) -> TextTokenizer:
    """Train or copy, as asked."""
    if (arguments.data is None) == (arguments.model is None):
        raise ConfigError("give either --data or --model")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    if arguments.model is not None:
        return adopt(arguments.model, arguments.output)
    assert arguments.data is not None
    captions = read_captions(arguments.data, arguments.caption_keys)
    return train(captions, arguments.output, arguments.vocab_size)


def main() -> None:
    """Run; one line on stderr and exit code 1 on wrong input."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        tokenizer = make(tyro.cli(Arguments, description=__doc__))
    except (ConfigError, DataError) as error:
        sys.exit(f"error: {error}")
    print(f"{tokenizer.path}: {tokenizer.vocab_size} pieces, {tokenizer.fingerprint}")


if __name__ == "__main__":
    main()
