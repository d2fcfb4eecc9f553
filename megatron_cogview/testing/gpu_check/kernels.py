"""Rows of the kernels: the benchmark of ``tools/bench_kernels.py`` under a time budget."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from megatron_cogview.analysis.kernel_speed import plot
from megatron_cogview.analysis.kernel_speed.cases import all_cases
from megatron_cogview.analysis.kernel_speed.peers import Case, measure
from megatron_cogview.analysis.kernel_speed.peers import Row as Measured
from megatron_cogview.analysis.kernel_speed.sizes import Sizes
from megatron_cogview.analysis.kernel_speed.tables import sections
from megatron_cogview.testing.gpu_check.report import Sections
from megatron_cogview.testing.gpu_check.rows import Failed, Figures, Outcome, Row

_ROUNDS = {"cuda": 20, "cpu": 2}


def kernel_rows(device: torch.device) -> list[Row]:
    """Most valuable first; tiny shapes on a CPU."""
    sizes = Sizes.micro() if device.type == "cpu" else Sizes()
    return [
        Row(name=case.name, estimate_s=case.estimate_s, run=partial(_run, case, device))
        for case in all_cases(sizes)
    ]


def _run(case: Case, device: torch.device, remaining_s: float) -> Figures:
    found = measure(case, device, _ROUNDS[device.type])
    # The outcome has these itself, and clocks are read after every row.
    figures = {n: value for n, value in found.items() if n not in ("row", "seconds", "clocks")}
    if found["problems"]:
        raise Failed("; ".join(found["problems"]), figures)
    return figures


def sections_for(device: torch.device) -> Sections:
    """Acceptance and a table a row, below the outcomes."""
    return lambda outcomes: sections(_measured(outcomes), rehearsal=device.type == "cpu")


def save_picture(outcomes: Sequence[Outcome], path: Path, device: str) -> None:
    """Attention against length, if any was measured."""
    plot.save(_measured(outcomes), path, plot.title_of(device))


def _measured(outcomes: Sequence[Outcome]) -> list[Measured]:
    """Rows that have figures; why others have none stands in the table of outcomes."""
    return [{**outcome.figures, "row": outcome.row} for outcome in outcomes if outcome.figures]
