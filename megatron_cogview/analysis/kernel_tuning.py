"""Which sizes start our kernels fastest on this GPU: a bounded search, kept in a file.

Each kernel has a short list of candidates.  They are timed in calls as training and decoding make
them, one kernel changed at a time; one that cannot run here, or whose numbers differ, is out.
The file is written after each kernel, and what it has is not measured again.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_cogview.analysis.timing import median_ms
from megatron_cogview.configs.errors import ConfigError, refuse
from megatron_cogview.kernels.codebook_lookup.operator import nearest_code
from megatron_cogview.kernels.dispatch import triton_problem
from megatron_cogview.kernels.pivot_attention.launch import CANDIDATES
from megatron_cogview.kernels.pivot_attention.operator import (
    dense_attention,
    three_region_attention,
)
from megatron_cogview.kernels.sandwich_junction.operator import sandwich_junction
from megatron_cogview.kernels.scaled_layer_norm.operator import scaled_layer_norm
from megatron_cogview.kernels.tuning import Sizes, Trial, made_for, read_sizes, trial
from megatron_cogview.storage.atomic import write_text

logger = logging.getLogger(__name__)

Call = Callable[[], tuple[torch.Tensor, ...]]
Clock = Callable[[dict[str, Callable[[], object]]], dict[str, float]]
"""Milliseconds of each operation."""

LEAST_GAIN = 1.02
"""Times that a candidate must be faster than the fixed sizes: less is noise."""
MOST_ERROR = 0.02
"""Between two sizes in bf16, relative to a tensor's largest value."""
ROW_WARPS = ((1,), (2,), (4,), (8,), (16,))


class Subject(NamedTuple):
    """A call that starts kernels to be tuned."""

    name: str
    make: Callable[[torch.device], Call]


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Of the calls: those of the presets, or micro ones for tests."""

    hidden_sizes: tuple[int, ...] = (1024, 2560, 4096)
    rows: int = 16_384
    length: int = 4096
    heads: int = 40
    head_dim: int = 64
    batch: int = 2
    codes: int = 8192
    code_dims: tuple[int, ...] = (64, 256)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to tune."""

    only: str = ""
    """Tune kernels whose name begins with this; empty: all."""
    rounds: int = 15
    """Timed runs of each candidate; the median counts."""
    budget_seconds: float = 420.0
    """No further kernel is begun after that; run again to go on."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise refuse("rounds", self.rounds, "must be at least 1")
        if self.budget_seconds <= 0:
            raise refuse("budget_seconds", self.budget_seconds, "must be positive")


def candidates(kernel: str) -> tuple[Sizes, ...]:
    """Sizes to try of a kernel, by its name for ``kernels.tuning``."""
    operation, _, rest = kernel.partition(".")
    if operation == "pivot_attention":
        return CANDIDATES[rest.partition(".")[0]]
    if operation == "codebook_lookup":
        from megatron_cogview.kernels.codebook_lookup.triton import CANDIDATES as of_codebook

        return of_codebook
    return ROW_WARPS


def tune(
    path: Path,
    settings: Settings,
    device: torch.device,
    shapes: Shapes | None = None,
    clock: Clock | None = None,
) -> dict[str, Any]:
    """Measure what the file does not have yet; returns what it holds then.

    Args:
        path: file of sizes; made, or gone on with.
        settings: see there.
        device: where to measure.
        shapes: of the calls; default: those of the presets.
        clock: measures calls side by side; default: :func:`median_ms`.

    Raises:
        ConfigError: Triton cannot run here, or the file is of another GPU or another Triton.
    """
    problem = triton_problem(device)
    if problem is not None:
        raise ConfigError(f"tuning measures Triton's kernels, and {problem}")
    content = _begun(path)
    measure = clock or (lambda calls: median_ms(calls, device, settings.rounds))
    end = time.monotonic() + settings.budget_seconds
    for subject in subjects(shapes or Shapes()):
        # Within the trial from the start: sizes of a file must not reach what is compared with.
        with trial() as trying:
            call = subject.make(device)
            trying.asked.clear()
            expected = call()
            wanted = [k for k in sorted(trying.asked) if k.startswith(settings.only)]
            for kernel in wanted:
                if kernel in content["measured"]:
                    continue
                if time.monotonic() > end:
                    logger.warning("out of time before %s: run again to go on", kernel)
                    return content
                _tune_one(kernel, call, expected, trying, measure, content)
                write_text(path, json.dumps(content, indent=1) + "\n")
                logger.info("%s in %s: %s", kernel, subject.name, _said(kernel, content))
    return content


def _begun(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {**made_for(), "sizes": {}, "measured": {}}
    content = read_sizes(path)
    for field, value in made_for().items():
        if content[field] != value:
            raise ConfigError(
                f"--output {path}: measured with {field} {content[field]!r}, here it is {value!r}; "
                "name another file"
            )
    if not isinstance(content.get("measured"), dict):
        raise ConfigError(f'--output {path}: has no table "measured"; name another file')
    return content


def _tune_one(
    kernel: str,
    call: Call,
    expected: tuple[torch.Tensor, ...],
    trying: Trial,
    measure: Clock,
    content: dict[str, Any],
) -> None:
    """Try all candidates of a kernel, and note the times and the best."""
    fixed = trying.asked[kernel]
    calls: dict[str, Callable[[], object]] = {}
    notes: dict[str, Any] = {}
    for sizes in dict.fromkeys((fixed, *candidates(kernel))):
        run = _with_sizes(kernel, sizes, call, trying)
        problem = _problem(run, expected)
        if problem is None:
            calls[_text(sizes)] = run
        else:
            notes[_text(sizes)] = problem
    times = measure(calls)
    best = min(times, key=lambda text: times[text])
    if times[_text(fixed)] < LEAST_GAIN * times[best]:
        best = _text(fixed)
    content["measured"][kernel] = {"fixed": _text(fixed), **times, **notes}
    if best != _text(fixed):
        content["sizes"][kernel] = [int(word) for word in best.split()]


def _with_sizes(kernel: str, sizes: Sizes, call: Call, trying: Trial) -> Call:
    def run() -> tuple[torch.Tensor, ...]:
        trying.sizes[kernel] = sizes
        try:
            return call()
        finally:
            del trying.sizes[kernel]

    return run


def _problem(run: Call, expected: tuple[torch.Tensor, ...]) -> str | None:
    """Why sizes are out; None if they give the same numbers."""
    try:
        found = run()
    except Exception as error:
        # Triton raises many kinds, for shared memory, registers or its own limits.
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    for got, wanted in zip(found, expected, strict=True):
        size = float(wanted.abs().max()) or 1.0
        worst = float((got.double() - wanted.double()).abs().nan_to_num(nan=torch.inf).max())
        if worst > MOST_ERROR * size:
            return f"differs by {worst / size:.2g} of the largest value"
    return None


def table(content: dict[str, Any]) -> str:
    """What was measured, as Markdown."""
    lines = ["| kernel | fixed | ms | best | ms | out |", "|---|---|---:|---|---:|---|"]
    for kernel, entries in content["measured"].items():
        fixed = entries["fixed"]
        times = {k: v for k, v in entries.items() if k != "fixed" and not isinstance(v, str)}
        best = min(times, key=lambda text: times[text])
        out = [f"{k}: {v}" for k, v in entries.items() if k != "fixed" and isinstance(v, str)]
        lines.append(
            f"| {kernel} | {fixed} | {times[fixed]:.3g} | {best} | {times[best]:.3g} | "
            f"{'; '.join(out).replace('|', '')[:200]} |"
        )
    return "\n".join(lines) + "\n"


def _text(sizes: Sizes) -> str:
    return " ".join(map(str, sizes))


def _said(kernel: str, content: dict[str, Any]) -> str:
    times = content["measured"][kernel]
    fixed = times["fixed"]
    chosen = _text(tuple(content["sizes"].get(kernel, ()))) or fixed
    return f"{chosen} ({times[chosen]:.3g} ms; fixed {fixed}: {times[fixed]:.3g} ms)"


def subjects(shapes: Shapes) -> Iterator[Subject]:
    """Every call that starts kernels worth tuning, the dearest first."""
    for dense in (False, True):
        kind = "dense attention" if dense else "three-region attention"
        for dropout in (0.0, 0.1):
            for backward in (False, True):
                name = kind + ", dropout" * (dropout > 0) + ", backward" * backward
                make = partial(_attention, shapes, dense, dropout, backward, shapes.length)
                yield Subject(name, make)
        yield Subject(f"{kind}, decoding", partial(_attention, shapes, dense, 0.0, False, 1))
    for hidden in shapes.hidden_sizes:
        for operation in (_junction, _layer_norm):
            for backward in (False, True):
                name = f"{operation.__name__[1:]} of {hidden}" + ", backward" * backward
                yield Subject(name, partial(operation, shapes, hidden, backward))
    for width in shapes.code_dims:
        yield Subject(f"codebook of {width}", partial(_codebook, shapes, width))


def _random(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape) + shape[-1])
    return torch.randn(shape, generator=generator).to(device, dtype)


def _forward_or_backward(forward: Call, inputs: list[torch.Tensor], backward: bool) -> Call:
    """The call itself, or its gradients alone on a graph that is kept."""
    if not backward:
        return lambda: tuple(x.detach() for x in forward())
    for each in inputs:
        each.requires_grad_()
    outputs = forward()
    given = [torch.randn_like(x) for x in outputs]
    return lambda: torch.autograd.grad(outputs, inputs, given, retain_graph=True)


def _attention(
    shapes: Shapes,
    dense: bool,
    dropout: float,
    backward: bool,
    num_queries: int,
    device: torch.device,
) -> Call:
    length = shapes.length
    lengths = (num_queries, length, length)
    q, k, v = inputs = [
        _random((n, shapes.batch, shapes.heads, shapes.head_dim), device, torch.bfloat16)
        .permute(1, 2, 0, 3)
        for n in lengths
    ]  # fmt: skip
    text = min(64, length // 8)
    key_B2 = torch.tensor([[b, text] for b in range(shapes.batch)], device=device)
    block = max(1, min(128, length // 12))

    drawn: dict[str, Any] = {"num_pivots": min(768, length // 5), "layer_number": 1, "seed": 1}
    same: dict[str, Any] = {
        "dropout": dropout,
        "dropout_seed": 1,
        "implementation": "triton",
    }

    def forward() -> tuple[torch.Tensor, ...]:
        if dense:
            return (dense_attention(q, k, v, **same),)
        regions = {"window_block": block, "window_blocks": 6, "max_text": text, **drawn}
        return (three_region_attention(q, k, v, key_B2, total_length=length, **regions, **same),)

    return _forward_or_backward(forward, inputs, backward)


def _junction(shapes: Shapes, hidden: int, backward: bool, device: torch.device) -> Call:
    h, residual = inputs = [
        _random((shapes.rows, hidden), device, torch.bfloat16) for _ in range(2)
    ]
    bias, *parameters = (
        _random((hidden,), device, torch.bfloat16).requires_grad_(backward) for _ in range(5)
    )

    def forward() -> tuple[torch.Tensor, ...]:
        z, n = sandwich_junction(
            *(h, bias, residual, *parameters),
            epsilon=1e-5,
            dropout=0.1,
            seed=1,
            implementation="triton",
        )
        assert n is not None
        return z, n

    return _forward_or_backward(forward, [*inputs, bias, *parameters], backward)


def _layer_norm(shapes: Shapes, hidden: int, backward: bool, device: torch.device) -> Call:
    x = _random((shapes.rows, hidden), device, torch.bfloat16)
    weight, bias = (_random((hidden,), device, torch.bfloat16) for _ in range(2))

    def forward() -> tuple[torch.Tensor, ...]:
        y = scaled_layer_norm(x, weight, bias, 1e-5, "token_max", implementation="triton")
        return (y,)

    return _forward_or_backward(forward, [x, weight, bias], backward)


def _codebook(shapes: Shapes, width: int, device: torch.device) -> Call:
    vectors = _random((shapes.rows, width), device, torch.float32)
    codebook = _random((shapes.codes, width), device, torch.float32) * 0.9

    def forward() -> tuple[torch.Tensor, ...]:
        indices = nearest_code(vectors, codebook, backend="triton")
        return ((vectors - codebook[indices]).square().sum(1),)

    return forward
