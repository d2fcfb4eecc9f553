"""The paper's token loss: weighted sums, split by modality (P-LOSS-1).

Shapes: B batch, S sequence.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_cogview.configs.vocab import VocabConfig

SUMS = ("total", "total_weight", "text", "text_count", "image", "image_count")
"""Rows of the vector that ranks and micro-batches add up."""


@dataclass(frozen=True, slots=True)
class Losses:
    """Means over a global batch; the mean of no labels is NaN."""

    total: float
    """Sum of weight times loss, over the sum of weights."""
    text: float
    """Mean loss of text labels: every label that is neither an image code nor padding."""
    image: float
    """Mean loss of image-code labels."""
    sums: tuple[float, ...]
    """What they are the means of (:data:`SUMS`)."""

    @classmethod
    def from_sums(cls, sums: Sequence[float]) -> "Losses":
        """From the numbers named by :data:`SUMS`."""
        v = dict(zip(SUMS, sums, strict=True))

        def mean(value: float, count: float) -> float:
            return value / count if count > 0 else float("nan")

        return cls(
            total=mean(v["total"], v["total_weight"]),
            text=mean(v["text"], v["text_count"]),
            image=mean(v["image"], v["image_count"]),
            sums=tuple(sums),
        )

    @classmethod
    def of_all(cls, parts: Sequence["Losses"]) -> "Losses":
        """Means over several global batches; each label counts once, in whatever batch it is."""
        return cls.from_sums(
            [math.fsum(each) for each in zip(*(p.sums for p in parts), strict=True)]
        )


def loss_sums(
    losses_BS: torch.Tensor, weights_BS: torch.Tensor, labels_BS: torch.Tensor, vocab: VocabConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of a micro-batch's losses, and the sums to report.

    Args:
        losses_BS: cross-entropy of each label, any float type.
        weights_BS: weight of each label; padding weighs 0.
        labels_BS: global ids.
        vocab: tells image codes, text and padding apart.

    Returns:
        The differentiable weighted sum (fp32 scalar), and a detached float64 vector (:data:`SUMS`).
    """
    losses_BS = losses_BS.float()
    weighted = (losses_BS * weights_BS).sum()
    plain_BS = losses_BS.detach().double()
    # Rows of weight 0 throughout fill up a last validation batch and count nowhere.
    counted_B1 = (weights_BS > 0).any(-1, keepdim=True)
    is_image_BS = (labels_BS < vocab.num_image_codes) & counted_B1
    is_padding_BS = labels_BS == vocab.command_id("[PAD]")
    is_text_BS = (labels_BS >= vocab.num_image_codes) & ~is_padding_BS & counted_B1
    rows = [(plain_BS * weights_BS).sum(), weights_BS.double().sum()]
    for mask_BS in (is_text_BS, is_image_BS):
        rows += [(plain_BS * mask_BS).sum(), mask_BS.sum().double()]
    return weighted, torch.stack(rows)
