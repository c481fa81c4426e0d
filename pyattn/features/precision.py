"""In which dtype features and layers compute, and the casts on the way in and out.

They compute in float64 if any array argument is float64, else in float32, and give back their
first argument's dtype; so half-precision activations go with half- or single-precision weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..checks import ShapeError


def widened(**named: Array | None) -> tuple[Any, ...]:
    """The arrays' namespace, then each array in the computing dtype; None stays None."""
    xp = arrays.namespace(*named.values())
    names = [arrays.require_float(name, x) for name, x in named.items() if x is not None]
    dtype = xp.float64 if "float64" in names else xp.float32
    return xp, *(x if x is None else xp.astype(x, dtype, copy=False) for x in named.values())


def cast_like(xp: Any, value: Array, like: Array) -> Array:
    """`value` in the dtype of `like`."""
    return arrays.cast(xp, value, like.dtype)


def require_same_shape(name: str, x: Array, shape: tuple[int, ...]) -> None:
    """Raise ShapeError unless `x` has `shape`, as a gradient must have its output's."""
    if tuple(x.shape) != tuple(shape):
        raise ShapeError(f"{name} must have shape {tuple(shape)}; got {tuple(x.shape)}")


def unit_rows(xp: Any, x: Array) -> Array:
    """Return vectors of length 1; zeros stay, and what is not finite warns of nothing."""
    low = float(xp.finfo(x.dtype).smallest_normal) / float(xp.finfo(x.dtype).eps)
    with np.errstate(over="ignore", invalid="ignore"):
        square = xp.sum(x * x, axis=-1, keepdims=True)
        usual = (square > low) & (square < 1 / low)
        unit = x / xp.sqrt(xp.where(usual, square, xp.ones_like(square)))
        # a device is not asked
        if type(x) is np.ndarray and usual.all():
            return unit
        # squares might not be representable: divided by the largest number first
        largest = xp.max(xp.abs(x), axis=-1, keepdims=True)
        x = x / xp.where(largest > 0, largest, xp.ones_like(largest))
        norm = xp.sqrt(xp.sum(x * x, axis=-1, keepdims=True))
        return xp.where(usual, unit, x / xp.where(norm > 0, norm, xp.ones_like(norm)))
