"""Whole steps of ours and of the rivals, taking turns in one process on the same batches."""

import itertools
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cogview.analysis.training_speed.plain import PlainModel, PlainTrainer
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.data.batch import Batch
from megatron_cogview.engines.base import Engine

LR = 1e-4
SAME_LOSS = 1e-5
"""How near the first losses of two implementations of one model must be, relative."""

BUSY, ENOUGH = 0.05, 5
"""Share of the cores above which other programs spoil a round, and how many rounds suffice."""

Step = Callable[[Sequence[Batch]], float]
"""Trains on the micro-batches of a step and gives the loss."""


def steps_of(config: RunConfig, engine: Any, peers: Sequence[str]) -> dict[str, Step]:
    """Our step and those of the rivals; all start anew, ours from the engine's weights."""
    steps: dict[str, Step] = {"ours": engine_step(engine)}
    if "plain" in peers:
        model = PlainModel(config.model)
        model.take(dict(engine.chunks[0].named_parameters()))
        plain = PlainTrainer(model, config.optimizer)
        steps["plain"] = lambda batches: plain.step(batches, LR)
    if "core" in peers:
        # megatron-core may be imported only where its process groups are.
        from megatron_cogview.analysis.training_speed.core_gpt import CoreTrainer

        core = CoreTrainer(config)
        steps["core"] = lambda batches: core.step(batches, LR)
    return steps


def engine_step(engine: Engine) -> Step:
    """A step of our engine."""
    return lambda batches: engine.train_step(batches, LR).losses.total


def compare(
    steps: Mapping[str, Step], batches: Sequence[Sequence[Batch]], warmup: int, rounds: int
) -> dict[str, Any]:
    """Seconds of a step of each, and how many times as fast ours is.

    Every round runs each once, and begins with another one each time, so that what one leaves in
    caches and in the allocator meets all of them alike.  Rounds in which other programs were busy
    are left out, if enough others remain.  Processor time leaves out what other programs take, and
    is the same as time on an idle machine with one thread.

    Raises:
        RuntimeError: the plain model's first loss is not ours: it is another model.
    """
    first: dict[str, float] = {}
    timed: list[_Round] = []
    names = list(steps)
    endless = itertools.cycle(batches)
    for number in range(warmup + rounds):
        batch, at = next(endless), number % len(names)
        found = _Round({}, {}, 0.0)
        busy, begin, processor = _busy_seconds(), time.perf_counter(), time.process_time()
        for name in names[at:] + names[:at]:
            step_begin, step_processor = time.perf_counter(), time.process_time()
            first.setdefault(name, steps[name](batch))
            found.seconds[name] = time.perf_counter() - step_begin
            found.processor[name] = time.process_time() - step_processor
        if busy is not None:
            others = (_busy_seconds() or 0.0) - busy - (time.process_time() - processor)
            found.others = others / (time.perf_counter() - begin) / (os.cpu_count() or 1)
        if number >= warmup:
            timed.append(found)
    check_same_model(first)
    quiet = [one for one in timed if one.others < BUSY]
    counted = quiet if len(quiet) >= ENOUGH else timed
    return {
        "first_loss": first,
        "rounds": len(timed),
        "rounds_counted": len(counted),
        "others_share": statistics.median(one.others for one in counted),
        **_ratios("", [one.seconds for one in counted]),
        **_ratios("processor_", [one.processor for one in counted]),
    }


@dataclass
class _Round:
    """One step of each."""

    seconds: dict[str, float]
    processor: dict[str, float]
    others: float
    """Share of all cores that other programs took meanwhile; 0 where that cannot be known."""


def _busy_seconds() -> float | None:
    """What all programs have taken of all cores since the machine started; None if not on Linux."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:8]
    except OSError:
        return None
    user, nice, system, _, _, *interrupts = map(int, fields)
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def _ratios(prefix: str, times: list[dict[str, float]]) -> dict[str, Any]:
    medians = {name: statistics.median(one[name] for one in times) for name in times[0]}
    return {
        f"{prefix}seconds": medians,
        f"{prefix}times_as_fast": {
            name: value / medians["ours"] for name, value in medians.items() if name != "ours"
        },
    }


def check_same_model(first_loss: Mapping[str, float]) -> None:
    """Refuse a comparison with another model than ours; megatron-core's GPT is one knowingly."""
    if "plain" not in first_loss:
        return
    ours, plain = first_loss["ours"], first_loss["plain"]
    if not abs(ours - plain) <= SAME_LOSS * abs(ours):
        raise RuntimeError(f"the plain model is not ours: first losses {ours!r} and {plain!r}")
