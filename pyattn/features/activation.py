"""Activations of the feed-forward layer: the value, and the slope with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .. import arrays
from ..arrays import Array

# Cody, "Rational Chebyshev approximations for the error function", Math. Comp. 23 (1969): near 0
# erf(x) = x P(x^2) / Q(x^2), further out erfc(x) = exp(-x^2) P(x) / Q(x); highest powers first.
_NEAR = (
    (1.85777706184603153e-1, 3.16112374387056560e0, 1.13864154151050156e2, 3.77485237685302021e2,
     3.20937758913846947e3),
    (1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3,
     2.84423683343917062e3))
_FAR = (
    (2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594e0, 6.61191906371416295e1,
     2.98635138197400131e2, 8.81952221241769090e2, 1.71204761263407058e3, 2.05107837782607147e3,
     1.23033935479799725e3),
    (1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2,
     1.62138957456669019e3, 3.29079923573345963e3, 4.36261909014324716e3, 3.43936767414372164e3,
     1.23033935480374942e3))


def _ratio(x: Array, polynomials: tuple[tuple[float, ...], tuple[float, ...]]) -> Array:
    values = []
    for highest, *others in polynomials:
        value = x * highest + others[0]
        for coefficient in others[1:]:
            value = value * x + coefficient
        values.append(value)
    return values[0] / values[1]


def erf(xp: Any, x: Array) -> Array:
    """The error function, which the array-API standard lacks; SciPy's on NumPy arrays."""
    if arrays.library(x) == "numpy":
        from scipy.special import erf

        return erf(x)
    # beyond 6 erf is 1 to the last bit, and the far form's exponential would underflow
    size = xp.clip(xp.abs(x), max=6.0)
    near = size * _ratio(size * size, _NEAR)
    far = 1 - xp.exp(-size * size) * _ratio(size, _FAR)
    return xp.sign(x) * xp.where(size < 0.46875, near, far)


def logistic(xp: Any, x: Array) -> Array:
    """1 / (1 + exp(-x)), by tanh, which cannot overflow."""
    return 0.5 * (1 + xp.tanh(0.5 * x))


def _relu(xp: Any, x: Array, slope: bool) -> tuple[Array, Array | None]:
    zero = xp.zeros((), dtype=x.dtype, device=arrays.device(x))
    return xp.maximum(x, zero), xp.astype(x > 0, x.dtype) if slope else None


def _gelu(xp: Any, x: Array, slope: bool) -> tuple[Array, Array | None]:
    below = 0.5 * (1 + erf(xp, x * math.sqrt(0.5)))
    density = xp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi) if slope else None
    return x * below, below + x * density if slope else None


def _gelu_tanh(xp: Any, x: Array, slope: bool) -> tuple[Array, Array | None]:
    rate, cubic = math.sqrt(2 / math.pi), 0.044715
    square = x * x
    below = 0.5 * (1 + xp.tanh(x * (rate + rate * cubic * square)))
    if not slope:
        return x * below, None
    return x * below, below + 2 * below * (1 - below) * x * (rate + 3 * rate * cubic * square)


def _silu(xp: Any, x: Array, slope: bool) -> tuple[Array, Array | None]:
    below = logistic(xp, x)
    return x * below, below * (1 + x * (1 - below)) if slope else None


ACTIVATIONS: dict[str, Callable[[Any, Array, bool], tuple[Array, Array | None]]] = {
    "gelu": _gelu,
    "relu": _relu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
}
"""By name: ``(xp, x, slope) -> (value, derivative if slope else None)``."""
