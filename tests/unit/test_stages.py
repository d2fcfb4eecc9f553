"""The demo's stage runner: what is skipped, what starts anew, what is left when it is stopped."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
sys.path.insert(0, str(DEMO))
stages = importlib.import_module("stages")
processes = importlib.import_module("processes")

COPY = "import sys; open(sys.argv[2], 'a').write(open(sys.argv[1]).read()); print('copied')"


def copying(tmp_path: Path, more: tuple[str, ...] = ()) -> stages.Stage:
    """A stage that appends its input to its output, so that each run shows."""
    source, target = tmp_path / "in.txt", tmp_path / "out.txt"
    command = stages.Command(("-c", COPY, str(source), str(target), *more))
    return stages.Stage("copy", (command,), (source,), (target,))


def test_an_unchanged_stage_is_skipped_and_keeps_its_seconds(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("a")
    first = stages.Runner(tmp_path)
    first.run(copying(tmp_path))
    again = stages.Runner(tmp_path)
    again.run(copying(tmp_path))
    assert (tmp_path / "out.txt").read_text() == "a"
    assert again.done["copy"]["seconds"] == first.done["copy"]["seconds"] > 0
    assert first.done["copy"]["peak_rss_bytes"] > 10**6
    assert "copied" in (tmp_path / ".stages" / "copy.log").read_text()


@pytest.mark.parametrize("what", ["input", "command", "output"])
def test_a_changed_stage_starts_anew_without_its_old_output(
    tmp_path: Path, what: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.txt").write_text("a")
    stages.Runner(tmp_path).run(copying(tmp_path))
    more: tuple[str, ...] = ()
    if what == "input":
        (tmp_path / "in.txt").write_text("b")
    elif what == "command":
        more = ("--other",)
    else:
        (tmp_path / "out.txt").unlink()
    stages.Runner(tmp_path).run(copying(tmp_path, more))
    assert (tmp_path / "out.txt").read_text() == ("b" if what == "input" else "a")
    assert ("inputs changed, removing" in capfd.readouterr().out) == (what != "output")


def test_the_same_bytes_with_another_time_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("a")
    stages.Runner(tmp_path).run(copying(tmp_path))
    os.utime(tmp_path / "in.txt", (1, 1))
    stages.Runner(tmp_path).run(copying(tmp_path))
    assert (tmp_path / "out.txt").read_text() == "a"


def test_a_failed_stage_keeps_its_output_and_goes_on(tmp_path: Path) -> None:
    target = tmp_path / "out.txt"
    code = "import sys, pathlib; p = pathlib.Path(sys.argv[1]); n = len(p.read_text()) if "
    code += "p.exists() else 0; p.write_text('x' * (n + 1)); sys.exit(0 if n else 3)"
    stage = stages.Stage("half", (stages.Command(("-c", code, str(target))),), (), (target,))
    with pytest.raises(stages.StageError, match=r"stage half failed with exit code 3.*half\.log"):
        stages.Runner(tmp_path).run(stage)
    stages.Runner(tmp_path).run(stage)
    assert target.read_text() == "xx"


def test_foreign_outputs_missing_inputs_and_missing_outputs_are_refused(tmp_path: Path) -> None:
    stage = copying(tmp_path)
    with pytest.raises(stages.StageError, match=r"stage copy: no .*in\.txt"):
        stages.Runner(tmp_path).run(stage)
    (tmp_path / "in.txt").write_text("a")
    (tmp_path / "out.txt").write_text("precious")
    with pytest.raises(stages.StageError, match="was not made by this program"):
        stages.Runner(tmp_path).run(stage)
    assert (tmp_path / "out.txt").read_text() == "precious"
    idle = stages.Stage(
        "idle",
        (
            stages.Command(
                ("-c", ""),
            ),
        ),
        (),
        (tmp_path / "never",),
    )
    with pytest.raises(stages.StageError, match="wrote no"):
        stages.Runner(tmp_path).run(idle)


def test_folders_are_hashed_by_names_and_contents_without_hidden_files(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a").write_text("1")
    hashes = stages.FileHashes(tmp_path / "hashes.json")
    first = hashes.of(folder)
    (folder / ".a.tmp").write_text("2")
    assert hashes.of(folder) == first
    (folder / "deep" / "a").rename(folder / "deep" / "b")
    assert hashes.of(folder) != first


def test_commands_read_as_typed_and_share_the_cores() -> None:
    command = stages.Command(("-m", "package", "a b"), processes=2)
    assert command.typed() == "torchrun --standalone --nproc-per-node 2 -m package 'a b'"
    assert command.argv()[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert command.argv()[-3:] == ["-m", "package", "a b"]
    cores = len(os.sched_getaffinity(0))
    assert command.environment()["OMP_NUM_THREADS"] == str(max(1, cores // 2))


def test_paths_are_shown_from_the_root() -> None:
    assert stages.shown(stages.ROOT / "runs" / "demo") == "runs/demo"
    assert stages.shown(stages.ROOT / ".." / "shared") == "../shared"
    assert stages.shown(Path("/nowhere/at/all")) == "/nowhere/at/all"


GRANDCHILD = """
import subprocess, sys, time
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
print(subprocess.Popen([sys.executable, "-c", code], start_new_session=True).pid, flush=True)
time.sleep(60)
"""

PARENT = """
import signal, sys
# Python sets this handler itself, but not in a background job, which inherits SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import processes, stages
processes.GRACE_SECONDS = 0.5
stage = stages.Stage("sleep", (stages.Command(("-c", sys.argv[3])),), (), ())
stages.Runner(Path(sys.argv[2])).run(stage)
"""


def identities_in(stamp: Path, count: int) -> list[tuple[int, float]]:
    """The processes that a stamp names, once there are so many."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if stamp.is_file():
            found = json.loads(stamp.read_text()).get("processes", [])
            if len(found) >= count:
                return [(pid, started) for pid, started in found]
        time.sleep(0.1)
    raise AssertionError("the stage never started")


def runs(pid: int) -> bool:
    """Whether the process lives; one that ended and was never waited for does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_a_stopped_demo(
    tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.5)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(DEMO), str(tmp_path), GRANDCHILD],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    found = identities_in(tmp_path / ".stages" / "sleep.json", 2)
    parent.send_signal(number)
    assert parent.wait(timeout=40) != 0
    if number == signal.SIGKILL:
        # Nobody was left to end the grandchild, which refuses SIGTERM; the next run does.
        assert processes.end_leftovers(found)
    assert not any(runs(pid) for pid, _ in found)
