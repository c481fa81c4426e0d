"""Problems whose tokens are listed by an index, for kernels that know indices and for others.

A kernel that is ``INDEXED`` reads listed tokens where they lie and writes results to where they
belong, on top of what earlier problems left there. For others tokens are gathered beforehand, and
results put back and merged afterwards.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from .problem import Problem


def forward(kernel: Any, problem: Problem, onto: tuple[Array, Array] | None = None,
            ) -> tuple[Array, Array]:
    """Return out (B', H, T, E) and lse (B', H, T), merged with those of `onto` if it is given.

    Those of `onto` are in acc, and may be written to.
    """
    if kernel.INDEXED:
        return kernel.forward(problem, onto)
    if problem.q_index is problem.k_index is onto is None:
        return kernel.forward(problem)
    xp = arrays.namespace(problem.q)
    queries, keys = _lists(problem)
    out, lse = kernel.forward(_gathered(problem, queries, keys))
    if queries is not None:
        out, lse = queries.put_back(out, 0.0), queries.put_back(lse, -math.inf)
    return (out, lse) if onto is None else _merged(xp, (out, lse), onto)


def backward(kernel: Any, problem: Problem, dout: Array, lse: Array, delta: Array,
             onto: dict[str, Array] | None = None) -> dict[str, Array]:
    """Return the gradients by name; those of q, k and v are added to `onto` if it is given."""
    if kernel.INDEXED:
        return kernel.backward(problem, dout, lse, delta, onto)
    queries, keys = _lists(problem)
    rows = [dout, lse, delta]
    if queries is not None:
        rows = [queries.taken(x, fill)
                for x, fill in ((dout, 0.0), (lse, -math.inf), (delta, 0.0))]
    found = kernel.backward(_gathered(problem, queries, keys), *rows)
    for name, tokens in (("q", queries), ("k", keys), ("v", keys)):
        if tokens is not None:
            found[name] = tokens.put_back(found[name], 0.0)
        if onto is not None:
            found[name] = arrays.added(onto[name], found[name])
    return found


def _gathered(problem: Problem, queries: Listed | None, keys: Listed | None) -> Problem:
    """Return the same problem without indices."""
    changes: dict[str, Any] = {"q_index": None, "k_index": None}
    for name, tokens in (("q", queries), ("k", keys), ("v", keys)):
        if tokens is not None:
            changes[name] = tokens.taken(getattr(problem, name), 0.0)
    return dataclasses.replace(problem, **changes)


def _lists(problem: Problem) -> tuple[Listed | None, Listed | None]:
    """Return the lists of queries and keys, one and the same where they are, or None."""
    first, second = problem.q_index, problem.k_index
    queries = None if first is None else Listed(first, problem.q)
    if first is not None and second is not None and problem.q.shape[:3] == problem.k.shape[:3] and (
            first.shape == second.shape and first.ctypes.data == second.ctypes.data):
        return queries, queries
    return queries, None if second is None else Listed(second, problem.k)


class Listed:
    """Tokens of (B', H, T, ...) as an index lists them, (B, H, N, ...), and put back.

    The index crosses to where the operands live once; everything else is found there.
    """

    def __init__(self, index: np.ndarray, like: Array) -> None:
        self.items, self.heads, self.tokens = like.shape[:3]
        self.xp, where = arrays.namespace(like), arrays.device(like)
        there = index >= 0
        self.shape = len(index), self.heads, index.shape[2]
        listed = np.count_nonzero(there) * (self.heads // max(1, index.shape[1]))
        self.gaps, self.all = not there.all(), listed == self.items * self.heads * self.tokens
        item = np.arange(len(index)) // max(1, len(index) // max(1, self.items))
        row = (item[:, None] * self.heads + np.arange(self.heads)) * self.tokens
        # int64, as there may be many rows
        row = arrays.from_host(self.xp, row[:, :, None], where)
        own = arrays.from_host(self.xp, index.astype(np.int32, copy=False), where)
        self.place = self.xp.reshape(self.xp.where(own < 0, -1, own + row), (-1,))

    @functools.cached_property
    def slot(self) -> Array:
        """Where each token, of all items and heads, is listed; -1 for nowhere."""
        xp, place = self.xp, self.place
        token = xp.arange(self.items * self.heads * self.tokens, dtype=place.dtype,
                          device=arrays.device(place))
        if not place.shape[0]:
            return xp.full_like(token, -1)
        order = xp.argsort(place)
        in_order = xp.take(place, order)
        at = xp.searchsorted(in_order, token)
        at = xp.where(at < place.shape[0], at, place.shape[0] - 1)
        return xp.where(xp.take(in_order, at) == token, xp.take(order, at), -1)

    def taken(self, x: Array, fill: float) -> Array:
        """Return tokens as listed, `fill` where the index is -1."""
        rows = arrays.reshape(self.xp, x, (self.items * self.heads * self.tokens, *x.shape[3:]))
        return self._moved(rows, self.place, self.shape, self.gaps, fill)

    def put_back(self, x: Array, fill: float) -> Array:
        """Undo `taken`: `fill` for tokens that are not listed."""
        rows = arrays.reshape(self.xp, x, (math.prod(x.shape[:3]), *x.shape[3:]))
        return self._moved(rows, self.slot, (self.items, self.heads, self.tokens), not self.all,
                           fill)

    def _moved(self, rows: Array, place: Array, shape: tuple[int, int, int], gaps: bool,
               fill: float) -> Array:
        xp, width = self.xp, tuple(rows.shape[1:])
        if not rows.shape[0]:
            return xp.full((*shape, *width), fill, dtype=rows.dtype, device=arrays.device(rows))
        if not gaps:
            return arrays.reshape(xp, xp.take(rows, place, axis=0), (*shape, *width))
        found = xp.take(rows, xp.where(place < 0, 0, place), axis=0)
        blank = xp.reshape(place < 0, (place.shape[0], *(1,) * len(width)))
        return arrays.reshape(xp, xp.where(blank, xp.full_like(found, fill), found),
                              (*shape, *width))


def _merged(xp: Any, new: tuple[Array, Array], old: tuple[Array, Array]) -> tuple[Array, Array]:
    """Return the result over the pairs of both."""
    lse = log_sum(xp, new[1], old[1])
    total = None
    for (out, own), (_, other) in ((old, new), (new, old)):
        with np.errstate(all="ignore"):
            part = share_of(xp, own, other)[..., None] * out
        total = part if total is None else arrays.added(total, part)
    return total, lse


def share_of(xp: Any, lse: Array, other: Array) -> Array:
    """Return exp(lse) / (exp(lse) + exp(other)), 0 for an lse of -inf.

    The shares of both add up to 1, where ``exp(lse - log_sum)`` has the rounding of a large sum.
    """
    with np.errstate(all="ignore"):
        return xp.where(lse == -math.inf, 0.0, 1 / (1 + xp.exp(other - lse)))


def log_sum(xp: Any, x: Array, y: Array) -> Array:
    """Return log(exp(x) + exp(y)), -inf where both are."""
    most = xp.maximum(x, y)
    base = xp.where(most == -math.inf, 0.0, most)
    with np.errstate(all="ignore"):
        return base + xp.log(xp.exp(x - base) + xp.exp(y - base))
