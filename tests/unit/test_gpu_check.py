"""Rows, budget, flushing and tables of the GPU check, and its rehearsal on a CPU."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cogview.analysis.kernel_speed.cases import all_cases
from megatron_cogview.analysis.kernel_speed.sizes import Sizes
from megatron_cogview.analysis.training_speed.shapes import with_grid
from megatron_cogview.configs.budget import rank_budget
from megatron_cogview.configs.errors import ConfigError
from megatron_cogview.configs.presets import base_4b
from megatron_cogview.testing.gpu_check import kernels, report, suites, training
from megatron_cogview.testing.gpu_check.rows import Outcome, Row, Skip, exit_code, run_rows
from megatron_cogview.testing.gpu_check.run import resolve_device
from megatron_cogview.testing.gpu_check.synthetic import micro_run

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "gpu_check.sh"
ABOUT = {"device": "a device", "commit": "abc"}
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="rehearses without a GPU")


class Clock:
    """Time that passes only when a row says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def row(self, name: str, estimate: float, needs: float, error: BaseException | None = None):
        def run(remaining: float) -> dict[str, Any]:
            self.now += needs
            if error is not None:
                raise error
            return {"remaining_s": remaining}

        return Row(name=name, estimate_s=estimate, run=run)


def test_rows_run_in_order_and_failures_do_not_stop_them() -> None:
    clock, seen, cleaned = Clock(), [], []
    rows = [
        clock.row("a", 5, 4),
        clock.row("b", 5, 1, RuntimeError("broken | badly")),
        clock.row("c", 5, 1, Skip("no such thing here")),
        clock.row("d", 5, 2),
    ]
    outcomes = run_rows(rows, 20, seen.append, lambda: cleaned.append(1), clock)
    assert outcomes == seen
    assert [o.status for o in outcomes] == ["ok", "failed", "skipped", "ok"]
    assert [o.seconds for o in outcomes] == [4, 1, 1, 2]
    assert outcomes[1].message == "RuntimeError: broken | badly"
    assert outcomes[3].figures == {"remaining_s": 14}
    assert len(cleaned) == 4
    assert exit_code(outcomes) == 1
    assert exit_code(outcomes[2:]) == 0
    assert exit_code(outcomes[2:3]) == 1  # nothing but skips


def test_a_row_does_not_start_beyond_the_budget_and_a_cheaper_one_does() -> None:
    clock, seen = Clock(), []
    rows = [clock.row("a", 5, 7), clock.row("dear", 3.5, 3), clock.row("cheap", 3, 3)]
    outcomes = run_rows(rows, 10, seen.append, clock=clock)
    assert [o.status for o in outcomes] == ["ok", "skipped", "ok"]
    assert outcomes[1].message.startswith("budget: ")
    assert clock.now == 110


def test_an_interruption_is_recorded_and_goes_on_up() -> None:
    clock, seen = Clock(), []
    rows = [clock.row("a", 1, 1), clock.row("b", 1, 1, SystemExit(143)), clock.row("c", 1, 1)]
    with pytest.raises(SystemExit):
        run_rows(rows, 10, seen.append, clock=clock)
    assert [(o.row, o.status) for o in seen] == [("a", "ok"), ("b", "failed")]
    assert seen[1].message == "interrupted: SystemExit"


def test_each_row_is_in_the_file_before_the_next_begins(tmp_path: Path) -> None:
    written = report.Report(tmp_path, "fake", ABOUT)
    lines_seen = []

    def run(remaining: float) -> dict[str, Any]:
        lines_seen.append((tmp_path / "fake.jsonl").read_text().count("\n"))
        return {"ms": 1.25}

    rows = [Row(name=name, estimate_s=0, run=run) for name in "abc"]
    run_rows(rows, 10, written.record)
    assert lines_seen == [1, 2, 3]
    entries = [json.loads(line) for line in (tmp_path / "fake.jsonl").read_text().splitlines()]
    assert entries[0] == {"environment": ABOUT}
    assert [e["row"] for e in entries[1:]] == ["a", "b", "c"]
    assert entries[1]["figures"] == {"ms": 1.25}
    assert (tmp_path / "fake.md").read_text().count("| ok |") == 3
    with pytest.raises(ConfigError, match=r"fake\.jsonl is there"):
        report.Report(tmp_path, "fake", ABOUT)


def test_table_survives_odd_text_and_labels_a_rehearsal() -> None:
    outcome = Outcome(
        row="a|b",
        status="failed",
        seconds=1.0,
        figures={"ms": 1 / 3, "bytes": None},
        message="x\ny",
    )
    table = report.markdown("fake", ABOUT, [outcome])
    assert table.splitlines()[-1] == (
        "| a\\|b | failed: x y | 1.0 | ms 0.3333; bytes not measured |"
    )
    assert report.REHEARSAL not in table
    labelled = report.markdown("fake", {**ABOUT, "device": report.REHEARSAL}, [outcome])
    assert labelled.count(report.REHEARSAL) == 3


def test_micro_batch_shrinks_until_the_model_fits() -> None:
    case = training.gpu_cases()[2]
    assert case.config == base_4b()
    large = training.prepare(case, "s", 2**41)
    assert large.training.micro_batch_size == 4
    one = replace(large, training=replace(large.training, micro_batch_size=1, global_batch_size=8))
    needed = rank_budget(one, 1).total_bytes
    assert training.prepare(case, "s", math.ceil(needed / 0.9)).training.micro_batch_size == 1
    with pytest.raises(Skip, match="does not fit"):
        training.prepare(case, "s", math.ceil(needed / 0.9) - 16)


def test_grid_shrinks_the_sequence_by_its_codes_only() -> None:
    run, small = base_4b(), with_grid(base_4b(), 16)
    assert run.sequence.length - small.sequence.length == 32 * 32 - 16 * 16
    assert small.sequence.text_budget == run.sequence.text_budget
    assert small.image_tokenizer.codes_per_side == 16
    with pytest.raises(ValueError, match="larger"):
        with_grid(micro_run(), 5)


def test_pytest_results_are_counted(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(
        "import pytest\n"
        "def test_a(): pass\n"
        "def test_b(): pass\n"
        "def test_c(): assert False\n"
        "def test_d(): pytest.skip('x')\n"
    )
    xml = tmp_path / "r.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={xml}"]
    subprocess.run([*command, "test_x.py"], cwd=tmp_path, capture_output=True, timeout=60)
    assert suites.count_results(xml) == {"passed": 2, "failed": 1, "skipped": 1}


@without_cuda
def test_without_cuda_nothing_is_measured() -> None:
    with pytest.raises(ConfigError, match="no CUDA device"):
        resolve_device("cuda")


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=180,
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        | environment,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part", "kernel", "--output", "x"], "error: --part 'kernel': must be tests, kernels"),
        (["--output", "x"], "error: --part ''"),
        (["--part", "kernels"], "error: --output"),
        (["--part"], "error: --part needs a value"),
        (["--part", "all", "--output", "x", "--budget-seconds", "1m"], "--budget-seconds '1m'"),
        (["--fast"], "error: unknown argument '--fast'"),
    ],
)
def test_wrong_arguments_of_the_script(arguments: list[str], message: str) -> None:
    done = script(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_help_of_the_script() -> None:
    done = script("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: tools/gpu_check.sh")


@without_cuda
@pytest.mark.parametrize(
    ("part", "rows", "figure"),
    [
        ("training", 2, "model_tflops"),
        ("generation", 2, "images_per_s_extrapolated"),
    ],
)
def test_rehearsal_on_a_cpu(part: str, rows: int, figure: str, tmp_path: Path) -> None:
    done = script("--part", part, "--output", str(tmp_path), "--device", "cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    first, *entries = map(json.loads, (tmp_path / f"{part}.jsonl").read_text().splitlines())
    assert first["environment"]["device"] == report.REHEARSAL
    assert [e["status"] for e in entries] == ["ok"] * rows
    figures = [value for e in entries for name, value in e["figures"].items() if name == figure]
    assert figures and min(figures) > 0
    assert report.REHEARSAL in (tmp_path / f"{part}.md").read_text()


@without_cuda
def test_rehearsal_of_the_kernels(tmp_path: Path) -> None:
    """Peers that would be compiled run as they are, which saves a minute."""
    options = ["--part", "kernels", "--output", str(tmp_path), "--device", "cpu"]
    done = script(*options, TORCHDYNAMO_DISABLE="1")
    assert done.returncode == 0, done.stderr[-3000:]
    first, *entries = map(json.loads, (tmp_path / "kernels.jsonl").read_text().splitlines())
    assert first["environment"]["device"] == report.REHEARSAL
    sizes = Sizes.micro()
    assert [e["row"] for e in entries] == [case.name for case in all_cases(sizes)]
    assert [e["status"] for e in entries] == ["ok"] * len(entries)
    assert all("ms" in next(iter(e["figures"]["peers"].values())) for e in entries)
    text = (tmp_path / "kernels.md").read_text()
    assert report.REHEARSAL in text
    assert text.count("### ") == len(entries)
    assert "not judged: a rehearsal" in text
    assert (tmp_path / "kernels.png").stat().st_size > 10_000


def test_a_kernel_row_with_problems_fails_and_keeps_its_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = {"row": "x", "operation": "junction", "peers": {}, "problems": ["eager differs"]}
    monkeypatch.setattr(kernels, "measure", lambda case, device, rounds: found)
    row = kernels.kernel_rows(torch.device("cpu"))[0]
    (outcome,) = run_rows([row], 1000, lambda outcome: None)
    assert (outcome.status, outcome.message) == ("failed", "eager differs")
    assert outcome.figures == {n: value for n, value in found.items() if n != "row"}
    about = {"device": report.REHEARSAL}
    written = report.Report(tmp_path, "fake", about, lambda outcomes: f"{len(outcomes)} below")
    written.record(outcome)
    *_, line, blank, below = (tmp_path / "fake.md").read_text().splitlines()
    assert line.endswith("| failed: eager differs | 0.0 | operation junction |")
    assert (blank, below) == ("", "1 below")


@without_cuda
def test_the_script_refuses_without_cuda(tmp_path: Path) -> None:
    done = script("--part", "kernels", "--output", str(tmp_path / "r"))
    assert done.returncode == 2
    assert "torch finds no CUDA device" in done.stderr
    assert not (tmp_path / "r").exists()
