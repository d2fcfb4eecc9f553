"""The words that describe a shapes scene, and which combinations of them are held out.

Shared by the renderer and the checker. Nothing here knows how a scene is drawn or how a
picture is read, so the two stay independent of each other.
"""

from __future__ import annotations

import itertools

COLOURS = ("red", "yellow", "green", "blue", "purple", "black")
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
POSITIONS = ("left", "middle", "right")

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour": COLOURS,
    "shape": SHAPES,
    "size": SIZES,
    "position": POSITIONS,
}

PICTURE_SIZE = 64

Attributes = dict[str, str]


def all_combinations() -> list[Attributes]:
    """Every combination of attribute values, in a fixed order."""
    names = tuple(ATTRIBUTES)
    return [
        dict(zip(names, values, strict=True)) for values in itertools.product(*ATTRIBUTES.values())
    ]


def _residue(attributes: Attributes) -> int:
    """The class (0 to 5) of a combination; each class holds 24 of the 144.

    3 * size + 2 * position takes every residue modulo 6 exactly once, so a colour and a shape
    together meet each class once. Two combinations of one class differ in at least two
    attributes, so leaving a whole class out hides no pair (nor triple) of attribute values.
    """
    return (
        COLOURS.index(attributes["colour"])
        + SHAPES.index(attributes["shape"])
        + 3 * SIZES.index(attributes["size"])
        + 2 * POSITIONS.index(attributes["position"])
    ) % 6


def held_out_combinations() -> list[Attributes]:
    """The 24 combinations that never occur in the training pairs."""
    return [combination for combination in all_combinations() if _residue(combination) == 0]


def seen_combinations() -> list[Attributes]:
    """The 120 combinations the training pairs are drawn from."""
    return [combination for combination in all_combinations() if _residue(combination) != 0]


def seen_prompt_combinations() -> list[Attributes]:
    """24 seen combinations, as evenly spread over the attributes as the held-out ones."""
    return [combination for combination in all_combinations() if _residue(combination) == 3]
