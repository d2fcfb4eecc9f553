"""Send pictures through an image tokenizer and back.

    python tools/reconstruct.py --data pairs --image-tokenizer image_tokenizer.safetensors \\
        --output reconstructions --limit 500
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from megatron_cogview.configs.errors import CheckpointError, ConfigError, DataError
from megatron_cogview.evaluation.reconstruction import reconstruct
from megatron_cogview.tokenization.image import load_image_tokenizer


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Reconstruct pictures."""

    data: tuple[Path, ...]
    """Folders of WebDataset tars."""
    image_tokenizer: Path
    """Image tokenizer weights (.safetensors)."""
    output: Path
    """Folder for ID.png, records.jsonl, sheet.png and summary.json."""
    limit: int = 500
    """Pictures, from the first on."""
    device: str = "cpu"
    """Where the tokenizer runs."""


def main() -> None:
    """Run; one line on stderr and exit code 1 on wrong input."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        tokenizer = load_image_tokenizer(arguments.image_tokenizer, device=arguments.device)
        summary = reconstruct(arguments.data, tokenizer, arguments.output, arguments.limit)
    except (ConfigError, DataError, CheckpointError) as error:
        sys.exit(f"error: {error}")
    numbers = f"{summary['psnr']:.2f} dB, SSIM {summary['ssim']:.3f}"
    print(f"{arguments.output}: {summary['pictures']} pictures, {numbers}")


if __name__ == "__main__":
    main()
