"""Dense against three-region attention in training, all else equal (the paper's appendix B).

Two ordinary pretraining runs on the same shards, with the same seed, order of batches and
initialisation; their loss curves go into one plot.  Each run has a folder of its own, so an
interrupted comparison goes on where it stopped.
"""

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from megatron_cogview.analysis.machine import machine
from megatron_cogview.configs.errors import DataError, TrainingError, refuse
from megatron_cogview.configs.model import AttentionConfig
from megatron_cogview.configs.parallel import ParallelConfig
from megatron_cogview.configs.presets import preset
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.data.dataset import TokenDataset
from megatron_cogview.data.shard_set import ShardSet
from megatron_cogview.kernels.pivot_attention.reference import visible_keys
from megatron_cogview.model.kernel_choice import current_device, effective_attention
from megatron_cogview.storage.atomic import replacing, write_text
from megatron_cogview.tokenization.layout import SequenceLayout
from megatron_cogview.training.metrics import read_metrics

KINDS = ("dense", "pivot")
SMOOTHED_OVER = 25
"""Rows of the running mean in the plot."""
_MEASURED = 256
"""Records whose texts are looked at."""
END_SHARE = 0.1
"""Part of the steps, at the end, that final losses are means over."""


def setting(name: str, tokens: Path, steps: int, attention: AttentionConfig) -> RunConfig:
    """What both runs share, on one process.

    Args:
        name: preset.
        tokens: shards.
        steps: optimizer steps; 0: the preset's.
        attention: three-region attention; the dense run ignores it.
    """
    base = preset(name)
    training = replace(base.training, log_every=1, steps=steps or base.training.steps)
    return replace(
        base,
        model=replace(base.model, attention=replace(attention, kind="pivot")),
        parallel=ParallelConfig(),
        data=replace(base.data, shards=(str(tokens),)),
        training=training,
    )


def compare(shared: RunConfig, output: Path) -> dict[str, Any]:
    """Train both, and write ``attention.png``, ``comparison.json`` and ``comparison.md``.

    Args:
        shared: the run with three-region attention.
        output: a folder for each run goes there, and the results.

    Raises:
        ConfigError: ``auto`` would take dense attention for both; or the shards do not fit.
        DataError: the shards cannot be read, or the runs have other steps than they should.
        TrainingError: one of the runs ended in an error.
    """
    length = shared.sequence.model_length
    if effective_attention(shared.model.attention, length).kind == "dense":
        raise refuse(
            "attention.backend",
            shared.model.attention.backend,
            f"takes dense attention for these regions at {length} tokens, where they save little; "
            "choose reference or triton, or a smaller window",
        )
    share = keys_seen(shared, text_regions(shared))
    runs = {kind: _trained(shared, kind, output / kind) for kind in KINDS}
    steps = {kind: [row["step"] for row in rows if "loss" in row] for kind, rows in runs.items()}
    if steps["dense"] != steps["pivot"]:
        raise DataError(f"{output}: the runs have different steps; name an empty folder")
    results = {
        **machine(current_device()),
        "preset": shared.preset,
        "keys_seen": share,
        "attention": asdict(shared.model.attention),
        "steps": shared.training.steps,
        **{kind: _summary(rows) for kind, rows in runs.items()},
        "course": _course(runs),
    }
    write_text(output / "comparison.json", json.dumps(results, indent=1) + "\n")
    write_text(output / "comparison.md", table(results))
    figure = draw(runs, share)
    with replacing(output / "attention.png") as file:
        figure.savefig(file, format="png", dpi=120)
    return results


def text_regions(config: RunConfig) -> list[int]:
    """Tokens before the first code, of records spread evenly over the shards."""
    sets = [ShardSet(Path(folder)) for folder in config.data.shards]
    dataset = TokenDataset(sets, SequenceLayout(config.sequence, config.model.vocab))
    records = np.linspace(0, len(dataset) - 1, min(_MEASURED, len(dataset)), dtype=np.int64)
    found: list[int] = dataset.sequences(records).text_region_N.tolist()
    return found


def keys_seen(config: RunConfig, text_regions: Sequence[int]) -> float:
    """Share of the causal (query, key) pairs that three-region attention computes.

    Args:
        config: model and sequence.
        text_regions: tokens before the first code of each sample.
    """
    a, length, samples = config.model.attention, config.sequence.model_length, len(text_regions)
    key_B2 = torch.tensor(list(enumerate(text_regions)))
    seen = [
        visible_keys(
            key_B2,
            length,
            length,
            length,
            window_block=a.window_block,
            window_blocks=a.window_blocks,
            num_pivots=a.num_pivots,
            layer_number=layer,
            seed=a.pivot_seed,
        )
        for layer in range(1, config.model.num_layers + 1)
    ]
    causal = samples * length * (length + 1) / 2
    return float(sum(int(each.sum()) for each in seen) / (len(seen) * causal))


def _trained(shared: RunConfig, kind: str, folder: Path) -> list[dict[str, float]]:
    """The rows of one run, which is a process of its own: engines do not share one."""
    attention = replace(shared.model.attention, kind=kind)  # type: ignore[arg-type]
    config = replace(
        shared,
        model=replace(shared.model, attention=attention),
        training=replace(shared.training, output=str(folder)),
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f"{kind}.json")
    write_text(path, config.to_json())
    done = subprocess.run(
        [sys.executable, "-m", "megatron_cogview", "pretrain", str(path)], check=False
    )
    if done.returncode:
        raise TrainingError(f"{path}: its training ended with exit code {done.returncode}")
    return read_metrics(folder / "metrics.jsonl")


def curve(rows: list[dict[str, float]], name: str) -> NDArray[np.float64]:
    """``[[step, value], ...]`` of the rows that have a number."""
    return np.array([[row["step"], row[name]] for row in rows if row.get(name) is not None])


def _summary(rows: list[dict[str, float]]) -> dict[str, float]:
    """Losses at the end: means of training, the last of validation."""
    found = {}
    for name in ("loss", "text_loss", "image_loss"):
        values = curve(rows, name)[:, 1]
        found[name] = float(values[-math.ceil(END_SHARE * len(values)) :].mean())
    validation = curve(rows, "validation_loss")
    if len(validation):
        found["validation_loss"] = float(validation[-1, 1])
    return found


def _course(runs: Mapping[str, list[dict[str, float]]]) -> dict[str, list[list[float]]]:
    """``[step, dense, three-region]`` of training, tenth by tenth, and of every validation."""
    training = [curve(runs[kind], "loss") for kind in KINDS]
    tenths = [np.array_split(each, min(10, len(each))) for each in training]
    validation = [curve(runs[kind], "validation_loss") for kind in KINDS]
    return {
        "loss": [
            [float(one[-1, 0]), float(one[:, 1].mean()), float(other[:, 1].mean())]
            for one, other in zip(*tenths, strict=True)
        ],
        "validation_loss": [
            [float(step), float(one), float(other)]
            for (step, one), (_, other) in zip(*validation, strict=True)
        ],
    }


def table(results: dict[str, Any]) -> str:
    """What was compared, on what, final losses and their course, as Markdown."""
    a = results["attention"]
    regions = f"W {a['window_block']}, T {a['window_blocks']}, P {a['num_pivots']}"
    about = ("device", "threads", "python", "torch", "commit", "preset")
    lines = [
        "| | |",
        "|---|---|",
        *(f"| {name} | {results[name]} |" for name in about),
        f"| steps | {results['steps']:,} |",
        f"| three regions | {regions}: {100 * results['keys_seen']:.1f} % of the causal pairs |",
        "",
        "| loss at the end | dense | three-region | difference |",
        "|---|---:|---:|---:|",
    ]
    names = [name for name in results["dense"] if name in results["pivot"]]
    lines += [_compared(name, results["dense"][name], results["pivot"][name]) for name in names]
    for name, rows in results["course"].items():
        lines += [
            "",
            f"| {name}, step | dense | three-region | difference |",
            "|---|---:|---:|---:|",
        ]
        lines += [_compared(f"{step:,.0f}", dense, pivot) for step, dense, pivot in rows]
        if rows:
            mean = sum(pivot / dense - 1 for _, dense, pivot in rows) / len(rows)
            lines.append(f"| mean of the differences | | | {100 * mean:+.2f} % |")
    return "\n".join(lines) + "\n"


def _compared(name: str, dense: float, pivot: float) -> str:
    return f"| {name} | {dense:.4f} | {pivot:.4f} | {100 * (pivot / dense - 1):+.2f} % |"


def draw(runs: Mapping[str, list[dict[str, float]]], keys_share: float) -> Figure:
    """Both curves: running means above the single steps, and validation as dots.

    The axis of losses is logarithmic, so that equal ratios look equal at the end too.
    """
    labels = {
        "dense": "dense causal attention",
        "pivot": f"three-region attention ({100 * keys_share:.0f} % of the keys)",
    }
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for kind, colour in zip(KINDS, ("tab:blue", "tab:orange"), strict=True):
        step, value = curve(runs[kind], "loss").T
        axes.plot(step, value, color=colour, alpha=0.2, linewidth=0.7)
        size = min(SMOOTHED_OVER, len(value))
        mean = np.convolve(value, np.ones(size) / size, mode="valid")
        axes.plot(step[size - 1 :], mean, color=colour, linewidth=1.2, label=labels[kind])
        validation = curve(runs[kind], "validation_loss")
        if len(validation):
            size = 8 if kind == "dense" else 4
            axes.plot(*validation.T, "o", color=colour, markersize=size, label="its validation")
    axes.set(xlabel="step", ylabel="loss", title="The same run with both attentions")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:.1g}")
    axes.legend()
    axes.grid(which="both", alpha=0.3)
    return figure
