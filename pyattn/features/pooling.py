"""Blocks of tokens summed up by their mean.

Letters: N tokens, D width, C blocks.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..checks import OptionError, ShapeError, require_broadcast, require_integer
from ..differentiable import Saved, differentiable, gradients
from ..masks.algebra import host_array
from .padding import without_padding
from .precision import cast_like, require_same_shape, widened


def block_counts(n: int, block_size: int, lengths: Any = None) -> np.ndarray:
    """Return how many of the tokens before `lengths` each block holds, int (..., C).

    Examples
    --------
    >>> from pyattn.features.pooling import block_counts
    >>> block_counts(5, 2), block_counts(5, 2, [3])
    (array([2, 2, 1]), array([[2, 1, 0]]))
    """
    starts = np.arange(0, n, block_size)
    ends = host_array(n if lengths is None else lengths)
    return np.clip(ends[..., None] - starts, 0, block_size)


@dataclasses.dataclass(frozen=True)
class MeanPoolSaved(Saved):
    """The argument of `mean_pool`, for its shape and dtype, and the sizes of its blocks."""

    x: Array
    block_size: int
    lengths: tuple[Any, ...] | None

    def backward(self, dout: Array) -> Any:
        """Gradient of x: each token of a block gets its share."""
        n, width = self.x.shape[-2:]
        counts = block_counts(n, self.block_size, self.lengths)
        lead = self.x.shape[:-2]
        require_same_shape("dout", dout, (*lead, counts.shape[-1], width))
        xp, dy = widened(dout=dout)
        dy = (dy / _column(xp, np.maximum(counts, 1), dy))[..., :, None, :]
        dx = xp.broadcast_to(dy, (*lead, counts.shape[-1], self.block_size, width))
        dx = xp.reshape(dx, (*lead, counts.shape[-1] * self.block_size, width))[..., :n, :]
        return gradients(("x",))(cast_like(xp, without_padding(dx, self.lengths), self.x))


@differentiable
def mean_pool(x: Array, *, block_size: int, lengths: Any = None) -> tuple[Array, MeanPoolSaved]:
    """Mean of each block of `block_size` tokens; the last block may be shorter.

    Parameters
    ----------
    x : array, shape (..., H, N, D), float16 / bfloat16 / float32 / float64
        Tokens of H heads.
    block_size : int >= 1
    lengths : int or array of int, broadcasting to the leading axes, optional
        Tokens from here on are padding: whatever they hold, they are not in the mean.

    Returns
    -------
    array, shape (..., H, C, D), dtype of `x`
        ``C = ceil(N / block_size)``; a block of padding alone is 0.

    Raises
    ------
    ShapeError
        The lengths do not fit, or lie beyond N.

    Notes
    -----
    O(N D). Sums in float32, or float64 for float64. Kept for backward: the argument, for its dtype
    and shape.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features.pooling import mean_pool
    >>> y, saved = mean_pool.forward(np.arange(5.0).reshape(1, 5, 1), block_size=2)
    >>> y.ravel(), saved.backward(np.ones((1, 3, 1))).x.ravel()
    (array([0.5, 2.5, 4. ]), array([0.5, 0.5, 0.5, 0.5, 1. ]))
    """
    if x.ndim < 3:
        raise ShapeError(f"x must be (..., H, N, D); got {tuple(x.shape)}")
    block_size = require_integer("block_size", block_size, minimum=1)
    *lead, n, width = x.shape
    if lengths is not None:
        lengths = host_array(lengths)
        require_broadcast("lengths", lengths.shape, tuple(lead[:-1]), "the leading axes")
        if lengths.size and lengths.dtype.kind not in "iu":
            raise OptionError(f"lengths must be integers; got {lengths.dtype}")
        if lengths.size and not (lengths.min() >= 0 and lengths.max() <= n):
            raise ShapeError(f"lengths must lie in 0..{n}; got {lengths.min()}..{lengths.max()}")
        lengths = tuple(lengths.tolist()) if lengths.ndim else (lengths.item(),)
    counts = block_counts(n, block_size, lengths)
    xp, wide = widened(x=x)
    wide = without_padding(wide, lengths)
    missing = counts.shape[-1] * block_size - n
    filling = xp.zeros((*lead, missing, width), dtype=wide.dtype, device=arrays.device(x))
    by_block = xp.reshape(xp.concat([wide, filling], axis=-2),
                          (*lead, counts.shape[-1], block_size, width))
    mean = xp.sum(by_block, axis=-2) / _column(xp, np.maximum(counts, 1), wide)
    return cast_like(xp, mean, x), MeanPoolSaved(x, block_size, lengths)


def _column(xp: Any, counts: np.ndarray, like: Array) -> Array:
    """Counts (..., C) as (..., 1, C, 1) in the dtype of `like`."""
    return xp.astype(arrays.from_host(xp, counts[..., None, :, None], arrays.device(like)),
                     like.dtype)
