"""Judges generated shapes pictures: is each one what its prompt asked for?

    python examples/shapes/check.py --pictures DIR --prompts prompts.jsonl --output accuracy.json

Every attribute is measured from the pixels alone: the shape is cut out by its distance from the
background, its colour read from hue and brightness, its place from the centroid, and shape and
size from the best-fitting ideal outline. The outlines are formulas of this module; of the
renderer only its finished pictures are used, to measure how often the reading itself is right.
"""

from __future__ import annotations

import argparse
import colorsys
import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from render import render_scene
from scene import ATTRIBUTES, PICTURE_SIZE, all_combinations
from tqdm import tqdm

UNKNOWN = "unknown"
UNREADABLE = dict.fromkeys(ATTRIBUTES, UNKNOWN)

HUES = {"red": 0.0, "yellow": 48.0, "green": 130.0, "blue": 226.0, "purple": 283.0}
HUE_TOLERANCE = 25.0
COLUMNS = {"left": 19.0, "middle": 32.0, "right": 45.0}
POSITION_TOLERANCE = 6.0
RADII = {"small": 9.0, "large": 14.0}
SIZE_TOLERANCE = 2.5
# A shape at least this far (RGB distance) from the background counts as one at all.
MIN_CONTRAST = 60.0
# The share of agreeing area below which a blob is none of the shapes.
MIN_OVERLAP = 0.72
GRID = 3  # samples a pixel side when an ideal outline is drawn

# The area of each ideal outline at radius 1.
UNIT_AREAS = {
    "circle": np.pi,
    "square": 1.8**2,
    "triangle": 0.75 * np.sqrt(3.0) * 1.25**2,
    "cross": 2 * 2.4 * 0.68 - 0.68**2,
}


class CheckError(Exception):
    """The inputs of the check are missing or malformed."""


def _coverage(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """How much of each pixel the shape covers (0 to 1), and the shape's colour.

    None where nothing stands out from the background.
    """
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(border, axis=0)
    distance = np.linalg.norm(pixels - background, axis=2)
    peak = float(np.quantile(distance, 0.99))
    if peak < MIN_CONTRAST:
        return None
    colour = np.median(pixels[distance > 0.8 * peak], axis=0)
    direction = colour - background
    amount = (pixels - background) @ direction / (direction @ direction)
    # Steeper than the blend itself: faint reconstruction noise becomes 0 and a blurred edge
    # keeps its middle, so the area stays right.
    return np.clip(amount * 2.0 - 0.5, 0.0, 1.0), colour


def _read_colour(colour: np.ndarray) -> str:
    """The nearest colour word of an RGB value."""
    spread = float(colour.max() - colour.min())
    if spread < 60.0:
        return "black" if float(colour.max()) < 110.0 else UNKNOWN
    hue = 360.0 * colorsys.rgb_to_hsv(*(colour / 255.0))[0]
    gaps = {name: abs((hue - centre + 180.0) % 360.0 - 180.0) for name, centre in HUES.items()}
    name = min(gaps, key=gaps.__getitem__)
    return name if gaps[name] <= HUE_TOLERANCE else UNKNOWN


def _nearest(value: float, centres: dict[str, float], tolerance: float) -> str:
    """The name whose centre is nearest to `value`, if it is near enough."""
    name = min(centres, key=lambda key: abs(value - centres[key]))
    return name if abs(value - centres[name]) <= tolerance else UNKNOWN


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points lie in the ideal outline of radius 1 about the origin."""
    wider: np.ndarray = np.maximum(np.abs(x), np.abs(y))
    if shape == "circle":
        reach: np.ndarray = np.hypot(x, y)
    elif shape == "square":
        reach = wider / 0.9
    elif shape == "triangle":
        reach = np.maximum(y / 0.625, (np.sqrt(3.0) * np.abs(x) - y) / 1.25)
    else:
        reach = np.maximum(wider / 1.2, np.minimum(np.abs(x), np.abs(y)) / 0.34)
    inside: np.ndarray = reach <= 1.0
    return inside


@functools.cache
def _axis() -> np.ndarray:
    """The coordinates of the sample points along one side of a picture, in pixels."""
    return (np.arange(PICTURE_SIZE * GRID) + 0.5) / GRID


def _overlap(coverage: np.ndarray, shape: str, centre: tuple[float, float], radius: float) -> float:
    """Shared area over joint area of the picture's blob and an ideal outline."""
    x = (_axis()[None, :] - centre[0]) / radius
    y = (_axis()[:, None] - centre[1]) / radius
    fine = _inside(shape, x, y).reshape(PICTURE_SIZE, GRID, PICTURE_SIZE, GRID)
    ideal = fine.mean(axis=(1, 3))
    return float(np.minimum(ideal, coverage).sum() / np.maximum(ideal, coverage).sum())


def read_scene(image: Image.Image) -> dict[str, str]:
    """Reads the four attributes off a picture; one it cannot tell is "unknown"."""
    resized = image.convert("RGB")
    if resized.size != (PICTURE_SIZE, PICTURE_SIZE):
        resized = resized.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BOX)
    found = _coverage(np.asarray(resized, dtype=np.float64))
    if found is None:
        return dict(UNREADABLE)
    coverage, colour = found
    area = float(coverage.sum())
    middles = np.arange(PICTURE_SIZE) + 0.5
    x = float((coverage.sum(axis=0) * middles).sum() / area)
    y = float((coverage.sum(axis=1) * middles).sum() / area)
    radii = {shape: float(np.sqrt(area / unit)) for shape, unit in UNIT_AREAS.items()}
    overlaps = {shape: _overlap(coverage, shape, (x, y), radii[shape]) for shape in radii}
    shape = max(overlaps, key=overlaps.__getitem__)
    return {
        "colour": _read_colour(colour),
        "shape": shape if overlaps[shape] >= MIN_OVERLAP else UNKNOWN,
        "size": _nearest(radii[shape], RADII, SIZE_TOLERANCE),
        "position": _nearest(x, COLUMNS, POSITION_TOLERANCE),
    }


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file, each with an `id` and the four attributes.

    Raises:
        CheckError: the file is missing or empty, or a line is not such a record.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckError(f"cannot read {path}: {error}") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise CheckError(f"{path}, line {number}: not JSON ({error})") from error
        absent = [name for name in ("id", *ATTRIBUTES) if name not in record]
        if absent:
            raise CheckError(f"{path}, line {number}: no field {absent[0]!r}")
        records.append(record)
    if not records:
        raise CheckError(f"{path} holds no records")
    return records


def judge_pictures(folder: Path, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Reads `folder/<id>.png` for every record; a missing or broken file is wrong.

    Returns:
        One row a record: `id`, `read` (None without a picture), `right`, and for a picture
        that could not be read the `problem`.

    Raises:
        CheckError: there is no such folder.
    """
    if not folder.is_dir():
        raise CheckError(f"no folder {folder}")
    rows = []
    for record in tqdm(records, desc=f"check {folder.name}", unit="picture"):
        row: dict[str, Any] = {"id": record["id"], "read": None, "right": False}
        try:
            with Image.open(folder / f"{record['id']}.png") as image:
                row["read"] = read_scene(image)
            row["right"] = all(row["read"][name] == record[name] for name in ATTRIBUTES)
        except FileNotFoundError:
            row["problem"] = "missing"
        except (UnidentifiedImageError, OSError) as error:
            row["problem"] = f"unreadable: {error}"
        rows.append(row)
    return rows


def accuracy(
    records: list[dict[str, Any]], rows: list[dict[str, Any]], split: str
) -> dict[str, float | int]:
    """The share of one split's pictures with each attribute right, and with all four right."""
    pairs = [
        (record, row) for record, row in zip(records, rows, strict=True) if record["split"] == split
    ]
    count = max(len(pairs), 1)
    shares: dict[str, float | int] = {
        name: sum((row["read"] or UNREADABLE)[name] == record[name] for record, row in pairs)
        / count
        for name in ATTRIBUTES
    }
    shares["all"] = sum(row["right"] for _, row in pairs) / count
    shares["count"] = len(pairs)
    return shares


def read_fresh_renders(count: int, seed: int) -> float:
    """The share of `count` new renders that are read fully right."""
    combinations = all_combinations()
    rng = np.random.default_rng([seed, count])
    right = 0
    for index in tqdm(range(count), desc="check renders", unit="picture"):
        attributes = combinations[index % len(combinations)]
        right += read_scene(render_scene(attributes, rng)) == attributes
    return right / count


def _check(options: argparse.Namespace) -> dict[str, Any]:
    """The contents of the output file for the given command line."""
    result: dict[str, Any] = {}
    if options.pictures:
        prompts = read_jsonl(options.prompts)
        if any(prompt.get("split") not in ("seen", "held_out") for prompt in prompts):
            raise CheckError(f"{options.prompts}: every split must be 'seen' or 'held_out'")
        rows = judge_pictures(options.pictures, prompts)
        result["seen"] = accuracy(prompts, rows, "seen")
        result["held_out"] = accuracy(prompts, rows, "held_out")
        result["missing"] = [row["id"] for row in rows if "problem" in row]
        result["pictures"] = rows
    if options.reconstructions:
        rows = judge_pictures(options.reconstructions, read_jsonl(options.records))
        result["reconstructions"] = sum(row["right"] for row in rows) / len(rows)
        result["reconstructions_missing"] = [row["id"] for row in rows if "problem" in row]
    if options.renders:
        result["renders"] = read_fresh_renders(options.renders, options.seed)
    return result


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Judge generated shapes pictures.")
    parser.add_argument("--pictures", type=Path, help="folder of <id>.png, one a prompt")
    parser.add_argument("--prompts", type=Path, help="the prompts.jsonl of the data set")
    parser.add_argument("--reconstructions", type=Path, help="folder of <id>.png, one a record")
    parser.add_argument("--records", type=Path, help="JSON lines: id and the four attributes")
    parser.add_argument("--renders", type=int, default=500, help="fresh renders to read, 0: none")
    parser.add_argument("--seed", type=int, default=10_000, help="seed of the fresh renders")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args(arguments)
    if bool(options.pictures) != bool(options.prompts):
        parser.error("--pictures and --prompts go together")
    if bool(options.reconstructions) != bool(options.records):
        parser.error("--reconstructions and --records go together")
    if options.renders < 0 or options.seed < 0:
        parser.error("--renders and --seed must not be negative")
    try:
        result = _check(options)
        text = json.dumps(result, ensure_ascii=False, indent=1) + "\n"
        temporary = options.output.with_name(options.output.name + ".tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, options.output)
    except (CheckError, OSError) as error:
        raise SystemExit(f"check: {error}") from error
    summary = {key: value for key, value in result.items() if key != "pictures"}
    print(json.dumps(summary, ensure_ascii=False))


if __name__ == "__main__":
    main()
