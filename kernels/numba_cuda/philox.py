"""Philox4x32-10, the counter-based generator behind dropout [1]_.

The bit of a weight is found from its position alone, so that every kernel draws the same.

.. [1] Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011,
   section 3.3.
"""

from __future__ import annotations

import numpy as np

from .compile import device

MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


@device
def philox(c0, c1, c2, c3, k0, k1):
    """Return four 32-bit words for a counter of four and a key of two, all held in uint64."""
    for _ in range(10):
        x, y = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (y >> HALF) ^ c1 ^ k0, y & LOW, (x >> HALF) ^ c3 ^ k1, x & LOW
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return c0, c1, c2, c3
