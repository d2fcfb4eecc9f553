"""FlexAttention over gathered pivots and all keys: the same key sets by PyTorch's own compiler.

Its blocks of 128 keys are skipped only if no key in them is seen, and pivots lie scattered over all
blocks.  Therefore the pivots are gathered in front of the keys, as ours gathers them, and the mask
shows a query its pivots there and its window behind.

Shapes: B batch, N heads, S sequence, D head dim, P pivots.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


class GatheredPrefix:
    """Keys, mask and attention for one set of pivots.

    Args:
        pivot_BP: of ``materialised.pivot_positions``.
        length: tokens of the sequence.
        window_block, window_blocks: tokens of a block (W), and blocks seen with the own (T).
    """

    def __init__(
        self, pivot_BP: Tensor, length: int, window_block: int, window_blocks: int
    ) -> None:
        self.pivot_BP, self.length = pivot_BP.int(), length
        batch, slots = pivot_BP.shape
        before = window_blocks - 1
        held_BP = self.pivot_BP
        self._index_B1P1 = pivot_BP.long().clamp(max=length - 1)[:, None, :, None]
        self._shape = (batch, None, length, slots + length, pivot_BP.device)

        def sees(b: Tensor, h: Tensor, query: Tensor, place: Tensor) -> Tensor:
            first = (query // window_block - before) * window_block
            position = place - slots
            in_window = (position >= first) & (position <= query)
            # Both sides are computed for all places, and the index must be one that exists.
            is_before = held_BP[b, place.clamp(max=slots - 1)] < first
            return torch.where(place < slots, is_before, in_window)

        # One function for all calls, or the compiler would start anew with each mask.
        self.sees = sees

    def mask(self, build: Any = create_block_mask) -> BlockMask:
        """Which blocks of keys a block of queries visits; anew for each layer and sample."""
        batch, heads, queries, keys, device = self._shape
        made: BlockMask = build(self.sees, batch, heads, queries, keys, device=device)
        return made

    def attention(self, q_BNSD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor, mask: BlockMask) -> Tensor:
        """``[B, N, S, D]``; pivots are gathered here, so that their gradient goes back to keys."""
        _, heads, _, head_dim = k_BNSD.shape
        index_BNPD = self._index_B1P1.expand(-1, heads, -1, head_dim)
        k, v = (torch.cat([x.gather(2, index_BNPD), x], 2) for x in (k_BNSD, v_BNSD))
        out_BNSD: Tensor = flex_attention(q_BNSD, k, v, block_mask=mask)
        return out_BNSD
