"""What a run folder holds, as one JSON object.

Reads what the stages left there and computes nothing that they did not measure.  Knows the names of
the files, not who ran the stages; the page is ``html_report.py``'s.
"""

import importlib.metadata
import json
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_cogview import __version__
from megatron_cogview.configs.errors import DataError
from megatron_cogview.data.shards import read_manifest
from megatron_cogview.training import line_file

SPLITS = ("seen", "held_out")
JUDGED = ("colour", "shape", "size", "position", "all")
PACKAGES = ("torch", "megatron-core", "numpy")
Row = dict[str, float]


@dataclass(frozen=True, slots=True)
class RunFiles:
    """The files of a run, read and checked."""

    folder: Path
    """Run folder."""
    summary: dict[str, Any]
    """The image tokenizer's ``summary.json``."""
    manifest: dict[str, Any]
    """Manifest of the token shards."""
    metrics: list[Row]
    """Rows of pretraining."""
    samples: dict[str, Any]
    """``samples.json`` of generation."""
    accuracy: dict[str, Any] | None = None
    """The checker's file; None where nothing judges the pictures."""
    timings: dict[str, Any] = field(default_factory=dict)
    """Seconds and peak memory by stage; empty when the stages were run by hand."""
    prompts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Prompts by id, for their split."""


def read_run(folder: Path, accuracy: Path | None = None, prompts: Path | None = None) -> RunFiles:
    """Read a run folder.

    Raises:
        DataError: a stage's file is missing or damaged.
    """
    metrics_path = folder / "pretrain" / "metrics.jsonl"
    if not metrics_path.is_file():
        raise DataError(f"{metrics_path}: no such file; run pretraining first")
    timings = folder / "timings.json"
    return RunFiles(
        folder=folder,
        summary=_read_json(folder / "image_tokenizer" / "summary.json", "psnr"),
        manifest=read_manifest(folder / "tokens"),
        metrics=_read_rows(metrics_path),
        samples=_read_json(folder / "generated" / "samples.json", "samples", "settings"),
        accuracy=_read_json(accuracy, *SPLITS) if accuracy else None,
        timings=_read_json(timings, "stages")["stages"] if timings.is_file() else {},
        prompts=_read_prompts(prompts) if prompts else {},
    )


def build_report(run: RunFiles) -> dict[str, Any]:
    """The contents of ``report.json``.

    ``accuracy`` holds shares, 0..1, or is None; ``seconds`` by stage with their ``total``;
    ``losses`` in nats per token, ``drop`` being 1 - last / first; ``reconstruction_psnr`` in dB
    over the pictures that the image tokenizer was not trained on.
    """
    seconds = {name: float(stage["seconds"]) for name, stage in run.timings.items()}
    peaks = {name: int(stage["peak_rss_bytes"]) for name, stage in run.timings.items()}
    rejected = {str(k): int(v) for k, v in run.manifest["rejected"].items()}
    records = int(run.manifest["records"])
    return {
        "accuracy": _accuracy(run.accuracy),
        "seconds": {**seconds, "total": sum(seconds.values())},
        "peak_rss_bytes": max(peaks.values(), default=None),
        "peak_rss_bytes_by_stage": peaks,
        "losses": {kind: losses(run.metrics, f"{kind}_loss") for kind in ("text", "image")},
        "validation_losses": {
            kind: losses(run.metrics, f"validation_{kind}_loss") for kind in ("text", "image")
        },
        "rejected": sum(rejected.values()),
        "rejected_reasons": rejected,
        "reconstruction_psnr": float(run.summary["psnr"]),
        "image_tokenizer": run.summary,
        "generation": run.samples["settings"],
        "counts": {
            "pairs": records + sum(rejected.values()),
            "records": records,
            "training_steps": int(max((row["step"] for row in run.metrics), default=0)),
            "generated": len(run.samples["samples"]),
        },
        "versions": versions(),
    }


def series(metrics: list[Row], name: str) -> list[tuple[int, float]]:
    """Steps and values of one number, without the rows that do not have it."""
    return [(int(row["step"]), row[name]) for row in metrics if row.get(name) is not None]


def losses(metrics: list[Row], name: str) -> dict[str, float | None]:
    """First and last logged value, and the relative drop; None where there is no value."""
    values = series(metrics, name)
    if not values:
        return {"first": None, "last": None, "drop": None}
    first, last = values[0][1], values[-1][1]
    return {"first": first, "last": last, "drop": 1.0 - last / first if first else None}


def versions() -> dict[str, str]:
    """Of Python, of what the numbers depend on, and of this package."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {**found, "megatron-cogview": __version__}


def _accuracy(checked: dict[str, Any] | None) -> dict[str, Any] | None:
    if checked is None:
        return None
    shares = {
        split: {name: float(checked[split][name]) for name in JUDGED}
        | {"count": int(checked[split].get("count", 0))}
        for split in SPLITS
    }
    return {
        **shares,
        "renders": checked.get("renders"),
        "reconstructions": checked.get("reconstructions"),
        "missing": len(checked.get("missing", ())),
    }


def _read_json(path: Path, *required: str) -> dict[str, Any]:
    """An object with all of the required fields."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; run the stage that writes it first") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); make it again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object; make it again")
    missing = [name for name in required if name not in value]
    if missing:
        raise DataError(f"{path}: has no field {missing[0]!r}; make it again")
    return value


def _read_rows(path: Path) -> list[Row]:
    try:
        rows, damaged = line_file.read(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if damaged:
        raise DataError(f"{path}: {damaged} damaged lines; a curve would lack them")
    return rows


def _read_prompts(path: Path) -> dict[str, dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
        return {str(row["id"]): row for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a prompts file ({error!r})") from error
