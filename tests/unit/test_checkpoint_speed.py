"""tools/bench_checkpoint.py: it runs, saves what it times, and refuses nonsense."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "tools/bench_checkpoint.py", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_small_measurement(tmp_path: Path) -> None:
    done = run("--output", str(tmp_path), "--megabytes", "2", "--repetitions", "2")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "bench_checkpoint.json").read_text())
    assert found["state_bytes"] > 1_900_000
    assert 0 < found["begin_s"] <= found["stall_s"]
    assert found["stall_of_blocking"] == found["stall_s"] / found["blocking_s"]
    assert "save that is waited for" in done.stdout
    # The checkpoints are gone; the figures stay.
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "bench_checkpoint.json",
        "bench_checkpoint.md",
    ]


def test_nonsense_is_refused(tmp_path: Path) -> None:
    done = run("--output", str(tmp_path), "--repetitions", "0")
    assert done.returncode == 1
    assert "repetitions = 0" in done.stderr
