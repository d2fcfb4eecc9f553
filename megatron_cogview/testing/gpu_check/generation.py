"""Rows of cached decoding with random weights, through the path that ``generate`` takes."""

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from megatron_cogview.analysis.training_speed.shapes import with_grid
from megatron_cogview.configs.parallel import ParallelConfig
from megatron_cogview.configs.precision import PrecisionConfig
from megatron_cogview.configs.presets import base_4b, base_363m
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.parallel import topology
from megatron_cogview.parallel.seeding import seed_initialization
from megatron_cogview.testing.gpu_check.rows import Figures, Row
from megatron_cogview.testing.gpu_check.synthetic import micro_run

_WARMUP_SIDE = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One model, decoded at several batch sizes."""

    name: str
    config: RunConfig
    side: int
    """Codes per side of the grid that is decoded; the model's own grid may be larger."""
    batches: tuple[int, ...]
    estimate_s: float
    """Of one row; the first of a case gets half as much again, for it builds the model."""


def gpu_cases() -> list[Case]:
    """Whole pictures of the small model, a quarter of a picture of the large one."""
    return [
        Case(name="base_363m", config=base_363m(), side=32, batches=(1, 64, 8), estimate_s=45),
        Case(name="base_4b", config=base_4b(), side=16, batches=(1, 64, 8), estimate_s=45),
    ]


def micro_cases() -> list[Case]:
    """For a rehearsal on a CPU."""
    return [Case(name="micro", config=micro_run(), side=3, batches=(1, 2), estimate_s=5)]


class Holder:
    """The model of the last case; building another lets go of it first."""

    def __init__(self) -> None:
        self.name = ""
        self.model: Any = None
        self.groups: topology.Topology | None = None

    def get(self, case: Case) -> tuple[torch.nn.Module, topology.Topology]:
        """The model of ``case`` in evaluation mode, with random weights."""
        if self.groups is None:
            self.groups = topology.initialize(ParallelConfig())
        if self.name != case.name:
            self.name, self.model = "", None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.model = _build(_decoding_run(case, case.side), self.groups)
            self.name = case.name
        return self.model, self.groups


def generation_rows(device: torch.device, cases: list[Case]) -> list[Row]:
    """One row per model and batch size."""
    holder = Holder()
    return [
        Row(
            name=f"{case.name} decode B {batch}",
            estimate_s=case.estimate_s * (1.5 if i == 0 else 1.0),
            run=partial(_decode, holder, case, batch, device),
        )
        for case in cases
        for i, batch in enumerate(case.batches)
    ]


def _decoding_run(case: Case, side: int) -> RunConfig:
    config = replace(
        case.config, parallel=ParallelConfig(), precision=PrecisionConfig(dtype="bf16")
    )
    return with_grid(config, side)


def _build(config: RunConfig, groups: topology.Topology) -> torch.nn.Module:
    # megatron-core may be imported only now that the process groups are there.
    from megatron_cogview.model.cogview import build_model
    from megatron_cogview.model.precision import in_precision, resolve_dtype

    seed_initialization(config.training.seed, groups)
    chunk = build_model(config)[0].to(groups.device)
    return in_precision(chunk.config, chunk, resolve_dtype(config.precision)).eval()


def _decode(
    holder: Holder, case: Case, batch: int, device: torch.device, remaining_s: float
) -> Figures:
    from megatron_cogview.generation.text_to_image import generate_codes

    model, groups = holder.get(case)
    config = _decoding_run(case, case.side)
    config = replace(config, generation=replace(config.generation, batch_size=batch))
    rng = np.random.default_rng(1)
    length = config.sequence.text_budget
    texts = rng.integers(0, config.model.vocab.num_text_ids, (batch, length)).tolist()
    generate_codes(model, with_grid(config, _WARMUP_SIDE), groups, texts)
    with_cuda = device.type == "cuda"
    if with_cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    codes_NHW = generate_codes(model, config, groups, texts)
    seconds = time.perf_counter() - started
    if codes_NHW.shape != (batch, case.side, case.side):
        raise RuntimeError(f"codes of shape {tuple(codes_NHW.shape)}")
    peak = torch.cuda.max_memory_allocated(device) if with_cuda else None
    return {**_figures(case, batch, seconds), "peak_bytes": peak}


def _figures(case: Case, batch: int, seconds: float) -> dict[str, float | int | str]:
    """Rates of one generation, the prompt's pass included."""
    tokens = case.side * case.side
    whole = case.config.sequence.codes_per_side[-1] ** 2
    figures: dict[str, float | int | str] = {
        "ms_per_token_step": seconds * 1e3 / tokens,
        "tokens_per_s": tokens * batch / seconds,
    }
    if tokens == whole:
        figures["images_per_s"] = batch / seconds
    else:
        # Later tokens attend to more keys, so the true rate is lower; hence the label.
        figures["images_per_s_extrapolated"] = batch / seconds * tokens / whole
    return {**figures, "batch": batch, "tokens_of_a_picture": tokens, "dtype": "bf16"}
