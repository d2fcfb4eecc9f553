"""A Slurm batch script for a pretraining run: rendered as text, nothing is submitted.

What the script relies on was tried on Slurm 22.05 with torchrun of torch 2.13:

- SIGUSR1 kills torchrun and leaves its workers behind, unless ``--signals-to-handle`` names it;
  then every worker gets it, saves and ends, and torchrun ends with 1 because it was signalled.
- Slurm sends the signal to the batch shell alone (``B:``), which passes it on to ``srun``, and that
  to every torchrun.  The shell must know of it: when the run was asked and did not end with 0, it
  queues the job again.  The workers could, but in a container they have no ``scontrol``.
- ``--kill-on-bad-exit`` would let the first torchrun that has ended kill those whose workers still
  write.  ``--wait`` gives them time.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_cogview.configs.errors import ConfigError, refuse
from megatron_cogview.configs.run import RunConfig

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,@+-]*")
"""What names a job, a partition, an account or a quality of service; ``#SBATCH`` lines know no
safe quotes."""
_TIME = re.compile(r"\d+|\d+:\d{2}|\d+:\d{2}:\d{2}|\d+-\d{1,2}(:\d{2}){0,2}")
_MEMORY = re.compile(r"\d+[KMGT]?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=[^\0]*", re.DOTALL)

LAST_WORDS_SECONDS = 60
"""From the end of one node's torchrun until the others are stopped."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is asked of Slurm."""

    nodes: int = 1
    """Nodes."""
    gpus_per_node: int = 8
    """GPUs of each, and processes."""
    time: str = "24:00:00"
    """Time limit, as Slurm writes it.  The run saves and is queued again before it ends."""
    stop_seconds: int = 300
    """So long before the limit the run is asked to save: longer than a step and a checkpoint."""
    name: str = "cogview"
    """Name of the job and, with its number, of its log."""
    partition: str = ""
    """Slurm's ``--partition``."""
    account: str = ""
    """Slurm's ``--account``."""
    qos: str = ""
    """Slurm's ``--qos``."""
    cpus_per_node: int = 0
    """Cores of each node; 0: whole nodes, with all cores and all memory."""
    memory: str = ""
    """Memory of each node, such as ``500G``, where nodes are shared."""
    container_image: str = ""
    """Image to run in, through pyxis (``--container-image``)."""
    container_mounts: str = ""
    """Folders to see in it, ``FROM:TO,FROM:TO``."""
    max_restarts: int = 3
    """How often torchrun starts crashed workers again before the job fails."""
    port: int = 0
    """Port on the first node where the others meet; 0: one that follows from the job's number."""
    directory: str = "."
    """Where the run starts; relative paths of the run are meant from there."""
    python: str = "python"
    """Interpreter on the nodes, or in the container."""
    export: tuple[str, ...] = ()
    """Environment variables of the run, ``NAME=VALUE``."""

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "stop_seconds"):
            if getattr(self, name) < 1:
                raise refuse(name, getattr(self, name), "must be at least 1")
        for name in ("cpus_per_node", "max_restarts"):
            if getattr(self, name) < 0:
                raise refuse(name, getattr(self, name), "must not be negative")
        if self.port and not 1024 <= self.port <= 65535:
            raise refuse("port", self.port, "must be 0 or in 1024..65535")
        for name in ("name", "partition", "account", "qos"):
            value = getattr(self, name)
            if (value or name == "name") and not _WORD.fullmatch(value):
                raise refuse(name, value, "must be a word of letters, digits and _.,@+-")
        if self.memory and not _MEMORY.fullmatch(self.memory):
            raise refuse("memory", self.memory, "must be a number with K, M, G or T")
        self._check_time()
        if self.container_mounts and not self.container_image:
            raise refuse("container_mounts", self.container_mounts, "needs container_image")
        for variable in self.export:
            if not _VARIABLE.fullmatch(variable):
                raise refuse("export", variable, "must be NAME=VALUE")

    def _check_time(self) -> None:
        if not _TIME.fullmatch(self.time):
            raise refuse(
                "time", self.time, "must be MINUTES, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS"
            )
        if seconds_of(self.time) <= self.stop_seconds + 60:
            raise refuse(
                "time",
                self.time,
                f"leaves no time to train: the run is asked to stop up to a minute more than "
                f"stop_seconds = {self.stop_seconds} before it",
            )

    @property
    def processes(self) -> int:
        """One for each GPU."""
        return self.nodes * self.gpus_per_node


def seconds_of(time: str) -> int:
    """Seconds of one of Slurm's times (see sbatch(1))."""
    days, dash, rest = time.rpartition("-")
    numbers = [int(number) for number in rest.split(":")]
    if dash:
        # Hours, perhaps minutes, perhaps seconds.
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        # Minutes, perhaps seconds.
        hours, (minutes, seconds) = 0, (*numbers, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def render(job: Job, config: RunConfig, words: Sequence[str]) -> str:
    """The script.

    Args:
        job: what to ask for.
        config: the run.
        words: what follows ``pretrain`` on the command line and gives ``config``.

    Raises:
        ConfigError: the run cannot be split over so many processes, or names no data.
    """
    try:
        config.check_layout(job.processes)
    except ConfigError as error:
        raise ConfigError(
            f"{job.nodes} x {job.gpus_per_node} = {job.processes} processes: {error}"
        ) from None
    if not config.data.shards:
        raise ConfigError("data.shards: not set; name the folders of tools/tokenize_dataset.py")
    if any("\0" in word for word in (*words, job.directory, job.python, job.container_image)):
        raise ConfigError("a word of the command holds a NUL character")
    return "\n".join([*_header(job), "", *_environment(job, config), "", *_body(job, words)]) + "\n"


def _header(job: Job) -> list[str]:
    """What Slurm reads."""
    options = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": job.gpus_per_node,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "cpus-per-task": job.cpus_per_node or "",
        "mem": job.memory or ("" if job.cpus_per_node else "0"),
        "signal": f"B:USR1@{job.stop_seconds}",
        "open-mode": "append",
        "output": "%x-%j.out",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value != ""]
    if not job.cpus_per_node:
        lines.append("#SBATCH --exclusive")
    return ["#!/bin/bash", *lines, "#SBATCH --requeue"]


def _environment(job: Job, config: RunConfig) -> list[str]:
    p = config.parallel
    data = p.data(job.processes)
    lines = [
        f"# {job.processes} processes = tensor {p.tensor} x pipeline {p.pipeline} x data {data}.",
        "set -u",
        f"cd -- {shlex.quote(job.directory)} || exit 1",
        # torchrun would say so itself, at length.
        "export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1",
        # In torchrun's own store a second start would find the addresses of the first.
        "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
    ]
    if p.tensor > 1:
        lines.append("export CUDA_DEVICE_MAX_CONNECTIONS=1")
    for variable in job.export:
        name, _, value = variable.partition("=")
        lines.append(f"export {name}={shlex.quote(value)}")
    return lines


_STOP = """\
# Asked to stop: pass it on, remember it, and be queued again when the run has saved.
step= asked= interrupted=
stop() { asked=yes interrupted=yes; [[ -z $step ]] || kill -USR1 "$step"; }
trap stop USR1"""

_WAIT = """\
step=$!
# The signal ends `wait` early.
while true; do
    wait "$step"; code=$?
    [[ -n $interrupted ]] || break
    interrupted=
done
if [[ -n $asked && $code -ne 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID" && sleep 60
fi
exit "$code\""""


def _body(job: Job, words: Sequence[str]) -> list[str]:
    port = str(job.port or "$((20000 + SLURM_JOB_ID % 20000))")
    return [
        'mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        "",
        _STOP,
        "",
        " \\\n    ".join([*_srun(job), *_torchrun(job, port), *_run(words)]) + " &",
        _WAIT,
    ]


def _srun(job: Job) -> list[str]:
    # Slurm would bind the one task, and with it every process, to one core.
    line = f"srun --kill-on-bad-exit=0 --wait={LAST_WORDS_SECONDS} --cpu-bind=none"
    if job.cpus_per_node:
        line += f" --cpus-per-task={job.cpus_per_node}"
    parts = [line]
    if job.container_image:
        parts.append(
            f"--container-image={shlex.quote(job.container_image)} "
            f"--container-workdir={shlex.quote(job.directory)}"
        )
        if job.container_mounts:
            parts.append(f"--container-mounts={shlex.quote(job.container_mounts)}")
    return parts


def _torchrun(job: Job, port: str) -> list[str]:
    return [
        f"{shlex.quote(job.python)} -m torch.distributed.run",
        f'--nnodes "$SLURM_NNODES" --nproc-per-node {job.gpus_per_node}',
        f'--rdzv-backend c10d --rdzv-endpoint "${{nodes[0]}}:{port}"',
        '--rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"',
        f"--max-restarts {job.max_restarts}",
        "--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        f"--shutdown-timeout {max(30, job.stop_seconds - 30)}",
    ]


def _run(words: Sequence[str]) -> list[str]:
    return ["-m megatron_cogview pretrain " + shlex.join(words)]
