"""Where the kernels find text and pivots: positions packed into slots, and the way back.

Everything is computed on the device that holds the pivot keys; nothing waits for it.  The plan does
not depend on tile sizes.  README.md states the invariant that it serves.

Shapes: B batch, K keys, P slots.
"""

from typing import NamedTuple

import torch

from megatron_cogview.kernels.pivot_attention.sampler import pivot_mask

FAR = 1 << 30
"""Position of an empty slot: behind every query, and small enough to add to."""


class Plan(NamedTuple):
    """Text and pivots of each sample of one layer.  int32; all empty if the window sees all."""

    slots_BP: torch.Tensor
    """Their positions, ascending, then :data:`FAR`."""
    slots_before_BK: torch.Tensor
    """How many of them stand before a position.  At the start of a query's window this is the
    number of slots that it visits."""
    slot_of_key_BK: torch.Tensor
    """The slot of a position, or -1."""


def make_plan(
    pivot_key_B2: torch.Tensor,
    num_keys: int,
    total_length: int,
    *,
    num_pivots: int,
    layer_number: int,
    seed: int,
    max_text: int | None = None,
    padding_B2: torch.Tensor | None = None,
) -> Plan:
    """Pack text and pivots of the whole sequence, of which ``num_keys`` tokens are known (P-ATT-7).

    Args:
        pivot_key_B2: int64 ``[B, 2]``: sample number, count of text-region tokens.
        num_keys, total_length: tokens known, and of the whole sequence.
        num_pivots: text and pivots together (P-ATT-4).
        layer_number, seed: see :func:`pivot_mask`.
        max_text: no sample has more text-region tokens.  Bounds the number of slots, which is
            ``total_length`` without it, because a count on the device cannot be waited for.
        padding_B2: int64 ``[B, 2]``, see :func:`pivot_mask`.

    Raises:
        ValueError: ``num_keys`` is larger than ``total_length``.
        RuntimeError: a sample has more text than ``max_text`` (on a GPU: a device assertion).
    """
    if num_keys > total_length:
        raise ValueError(f"num_keys = {num_keys} must not exceed total_length = {total_length}")
    num_slots = total_length
    if max_text is not None:
        num_slots = min(total_length, max(num_pivots, max_text))
        fits = (pivot_key_B2[:, 1] <= max_text).all()
        torch._assert_async(fits, f"a sample has more than max_text = {max_text} text tokens")
    chosen_BL = pivot_mask(
        pivot_key_B2, total_length, num_pivots, layer_number, seed, padding_B2=padding_B2
    )
    position_L = torch.arange(total_length, dtype=torch.int32, device=chosen_BL.device)
    slots_BL = torch.where(chosen_BL, position_L, FAR).sort(-1).values
    known_BK = chosen_BL[:, :num_keys]
    before_BK = known_BK.cumsum(-1, dtype=torch.int32) - known_BK.int()
    return Plan(
        slots_BP=slots_BL[:, :num_slots].contiguous(),
        slots_before_BK=before_BK,
        slot_of_key_BK=torch.where(known_BK, before_BK, -1),
    )


def dense_plan(batch_size: int, device: torch.device) -> Plan:
    """The plan of attention whose window covers everything: no slots."""
    nothing_B0 = torch.empty(batch_size, 0, dtype=torch.int32, device=device)
    return Plan(nothing_B0, nothing_B0.clone(), nothing_B0.clone())
