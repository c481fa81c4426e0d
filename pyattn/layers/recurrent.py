"""A gated recurrent network on plain weight arrays.

Letters: N tokens of width C, S numbers of state.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..checks import ShapeError, require_integer
from ..differentiable import Saved, differentiable, gradients
from ..engines.convolution import flat_lengths
from ..features.activation import logistic
from ..features.precision import cast_like, require_same_shape, widened
from .convolution import _inside
from .linear import affine, affine_gradients, require_affine

NAMES = ("x", "w_x", "w_h", "b_x", "b_h", "state")


def init_gru(rng: Any, width: int, state: int, *, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Fresh weights and biases for `gru`, as NumPy arrays.

    Uniform within ``1 / sqrt(S)``, as torch draws them.

    Parameters
    ----------
    rng : int or numpy.random.Generator
        Where the weights are drawn from.
    width, state : int
        C and S.
    dtype : dtype
        Of every array.

    Returns
    -------
    dict of arrays
        ``w_x (C, 3 S)``, ``w_h (S, 3 S)``, ``b_x`` and ``b_h (3 S,)``.

    Examples
    --------
    >>> from pyattn.layers import init_gru
    >>> {name: x.shape for name, x in init_gru(0, 4, 2).items()}
    {'w_x': (4, 6), 'w_h': (2, 6), 'b_x': (6,), 'b_h': (6,)}
    """
    rng = np.random.default_rng(rng)
    width = require_integer("width", width, minimum=1)
    state = require_integer("state", state, minimum=1)
    most = 1 / math.sqrt(state)
    shapes = {"w_x": (width, 3 * state), "w_h": (state, 3 * state), "b_x": (3 * state,),
              "b_h": (3 * state,)}
    return {name: rng.uniform(-most, most, shape).astype(dtype) for name, shape in shapes.items()}


@dataclasses.dataclass(frozen=True)
class GruSaved(Saved):
    """The arguments of `gru`, and of each token the state before it and its gates."""

    x: Array
    w_x: Array
    w_h: Array
    b_x: Array | None
    b_h: Array | None
    state: Array | None
    lengths: tuple[int, ...]
    before: Array
    """(B, N, S), computing dtype."""
    gates: Array
    """(B, N, 4 S): r, z, n, and what r multiplies."""

    def backward(self, dout: Array) -> Any:
        """Gradients of the arrays given, back through time."""
        size, lead = self.w_h.shape[0], tuple(self.x.shape[:-2])
        require_same_shape("dout", dout, (*self.x.shape[:-1], size))
        xp, dy, x, w_x, w_h, before, gates = widened(
            dout=dout, x=self.x, w_x=self.w_x, w_h=self.w_h, before=self.before, gates=self.gates)
        dy, x = (_inside(xp, y, self.lengths) for y in (dy, x))
        batch, n = before.shape[:2]
        dy = xp.reshape(dy, (batch, n, size))
        r, z, new, a = (gates[..., i * size:(i + 1) * size] for i in range(4))
        # forward: h' = (1 - z) n + z h; n = tanh(x_n + r a); the slopes of all tokens at once
        slope_n = (1 - z) * (1 - new * new)
        slope_z = (before - new) * z * (1 - z)
        slope_r = a * r * (1 - r)
        turned = w_h.T
        dh = xp.zeros((batch, size), dtype=dy.dtype, device=arrays.device(dy))
        by_x, by_h = [], []
        for t in range(n - 1, -1, -1):
            dh = dh + dy[:, t, :]
            dn = dh * slope_n[:, t, :]
            dz, dr, da = dh * slope_z[:, t, :], dn * slope_r[:, t, :], dn * r[:, t, :]
            by_x.append(xp.concat([dr, dz, dn], axis=-1))
            by_h.append(xp.concat([dr, dz, da], axis=-1))
            # forward: the gates read h @ w_h + b_h
            dh = dh * z[:, t, :] + xp.matmul(by_h[-1], turned)
        none = xp.zeros((batch, 0, 3 * size), dtype=dy.dtype, device=arrays.device(dy))
        dgx, dgh = (xp.stack(rows[::-1], axis=1) if rows else none for rows in (by_x, by_h))
        dx, dw_x, db_x = affine_gradients(xp, x, w_x, dgx)
        _, dw_h, db_h = affine_gradients(xp, before, w_h, dgh)
        found = {"x": _inside(xp, dx, self.lengths), "w_x": dw_x, "w_h": dw_h, "b_x": db_x,
                 "b_h": db_h, "state": xp.reshape(dh, (*lead, size))}
        given = {name: cast_like(xp, found[name], getattr(self, name)) for name in NAMES
                 if getattr(self, name) is not None}
        return gradients(tuple(given))(**given)


@differentiable
def gru(x: Array, w_x: Array, w_h: Array, b_x: Array | None = None, b_h: Array | None = None,
        state: Array | None = None, *, lengths: Any = None) -> tuple[Array, GruSaved]:
    """Pass along a sequence with a state that gates update, and give the state at every token.

    With the gates r (reset), z (update) and n (new) side by side in this order, as torch has them,

        r, z = sigmoid(x @ w_x + b_x + h @ w_h + b_h)      their parts of the columns
        n = tanh(x @ w_x + b_x + r * (h @ w_h + b_h))      its part
        h' = (1 - z) n + z h

    Parameters
    ----------
    x : array, shape (..., N, C), float16 / bfloat16 / float32 / float64
        Tokens.
    w_x, w_h : arrays, shapes (C, 3 S) and (S, 3 S)
        The transposes of torch's ``weight_ih_l0`` and ``weight_hh_l0``.
    b_x, b_h : arrays, shape (3 S,), optional
        torch's ``bias_ih_l0`` and ``bias_hh_l0``.
    state : array, shape (..., S), optional
        The state before the first token. Default zeros.
    lengths : int or array of int, broadcasting to the leading axes, optional
        Tokens from here on are padding, whose output is 0.

    Returns
    -------
    array, shape (..., N, S), dtype of `x`
        Row t has seen tokens 0 to t. Gradients: x, w_x, w_h, then b_x, b_h and state where given.

    Raises
    ------
    ShapeError
        The widths do not fit.

    Notes
    -----
    O(N (C + S) S), one token after another; what tokens bring is one matrix product, and so are the
    gradients of the weights. Computes in float32 (float64 if any argument is). Kept for backward:
    the arguments, and 5 S numbers a token.

    References
    ----------
    .. [1] Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", 2014,
       arXiv:1406.1078, section 2.3. There r multiplies h before the product, and z and 1 - z have
       each other's place; here both are as in torch and cuDNN.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.layers import gru, init_gru
    >>> h, saved = gru.forward(np.ones((2, 5, 4), np.float32), **init_gru(0, 4, 3))
    >>> h.shape, saved.backward(h)._fields
    ((2, 5, 3), ('x', 'w_x', 'w_h', 'b_x', 'b_h'))
    """
    if w_h.ndim != 2 or w_h.shape[1] != 3 * w_h.shape[0]:
        raise ShapeError(f"w_h must be (S, 3 S); got {tuple(w_h.shape)}")
    size = w_h.shape[0]
    if x.ndim < 2:
        raise ShapeError(f"x must be (..., N, C); got {tuple(x.shape)}")
    require_affine(x, w_x, b_x, ("x", "w_x", "b_x"))
    if w_x.shape[1] != 3 * size:
        raise ShapeError(f"w_x must have 3 S = {3 * size} columns, as w_h; got {tuple(w_x.shape)}")
    for name, given, shape in (("b_h", b_h, (3 * size,)), ("state", state,
                                                           (*x.shape[:-2], size))):
        if given is not None:
            require_same_shape(name, given, shape)
    lead, n = tuple(x.shape[:-2]), x.shape[-2]
    flat = flat_lengths(lengths, lead, n)
    xp, wide, wx, wh, bx, bh, h = widened(x=x, w_x=w_x, w_h=w_h, b_x=b_x, b_h=b_h, state=state)
    batch = math.prod(lead)
    brought = xp.reshape(affine(xp, _inside(xp, wide, flat), wx, bx), (batch, n, 3 * size))
    where = arrays.device(wide)
    h = (xp.zeros((batch, size), dtype=wide.dtype, device=where) if h is None
         else xp.reshape(h, (batch, size)))
    before, gates, states = [], [], []
    for t in range(n):
        own = affine(xp, h, wh, bh)
        rz = logistic(xp, brought[:, t, :2 * size] + own[:, :2 * size])
        r, z, a = rz[:, :size], rz[:, size:], own[:, 2 * size:]
        new = xp.tanh(brought[:, t, 2 * size:] + r * a)
        before.append(h)
        gates.append(xp.concat([rz, new, a], axis=-1))
        h = new + z * (h - new)
        states.append(h)
    if n:
        stacked = [xp.stack(rows, axis=1) for rows in (before, gates, states)]
    else:
        stacked = [xp.zeros((batch, 0, width), dtype=wide.dtype, device=where)
                   for width in (size, 4 * size, size)]
    y = _inside(xp, xp.reshape(stacked[2], (*lead, n, size)), flat)
    return cast_like(xp, y, x), GruSaved(x, w_x, w_h, b_x, b_h, state, flat, *stacked[:2])
