"""Whole steps of ours and of the rivals, taking turns in one process on the same batches."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_cogview.analysis.training_speed.plain import PlainModel, PlainTrainer
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.data.batch import Batch
from megatron_cogview.engines.base import Engine

LR = 1e-4
SAME_LOSS = 1e-5
"""How near the first losses of two implementations of one model must be, relative."""

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
    caches and in the allocator meets all of them alike.  Processor time leaves out what other
    programs take, and is the same as time on an idle machine with one thread.

    Raises:
        RuntimeError: the plain model's first loss is not ours: it is another model.
    """
    first: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    processor: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    endless = itertools.cycle(batches)
    for round_ in range(warmup + rounds):
        batch = next(endless)
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            begin, processor_begin = time.perf_counter(), time.process_time()
            loss = steps[name](batch)
            elapsed, worked = time.perf_counter() - begin, time.process_time() - processor_begin
            first.setdefault(name, loss)
            if round_ >= warmup:
                seconds[name].append(elapsed)
                processor[name].append(worked)
    check_same_model(first)
    return {
        "first_loss": first,
        **_ratios("", seconds),
        **_ratios("processor_", processor),
        "fastest": {name: min(values) for name, values in seconds.items()},
    }


def _ratios(prefix: str, times: Mapping[str, list[float]]) -> dict[str, Any]:
    medians = {name: statistics.median(values) for name, values in times.items()}
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
