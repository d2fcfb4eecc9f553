"""The paper's Figure 2: the four codebook trainings, all else equal (P-TOK-10).

Trains one image tokenizer per method on the same data with the same seed, networks and schedule,
and puts their held-out L2 curves into one plot and one table.  Each method is an ordinary training
run in its own folder, so an interrupted comparison goes on where it stopped.
"""

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from megatron_cogview.configs.errors import DataError
from megatron_cogview.configs.image_tokenizer import GumbelConfig
from megatron_cogview.configs.presets import preset
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.data import images
from megatron_cogview.data.raw import RawPair
from megatron_cogview.data.sources import open_pictures
from megatron_cogview.storage.atomic import replacing, write_text
from megatron_cogview.tokenization import fidelity
from megatron_cogview.tokenization.image import VQTokenizer, load_image_tokenizer
from megatron_cogview.training.metrics import read_metrics
from megatron_cogview.training.picture_stream import LARGEST_VALIDATION, split
from megatron_cogview.training.tokenizer_trainer import FINAL_FILE, train_tokenizer
from megatron_cogview.training.world import World

logger = logging.getLogger(__name__)

METHODS = {
    "straight_through": "(a) nearest, straight-through",
    "gumbel": "(b) Gumbel, straight-through",
    "moving_average": "(c) nearest, moving average",
    "fixed": "(d) nearest, fixed",
    "moving_average_revival": "(c) with revival of dead codes",
}
"""Folder of each run, and what the paper calls it; the last is ours."""

_COLUMNS = ("l2", "psnr", "ssim", "codes_used", "perplexity", "seconds")


def setting(name: Literal["small", "full"]) -> RunConfig:
    """What all methods share.

    ``full`` is the paper's tokenizer as P-TOK-2..5 have it.  ``small`` runs four times on two CPU
    cores within 20 minutes; so few steps are enough only from a codebook that fits the encoder, so
    it is drawn from the outputs of one that has learned for a while.
    """
    if name == "full":
        return preset("base_4b")
    base = preset("photos_64")
    return replace(
        base,
        image_tokenizer=replace(
            base.image_tokenizer,
            hidden_size=32,
            code_dim=16,
            revive_dead_codes=False,
            gumbel=GumbelConfig(start=0.5, end=0.02),
        ),
        tokenizer_training=replace(base.tokenizer_training, steps=1200, validate_every=100),
    )


def compare(shared: RunConfig, methods: tuple[str, ...], output: Path, world: World) -> None:
    """Train what is not trained yet; write ``figure2.png``, ``comparison.json`` and ``.md``.

    Args:
        shared: data, networks, seed and schedule of all runs.
        methods: names out of :data:`METHODS`.
        output: one folder per method goes there, and the results.
        world: the processes that train together.
    """
    for name in methods:
        train_tokenizer(_run(shared, name, output), world)
    if world.rank == 0:
        pictures_VSSC = held_out(shared)
        results = {}
        for name in methods:
            tokenizer = load_image_tokenizer(output / name / FINAL_FILE)
            losses = quantisation(tokenizer, pictures_VSSC)
            results[name] = {**_result(output / name), **losses}
        write_text(output / "comparison.json", json.dumps(results, indent=1) + "\n")
        write_text(output / "comparison.md", table(results))
        figure = draw(results)
        with replacing(output / "figure2.png") as file:
            figure.savefig(file, format="png", dpi=120)
        logger.info("%s", table(results))


def held_out(shared: RunConfig) -> NDArray[np.uint8]:
    """Pictures that the runs did not train on, ``[V, S, S, 3]``.

    Raises:
        DataError: none can be decoded.
    """
    training = shared.tokenizer_training
    broken: set[str] = set()
    while True:
        ids = [pair.id for pair in _pairs(training.data) if pair.id not in broken]
        _, rows = split(ids, training.validation_fraction)
        wanted = {ids[row] for row in rows[:LARGEST_VALIDATION].tolist()}
        found: list[NDArray[np.uint8]] = []
        for pair in _pairs(training.data):
            if pair.id in wanted:
                # What cannot be decoded was in none of the runs, either.
                with contextlib.suppress(DataError):
                    found.append(images.decode(pair.image, shared.image_tokenizer.image_size))
        if found:
            return np.stack(found)
        broken |= wanted


def _pairs(folders: tuple[str, ...]) -> Iterator[RawPair]:
    for source in (open_pictures(Path(folder)) for folder in folders):
        for part in source.parts():
            yield from (item for item in source.read(part) if isinstance(item, RawPair))


@torch.no_grad()
def quantisation(
    tokenizer: VQTokenizer, pictures_VSSC: NDArray[np.uint8], batch_size: int = 32
) -> dict[str, float]:
    """What the codebook loses of held-out pictures, apart from what the networks lose.

    Returns:
        ``missed``: squared distance between encoder outputs and their codes, as a share of the
        outputs' squared length; ``l2_without_codes``: the L2 error if the decoder is given the
        outputs themselves.
    """
    missed = length = error = 0.0
    model, device = tokenizer.model, tokenizer.model.quantize_t.embed.device
    for part in np.array_split(pictures_VSSC, -(-len(pictures_VSSC) // batch_size)):
        scaled_BCSS = tokenizer.pixels.to_float(torch.from_numpy(part).to(device))
        latents_BDHW = model.enc_b(scaled_BCSS)
        codes_BHW = tokenizer.encode(torch.from_numpy(part)).to(device)
        missed += float((latents_BDHW - model.quantize_t.lookup(codes_BHW)).square().sum())
        length += float(latents_BDHW.square().sum())
        copies_BSSC = tokenizer.pixels.to_uint8(model.dec(latents_BDHW)).cpu().numpy()
        error += float(fidelity.l2(part, copies_BSSC).sum())
    return {"missed": missed / length, "l2_without_codes": error / len(pictures_VSSC)}


def _run(shared: RunConfig, name: str, output: Path) -> RunConfig:
    revival = name == "moving_average_revival"
    codebook: Any = "moving_average" if revival else name
    tokenizer = replace(shared.image_tokenizer, codebook=codebook, revive_dead_codes=revival)
    training = replace(shared.tokenizer_training, output=str(output / name))
    return replace(shared, image_tokenizer=tokenizer, tokenizer_training=training)


def _result(folder: Path) -> dict[str, Any]:
    """Final numbers of one run and its curve, ``[[step, held-out L2], ...]``."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    rows = read_metrics(folder / "metrics.jsonl")
    curve = [[int(r["step"]), r["validation_l2"]] for r in rows if "validation_l2" in r]
    return {**{name: summary[name] for name in _COLUMNS}, "curve": curve}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown; ``against (c)`` is the quotient of the L2 errors."""
    lines = [
        "| codebook | L2 | against (c) | L2 without codes | missed | PSNR, dB | SSIM "
        "| codes used | perplexity | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    reference = results.get("moving_average", {}).get("l2")
    for name, result in results.items():
        quotient = f"{result['l2'] / reference:.3f}" if reference else ""
        lines.append(
            f"| {METHODS[name]} | {result['l2']:.5f} | {quotient} | "
            f"{result['l2_without_codes']:.5f} | {result['missed']:.3f} | {result['psnr']:.2f} | "
            f"{result['ssim']:.3f} | {result['codes_used']} | {result['perplexity']:.0f} | "
            f"{result['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def draw(results: dict[str, dict[str, Any]]) -> Figure:
    """Held-out L2 over steps, one curve per method, logarithmic upwards."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name, result in results.items():
        steps, errors = zip(*result["curve"], strict=True)
        dashed = "--" if name == "moving_average_revival" else "-"
        axes.plot(steps, errors, dashed, linewidth=1.6, label=METHODS[name])
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("held-out L2, pixels in [0, 1]")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False)
    return figure
