"""Dense against three-region attention in training, all else equal (the paper's appendix B).

Two ordinary pretraining runs on the same shards, with the same seed, order of batches and
initialisation; their loss curves go into one plot.  Each run has a folder of its own, so an
interrupted comparison goes on where it stopped.
"""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from megatron_cogview.configs.errors import DataError, TrainingError
from megatron_cogview.configs.model import AttentionConfig
from megatron_cogview.configs.parallel import ParallelConfig
from megatron_cogview.configs.presets import preset
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.kernels.pivot_attention.reference import visible_keys
from megatron_cogview.storage.atomic import replacing, write_text
from megatron_cogview.training.metrics import read_metrics

KINDS = ("dense", "pivot")
SMOOTHED_OVER = 25
"""Rows of the running mean in the plot."""
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


def compare(shared: RunConfig, output: Path, text_length: int) -> dict[str, Any]:
    """Train both, and write ``attention.png``, ``comparison.json`` and ``comparison.md``.

    Args:
        shared: the run with three-region attention.
        output: a folder for each run goes there, and the results.
        text_length: tokens of a text, for the share of keys that is seen.

    Raises:
        TrainingError: one of the runs ended in an error.
        DataError: the runs have other steps than they should.
    """
    runs = {kind: _trained(shared, kind, output / kind) for kind in KINDS}
    steps = {kind: [row["step"] for row in rows if "loss" in row] for kind, rows in runs.items()}
    if steps["dense"] != steps["pivot"]:
        raise DataError(f"{output}: the runs have different steps; name an empty folder")
    results = {
        "keys_seen": keys_seen(shared, text_length),
        "steps": shared.training.steps,
        **{kind: _summary(rows) for kind, rows in runs.items()},
    }
    write_text(output / "comparison.json", json.dumps(results, indent=1) + "\n")
    write_text(output / "comparison.md", table(results))
    figure = draw({kind: curve(rows, "loss") for kind, rows in runs.items()}, results)
    with replacing(output / "attention.png") as file:
        figure.savefig(file, format="png", dpi=120)
    return results


def keys_seen(config: RunConfig, text_length: int, samples: int = 16) -> float:
    """Share of the causal (query, key) pairs that three-region attention computes."""
    a, length = config.model.attention, config.sequence.model_length
    key_B2 = torch.tensor([[sample, text_length] for sample in range(samples)])
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


def table(results: dict[str, Any]) -> str:
    """Final losses as Markdown."""
    names = [name for name in results["dense"] if name in results["pivot"]]
    lines = [
        f"{results['steps']:,} steps; three-region attention sees "
        f"{100 * results['keys_seen']:.1f} % of the causal keys.",
        "",
        "| loss | dense | three-region | difference |",
        "|---|---:|---:|---:|",
    ]
    for name in names:
        dense, pivot = results["dense"][name], results["pivot"][name]
        lines.append(f"| {name} | {dense:.4f} | {pivot:.4f} | {100 * (pivot / dense - 1):+.2f} % |")
    return "\n".join(lines) + "\n"


def draw(curves: dict[str, NDArray[np.float64]], results: dict[str, Any]) -> Figure:
    """Both curves, as running means above the single steps."""
    labels = {
        "dense": "dense causal attention",
        "pivot": f"three-region attention ({100 * results['keys_seen']:.0f} % of the keys)",
    }
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for kind, colour in zip(KINDS, ("tab:blue", "tab:orange"), strict=True):
        step, value = curves[kind].T
        axes.plot(step, value, color=colour, alpha=0.2, linewidth=0.7)
        size = min(SMOOTHED_OVER, len(value))
        mean = np.convolve(value, np.ones(size) / size, mode="valid")
        axes.plot(step[size - 1 :], mean, color=colour, label=labels[kind])
    axes.set(xlabel="step", ylabel="training loss", title="The same run with both attentions")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure
