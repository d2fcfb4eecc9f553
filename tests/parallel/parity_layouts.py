"""Every legal layout of up to four processes, and a few that show each pair of settings once."""

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_cogview.configs.errors import ConfigError
from megatron_cogview.configs.parallel import ParallelConfig
from tests.parallel.cases import run_config

GLOBAL_BATCH = 12
"""Divisible among one to four data-parallel ranks."""
MAX_PROCESSES = 4
SEED = 25
UPDATES: dict[str, dict[str, bool]] = {
    "whole": {},
    "whole, overlapped": {"overlap_gradients": True},
    "sharded": {"distributed_optimizer": True},
    "sharded, overlapped": {"distributed_optimizer": True, "overlap_gradients": True},
    "sharded, both overlapped": {
        "distributed_optimizer": True,
        "overlap_gradients": True,
        "overlap_parameters": True,
    },
}
"""What happens to gradients and weights on the data axis."""
FACTORS: dict[str, tuple[Any, ...]] = {
    "tensor": (1, 2, 4),
    "pipeline": (1, 2, 4),
    "data": (1, 2, 3, 4),
    "virtual_pipeline": (1, 2),
    "sequence": (False, True),
    "update": tuple(UPDATES),
    "recompute": ("none", "selective", "full"),
    "accumulation": ("few", "many"),
    "model": ("paper", "eq4", "pivot"),
    "dtype": ("fp32", "bf16", "fp16"),
}


@dataclass(frozen=True)
class Case:
    """One layout of one model, with a value of each factor."""

    tensor: int
    pipeline: int
    data: int
    virtual_pipeline: int
    sequence: bool
    update: str
    recompute: str
    accumulation: str
    model: str
    dtype: str

    @property
    def processes(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def parallel(self) -> dict[str, Any]:
        """The settings that make it a ``ParallelConfig``."""
        names = ("tensor", "pipeline", "virtual_pipeline", "sequence", "recompute")
        return {**{name: getattr(self, name) for name in names}, **UPDATES[self.update]}

    @property
    def micro_batch(self) -> int | None:
        """Few micro-batches: as few as the schedule takes; many: more than it has stages."""
        per_rank = GLOBAL_BATCH // self.data
        step = self.pipeline if self.virtual_pipeline > 1 else 1
        least = 1 if self.accumulation == "few" else max(3, self.pipeline + 1)
        counts = (n for n in range(least, per_rank + 1) if per_rank % n == 0 and n % step == 0)
        count = next(counts, None)
        return None if count is None else per_rank // count

    @property
    def name(self) -> str:
        return " ".join(f"{name}={getattr(self, name)}" for name in FACTORS)

    @property
    def settings(self) -> dict[str, Any]:
        """What the ranks are told, as JSON values."""
        return {
            "model": self.model,
            "dtype": self.dtype,
            "micro_batch": self.micro_batch,
            "parallel": self.parallel,
        }


def is_legal(case: Case) -> bool:
    """Whether the product accepts the layout, and the test can judge it."""
    if case.processes > MAX_PROCESSES or case.micro_batch is None:
        return False
    # Overlapping is about the data axis: with one copy of the model it changes nothing.
    if case.data == 1 and "overlapped" in case.update:
        return False
    try:
        parallel = ParallelConfig(**case.parallel)
        config = run_config(case.model, parallel, case.micro_batch, global_batch=GLOBAL_BATCH)
        config.check_layout(case.processes)
    except ConfigError:
        return False
    return True


def legal_cases(**fixed: Sequence[Any]) -> list[Case]:
    """All legal combinations; ``fixed`` narrows the values of a factor."""
    values = [fixed.get(name, FACTORS[name]) for name in FACTORS]
    shapes = [
        combination
        for combination in itertools.product(*values)
        if combination[0] * combination[1] * combination[2] <= MAX_PROCESSES
    ]
    return [case for case in (Case(*shape) for shape in shapes) if is_legal(case)]


def full_list() -> list[Case]:
    """Every layout in every number format, with dense and with three-region attention.

    Where attention is recomputed, the dense one is written out: a fused one has nothing to give up.
    """
    return [
        case
        for case in [*legal_cases(), *deep_cases()]
        if case.model not in ("paper", "eq4")
        or (case.model == "eq4") == (case.recompute == "selective")
    ]


def deep_cases() -> list[Case]:
    """Four stages of two chunks, which need eight layers."""
    return legal_cases(pipeline=[4], virtual_pipeline=[2], model=["deep"])


def pairs(case: Case) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    """Every two settings that a case has together."""
    return set(itertools.combinations(((name, getattr(case, name)) for name in FACTORS), 2))


def covering_list(cases: Iterable[Case]) -> list[Case]:
    """Few of the cases that show each pair of settings that any of them shows.

    Greedy: always the case with the most pairs not yet seen.
    """
    remaining = {case: pairs(case) for case in cases}
    order = sorted(remaining, key=lambda case: case.name)
    # Shuffled, so that equally good cases are not all alike; of 40 seeds this gave the fewest.
    random.Random(SEED).shuffle(order)
    missing = set().union(*remaining.values())
    chosen = []
    while missing:
        best = max(order, key=lambda case: len(remaining[case]))
        chosen.append(best)
        missing -= pairs(best)
        for case in order:
            remaining[case] &= missing
        order = [case for case in order if remaining[case]]
    return chosen
