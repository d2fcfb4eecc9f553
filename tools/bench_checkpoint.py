"""How long training waits for a save: written in the background, and written while it waits.

    python tools/bench_checkpoint.py --output runs/bench_checkpoint

The state is 200 MB of random tensors in one process; the disk is the one that the output folder
lies on.  Nothing else should run beside it.
"""

import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro

from megatron_cogview.analysis.machine import machine
from megatron_cogview.configs.parallel import ParallelConfig
from megatron_cogview.parallel import topology
from megatron_cogview.storage.atomic import write_text


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure saving."""

    output: Path
    """Folder for bench_checkpoint.json and bench_checkpoint.md; checkpoints come and go in it."""
    repetitions: int = 9
    """Saves of each kind."""
    megabytes: int = 200
    """Size of the state."""


def main() -> None:
    """Run; one line on stderr and exit code 1 on wrong input."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    arguments = tyro.cli(Arguments, description=__doc__)
    for name in ("repetitions", "megabytes"):
        if getattr(arguments, name) < 1:
            sys.exit(f"error: {name} = {getattr(arguments, name)}: must be at least 1")
    arguments.output.mkdir(parents=True, exist_ok=True)
    with (
        topology.running(ParallelConfig()) as groups,
        TemporaryDirectory(dir=arguments.output) as folder,
    ):
        from megatron_cogview.analysis.checkpoint_speed import measure, table, toy_state

        state = toy_state(arguments.megabytes * 1_000_000)
        results = measure(Path(folder), groups, state, arguments.repetitions)
        results |= machine(groups.device)
    print(f"{results['device']}, torch {results['torch']}, commit {results['commit']}")
    print(table(results), end="")
    output = arguments.output / "bench_checkpoint"
    write_text(output.with_suffix(".json"), json.dumps(results, indent=1) + "\n")
    write_text(output.with_suffix(".md"), table(results))


if __name__ == "__main__":
    main()
