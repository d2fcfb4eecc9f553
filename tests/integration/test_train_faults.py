"""A short sample of every campaign against training, and that campaigns would notice a defect."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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

    def sample(item: tuple[str, int]) -> subprocess.CompletedProcess[str]:
        what = ["--only", item[0], "--trials", str(item[1])]
        return run(["tools/train_faults.py", "--output", str(tmp_path), *what], 300)

    # Two at a time: each waits for its processes for most of its time.
    with ThreadPoolExecutor(2) as pool:
        results = zip(SAMPLE.items(), pool.map(sample, SAMPLE.items()), strict=True)
    for (name, trials), done in results:
        assert done.returncode == 0, done.stdout[-4000:]
        (journal,) = tmp_path.glob(f"{name}-*.jsonl")
        lines = [json.loads(line) for line in journal.read_text().splitlines()]
        assert len(lines) == trials
        assert all(line["ok"] for line in lines)


BROKEN = """
import sys, tempfile, time
from pathlib import Path
from megatron_cogview.parallel import cpu_backend
cpu_backend.install()
from megatron_cogview.testing.train_faults.campaigns import CAMPAIGNS, preload
preload()
{patch}
with tempfile.TemporaryDirectory() as folder:
    campaign = CAMPAIGNS[{name!r}][0](Path(folder))
    print("OK:", [campaign.trial(n)["ok"] for n in range({trials})])
"""
DEFECTS: dict[str, tuple[str, int, str]] = {
    "each rank decides for itself": (
        "number",
        25,
        "from megatron_cogview.engines.megatron import MegatronEngine\n"
        "MegatronEngine._anyone = lambda self, mine: mine",
    ),
    "dropout is drawn anew after a restart": (
        "cut",
        1,
        "from megatron_cogview.training import trainer\n"
        "seed = trainer.seed_step\n"
        "trainer.seed_step = lambda s, step, t: seed(time.time_ns() % 2**31, step, t)",
    ),
    "a rank that could not write says it has": (
        "disk",
        1,
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
    def broken(defect: tuple[str, int, str]) -> subprocess.CompletedProcess[str]:
        name, trials, patch = defect
        return run(["-c", BROKEN.format(patch=patch, name=name, trials=trials)], 200)

    with ThreadPoolExecutor(2) as pool:
        results = zip(DEFECTS, pool.map(broken, DEFECTS.values()), strict=True)
    for what, done in results:
        verdicts = [line for line in done.stdout.splitlines() if line.startswith("OK:")]
        noticed = "False" in verdicts[-1] if verdicts else "left alone" in done.stdout
        assert noticed, f"{what}: {done.stdout[-3000:]}"
