"""When a step went wrong: what is put up with, and when the run goes back.

A step that is not finite has changed nothing.  Several in a row, or a loss far above the recent
ones, send the run back to its last checkpoint; the batches that did it are left out from then on.
Knows losses and counts only; going back is the trainer's business.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from megatron_cogview.configs.errors import TrainingError
from megatron_cogview.configs.precision import PrecisionConfig
from megatron_cogview.configs.survival import SurvivalConfig
from megatron_cogview.engines.base import StepResult

LEAST_DEVIATION = 0.005
"""Part of the mean loss that a deviation counts as at least: a model that has learned its data by
heart has losses so even that any of them would be a spike."""


@dataclass
class Progress:
    """What a run must remember besides its step; every checkpoint's manifest holds it."""

    left_out: list[tuple[int, int]] = field(default_factory=list)
    """Ranges of batches (from, up to, the end excluded) that are not trained on, in order."""
    recent_losses: list[float] = field(default_factory=list)
    """Losses that a spike is measured against."""
    bad_steps: int = 0
    """Steps so far that were not finite."""
    rollbacks: int = 0
    """Times the run went back, as far as they count."""
    good_steps: int = 0
    """Good steps since the last of them; 0 without any."""
    streak_start: int | None = None
    """First of the steps in a row that were bad or spikes, up to the last; None: it was good."""
    bad_in_a_row: int = 0
    """Bad steps in a row, those not counted in which an fp16 scale was still falling."""
    spikes_in_a_row: int = 0
    """Spikes in a row."""
    last_scale: float = 0.0
    """Loss scale after the last step; 0 before the first."""
    owes_validation: bool = False
    """Whether validation behind the last step was left for the next start: the run had to stop."""

    def batch(self, step: int) -> int:
        """Number of the batch of step ``step`` (0 = the first): the batches left out are passed
        over, so everything after them moves up."""
        batch = step
        for start, end in self.left_out:
            if batch >= start:
                batch += end - start
        return batch

    def leave_out(self, start: int, end: int) -> None:
        """Pass over the batches ``start`` to ``end - 1`` from now on."""
        self.left_out = _merged([*self.left_out, (start, end)])

    def forget_losses(self) -> None:
        """What comes now cannot be compared with what was."""
        self.recent_losses, self.streak_start = [], None
        self.bad_in_a_row = self.spikes_in_a_row = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        value = dataclasses.asdict(self)
        return {**value, "left_out": [list(each) for each in self.left_out]}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Progress":
        """The inverse of :meth:`to_dict`."""
        left_out = [(int(start), int(end)) for start, end in value["left_out"]]
        return cls(**{**value, "left_out": left_out})


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same batches as ranges that neither touch nor overlap, in order."""
    result: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


class Verdict(Enum):
    """What became of a step."""

    GOOD = "good"
    BAD = "not finite"
    SPIKE = "spike"
    GO_BACK = "go back"


class Guard:
    """Judges steps one after the other.

    All ranks judge alike, because a step's result is the same on all of them.

    Args:
        survival: bounds.
        precision: tells an fp16 scale that still falls from one at its floor.
        progress: what is remembered; the guard writes into it.
    """

    def __init__(
        self, survival: SurvivalConfig, precision: PrecisionConfig, progress: Progress
    ) -> None:
        self.survival, self.precision = survival, precision
        self.progress = progress

    def judge(self, step: int, result: StepResult) -> Verdict:
        """What became of ``step`` (0 = the first)."""
        progress = self.progress
        last_scale, progress.last_scale = progress.last_scale, result.loss_scale
        if not result.updated:
            return self._judge_bad(step, last_scale)
        progress.bad_in_a_row = 0
        if self._is_spike(result.losses.total):
            progress.spikes_in_a_row += 1
            self._start_streak(step)
            patience = self.survival.spike_patience
            return Verdict.GO_BACK if progress.spikes_in_a_row >= patience else Verdict.SPIKE
        progress.spikes_in_a_row, progress.streak_start = 0, None
        recent = [*progress.recent_losses, result.losses.total]
        progress.recent_losses = recent[-self.survival.spike_window :]
        self._forgive()
        return Verdict.GOOD

    def _forgive(self) -> None:
        """Rollbacks far apart have nothing to do with each other."""
        progress = self.progress
        if progress.rollbacks:
            progress.good_steps += 1
            if progress.good_steps >= self.survival.forgive_after:
                progress.rollbacks = progress.good_steps = 0

    def _judge_bad(self, step: int, last_scale: float) -> Verdict:
        progress = self.progress
        progress.bad_steps += 1
        # The search for a scale that fits is not an accident, and ends by itself.
        if self.precision.min_loss_scale < progress.last_scale < last_scale:
            return Verdict.BAD
        progress.bad_in_a_row += 1
        self._start_streak(step)
        limit = self.survival.max_bad_steps
        return Verdict.GO_BACK if limit and progress.bad_in_a_row >= limit else Verdict.BAD

    def _start_streak(self, step: int) -> None:
        if self.progress.streak_start is None:
            self.progress.streak_start = step

    def _is_spike(self, loss: float) -> bool:
        sigma, window = self.survival.spike_sigma, self.survival.spike_window
        recent = self.progress.recent_losses[-window:]
        if not sigma or len(recent) < window:
            return False
        mean = math.fsum(recent) / window
        square = math.fsum((each - mean) ** 2 for each in recent) / window
        deviation = max(math.sqrt(square), LEAST_DEVIATION * abs(mean))
        return loss > mean + sigma * deviation

    def may_go_back(self, first: int, last: int) -> None:
        """Refuse one rollback too many, before anything is changed for it.

        Args:
            first, last: steps whose batches would be left out.

        Raises:
            TrainingError: it went back too often already.
        """
        batches = (self.progress.batch(first), self.progress.batch(last) + 1)
        if self.progress.rollbacks >= self.survival.max_rollbacks:
            raise TrainingError(
                f"step {last + 1}: the run went back {self.progress.rollbacks} times already "
                f"(survival.max_rollbacks = {self.survival.max_rollbacks}) and goes wrong again in "
                f"steps {first + 1} to {last + 1} (batches {batches[0] + 1} to {batches[1]}).  "
                "Look at these; lower optimizer.lr or set model.norm.relax_scope all, and raise "
                "survival.max_rollbacks to go on"
            )

    def after_going_back(self, found: Progress, first: int, last: int) -> Progress:
        """What the run remembers when it starts again from an older checkpoint.

        Args:
            found: what that checkpoint remembers.
            first, last: steps whose batches are to be left out.
        """
        later = dataclasses.replace(
            found,
            left_out=self.progress.left_out,
            bad_steps=self.progress.bad_steps,
            rollbacks=self.progress.rollbacks + 1,
            good_steps=0,
            owes_validation=False,
        )
        later.leave_out(self.progress.batch(first), self.progress.batch(last) + 1)
        return later
