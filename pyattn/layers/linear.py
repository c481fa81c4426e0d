"""The affine map, as one matrix product over all tokens."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ..arrays import Array
from ..checks import ShapeError
from ..differentiable import Saved, differentiable, gradients
from ..features.precision import cast_like, require_same_shape, widened


def rows(xp: Any, x: Array) -> Array:
    """`x` (..., C) as (tokens, C): one large product is faster than a batch of small ones."""
    return x if x.ndim == 2 else xp.reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]))


def require_affine(x: Array, w: Array, b: Array | None, names: tuple[str, str, str]) -> None:
    """Raise ShapeError unless ``x @ w + b`` is defined for x (..., C), w (C, O), b (O,)."""
    x_name, w_name, b_name = names
    if w.ndim != 2:
        raise ShapeError(f"{w_name} must be (in, out); got shape {tuple(w.shape)}")
    if x.ndim < 1 or x.shape[-1] != w.shape[0]:
        raise ShapeError(f"{x_name} has width {x.shape[-1] if x.ndim else 'none'} but {w_name} has "
                         f"{w.shape[0]} rows; they must be equal ({x_name} {tuple(x.shape)}, "
                         f"{w_name} {tuple(w.shape)})")
    if b is not None and tuple(b.shape) != (w.shape[1],):
        raise ShapeError(f"{b_name} must have shape ({w.shape[1]},), the columns of {w_name}; "
                         f"got {tuple(b.shape)}")


def affine(xp: Any, x: Array, w: Array, b: Array | None) -> Array:
    """``x @ w + b`` for arrays of one dtype."""
    y = xp.matmul(rows(xp, x), w)
    if b is not None:
        y = y + b
    return xp.reshape(y, (*x.shape[:-1], w.shape[1]))


def affine_gradients(xp: Any, x: Array, w: Array, dy: Array) -> tuple[Array, Array, Array]:
    """Gradients of x, w and b in ``y = x @ w + b``."""
    dy = rows(xp, dy)
    return (xp.reshape(xp.matmul(dy, w.T), x.shape), xp.matmul(rows(xp, x).T, dy),
            xp.sum(dy, axis=0))


@dataclasses.dataclass(frozen=True)
class LinearSaved(Saved):
    """The arguments of `linear`."""

    x: Array
    w: Array
    b: Array | None

    def backward(self, dout: Array) -> Any:
        """Gradients of x, w and, where given, b."""
        require_same_shape("dout", dout, (*self.x.shape[:-1], self.w.shape[1]))
        xp, dy, x, w = widened(dout=dout, x=self.x, w=self.w)
        dx, dw, db = affine_gradients(xp, x, w, dy)
        grads = [cast_like(xp, dx, self.x), cast_like(xp, dw, self.w)]
        if self.b is None:
            return gradients(("x", "w"))(*grads)
        return gradients(("x", "w", "b"))(*grads, cast_like(xp, db, self.b))


@differentiable
def linear(x: Array, w: Array, b: Array | None = None) -> tuple[Array, LinearSaved]:
    """Map every token by the same weights: ``y = x @ w + b``.

    Parameters
    ----------
    x : array, shape (..., C), float16 / bfloat16 / float32 / float64
        Tokens.
    w : array, shape (C, O)
        Weights; they multiply from the right, so ``w`` is the transpose of torch's.
    b : array, shape (O,), optional
        Added to every token.

    Returns
    -------
    array, shape (..., O), dtype of `x`

    Raises
    ------
    ShapeError
        The widths do not fit.
    DtypeError
        An array is not of a float dtype.

    Notes
    -----
    One matrix product forward, two backward, over all tokens at once. Computes in float32, or in
    float64 if any argument is. Kept for backward: the arguments.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.layers import linear
    >>> y, saved = linear.forward(np.ones((2, 3)), np.eye(3, 5))
    >>> y.shape, saved.backward(y).w.shape
    ((2, 5), (3, 5))
    """
    require_affine(x, w, b, ("x", "w", "b"))
    xp, wide_x, wide_w, wide_b = widened(x=x, w=w, b=b)
    y = affine(xp, wide_x, wide_w, wide_b)
    return cast_like(xp, y, x), LinearSaved(x, w, b)
