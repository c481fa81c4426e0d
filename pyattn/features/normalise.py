"""Tokens of one length, or of mean 0 and variance 1: normalised, with nothing learned.

Letters: D width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..checks import OptionError, ShapeError, require_real
from ..differentiable import Saved, differentiable, gradients
from .precision import cast_like, require_same_shape, widened

ROWS = 2**9
"""So many tokens are normalised at a time on the host, where they stay in the cache."""

LARGE = 2.0**100
"""Sums of squares up to this, and down to its inverse, are far from what float32 cannot hold."""


@dataclasses.dataclass(frozen=True)
class UnitLengthSaved(Saved):
    """The argument of `unit_length`."""

    x: Array

    def backward(self, dout: Array) -> Any:
        """Gradient of x: what lies along a token is lost; that of zeros is 0."""
        return _undone(self.x, dout, _unit, lambda xp, y, dy: y * xp.vecdot(y, dy)[..., None])


@differentiable
def unit_length(x: Array) -> tuple[Array, UnitLengthSaved]:
    """Divide every token by its length: ``y = x / |x|``.

    Parameters
    ----------
    x : array, shape (..., D), float16 / bfloat16 / float32 / float64
        Of any magnitude that its dtype can hold.

    Returns
    -------
    array, shape (..., D), dtype of `x`
        Zeros stay zeros, and have no gradient.

    Raises
    ------
    DtypeError, ShapeError
        `x` is not of these dtypes, or has no axis.

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
    return _done(x, _unit), UnitLengthSaved(x)


def _unit(xp: Any, x: Array) -> tuple[Array, Array]:
    """Return y, and by what small changes of x are multiplied."""
    x, square, size = _measured(xp, x, lambda x: (x, xp.vecdot(x, x)[..., None]),
                                lambda square: (square > 1 / LARGE) & (square < LARGE))
    rate = _inverse_root(xp, square)
    return x * rate, rate if size is None else rate / size


def _measured(xp: Any, x: Array, measure: Callable[..., tuple[Array, Array]],
              common: Callable[..., Array]) -> tuple[Array, Array, Array | None]:
    """Return what `measure` does, the second a mean or sum of squares, and what divided x for it.

    That is 1 for tokens whose squares are of `common` size, so that what becomes of a token is its
    own affair, and None where NumPy's tokens all are.
    """
    measured, square = measure(x)
    fits = common(square)
    if type(x) is np.ndarray and fits.all():
        return measured, square, None
    largest = xp.max(xp.abs(x), axis=-1, keepdims=True) if x.shape[-1] else xp.zeros_like(square)
    size = xp.where(fits | (largest == 0), xp.ones_like(square), largest)
    return *measure(x / size), size


def _inverse_root(xp: Any, square: Array) -> Array:
    """Return square^(-1/2), 0 where there is none."""
    some = square != 0
    return xp.where(some, 1 / xp.sqrt(xp.where(some, square, xp.ones_like(square))), square)


@dataclasses.dataclass(frozen=True)
class StandardiseSaved(Saved):
    """The argument of `standardise`."""

    x: Array
    eps: float

    def backward(self, dout: Array) -> Any:
        """Gradient of x."""
        return _undone(self.x, dout, lambda xp, x: _standard(xp, x, self.eps),
                       lambda xp, y, dy: _mean(xp, dy) + y * _mean(xp, dy, y))


@differentiable
def standardise(x: Array, *, eps: float = 1e-5) -> tuple[Array, StandardiseSaved]:
    """Give every token mean 0 and variance 1: layer normalisation without scale and shift.

    Parameters
    ----------
    x : array, shape (..., D), float16 / bfloat16 / float32 / float64
        Of any magnitude that its dtype can hold.
    eps : float, >= 0
        Added to the variance.

    Returns
    -------
    array, shape (..., D), dtype of `x`
        Tokens of D equal numbers become zeros, and have no gradient if `eps` is 0.

    Raises
    ------
    DtypeError, ShapeError, OptionError
        `x` is not of these dtypes or has no axis, or `eps` is negative.

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
    eps = require_real("eps", eps)
    if eps < 0:
        raise OptionError(f"eps must be at least 0; got {eps}")
    return _done(x, lambda xp, x: _standard(xp, x, eps)), StandardiseSaved(x, eps)


def _standard(xp: Any, x: Array, eps: float) -> tuple[Array, Array]:
    """Return y, and by what small changes of x are multiplied."""
    def measure(x: Array) -> tuple[Array, Array]:
        centred = x - _mean(xp, x)
        return centred, _mean(xp, centred, centred)

    centred, variance, size = _measured(xp, x, measure, lambda variance: variance < LARGE)
    rate = _inverse_root(xp, variance + (eps if size is None else eps / size / size))
    return centred * rate, rate if size is None else rate / size


def _mean(xp: Any, x: Array, y: Array | None = None) -> Array:
    """Return the mean of every token of x, or x times y: (..., 1)."""
    total = xp.sum(x, axis=-1) if y is None else xp.vecdot(x, y)
    return total[..., None] / x.shape[-1]


def _done(x: Array, function: Callable[..., tuple[Array, Array]]) -> Array:
    """Return the tokens normalised by ``function(xp, tokens)``."""
    arrays.require_float("x", x)
    if not x.ndim:
        raise ShapeError("x must be (..., D); got ()")
    xp, wide = widened(x=x)
    return cast_like(xp, _by_rows(lambda x: function(xp, x)[0], wide), x)


def _undone(x: Array, dout: Array, function: Callable[..., tuple[Array, Array]],
            lost: Callable[..., Array]) -> Any:
    """Return the gradient: ``rate * (dy - lost(xp, y, dy))`` where y, rate are the function's."""
    require_same_shape("dout", dout, x.shape)
    xp, dy, wide = widened(dout=dout, x=x)

    def pull(x: Array, dy: Array) -> Array:
        y, rate = function(xp, x)
        return rate * (dy - lost(xp, y, dy))

    return gradients(("x",))(cast_like(xp, _by_rows(pull, wide, dy), x))


def _by_rows(function: Callable[..., Array], *given: Array) -> Array:
    """Return ``function(*given)`` of arrays (..., D), which does the same to every token."""
    with np.errstate(invalid="ignore", over="ignore"):
        if any(type(x) is not np.ndarray for x in given):
            return function(*given)
        shape = given[0].shape
        out = np.empty(shape, given[0].dtype)
        parts = [x.reshape(math.prod(shape[:-1]), shape[-1]) for x in (out, *given)]
        for start in range(0, len(parts[0]), ROWS):
            done, *rest = (x[start:start + ROWS] for x in parts)
            done[:] = function(*rest)
        return out
