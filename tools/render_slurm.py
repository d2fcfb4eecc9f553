"""Write a Slurm batch script for a pretraining run; submit it yourself with sbatch.

    python tools/render_slurm.py --nodes 8 --time 2-00:00:00 --partition gpu --output run.sbatch \\
        -- base_4b --parallel.distributed-optimizer --data.shards tokens --training.output runs/4b

What follows `--` is what one would type after `python -m megatron_cogview pretrain`: a preset, or
the config.json of an earlier run, and fields to change.  The layout is checked before anything is
written.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from megatron_cogview.cli import base_config
from megatron_cogview.configs.errors import ConfigError
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.storage.atomic import write_text
from megatron_cogview.tasks.slurm import Job, render


@dataclass(frozen=True, kw_only=True)
class Arguments(Job):
    """Render a batch script."""

    output: Path
    """Script to write."""
    force: bool = False
    """Write over a script that is there."""
    directory: str = str(Path.cwd())
    """Where the run starts; relative paths of the run are meant from there."""


def main() -> None:
    """Run; one line on stderr and exit code 1 on wrong input."""
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    run = words[at + 1 :]
    try:
        job = tyro.cli(Arguments, args=words[:at], description=__doc__)
        if not run or run[0].startswith("-"):
            raise ConfigError("name a preset or a config.json behind `--`")
        base = base_config(run[0])
        config = tyro.cli(RunConfig, default=base, args=run[1:], prog=f"pretrain {run[0]}")
        script = render(job, config, run)
        if job.output.exists() and not job.force:
            raise ConfigError(f"{job.output}: is there already; --force writes over it")
        write_text(job.output, script)
    except (ConfigError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{job.output}: {job.processes} processes on {job.nodes} node(s).  Next:")
    print(f"    sbatch {shlex.quote(str(job.output))}")
    print(f"Its log is {job.name}-JOB.out, beside the run's own in {config.training.output}.")


if __name__ == "__main__":
    main()
