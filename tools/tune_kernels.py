"""Measure which sizes start the Triton kernels fastest on this GPU.

    python tools/tune_kernels.py --output h100.json
    export MEGATRON_COGVIEW_KERNEL_SIZES=h100.json

Without the file kernels start with fixed sizes.  A few candidates of each kernel are timed in the
calls of the presets.  Run again, it goes on where it was stopped; the file says for which GPU and
which Triton it is, and elsewhere the fixed sizes are used.
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from megatron_cogview.analysis.kernel_tuning import Settings, table, tune
from megatron_cogview.configs.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Arguments(Settings):
    """Tune kernels."""

    output: Path
    """File of sizes; made, or gone on with."""


def main() -> None:
    """Run; one line on stderr and exit code 1 on wrong input."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        arguments = tyro.cli(Arguments, description=__doc__)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        print(table(tune(arguments.output, arguments, device)), end="")
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
