"""Time and memory of attention against length, one line a peer."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from megatron_cogview.analysis.kernel_speed import attention
from megatron_cogview.analysis.kernel_speed.peers import Row
from megatron_cogview.storage.atomic import replacing

_SPARSE, _DENSE = "-", "--"
_LINES = {
    attention.OURS: ("tab:red", _SPARSE, "o"),
    attention.FLEX: ("tab:purple", _SPARSE, "s"),
    attention.RELEASED: ("tab:brown", _SPARSE, "^"),
    attention.DENSE: ("tab:orange", _DENSE, "o"),
    attention.FLASH: ("tab:blue", _DENSE, "v"),
    attention.CUDNN: ("tab:cyan", _DENSE, "D"),
    attention.EFFICIENT: ("tab:green", _DENSE, "<"),
    attention.FLASH_2: ("navy", _DENSE, "P"),
    attention.FLASH_3: ("teal", _DENSE, "X"),
    attention.EAGER: ("tab:gray", _DENSE, "^"),
    attention.COMPILED: ("black", _DENSE, "s"),
}
"""Solid lines see three regions, broken ones all keys."""

_PANELS = (
    ("forward", "ms", "ms a sequence", 1.0),
    ("forward + backward", "ms", "ms a sequence", 1.0),
    ("forward + backward", "extra_bytes", "MiB a sequence above the inputs", 2.0**-20),
)


def save(rows: Sequence[Row], path: Path, title: str) -> bool:
    """Write the picture; False if no attention was measured."""
    found = [row for row in rows if row.get("operation") == "attention" and "peers" in row]
    if not found:
        return False
    figure = draw(found, title)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
    return True


def title_of(device: str) -> str:
    """Headline of the picture."""
    return f"Causal attention in bf16: {device}\nsolid: three regions; broken: all keys"


def draw(rows: Sequence[Row], title: str) -> Figure:
    """Three panels: time forward, time with backward, memory with backward.

    Args:
        rows: of attention.
        title: what they were measured on.
    """
    figure = Figure(figsize=(15, 6), layout="constrained")
    for axes, (mode, name, label, unit) in zip(figure.subplots(1, 3), _PANELS, strict=True):
        lengths = sorted({row["length"] for row in rows})
        for peer in _LINES:
            points = sorted(_points(rows, mode, peer, name, unit))
            if points:
                _line(axes, peer, points)
        if not axes.lines:
            axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
        _scales(axes, lengths, bool(axes.lines))
        axes.set(xlabel="tokens", ylabel=label, title=mode if name == "ms" else f"{mode}, memory")
    handles = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    figure.legend(
        list(handles.values()), list(map(str, handles)), loc="outside lower center", ncols=4
    )
    figure.suptitle(title)
    return figure


def _points(
    rows: Sequence[Row], mode: str, peer: str, name: str, unit: float
) -> Iterator[tuple[int, float]]:
    """Length and figure of one sequence: batches differ between lengths."""
    for row in rows:
        value = row["peers"].get(peer, {}).get(name)
        if row["mode"] == mode and value:
            yield row["length"], value * unit / row["batch"]


def _line(axes: Axes, peer: str, points: Sequence[tuple[int, float]]) -> None:
    colour, style, marker = _LINES[peer]
    ours = peer == attention.OURS
    axes.plot(
        *zip(*points, strict=True),
        color=colour,
        linestyle=style,
        marker=marker,
        markersize=7 if ours else 5,
        linewidth=2.5 if ours else 1.2,
        label=peer,
        zorder=3 if ours else 2,
    )


def _tick(value: float, position: float) -> str:
    """1, 2 and 5 times a power of ten."""
    return f"{value:,g}" if f"{value:e}"[0] in "125" else ""


def _scales(axes: Axes, lengths: Sequence[int], has_lines: bool) -> None:
    axes.set_xscale("log")
    axes.set_xlim(lengths[0] / 1.15, lengths[-1] * 1.15)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=30)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    if has_lines:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_tick)
        axes.yaxis.set_minor_formatter(_tick)
    else:
        axes.set_yticks([])
    axes.grid(alpha=0.3, which="both")
