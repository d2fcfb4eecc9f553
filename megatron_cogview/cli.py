"""The command line: ``python -m megatron_cogview TASK PRESET [--field value ...]``.

The only module that knows tyro.  A preset gives every default, a flag overrides one field.
"""

import logging
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from megatron_cogview import __version__
from megatron_cogview.configs.errors import CheckpointError, ConfigError, DataError, TrainingError
from megatron_cogview.configs.presets import PRESETS, preset
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.tasks import registry

INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """What ``plan`` asks besides the run."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    """The run to plan."""
    gpus: int = 1
    """GPUs in all."""
    gpu_memory_gib: float = 80.0
    """Memory of one GPU."""
    keep_layout: bool = False
    """Check the layout of ``--parallel.*`` instead of choosing one."""


def usage() -> str:
    """What there is to type."""
    width = max(map(len, registry.TASKS))
    tasks = "\n".join(f"  {name:<{width}}  {what}" for name, what in registry.TASKS.items())
    return (
        f"megatron_cogview {__version__}\n\n"
        "usage: python -m megatron_cogview TASK PRESET [--field value ...]\n"
        "       python -m megatron_cogview TASK RUN/config.json [--field value ...]\n"
        "       torchrun --nproc-per-node N -m megatron_cogview TASK PRESET [...]\n\n"
        f"tasks:\n{tasks}\n\npresets: {', '.join(PRESETS)}\n\n"
        "All fields with their meaning and defaults:\n"
        "  python -m megatron_cogview TASK PRESET --help\n"
    )


def base_config(name: str) -> RunConfig:
    """A preset by name, or the ``config.json`` of an earlier run.

    Raises:
        ConfigError: neither.
    """
    if not name.endswith(".json"):
        return preset(name)
    try:
        return RunConfig.from_json(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: not a run's configuration: {error}") from error


def _arguments(task: str, default: RunConfig, flags: list[str]) -> tuple[RunConfig, dict[str, Any]]:
    prog = f"megatron_cogview {task} {default.preset}"
    if task != "plan":
        return tyro.cli(RunConfig, default=default, args=flags, prog=prog), {}
    plan = tyro.cli(PlanArguments, default=PlanArguments(run=default), args=flags, prog=prog)
    return plan.run, {
        "gpus": plan.gpus,
        "gpu_memory_gib": plan.gpu_memory_gib,
        "auto_layout": not plan.keep_layout,
    }


def _quiet_libraries() -> None:
    """megatron-core warns of every accelerator that is not there, on every rank."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
    logging.getLogger("megatron").setLevel(logging.ERROR)


def main(argv: list[str] | None = None) -> int:
    """Run a task; the exit code is the task's own, or 1 after an error that a user can mend."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(usage())
        return 0
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    level = logging.INFO if rank == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    _quiet_libraries()
    try:
        if words[0] not in registry.TASKS:
            raise ConfigError(f"task = {words[0]!r}: must be one of {', '.join(registry.TASKS)}")
        if len(words) == 1 or words[1].startswith("-"):
            raise ConfigError(f"preset: name one after {words[0]!r}: {', '.join(PRESETS)}")
        config, more = _arguments(words[0], base_config(words[1]), words[2:])
        code = registry.load(words[0])(config, **more)
    except ConfigError as error:
        # Every rank has the same configuration; one message is enough.
        if rank == 0:
            sys.stderr.write(f"error: {error}\n")
        return 1
    except (DataError, CheckpointError, TrainingError, OSError) as error:
        # A file may be damaged or missing where one rank reads it, and nowhere else.
        sys.stderr.write(f"error{f' (rank {rank})' if rank else ''}: {error}\n")
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return int(code or 0)
