"""In which dtype features and layers compute, and the casts on the way in and out.

They compute in float64 if any array argument is float64, else in float32, and give back their
first argument's dtype; so half-precision activations go with half- or single-precision weights.
"""

from __future__ import annotations

from typing import Any

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
