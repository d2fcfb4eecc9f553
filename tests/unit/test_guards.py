"""training.guards: which steps are bad, what a spike is, and what is remembered."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from megatron_cogview.configs.errors import TrainingError
from megatron_cogview.configs.precision import PrecisionConfig
from megatron_cogview.configs.survival import SurvivalConfig
from megatron_cogview.engines.base import StepResult
from megatron_cogview.model.loss import Losses
from megatron_cogview.training.guards import Guard, Progress, Verdict


def result(loss: float = 3.0, updated: bool = True, scale: float = 1.0) -> StepResult:
    losses = Losses(total=loss, text=loss, image=loss, sums=())
    return StepResult(losses=losses, updated=updated, grad_norm=1.0, loss_scale=scale)


def guard(progress: Progress | None = None, **bounds: float) -> Guard:
    return Guard(SurvivalConfig(**bounds), PrecisionConfig(), progress or Progress())  # type: ignore[arg-type]


def test_bad_steps_in_a_row_send_the_run_back() -> None:
    g = guard(max_bad_steps=3)
    bad = result(math.nan, updated=False)
    good = result()
    verdicts = [g.judge(n, r) for n, r in enumerate([bad, bad, good, bad, bad, bad])]
    assert verdicts == [Verdict.BAD, Verdict.BAD, Verdict.GOOD, *[Verdict.BAD] * 2, Verdict.GO_BACK]
    assert g.progress.bad_steps == 5
    assert g.progress.streak_start == 3


def test_without_a_limit_bad_steps_are_only_counted() -> None:
    g = guard(max_bad_steps=0)
    assert {g.judge(n, result(updated=False)) for n in range(100)} == {Verdict.BAD}
    assert g.progress.bad_steps == 100


def test_an_fp16_scale_that_finds_its_way_down_is_no_accident() -> None:
    g = guard(max_bad_steps=2)
    scales = [2.0**n for n in range(16, 1, -1)]
    falling = [g.judge(n, result(updated=False, scale=scale)) for n, scale in enumerate(scales)]
    # The first one is not known to have fallen.
    assert set(falling) == {Verdict.BAD}
    at_the_floor = [g.judge(20 + n, result(updated=False, scale=1.0)) for n in range(2)]
    assert at_the_floor[-1] is Verdict.GO_BACK


def test_a_spike_is_measured_against_recent_losses() -> None:
    rng = np.random.default_rng(3)
    losses = 3.0 + 0.05 * rng.standard_normal(200)
    g = guard(spike_patience=2)
    assert {g.judge(n, result(x)) for n, x in enumerate(losses)} == {Verdict.GOOD}
    assert g.judge(200, result(3.25)) is Verdict.GOOD
    assert g.judge(201, result(3.45)) is Verdict.SPIKE
    assert g.judge(202, result(3.0)) is Verdict.GOOD
    assert g.progress.streak_start is None
    assert g.judge(203, result(4.0)) is Verdict.SPIKE
    assert g.judge(204, result(4.0)) is Verdict.GO_BACK
    assert g.progress.streak_start == 203
    # What spiked is not what later losses are measured against.
    assert max(g.progress.recent_losses) < 3.3


def test_nothing_is_a_spike_before_there_is_a_window_or_when_it_is_turned_off() -> None:
    g = guard()
    assert {g.judge(n, result(10.0**n)) for n in range(100)} == {Verdict.GOOD}
    g = guard(spike_sigma=0.0)
    assert {g.judge(n, result(3.0 + 10 * (n % 2))) for n in range(500)} == {Verdict.GOOD}


def test_at_most_one_false_alarm_in_ten_thousand_clean_steps() -> None:
    """A falling loss with noise that has memory and heavy tails, as training has."""
    rng = np.random.default_rng(11)
    noise, drift = rng.standard_t(5, 30_000), 0.0
    g = guard(spike_patience=1)
    alarms = 0
    for n, x in enumerate(noise):
        drift = 0.9 * drift + 0.02 * float(rng.standard_normal())
        loss = 2.0 + 5.0 / (1.0 + n / 500) + drift + 0.04 * float(x)
        alarms += g.judge(n, result(loss)) is not Verdict.GOOD
    assert alarms <= 3


def test_losses_that_hardly_move_are_no_spikes() -> None:
    g = guard(spike_patience=1)
    for n in range(200):
        g.judge(n, result(0.1 + 1e-7 * (n % 3)))
    assert g.judge(200, result(0.1001)) is Verdict.GOOD
    assert g.judge(201, result(0.11)) is Verdict.GO_BACK


def test_batches_left_out_move_the_others_up() -> None:
    progress = Progress()
    progress.leave_out(3, 5)
    assert [progress.batch(n) for n in range(6)] == [0, 1, 2, 5, 6, 7]
    progress.leave_out(6, 7)
    assert [progress.batch(n) for n in range(6)] == [0, 1, 2, 5, 7, 8]
    progress.leave_out(4, 6)
    assert progress.left_out == [(3, 7)]
    # Against going through all batches one by one.
    rng = np.random.default_rng(0)
    progress, gone = Progress(), set[int]()
    for _ in range(50):
        start = int(rng.integers(0, 300))
        end = start + int(rng.integers(1, 9))
        progress.leave_out(start, end)
        gone |= set(range(start, end))
        rest = [n for n in range(600) if n not in gone]
        assert [progress.batch(n) for n in range(200)] == rest[:200]


def test_going_back_remembers_what_the_checkpoint_does_not_know() -> None:
    g = guard(max_rollbacks=2)
    g.progress.leave_out(2, 4)
    g.progress.bad_steps = 7
    found = Progress(recent_losses=[1.0, 2.0], bad_steps=1)
    later = g.after_going_back(found, first=5, last=6)
    # Steps 5 and 6 trained on batches 7 and 8.
    assert later.left_out == [(2, 4), (7, 9)]
    assert (later.bad_steps, later.rollbacks, later.recent_losses) == (7, 1, [1.0, 2.0])
    assert found.left_out == []
    tired = guard(Progress(rollbacks=2), max_rollbacks=2)
    with pytest.raises(TrainingError, match=r"max_rollbacks = 2.*steps 6 to 7 \(batches 6 to 7\)"):
        tired.may_go_back(first=5, last=6)


def test_progress_survives_json_in_the_middle_of_a_streak() -> None:
    """A run cut between two bad steps judges the second one as if it had not been cut."""
    g = guard(max_bad_steps=3)
    steps = [result(), *[result(math.nan, updated=False)] * 2]
    for n, r in enumerate(steps):
        g.judge(n, r)
    g.progress.leave_out(1, 2)
    again = Progress.from_dict(json.loads(json.dumps(g.progress.to_dict())))
    assert again == replace(g.progress)
    assert guard(again, max_bad_steps=3).judge(3, steps[-1]) is Verdict.GO_BACK


def test_rollbacks_far_apart_are_forgiven() -> None:
    g = guard(Progress(rollbacks=2), forgive_after=5, max_bad_steps=3)
    for step in range(4):
        g.judge(step, result())
    g.judge(4, result(math.nan, updated=False))
    assert (g.progress.rollbacks, g.progress.good_steps) == (2, 4)
    assert g.after_going_back(Progress(), 4, 4).good_steps == 0
    g.judge(5, result())
    assert (g.progress.rollbacks, g.progress.good_steps) == (0, 0)
    g.judge(6, result())
    assert g.progress == Progress.from_dict(g.progress.to_dict())
    assert g.progress.good_steps == 0


def test_losses_of_other_data_are_no_spikes() -> None:
    g = guard(spike_patience=2)
    for step in range(200):
        g.judge(step, result(4.0 + 0.001 * (step % 5)))
    assert g.judge(200, result(4.3)) is Verdict.SPIKE
    g.progress.forget_losses()
    assert g.progress.streak_start is None
    assert {g.judge(201 + n, result(4.3)) for n in range(200)} == {Verdict.GOOD}
