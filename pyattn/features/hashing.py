"""Locality-sensitive hashing: vectors that point the same way fall into one bucket.

Letters: H heads, N tokens, D width.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .. import arrays, dispatch
from ..arrays import Array
from ..checks import OptionError, ShapeError, require_broadcast, require_integer, require_rng
from .clustering import Sets

MOST_BUCKETS = 2**31
"""Of a round: int32 numbers tell them."""


def lsh_hash(x: Array, *, num_buckets: int | tuple[int, ...], num_rounds: int, rng: Any = None,
             rotations: Array | None = None) -> np.ndarray:
    """Hash tokens by random rotations: the bucket is the axis, or its opposite, that is nearest.

    ``bucket = argmax([x R, -x R])``, with R of independent normal numbers for each round. E.g. with
    four buckets, R has two columns; a token with ``x R = (0.1, -2)`` falls into bucket 3.

    Parameters
    ----------
    x : array, shape (..., H, N, D), float16 / bfloat16 / float32 / float64
        Tokens; their lengths do not matter.
    num_buckets : int or tuple of int, even
        Buckets of a round. Of several numbers, for which the tokens are hashed apart, the product:
        much cheaper for many buckets.
    num_rounds : int, >= 1
    rng : int, numpy.random.Generator or None
        Where the rotations come from (`numpy.random.default_rng`).
    rotations : array, shape (H or 1, D, num_rounds, half the sum of num_buckets), optional
        Rotations to take instead.

    Returns
    -------
    numpy.ndarray, int32, shape (..., H, num_rounds, N)
        On the host: engines lay out there what was decided.

    Raises
    ------
    OptionError, ShapeError
        A number of buckets is odd, or the rotations do not fit.

    Notes
    -----
    Time O(N D num_rounds num_buckets), or of the sum of several numbers of buckets; a few MB of
    memory beside the result. Of equal products the first bucket counts. A token that is not finite
    falls into some bucket.

    References
    ----------
    .. [1] Kitaev, Kaiser, Levskaya, "Reformer", 2020, arXiv:2001.04451, section 2.
    .. [2] Andoni et al., "Practical and Optimal LSH for Angular Distance", 2015,
       arXiv:1509.02897, section 3.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features.hashing import lsh_hash
    >>> x = np.array([[[0.1, -2.0], [0.05, -1.0], [3.0, 0.2], [-3.0, -0.2]]])
    >>> lsh_hash(x, num_buckets=4, num_rounds=1, rotations=np.eye(2).reshape(1, 2, 1, 2))
    array([[[3, 3, 0, 2]]], dtype=int32)
    """
    found, = arrays.decided(hashed(x, num_buckets=num_buckets, num_rounds=num_rounds, rng=rng,
                                   rotations=rotations))
    return found


def hashed(x: Array, *, num_buckets: int | tuple[int, ...], num_rounds: int, rng: Any = None,
           rotations: Array | None = None) -> Array:
    """Return what `lsh_hash` returns, but where the tokens live if these are not NumPy's."""
    factors = require_buckets(num_buckets)
    num_rounds = require_integer("num_rounds", num_rounds, minimum=1)
    arrays.require_float("x", x)
    if x.ndim < 3:
        raise ShapeError(f"x must be (..., H, N, D); got {tuple(x.shape)}")
    *lead, heads, n, width = x.shape
    rng = require_rng(rng)
    if rotations is not None:
        arrays.require_float("rotations", rotations)
    xp = arrays.namespace(x, rotations)
    halves = sum(factors) // 2
    if rotations is None:
        drawn = rng.standard_normal((heads, width, num_rounds, halves))
        rotations = arrays.from_host(xp, drawn, arrays.device(x))
    else:
        require_broadcast("rotations", tuple(rotations.shape), (heads, width, num_rounds, halves),
                          "(H, D, num_rounds, half the sum of num_buckets)")
    acc = arrays.accumulator(xp, x)
    rotations = xp.broadcast_to(arrays.cast(xp, rotations, acc),
                                (heads, width, num_rounds, halves))
    kernel = dispatch.kernel("clustering", None, x)
    items = math.prod(lead) * heads
    wide = arrays.reshape(xp, arrays.cast(xp, x, acc), (items, n, width))
    nearest = _nearest_on_host if kernel.ON_HOST else _nearest_on_device
    rounds = []
    for turn in range(num_rounds):
        start, product, buckets = 0, 1, None
        for factor in factors:
            ends = rotations[:, :, turn, start:start + factor // 2]
            # the axes of each head, then their opposites
            nodes = xp.permute_dims(xp.concat([ends, -ends], axis=-1), (0, 2, 1))
            own = nearest(kernel, wide, nodes)
            buckets = own if buckets is None else buckets + product * own
            start, product = start + factor // 2, product * factor
        rounds.append(buckets)
    return arrays.reshape(xp, xp.stack(rounds, axis=1), (*lead, heads, num_rounds, n))


def _nearest_on_host(kernel: Any, x: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """Return the nearest of the nodes (H, K, D) for tokens (items, N, D), int32 (items, N)."""
    (items, n, width), (heads, factor, _) = x.shape, nodes.shape
    head = np.arange(items) % max(1, heads)
    sets = Sets(n * np.arange(items), np.full(items, n), factor * head, np.full(items, factor))
    with np.errstate(invalid="ignore", over="ignore"):
        found = kernel.nearest(x.reshape(items * n, width), nodes.reshape(heads * factor, width),
                               np.zeros(heads * factor, x.dtype), sets, np.full(items, True),
                               np.zeros(items * n, np.int32)).reshape(items, n)
    # what is not finite may have no nearest
    return np.clip(found - factor * head[:, None], 0, factor - 1).astype(np.int32)


def _nearest_on_device(kernel: Any, x: Array, nodes: Array) -> Array:
    """Do likewise where the tokens live."""
    xp, heads = arrays.namespace(x), nodes.shape[0]
    times = x.shape[0] // max(1, heads)
    nodes = arrays.reshape(xp, xp.broadcast_to(nodes, (times, *nodes.shape)),
                           (times * heads, *nodes.shape[1:]))
    with np.errstate(invalid="ignore", over="ignore"):
        return kernel.nearest(x, nodes, xp.zeros_like(nodes[:, :, 0]))


def require_buckets(num_buckets: Any) -> tuple[int, ...]:
    """Return the factors of a number of buckets; OptionError unless each is even."""
    given = num_buckets if isinstance(num_buckets, tuple | list) else (num_buckets,)
    factors = tuple(require_integer("num_buckets", factor, minimum=2) for factor in given)
    if not factors or any(factor % 2 for factor in factors):
        raise OptionError("num_buckets must be even, as each axis has two ends; got "
                          f"{num_buckets!r}")
    if math.prod(factors) > MOST_BUCKETS:
        raise OptionError(f"num_buckets must be {MOST_BUCKETS} at most, all factors together; got "
                          f"{num_buckets!r}")
    return factors
