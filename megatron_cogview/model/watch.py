"""The largest activation and attention score of each layer: an overflow's early warning.

Hooks look on while a step runs; they change neither its results nor any random state.

Shapes: S queries, K keys, B batch, N heads of this rank, D head dim, H hidden.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_cogview.configs.run import RunConfig
from megatron_cogview.model.attention import CogViewCoreAttention
from megatron_cogview.model.cogview import CogViewModel

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

ACTIVATION, SCORE = "activation_max", "attention_score_max"

SCORES_AT_ONCE = 2**24
"""Attention scores held in memory at a time, in fp32."""


class ActivationWatch:
    """Watches the layers of this rank during the steps it is armed for.

    In a step it is not armed for it has no part at all.  Under recomputation a layer is seen twice,
    which a maximum does not mind.

    Args:
        chunks: this rank's parts of the model.
        config: the run.
    """

    def __init__(self, chunks: Sequence[CogViewModel], config: RunConfig) -> None:
        self.layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
        self.num_layers = config.model.num_layers
        self._hooks: list[RemovableHandle] = []
        device = next(chunks[0].parameters()).device
        # One row each of activations and scores; fp32 holds a half-precision maximum exactly.
        self._largest_2L = torch.zeros(2, self.num_layers, device=device)

    def arm(self) -> None:
        """Watch everything from now on, until :meth:`read`."""
        self._remove_hooks()
        self._largest_2L.zero_()
        for layer in self.layers:
            core = layer.self_attention.core_attention
            row = layer.layer_number - 1
            self._hooks += [
                layer.register_forward_hook(partial(self._saw_layer, row)),
                core.register_forward_pre_hook(partial(self._saw_attention, row)),
            ]

    def read(self) -> dict[str, float]:
        """Stop watching.  All ranks call it together, and all get the same answer.

        Returns:
            ``activation_max/layer_03``, the largest absolute value of what layer 3 (1 = the first)
            gives to the next, and ``attention_score_max/layer_03``, that of its ``q k / sqrt(d)``
            over the keys a query sees.  Infinite where there was a NaN.
        """
        self._remove_hooks()
        # What the maximum of a NaN is differs between backends.
        largest_2L = torch.nan_to_num(self._largest_2L, nan=torch.inf, posinf=torch.inf)
        dist.all_reduce(largest_2L, op=dist.ReduceOp.MAX)
        width = max(2, len(str(self.num_layers)))
        return {
            f"{kind}/layer_{number:0{width}}": value
            for kind, row in zip((ACTIVATION, SCORE), largest_2L.tolist(), strict=True)
            for number, value in enumerate(row, 1)
        }

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _saw(self, kind: int, row: int, value: torch.Tensor) -> None:
        place = self._largest_2L[kind, row]
        torch.maximum(place, value.to(place), out=place)

    @torch.no_grad()
    def _saw_layer(self, row: int, layer: torch.nn.Module, inputs: Any, output: Any) -> None:
        self._saw(0, row, largest_size(output[0]))

    @torch.no_grad()
    def _saw_attention(self, row: int, core: CogViewCoreAttention, inputs: Any) -> None:
        query, key, _, pivot_key_B2 = inputs[:4]
        self._saw(1, row, largest_score(core, query, key, pivot_key_B2))


def largest_size(x: torch.Tensor) -> torch.Tensor:
    """Largest absolute value, without a copy of the tensor; NaN if there is one."""
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high).float()


def largest_score(
    core: CogViewCoreAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    pivot_key_B2: torch.Tensor | None,
) -> torch.Tensor:
    """Largest absolute ``q k / sqrt(d)`` over the keys that queries see, in fp32.

    Fused attention never shows its scores, so they are computed again, a part at a time.

    Args:
        core: says which keys are seen.
        query, key: as the core attention gets them, ``[S, B, N, D]`` and ``[K, B, N, D]``.
        pivot_key_B2: keys of the pivot sampler (three-region attention only).
    """
    num_queries, batch, heads, dim = query.shape
    num_keys = key.shape[0]
    visible = core.visible(num_queries, num_keys, query.device, pivot_key_B2)
    visible_BSK = visible.reshape(-1, num_queries, num_keys)
    rows = max(1, SCORES_AT_ONCE // (heads * num_keys))
    largest = torch.zeros((), device=query.device)
    for b in range(batch):
        # Scores of half-precision products may overflow, which is just what is looked for.
        key_NDK = key[:, b].float().permute(1, 2, 0)
        visible_SK = visible_BSK[min(b, len(visible_BSK) - 1)]
        for start in range(0, num_queries, rows):
            part = slice(start, start + rows)
            # Keys behind the last query of the part are seen by none of it.
            end = num_keys - num_queries + min(start + rows, num_queries)
            query_NRD = query[part, b].float().permute(1, 0, 2) / math.sqrt(dim)
            scores_NRK = query_NRD @ key_NDK[..., :end]
            # Filled, not multiplied: an infinite score that nobody sees must not count as NaN.
            scores_NRK.masked_fill_(~visible_SK[part, :end], 0.0)
            largest = torch.maximum(largest, largest_size(scores_NRK))
    return largest
