"""Softmax attention estimated by random features, in time linear in the tokens."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..checks import OptionError, ShapeError, require_choice, require_integer, require_real
from ..differentiable import ON_HOST, Saved, differentiable, gradients
from ..engines import linear
from ..engines.linear import LinearSaved
from ..engines.softmax import require_operands
from ..features.feature_maps import FeatureMap
from ..features.random_features import (
    EPSILON,
    KERNELS,
    REFERENCE_EPSILON,
    RandomFeaturesSaved,
    random_features,
    random_projection,
)

DECISIONS = ("projection",)


@dataclasses.dataclass(frozen=True)
class PerformerSaved(Saved):
    """The engine's record, and the directions of the features."""

    attended: LinearSaved
    projection: np.ndarray = dataclasses.field(metadata=ON_HOST)
    made: tuple[RandomFeaturesSaved, RandomFeaturesSaved] | None
    """Of `reference`: how features of queries and keys came about, where the engine does not."""

    @property
    def decisions(self) -> dict[str, Array]:
        """``projection``, (F, D)."""
        return {"projection": self.projection}

    @property
    def stats(self) -> dict[str, int]:
        """Those of the engine; flops with those of features that were made before it."""
        found = self.attended.stats
        for saved in self.made or ():
            found["flops"] += 2 * math.prod(saved.x.shape) * self.projection.shape[0]
        return found

    def backward(self, dout: Array, dstate: Any = None) -> Any:
        """Gradients of q, k, v, and of the state where one was given."""
        found = self.attended.backward(dout, dstate)
        if self.made is None:
            return found
        q, k = (saved.backward(x).x for saved, x in zip(self.made, found[:2], strict=True))
        return gradients(("q", "k", "v"))(q, k, found.v)


@differentiable
def performer_attention(q: Array, k: Array, v: Array, *, num_features: int | None = None,
                        kernel: str = "softmax", projection: Array | None = None, rng: Any = None,
                        causal: bool | str = False, scale: float | None = None,
                        epsilon: float | None = None, order: str = "auto",
                        chunk: int | None = None, state: Any = None, return_state: bool = False,
                        q_lengths: Any = None, kv_lengths: Any = None, mask: Any = None,
                        reference: bool = False, decisions: dict[str, Any] | None = None,
                        ) -> tuple[Any, PerformerSaved]:
    """FAVOR+: attention whose weights are products of positive random features.

    ``out_i = sum_j a_ij v_j / sum_j a_ij`` over the keys that query i sees, with
    ``a_ij = phi(q_i) . phi(k_j)`` and, for ``x' = sqrt(scale) x``::

        kernel="softmax":  phi(x) = F^-1/2 exp(W x' - |x'|^2 / 2)     the mean of a: exp(scale q.k)
        kernel="relu":     phi(x) = max(W x', 0) + epsilon

    The F rows of W point in random directions, at right angles to each other in blocks of D. E.g.
    four tokens, causal: token 2 is a mean of values 0, 1, 2, weighed by estimates of their
    exponentials; from a state of F (E + 1) numbers, the sums over tokens 0 and 1.

    Parameters
    ----------
    q : array, shape (..., H, N, D), float16, bfloat16, float32 or float64
        Queries. Leading axes are batch axes and broadcast; strided views are read in place.
    k : array, shape (..., G, M, D), dtype of `q`
        Keys; G divides H.
    v : array, shape (..., G, M, E), dtype of `q`
        Values.
    num_features : int >= 1, default ``floor(D ln D)``
        F. The error falls as ``F ** -0.5``.
    kernel : "softmax" or "relu"
        What is estimated; "relu" is a kernel of its own.
    projection : array, shape (F, D), any float dtype, optional
        W, instead of a draw by `pyattn.features.random_projection`; a constant, it has no gradient.
        `pyattn.features.projection_at` tells one that is redrawn now and then in training.
    rng : int, numpy.random.Generator or None
        Where W comes from: an int gives the same in every call, None another in each.
    causal : bool or "top_left"
        A query sees keys up to its own position; positions as for `pyattn.attention`.
    scale : float > 0, default D ** -0.5
        Multiplies ``q.k``.
    epsilon : float >= 0, optional
        Added to features: 1e-3 for "relu", and none for "softmax", which needs none.
    order : "auto", "qk" or "kv"
        Queries with keys first, or keys with values; by default what is cheaper.
    chunk : int >= 1, optional
        Tokens of a step.
    state, return_state
        Where a stream left off, as an earlier call with `return_state` told; then also a
        `projection`, `decisions` or an int for `rng`, for its features are those of one W.
    q_lengths, kv_lengths : int or array of int, broadcasting to the leading axes, optional
        Tokens from here on are padding.
    mask : None
        Refused: a sum over keys is the same for all queries that read it.
    reference : bool
        Features as in the original code: `epsilon` 1e-4 is added to those of "softmax" too, divided
        by ``exp(c)`` with c the largest of W x', for keys over the sequence. Causal outputs
        then depend on later keys, a little, and there is no state.
    decisions : dict, optional
        What an earlier call drew: ``projection``.

    Returns
    -------
    array, shape (..., H, N, E), dtype of `q`
        A query that sees no key: 0. With `return_state` a tuple ``(out, state)``.

    Raises
    ------
    ShapeError, DtypeError, OptionError
        Arguments that do not fit; the message names the argument, the rule and what was given.
    BackendError
        Arrays of different libraries or devices, or a forced backend that cannot run the call.

    Notes
    -----
    Time O((N + M) F (D + E)), memory O(N + F E) beside the operands and the output: features are
    made step by step, forward and again backward; with `reference` they are arrays, O((N + M) F).
    Gradients: q, k, v, and state where given; ``saved.backward(dout, dstate)``.

    Nothing overflows, whatever the lengths of q and k: a query's largest exponent is taken from
    all of its exponents, which cancels in the quotient; that of the keys so far is carried along,
    as in an online softmax. So the causal output is strictly causal, to the last bit. The paper's
    code takes the largest over all keys, or over the batch too, and adds `epsilon`.

    References
    ----------
    .. [1] Choromanski et al., "Rethinking Attention with Performers", 2021, arXiv:2009.14794,
       section 2.

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 50, 8)) / 2
    >>> exact = pyattn.attention(q, k, v)
    >>> few, many = (pyattn.performer_attention(q, k, v, num_features=f, rng=0) for f in (16, 4096))
    >>> bool(abs(many - exact).max() < abs(few - exact).max() / 4)
    True
    """
    require_choice("kernel", kernel, KERNELS)
    reference = require_choice("reference", reference, (False, True))
    if mask is not None:
        raise OptionError("mask must be None, as sums over keys are made before a query reads "
                          "them: there are causal, q_lengths and kv_lengths; got "
                          f"{type(mask).__name__}")
    require_operands(q, k, v)
    width = q.shape[-1]
    scale = width ** -0.5 if scale is None else require_real("scale", scale)
    if scale <= 0:
        raise OptionError(f"scale must be above 0; got {scale}")
    quirks = reference and kernel == "softmax"
    if epsilon is None:
        epsilon = (REFERENCE_EPSILON if reference else EPSILON)[kernel]
    elif kernel == "softmax" and not reference:
        raise OptionError("epsilon is added to features of kernel='relu', and with reference=True; "
                          f"got {epsilon}")
    if quirks and (state is not None or return_state):
        raise OptionError("state cannot be carried with reference=True, whose features of keys "
                          "depend on the whole sequence")
    drawn = _projection(projection, decisions, num_features, width, rng, state)
    xp = arrays.namespace(q, k, v)
    w = xp.astype(arrays.from_host(xp, drawn, arrays.device(q)), arrays.accumulator(xp, q))
    root = math.sqrt(scale)
    options = {"causal": causal, "order": order, "chunk": chunk, "q_lengths": q_lengths,
               "kv_lengths": kv_lengths}
    if quirks:
        mapped = [random_features.forward(x, w, scale=root, epsilon=epsilon, reference=True,
                                          stabiliser=stabiliser, lengths=lengths)
                  for x, stabiliser, lengths in ((q, "token", q_lengths),
                                                 (k, "sequence", kv_lengths))]
        (phi_q, saved_q), (phi_k, saved_k) = mapped
        out, attended = linear.forward(phi_q, phi_k, v, feature_map=FeatureMap("identity"),
                                       **options)
        return out, PerformerSaved(attended, drawn, (saved_q, saved_k))
    feature_map = FeatureMap("exp" if kernel == "softmax" else "relu", w, scale=root,
                             epsilon=epsilon)
    out, attended = linear.forward(q, k, v, feature_map=feature_map, state=state,
                                   return_state=return_state, **options)
    return out, PerformerSaved(attended, drawn, None)


def _projection(given: Array | None, decisions: dict[str, Any] | None, num_features: int | None,
                width: int, rng: Any, state: Any) -> np.ndarray:
    """The rows of W: given, decided before, or drawn."""
    unknown = sorted(set(decisions or {}) - set(DECISIONS))
    if unknown:
        raise OptionError(f"decisions may hold {', '.join(DECISIONS)}; got {', '.join(unknown)}")
    if decisions and given is not None:
        raise OptionError("projection and decisions must not both be given")
    given = decisions["projection"] if decisions else given
    if given is None:
        if state is not None and not isinstance(rng, int | np.integer):
            raise OptionError("state was made with a projection, which must be given with it: as "
                              "projection, in decisions, or by the int for rng that drew it")
        if num_features is None:
            num_features = max(1, math.floor(width * math.log(width)))
        return random_projection(num_features, width, rng=rng)
    arrays.require_float("projection", given)
    found = arrays.to_host(given)
    if found.ndim != 2 or found.shape[1] != width or not len(found):
        raise ShapeError(f"projection must be (F, D) with D = {width}; got {tuple(found.shape)}")
    if num_features is not None and require_integer("num_features", num_features) != len(found):
        raise OptionError(f"num_features must be the number of rows of the projection, "
                          f"{len(found)}, or left out; got {num_features}")
    return found
