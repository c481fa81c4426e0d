"""Attention with a kernel of features for the softmax: linear in the number of tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

from .. import arrays
from ..arrays import Array
from ..checks import OptionError, ShapeError
from ..differentiable import Saved, differentiable, gradients
from ..engines import linear as engine
from ..engines.linear import LinearSaved
from ..features.feature_maps import FeatureMap

NAMED = ("elu1", "relu", "identity")


@dataclasses.dataclass(frozen=True)
class LinearAttentionSaved(Saved):
    """The engine's record, and those of the caller's own feature map."""

    attended: LinearSaved
    mapped: tuple[Any, Any] | None

    @property
    def stats(self) -> dict[str, int]:
        """Those of the engine."""
        return self.attended.stats

    @property
    def order(self) -> str:
        """The order that was taken, "qk" or "kv"."""
        return self.attended.order

    def backward(self, dout: Array, dstate: Any = None) -> Any:
        """Gradients of q, k, v, and of the state where one was given."""
        found = self.attended.backward(dout, dstate)._asdict()
        if self.mapped is not None:
            # forward: the engine was given phi(q) and phi(k)
            for name, saved in zip(("q", "k"), self.mapped, strict=True):
                found[name] = saved.backward(found[name])[0]
        return gradients(tuple(found))(**found)


@differentiable
def linear_attention(q: Array, k: Array, v: Array, *, feature_map: Any = "elu1",
                     causal: bool | str = False, normalize: bool = True, epsilon: float = 0.0,
                     order: str = "auto", chunk: int | None = None, state: Any = None,
                     return_state: bool = False, q_lengths: Any = None, kv_lengths: Any = None,
                     mask: Any = None) -> tuple[Any, LinearAttentionSaved]:
    """Each query attends to the keys it sees with weights ``phi(q_i) . phi(k_j)``.

    ``out_i = sum_j w_ij v_j / sum_j w_ij`` with ``w_ij = phi(q_i) . phi(k_j)``. As
    ``sum_j (phi(q_i) . phi(k_j)) v_j = phi(q_i) . (sum_j phi(k_j) v_j)``, the sum over keys can
    come first. E.g. four tokens, causal: ``out_2`` reads the state
    ``phi(k_0) v_0 + phi(k_1) v_1 + phi(k_2) v_2``, one (F, E) array however many keys there were.

    Parameters
    ----------
    q : array, shape (..., H, N, D), float16, bfloat16, float32 or float64
        Queries.
    k : array, shape (..., G, M, D), dtype of `q`
        Keys; G divides H.
    v : array, shape (..., G, M, E), dtype of `q`
        Values.
    feature_map : {"elu1", "relu", "identity"}, FeatureMap, or operation
        phi: ``elu(x) + 1``, ``max(x, 0)``, or x itself; a `FeatureMap` also projects. An operation
        is a function of one array (..., tokens, D) that returns (..., tokens, F), with a
        ``.forward`` whose ``saved.backward(dphi)`` starts with the gradient of that array.
    causal : bool or "top_left"
        Query i sees keys up to ``i + M - N`` (lengths, if given, for M and N), or up to i.
    normalize : bool
        Divide by the sum of the weights. Without, ``out_i = sum_j w_ij v_j``.
    epsilon : float, >= 0
        Added to the sums of weights; 1e-6 is what the authors' code adds.
    order : {"auto", "qk", "kv"}
        What is multiplied first: "qk" takes ``N M (F + E)`` products, "kv" ``F E (N + M)``. "auto"
        takes the lesser where all tokens fit in one chunk, and "kv" beyond that or where there is a
        state. ``saved.order`` tells.
    chunk : int, optional
        Tokens that are read at a time with order "kv", 64 by default; the result does not depend on
        it but by rounding.
    state : array, shape (..., G, F, E + 1), optional
        Sums over keys read before, which all queries see, as an earlier call with `return_state`
        returned them: (..., G, F, E) with ``normalize=False``. float32, or float64 for float64. For
        a `FeatureMap` of kind "exp" a pair, as returned.
    return_state : bool
        Also return the state after the last key. Decoding is a call for each token, with the state
        that the one before returned.
    q_lengths, kv_lengths : int or array of int, broadcasting to the leading axes, optional
        Tokens from here on are padding.
    mask : None
        Refused: a sum over keys is the same for all queries that read it.

    Returns
    -------
    array, shape (..., H, N, E), dtype of `q`
        A query that sees no key, or whose weights sum up to 0: 0. With `return_state`
        ``(out, state)``; ``saved.backward(dout, dstate)`` then takes a gradient of the state, too,
        and has one among its results where a state was given.

    Raises
    ------
    ShapeError, DtypeError, OptionError
        Arguments that do not fit; the message names the argument, the rule and what was given.

    Notes
    -----
    Time O(N F E + N chunk (F + E)) and, beside the operands, memory O(F E), forward and backward.
    Kept for backward: the arguments, the output and a denominator for each row; features are
    computed again. The authors add an epsilon to every denominator [1]_; here, unless asked for,
    only those that are exactly 0 are treated apart. The weights of "identity" have any sign, and so
    have their sums: it is usually not normalised.

    References
    ----------
    .. [1] Katharopoulos et al., "Transformers are RNNs: Fast Autoregressive Transformers with
       Linear Attention", 2020, arXiv:2006.16236, sections 3.2-3.4.

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 6, 8))
    >>> whole = pyattn.linear_attention(q, k, v, causal=True)
    >>> first, state = pyattn.linear_attention(q[:, :4], k[:, :4], v[:, :4], causal=True,
    ...                                        return_state=True)
    >>> rest = pyattn.linear_attention(q[:, 4:], k[:, 4:], v[:, 4:], causal=True, state=state)
    >>> np.allclose(np.concatenate([first, rest], axis=1), whole), state.shape
    (True, (2, 8, 9))
    """
    if mask is not None:
        raise OptionError("linear attention sums over keys before a query reads them, so it takes "
                          "no mask but causal, q_lengths and kv_lengths")
    options = {"causal": causal, "normalize": normalize, "epsilon": epsilon, "order": order,
               "chunk": chunk, "state": state, "return_state": return_state,
               "q_lengths": q_lengths, "kv_lengths": kv_lengths}
    if isinstance(feature_map, str) and feature_map in NAMED:
        feature_map = FeatureMap(feature_map)
    if isinstance(feature_map, FeatureMap):
        result, attended = engine.forward(q, k, v, feature_map=feature_map, **options)
        return result, LinearAttentionSaved(attended, None)
    if feature_map == "softmax":
        raise OptionError("softmax attention is no product of features of queries and keys, so its "
                          "order cannot be changed; efficient_attention and performer_attention "
                          "come near it, pyattn.attention is it")
    if not hasattr(feature_map, "forward"):
        raise OptionError(f"feature_map must be one of {', '.join(map(repr, NAMED))}, a FeatureMap "
                          f"or an operation with .forward; got {feature_map!r}")
    arrays.namespace(q, k, v)
    (phi_q, of_q), (phi_k, of_k) = feature_map.forward(q), feature_map.forward(k)
    for name, x, phi in (("q", q, phi_q), ("k", k, phi_k)):
        if tuple(phi.shape[:-1]) != tuple(x.shape[:-1]):
            raise ShapeError(f"feature_map must keep all axes of {name} but the last, "
                             f"{tuple(x.shape[:-1])}; got {tuple(phi.shape)}")
    result, attended = engine.forward(phi_q, phi_k, v, feature_map=FeatureMap("identity"),
                                      **options)
    return result, LinearAttentionSaved(attended, (of_q, of_k))
