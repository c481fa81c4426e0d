"""The position-wise network of a Transformer block."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..arrays import Array
from ..checks import require_choice
from ..differentiable import Saved, differentiable, gradients
from ..features.activation import ACTIVATIONS
from ..features.precision import cast_like, require_same_shape, widened
from .linear import affine, affine_gradients, require_affine


@dataclasses.dataclass(frozen=True)
class FeedForwardSaved(Saved):
    """The arguments of `feed_forward`, and the hidden layer before its activation."""

    x: Array
    w1: Array
    b1: Array
    w2: Array
    b2: Array
    hidden: Array
    """(..., F), computing dtype."""
    activation: str

    def backward(self, dout: Array) -> Any:
        """Gradients of x, w1, b1, w2 and b2."""
        require_same_shape("dout", dout, (*self.x.shape[:-1], self.w2.shape[1]))
        xp, dy, x, w1, w2 = widened(dout=dout, x=self.x, w1=self.w1, w2=self.w2)
        active, slope = ACTIVATIONS[self.activation](xp, self.hidden, True)
        dactive, dw2, db2 = affine_gradients(xp, active, w2, dy)
        dx, dw1, db1 = affine_gradients(xp, x, w1, dactive * slope)
        names = ("x", "w1", "b1", "w2", "b2")
        return gradients(names)(*(cast_like(xp, grad, getattr(self, name)) for name, grad in
                                  zip(names, (dx, dw1, db1, dw2, db2), strict=True)))


@differentiable
def feed_forward(x: Array, w1: Array, b1: Array, w2: Array, b2: Array, *,
                 activation: str = "gelu") -> tuple[Array, FeedForwardSaved]:
    """Two affine maps with an activation between, the same for every token.

    ``y = activation(x @ w1 + b1) @ w2 + b2``

    Parameters
    ----------
    x : array, shape (..., C), float16 / bfloat16 / float32 / float64
        Tokens.
    w1, b1 : arrays, shapes (C, F) and (F,)
        Into the hidden layer, F usually 4 C.
    w2, b2 : arrays, shapes (F, O) and (O,)
        Out of it.
    activation : {"gelu", "relu", "gelu_tanh", "silu"}
        ``"gelu"`` is x times the normal distribution function (by erf); ``"gelu_tanh"`` the
        approximation to it that GPT-2 uses; ``"silu"`` is x times the logistic function.

    Returns
    -------
    array, shape (..., O), dtype of `x`

    Raises
    ------
    ShapeError
        The widths do not fit.
    OptionError
        `activation` is not one of the names.

    Notes
    -----
    Computes in float32, or in float64 if any argument is. Kept for backward: the arguments and the
    hidden layer before the activation; what comes after it is made again.

    References
    ----------
    .. [1] Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762, section 3.3.
    .. [2] Hendrycks, Gimpel, "Gaussian Error Linear Units", 2016, arXiv:1606.08415, section 2.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.layers import feed_forward
    >>> w1, w2 = np.eye(2), np.eye(2)
    >>> feed_forward(np.array([[-1.0, 2.0]]), w1, np.zeros(2), w2, np.ones(2), activation="relu")
    array([[1., 3.]])
    """
    require_choice("activation", activation, tuple(ACTIVATIONS))
    require_affine(x, w1, b1, ("x", "w1", "b1"))
    require_affine(b1, w2, b2, ("b1", "w2", "b2"))
    xp, wide, *weights = widened(x=x, w1=w1, b1=b1, w2=w2, b2=b2)
    hidden = affine(xp, wide, weights[0], weights[1])
    active, _ = ACTIVATIONS[activation](xp, hidden, False)
    y = affine(xp, active, weights[2], weights[3])
    return cast_like(xp, y, x), FeedForwardSaved(x, w1, b1, w2, b2, hidden, activation)
