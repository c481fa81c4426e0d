"""Problems whose tokens are listed by an index, for kernels that know indices and for others.

A kernel that is ``INDEXED`` reads listed tokens where they lie and writes results to where they
belong, on top of what earlier problems left there. For others tokens are gathered beforehand, and
results put back and merged afterwards.
"""

from __future__ import annotations

import dataclasses
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
    out, lse = kernel.forward(_gathered(xp, problem))
    if problem.q_index is not None:
        out, lse = (_put_back(xp, x, problem.q_index, problem.q, fill)
                    for x, fill in ((out, 0.0), (lse, -math.inf)))
    return (out, lse) if onto is None else _merged(xp, (out, lse), onto)


def backward(kernel: Any, problem: Problem, dout: Array, lse: Array, delta: Array,
             onto: dict[str, Array] | None = None) -> dict[str, Array]:
    """Return the gradients by name; those of q, k and v are added to `onto` if it is given."""
    if kernel.INDEXED:
        return kernel.backward(problem, dout, lse, delta, onto)
    xp = arrays.namespace(problem.q)
    rows = [dout, lse, delta]
    if problem.q_index is not None:
        rows = [_taken(xp, x, problem.q_index, fill)
                for x, fill in ((dout, 0.0), (lse, -math.inf), (delta, 0.0))]
    found = kernel.backward(_gathered(xp, problem), *rows)
    for name, index in (("q", problem.q_index), ("k", problem.k_index), ("v", problem.k_index)):
        if index is not None:
            found[name] = _put_back(xp, found[name], index, getattr(problem, name), 0.0)
        if onto is not None:
            found[name] = arrays.added(onto[name], found[name])
    return found


def _gathered(xp: Any, problem: Problem) -> Problem:
    """Return the same problem without indices."""
    changes: dict[str, Any] = {"q_index": None, "k_index": None}
    for name, index in (("q", problem.q_index), ("k", problem.k_index), ("v", problem.k_index)):
        if index is not None:
            changes[name] = _taken(xp, getattr(problem, name), index, 0.0)
    return dataclasses.replace(problem, **changes)


def _taken(xp: Any, x: Array, index: np.ndarray, fill: float) -> Array:
    """Return tokens of (B', H, T, ...) as listed, (B, H, N, ...); `fill` where the index is -1."""
    items, heads, tokens, *rest = x.shape
    place = _places(index, items, heads, tokens)
    found = xp.take(arrays.reshape(xp, x, (items * heads * tokens, *rest)),
                    arrays.from_host(xp, np.maximum(place, 0).ravel(), arrays.device(x)), axis=0)
    found = arrays.reshape(xp, found, (*place.shape, *rest))
    return _filled(xp, found, place < 0, fill)


def _put_back(xp: Any, x: Array, index: np.ndarray, like: Array, fill: float) -> Array:
    """Undo `_taken`: (B', H, T, ...) as `like` is, `fill` for tokens that are not listed."""
    items, heads, tokens, _ = like.shape
    place = _places(index, items, heads, tokens).ravel()
    slot = np.full(items * heads * tokens, -1)
    slot[place[place >= 0]] = np.flatnonzero(place >= 0)
    found = xp.take(arrays.reshape(xp, x, (-1, *x.shape[3:])),
                    arrays.from_host(xp, np.maximum(slot, 0), arrays.device(x)), axis=0)
    found = arrays.reshape(xp, found, (items, heads, tokens, *x.shape[3:]))
    return _filled(xp, found, slot.reshape(items, heads, tokens) < 0, fill)


def _places(index: np.ndarray, items: int, heads: int, tokens: int) -> np.ndarray:
    """Return where listed tokens are among (items * heads * tokens) rows, int64 (B, heads, N)."""
    item = np.arange(len(index)) // (len(index) // max(1, items))
    row = (item[:, None] * heads + np.arange(heads)) * tokens
    return np.where(index < 0, -1, row[:, :, None] + index)


def _filled(xp: Any, x: Array, nowhere: np.ndarray, fill: float) -> Array:
    if not nowhere.any():
        return x
    blank = arrays.from_host(xp, nowhere.reshape(*nowhere.shape, *(1,) * (x.ndim - 3)),
                             arrays.device(x))
    return xp.where(blank, xp.full_like(x, fill), x)


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
