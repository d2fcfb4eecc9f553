"""The demo killed with -9 in each of its long stages, and run again, ends with the same bytes."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil

from tests.integration.micro_demo import COMMAND, ROOT, TIMEOUT_SECONDS

KILLS = (
    # stage, what must exist in the run folder before the kill, seconds after it
    ("pairs", "pairs", 0.1),
    ("image tokenizer", "image_tokenizer/checkpoints/*", 0.5),
    ("tokens", "tokens", 1.0),
    ("pretrain", "pretrain/checkpoints/step_*", 0.3),
    ("generate", "generated/*.png", 0.0),
    ("check", "fresh/*.tar", 0.2),
)
COMPARED = (
    "text.model",
    "image_tokenizer/image_tokenizer.safetensors",
    "tokens/*",
    "generated/*.png",
)


def start(run: Path) -> subprocess.Popen[bytes]:
    with (run.parent / f"{run.name}.log").open("ab") as log:
        return subprocess.Popen(
            [*COMMAND, "--output", str(run)],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "TQDM_MININTERVAL": "5", "PYTHONUNBUFFERED": "1"},
        )


def kill_everything(process: subprocess.Popen[bytes]) -> None:
    """-9 to the demo and all its descendants at once, as a machine that stops would."""
    tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in tree:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait(30)
    psutil.wait_procs(tree, timeout=30)


def wait_for(condition: str, run: Path, process: subprocess.Popen[bytes]) -> bool:
    """Until a path that fits the pattern exists; False when the demo ended before."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not any(run.glob(condition)):
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, f"{condition} never came"
        time.sleep(0.02)
    return True


def finish(run: Path) -> None:
    process = start(run)
    try:
        code = process.wait(TIMEOUT_SECONDS)
    finally:
        if process.poll() is None:
            kill_everything(process)
    assert code == 0, (run.parent / f"{run.name}.log").read_text(errors="replace")[-4000:]


def test_killed_in_every_stage_and_run_again_gives_the_same_bytes(
    tmp_path: Path, finished: Path
) -> None:
    killed = tmp_path / "killed"
    for stage, condition, delay in KILLS:
        process = start(killed)
        came = wait_for(condition, killed, process)
        time.sleep(delay)
        alive = process.poll() is None
        if alive:
            kill_everything(process)
        assert came and alive, f"{stage}: the demo ended before it could be killed"
    finish(killed)
    for pattern in COMPARED:
        names = sorted(p.relative_to(finished) for p in finished.glob(pattern))
        assert names, pattern
        for name in names:
            assert (killed / name).read_bytes() == (finished / name).read_bytes(), name
