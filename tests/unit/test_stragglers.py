"""training.stragglers: who is called slow, that noise is not, and what is own work."""

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_cogview.training import stragglers
from megatron_cogview.training.stragglers import MIN_STEPS, Slow, StragglerWatch, slow_ranks

STEP_S = 0.6
STEPS = 10
RANKS = 8


def interval(rng: np.random.Generator, factors: dict[int, float]) -> dict[int, float]:
    """Slow ranks of ten noisy steps: 5 % on each, and one in twenty takes three times as long."""
    noise = np.exp(rng.normal(0.0, 0.05, (RANKS, STEPS)))
    noise *= np.where(rng.random((RANKS, STEPS)) < 0.05, 3.0, 1.0)
    scale = np.array([factors.get(rank, 1.0) for rank in range(RANKS)])
    # What all have in common, such as a busy file system, is nobody's fault.
    common = rng.uniform(0.8, 1.5)
    own = np.median(STEP_S * common * scale[:, None] * noise, axis=1)
    return slow_ranks(tuple(own.tolist()), (0.0,) * RANKS, 1.15)


def test_a_thousand_noisy_intervals_without_a_false_alarm() -> None:
    rng = np.random.default_rng(0)
    assert not any(interval(rng, {}) for _ in range(1000))


@pytest.mark.parametrize("factor", [1.25, 1.3])
def test_a_slow_rank_is_found_within_ten_steps(factor: float) -> None:
    rng = np.random.default_rng(1)
    found = [set(interval(rng, {5: factor})) for _ in range(200)]
    assert found.count({5}) == 200


def test_twenty_percent_are_found_by_a_factor_below() -> None:
    rng = np.random.default_rng(2)
    found = [set(interval(rng, {5: 1.2})) for _ in range(200)]
    assert found.count({5}) > 190
    assert all(each <= {5} for each in found)


def test_ranks_are_compared_within_their_stage() -> None:
    own, stages = (0.6, 0.6, 0.6, 1.0, 1.0, 1.4), (0.0, 0.0, 0.0, 1.0, 1.0, 1.0)
    assert slow_ranks(own, stages, 1.2) == {5: 1.0}
    assert slow_ranks((0.6, 1.0), (0.0, 1.0), 1.2) == {}


def test_of_two_ranks_the_faster_one_counts() -> None:
    assert slow_ranks((0.75, 0.6), (0.0, 0.0), 1.2) == {0: 0.6}


def test_milliseconds_are_not_worth_a_word() -> None:
    assert slow_ranks((0.010, 0.029), (0.0, 0.0), 1.2) == {}
    assert set(slow_ranks((0.010, 0.031), (0.0, 0.0), 1.2)) == {1}


def test_the_line_says_how_slow() -> None:
    assert str(Slow(5, "node2", 0.804, 0.6)) == (
        "rank 5 (node2) needs 1.34 x the median of its stage (0.804 s against 0.600 s per step)"
    )


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stragglers, "time", SimpleNamespace(perf_counter=clock))
    return clock


def watch_of(factor: float = 1.2) -> StragglerWatch:
    place: Any = SimpleNamespace(device=torch.device("cpu"), pipeline_rank=0, world_size=2)
    return StragglerWatch(place, factor)


def others(monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[list[float]]:
    """A second rank that needs ``seconds``; returns what this one tells."""
    mine: list[list[float]] = []

    def all_gather(gathered: list[torch.Tensor], numbers: torch.Tensor) -> None:
        mine.append(numbers.tolist())
        gathered[0].copy_(numbers)
        gathered[1].copy_(torch.tensor([seconds, 0.0]))

    monkeypatch.setattr(dist, "all_gather", all_gather)
    monkeypatch.setattr(dist, "all_gather_object", lambda hosts, mine: hosts.__setitem__(1, "b"))
    return mine


def a_step(watch: StragglerWatch, clock: Clock, work: float, wait: float) -> None:
    begin = clock.now
    with watch.waiting():
        clock.now += wait / 2
    clock.now += work
    # A wait inside another is part of it.
    with watch.waiting(), watch.waiting():
        clock.now += wait / 2
    watch.step_done(clock.now - begin)
    # Between two steps there are waits as well.
    with watch.waiting():
        clock.now += 5.0


def test_own_work_is_the_step_without_its_waits(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, watch = others(monkeypatch, 0.25), watch_of()
    a_step(watch, clock, work=60.0, wait=0.0)
    assert watch.report() == [], "the first step of a process is left out"
    for _ in range(MIN_STEPS - 1):
        a_step(watch, clock, work=0.1, wait=0.2)
    assert watch.report() == [] and told == [], "too few steps yet"
    a_step(watch, clock, work=0.1, wait=0.2)
    assert watch.report() == [Slow(1, "b", 0.25, pytest.approx(0.1))]
    assert told == [[pytest.approx(0.1), 0.0]]
    assert watch.report() == [], "an interval is reported once"


def test_most_steps_must_be_slow(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    others(monkeypatch, 0.1)
    watch = watch_of()
    for number in range(12):
        a_step(watch, clock, work=1.0 if number % 3 == 0 else 0.1, wait=0.1)
    assert watch.report() == []
    for number in range(12):
        a_step(watch, clock, work=0.1 if number % 3 == 0 else 0.2, wait=0.1)
    assert [slow.rank for slow in watch.report()] == [0]


def test_on_a_gpu_the_wait_is_the_devices_and_nobody_waits_for_it_before_the_report(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock.now

        def synchronize(self) -> None:
            asked.append(self)

        def elapsed_time(self, end: "Event") -> float:
            return 1000 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    waiting = stragglers._Waiting(cuda=True)
    with waiting:
        clock.now += 2.0
    (wait,) = waiting.waits
    assert not asked
    assert wait.read() == 2.0 and wait.read() == 2.0
    assert len(asked) == 1


def test_an_error_in_a_wait_passes(clock: Clock) -> None:
    watch = watch_of()
    with pytest.raises(RuntimeError), watch.waiting():
        raise RuntimeError
    watch.step_done(1.0)


def test_switched_off_it_does_nothing() -> None:
    watch = watch_of(factor=0)
    with watch.waiting():
        time.sleep(0)
    for _ in range(2 * MIN_STEPS):
        watch.step_done(1.0)
    assert watch.report() == []
