"""Batch: the tensors that the model and its loss take.  Knows nothing of where they come from.

Shapes: B sequences, S inputs of each (``sequence.length - 1``).
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_cogview.data.dataset import Sequences


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch."""

    tokens_BS: torch.Tensor
    """Input ids, int64."""
    labels_BS: torch.Tensor
    """Next ids, int64."""
    positions_BS: torch.Tensor
    """Positions of the inputs, int64."""
    loss_weights_BS: torch.Tensor
    """Weights of the labels, float32; 0 on padding."""
    pivot_key_B2: torch.Tensor
    """What draws the pivots of sparse attention, int64: the global number of the consumed sample,
    and the inputs before the first image code (for text-to-image ``[ROI1]``, text, ``[BASE]``,
    ``[BOI1]``), which are all attended to (P-ATT-1)."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self)}
        return Batch(**moved)


def make_batch(sequences: Sequences, samples: NDArray[np.int64]) -> Batch:
    """Tensors of ``sequences``; ``samples`` are their global numbers, ``[B]``."""
    pivot_key_B2 = np.stack([samples, sequences.text_region_N], axis=1)
    return Batch(
        tokens_BS=_tensor(sequences.tokens_NS),
        labels_BS=_tensor(sequences.labels_NS),
        positions_BS=_tensor(sequences.positions_NS),
        loss_weights_BS=_tensor(sequences.loss_weights_NS),
        pivot_key_B2=_tensor(pivot_key_B2),
    )


def _tensor(array: NDArray[np.generic]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
