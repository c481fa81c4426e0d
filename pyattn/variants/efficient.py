"""Efficient attention: a softmax over features for queries and over tokens for keys."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..checks import DtypeError, OptionError, ShapeError
from ..differentiable import Saved, differentiable, gradients
from ..engines import linear as engine
from ..engines.linear import LinearSaved
from ..engines.placement import place
from ..engines.softmax import require_operands
from ..features.feature_maps import FeatureMap


@dataclasses.dataclass(frozen=True)
class EfficientSaved(Saved):
    """The engine's record, whose q and k are the two softmaxes."""

    attended: LinearSaved
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    """Those of q and k as they were given: padding may have given them all leading axes."""

    @property
    def stats(self) -> dict[str, int]:
        """Those of the engine."""
        return self.attended.stats

    def backward(self, dout: Array) -> Any:
        """Gradients of q, k and v."""
        done = self.attended
        xp = arrays.namespace(done.q, dout)
        if tuple(dout.shape) != tuple(done.out.shape):
            raise ShapeError(f"dout must have the shape of the output, {tuple(done.out.shape)}; "
                             f"got {tuple(dout.shape)}")
        if arrays.accumulator(xp, dout) != done.out.dtype:
            raise DtypeError("dout must have the dtype of the output; got "
                             f"{arrays.dtype_name(dout)}")
        found = done.backward(arrays.cast(xp, dout, done.out.dtype))
        # forward: phi = exp(x) / sum exp(x), over features and over tokens
        dq, dk = (phi * (dphi - xp.sum(phi * dphi, axis=axis, keepdims=True))
                  for phi, dphi, axis in ((done.q, found.q, -1), (done.k, found.k, -2)))
        dq, dk = (_summed_to(xp, x, shape) for x, shape in zip((dq, dk), self.shapes, strict=True))
        return gradients(("q", "k", "v"))(*(arrays.cast(xp, x, dout.dtype)
                                            for x in (dq, dk, found.v)))


@differentiable
def efficient_attention(q: Array, k: Array, v: Array, *, causal: bool = False,
                        q_lengths: Any = None, kv_lengths: Any = None,
                        mask: Any = None) -> tuple[Array, EfficientSaved]:
    """Each query reads D summaries of all tokens, with weights that sum up to 1.

    ``out = softmax_D(q) (softmax_N(k)^T v)``: column f of the keys says which tokens summary f is
    about, feature f of a query how much of it the query takes. Nothing is scaled. E.g. ``D = 1``:
    there is one summary, ``softmax(k)^T v``, and every query has it for its output.

    Parameters
    ----------
    q : array, shape (..., H, N, D), float16, bfloat16, float32 or float64
        Queries.
    k : array, shape (..., G, M, D), dtype of `q`
        Keys; G divides H.
    v : array, shape (..., G, M, E), dtype of `q`
        Values.
    causal : False
        Anything else is refused: the softmax over tokens is one for all queries.
    q_lengths, kv_lengths : int or array of int, broadcasting to the leading axes, optional
        Tokens from here on are padding.
    mask : None
        Refused, for the same reason.

    Returns
    -------
    array, shape (..., H, N, E), dtype of `q`
        Without any keys: 0.

    Raises
    ------
    ShapeError, DtypeError, OptionError
        Arguments that do not fit; the message names the argument, the rule and what was given.

    Notes
    -----
    Time O((N + M) D E), keys and values first. This is not softmax attention with its products in
    another order, which there is not: ``softmax(q k^T) v`` needs the rows of q k^T. Here too each
    query's implied weights on the tokens are positive and sum up to 1. Kept for backward: the two
    softmaxes, the values and the output; 16-bit floats are computed, and kept, as float32.

    References
    ----------
    .. [1] Shen et al., "Efficient Attention: Attention with Linear Complexities", 2021,
       arXiv:1812.01243, section 3.2, with the softmax for its normalisation.

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 6, 8))
    >>> out, saved = pyattn.efficient_attention.forward(q, k, v)
    >>> weights = pyattn.efficient_attention(q, k, np.broadcast_to(np.eye(6), (2, 6, 6)))
    >>> np.allclose(weights.sum(axis=-1), 1), np.allclose(weights @ v, out)
    (True, True)
    """
    if causal is not False:
        raise OptionError("efficient attention has one softmax over all tokens, which shows every "
                          f"query the future; causal must be False; got {causal!r}")
    if mask is not None:
        raise OptionError("efficient attention has one softmax over all tokens, so it takes no "
                          "mask but q_lengths and kv_lengths")
    xp = arrays.namespace(q, k, v)
    batch = require_operands(q, k, v)
    placement = place(batch, q.shape[-2], k.shape[-2], "bottom_right", q_lengths, kv_lengths, None)
    acc = arrays.accumulator(xp, q)
    wide_q, wide_k, wide_v = (arrays.cast(xp, x, acc) for x in (q, k, v))
    of_q = _softmax(xp, wide_q, batch, placement.q_lengths, -1)
    of_k = _softmax(xp, wide_k, batch, placement.kv_lengths, -2)
    out, attended = engine.forward(of_q, of_k, wide_v, feature_map=FeatureMap("identity"),
                                   normalize=False, order="kv", q_lengths=q_lengths,
                                   kv_lengths=kv_lengths)
    return (arrays.cast(xp, out, q.dtype),
            EfficientSaved(attended, (tuple(q.shape), tuple(k.shape))))


def _softmax(xp: Any, x: Array, batch: tuple[int, ...], lengths: np.ndarray, axis: int) -> Array:
    """Softmax along an axis over tokens within their lengths; zeros for the others."""
    tokens = x.shape[-2]
    if not tokens:
        return x
    padded = (lengths != tokens).any()
    if padded:
        live = np.arange(tokens) < lengths.reshape(*batch, 1, 1)
        live = arrays.from_host(xp, live[..., None], arrays.device(x))
        x = xp.where(live, x, 0.0 if axis == -1 else -np.inf)
    top = xp.max(x, axis=axis, keepdims=True)
    weights = xp.exp(x - xp.where(top == -np.inf, 0.0, top))
    total = xp.sum(weights, axis=axis, keepdims=True)
    phi = weights / xp.where(total == 0, 1.0, total)
    return xp.where(live, phi, 0.0) if padded else phi


def _summed_to(xp: Any, x: Array, shape: tuple[int, ...]) -> Array:
    """Sum over the axes that an array of `shape` was broadcast along to be one like `x`."""
    own = (1,) * (x.ndim - len(shape)) + shape
    shared = tuple(axis for axis, size in enumerate(own) if size != x.shape[axis])
    return xp.reshape(xp.sum(x, axis=shared), shape) if shared else xp.reshape(x, shape)
