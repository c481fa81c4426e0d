"""Tokens of one length, or of mean 0 and variance 1: normalised, with nothing learned.

Letters: D width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..arrays import Array
from ..differentiable import Saved, differentiable, gradients
from .precision import cast_like, require_same_shape, widened

ROWS = 2**9
"""So many tokens are normalised at a time on the host, where they stay in the cache."""

SMALLEST = 1e-12
"""A token is divided by at least this, so that zeros stay zeros."""


@dataclasses.dataclass(frozen=True)
class UnitLengthSaved(Saved):
    """The argument of `unit_length`."""

    x: Array

    def backward(self, dout: Array) -> Any:
        """Gradient of x: what lies along a token is lost."""
        require_same_shape("dout", dout, self.x.shape)
        xp, dy, x = widened(dout=dout, x=self.x)

        def pull(x: Array, dy: Array) -> Array:
            length = _length(xp, x)
            # forward: y = x / |x|
            y = x / length
            return (dy - y * xp.vecdot(y, dy)[..., None]) / length

        return gradients(("x",))(cast_like(xp, _by_rows(pull, x, dy), self.x))


@differentiable
def unit_length(x: Array) -> tuple[Array, UnitLengthSaved]:
    """Divide every token by its length: ``y = x / |x|``.

    Parameters
    ----------
    x : array, shape (..., D), float16 / bfloat16 / float32 / float64

    Returns
    -------
    array, shape (..., D), dtype of `x`
        Zeros stay zeros.

    Raises
    ------
    DtypeError
        `x` is not of these dtypes.

    Notes
    -----
    O(size of x), computed in float32, or float64 for float64. Kept for backward: the argument.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features.normalise import unit_length
    >>> unit_length(np.array([[3.0, 4.0]]))
    array([[0.6, 0.8]])
    """
    xp, wide = widened(x=x)
    unit = _by_rows(lambda x: x / _length(xp, x), wide)
    return cast_like(xp, unit, x), UnitLengthSaved(x)


def _length(xp: Any, x: Array) -> Array:
    length = xp.sqrt(xp.vecdot(x, x))[..., None]
    return xp.where(length < SMALLEST, xp.full_like(length, SMALLEST), length)


@dataclasses.dataclass(frozen=True)
class StandardiseSaved(Saved):
    """The argument of `standardise`."""

    x: Array
    eps: float

    def backward(self, dout: Array) -> Any:
        """Gradient of x."""
        require_same_shape("dout", dout, self.x.shape)
        xp, dy, x = widened(dout=dout, x=self.x)

        def pull(x: Array, dy: Array) -> Array:
            centred, rstd = _centred(xp, x, self.eps)
            # forward: y = (x - mean) * rstd
            y = centred * rstd
            return rstd * (dy - _mean(xp, dy) - y * _mean(xp, dy, y))

        return gradients(("x",))(cast_like(xp, _by_rows(pull, x, dy), self.x))


@differentiable
def standardise(x: Array, *, eps: float = 1e-5) -> tuple[Array, StandardiseSaved]:
    """Give every token mean 0 and variance 1: layer normalisation without scale and shift.

    Parameters
    ----------
    x : array, shape (..., D), float16 / bfloat16 / float32 / float64
    eps : float, >= 0
        Added to the variance.

    Returns
    -------
    array, shape (..., D), dtype of `x`

    Raises
    ------
    DtypeError
        `x` is not of these dtypes.

    Notes
    -----
    O(size of x), computed in float32, or float64 for float64. Kept for backward: the argument.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features.normalise import standardise
    >>> standardise(np.array([[1.0, 3.0]]), eps=0.0)
    array([[-1.,  1.]])
    """
    xp, wide = widened(x=x)

    def normal(x: Array) -> Array:
        centred, rstd = _centred(xp, x, eps)
        return centred * rstd

    return cast_like(xp, _by_rows(normal, wide), x), StandardiseSaved(x, eps)


def _centred(xp: Any, x: Array, eps: float) -> tuple[Array, Array]:
    centred = x - _mean(xp, x)
    return centred, 1 / xp.sqrt(_mean(xp, centred, centred) + eps)


def _mean(xp: Any, x: Array, y: Array | None = None) -> Array:
    """Return the mean of every token of x, or x times y: (..., 1)."""
    total = xp.sum(x, axis=-1) if y is None else xp.vecdot(x, y)
    return total[..., None] / x.shape[-1]


def _by_rows(function: Callable[..., Array], *given: Array) -> Array:
    """Return ``function(*given)`` of arrays (..., D), which does the same to every token."""
    if any(type(x) is not np.ndarray for x in given):
        return function(*given)
    shape = given[0].shape
    out = np.empty(shape, given[0].dtype)
    parts = [x.reshape(math.prod(shape[:-1]), shape[-1]) for x in (out, *given)]
    for start in range(0, len(parts[0]), ROWS):
        done, *rest = (x[start:start + ROWS] for x in parts)
        done[:] = function(*rest)
    return out
