"""The largest of each row, chosen where the scores live."""

from __future__ import annotations

from typing import Any

from pyattn.arrays import device, namespace

Array = Any


def best(scores: Array, eligible: Array, count: int) -> tuple[Array, Array]:
    """Return where the `count` largest eligible scores of each row are, the largest first.

    Of equal scores those of the lowest index come first, and each row must be free of NaN where it
    is eligible.

    Parameters
    ----------
    scores : float array, shape (..., M)
    eligible : bool array, shape (..., M)
    count : int

    Returns
    -------
    tuple of int and bool arrays, shape (..., min(count, M))
        Indices, and which of them count: fewer may be eligible.
    """
    xp, largest = namespace(scores), float(namespace(scores).finfo(scores.dtype).max)
    # -inf is better than what is not eligible
    key = xp.where(-scores < largest, -scores, largest)
    key = xp.where(eligible, key, float("inf"))
    order = xp.argsort(key, axis=-1, stable=True)[..., :min(count, scores.shape[-1])]
    return order, xp.take_along_axis(eligible, order, axis=-1)


def ascending(index: Array, held: Array, limit: int) -> Array:
    """Return the indices held, below `limit`, ascending along the last axis, then -1; int32."""
    xp = namespace(index)
    listed = xp.sort(xp.astype(xp.where(held, index, limit), xp.int32), axis=-1)
    return xp.where(listed < limit, listed, -1)


def largest(scores: Array, eligible: Array, count: int) -> Array:
    """Return the indices of the `count` largest eligible scores, int32 (..., count), ascending.

    -1 fills up. For the rest see `best`.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.kernels.array_api.choice import largest
    >>> scores = np.array([[3., 5., 3., 3.], [1., 9., 9., 9.]])
    >>> largest(scores, np.array([[True] * 4, [True, False, False, False]]), 2)
    array([[ 0,  1],
           [ 0, -1]], dtype=int32)
    """
    xp, limit = namespace(scores), scores.shape[-1]
    found = ascending(*best(scores, eligible, count), limit)
    if count <= limit:
        return found
    none = xp.full((*found.shape[:-1], count - limit), -1, dtype=xp.int32, device=device(found))
    return xp.concat([found, none], axis=-1)
