"""Layer normalisation."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..arrays import Array
from ..checks import ShapeError, require_real
from ..differentiable import Saved, differentiable, gradients
from ..features.precision import cast_like, require_same_shape, widened
from .linear import rows


@dataclasses.dataclass(frozen=True)
class LayerNormSaved(Saved):
    """The arguments of `layer_norm`, and each token's mean and 1 / standard deviation."""

    x: Array
    gamma: Array
    beta: Array
    mean: Array
    """(..., 1), computing dtype."""
    rstd: Array
    """(..., 1), computing dtype."""

    def backward(self, dout: Array) -> Any:
        """Gradients of x, gamma and beta."""
        require_same_shape("dout", dout, self.x.shape)
        xp, dy, x, gamma = widened(dout=dout, x=self.x, gamma=self.gamma)
        normal = (x - self.mean) * self.rstd
        dnormal = gamma * dy
        dx = self.rstd * (dnormal - xp.mean(dnormal, axis=-1, keepdims=True)
                          - normal * xp.mean(dnormal * normal, axis=-1, keepdims=True))
        dgamma = xp.sum(rows(xp, dy * normal), axis=0)
        dbeta = xp.sum(rows(xp, dy), axis=0)
        return gradients(("x", "gamma", "beta"))(
            cast_like(xp, dx, self.x), cast_like(xp, dgamma, self.gamma),
            cast_like(xp, dbeta, self.beta))


@differentiable
def layer_norm(x: Array, gamma: Array, beta: Array, *,
               eps: float = 1e-5) -> tuple[Array, LayerNormSaved]:
    """Give every token mean 0 and variance 1 over its width, then scale and shift it.

    ``y = gamma * (x - mean(x)) / sqrt(var(x) + eps) + beta``, with the biased variance.

    Parameters
    ----------
    x : array, shape (..., C), float16 / bfloat16 / float32 / float64
        Tokens.
    gamma, beta : arrays, shape (C,)
        Scale and shift.
    eps : float, >= 0
        Added to the variance.

    Returns
    -------
    array, shape (..., C), dtype of `x`

    Raises
    ------
    ShapeError
        `gamma` or `beta` is not as wide as `x`.

    Notes
    -----
    O(tokens * C). Computes in float32, or in float64 if any argument is. Kept for backward: the
    arguments and two numbers a token; the normalised tokens are made again.

    References
    ----------
    .. [1] Ba, Kiros, Hinton, "Layer Normalization", 2016, arXiv:1607.06450, equation 4.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.layers import layer_norm
    >>> layer_norm(np.array([[1.0, 3.0]]), np.ones(2), np.zeros(2), eps=0.0)
    array([[-1.,  1.]])
    """
    for name, weight in (("gamma", gamma), ("beta", beta)):
        if x.ndim < 1 or tuple(weight.shape) != (x.shape[-1],):
            raise ShapeError(f"{name} must have shape (C,), the width of x; got "
                             f"{tuple(weight.shape)} for x {tuple(x.shape)}")
    eps = require_real("eps", eps)
    xp, wide, wide_gamma, wide_beta = widened(x=x, gamma=gamma, beta=beta)
    mean = xp.mean(wide, axis=-1, keepdims=True)
    centred = wide - mean
    rstd = 1 / xp.sqrt(xp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    y = centred * rstd * wide_gamma + wide_beta
    return cast_like(xp, y, x), LayerNormSaved(x, gamma, beta, mean, rstd)
