"""Tokens of one length, or of mean 0 and variance 1: normalised, with nothing learned.

Letters: D width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ..arrays import Array
from ..differentiable import Saved, differentiable, gradients
from .precision import cast_like, require_same_shape, widened

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
        length = _length(xp, x)
        # forward: y = x / |x|
        y = x / length
        dx = (dy - y * xp.sum(y * dy, axis=-1, keepdims=True)) / length
        return gradients(("x",))(cast_like(xp, dx, self.x))


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
    return cast_like(xp, wide / _length(xp, wide), x), UnitLengthSaved(x)


def _length(xp: Any, x: Array) -> Array:
    length = xp.sqrt(xp.sum(x * x, axis=-1, keepdims=True))
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
        centred, rstd = _centred(xp, x, self.eps)
        # forward: y = (x - mean) * rstd
        y = centred * rstd
        dx = rstd * (dy - xp.mean(dy, axis=-1, keepdims=True)
                     - y * xp.mean(dy * y, axis=-1, keepdims=True))
        return gradients(("x",))(cast_like(xp, dx, self.x))


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
    centred, rstd = _centred(xp, wide, eps)
    return cast_like(xp, centred * rstd, x), StandardiseSaved(x, eps)


def _centred(xp: Any, x: Array, eps: float) -> tuple[Array, Array]:
    centred = x - xp.mean(x, axis=-1, keepdims=True)
    return centred, 1 / xp.sqrt(xp.mean(centred * centred, axis=-1, keepdims=True) + eps)
