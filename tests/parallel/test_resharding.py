"""A checkpoint of any layout loads under any other, bit for bit."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from megatron_cogview.testing.forked import Step, run_forked
from megatron_cogview.testing.toy_run import write_tokens
from tests.parallel.parity_layouts import Case, legal_cases

WORLDS = (1, 2, 4)


def layouts() -> list[Case]:
    """All that differ in what a rank holds, on one, two or four processes."""
    cases = legal_cases(
        data=[1, 2, 4],
        update=["whole", "sharded"],
        recompute=["none"],
        accumulation=["few"],
        model=["paper"],
        dtype=["fp32"],
    )
    # On one data rank a sharded optimizer is whole; one such case is enough.
    return [c for c in cases if c.data > 1 or c.update == "whole" or c.processes == 1]


def some(cases: list[Case]) -> list[Case]:
    """Of each size one that cuts tensors, one that cuts layers and one that cuts the optimizer."""
    picked: dict[Any, Case] = {}
    for case in cases:
        key = (case.processes, case.tensor > 1, case.pipeline > 1, case.data > 1)
        if case.processes == 4 and sum(key[1:]) < 2:
            continue
        # Later ones have more switches on.
        picked[key] = case
    return list(picked.values())


def check(folder: Path, cases: list[Case], dtype: str, timeout_s: float) -> int:
    """Save under each, load under each; gives the number of pairs."""
    write_tokens(folder / "tokens")
    names = [case.name for case in cases]

    def step(what: str, world: int) -> Step:
        chosen = {c.name: c.settings for c in cases if c.processes == world}
        more = {"folder": str(folder), "dtype": dtype, "layouts": chosen, "sources": names}
        return f"tests.parallel.resharding_cases:{what}", world, more

    steps = [step(what, world) for what in ("save", "load") for world in WORLDS]
    results = run_forked(steps, timeout_s)
    saved: dict[str, Any] = {}
    for result in results[: len(WORLDS)]:
        saved |= result
    assert len({digest["order"] for digest in saved.values()}) == 1
    assert len({digest["weights"] for digest in saved.values()}) > 1, "nothing to tell apart"
    pairs = 0
    for loaded in results[len(WORLDS) :]:
        for (name, found), source in itertools.product(loaded.items(), saved):
            assert found[source] == saved[source], f"saved under {source}, loaded under {name}"
            pairs += 1
    return pairs


def test_some_layouts_load_each_other(tmp_path: Path) -> None:
    """In fp16, whose state has all there is: weights, their fp32 copies, and a loss scale."""
    cases = some(layouts())
    assert {c.processes for c in cases} == set(WORLDS)
    assert check(tmp_path, cases, "fp16", 200) == len(cases) ** 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_all_layouts_load_each_other(tmp_path: Path, dtype: str) -> None:
    cases = layouts()
    pairs = check(tmp_path, cases, dtype, 1800)
    print(f"{len(cases)} layouts, {pairs} pairs, {dtype}")
    assert pairs == len(cases) ** 2
