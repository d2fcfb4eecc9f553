"""Refused layouts name field, value, reason and the nearest legal values, which are just that."""

import functools
import itertools
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from megatron_cogview.configs.errors import ConfigError
from megatron_cogview.configs.layout import Layout, require_legal
from megatron_cogview.configs.parallel import ParallelConfig
from megatron_cogview.configs.presets import base_4b, tiny
from megatron_cogview.configs.training import TrainingConfig

GRID: dict[str, tuple[Any, ...]] = {
    "processes": (1, 2, 3, 4, 6, 8),
    "tensor": (1, 2, 3, 4, 5),
    "pipeline": (1, 2, 3, 4),
    "virtual_pipeline": (1, 2, 3),
    "sequence": (False, True),
    "num_layers": (2, 4, 6, 12),
    "num_heads": (1, 2, 6, 8),
    "model_length": (8, 9, 12),
    "global_batch_size": (4, 5, 12, 24),
    "micro_batch_size": (1, 2, 3, 5),
}
HIGHEST = 150
"""Well above every value that could be the nearest in the grid."""
NAMES = {
    "parallel": ("tensor", "pipeline", "virtual_pipeline", "sequence"),
    "training": ("global_batch_size", "micro_batch_size"),
}
FIELDS = {f"{part}.{name}": name for part, names in NAMES.items() for name in names}
FIELDS["processes"] = "processes"


def rules(v: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """What makes a layout legal, said again: the field that a broken rule names, and whether it
    holds.  In the order in which they are checked, each for values that pass those before."""
    t, p, c = v["tensor"], v["pipeline"], v["virtual_pipeline"]
    yield (
        "parallel.tensor",
        all(v[n] % t == 0 for n in ("num_heads", "hidden_size")) and (v["padded_vocab"] % t == 0),
    )
    yield "parallel.pipeline", v["num_layers"] % p == 0
    yield "parallel.virtual_pipeline", v["num_layers"] % (p * c) == 0
    yield "parallel.sequence", not v["sequence"] or v["model_length"] % t == 0
    yield "processes", v["processes"] % (t * p) == 0
    data = v["processes"] // (t * p)
    yield "training.global_batch_size", v["global_batch_size"] % (v["micro_batch_size"] * data) == 0
    rounds = v["global_batch_size"] // (v["micro_batch_size"] * data)
    yield "parallel.virtual_pipeline", c == 1 or rounds % p == 0


def broken(v: dict[str, Any]) -> int | None:
    """Number of the first broken rule."""
    return next((n for n, (_, holds) in enumerate(rules(v)) if not holds), None)


def rule(v: dict[str, Any], number: int) -> tuple[str, bool]:
    """One of :func:`rules`; later ones may not be asked of such values."""
    return next(itertools.islice(rules(v), number, None))


def with_value(v: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """Changed as a reader of the message would: what is useless beside it is turned off."""
    changed = {**v, name: value}
    if changed["tensor"] == 1:
        changed["sequence"] = False
    if changed["pipeline"] == 1 and name == "pipeline":
        changed["virtual_pipeline"] = 1
    return changed


def nearest_by_search(
    v: dict[str, Any], name: str, is_legal: Callable[[dict[str, Any]], bool]
) -> list[Any]:
    if name == "sequence":
        return [False] if is_legal(with_value(v, name, False)) else []
    legal = [n for n in range(1, HIGHEST) if is_legal(with_value(v, name, n))]
    below = [n for n in legal if n < v[name]][-1:]
    return below + [n for n in legal if n > v[name]][:1]


def parse(message: str) -> tuple[str, str, dict[str, list[Any]]]:
    """Field, value, and nearest legal values by field, the refused one's first."""
    found = re.fullmatch(
        r"(?P<field>[\w.]+) = (?P<value>\w+): .+; "
        r"the nearest legal values? (?:is|are) (?P<rest>.+)",
        message,
    )
    assert found, message
    own, *others = re.split(r", or ", found["rest"])

    def values(text: str, word: str) -> list[Any]:
        plain = re.sub(r" with parallel\.\w+ = \w+", "", text)
        return [n == "True" if n in ("False", "True") else int(n) for n in plain.split(word)]

    named = {found["field"]: values(own, " and ")}
    for other in others:
        name, _, text = other.partition(" = ")
        named[name] = values(text, " or ")
    return found["field"], found["value"], named


def refused_layouts(count: int) -> list[dict[str, Any]]:
    """Of the grid, drawn at random; the first broken rule is each of them equally often."""
    rng = random.Random(3)
    wanted = len(list(rules(legal_values())))
    kept: dict[int, list[dict[str, Any]]] = {n: [] for n in range(wanted)}
    while min(map(len, kept.values())) < count:
        v = {name: rng.choice(values) for name, values in GRID.items()}
        v |= {"hidden_size": 8 * v["num_heads"], "padded_vocab": 1024}
        number = broken(v)
        impossible = (v["sequence"] and v["tensor"] == 1) or (
            v["virtual_pipeline"] > 1 and v["pipeline"] == 1
        )
        if number is not None and not impossible and len(kept[number]) < count:
            kept[number].append(v)
    return [v for values in kept.values() for v in values]


def legal_values() -> dict[str, Any]:
    return {name: values[0] for name, values in GRID.items()} | {
        "hidden_size": 8,
        "padded_vocab": 1024,
    }


def test_what_is_suggested_is_legal_and_nothing_nearer_is() -> None:
    mended = 0
    for v in refused_layouts(60):
        number = broken(v)
        assert number is not None
        with pytest.raises(ConfigError) as error:
            require_legal(Layout(**v))
        field, value, named = parse(str(error.value))
        name = FIELDS[field]
        assert field == rule(v, number)[0]
        assert value == str(v[name])
        whole = nearest_by_search(v, name, lambda c: broken(c) is None)
        mended += bool(whole)
        # Several fields at fault: then at least what passes the rule that was broken.
        passing = functools.partial(rule, number=number)
        alone = nearest_by_search(v, name, lambda c, passes=passing: passes(c)[1])
        assert named.pop(field) == (whole or alone), v
        for other, values in named.items():
            assert values == nearest_by_search(v, FIELDS[other], lambda c: broken(c) is None), v
    assert mended > 100


def test_legal_layouts_pass() -> None:
    rng = random.Random(4)
    passed = 0
    while passed < 200:
        v = {name: rng.choice(values) for name, values in GRID.items()}
        v |= {"hidden_size": 8 * v["num_heads"], "padded_vocab": 1024}
        if broken(v) is None:
            require_legal(Layout(**v))
            passed += 1


MESSAGES: list[tuple[ParallelConfig, int, str]] = [
    (
        ParallelConfig(tensor=3),
        12,
        "parallel.tensor = 3: does not divide model.num_heads = 4; the nearest legal values are 2 "
        "and 4",
    ),
    (
        ParallelConfig(tensor=2),
        3,
        "processes = 3: must be a multiple of parallel.tensor * parallel.pipeline = 2, the "
        "processes of one copy of the model; the nearest legal values are 2 and 4, or "
        "parallel.tensor = 1",
    ),
    (
        ParallelConfig(pipeline=3),
        12,
        "parallel.pipeline = 3: does not divide model.num_layers = 4; the nearest legal values "
        "are 2 and 4",
    ),
    (
        ParallelConfig(pipeline=2, virtual_pipeline=3),
        2,
        "parallel.virtual_pipeline = 3: parallel.pipeline * parallel.virtual_pipeline = 6 does "
        "not divide model.num_layers = 4; the nearest legal value is 2, or parallel.pipeline = 1 "
        "with parallel.virtual_pipeline = 1",
    ),
    (
        ParallelConfig(pipeline=2, virtual_pipeline=2),
        32,
        "parallel.virtual_pipeline = 2: the interleaved schedule needs micro-batches per step (3) "
        "to be a multiple of parallel.pipeline = 2; the nearest legal value is 1, or "
        "training.global_batch_size = 32 or 64",
    ),
    (
        ParallelConfig(),
        36,
        "training.global_batch_size = 48: must be a multiple of training.micro_batch_size x "
        "data-parallel size = 1 x 36 = 36; the nearest legal values are 36 and 72",
    ),
]


@pytest.mark.parametrize(("parallel", "world", "message"), MESSAGES)
def test_impossible_layouts_of_a_run(parallel: ParallelConfig, world: int, message: str) -> None:
    config = replace(
        tiny(),
        parallel=parallel,
        training=TrainingConfig(global_batch_size=48, micro_batch_size=1),
    )
    with pytest.raises(ConfigError) as error:
        config.check_layout(world)
    assert str(error.value) == message


def test_sequence_parallel_needs_a_length_that_divides() -> None:
    config = replace(
        tiny(),
        sequence=replace(tiny().sequence, length=88, text_budget=20),
        training=TrainingConfig(global_batch_size=48, micro_batch_size=1),
        parallel=ParallelConfig(tensor=2, sequence=True),
    )
    with pytest.raises(ConfigError) as error:
        config.check_layout(2)
    assert str(error.value) == (
        "parallel.sequence = True: parallel.tensor = 2 does not divide the model length 87; the "
        "nearest legal value is False, or parallel.tensor = 1 with parallel.sequence = False"
    )


ALONE: list[tuple[Callable[[], object], str]] = [
    (
        lambda: ParallelConfig(tensor=0),
        "parallel.tensor = 0: must be at least 1; the nearest legal value is 1",
    ),
    (
        lambda: ParallelConfig(sequence=True),
        "parallel.sequence = True: needs parallel.tensor of at least 2; the nearest legal value "
        "is False, or parallel.tensor = 2",
    ),
    (
        lambda: ParallelConfig(virtual_pipeline=2),
        "parallel.virtual_pipeline = 2: needs parallel.pipeline of at least 2; the nearest legal "
        "value is 1, or parallel.pipeline = 2",
    ),
    (
        lambda: ParallelConfig(overlap_parameters=True),
        "parallel.overlap_parameters = True: needs parallel.distributed_optimizer; the nearest "
        "legal value is False, or parallel.distributed_optimizer = True",
    ),
    (
        lambda: ParallelConfig(overlap_parameters=True, distributed_optimizer=True),
        "parallel.overlap_parameters = True: needs parallel.overlap_gradients; the nearest legal "
        "value is False, or parallel.overlap_gradients = True",
    ),
    (
        lambda: ParallelConfig(tensor=2, pipeline=2).data(6),
        "processes = 6: must be a multiple of parallel.tensor * parallel.pipeline = 4; the "
        "nearest legal values are 4 and 8",
    ),
    (
        lambda: ParallelConfig(tensor=4).data(2),
        "processes = 2: must be a multiple of parallel.tensor * parallel.pipeline = 4; the "
        "nearest legal value is 4",
    ),
    (
        lambda: TrainingConfig(global_batch_size=10, micro_batch_size=4).num_micro_batches(1),
        "training.global_batch_size = 10: must be a multiple of training.micro_batch_size x "
        "data-parallel size = 4 x 1 = 4; the nearest legal values are 8 and 12, or "
        "training.micro_batch_size = 2 or 5",
    ),
]


@pytest.mark.parametrize(("build", "message"), ALONE)
def test_refusals_of_a_part_alone(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build()
    assert str(error.value) == message


def test_a_large_run_is_refused_at_once() -> None:
    """The search is bounded by the batch: thousands of cheap checks."""
    config = replace(base_4b(), parallel=ParallelConfig(tensor=8))
    with pytest.raises(ConfigError, match=r"processes = 1020: .* are 768 and 1024"):
        replace(config, training=replace(config.training, micro_batch_size=1)).check_layout(1020)
