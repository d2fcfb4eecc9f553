"""A model's weights out of a checkpoint into one safetensors file, and back.

    python tools/convert_checkpoint.py export --checkpoint runs/a/checkpoints/step_00001000 \\
        --output model.safetensors
    python tools/convert_checkpoint.py import --weights model.safetensors --output imported

``generate --generation.checkpoint imported`` draws with it.  Optimizer and data position stay
behind, so training does not go on from it.  Neither way runs anything in the files.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megatron_cogview.checkpoint.export import export_weights, import_weights
from megatron_cogview.configs.errors import CheckpointError
from megatron_cogview.storage.digest import sha256_file


@dataclass(frozen=True, kw_only=True)
class Export:
    """Checkpoint to safetensors."""

    checkpoint: Path
    """One checkpoint (checkpoints/step_*); every byte is verified first."""
    output: Path
    """File to write (.safetensors)."""


@dataclass(frozen=True, kw_only=True)
class Import:
    """Safetensors to checkpoint."""

    weights: Path
    """File that ``export`` has written."""
    output: Path
    """Folder for the checkpoint; must be empty or absent."""


Command = (
    Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Import, tyro.conf.subcommand("import")]
)


def main() -> None:
    """Run; one line on stderr and exit code 1 on wrong input."""
    arguments = tyro.cli(Command, description=__doc__)
    try:
        if isinstance(arguments, Export):
            about = export_weights(arguments.checkpoint, arguments.output)
            print(f"{arguments.output}: step {about['step']}, {sha256_file(arguments.output)}")
        else:
            print(import_weights(arguments.weights, arguments.output))
    except (CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
