"""Spans of attention: what makes one for each token, and what keeps them short.

Letters: H heads, N tokens, C their width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..checks import OptionError, ShapeError, require_real
from ..differentiable import Saved, differentiable, gradients
from .precision import cast_like, require_same_shape, widened


@dataclasses.dataclass(frozen=True)
class DynamicSpansSaved(Saved):
    """The arguments of `dynamic_spans`, and the share of the longest span that each token has."""

    x: Array
    w: Array
    b: Array
    share: Array
    """sigmoid(x.w + b), (..., H, N)."""
    max_span: float

    def backward(self, dout: Array) -> Any:
        """Gradients of x, w and b."""
        require_same_shape("dout", dout, self.share.shape)
        xp, dz, x, w, share = widened(dout=dout, x=self.x, w=self.w, share=self.share)
        # forward: span = max_span sigmoid(x @ w + b)
        slope = xp.matrix_transpose(dz * self.max_span * share * (1 - share))
        rows = xp.reshape(slope, (-1, w.shape[1]))
        return gradients(("x", "w", "b"))(
            cast_like(xp, xp.matmul(slope, xp.matrix_transpose(w)), self.x),
            cast_like(xp, xp.matmul(xp.matrix_transpose(xp.reshape(x, (-1, w.shape[0]))), rows),
                      self.w),
            cast_like(xp, xp.sum(rows, axis=0), self.b))


@differentiable
def dynamic_spans(x: Array, w: Array, b: Array, *, max_span: float,
                  ) -> tuple[Array, DynamicSpansSaved]:
    """Give every token and head a span: ``max_span * sigmoid(x @ w + b)``, in tokens.

    E.g. a head with weights 0 and bias 0: half of `max_span`, whatever the token.

    Parameters
    ----------
    x : array, shape (..., N, C), float16 / bfloat16 / float32 / float64
        Tokens.
    w : array, shape (C, H), floating point
    b : array, shape (H,), floating point
        Very negative at first, spans start short.
    max_span : float, >= 0
        The longest span, which is never quite reached.

    Returns
    -------
    array, shape (..., H, N), float64 if any argument is, else float32
        For `pyattn.dynamic_span_attention`. Not in the dtype of `x`, in which 16 bits tell spans
        beyond 2048 (bfloat16: 256) no more by the token. Gradients: x, w, b.

    Raises
    ------
    ShapeError
        Widths or heads do not fit.
    OptionError
        A `max_span` below 0.

    Notes
    -----
    O(N C H). Kept for backward: the arguments, and a number for each token and head.

    References
    ----------
    .. [1] Sukhbaatar et al., "Adaptive Attention Span in Transformers", 2019, arXiv:1905.07799,
       section 2.2, "Dynamic attention span".

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features import dynamic_spans
    >>> x = np.arange(6.0).reshape(3, 2)
    >>> dynamic_spans(x, np.zeros((2, 1)), np.zeros(1), max_span=8)
    array([[4., 4., 4.]])
    >>> span, saved = dynamic_spans.forward(x, np.zeros((2, 1)), np.zeros(1), max_span=8)
    >>> saved.backward(np.ones((1, 3))).w.ravel()
    array([12., 18.])
    """
    max_span = require_real("max_span", max_span)
    if max_span < 0:
        raise OptionError(f"max_span must be at least 0; got {max_span}")
    xp, wide, weights, bias = widened(x=x, w=w, b=b)
    if w.ndim != 2 or x.ndim < 2 or x.shape[-1] != w.shape[0] or tuple(b.shape) != (w.shape[1],):
        raise ShapeError("x must be (..., N, C), w (C, H) and b (H,); got x "
                         f"{tuple(x.shape)}, w {tuple(w.shape)}, b {tuple(b.shape)}")
    # the logistic function by tanh, which cannot overflow
    share = 0.5 * (1 + xp.tanh(0.5 * (xp.matmul(wide, weights) + bias)))
    share = xp.matrix_transpose(share)
    return max_span * share, DynamicSpansSaved(x, w, b, share, max_span)


@dataclasses.dataclass(frozen=True)
class SpanLossSaved(Saved):
    """The argument of `span_loss`."""

    span: Array
    coefficient: float

    def backward(self, dout: Any = 1.0) -> Any:
        """Gradient of span: the same for all."""
        xp, like = widened(span=self.span)
        size = max(1, int(np.prod(self.span.shape)))
        # forward: loss = coefficient * mean(span)
        slope = xp.zeros_like(like) + dout * (self.coefficient / size)
        return gradients(("span",))(cast_like(xp, slope, self.span))


@differentiable
def span_loss(span: Array, *, coefficient: float = 2e-6) -> tuple[Any, SpanLossSaved]:
    """What long spans cost: ``coefficient * mean(span)``, to be added to a loss.

    E.g. spans 10 and 30, ``coefficient=0.1``: 2.

    Parameters
    ----------
    span : array, any shape, floating point
        Spans in tokens, as the attention takes them.
    coefficient : float

    Returns
    -------
    array of shape (), float64 for float64, else float32
        Gradient: span. ``saved.backward()`` alone takes the loss as it is.

    Raises
    ------
    DtypeError, OptionError
        `span` is not an array of floats; `coefficient` is not finite.

    References
    ----------
    .. [1] Sukhbaatar et al., "Adaptive Attention Span in Transformers", 2019, arXiv:1905.07799,
       section 2.2, equation 4 (there a sum over heads, in the authors' code a mean).

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features import span_loss
    >>> loss, saved = span_loss.forward(np.array([10.0, 30.0]), coefficient=0.1)
    >>> float(loss), saved.backward().span
    (2.0, array([0.05, 0.05]))
    """
    coefficient = require_real("coefficient", coefficient)
    xp, wide = widened(span=span)
    size = max(1, int(np.prod(span.shape)))
    return xp.sum(wide) * (coefficient / size), SpanLossSaved(span, coefficient)


def require_span(span: Array, max_span: float | None) -> np.ndarray:
    """Return spans as they are on the host, or raise OptionError if one is out of range."""
    arrays.require_float("span", span)
    host = arrays.to_host(span).astype(np.float64)
    with np.errstate(invalid="ignore"):
        wrong = (host < 0) | (host > (np.inf if max_span is None else max_span))
    if wrong.any():
        limit = "be at least 0" if max_span is None else f"lie in 0..{max_span:g}"
        raise OptionError(f"span must {limit} (clip it after each step); got {host[wrong][0]:g}")
    return host
