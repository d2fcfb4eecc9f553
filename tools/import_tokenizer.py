"""Turn CogView's released VQ-VAE into an image tokenizer of this package.

    python tools/import_tokenizer.py --checkpoint vqvae_hard_biggerset_011.pt \\
        --output image_tokenizer.safetensors
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from megatron_cogview.configs.errors import ConfigError, DataError
from megatron_cogview.storage.digest import sha256_file
from megatron_cogview.tokenization.image import save_image_tokenizer
from megatron_cogview.tokenization.pixels import RELEASED
from megatron_cogview.tokenization.released import read_released_vqvae


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Import a released VQ-VAE."""

    checkpoint: Path
    """The released file (.pt, read without running any code in it), or its .safetensors copy."""
    output: Path
    """Image tokenizer to write (.safetensors)."""
    image_size: int = 256
    """Side of the pictures it is to encode, pixels."""


def main() -> None:
    """Run; one line on stderr and exit code 1 on wrong input."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        model, config = read_released_vqvae(arguments.checkpoint, arguments.image_size)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        save_image_tokenizer(model, config, arguments.output, RELEASED)
    except (ConfigError, DataError) as error:
        sys.exit(f"error: {error}")
    grid = f"{config.codes_per_side} x {config.codes_per_side}"
    print(
        f"{arguments.output}: {grid} codes of {config.num_codes}, {sha256_file(arguments.output)}"
    )


if __name__ == "__main__":
    main()
