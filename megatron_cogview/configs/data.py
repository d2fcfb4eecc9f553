"""Where training data comes from."""

from dataclasses import dataclass

from megatron_cogview.configs.errors import refuse

SPLIT_STEPS = (*range(100), *range(100, 10_001, 10))
"""Validation fractions that shards are prepared for, in ten-thousandths."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Token shards for the GPT."""

    shards: tuple[str, ...] = ()
    """Folders with ``manifest.json``, as written by ``tools/tokenize_dataset.py``."""
    weights: tuple[float, ...] = ()
    """Share of the samples drawn from each folder, in any unit; without, all folders are one, and
    every record is seen equally often."""
    validation_fraction: float = 0.01
    """Records kept out of training for the validation loss, chosen by a hash of their ids: a
    multiple of 0.0001 below 0.01, of 0.001 above."""
    seed: int = 1234
    """Key of the shuffle; the split does not depend on it."""
    accept_changes: bool = False
    """Go on from a checkpoint although the shards are no longer those it was trained on, because
    data was added: the order of the samples changes, and some may be seen again."""
    verify_crc: bool = True
    """Check each record's CRC32 when it is read."""
    prefetch: int = 0
    """Steps whose batches are made ahead, in a thread; 0: when they are asked for, which takes a
    millisecond from a warm page cache."""

    def __post_init__(self) -> None:
        fraction = self.validation_fraction
        if not 0.0 <= fraction < 1.0:
            raise refuse("data.validation_fraction", fraction, "must be in [0, 1)")
        if round(fraction * 10_000, 6) not in SPLIT_STEPS:
            near = sorted(SPLIT_STEPS, key=lambda step: abs(step - fraction * 10_000))[:2]
            raise refuse(
                "data.validation_fraction",
                fraction,
                "must be a multiple of 0.0001 below 0.01 and of 0.001 above, for example "
                f"{near[0] / 10_000} or {near[1] / 10_000}",
            )
        if self.weights and len(self.weights) != len(self.shards):
            raise refuse(
                "data.weights",
                self.weights,
                f"must name one weight for each of the {len(self.shards)} data.shards",
            )
        if self.weights and not (min(self.weights) >= 0.0 and 0 < sum(self.weights) < 1e300):
            raise refuse("data.weights", self.weights, "must be at least 0, and one of them above")
        if len(set(self.shards)) != len(self.shards):
            raise refuse("data.shards", self.shards, "names a folder twice; use data.weights")
        if self.prefetch < 0:
            raise refuse("data.prefetch", self.prefetch, "must be at least 0")
