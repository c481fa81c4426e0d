"""Random features: positive numbers of a token whose products estimate a kernel, without bias.

Letters: H heads, N tokens, D width, F features.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..checks import (
    OptionError,
    ShapeError,
    require_choice,
    require_integer,
    require_real,
)
from ..differentiable import Saved, differentiable, gradients
from ..masks.algebra import host_array
from .padding import require_lengths, without_padding
from .precision import cast_like, require_same_shape, widened

KERNELS = ("softmax", "relu")
STABILISERS = ("token", "sequence", None)

EPSILON = {"softmax": 0.0, "relu": 1e-3}
REFERENCE_EPSILON = {"softmax": 1e-4, "relu": 1e-3}
"""That of the original for the TPU and of those that were made after it."""


def random_projection(num_features: int, width: int, *, orthogonal: bool = True, scaling: int = 0,
                      rng: Any = None) -> np.ndarray:
    """Draw the directions that random features look along: one row for each feature.

    Orthogonal rows come in blocks of `width`: the rows of a block are an orthogonal matrix drawn
    uniformly (the Q of a matrix of normal numbers, the diagonal of whose R is made positive), each
    times a length. E.g. 5 features of width 2: rows 0 and 1 are at right angles, and so are 2 and
    3; 4 stands alone.

    Parameters
    ----------
    num_features : int >= 1
        F.
    width : int >= 1
        D.
    orthogonal : bool
        False: the directions are independent.
    scaling : 0 or 1
        0: a row is as long as a vector of D normal numbers, so each row by itself is such a vector.
        1: all are ``sqrt(D)`` long.
    rng : int, numpy.random.Generator or None
        Where the numbers come from (`numpy.random.default_rng`).

    Returns
    -------
    numpy.ndarray, float64, shape (F, D)

    Raises
    ------
    OptionError
        A number is too small, or `scaling` neither 0 nor 1.

    Notes
    -----
    O(F D^2).

    References
    ----------
    .. [1] Choromanski et al., "Rethinking Attention with Performers", 2021, arXiv:2009.14794,
       section 2.4.
    .. [2] Yu et al., "Orthogonal Random Features", 2016, arXiv:1610.09072.
    .. [3] Mezzadri, "How to generate random matrices from the classical compact groups", 2007,
       arXiv:math-ph/0609050, section 5 (the diagonal of R).

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features import random_projection
    >>> w = random_projection(5, 2, scaling=1, rng=0)
    >>> bool(abs(w[0] @ w[1]) < 1e-12), np.round(np.linalg.norm(w, axis=1) ** 2, 6)
    (True, array([2., 2., 2., 2., 2.]))
    """
    num_features = require_integer("num_features", num_features, minimum=1)
    width = require_integer("width", width, minimum=1)
    require_choice("scaling", scaling, (0, 1))
    rng = np.random.default_rng(rng)
    if orthogonal:
        blocks = [_orthogonal(width, rng) for _ in range(math.ceil(num_features / width))]
        rows = np.concatenate(blocks)[:num_features]
    else:
        rows = rng.standard_normal((num_features, width))
        if scaling == 0:
            return rows
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    if scaling == 1:
        return rows * math.sqrt(width)
    return rows * np.linalg.norm(rng.standard_normal((num_features, width)), axis=1, keepdims=True)


def _orthogonal(width: int, rng: np.random.Generator) -> np.ndarray:
    """An orthogonal matrix, all of them alike probable."""
    import scipy.linalg

    q, r = scipy.linalg.qr(rng.standard_normal((width, width)))
    return (q * np.where(np.diag(r) < 0, -1.0, 1.0)).T


def projection_at(step: int, num_features: int, width: int, *, period: int, seed: int = 0,
                  orthogonal: bool = True, scaling: int = 0) -> np.ndarray:
    """Return the projection of a step of training, which is redrawn every `period` steps.

    It depends on the arguments alone, so a run that goes on from a checkpoint, or recomputes a
    forward, sees the same. E.g. ``period=1000``: steps 0 to 999 share one, 1000 to 1999 another.

    Parameters
    ----------
    step : int >= 0
        The step of training.
    num_features, width : int >= 1
        F and D.
    period : int >= 1
        Steps that share a projection.
    seed : int >= 0
        Of all of them.
    orthogonal, scaling
        As for `random_projection`.

    Returns
    -------
    numpy.ndarray, float64, shape (F, D)

    Raises
    ------
    OptionError
        A number is too small.

    Notes
    -----
    O(F D^2).

    References
    ----------
    .. [1] Choromanski et al., 2021, arXiv:2009.14794, section 4.2 (redrawing).

    Examples
    --------
    >>> from pyattn.features import projection_at
    >>> first, second, third = (projection_at(step, 8, 4, period=10) for step in (0, 9, 10))
    >>> bool((first == second).all()), bool((second == third).any())
    (True, False)
    """
    step = require_integer("step", step, minimum=0)
    period = require_integer("period", period, minimum=1)
    seed = require_integer("seed", seed, minimum=0)
    return random_projection(num_features, width, orthogonal=orthogonal, scaling=scaling,
                             rng=np.random.default_rng([seed, step // period]))


@dataclasses.dataclass(frozen=True)
class RandomFeaturesSaved(Saved):
    """The arguments of `random_features`."""

    x: Array
    projection: Array
    kernel: str
    scale: float
    epsilon: float
    stabiliser: str | None
    reference: bool
    lengths: tuple[Any, ...] | int | None

    def backward(self, dout: Array) -> Any:
        """Gradient of x, that of the stabiliser included; the projection is a constant."""
        require_same_shape("dout", dout, (*self.x.shape[:-1], self.projection.shape[0]))
        xp, dy, x, w = widened(dout=dout, x=self.x, projection=self.projection)
        dy, x = without_padding(dy, self.lengths), self.scale * without_padding(x, self.lengths)
        h = xp.matmul(x, w.mT)
        if self.kernel == "relu":
            # forward: y = relu(h) + epsilon
            dx = xp.matmul(xp.where(h > 0, dy, xp.zeros_like(dy)), w)
            return gradients(("x",))(cast_like(xp, self.scale * dx, self.x))
        half = _half_square(xp, x)
        peak, place = _peak(xp, h if self.reference else h - half, self.stabiliser, self.lengths)
        # forward: y = F^-1/2 (exp(h - half - peak) + epsilon)
        dh = w.shape[0] ** -0.5 * dy * xp.exp(h - half - peak)
        dhalf = -xp.sum(dh, axis=-1, keepdims=True)
        if place is not None:
            # forward: peak = h[place], or (h - half)[place]
            axes = -1 if self.stabiliser == "token" else (-2, -1)
            dpeak = xp.where(place, -xp.sum(dh, axis=axes, keepdims=True), xp.zeros_like(dh))
            dh = dh + dpeak
            if not self.reference:
                dhalf = dhalf - xp.sum(dpeak, axis=-1, keepdims=True)
        # forward: h = x w.T, half = |x|^2 / 2
        dx = without_padding(xp.matmul(dh, w) + dhalf * x, self.lengths)
        return gradients(("x",))(cast_like(xp, self.scale * dx, self.x))


@differentiable
def random_features(x: Array, projection: Array, *, kernel: str = "softmax",
                    scale: float | None = None, epsilon: float | None = None,
                    stabiliser: str | None = "token", reference: bool = False,
                    lengths: Any = None) -> tuple[Array, RandomFeaturesSaved]:
    """Map tokens to positive features: their products are a kernel's values in the mean.

    With ``h = (scale x) W^T``, for W the projection of F rows::

        kernel="softmax":  y = F^-1/2 (exp(h - |scale x|^2 / 2 - c) + epsilon)
        kernel="relu":     y = max(h, 0) + epsilon

    For c = 0 = epsilon and rows of W drawn by `random_projection`, ``y(q) . y(k)`` is
    ``exp(scale^2 q.k)`` in the mean, the exponential of a softmax's score. The stabiliser c keeps
    the exponential from overflowing; it cancels where features are divided by a sum of themselves.
    E.g. scale 1, x = 2, W = (1; -1): h = (2, -2), |x|^2 / 2 = 2, so exp(0) and exp(-4); c = 0.

    Parameters
    ----------
    x : array, shape (..., N, D), float16, bfloat16, float32 or float64
        Tokens; with `lengths` (..., H, N, D).
    projection : array, shape (F, D), any float dtype
        W. A constant: it has no gradient.
    kernel : "softmax" or "relu"
    scale : float, default D ** -0.25
        Multiplies x; for queries and keys alike, so that scores are divided by ``sqrt(D)``.
    epsilon : float, optional
        Default 0, and 1e-3 for "relu".
    stabiliser : "token", "sequence" or None
        Over what c is the largest ``h - |scale x|^2 / 2``: over a token's features (which cancels
        for queries), over all tokens and features of a sequence (which cancels for keys, but a
        token's features then depend on later ones), or c = 0.
    reference : bool
        As in the original code: c is the largest h, without the square; and `epsilon` is 1e-4 by
        default for "softmax".
    lengths : int or array of int, broadcasting to the leading axes, optional
        Tokens from here on are padding: their features are 0, and c is not looked for there.

    Returns
    -------
    array, shape (..., N, F), dtype of `x`

    Raises
    ------
    ShapeError, DtypeError, OptionError
        Arguments that do not fit.

    Notes
    -----
    O(N D F) time and O(N F) memory: `pyattn.performer_attention` makes features piece by piece
    instead. Computed in float32, or float64 for float64. Kept for backward: the arguments. The
    gradient is that of the whole formula: where c is the largest, at ``h[argmax]``, it has a term
    of its own, without which it is wrong for epsilon > 0, though other code leaves it out. Of equal
    largest the first counts. Where features underflow to 0, as with another stabiliser than
    "token" they may for all of a token, so do their gradients.

    References
    ----------
    .. [1] Choromanski et al., "Rethinking Attention with Performers", 2021, arXiv:2009.14794,
       section 2.3 and lemma 1 (positive features); section 3 (ReLU).

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features import random_features
    >>> y = random_features(np.array([[2.0]]), np.array([[1.0], [-1.0]]), stabiliser=None)
    >>> np.round(y * np.sqrt(2), 4)
    array([[1.    , 0.0183]])
    """
    require_choice("kernel", kernel, KERNELS)
    require_choice("stabiliser", stabiliser, STABILISERS)
    reference = require_choice("reference", reference, (False, True))
    if x.ndim < (2 if lengths is None else 3):
        raise ShapeError(f"x must be (..., N, D), with lengths (..., H, N, D); got "
                         f"{tuple(x.shape)}")
    if projection.ndim != 2 or projection.shape[1] != x.shape[-1] or not projection.shape[0]:
        raise ShapeError(f"projection must be (F, D) with D = {x.shape[-1]}; got "
                         f"{tuple(projection.shape)}")
    scale = x.shape[-1] ** -0.25 if scale is None else require_real("scale", scale)
    if epsilon is None:
        epsilon = (REFERENCE_EPSILON if reference else EPSILON)[kernel]
    epsilon = require_real("epsilon", epsilon)
    if epsilon < 0:
        raise OptionError(f"epsilon must be at least 0; got {epsilon}")
    lengths = require_lengths("lengths", lengths, tuple(x.shape[:-3]), x.shape[-2])
    xp, wide, w = widened(x=x, projection=projection)
    wide = scale * without_padding(wide, lengths)
    h = xp.matmul(wide, w.mT)
    if kernel == "relu":
        y = xp.where(h > 0, h, xp.zeros_like(h)) + epsilon
    else:
        half = _half_square(xp, wide)
        peak, _ = _peak(xp, h if reference else h - half, stabiliser, lengths)
        y = w.shape[0] ** -0.5 * (xp.exp(h - half - peak) + epsilon)
    return cast_like(xp, without_padding(y, lengths), x), RandomFeaturesSaved(
        x, projection, kernel, scale, epsilon, stabiliser, reference, lengths)


def _half_square(xp: Any, x: Array) -> Array:
    return (xp.vecdot(x, x) / 2)[..., None]


def _peak(xp: Any, h: Array, stabiliser: str | None,
          lengths: Any) -> tuple[Array | float, Array | None]:
    """Return the largest of h that `stabiliser` names, and where it is: a boolean mask like h."""
    if stabiliser is None or not math.prod(h.shape):
        return 0.0, None
    *lead, n, features = h.shape
    shape, back = (*lead, n, features), (*lead, n, 1)
    if stabiliser == "sequence":
        shape, back = (*lead, 1, n * features), (*lead, 1, 1)
        if lengths is not None:
            inside = np.arange(n) < host_array(lengths)[..., None]
            inside = arrays.from_host(xp, inside[..., None, :, None], arrays.device(h))
            h = xp.where(inside, h, xp.full_like(h, -math.inf))
    flat = xp.reshape(h, shape)
    first = xp.argmax(flat, axis=-1, keepdims=True)
    place = xp.arange(shape[-1], device=arrays.device(h)) == first
    peak = xp.reshape(xp.max(flat, axis=-1), back)
    # of padding alone there is none
    return xp.where(peak == -math.inf, xp.zeros_like(peak), peak), xp.reshape(place, tuple(h.shape))
