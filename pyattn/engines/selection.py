"""Which keys score highest, exactly, without an array of all scores.

Letters: B batch items, H query heads, G key/value heads, N queries, M keys, D width.
"""

from __future__ import annotations

import math

import numpy as np

from .. import arrays, dispatch
from ..arrays import Array
from ..masks.block_mask import BlockMask
from .problem import Problem


def select_keys(q: Array, k: Array, blocks: BlockMask, layout: np.ndarray, q_lengths: np.ndarray,
                kv_lengths: np.ndarray, *, top: int, scale: float,
                threshold: float | None = None) -> np.ndarray:
    """Return the keys of the highest ``scale * q.k`` among those that each query may see.

    Parameters
    ----------
    q : array, shape (B, H, N, D)
    k : array, shape (B, G, M, D)
    blocks, layout : BlockMask, and int (B, H)
        Which pairs are allowed: the layout that each item and head reads.
    q_lengths, kv_lengths : int array, shape (B,)
        Tokens from here on are padding.
    top, scale
        How many keys at most; the scale.
    threshold : float, optional
        Keys must score above it.

    Returns
    -------
    int32 array on the host, shape (B, H, N, min(top, M))
        Ascending, and -1 behind them where there are fewer. Of equal scores those of the lowest
        index are taken; NaN counts as the highest. Scores are float32, or float64 for float64.
    """
    xp = arrays.namespace(q, k)
    scales = xp.full((q.shape[1],), scale, dtype=arrays.accumulator(xp, q), device=arrays.device(q))
    problem = Problem(q, k, k, scales, blocks, np.ascontiguousarray(layout, np.int32), q_lengths,
                      kv_lengths)
    floor = -math.inf if threshold is None else threshold
    found, = arrays.decided(dispatch.kernel("selection", problem, q).forward(problem, top, floor))
    return found
