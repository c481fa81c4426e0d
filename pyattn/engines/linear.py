"""Linear attention: scores that are products of features, so that sums over keys come first.

    out_i = sum_j (phi(q_i) . phi(k_j)) v_j / sum_j (phi(q_i) . phi(k_j))

A sequence is read in steps of some tokens each. Within a step queries meet keys directly; of all
earlier keys they see the state, (F, E + 1): the sums of phi(k_j) [v_j, 1]. The state can be handed
in and out, so that a stream longer than memory is read piece by piece. The backward reads the steps
forward again for dq and in reverse for dk and dv; nothing of N x F is kept, or N x M made.

Letters as in `problem`, and F features, W = E + 1 (E where the output is not normalised).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import arrays, dispatch
from ..arrays import Array
from ..checks import (
    DtypeError,
    OptionError,
    ShapeError,
    require_choice,
    require_integer,
    require_real,
)
from ..differentiable import Saved, gradients
from .placement import Placement, place
from .problem import record
from .softmax import flat, require_operands, unbroadcast

CHUNK = 64
"""Tokens of a step, where the caller does not say."""


class State(NamedTuple):
    """What a stream carries on where features have a stabiliser (kind "exp")."""

    sums: Array
    """(..., G, F, E + 1), acc: sums over keys of ``phi(k) [v, 1] exp(-log_scale)``."""
    log_scale: Array
    """(..., G), acc: the largest stabiliser so far, -inf before the first key. A constant of the
    backward: it cancels in all that is computed from the state."""


class Step(NamedTuple):
    """Some queries and some keys: query number r of them meets key number c iff c <= r + shift.

    All keys of earlier steps it sees through the state.
    """

    queries: slice
    keys: slice
    shift: int

    @property
    def rows(self) -> int:
        """How many queries."""
        return self.queries.stop - self.queries.start

    @property
    def columns(self) -> int:
        """How many keys."""
        return self.keys.stop - self.keys.start


@dataclasses.dataclass(frozen=True)
class LinearProblem:
    """What a kernel module, ``pyattn.kernels.<backend>.linear``, is handed.

    It has ``refuses(problem)``; ``forward(problem)``, which returns out (B, H, N, E), the
    denominators (B, H, N) or None, the state after the last key (B, G, F, W), and its log-scale
    (B, G) or None; and ``backward(problem, dout, out, den, dstate)``, which returns gradients by
    name: "q", "k", "v", and "state" (B, G, F, W). dstate may be None. All but out and the gradients
    of q, k and v are in acc. Numbers as for `problem.Problem`.
    """

    q: Array
    """(B, H, N, D)."""
    k: Array
    """(B, G, M, D)."""
    v: Array
    """(B, G, M, E)."""
    feature_map: Any
    """A `FeatureMap` of `pyattn.features.feature_maps`."""
    causal: bool
    normalize: bool
    epsilon: float
    """Added to denominators that are not 0."""
    order: str
    """"qk" or "kv"."""
    chunk: int
    q_lengths: np.ndarray
    """int32 (B,)."""
    kv_lengths: np.ndarray
    """int32 (B,)."""
    offset: np.ndarray
    """int32 (B,): the position of query 0; that of a key is its index."""
    state: Array | None = None
    """(B, G, F, W), acc."""
    log_scale: Array | None = None
    """(B, G), acc; for kind "exp", with `state`."""

    @property
    def least(self) -> float:
        """Up to which size a denominator counts as 0.

        That of kind "exp" is relative to the largest key, times how well the query's largest
        feature meets it: below this there is nothing left to divide without overflow.
        """
        if self.feature_map.kind != "exp":
            return 0.0
        return 2.0 ** (-900 if arrays.dtype_name(self.q) == "float64" else -100)

    def steps(self, n: int, m: int, offset: int) -> list[Step]:
        """Return the steps of an item with n queries and m keys, in order.

        Examples
        --------
        >>> from pyattn.engines.linear import steps
        >>> for step in steps(3, 5, 2, chunk=2, causal=True, order="kv"):
        ...     print(step.queries, step.keys, step.shift)
        slice(0, 0, None) slice(0, 2, None) 2
        slice(0, 2, None) slice(2, 4, None) 0
        slice(2, 3, None) slice(4, 5, None) 0
        """
        return steps(n, m, offset, chunk=self.chunk, causal=self.causal, order=self.order)


def steps(n: int, m: int, offset: int, *, chunk: int, causal: bool, order: str) -> list[Step]:
    """Return the steps of a sequence; see `LinearProblem.steps`."""
    if order == "qk":
        return [Step(slice(0, n), slice(0, m), offset if causal else m)] if n or m else []
    if not causal:
        return [*(Step(slice(0, 0), slice(j, min(j + chunk, m)), 0) for j in range(0, m, chunk)),
                *(Step(slice(i, min(i + chunk, n)), slice(m, m), 0) for i in range(0, n, chunk))]
    found = []
    first = min(0, offset) // chunk * chunk
    for start in range(first, max(m, n + offset), chunk):
        # queries and keys of the positions start ... start + chunk - 1
        i, i_end = (min(max(x - offset, 0), n) for x in (start, start + chunk))
        j, j_end = (min(max(x, 0), m) for x in (start, start + chunk))
        found.append(Step(slice(i, i_end), slice(j, j_end), i + offset - j))
    return found


@dataclasses.dataclass(frozen=True)
class LinearSaved(Saved):
    """What the backward needs: the arguments, the output and its denominators."""

    q: Array
    k: Array
    v: Array
    feature_map: Any
    """Without its projection, which is kept beside it."""
    projection: Array | None
    causal: bool
    normalize: bool
    epsilon: float
    order: str
    chunk: int
    placement: Placement
    state: Array | None
    log_scale: Array | None
    out: Array
    den: Array | None

    @property
    def batch(self) -> tuple[int, ...]:
        """The leading axes."""
        return self.placement.batch

    @property
    def features(self) -> int:
        """F."""
        made = self.projection
        return int(self.q.shape[-1] if made is None else made.shape[0])

    @property
    def stats(self) -> dict[str, int]:
        """Counters of the forward.

        `pairs` met within steps, `tiles` (steps that have any, for each head), `flops`, `bytes` in
        and out, and `state`, how many numbers the states are.
        """
        (heads, _, d), (groups, _, e), f = self.q.shape[-3:], self.v.shape[-3:], self.features
        placed = np.stack([self.placement.q_lengths, self.placement.kv_lengths,
                           self.placement.offset], axis=1)
        pairs = tiles = tokens = 0
        for (n, m, offset), count in zip(*np.unique(placed, axis=0, return_counts=True),
                                         strict=True):
            met = [step.rows * step.columns for step in steps(
                int(n), int(m), int(offset), chunk=self.chunk, causal=self.causal,
                order=self.order)]
            pairs += int(count) * heads * sum(met)
            tiles += int(count) * heads * sum(map(bool, met))
            tokens += int(count) * (heads * int(n) + groups * int(m))
        width = e + self.normalize
        flops = 2 * pairs * (f + width)
        if self.projection is not None:
            flops += 2 * tokens * d * f
        if self.order == "kv":
            flops += 2 * tokens * f * width
        moved = [x for x in (self.q, self.k, self.v, self.out, self.den, self.state)
                 if x is not None]
        return {"pairs": pairs, "tiles": tiles, "flops": flops,
                "bytes": sum(map(arrays.nbytes, moved)),
                "state": math.prod(self.batch) * groups * f * width}

    def backward(self, dout: Array, dstate: Any = None) -> Any:
        """Gradients of q, k, v, and of the state where one was given.

        Parameters
        ----------
        dout : array, shape and dtype of the output
        dstate : array, shape (..., G, F, W), optional
            Gradient of the returned state (of its sums, where it has a log-scale).
        """
        xp = arrays.namespace(self.q, dout)
        if tuple(dout.shape) != tuple(self.out.shape):
            raise ShapeError(f"dout must have the shape of the output, {tuple(self.out.shape)}; "
                             f"got {tuple(dout.shape)}")
        if dout.dtype != self.out.dtype:
            raise DtypeError("dout must have the dtype of the output, "
                             f"{arrays.dtype_name(self.out)}; got {arrays.dtype_name(dout)}")
        problem = _problem(self)
        if isinstance(dstate, State):
            dstate = dstate.sums
        if dstate is not None:
            shape = _state_shape(self)
            if tuple(dstate.shape) != shape:
                raise ShapeError(f"dstate must have the shape of the state, {shape}; got "
                                 f"{tuple(dstate.shape)}")
            dstate = arrays.cast(xp, flat(xp, dstate, self.batch), arrays.accumulator(xp, self.q))
        dout, out = flat(xp, dout, self.batch), flat(xp, self.out, self.batch)
        den = None
        if self.den is not None:
            den = arrays.reshape(xp, self.den, tuple(problem.q.shape[:3]))
        grads = dispatch.kernel("linear", problem, self.q).backward(problem, dout, out, den,
                                                                    dstate)
        found = {name: unbroadcast(xp, grads[name], x, self.batch)
                 for name, x in (("q", self.q), ("k", self.k), ("v", self.v))}
        if self.state is not None:
            found["state"] = unbroadcast(xp, grads["state"], self.state, self.batch)
        return gradients(tuple(found))(**found)


def forward(q: Array, k: Array, v: Array, *, feature_map: Any, causal: bool | str = False,
            normalize: bool = True, epsilon: float = 0.0, order: str = "auto",
            chunk: int | None = None, state: Any = None, return_state: bool = False,
            q_lengths: Any = None, kv_lengths: Any = None) -> tuple[Any, LinearSaved]:
    """Attention whose weights are products of the features of queries and keys.

    Parameters
    ----------
    q : array, shape (..., H, N, D)
    k : array, shape (..., G, M, D), dtype of `q`
        G divides H.
    v : array, shape (..., G, M, E), dtype of `q`
    feature_map : FeatureMap, of `pyattn.features.feature_maps`
    causal : bool or "top_left"
        Query i sees keys up to ``i + M - N`` (lengths, if given, for M and N), or up to i. A state
        that is given is seen by all queries.
    normalize : bool
        Divide by the sum of the weights.
    epsilon : float, >= 0
        Added to sums of weights that are not 0.
    order : {"auto", "qk", "kv"}
        "qk": queries meet all keys, N M (F + E) products. "kv": they meet the state, F E (N + M).
        "auto" takes the lesser where all tokens fit in one chunk, and "kv" beyond, or with a state.
    chunk : int, optional
        Tokens of a step, 64 by default.
    state : array (..., G, F, W), or `State` for kind "exp", optional
        What an earlier call returned.
    return_state : bool
        Also return the state after the last key.
    q_lengths, kv_lengths : int or array of int, broadcasting to the leading axes, optional
        Tokens from here on are padding.

    Returns
    -------
    array, shape (..., H, N, E), dtype of `q`; and what its backward needs
        Rows whose weights sum up to 0: 0; with kind "exp" also those whose features fit those of no
        key, by a factor of 2^-100 (2^-900 in float64). With `return_state` ``(out, state)`` for the
        array.
    """
    causal = require_choice("causal", causal, (False, True, "top_left"))
    normalize = require_choice("normalize", normalize, (False, True))
    order = require_choice("order", order, ("auto", "qk", "kv"))
    if require_real("epsilon", epsilon) < 0:
        raise OptionError(f"epsilon must be at least 0; got {epsilon}")
    if epsilon and not normalize:
        raise OptionError("epsilon joins the denominators; with normalize=False there are none")
    if feature_map.kind == "exp" and (epsilon or not normalize):
        raise OptionError("features of kind 'exp' are known up to a factor for each token, which "
                          f"falls out of a normalised output alone; got normalize={normalize}, "
                          f"epsilon={epsilon}")
    chunk = CHUNK if chunk is None else require_integer("chunk", chunk, minimum=1)
    batch = require_operands(q, k, v)
    n, m, f = q.shape[-2], k.shape[-2], feature_map.width(q.shape[-1])
    sums, log_scale = _given_state(feature_map, state)
    named = {"q": q, "k": k, "v": v, "projection": feature_map.projection, "state": sums,
             "log_scale": log_scale}
    xp = arrays.namespace(*named.values())
    arrays.require_same_device(named)
    placement = place(batch, n, m, "top_left" if causal == "top_left" else "bottom_right",
                      q_lengths, kv_lengths, None)
    if order == "auto":
        # beyond a chunk kernels are made for steps, and steps multiply their own pairs first anyhow
        stepwise = state is not None or return_state or max(n, m) > chunk
        order = "kv" if stepwise else cheaper(n, m, f, v.shape[-1], causal=bool(causal),
                                              offset=0 if placement.top_left else m - n)
    fields = {"q": q, "k": k, "v": v, "projection": feature_map.projection,
              "feature_map": dataclasses.replace(feature_map, projection=None),
              "causal": bool(causal), "normalize": normalize, "epsilon": float(epsilon),
              "order": order, "chunk": chunk, "placement": placement, "state": sums,
              "log_scale": log_scale}
    saved = record(LinearSaved, fields)
    if sums is not None:
        _require_state(saved)
    problem = _problem(saved)
    out, den, after, top = dispatch.kernel("linear", problem, q).forward(problem)
    out = arrays.cast(xp, arrays.reshape(xp, out, (*batch, *q.shape[-3:-1], v.shape[-1])), q.dtype)
    if den is not None:
        den = arrays.reshape(xp, den, out.shape[:-1])
    saved = record(LinearSaved, {**fields, "out": out, "den": den})
    if not return_state:
        return out, saved
    after = arrays.reshape(xp, after, _state_shape(saved))
    if top is not None:
        after = State(after, arrays.reshape(xp, top, after.shape[:-2]))
    return (out, after), saved


def cheaper(n: int, m: int, f: int, e: int, *, causal: bool = False, offset: int = 0) -> str:
    """Return the order with fewer products: "qk" has pairs (F + E), "kv" F E (N + M).

    Examples
    --------
    >>> from pyattn.engines.linear import cheaper
    >>> [cheaper(n, n, 64, 64) for n in (32, 64, 65)]
    ['qk', 'qk', 'kv']
    """
    pairs = n * m
    if causal:
        seen = np.arange(n, dtype=np.int64) + (offset + 1)
        pairs = int(np.clip(seen, 0, m).sum())
    return "qk" if pairs * (f + e) <= f * e * (n + m) else "kv"


def _given_state(feature_map: Any, state: Any) -> tuple[Array | None, Array | None]:
    """The sums and the log-scale of a state that may be given."""
    if state is None:
        return None, None
    if feature_map.kind != "exp":
        if isinstance(state, Sequence):
            raise DtypeError(f"state must be an array for features of kind {feature_map.kind!r}; "
                             f"got {type(state).__name__}")
        return state, None
    if not (isinstance(state, Sequence) and len(state) == 2):
        raise DtypeError("state must be (sums, log_scale) for features of kind 'exp'; got "
                         f"{type(state).__name__}")
    return state[0], state[1]


def _state_shape(saved: LinearSaved) -> tuple[int, ...]:
    width = saved.v.shape[-1] + saved.normalize
    return (*saved.batch, saved.k.shape[-3], saved.features, width)


def _require_state(saved: LinearSaved) -> None:
    """Raise unless a state that was given fits."""
    shape = _state_shape(saved)
    for name, x, wanted in (("state", saved.state, shape), ("log_scale", saved.log_scale,
                                                            shape[:-2])):
        if x is not None:
            arrays.require_float(name, x)
            if tuple(x.shape) != wanted:
                raise ShapeError(f"{name} must be {wanted}; got {tuple(x.shape)}")


def _problem(saved: LinearSaved) -> LinearProblem:
    """The kernel's view of a call: leading axes in one."""
    xp, batch, placed = arrays.namespace(saved.q), saved.batch, saved.placement
    q, k, v = (flat(xp, x, batch) for x in (saved.q, saved.k, saved.v))
    acc, state, log_scale = arrays.accumulator(xp, q), saved.state, saved.log_scale
    if state is not None:
        state = arrays.cast(xp, flat(xp, state, batch), acc)
    if log_scale is not None:
        log_scale = arrays.cast(xp, arrays.reshape(xp, log_scale, tuple(k.shape[:2])), acc)
    made = dataclasses.replace(saved.feature_map, projection=saved.projection)
    return LinearProblem(q, k, v, made, saved.causal, saved.normalize, saved.epsilon, saved.order,
                         saved.chunk, placed.q_lengths, placed.kv_lengths, placed.offset, state,
                         log_scale)
