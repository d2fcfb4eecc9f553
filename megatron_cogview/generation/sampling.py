"""Drawing the next id.  Randomness is a function of (seed, sample, step) and of nothing else.

So a picture does not depend on its batch, on the order of prompts in it, or on the parallel
layout.  Shapes: B samples, V ids that may be drawn.
"""

import numpy as np
import torch
from numpy.typing import NDArray

_GOLDEN, _MIX_1, _MIX_2 = (
    np.uint64(0x9E3779B97F4A7C15),
    np.uint64(0xBF58476D1CE4E5B9),
    np.uint64(0x94D049BB133111EB),
)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finaliser of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def uniforms(seed: int, samples_B: NDArray[np.int64], step: int) -> NDArray[np.float64]:
    """One number in [0, 1) per sample.

    Args:
        seed: of the whole generation.
        samples_B: number of each sample.
        step: how many ids have been drawn before.
    """
    with np.errstate(over="ignore"):
        state = _mix(np.full(samples_B.shape, seed, np.int64).view(np.uint64) + _GOLDEN)
        state = _mix(state + samples_B.astype(np.int64).view(np.uint64) * _GOLDEN)
        state = _mix(state + np.uint64(step + 1) * _GOLDEN)
    return (state >> np.uint64(11)).astype(np.float64) / 2.0**53


def draw(
    logits_BV: torch.Tensor, uniforms_B: torch.Tensor, temperature: float, top_k: int
) -> torch.Tensor:
    """Ids drawn by inverting the cumulative distribution, in fp64.

    Args:
        logits_BV: of the ids that may be drawn.
        uniforms_B: numbers in [0, 1).
        temperature: divides the logits; 0 takes the largest.
        top_k: ids below the k-th largest logit are never drawn; 0 keeps all.

    Returns:
        int64 ``[B]``.
    """
    logits_BV = logits_BV.double()
    if temperature == 0:
        return logits_BV.argmax(-1)
    if 0 < top_k < logits_BV.shape[-1]:
        smallest_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, float("-inf"))
    cumulative_BV = torch.softmax(logits_BV / temperature, -1).cumsum(-1)
    # Rounding may leave the last sum a little below 1, and a uniform above it.
    target_B1 = uniforms_B.to(cumulative_BV)[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(-1)
