"""Additive (Bahdanau) attention: a small network scores each pair of query and key."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..checks import DtypeError, ShapeError, require_choice
from ..differentiable import Saved, differentiable, gradients
from ..engines import additive as engine
from ..engines.additive import AdditiveSaved
from .attention import CAUSAL, intersected


@dataclasses.dataclass(frozen=True)
class AdditiveAttentionSaved(Saved):
    """The engine's record, and the arguments of the projections before it."""

    attended: AdditiveSaved
    q: Array
    k: Array
    w_q: Array
    w_k: Array
    w_score: Array
    b: Array | None

    @property
    def stats(self) -> dict[str, int]:
        """Those of the engine: pairs, tiles, flops, bytes."""
        return self.attended.stats

    def backward(self, dout: Array, dlse: Array | None = None) -> Any:
        """Gradients of the array arguments that were given, each in its own dtype and shape.

        Parameters
        ----------
        dout : array, shape and dtype of the output
        dlse : array, shape (..., H, N), optional
            Gradient of the log-sum-exp, where the loss uses it.
        """
        found = self.attended.backward(dout, dlse)
        xp, (da, dc, dv, dw) = arrays.namespace(self.q), found
        # forward: a = q w_q + b, c = k w_k
        dq, dw_q = _backward(xp, self.q, self.w_q, da)
        dk, dw_k = _backward(xp, self.k, self.w_k, dc)
        grads = {"q": dq, "k": dk, "v": dv, "w_q": dw_q, "w_k": dw_k,
                 "w_score": _summed(xp, dw, self.w_score)}
        if self.b is not None:
            grads["b"] = _summed(xp, xp.sum(_by_head(xp, da), axis=1), self.b)
        return gradients(tuple(grads))(**grads)


@differentiable
def additive_attention(q: Array, k: Array, v: Array, w_q: Array, w_k: Array, w_score: Array,
                       b: Array | None = None, *, causal: bool | str = False, mask: Any = None,
                       kv_lengths: Any = None, q_lengths: Any = None,
                       return_lse: bool = False) -> tuple[Any, AdditiveAttentionSaved]:
    """Attention whose scores are a small network's, not products.

    ``out_i = sum_j p_ij v_j``, ``p_i = softmax_j(e_ij)`` over the keys allowed, and
    ``e_ij = w_score . tanh(q_i w_q + b + k_j w_k)``. Queries and keys may differ in width. E.g.
    with one feature, ``w_q = w_k = w_score = 1``, q = (0) and k = (0, 1): scores 0 and tanh 1.
    With ``causal=True`` and four tokens: 0 sees {0}, 1 sees {0, 1}, 2 sees {0, 1, 2}, 3 sees all.

    Parameters
    ----------
    q : array, shape (..., H, N, Dq), float16, bfloat16, float32 or float64
        Queries: the decoder's states in the paper.
    k : array, shape (..., G, M, Dk), dtype of `q`
        Keys: the encoder's states; G divides H, and query head h reads head ``h // (H // G)``.
    v : array, shape (..., G, M, E), dtype of `q`
        Values; in the paper these are the keys.
    w_q : array, shape (Dq, A) or (H, Dq, A), any float dtype
        Projection of queries to A features, for all heads or for each.
    w_k : array, shape (Dk, A) or (G, Dk, A), any float dtype
        Projection of keys.
    w_score : array, shape (A,) or (H, A), any float dtype
        What the features' tanhs are weighted with.
    b : array, shape (A,) or (H, A), any float dtype, optional
        Bias of the projections.
    causal : bool or "top_left"
        A query sees keys up to its own position; positions as for `pyattn.attention`.
    mask : Mask, BlockMask or bool array that broadcasts to (..., H, N, M), optional
        Which pairs are allowed; intersected with `causal`.
    kv_lengths, q_lengths : int or array of int, broadcasting to the leading axes, optional
        Tokens from here on are padding.
    return_lse : bool
        Also return the log-sum-exp of each row, (..., H, N), float32 (float64 for float64).

    Returns
    -------
    array, shape (..., H, N, E), dtype of `q`
        Rows that see no key are 0, and their lse is -inf. With `return_lse` a tuple.

    Raises
    ------
    ShapeError, DtypeError, OptionError
        Arguments that do not fit; the message names the argument, the rule and what was given.

    Notes
    -----
    There is no `scale`: `w_score` is one. Time O(pairs * (A + E)), a tanh for each pair and
    feature, counted in 64 x 64 tiles; those that the mask leaves empty are not visited. Beside the
    operands O((N + M) A) memory for the projected queries and keys, which are kept for backward
    with the arguments, the output and the lse; never (N, M, A) numbers, nor (N, M). The backward
    computes each tanh once more. Features, scores and sums are float32 (float64 for float64). A
    NaN or inf in a key or value reaches only queries that may see it.

    References
    ----------
    .. [1] Bahdanau, Cho, Bengio, "Neural Machine Translation by Jointly Learning to Align and
       Translate", 2015, arXiv:1409.0473, section 3.1 and appendix A.1.2. There is no bias there,
       and one head.

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> rng = np.random.default_rng(0)
    >>> q, k = rng.standard_normal((1, 2, 6)), rng.standard_normal((1, 4, 5))
    >>> w_q, w_k, w = (rng.standard_normal(shape) for shape in ((6, 3), (5, 3), (3,)))
    >>> out, saved = pyattn.additive_attention.forward(q, k, k, w_q, w_k, w)
    >>> scores = np.tanh((q @ w_q)[..., :, None, :] + (k @ w_k)[..., None, :, :]) @ w
    >>> weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    >>> np.allclose(out, weights @ k), saved.backward(out)._fields
    (True, ('q', 'k', 'v', 'w_q', 'w_k', 'w_score'))
    """
    named = {"q": q, "k": k, "v": v, "w_q": w_q, "w_k": w_k, "w_score": w_score, "b": b}
    xp = arrays.namespace(*named.values())
    arrays.require_same_device(named)
    causal = require_choice("causal", causal, (False, True, "top_left"))
    _check(**named)
    if causal is not False:
        mask = intersected(mask, CAUSAL)
    acc, heads = arrays.accumulator(xp, q), q.shape[-3]
    a, c = _projected(xp, q, w_q, acc), _projected(xp, k, w_k, acc)
    if b is not None:
        a = a + arrays.cast(xp, b, acc)[..., None, :]
    weights = xp.broadcast_to(arrays.cast(xp, w_score, acc), (heads, w_score.shape[-1]))
    out, attended = engine.forward(
        a, c, v, weights, mask=mask, q_lengths=q_lengths, kv_lengths=kv_lengths,
        alignment="top_left" if causal == "top_left" else "bottom_right", return_lse=return_lse)
    return out, AdditiveAttentionSaved(attended, q, k, w_q, w_k, w_score, b)


def _check(q: Array, k: Array, v: Array, w_q: Array, w_k: Array, w_score: Array,
           b: Array | None) -> None:
    """Check what the engine cannot: it meets queries and keys after their projection."""
    dtypes = tuple(arrays.require_float(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    if not dtypes[0] == dtypes[1] == dtypes[2]:
        raise DtypeError("q, k and v must share one dtype; got q {}, k {}, v {}".format(*dtypes))
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim < 3:
            raise ShapeError(f"{name} must have at least 3 axes (..., heads, tokens, width); "
                             f"got {tuple(x.shape)}")
    heads, groups = q.shape[-3], k.shape[-3]
    if (groups == 0 and heads > 0) or (groups > 0 and heads % groups):
        raise ShapeError(f"q has {heads} heads, which must be a multiple of the {groups} heads of "
                         f"k and v (q {tuple(q.shape)}, k {tuple(k.shape)})")
    if k.shape[-3:-1] != v.shape[-3:-1]:
        raise ShapeError("v must have the heads and tokens of k; got "
                         f"k {tuple(k.shape)}, v {tuple(v.shape)}")
    features = w_score.shape[-1] if w_score.ndim else 0
    for name, x, own, letters in (
            ("w_q", w_q, (heads, q.shape[-1], features), "(Dq, A) or (H, Dq, A)"),
            ("w_k", w_k, (groups, k.shape[-1], features), "(Dk, A) or (G, Dk, A)"),
            ("w_score", w_score, (heads, features), "(A,) or (H, A)"),
            ("b", b, (heads, features), "(A,) or (H, A)")):
        if x is None:
            continue
        arrays.require_float(name, x)
        if tuple(x.shape) not in (own, own[1:]) or not features:
            raise ShapeError(f"{name} must be {letters} = {own[1:]} or {own}, with A of w_score "
                             f"at least 1; got {tuple(x.shape)}")


def _projected(xp: Any, x: Array, w: Array, acc: Any) -> Array:
    """Return x w in acc, (..., heads, tokens, A)."""
    # what padding holds may be anything
    with np.errstate(all="ignore"):
        return xp.matmul(arrays.cast(xp, x, acc), arrays.cast(xp, w, acc))


def _backward(xp: Any, x: Array, w: Array, dy: Array) -> tuple[Array, Array]:
    """Gradients of x and w of y = x w, each in its own dtype and shape."""
    dx = xp.matmul(dy, xp.matrix_transpose(arrays.cast(xp, w, dy.dtype)))
    given = arrays.cast(xp, x, dy.dtype)
    # to ask a device would make the host wait for it
    if type(given) is not np.ndarray or not np.isfinite(given).all():
        # what padding holds meets gradients of 0, and 0 * NaN must not happen
        met = xp.any(dy != 0, axis=-1, keepdims=True)
        given = xp.where(met, given, xp.zeros_like(given))
    shared = w.ndim == 2
    left, right = ((xp.reshape(y, (-1, y.shape[-1])) if shared else _by_head(xp, y))
                   for y in (given, dy))
    dw = xp.matmul(xp.matrix_transpose(left), right)
    return arrays.cast(xp, dx, x.dtype), arrays.cast(xp, dw, w.dtype)


def _by_head(xp: Any, x: Array) -> Array:
    """(..., H, N, A) as (H, all N, A)."""
    x = xp.reshape(x, (math.prod(x.shape[:-3]), *x.shape[-3:]))
    x = xp.permute_dims(x, (1, 0, 2, 3))
    return xp.reshape(x, (x.shape[0], x.shape[1] * x.shape[2], x.shape[3]))


def _summed(xp: Any, dx: Array, x: Array) -> Array:
    """A gradient (H, A) in the shape and dtype of `x`."""
    return arrays.cast(xp, xp.sum(dx, axis=0) if x.ndim == 1 else dx, x.dtype)
