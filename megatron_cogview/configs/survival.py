"""What a run does when something goes wrong: bad steps, spikes of the loss, hangs, slow ranks."""

from dataclasses import dataclass

from megatron_cogview.configs.errors import refuse


@dataclass(frozen=True, kw_only=True, slots=True)
class SurvivalConfig:
    """Bounds of what is put up with.

    A step whose loss or gradient is not finite changes nothing on any rank and is counted.  What
    stands here says when that, or a loss far above the recent ones, sends the run back to its last
    checkpoint, from where it goes on without the batches that did it.
    """

    max_bad_steps: int = 8
    """Steps in a row that are not finite before the run rolls back; in fp16 a step refused while
    the loss scale still falls counts for nothing.  0: never roll back."""
    spike_sigma: float = 6.0
    """A loss is a spike when it is this many standard deviations above the mean of recent ones.
    0: no loss is."""
    spike_window: int = 128
    """Losses that mean and deviation are taken over; before there are so many, nothing is a
    spike."""
    spike_patience: int = 2
    """Spikes in a row before the run rolls back."""
    max_rollbacks: int = 4
    """Rollbacks after which the run gives up, with what it knows about the batches."""
    forgive_after: int = 1000
    """Good steps after which the rollbacks before them no longer count."""
    skip_steps: tuple[int, ...] = ()
    """Batches (counted from 1, as the steps of a run that never went back) that are not trained on:
    their steps change nothing."""
    hang_timeout_seconds: float = 1800.0
    """A rank that waits so long for the others names the late ones, dumps stacks and ends the run.
    0: wait for ever.  It must exceed the longest step; validating, loading and saving may take four
    times as long."""
    straggler_factor: float = 1.15
    """A rank that needs so many times the median of its pipeline stage to do its own part of a step
    is reported.  0: nobody is."""

    def __post_init__(self) -> None:
        for name in ("max_bad_steps", "max_rollbacks"):
            if getattr(self, name) < 0:
                raise refuse(f"survival.{name}", getattr(self, name), "must not be negative")
        for name in ("spike_sigma", "hang_timeout_seconds"):
            if not 0 <= getattr(self, name) < 1e9:
                raise refuse(f"survival.{name}", getattr(self, name), "must be 0 or above, finite")
        if self.spike_window < 8:
            raise refuse("survival.spike_window", self.spike_window, "must be at least 8")
        for name in ("spike_patience", "forgive_after"):
            if getattr(self, name) < 1:
                raise refuse(f"survival.{name}", getattr(self, name), "must be at least 1")
        if self.straggler_factor != 0 and not self.straggler_factor > 1:
            raise refuse("survival.straggler_factor", self.straggler_factor, "must be 0 or above 1")
        if any(step < 1 for step in self.skip_steps):
            raise refuse("survival.skip_steps", self.skip_steps, "are counted from 1")
