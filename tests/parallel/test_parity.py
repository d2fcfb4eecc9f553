"""Every parallel layout trains as the unsharded fp64 oracle does, from one set of weights.

A list that shows each pair of settings once runs every time; the list of all layouts is marked
``slow``.
"""

import functools
from collections.abc import Iterable

import pytest

from megatron_cogview.testing.closeness import relative_rms
from megatron_cogview.testing.forked import run_forked
from tests.parallel.parity_faults import FAULTS
from tests.parallel.parity_laboratory import (
    BOUND,
    DTYPES,
    Laboratory,
    Settings,
    layout,
    summary,
    unsharded,
)
from tests.parallel.parity_layouts import (
    FACTORS,
    MAX_PROCESSES,
    Case,
    covering_list,
    deep_cases,
    full_list,
    legal_cases,
    pairs,
)

# For tests/parallel/test_gpu.py.
from tests.parallel.parity_oracle import oracle_run as oracle_run

PER_LAUNCH = 100
"""Layouts of the long list: a hang costs no more than these."""
OTHER_MODELS = {
    "pre": layout("pre", tensor=2, sequence=True),
    "pre bf16, two stages": layout("pre", "bf16", pipeline=2),
    "released_norm": layout("released_norm", micro_batch=12, tensor=2, sequence=True),
    "released_norm fp16, split": layout("released_norm", "fp16", 12, tensor=2, sequence=True),
}
"""Norms that the list of layouts leaves out, on two processes.  The released one takes its maximum
over a micro-batch, so only the undivided batch has the oracle's result."""
FAULTY = {
    "positions": layout("paper", "bf16", 3, pipeline=2),
    "modalities": layout("paper", "bf16", 3, pipeline=2),
    "padding": layout("paper", "bf16", 3, pipeline=2),
    "pivots": layout("pivot", "bf16", 3, tensor=2),
    "norms": layout("paper", "bf16", 12, tensor=2, sequence=True),
    "tied table": layout("paper", "bf16", 3, pipeline=2),
    "replicas": layout("paper", "bf16", 6),
    "collected weights": layout("paper", "bf16", 6, distributed_optimizer=True),
}
"""A layout of two processes for each fault, in the format with the widest bounds."""


@functools.cache
def normal_list() -> list[Case]:
    """What runs every time."""
    return [*covering_list(legal_cases()), *deep_cases()[7::18]]


def by_processes(cases: Iterable[Case]) -> dict[int, dict[str, Settings]]:
    """Their settings, by number of processes and name; the same axes stand side by side."""
    worlds: dict[int, dict[str, Settings]] = {n: {} for n in range(1, MAX_PROCESSES + 1)}
    axes = ("processes", "tensor", "pipeline", "virtual_pipeline")
    for case in sorted(cases, key=lambda case: [getattr(case, name) for name in axes]):
        worlds[case.processes][case.name] = case.settings
    return worlds


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("parity"))


def judge(
    laboratory: Laboratory, layouts: dict[str, Settings], results: dict[str, dict[str, object]]
) -> None:
    """Fail with what is beyond the bounds, layout by layout."""
    report = []
    for name, settings in layouts.items():
        problems = list(laboratory.problems(settings, results[name]))
        if problems:
            report.append("\n".join([f"== {name}", *problems[:12]]))
    assert not report, "\n".join(report)


@pytest.mark.parametrize("processes", range(1, MAX_PROCESSES + 1))
def test_layouts_equal_the_unsharded_oracle(laboratory: Laboratory, processes: int) -> None:
    layouts = by_processes(normal_list())[processes]
    if processes == 2:
        layouts |= OTHER_MODELS
    results = laboratory.run(processes, layouts) if layouts else {}
    if processes == 1:
        layouts, results = layouts | unsharded(), results | laboratory.unsharded()
    judge(laboratory, layouts, results)


def test_faults_are_seen(laboratory: Laboratory) -> None:
    """Each fault leaves the bounds of bf16, the widest; the same layout without it does not."""
    assert set(FAULTY) == set(FAULTS) - {"none"}
    layouts = {fault: {**settings, "fault": fault} for fault, settings in FAULTY.items()}
    faultless = {f"{name}, without": {**FAULTY[name], "fault": "none"} for name in FAULTY}
    results = laboratory.run(2, layouts | faultless)
    judge(laboratory, faultless, results)
    for fault, settings in layouts.items():
        problems = list(laboratory.problems(settings, results[fault]))
        assert problems, f"{fault}: not seen"


def test_the_normal_list_has_every_pair_of_settings() -> None:
    every, normal = legal_cases(), normal_list()
    assert set().union(*map(pairs, every)) <= set().union(*map(pairs, normal))
    assert len(normal) < len(every) / 20
    for name, values in FACTORS.items():
        assert {getattr(case, name) for case in every} == set(values), name


def test_models_differ_by_far_more_than_the_bound(laboratory: Laboratory) -> None:
    from safetensors.torch import load_file

    tables = {}
    for model in ("paper", "pivot", "released_norm", "pre"):
        laboratory.oracle(model, "fp32")
        gradients = load_file(laboratory.folder / f"{model}.fp32.gradients.safetensors")
        tables[model] = gradients["embedding.position_embeddings.weight"]
    for model in ("pivot", "released_norm", "pre"):
        assert relative_rms(tables[model], tables["paper"]) > 10 * BOUND


AXES: dict[str, dict[str, object]] = {
    "replicas": {},
    "tensor": {"tensor": 2},
    "tensor and sequence": {"tensor": 2, "sequence": True},
    "pipeline": {"pipeline": 2},
    "interleaved": {"pipeline": 2, "virtual_pipeline": 2},
}
"""Two processes each."""


def test_recomputation_draws_the_same_dropout_and_pivots() -> None:
    """Loss, gradients and weights of every rank are the same bits, whatever is recomputed."""
    layouts = {
        f"{axes}, {model}, {recompute}": {
            "model": model,
            "parallel": {**parallel, "recompute": recompute},
        }
        for axes, parallel in AXES.items()
        for model in ("eq4", "pivot")
        for recompute in ("none", "selective", "full")
    }
    first = next(iter(layouts))
    layouts = {"another seed": {**layouts[first], "seed": 2}, "again": layouts[first], **layouts}
    target = "tests.parallel.parity_recompute:recompute"
    (result,) = run_forked([(target, 2, {"layouts": layouts})], timeout_s=240)
    for name in layouts:
        if name.endswith(("selective", "full")):
            assert result[name] == result[name.rpartition(" ")[0] + " none"], name
    assert result["again"] == result[first]
    # Dropout is on: other draws, another loss.
    assert result["another seed"]["loss"] != result[first]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("processes", range(1, MAX_PROCESSES + 1))
def test_every_layout(laboratory: Laboratory, processes: int, dtype: str) -> None:
    """All of them; ``-rP`` shows the largest errors."""
    layouts = by_processes(case for case in full_list() if case.dtype == dtype)[processes]
    names = list(layouts)
    for start in range(0, len(names), PER_LAUNCH):
        part = {name: layouts[name] for name in names[start : start + PER_LAUNCH]}
        results = laboratory.run(processes, part)
        print(summary(part, results))
        judge(laboratory, part, results)
