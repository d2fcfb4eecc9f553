"""One readable line of numbers for a terminal or a log file."""

import math
from collections.abc import Callable, Mapping

Values = Mapping[str, float]


def console_line(step: int, total: int, values: Values) -> str:
    """What a person wants to see of a step; missing numbers are left out.

    Known names come first, in a fixed order; others follow as they are, except those with a slash,
    of which there may be one a layer.

    Args:
        step: steps done.
        total: steps of the run.
        values: numbers by name, such as ``loss`` and ``tokens_per_second``.
    """
    there = {name: value for name, value in values.items() if not math.isnan(value)}
    width = len(f"{total:,}")
    parts = [f"step {step:>{width},}/{total:,}"]
    for prefix in ("", "validation_"):
        parts += _losses(prefix, there)
    parts += [show(there[name]) for name, show in _KNOWN.items() if name in there]
    parts += [_largest(kind, label, there) for kind, label in _PER_LAYER.items()]
    taken = {*_KNOWN, *_LOSSES}
    parts += [
        f"{name.replace('_', ' ')} {value:.4g}"
        for name, value in there.items()
        if name not in taken and "/" not in name
    ]
    return "  ".join(part for part in parts if part)


def duration(seconds: float) -> str:
    """``h:mm:ss``, from a day on ``d h``."""
    whole = round(seconds)
    if whole >= 86_400:
        hours = round(seconds / 3600)
        return f"{hours // 24} d {hours % 24} h"
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def count(value: float) -> str:
    """Three digits and a unit: 812, 25.4k, 1.02M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        # What rounds up to the next unit is written in it.
        if value >= 0.9995 * size:
            scaled = value / size
            digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{digits}f}{unit}"
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"


def _losses(prefix: str, values: Values) -> list[str]:
    """The loss with its two parts in brackets."""
    total = values.get(f"{prefix}loss")
    if total is None:
        return []
    kinds = ("text", "image")
    known = [(kind, values.get(f"{prefix}{kind}_loss")) for kind in kinds]
    parts = ", ".join(f"{kind} {_loss(value)}" for kind, value in known if value is not None)
    label = f"{prefix.replace('_', ' ')}loss"
    return [f"{label} {_loss(total)} ({parts})" if parts else f"{label} {_loss(total)}"]


def _loss(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}"


def _largest(kind: str, label: str, values: Values) -> str:
    """The largest of one number a layer, and where it stands."""
    mine = {name: value for name, value in values.items() if name.startswith(f"{kind}/")}
    if not mine:
        return ""
    name = max(mine, key=lambda each: mine[each])
    return f"{label} {mine[name]:.3g} ({name.partition('/')[2].replace('_', ' ')})"


_LOSSES = [f"{p}{k}loss" for p in ("", "validation_") for k in ("", "text_", "image_")]

_KNOWN: dict[str, Callable[[float], str]] = {
    "grad_norm": lambda value: f"grad {value:.3g}",
    # Outside fp16 nothing is scaled.
    "loss_scale": lambda value: "" if value == 1 else f"scale {value:,.15g}",
    "lr": lambda value: f"lr {value:.1e}",
    "bad_steps": lambda value: f"bad steps {value:.0f}" if value else "",
    "seconds_per_step": lambda value: "",
    "tokens_per_second": lambda value: f"{count(value)} tok/s",
    "mfu": lambda value: f"MFU {100 * value:.1f} %",
    "memory_gib": lambda value: f"{value:.1f} GiB",
    "eta_seconds": lambda value: f"ETA {duration(value)}",
}

_PER_LAYER = {"activation_max": "largest |x|", "attention_score_max": "largest score"}
