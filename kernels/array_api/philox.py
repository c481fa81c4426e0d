"""Philox4x32-10, the counter-based generator behind dropout, on NumPy arrays.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3. The bit drawn
for a weight depends on its positions alone, so any backend and any order of tiles draws the same.
"""

from __future__ import annotations

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox(counter: tuple[np.ndarray, ...], seed: int) -> tuple[np.ndarray, ...]:
    """Four uint32 words for each counter of four uint32 words (broadcast together)."""
    c0, c1, c2, c3 = (np.asarray(c).astype(np.uint32).astype(np.uint64) for c in counter)
    key0, key1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((product1 >> _HALF) ^ c1 ^ np.uint64(key0), product1 & _LOW,
                          (product0 >> _HALF) ^ c3 ^ np.uint64(key1), product0 & _LOW)
        key0, key1 = (key0 + _WEYL[0]) & 0xFFFFFFFF, (key1 + _WEYL[1]) & 0xFFFFFFFF
    return tuple(word.astype(np.uint32) for word in np.broadcast_arrays(c0, c1, c2, c3))


def kept(rate: float, seed: int, streams: np.ndarray, heads: np.ndarray, q_positions: np.ndarray,
         k_positions: np.ndarray) -> np.ndarray:
    """Which weights survive dropout; all but `rate` and `seed` broadcast over the scores."""
    words = philox((k_positions >> 2, q_positions, heads, streams), seed)
    lane = k_positions & 3
    word = np.select([lane == 0, lane == 1, lane == 2], words[:3], words[3])
    return word >= np.uint32(rate * 2.0**32)
