"""Image encoding against the released algorithm's way, on the same weights and pictures.

    python tools/bench_tokenizer.py --output bench.json
    python tools/bench_tokenizer.py --image-tokenizer image_tokenizer.safetensors --data photographs

Without a tokenizer: the paper's network, untrained, its codebook drawn from encoder outputs.
"""

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from megatron_cogview.analysis.tokenizer_speed import Settings, report
from megatron_cogview.configs.errors import ConfigError, DataError
from megatron_cogview.storage.atomic import write_text


@dataclass(frozen=True, kw_only=True)
class Arguments(Settings):
    """Measure the image tokenizer's encoding."""

    output: Path | None = None
    """Write the numbers here, as JSON."""


def show(what: str, part: dict[str, Any]) -> None:
    """Two lines and their quotients."""
    for name in ("ours", "released"):
        row = part[name]
        print(
            f"{what:<10} {name:<9} {row['seconds']:8.3f} s {row['pictures_per_second']:9.1f} "
            f"pictures/s {row['peak_bytes'] / 2**20:9.1f} MiB"
        )
    print(
        f"{what:<10} {part['speedup']:.2f} times as fast, {part['memory_ratio']:.3f} of the memory"
    )


def main() -> None:
    """Run; one line on stderr and exit code 1 on wrong input."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        numbers = report(arguments)
    except (ConfigError, DataError) as error:
        sys.exit(f"error: {error}")
    print(f"{numbers['device']}, {numbers['threads']} threads, torch {numbers['torch']}")
    show("quantizer", numbers["quantizer"])
    show("encode", numbers["encode"])
    right = numbers["nearest_of_those"]
    print(
        f"codes: {numbers['codes_differ']} of {numbers['vectors']} differ between the two; "
        f"of those ours has the nearest by fp64 in {right['ours']}, released in {right['released']}"
    )
    bf16 = numbers["bf16"]
    print(
        f"bf16 encoder: {bf16['mismatch']:.2%} of {bf16['vectors']} codes differ; of those "
        f"{bf16['within_1_percent']:.1%} lie within 1 % of the nearest distance "
        f"({bf16['within_1_percent_squared']:.1%} of its square)"
    )
    if arguments.output is not None:
        write_text(arguments.output, json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
