"""Rows of whole training steps: loader, forward, backward, optimizer and log, on one device."""

import itertools
import logging
import math
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from megatron_cogview.analysis.timing import gemm_tflops
from megatron_cogview.analysis.training_speed.shapes import fitted, write_random_shards
from megatron_cogview.configs.budget import flops_per_token
from megatron_cogview.configs.errors import ConfigError
from megatron_cogview.configs.presets import base_4b, base_363m
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.data.loader import build_loader
from megatron_cogview.parallel import topology
from megatron_cogview.parallel.seeding import seed_initialization, seed_step
from megatron_cogview.testing.gpu_check.rows import Figures, Row, Skip
from megatron_cogview.testing.gpu_check.synthetic import micro_run
from megatron_cogview.tokenization.layout import SequenceLayout

logger = logging.getLogger(__name__)

_LR, _SETUP_S = 1e-5, 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One training row."""

    name: str
    config: RunConfig
    micro_batches: int
    """Micro-batches of a step."""
    estimate_s: float
    warmup_steps: int = 3
    timed_steps: int = 20
    """At most; fewer when the budget ends, never fewer than 3."""


def gpu_cases() -> list[Case]:
    """The presets that one GPU can tell something about."""
    whole = base_4b()
    slice_ = replace(whole, model=replace(whole.model, num_layers=4))
    return [
        Case(name="base_363m", config=base_363m(), micro_batches=4, estimate_s=75),
        Case(name="base_4b, 4-layer slice", config=slice_, micro_batches=4, estimate_s=60),
        Case(name="base_4b", config=whole, micro_batches=8, estimate_s=150, timed_steps=10),
    ]


def micro_cases() -> list[Case]:
    """For a rehearsal on a CPU."""
    run = micro_run()
    run = replace(run, training=replace(run.training, micro_batch_size=2))
    return [
        Case(
            name="micro",
            config=run,
            micro_batches=2,
            estimate_s=5,
            warmup_steps=1,
            timed_steps=3,
        )
    ]


def training_rows(device: torch.device, cases: list[Case], gemm_side: int) -> list[Row]:
    """A GEMM rate of this run, then the cases in order."""
    rates: dict[str, float] = {}

    def gemm(remaining_s: float) -> Figures:
        rates["gemm_tflops"] = gemm_tflops(gemm_side, device, 20)
        return {**rates, "gemm_side": gemm_side}

    rows = [Row(name="GEMM rate", estimate_s=15, run=gemm)]
    for case in cases:
        run = partial(_run_case, case, device, rates)
        rows.append(Row(name=case.name, estimate_s=case.estimate_s, run=run))
    return rows


def prepare(case: Case, shards: str, gpu_bytes: int | None) -> RunConfig:
    """The run of a case in bf16 on one device, its micro-batch halved until it fits.

    Args:
        case: what to run.
        shards: folder of token shards.
        gpu_bytes: device memory; None takes the micro-batch as it is.

    Raises:
        Skip: not even one sequence fits.
    """
    size = case.config.training.micro_batch_size
    try:
        return fitted(case.config, shards, "bf16", size, case.micro_batches, gpu_bytes)
    except ConfigError as error:
        raise Skip(str(error)) from None


def _run_case(
    case: Case, device: torch.device, rates: dict[str, float], remaining_s: float
) -> Figures:
    deadline = time.monotonic() + remaining_s
    with_cuda = device.type == "cuda"
    total = torch.cuda.get_device_properties(device).total_memory if with_cuda else None
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        config = prepare(case, f"{folder}/tokens", total)
        records = max(256, 4 * config.training.global_batch_size)
        write_random_shards(Path(folder) / "tokens", config, records)
        if with_cuda:
            torch.cuda.reset_peak_memory_stats(device)
        with topology.running(config.parallel) as groups:
            times, losses = _timed_steps(case, config, groups, Path(folder), deadline)
    figures = _figures(config, statistics.median(times), rates.get("gemm_tflops"))
    return {
        **figures,
        "steps_timed": len(times),
        "slowest_step_ms": max(times) * 1e3,
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "peak_bytes": torch.cuda.max_memory_allocated(device) if with_cuda else None,
    }


def _timed_steps(
    case: Case, config: RunConfig, groups: topology.Topology, folder: Path, deadline: float
) -> tuple[list[float], list[float]]:
    """Seconds of each timed step, and the losses of all steps."""
    # megatron-core may be imported only now that the process groups are there.
    from megatron_cogview.engines.megatron import MegatronEngine
    from megatron_cogview.training.metrics import MetricsLog

    layout = SequenceLayout(config.sequence, config.model.vocab)
    loader = build_loader(layout, config.training, config.data)
    seed_initialization(config.training.seed, groups)
    engine = MegatronEngine(config, groups)
    synchronize = torch.cuda.synchronize if groups.device.type == "cuda" else _nothing
    times: list[float] = []
    losses: list[float] = []
    total = case.warmup_steps + case.timed_steps
    with MetricsLog(folder / "log", 0, total, True, case.name) as log:
        for step in itertools.count():
            synchronize()
            started = time.perf_counter()
            seed_step(config.training.seed, step, groups)
            result = engine.train_step(loader.micro_batches(step), _LR)
            log.advance()
            log.write(step + 1, {"loss": result.losses.total, "grad_norm": result.grad_norm})
            synchronize()
            seconds = time.perf_counter() - started
            losses.append(result.losses.total)
            if not (math.isfinite(losses[-1]) and result.updated):
                raise RuntimeError(f"step {step}: loss {losses[-1]}, updated {result.updated}")
            if step >= case.warmup_steps:
                times.append(seconds)
            late = time.monotonic() + seconds + _SETUP_S > deadline and len(times) >= 3
            if len(times) == case.timed_steps or late:
                return times, losses
    raise AssertionError("unreachable")


def _nothing() -> None:
    """A CPU has nothing to wait for."""


def _figures(config: RunConfig, seconds: float, gemm: float | None) -> dict[str, float | int | str]:
    """Rates of a step by the strict rule: model FLOPs only, everything inside the step.

    6 x (block and head parameters) per token plus causal attention; no recomputation, no input
    embedding (``configs/budget.py``).
    """
    tokens = config.training.global_batch_size * config.sequence.model_length
    tflops = flops_per_token(config) * tokens / seconds / 1e12
    figures: dict[str, float | int | str] = {
        "ms_per_step": seconds * 1e3,
        "tokens_per_s": tokens / seconds,
        "model_tflops": tflops,
    }
    if gemm is not None:
        figures["fraction_of_gemm_rate"] = tflops / gemm
    return {
        **figures,
        "micro_batch_size": config.training.micro_batch_size,
        "global_batch_size": config.training.global_batch_size,
        "parameters": config.model.num_params(),
        "dtype": "bf16",
    }
