"""Rendered batch scripts: what they say, that bash reads them, and what is refused."""

import os
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_cogview.configs.errors import ConfigError
from megatron_cogview.configs.presets import base_4b, tiny
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.tasks.slurm import Job, render, seconds_of

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["base_4b", "--data.shards", "tokens", "--parallel.tensor", "4"]
GOLDEN = """\
#!/bin/bash
#SBATCH --job-name=cogview
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=2-00:00:00
#SBATCH --partition=gpu
#SBATCH --mem=0
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#SBATCH --exclusive
#SBATCH --requeue

# 64 processes = tensor 4 x pipeline 1 x data 16.
set -u
cd -- . || exit 1
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export CUDA_DEVICE_MAX_CONNECTIONS=1

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# Asked to stop: pass it on, remember it, and be queued again when the run has saved.
step= asked= interrupted=
stop() { asked=yes interrupted=yes; [[ -z $step ]] || kill -USR1 "$step"; }
trap stop USR1

srun --kill-on-bad-exit=0 --wait=60 --cpu-bind=none \\
    python -m torch.distributed.run \\
    --nnodes "$SLURM_NNODES" --nproc-per-node 8 \\
    --rdzv-backend c10d --rdzv-endpoint "${nodes[0]}:$((20000 + SLURM_JOB_ID % 20000))" \\
    --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \\
    --max-restarts 3 \\
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \\
    --shutdown-timeout 270 \\
    -m megatron_cogview pretrain base_4b --data.shards tokens --parallel.tensor 4 &
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
exit "$code"
"""


def with_data(config: RunConfig, tensor: int = 1) -> RunConfig:
    return replace(
        config,
        data=replace(config.data, shards=("tokens",)),
        parallel=replace(config.parallel, tensor=tensor),
    )


def stub(folder: Path, name: str, body: str) -> None:
    """A program of Slurm's, for scripts that run without it."""
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
    path.chmod(0o755)


def start(script: str, folder: Path, is_stopped: bool = False) -> tuple[int, str]:
    """Run a script beside stubs of Slurm's programs; exit code and what all of them said."""
    path = folder / "script"
    path.write_text(script, encoding="utf-8")
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    log = folder / "log"
    log.touch()
    stub(
        programs,
        "scontrol",
        f'if [[ $1 = show ]]; then echo n7; echo n8; else echo "scontrol $*" >> {log}; fi',
    )
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "12",
        "SLURM_JOB_NODELIST": "n[7-8]",
        "SLURM_NNODES": "2",
        "LOG": str(log),
    }
    process = subprocess.Popen(["bash", str(path)], cwd=folder, env=environment)
    if is_stopped:
        while "ready" not in log.read_text(encoding="utf-8"):
            assert process.poll() is None
        process.send_signal(signal.SIGUSR1)
    return process.wait(timeout=60), log.read_text(encoding="utf-8")


def test_golden() -> None:
    job = Job(nodes=8, time="2-00:00:00", partition="gpu")
    assert render(job, with_data(base_4b(), tensor=4), WORDS) == GOLDEN


def test_container_shared_nodes_and_exports() -> None:
    job = Job(
        gpus_per_node=2,
        cpus_per_node=16,
        memory="200G",
        account="lab-7",
        qos="long",
        container_image="registry#team/cogview:1.0",
        container_mounts="/data:/data",
        directory="/runs/a b",
        export=("NCCL_DEBUG=INFO", "NAME=it's $HOME; `x`"),
        port=29500,
    )
    script = render(job, with_data(base_4b()), WORDS)
    for line in (
        "#SBATCH --account=lab-7",
        "#SBATCH --qos=long",
        "#SBATCH --cpus-per-task=16",
        "#SBATCH --mem=200G",
        "cd -- '/runs/a b' || exit 1",
        "export NCCL_DEBUG=INFO",
    ):
        assert line in script.splitlines()
    assert "--container-image='registry#team/cogview:1.0'" in script
    assert "--container-workdir='/runs/a b' \\\n    --container-mounts=/data:/data" in script
    assert "--cpu-bind=none --cpus-per-task=16 \\" in script
    assert '"${nodes[0]}:29500"' in script
    assert "--exclusive" not in script
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in script


HOSTILE = [
    "base_4b",
    "--data.shards",
    "two words",
    "it's",
    '"quoted" $HOME `touch hit` $(touch hit)',
    "; touch hit; #",
    "line\ntouch hit\n#SBATCH --nodes=99",
    "back\\slash",
    "*",
    "",
]


def test_words_reach_the_run_as_they_were(tmp_path: Path) -> None:
    """Bash runs the script, with a stand-in for srun that tells its arguments."""
    (tmp_path / "bin").mkdir()
    stub(tmp_path / "bin", "srun", 'printf "%s\\0" "$@" > "$LOG"; exit 7')
    directory = tmp_path / "run; touch hit 'a'"
    directory.mkdir()
    job = Job(directory=str(directory), export=("X=$(touch hit)",), python="/my envs/bin/python")
    code, log = start(render(job, with_data(base_4b()), HOSTILE), tmp_path)
    assert code == 7
    given = log.split("\0")[:-1]
    assert given[given.index("pretrain") + 1 :] == HOSTILE
    assert "/my envs/bin/python" in given
    assert "n7:20012" in given
    assert "12-0" in given
    assert not [path for path in tmp_path.rglob("hit") if path.is_file()]


@pytest.mark.parametrize(("code", "queued"), [(0, False), (1, True)])
def test_a_run_that_was_asked_to_stop_is_queued_again(
    tmp_path: Path, code: int, queued: bool
) -> None:
    (tmp_path / "bin").mkdir()
    body = f'trap "echo asked >> $LOG; exit {code}" USR1; echo ready >> $LOG; while :; do :; done'
    stub(tmp_path / "bin", "srun", body)
    stub(tmp_path / "bin", "sleep", "exit 0")
    ended, log = start(render(Job(), with_data(base_4b()), WORDS), tmp_path, is_stopped=True)
    assert ended == code
    assert log.split("\n")[:2] == ["ready", "asked"]
    assert ("scontrol requeue 12" in log) == queued


def test_a_run_that_fails_by_itself_is_not_queued_again(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    stub(tmp_path / "bin", "srun", "exit 3")
    assert start(render(Job(), with_data(base_4b()), WORDS), tmp_path) == (3, "")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"nodes": 0}, "nodes"),
        ({"gpus_per_node": 0}, "gpus_per_node"),
        ({"name": "a b"}, "name"),
        ({"name": ""}, "name"),
        ({"partition": "gpu\n#SBATCH --nodes=99"}, "partition"),
        ({"account": "a;b"}, "account"),
        ({"qos": "--x"}, "qos"),
        ({"time": "soon"}, "time"),
        ({"time": "0:05:00"}, "time"),
        ({"time": "1:00:00", "stop_seconds": 3600}, "time"),
        ({"memory": "lots"}, "memory"),
        ({"container_mounts": "/a:/b"}, "container_mounts"),
        ({"export": ("A B=1",)}, "export"),
        ({"export": ("NOTHING",)}, "export"),
        ({"port": 80}, "port"),
        ({"cpus_per_node": -1}, "cpus_per_node"),
    ],
)
def test_what_slurm_or_bash_would_misread_is_refused(
    changes: dict[str, object], field: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^{field} = "):
        Job(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("10:30", 630),
        ("1:02:03", 3723),
        ("2-3", 183_600),
        ("2-03:04", 183_840),
        ("1-00:00:01", 86_401),
    ],
)
def test_times_as_slurm_reads_them(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds


def test_impossible_layouts_and_runs_without_data_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^1 x 6 = 6 processes: .*parallel.tensor"):
        render(Job(gpus_per_node=6), with_data(base_4b(), tensor=4), WORDS)
    with pytest.raises(ConfigError, match=r"^5 x 8 = 40 processes: training.global_batch_size"):
        render(Job(nodes=5), with_data(tiny()), WORDS)
    with pytest.raises(ConfigError, match=r"^data.shards: not set"):
        render(Job(), base_4b(), WORDS)
    with pytest.raises(ConfigError, match="NUL"):
        render(Job(), with_data(base_4b()), ["base_4b", "\0"])


def tool(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "render_slurm.py"), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def test_the_tool_writes_once_and_checks_first(tmp_path: Path) -> None:
    script = tmp_path / "a b.sbatch"
    job = ("--nodes", "2", "--output", str(script))
    run = ("--", "base_4b", "--data.shards", "my tokens", "--training.output", "runs/4 b")
    done = tool(tmp_path, *job, *run, "--parallel.tensor", "7")
    assert done.returncode == 1
    assert done.stderr.startswith("error: 2 x 8 = 16 processes: parallel.tensor")
    assert not script.exists()
    done = tool(tmp_path, *job, *run)
    assert done.returncode == 0, done.stderr
    assert f"sbatch {shlex.quote(str(script))}" in done.stdout
    text = script.read_text(encoding="utf-8")
    assert f"cd -- {shlex.quote(str(tmp_path))}" in text
    assert "--data.shards 'my tokens' --training.output 'runs/4 b'" in text
    subprocess.run(["bash", "-n", str(script)], check=True)
    done = tool(tmp_path, *job, "--nodes", "4", *run)
    assert done.returncode == 1
    assert "--force" in done.stderr
    assert script.read_text(encoding="utf-8") == text
    assert tool(tmp_path, *job, "--force", *run).returncode == 0


def test_the_tool_takes_an_earlier_runs_configuration(tmp_path: Path) -> None:
    config = with_data(replace(tiny(), training=replace(tiny().training, micro_batch_size=8)))
    config.save(tmp_path / "config.json")
    job = ("--gpus-per-node", "2", "--output", "job.sbatch")
    done = tool(tmp_path, *job, "--", "config.json", "--training.seed", "5")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "job.sbatch").read_text(encoding="utf-8")
    assert "-m megatron_cogview pretrain config.json --training.seed 5 &" in text
    done = tool(tmp_path, "--output", "other.sbatch")
    assert done.returncode == 1
    assert done.stderr.startswith("error: name a preset")
