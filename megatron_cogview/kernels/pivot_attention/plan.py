"""Where the kernels find text and pivots: positions packed into slots, and the way back.

Everything is computed on the device that holds the pivot keys; nothing waits for it.  The plan does
not depend on tile sizes.  README.md states the invariant that it serves.

Shapes: B batch, L tokens of the whole sequence, P slots.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from megatron_cogview.kernels.pivot_attention.sampler import chosen, draws

Draw = Callable[[torch.Tensor, int, int, int, torch.Tensor | None], torch.Tensor]

FAR = 1 << 30
"""Position of an empty slot: behind every query, and small enough to add to."""


class Plan(NamedTuple):
    """Text and pivots of each sample of one layer.  int32; all empty if the window sees all."""

    slots_BP: torch.Tensor
    """Their positions, ascending, then :data:`FAR`."""
    slots_before_BL: torch.Tensor
    """How many of them stand before a position.  At the start of a query's window this is the
    number of slots that it visits."""
    slot_of_key_BL: torch.Tensor
    """The slot of a position, or -1."""


def make_plan(
    pivot_key_B2: torch.Tensor,
    total_length: int,
    *,
    num_pivots: int,
    layer_number: int,
    seed: int,
    max_text: int | None = None,
    padding_B2: torch.Tensor | None = None,
    draw: Draw = draws,
) -> Plan:
    """Pack text and pivots of the whole sequence.  Decoding, which knows only its first tokens, has
    the same plan at every step (P-ATT-7).

    Args:
        pivot_key_B2: int64 ``[B, 2]``: sample number, count of text-region tokens.
        total_length: L, tokens of the whole sequence.
        num_pivots: text and pivots together (P-ATT-4).
        layer_number, seed: see :func:`pivot_mask`.
        max_text: no sample has more text-region tokens.  Bounds the number of slots, which is
            ``total_length`` without it, because a count on the device cannot be waited for.
        padding_B2: int64 ``[B, 2]``, see :func:`pivot_mask`.
        draw: computes what :func:`sampler.draws` does.

    Raises:
        RuntimeError: a sample has more text than ``max_text`` (on a GPU: a device assertion).
    """
    num_slots = total_length
    if max_text is not None:
        num_slots = min(total_length, max(num_pivots, max_text))
        fits = (pivot_key_B2[:, 1] <= max_text).all()
        torch._assert_async(fits, f"a sample has more than max_text = {max_text} text tokens")
    draw_BL = draw(pivot_key_B2, total_length, layer_number, seed, padding_B2)
    chosen_BL = chosen(draw_BL, num_pivots)
    position_L = torch.arange(total_length, dtype=torch.int32, device=chosen_BL.device)
    slots_BL = torch.where(chosen_BL, position_L, FAR).sort(-1).values
    before_BL = chosen_BL.cumsum(-1, dtype=torch.int32) - chosen_BL.int()
    return Plan(
        slots_BP=slots_BL[:, :num_slots].contiguous(),
        slots_before_BL=before_BL,
        slot_of_key_BL=torch.where(chosen_BL, before_BL, -1),
    )


def dense_plan(batch_size: int, device: torch.device) -> Plan:
    """The plan of attention whose window covers everything: no slots."""
    nothing_B0 = torch.empty(batch_size, 0, dtype=torch.int32, device=device)
    return Plan(nothing_B0, nothing_B0.clone(), nothing_B0.clone())
