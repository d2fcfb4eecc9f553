"""Weighted mixtures of data sets: which set the n-th sample of a run comes from.

Samples are dealt in blocks.  Each block gives every set its exact quota, in an order that a keyed
permutation decides, so the answer for any sample number needs that block alone: nothing is stored,
and no set runs ahead of its share by more than one block.
"""

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_cogview.data.permutation import derive_key, permute

logger = logging.getLogger(__name__)

BLOCK = 1 << 14
"""Samples of one block; weights are rounded to multiples of its inverse."""
MIXTURE_KEY = 0x3171_7572

Numbers = NDArray[np.int64]


def quotas(weights: Sequence[float]) -> Numbers:
    """Samples of each set in a block: weights rounded by largest remainder.

    A set with a weight above 0 gets at least one.
    """
    shares = np.asarray(weights, dtype=np.float64)
    exact = shares / shares.sum() * BLOCK
    result = np.maximum(np.floor(exact).astype(np.int64), shares > 0)
    for chosen in np.argsort(result - exact, kind="stable")[: max(0, BLOCK - int(result.sum()))]:
        result[chosen] += 1
    # Raising tiny weights to one sample takes those samples from the largest set.
    result[np.argmax(result)] -= int(result.sum()) - BLOCK
    return np.asarray(result)


class Mixture:
    """Sample numbers of a run -> sets and sample numbers within them."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        """Take one weight per set, in any unit; at least one is above 0."""
        self.quotas = quotas(weights)
        self._seed = seed
        nothing = np.zeros(0, dtype=np.int64)
        self._latest: tuple[int, Numbers, Numbers] = (-1, nothing, nothing)
        shares = self.quotas / BLOCK
        logger.info("mixture: %s of the samples", ", ".join(f"{s:.3%}" for s in shares))
        wanted = np.asarray(weights, dtype=np.float64) / float(np.sum(weights))
        for number in np.flatnonzero(np.abs(shares - wanted) > 0.05 * wanted).tolist():
            logger.warning(
                "data.weights: set %d gets %.4f %% of the samples instead of %.4f %%; shares are "
                "multiples of 1/%d",
                number, 100 * shares[number], 100 * wanted[number], BLOCK,
            )  # fmt: skip

    def deal(self, samples: Numbers) -> tuple[Numbers, Numbers]:
        """Set of each sample, and how many samples of that set come before it."""
        chosen, within = np.empty_like(samples), np.empty_like(samples)
        block, place = np.divmod(samples, BLOCK)
        for number in np.unique(block).tolist():
            mask = block == number
            sets, before = self._block(number)
            chosen[mask] = sets[place[mask]]
            within[mask] = number * self.quotas[chosen[mask]] + before[place[mask]]
        return chosen, within

    def _block(self, number: int) -> tuple[Numbers, Numbers]:
        """Set of each sample of a block, and the samples of that set before it in the block."""
        latest = self._latest
        if latest[0] == number:
            return latest[1], latest[2]
        slots = permute(np.arange(BLOCK), BLOCK, derive_key(self._seed, MIXTURE_KEY, number))
        sets = np.searchsorted(np.cumsum(self.quotas), slots, side="right")
        before = np.empty_like(sets)
        for each in range(len(self.quotas)):
            mask = sets == each
            before[mask] = np.arange(int(mask.sum()))
        # Only the last block is kept: samples are asked for in order.
        self._latest = (number, sets, before)
        return sets, before
