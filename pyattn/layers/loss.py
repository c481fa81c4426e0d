"""Cross-entropy of a softmax."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from .. import arrays
from ..arrays import Array
from ..checks import DtypeError, OptionError, ShapeError
from ..differentiable import Saved, differentiable, gradients
from ..features.precision import cast_like, widened


@dataclasses.dataclass(frozen=True)
class CrossEntropySaved(Saved):
    """The arguments of `cross_entropy`, and the log of each softmax's denominator."""

    logits: Array
    targets: Array
    lse: Array
    """(..., 1), computing dtype."""

    def backward(self, dout: Array | float = 1.0) -> Any:
        """Gradient of logits: softmax minus 1 at the target, over the number of targets."""
        xp, logits = widened(logits=self.logits)
        share = dout / math.prod(self.targets.shape)
        classes = xp.arange(logits.shape[-1], device=arrays.device(logits))
        hit = xp.astype(self.targets, classes.dtype)[..., None] == classes
        weights = xp.exp(logits - self.lse)
        return gradients(("logits",))(
            cast_like(xp, xp.where(hit, weights - 1, weights) * share, self.logits))


@differentiable
def cross_entropy(logits: Array, targets: Array) -> tuple[Array, CrossEntropySaved]:
    """Mean of ``-log softmax(logits)[target]``, in nats.

    Parameters
    ----------
    logits : array, shape (..., V), float16 / bfloat16 / float32 / float64
        Unnormalised log-probabilities.
    targets : integer array, shape (...)
        Which of the V came true.

    Returns
    -------
    0-d array, float64 for float64 logits, else float32
        ``saved.backward()`` takes 1 for `dout` where none is given.

    Raises
    ------
    ShapeError
        The targets are not shaped as the logits' leading axes, or there are none.
    DtypeError
        The targets are not integers.
    OptionError
        A target is not 0 to V - 1.

    Notes
    -----
    Kept for backward: the arguments and one number a target.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.layers import cross_entropy
    >>> loss, saved = cross_entropy.forward(np.zeros((1, 2)), np.array([1]))
    >>> round(float(loss), 4), saved.backward().logits
    (0.6931, array([[ 0.5, -0.5]]))
    """
    xp, wide = widened(logits=logits)
    arrays.namespace(logits, targets)
    if not xp.isdtype(targets.dtype, "integral"):
        raise DtypeError(f"targets must be integers; got {targets.dtype}")
    if logits.ndim < 1 or tuple(targets.shape) != tuple(logits.shape[:-1]):
        raise ShapeError(f"targets must have shape {tuple(logits.shape[:-1])}, that of logits "
                         f"{tuple(logits.shape)} without its last axis; got {tuple(targets.shape)}")
    if math.prod(logits.shape) == 0:
        raise ShapeError(f"logits must not be empty; got {tuple(logits.shape)}")
    low, high = int(xp.min(targets)), int(xp.max(targets))
    if low < 0 or high >= logits.shape[-1]:
        raise OptionError(f"targets must be 0 to V - 1 = {logits.shape[-1] - 1}; got "
                          f"{low} to {high}")
    top = xp.max(wide, axis=-1, keepdims=True)
    lse = top + xp.log(xp.sum(xp.exp(wide - top), axis=-1, keepdims=True))
    index = xp.astype(targets, xp.asarray(0).dtype)[..., None]
    loss = xp.mean(lse - xp.take_along_axis(wide, index, axis=-1))
    return loss, CrossEntropySaved(logits, targets, lse)
