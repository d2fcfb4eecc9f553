"""The Philox stream that Triton's kernels draw dropout from, in PyTorch, bit for bit.

Philox 4x32 with ten rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
as in ``triton/language/random.py``.  A number depends on the seed and its counter alone.
"""

import torch

_ROUNDS = 10
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_LOW = 0xFFFFFFFF

_TO_UNIT = 4.6566127342e-10
"""Triton's scale: the largest that keeps 2^31 - 1 below 1 in fp32."""


def words(seed: int, *counter: torch.Tensor | int) -> tuple[torch.Tensor, ...]:
    """Four random words for each counter, as ``tl.philox(seed, ...)`` gives them.

    Args:
        seed: 64 bits, signed or unsigned.
        counter: four words of 32 bits each, numbers or integer tensors that broadcast.

    Returns:
        Four int64 tensors with values in ``[0, 2^32)``.
    """
    c0, c1, c2, c3 = (torch.as_tensor(each, dtype=torch.int64) & _LOW for each in counter)
    key_0, key_1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(_ROUNDS):
        # Products wrap around at 64 bits, which leaves both halves right.
        product_a, product_b = c0 * _ROUND_A, c2 * _ROUND_B
        c0, c2 = (
            ((product_b >> 32) & _LOW) ^ c1 ^ key_0,
            ((product_a >> 32) & _LOW) ^ c3 ^ key_1,
        )
        c1, c3 = product_b & _LOW, product_a & _LOW
        key_0, key_1 = (key_0 + _KEY_A) & _LOW, (key_1 + _KEY_B) & _LOW
    return c0, c1, c2, c3


def signed(word: torch.Tensor) -> torch.Tensor:
    """A word as a signed 32-bit number, int64 in ``[-2^31, 2^31)``."""
    return word - ((word >> 31) << 32)


def drop_threshold(p: float) -> int:
    """The signed 32-bit number that a word must reach to be kept.

    Raises:
        ValueError: p is outside [0, 1).
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout must be in [0, 1), got {p}")
    return min(round(p * 2**32), 2**32 - 1) - 2**31


def uniform(seed: int, offset: torch.Tensor) -> torch.Tensor:
    """fp32 numbers in ``[0, 1)``: what ``tl.rand(seed, offset)`` gives for int64 offsets >= 0."""
    number = signed(words(seed, offset, offset >> 32, 0, 0)[0])
    return torch.where(number < 0, -number - 1, number).float() * _TO_UNIT
