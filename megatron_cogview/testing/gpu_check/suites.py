"""Rows that run tests in processes of their own and count what became of them."""

import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path

import torch

from megatron_cogview.testing.gpu_check.report import ROOT
from megatron_cogview.testing.gpu_check.rows import Figures, Row, Skip

_NOT_AGAIN = ("--ignore", "tests/kernels/test_ahead_of_time.py")
ONE_RANK = "tests/parallel/test_parity.py::test_layouts_equal_the_unsharded_oracle[1]"


def suite_rows(device: torch.device, folder: Path) -> list[Row]:
    """The tests that need a GPU, those of the kernels, and parallel ones that need one process."""
    return [
        Row(
            name="pytest -m gpu",
            estimate_s=60,
            run=partial(_pytest, device, folder, "gpu", ["-m", "gpu", "tests"]),
        ),
        Row(
            name="tests/kernels",
            # Each combination of sizes and types is compiled. What make test compiles for other
            # GPUs is left out.
            estimate_s=240,
            run=partial(_pytest, device, folder, "kernels", ["tests/kernels", *_NOT_AGAIN]),
        ),
        Row(
            name="tests/parallel on one rank",
            estimate_s=60,
            run=partial(_pytest, device, folder, "one_rank", [ONE_RANK]),
        ),
    ]


def _pytest(
    device: torch.device, folder: Path, name: str, arguments: list[str], remaining_s: float
) -> Figures:
    """Run pytest; ``FOLDER/tests-NAME.{log,xml}`` hold what it said.

    Raises:
        Skip: GPU tests without a GPU.
        RuntimeError: a failure, an error, no test that passed, or no end in time.
    """
    if name in ("gpu", "kernels") and device.type != "cuda":
        raise Skip("needs a CUDA device")
    if not (ROOT / "tests").is_dir():
        raise RuntimeError(f"{ROOT}: no tests beside the package; run from a checkout")
    log, xml = (folder.resolve() / f"tests-{name}.{suffix}" for suffix in ("log", "xml"))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, f"--junitxml={xml}"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=remaining_s)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"no end after {remaining_s:.0f} s; see {log.name}") from error
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if not xml.is_file():
        raise RuntimeError(f"pytest ended with {code} and no result; see {log.name}")
    counts = count_results(xml)
    if code != 0 or counts["failed"] or not counts["passed"]:
        raise RuntimeError(f"pytest ended with {code}: {counts}; see {log.name}")
    return counts


def count_results(xml: Path) -> dict[str, int]:
    """Passed, failed (errors included) and skipped tests of a JUnit file."""
    suites = list(ElementTree.parse(xml).getroot().iter("testsuite"))

    def add(name: str) -> int:
        return sum(int(suite.get(name, "0")) for suite in suites)

    failed, skipped = add("failures") + add("errors"), add("skipped")
    return {"passed": add("tests") - failed - skipped, "failed": failed, "skipped": skipped}
