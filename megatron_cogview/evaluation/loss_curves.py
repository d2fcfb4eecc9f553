"""Loss curves as SVG that takes the colour of the page's text.  Knows points, not runs."""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

Points = Sequence[tuple[int, float]]

_TEXT = "#010203"
"""Stands for the page's own text colour until the picture is done."""


def draw(title: str, training: Points, validation: Points) -> str:
    """An ``<svg>`` element, readable on light and dark pages; the same points give the same text.

    Args:
        title: plain ASCII, above the axes.
        training, validation: steps and losses; ``validation`` may be empty.
    """
    style: Any = {
        "svg.hashsalt": title,
        "svg.fonttype": "none",
        "font.size": 10,
        "text.color": _TEXT,
        "axes.labelcolor": _TEXT,
        "axes.edgecolor": _TEXT,
        "xtick.color": _TEXT,
        "ytick.color": _TEXT,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(*zip(*training, strict=True), color="#4a7fe0", linewidth=1.4, label="training")
        if validation:
            points = list(zip(*validation, strict=True))
            axes.plot(*points, color="#e0863c", marker="o", markersize=4, label="validation")
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("step")
        axes.set_ylabel("nats per token")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.15, color=_TEXT)
        axes.legend(frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    # Inside HTML the XML prolog and the metadata, which name foreign addresses, have no use.
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return text.replace(_TEXT, "currentColor")
