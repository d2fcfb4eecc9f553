"""Which sequence a run trains on: the template's name and its sizes (paper 2.3, 3.1, 3.2)."""

from dataclasses import dataclass
from typing import Literal

from megatron_cogview.configs.errors import refuse

MAX_SHARD_TEXT = 64
"""Text ids a shard record can hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceConfig:
    """Template and sizes of one training sequence."""

    template: Literal["text_to_image", "super_resolution", "image_to_text"] = "text_to_image"
    """``text_to_image`` is P-SEQ-1, ``super_resolution`` P-SR-3, ``image_to_text`` P-CAP-1."""
    length: int = 1089
    """Ids of one sequence; the model sees one less, because labels are shifted by one (P-SEQ-3)."""
    text_budget: int = 61
    """Text ids that fit; the image is never cut for the sake of the text."""
    codes_per_side: tuple[int, ...] = (32,)
    """Side of each image grid, in the order of the template."""
    text_policy: Literal["reject", "truncate"] = "reject"
    """A caption over the budget: leave the pair out and count it, or cut the text."""

    def __post_init__(self) -> None:
        if not 0 <= self.text_budget <= MAX_SHARD_TEXT:
            raise refuse(
                "sequence.text_budget", self.text_budget, f"must be in 0..{MAX_SHARD_TEXT}"
            )
        wanted = 2 if self.template == "super_resolution" else 1
        if len(self.codes_per_side) != wanted or min(self.codes_per_side) < 1:
            raise refuse(
                "sequence.codes_per_side",
                self.codes_per_side,
                f"template {self.template!r} takes {wanted} positive grid side(s)",
            )

    @property
    def model_length(self) -> int:
        """Inputs of one sequence: ``length - 1``."""
        return self.length - 1

    @property
    def longest_text_region(self) -> int:
        """Ids before the first image code of a training sequence, at most: the text, ``[ROI1]``,
        ``[BASE]`` and ``[BOI1]``."""
        return self.text_budget + 3

    @property
    def num_image_tokens(self) -> int:
        """Image codes of one sequence, all grids together."""
        return sum(side * side for side in self.codes_per_side)
