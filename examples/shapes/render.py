"""Renders the shapes pairs: one coloured shape a picture, captioned in Chinese and English.

    python examples/shapes/render.py --output data/shapes --num-pairs 6000 --seed 0

writes WebDataset tars (`train-000000.tar`, ...) of `NNNNNN.png` + `NNNNNN.json`, and
`prompts.jsonl`: the prompts to generate from once a model is trained, half of them for
combinations of attributes that no training pair shows. The same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scene import (
    PICTURE_SIZE,
    Attributes,
    held_out_combinations,
    seen_combinations,
    seen_prompt_combinations,
)
from tqdm import tqdm

Point = tuple[float, float]

SUPERSAMPLE = 4
RGB = {
    "red": (215, 45, 45),
    "yellow": (240, 200, 40),
    "green": (50, 165, 70),
    "blue": (50, 90, 220),
    "purple": (160, 60, 200),
    "black": (35, 35, 40),
}
RADIUS = {"small": 9.0, "large": 14.0}
CENTRE_X = {"left": 19.0, "middle": 32.0, "right": 45.0}
CENTRE_Y = 32.0

PROMPTS_PER_COMBINATION = 5

ZH_WORDS = {
    "red": "红色", "yellow": "黄色", "green": "绿色", "blue": "蓝色", "purple": "紫色",
    "black": "黑色", "circle": "圆形", "square": "正方形", "triangle": "三角形",
    "cross": "十字形", "small": "小", "large": "大", "left": "左边", "middle": "中间",
    "right": "右边",
}  # fmt: skip
ZH_PHRASINGS = (
    "{position}有一个{size}的{colour}{shape}",
    "{position}是一个{colour}的{size}{shape}",
    "一个{size}的{colour}{shape}在{position}",
    "在{position}的是{colour}的{size}{shape}",
    "画面{position}画着{size}的{colour}{shape}",
)
EN_POSITIONS = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
EN_PHRASINGS = (
    "a {size} {colour} {shape} {position}",
    "{position} is a {size} {colour} {shape}",
    "one {colour} {shape}, {size}, {position}",
    "{position}, a {colour} {shape}, {size}",
    "a {colour} {size} {shape} drawn {position}",
)


def _cross_outline(x: float, y: float, radius: float) -> list[Point]:
    """The twelve corners of an upright plus sign."""
    long, short = radius * 1.2, radius * 0.34
    corners = [
        (-short, -long), (short, -long), (short, -short), (long, -short),
        (long, short), (short, short), (short, long), (-short, long),
        (-short, short), (-long, short), (-long, -short), (-short, -short),
    ]  # fmt: skip
    return [(x + dx, y + dy) for dx, dy in corners]


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, centre: Point, radius: float, fill: tuple[int, ...]
) -> None:
    """Draws one shape; the factors give the four shapes a similar visual weight."""
    x, y = centre
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif shape == "square":
        half = radius * 0.9
        draw.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    elif shape == "triangle":
        reach = radius * 1.25
        angles = (math.radians(degrees) for degrees in (-90, 30, 150))
        draw.polygon([(x + reach * math.cos(a), y + reach * math.sin(a)) for a in angles], fill)
    elif shape == "cross":
        draw.polygon(_cross_outline(x, y, radius), fill)
    else:
        raise ValueError(f"unknown shape {shape!r}")


def render_scene(attributes: Attributes, rng: np.random.Generator) -> Image.Image:
    """Draws one 64x64 scene; `rng` jitters its place, size, colour and background."""
    background = 242 + int(rng.integers(-4, 5))
    colour = np.array(RGB[attributes["colour"]]) + rng.integers(-6, 7, size=3)
    radius = RADIUS[attributes["size"]] * rng.uniform(0.96, 1.04) * SUPERSAMPLE
    shift_x, shift_y = rng.uniform(-1.5, 1.5, size=2)
    centre = (
        (CENTRE_X[attributes["position"]] + shift_x) * SUPERSAMPLE,
        (CENTRE_Y + shift_y) * SUPERSAMPLE,
    )
    side = PICTURE_SIZE * SUPERSAMPLE
    picture = Image.new("RGB", (side, side), (background, background, background))
    fill = tuple(int(v) for v in np.clip(colour, 0, 255))
    _draw_shape(ImageDraw.Draw(picture), attributes["shape"], centre, radius, fill)
    return picture.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BOX)


def caption_zh(attributes: Attributes, phrasing: int) -> str:
    """The Chinese caption in the given phrasing (taken modulo their number)."""
    words = {name: ZH_WORDS[value] for name, value in attributes.items()}
    return ZH_PHRASINGS[phrasing % len(ZH_PHRASINGS)].format(**words)


def caption_en(attributes: Attributes, phrasing: int) -> str:
    """The English caption in the given phrasing (taken modulo their number)."""
    words = dict(attributes, position=EN_POSITIONS[attributes["position"]])
    return EN_PHRASINGS[phrasing % len(EN_PHRASINGS)].format(**words)


def make_pair(index: int, seed: int) -> tuple[Image.Image, dict[str, str]]:
    """The picture and the record of training pair `index`, which depend on nothing else."""
    rng = np.random.default_rng([seed, index])
    combinations = seen_combinations()
    attributes = combinations[int(rng.integers(len(combinations)))]
    zh = caption_zh(attributes, int(rng.integers(len(ZH_PHRASINGS))))
    en = caption_en(attributes, int(rng.integers(len(EN_PHRASINGS))))
    record = {
        "id": f"shapes-{seed}-{index:06d}",
        "caption": zh if index % 2 == 0 else en,
        "caption_zh": zh,
        "caption_en": en,
        **attributes,
    }
    return render_scene(attributes, rng), record


def make_prompts() -> list[dict[str, str]]:
    """The prompts to generate from: every held-out combination and as many seen ones."""
    prompts = []
    for split, combinations in (
        ("seen", seen_prompt_combinations()),
        ("held_out", held_out_combinations()),
    ):
        for number, attributes in enumerate(combinations):
            for variant in range(PROMPTS_PER_COMBINATION):
                # Alternating the start keeps the two languages equal over an odd number.
                write = caption_zh if (number + variant) % 2 == 0 else caption_en
                prompts.append(
                    {
                        "id": f"{split}-{number:02d}-{variant}",
                        "caption": write(attributes, variant),
                        **attributes,
                        "split": split,
                    }
                )
    return prompts


def _add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds one file with no owner and no time, so the bytes depend on the contents alone."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def _write_tar(path: Path, indices: range, seed: int, progress: tqdm[int]) -> None:
    """Writes one shard under a temporary name and then gives it its own."""
    temporary = path.with_name(path.name + ".tmp")
    with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive:
        for index in indices:
            picture, record = make_pair(index, seed)
            png = io.BytesIO()
            picture.save(png, "PNG")
            _add_member(archive, f"{index:06d}.png", png.getvalue())
            text = json.dumps(record, ensure_ascii=False)
            _add_member(archive, f"{index:06d}.json", text.encode("utf-8"))
            progress.update()
    os.replace(temporary, path)


def write_dataset(output: Path, num_pairs: int, seed: int, pairs_per_tar: int) -> None:
    """Writes the tars and `prompts.jsonl` into `output`, which is made if need be.

    Raises:
        ValueError: a number is not positive, or `output` holds a tar this run would not
            replace (a reader of `train-*.tar` would mix the two data sets).
    """
    if num_pairs < 1 or pairs_per_tar < 1:
        raise ValueError("--num-pairs and --pairs-per-tar must be at least 1")
    starts = range(0, num_pairs, pairs_per_tar)
    names = [f"train-{number:06d}.tar" for number in range(len(starts))]
    output.mkdir(parents=True, exist_ok=True)
    stale = sorted({path.name for path in output.glob("train-*.tar")} - set(names))
    if stale:
        raise ValueError(f"{output} already holds {stale[0]}, which is not part of this run")
    with tqdm(total=num_pairs, desc="render", unit="pair") as progress:
        for name, start in zip(names, starts, strict=True):
            stop = min(start + pairs_per_tar, num_pairs)
            _write_tar(output / name, range(start, stop), seed, progress)
    lines = [json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in make_prompts()]
    temporary = output / "prompts.jsonl.tmp"
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, output / "prompts.jsonl")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Render the shapes pairs as WebDataset tars.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the tars")
    parser.add_argument("--num-pairs", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs-per-tar", type=int, default=1000)
    options = parser.parse_args(arguments)
    if options.seed < 0:
        parser.error("--seed must not be negative")
    try:
        write_dataset(options.output, options.num_pairs, options.seed, options.pairs_per_tar)
    except (OSError, ValueError) as error:
        raise SystemExit(f"render: {error}") from error


if __name__ == "__main__":
    main()
