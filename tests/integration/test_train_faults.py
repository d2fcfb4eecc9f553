"""A short sample of every campaign against training, and that campaigns would notice a defect."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_cogview.testing.train_faults.campaigns import CAMPAIGNS

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = {"kill": 4, "cut": 2, "stop": 3, "hang": 1, "disk": 5, "number": 25}
"""Trials of the campaigns that start processes; the others have tests of their own."""


def run(arguments: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """A Python program in a process group of its own, which does not outlive the test."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def test_a_sample_of_each_campaign(tmp_path: Path) -> None:
    assert set(SAMPLE) <= set(CAMPAIGNS)
    for name, trials in SAMPLE.items():
        what = ["--only", name, "--trials", str(trials)]
        done = run(["tools/train_faults.py", "--output", str(tmp_path), *what], 300)
        assert done.returncode == 0, done.stdout[-4000:]
        (journal,) = tmp_path.glob(f"{name}-*.jsonl")
        lines = [json.loads(line) for line in journal.read_text().splitlines()]
        assert len(lines) == trials
        assert all(line["ok"] for line in lines)


BROKEN = """
import json, sys, tempfile, time
from pathlib import Path
from megatron_cogview.parallel import cpu_backend
cpu_backend.install()
from megatron_cogview.testing.train_faults.campaigns import CAMPAIGNS, preload
preload()
{patch}
with tempfile.TemporaryDirectory() as folder:
    campaign = CAMPAIGNS[{name!r}][0](Path(folder))
    print("LINES:", json.dumps([campaign.trial(n) for n in range({trials})]))
"""
Line = dict[str, Any]
DEFECTS: dict[str, tuple[str, int, Callable[[Line], bool], str]] = {
    "each rank decides for itself": (
        "number",
        13,
        # Behind the reduction one rank alone sees the bad number.
        lambda line: line["place"] == "reduced gradient" and not line["ok"],
        "from megatron_cogview.engines.megatron import MegatronEngine\n"
        "MegatronEngine._anyone = lambda self, mine: mine",
    ),
    "dropout is drawn anew after a restart": (
        "cut",
        1,
        lambda line: "files" in line["differs"],
        "from megatron_cogview.training import trainer\n"
        "seed = trainer.seed_step\n"
        "trainer.seed_step = lambda s, step, t: seed(time.time_ns() % 2**31, step, t)",
    ),
    "a rank that could not write says it has": (
        "disk",
        1,
        lambda line: not line["refused"],
        "from megatron_cogview.checkpoint import saver\n"
        "write = saver.Saver._write\n"
        "def silent(self, objects):\n"
        "    write(self, objects)\n"
        "    if self._error:\n"
        "        self._error, self._written = None, saver.Written([], {}, {})\n"
        "saver.Saver._write = silent",
    ),
}


def test_defects_would_be_noticed() -> None:
    """By what they do, which a busy machine does not."""
    for what, (name, trials, symptom, patch) in DEFECTS.items():
        done = run(["-c", BROKEN.format(patch=patch, name=name, trials=trials)], 200)
        said = [line for line in done.stdout.splitlines() if line.startswith("LINES:")]
        assert said, f"{what}: {done.stdout[-3000:]}"
        assert any(map(symptom, json.loads(said[0].removeprefix("LINES:")))), f"{what}: {said[0]}"
