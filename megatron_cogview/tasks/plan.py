"""``plan``: print what a run would cost each GPU, without a GPU and without torch.

It knows the formulas of ``configs/budget.py`` and nothing of devices; nothing here was measured.
"""

import sys
from dataclasses import replace

from megatron_cogview.configs.budget import (
    USABLE_FRACTION,
    RankBudget,
    choose_layout,
    flops_per_token,
    largest_budget,
    rank_budget,
)
from megatron_cogview.configs.errors import refuse
from megatron_cogview.configs.run import RunConfig

GIB = 2**30
MIB = 2**20


def run(
    config: RunConfig, *, gpus: int, gpu_memory_gib: float = 80.0, auto_layout: bool = True
) -> None:
    """Write the plan of ``config`` on ``gpus`` GPUs to standard output.

    ``auto_layout`` replaces ``config.parallel`` by the smallest layout that fits; otherwise the
    configuration's own layout is checked and shown.

    Raises:
        ConfigError: the layout is impossible, or does not fit (then after the table).
    """
    if gpus < 1:
        raise refuse("gpus", gpus, "must be at least 1")
    if gpu_memory_gib <= 0:
        raise refuse("gpu_memory_gib", gpu_memory_gib, "must be positive")
    gpu_bytes = int(gpu_memory_gib * GIB)
    if auto_layout:
        config = replace(config, parallel=choose_layout(config, gpus, gpu_bytes))
    else:
        config.check_layout(gpus)
    sys.stdout.write(render(config, gpus, gpu_bytes))
    largest = largest_budget(config, gpus)
    if largest.total_bytes > USABLE_FRACTION * gpu_bytes:
        raise refuse(
            "gpu_memory_gib",
            gpu_memory_gib,
            f"pipeline stage {largest.stage} needs {largest.total_bytes / GIB:.1f} GiB, more than "
            f"{USABLE_FRACTION:.0%} of it; raise parallel.recompute, parallel.tensor or "
            f"parallel.pipeline",
        )


def render(config: RunConfig, gpus: int, gpu_bytes: int) -> str:
    """The plan as text; the layout must be legal."""
    stages = sorted({0, config.parallel.pipeline - 1})
    parts = [
        _layout_lines(config, gpus),
        _memory_lines([rank_budget(config, gpus, stage) for stage in stages], gpu_bytes),
        _work_lines(config),
    ]
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def _layout_lines(config: RunConfig, gpus: int) -> list[str]:
    """Model, layout and batch."""
    p, t = config.parallel, config.training
    data = p.data(gpus)
    switches = {
        "sequence parallel": p.sequence,
        "distributed optimizer": p.distributed_optimizer,
        "overlap of gradients": p.overlap_gradients,
        "overlap of parameters": p.overlap_parameters,
    }
    micro_batches = t.num_micro_batches(data)
    dtype = config.precision.dtype
    stages = f"pipeline {p.pipeline}"
    if p.virtual_pipeline > 1:
        stages += f" (x {p.virtual_pipeline} chunks)"
    return [
        f"{config.preset}: {config.model.num_params():,} parameters, "
        f"{'bf16' if dtype == 'auto' else dtype}"
        f"{' (precision.dtype = auto on a GPU)' if dtype == 'auto' else ''}",
        _row("layout", f"{gpus} GPUs = tensor {p.tensor} x {stages} x data {data}"),
        *(_row(name, "on" if value else "off") for name, value in switches.items()),
        _row("recompute", p.recompute),
        _row(
            "batch",
            f"{t.global_batch_size} sequences = micro-batches {micro_batches} x "
            f"size {t.micro_batch_size} x data {data}",
        ),
    ]


def _memory_lines(budgets: list[RankBudget], gpu_bytes: int) -> list[str]:
    """One column per distinct pipeline stage; those between hold less than the first."""
    rows: list[tuple[str, list[int]]] = [
        ("weights", [b.weight_bytes for b in budgets]),
        ("gradients", [b.gradient_bytes for b in budgets]),
        ("optimizer state", [b.optimizer_bytes for b in budgets]),
        ("activations", [b.activation_bytes for b in budgets]),
        ("logits", [b.logits_bytes for b in budgets]),
        ("total", [b.total_bytes for b in budgets]),
    ]
    heads = "".join(f"{f'stage {b.stage}':>18}" for b in budgets)
    counts = "".join(f"{b.parameters.total:>18,}" for b in budgets)
    usable = USABLE_FRACTION * gpu_bytes
    verdict = "fits" if all(b.total_bytes <= usable for b in budgets) else "DOES NOT FIT"
    return [
        f"{'per GPU':<24}{heads}",
        f"  {'parameters':<22}{counts}",
        *(
            f"  {name:<22}" + "".join(f"{_size(value):>18}" for value in values)
            for name, values in rows
        ),
        _row(
            "memory",
            f"{_size(gpu_bytes)}, of which {USABLE_FRACTION:.0%} may be filled: {verdict}",
        ),
    ]


def _work_lines(config: RunConfig) -> list[str]:
    """Arithmetic and tokens of a step and of the run."""
    t = config.training
    tokens = t.global_batch_size * config.sequence.model_length
    per_token = flops_per_token(config)
    return [
        "work",
        _row("tokens per step", f"{tokens:,}"),
        _row("FLOPs per token", f"{per_token:.4g}"),
        _row("FLOPs per step", f"{per_token * tokens:.4g}"),
        _row("steps", f"{t.steps:,}"),
        _row("tokens in all", f"{tokens * t.steps:.4g}"),
        _row("FLOPs in all", f"{per_token * tokens * t.steps:.4g}"),
    ]


def _size(value: int) -> str:
    """Bytes in GiB, or in MiB where GiB would show nothing."""
    return f"{value / GIB:.2f} GiB" if value >= GIB // 10 or not value else f"{value / MIB:.2f} MiB"


def _row(name: str, value: str) -> str:
    """One line of the text table."""
    return f"  {name:<22}{value}"
