"""Runs layouts and judges them: the bounds of the parity tests, and what they are measured against.

In fp32 each tensor has the same bound.  In half precision it may be off by a constant times what
the format costs an unsharded run: a layout rounds in other places, so its error is another draw of
about the same size, while a bug is not.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_cogview.testing.distributed import run_distributed
from megatron_cogview.testing.forked import run_forked
from megatron_cogview.testing.oracle import random_weights
from tests.parallel.cases import MODELS, small_model
from tests.parallel.parity_cases import EPSILON, KINDS
from tests.parallel.parity_layouts import GLOBAL_BATCH
from tests.parallel.parity_oracle import oracle_run

BOUND = 1e-5
"""Relative RMS of losses, gradients, weights and moments, fp32 against fp64."""
MARGIN = 4.0
"""Times the error of the unsharded run in the same half-precision format.  Where that run was
lucky, the format's epsilon stands in its place."""
FLIP = 2 / math.sqrt(small_model().hidden_size)
"""Half precision only, in terms of how far a tensor moved: one number of the smallest tensors went
the other way, as Adam lets it where a gradient is nearly zero."""
DRIFT = 2.5
"""How far a key's bias may move, in full steps of the learning rate: twice, for opposite signs."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COLUMNS = ("loss", "text loss", "image loss", "gradient norm")

Settings = dict[str, Any]


def layout(
    model: str = "paper", dtype: str = "fp32", micro_batch: int = 4, **parallel: Any
) -> Settings:
    """What the ranks are told of one layout, as JSON values."""
    return {"model": model, "dtype": dtype, "micro_batch": micro_batch, "parallel": parallel}


def unsharded() -> dict[str, Settings]:
    """One process: what half-precision layouts are compared with, and fp32 in several forms."""
    undivided = {
        f"{model} {dtype}": layout(model, dtype, GLOBAL_BATCH)
        for model in MODELS
        for dtype in DTYPES
    }
    return {
        **undivided,
        "micro-batches of 2": layout(micro_batch=2),
        "full recompute": layout(recompute="full"),
        "selective recompute": layout("eq4", recompute="selective"),
        "sharded over one": layout(distributed_optimizer=True),
    }


class Laboratory:
    """Oracles and unsharded runs, each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._oracles: dict[str, list[list[float]]] = {}
        self._unsharded: dict[str, Any] | None = None

    def oracle(self, model: str, dtype: str) -> list[list[float]]:
        """The oracle's losses; its tensors lie in the folder.

        It starts from the weights as the format rounds them.
        """
        stem = f"{model}.{dtype}"
        if stem not in self._oracles:
            start = {
                name: value.to(DTYPES[dtype]).float()
                for name, value in random_weights(MODELS[model], seed=3).items()
            }
            save_file(start, self.folder / f"{stem}.start.safetensors")
            exact = {name: value.double() for name, value in start.items()}
            run = oracle_run(MODELS[model], exact, GLOBAL_BATCH, EPSILON)
            for kind in KINDS:
                save_file(run[kind], self.folder / f"{stem}.{kind}.safetensors")
            self._oracles[stem] = run["steps"]
        return self._oracles[stem]

    def run(self, processes: int, layouts: dict[str, Settings]) -> dict[str, Any]:
        """Results of layouts that share a launch."""
        for settings in layouts.values():
            self.oracle(settings["model"], settings["dtype"])
        target, arguments = (
            "tests.parallel.parity_cases:parity",
            {"folder": str(self.folder), "layouts": layouts},
        )
        timeout_s = 60 + 10 * len(layouts)
        if processes > 1:
            results: dict[str, Any] = run_forked([(target, processes, arguments)], timeout_s)[0]
        else:
            # Where there is a GPU, one process uses it.
            results = run_distributed(target, processes, arguments, timeout_s)[0]
        return results

    def unsharded(self) -> dict[str, Any]:
        """Results of :func:`unsharded`."""
        if self._unsharded is None:
            self._unsharded = self.run(1, unsharded())
        return self._unsharded

    def problems(self, settings: Settings, result: dict[str, Any]) -> Iterator[str]:
        """What a layout's result has beyond the bounds."""
        if "refused" in result:
            yield result["refused"]
            return
        model, dtype = settings["model"], settings["dtype"]
        single = None if dtype == "fp32" else self.unsharded()[f"{model} {dtype}"]
        losses = self.oracle(model, dtype)
        bounds = loss_bounds(single, losses)
        for step, errors in enumerate(loss_errors(result["steps"], losses)):
            for column, error in enumerate(errors):
                if not error <= bounds[column]:
                    yield f"{COLUMNS[column]} of step {step}: {error:.2e} > {bounds[column]:.2e}"
        for kind, tensors in result["distances"].items():
            for name, error in tensors.items():
                usual = None if single is None else single["distances"][kind][name]
                bound = distance_bound(kind, dtype, usual)
                if not error <= bound:
                    yield f"{kind} of {name}: {error:.2e} > {bound:.2e}"


def loss_errors(actual: list[list[float]], wanted: list[list[float]]) -> list[list[float]]:
    """Relative errors of :data:`COLUMNS` in each step; the last entry has a loss only."""
    return [
        [abs(a / w - 1) for a, w in zip(mine, true, strict=True)]
        for mine, true in zip(actual, wanted, strict=True)
    ]


def loss_bounds(single: dict[str, Any] | None, losses: list[list[float]]) -> list[float]:
    """Of :data:`COLUMNS`; ``single`` is the unsharded run in half precision."""
    if single is None:
        return [BOUND] * len(COLUMNS)
    errors = loss_errors(single["steps"], losses)[:-1]
    return [MARGIN * max(column) for column in zip(*errors, strict=True)]


def distance_bound(kind: str, dtype: str, usual: float | None) -> float:
    """Of one tensor; ``usual`` is the distance of the unsharded run in half precision."""
    if kind == "key drift":
        return DRIFT
    if usual is None:
        # Movements are a part of the weights, which have a bound of their own in fp32.
        return math.inf if kind == "movement" else BOUND
    if kind == "weights":
        # Norm weights near 1 move by less than the format's epsilon: their movement tells more.
        return math.inf
    if kind == "movement":
        return max(MARGIN * usual, FLIP)
    bound = max(MARGIN * usual, torch.finfo(DTYPES[dtype]).eps)
    # A square has twice the relative error.
    return 2 * bound if kind == "exp_avg_sq" else bound


def summary(layouts: dict[str, Settings], results: dict[str, Any]) -> str:
    """Number of layouts and the largest distance of each kind, a line for each format."""
    lines = []
    for dtype in DTYPES:
        own = [results[name] for name, s in layouts.items() if s["dtype"] == dtype]
        if own:
            worst = {
                kind: max(max(result["distances"][kind].values()) for result in own)
                for kind in own[0]["distances"]
            }
            values = ", ".join(f"{kind} {value:.1e}" for kind, value in worst.items())
            lines.append(f"{dtype}: {len(own)} layouts, {values}")
    return "\n".join(lines)
