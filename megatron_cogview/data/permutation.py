"""A keyed permutation of ``[0, size)`` without a table (AD-6).

A balanced Feistel network over the next power of four, with cycle walking: an image outside the
range is permuted again until it lies inside.  No state, no memory that grows with ``size``.
Not cryptographic.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDS = 6
MAX_SIZE = 1 << 62

Words = NDArray[np.uint64]


def derive_key(*parts: int) -> np.uint64:
    """One 64-bit key from whole numbers; every part and its place matter."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        key = _mix(key + np.uint64(part % (1 << 64)) + np.uint64(0x9E3779B97F4A7C15))
    return np.uint64(key[0])


def permute(index: ArrayLike, size: int, key: ArrayLike) -> NDArray[np.int64]:
    """Images of ``index`` under the permutation of ``[0, size)`` named by ``key``.

    ``key`` is one number or one per index.  Shape of the result: that of ``index``.

    Raises:
        IndexError: an index outside the range.
    """
    values = np.asarray(index)
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"size = {size}: must be in 1..2**62")
    if values.size and (int(values.min()) < 0 or int(values.max()) >= size):
        raise IndexError(f"index outside 0..{size - 1}")
    words = values.astype(np.uint64).ravel()
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64), values.shape).ravel()
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    limit = np.uint64(size)
    words = _feistel(words, keys, half)
    outside = np.flatnonzero(words >= limit)
    while outside.size:
        walked = _feistel(words[outside], keys[outside], half)
        words[outside] = walked
        outside = outside[walked >= limit]
    return words.astype(np.int64).reshape(values.shape)


def _feistel(words: Words, keys: Words, half: int) -> Words:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = words >> bits, words & mask
    for turn in range(ROUNDS):
        salt = np.uint64((turn + 1) * 0xD1342543DE82EF95 % (1 << 64))
        left, right = right, left ^ (_mix(_mix(right + salt) + keys) & mask)
    return (left << bits) | right


def _mix(words: Any) -> Words:
    """A 64-bit finaliser: xor-shifts and odd multipliers, each bit depends on all."""
    words = words ^ (words >> np.uint64(32))
    words = words * np.uint64(0xD6E8FEB86659FD93)
    words = words ^ (words >> np.uint64(29))
    words = words * np.uint64(0xA0761D6478BD642F)
    return np.asarray(words ^ (words >> np.uint64(32)), dtype=np.uint64)
