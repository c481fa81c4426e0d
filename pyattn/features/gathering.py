"""Tokens gathered by lists of them, and spread out again: each is the other's backward.

Letters: I items (batch items and heads in one), N tokens, S slots, D width.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array


def take_tokens(x: Array, index: np.ndarray) -> Array:
    """Return the listed tokens of `x` (I, N, D), (I, S, D); zeros where the index is -1.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features.gathering import spread_tokens, take_tokens
    >>> index = np.array([[2, 0, 2, -1]])
    >>> taken = take_tokens(np.array([[[1.0], [2.0], [3.0]]]), index)
    >>> taken.ravel(), spread_tokens(taken, index, 3).ravel()
    (array([3., 1., 3., 0.]), array([1., 0., 6.]))
    """
    xp = arrays.namespace(x)
    items, tokens, width = x.shape
    if not tokens:
        return xp.zeros((*index.shape, width), dtype=x.dtype, device=arrays.device(x))
    row = np.arange(items)[:, None] * tokens + np.maximum(index, 0)
    found = xp.take(arrays.reshape(xp, x, (items * tokens, width)), _moved(xp, row.ravel(), x),
                    axis=0)
    found = arrays.reshape(xp, found, (*index.shape, width))
    if (index >= 0).all():
        return found
    return xp.where(_moved(xp, (index >= 0)[..., None], x), found, xp.zeros_like(found))


def spread_tokens(x: Array, index: np.ndarray, tokens: int) -> Array:
    """Return (I, tokens, D): of each token the sum of those slots of `x` (I, S, D) that list it.

    The sum has one order, that of the slots, and is carried in float32, float64 for float64.
    """
    xp = arrays.namespace(x)
    items, _, width = x.shape
    dtype = x.dtype
    x = arrays.cast(xp, x, arrays.accumulator(xp, x))
    rows = arrays.reshape(xp, x, (index.size, width))
    shape = items * tokens, width
    slots = np.flatnonzero(index >= 0)
    place = (np.arange(items)[:, None] * tokens + index).ravel()[slots]
    if type(x) is np.ndarray:
        import scipy.sparse

        lists = scipy.sparse.csr_array((np.ones(slots.size, x.dtype), (place, slots)),
                                       shape=(shape[0], index.size))
        return arrays.cast(xp, (lists @ rows).reshape(items, tokens, width), dtype)
    out = xp.zeros(shape, dtype=x.dtype, device=arrays.device(x))
    if slots.size:
        count = np.bincount(place, minlength=shape[0])
        order, start, times = (_moved(xp, given, x) for given in (
            slots[np.argsort(place, kind="stable")], np.cumsum(count) - count, count))
        # turn after turn: the first slot that lists a token, the second, ...
        for turn in range(int(count.max())):
            held = times > turn
            slot = xp.take(order, xp.where(held, start + turn, 0))
            found = xp.take(rows, slot, axis=0)
            out = out + xp.where(held[:, None], found, xp.zeros_like(found))
    return arrays.cast(xp, arrays.reshape(xp, out, (items, tokens, width)), dtype)


def _moved(xp: Any, x: np.ndarray, like: Array) -> Array:
    return x if type(like) is np.ndarray else arrays.from_host(xp, x, arrays.device(like))
