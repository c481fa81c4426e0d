"""Chunked linear attention for any array-API namespace: no in-place writes, no N x M array.

A call is a list of steps, some queries and some keys each. Going forward a state T (F, W) holds the
sums over all keys of earlier steps: a query reads it, and meets the keys of its own step directly.
The backward goes forward once more for dq, then in reverse with the state R of all later queries
for dk and dv; neither state is ever rebuilt by subtraction. W is E, and 1 more where the output is
normalised: values have a column of ones, whose sums are the denominators.

Features of kind "exp" come with a stabiliser c for each token. Queries' fall out of the output;
keys' are weighed like an online softmax, by exp(c_j - r) with r the largest c so far: no factor is
ever above 1, and no query knows a later key's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from pyattn.arrays import accumulator, device, from_host, namespace

Array = Any


def refuses(problem: Any) -> str | None:
    """Nothing: this is the backend that runs everywhere."""
    return None


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Queries, or keys, of a step."""

    x: Array
    """(..., tokens, D), scaled."""
    phi: Array
    """(..., tokens, F)."""
    top: Array | None
    """(..., tokens): the stabilisers of kind "exp"."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Items whose tokens stand alike."""

    problem: Any
    xp: Any
    q: Array
    """(b, G, R, n, D)."""
    k: Array
    """(b, G, m, D)."""
    v: Array
    """(b, G, m, W)."""
    state: Array
    """(b, G, F, W)."""
    top: Array | None
    """(b, G)."""
    steps: Any
    projection: Array | None
    finite: bool

    def queries(self, step: Any) -> Tokens:
        """Features of a step's queries."""
        return self.features(self.q[..., step.queries, :])

    def keys(self, step: Any) -> Tokens:
        """Features of a step's keys."""
        return self.features(self.k[..., step.keys, :])

    def features(self, x: Array) -> Tokens:
        """Return phi(x), and its stabilisers."""
        xp, made = self.xp, self.problem.feature_map
        x = xp.astype(x, self.state.dtype) * made.scale
        h = x if self.projection is None else xp.matmul(x, xp.matrix_transpose(self.projection))
        if made.kind == "identity":
            return Tokens(x, h, None)
        if made.kind == "elu1":
            below = xp.exp(xp.where(h > 0, xp.zeros_like(h), h))
            return Tokens(x, xp.where(h > 0, h + 1, below), None)
        if made.kind == "relu":
            return Tokens(x, xp.where(h < 0, xp.zeros_like(h), h) + made.epsilon, None)
        most = xp.max(h, axis=-1)
        return Tokens(x, xp.exp(h - most[..., None]), most - xp.sum(x * x, axis=-1) / 2)

    def pull(self, tokens: Tokens, dphi: Array) -> Array:
        """Return the gradient of the tokens whose features have the gradient `dphi`."""
        xp, made = self.xp, self.problem.feature_map
        phi, dh = tokens.phi, dphi
        if made.kind == "elu1":
            # forward: phi = h + 1 above 1, exp(h) below
            dh = dphi * xp.where(phi < 1, phi, xp.ones_like(phi))
        elif made.kind == "relu":
            dh = xp.where(phi > made.epsilon, dphi, xp.zeros_like(dphi))
        elif made.kind == "exp":
            dh = dphi * phi
        dx = dh if self.projection is None else xp.matmul(dh, self.projection)
        if made.kind == "exp":
            # forward: phi = exp(h - |x|^2 / 2)
            dx = dx - xp.sum(dh, axis=-1)[..., None] * tokens.x
        return made.scale * dx

    def seen(self, step: Any) -> Array | None:
        """Which of its step's keys a query sees, (queries, keys); None: all."""
        i, j = np.arange(step.rows), np.arange(step.columns)
        allowed = j <= i[:, None] + step.shift
        return None if allowed.all() else from_host(self.xp, allowed, device(self.state))

    def weights(self, step: Any, top: Array | None, keys: Tokens, seen: Array | None) -> Any:
        """What a query weighs the state by, (b, G, 1, queries, 1), and the step's keys; or None."""
        if top is None:
            return None, None
        xp, shape = self.xp, (*top.shape, step.rows, step.columns)
        below = xp.broadcast_to(top[..., None], (*top.shape, step.rows))
        if step.columns:
            each = xp.broadcast_to(keys.top[..., None, :], shape)
            each = each if seen is None else xp.where(seen, each, -math.inf)
            most = xp.max(each, axis=-1)
            below = xp.where(most > below, most, below)
        base = _finite(xp, below)
        pair = keys.top[..., None, :] - base[..., None]
        pair = xp.exp(xp.where(pair > 0, xp.zeros_like(pair), pair))
        return xp.exp(top[..., None] - base)[:, :, None, :, None], pair[:, :, None, :, :]

    def absorb(self, state: Array, top: Array | None, keys: Tokens, v: Array) -> Any:
        """Return the state with a step's keys, and its stabiliser."""
        xp, new = self.xp, top
        if top is not None and v.shape[-2]:
            new, kept, share = self.shares(top, keys)
            state, v = state * kept[..., None, None], v * share[..., None]
        return state + xp.matmul(xp.matrix_transpose(keys.phi), v), new

    def shares(self, top: Array, keys: Tokens) -> tuple[Array, Array, Array]:
        """The new stabiliser, what the state is multiplied by, and each of the keys."""
        xp, most = self.xp, self.xp.max(keys.top, axis=-1)
        new = xp.where(most > top, most, top)
        base = _finite(xp, new)
        return new, xp.exp(top - base), xp.exp(keys.top - base[..., None])

    def pairs(self, product: Array, weight: Array | None, seen: Array | None) -> Array:
        """A product of all queries and keys of a step, of those that count."""
        product = product if weight is None else product * weight
        return product if seen is None else self.xp.where(seen, product, 0.0)

    def apply(self, weights: Array, x: Array, seen: Array | None) -> Array:
        """Weights @ x, in which what a query does not see adds nothing, whatever `x` holds."""
        xp = self.xp
        if self.finite or seen is None:
            return xp.matmul(weights, x)
        product = weights[..., None] * x[..., None, :, :]
        return xp.sum(xp.where(seen[..., None], product, xp.zeros_like(product)), axis=-2)


def _finite(xp: Any, top: Array) -> Array:
    """A stabiliser that can be subtracted: before the first key it is -inf."""
    return xp.where(top == -math.inf, xp.zeros_like(top), top)


def _runs(problem: Any, *more: Array) -> Iterator[tuple[Run, np.ndarray, list[Array]]]:
    """Items that stand alike, which they are, and their part of arrays (B, H, N, ...) ."""
    p, xp = problem, namespace(problem.q)
    acc, where = accumulator(xp, p.q), device(p.q)
    (heads, d), (groups, e) = (p.q.shape[1], p.q.shape[3]), (p.v.shape[1], p.v.shape[3])
    made = p.feature_map
    if not groups:
        return
    projection = None if made.projection is None else xp.astype(made.projection, acc)
    placed = np.stack([p.q_lengths, p.kv_lengths, p.offset], axis=1)
    for n, m, offset in np.unique(placed, axis=0).tolist():
        items = np.flatnonzero((placed == (n, m, offset)).all(axis=1))

        def part(x: Array, items: np.ndarray = items) -> Array:
            if len(items) == len(p.q_lengths):
                return x
            return xp.take(x, from_host(xp, items, where), axis=0)

        def by_group(x: Array, n: int = n, count: int = len(items)) -> Array:
            split = (count, groups, heads // groups, *x.shape[2:])
            return xp.reshape(part(x), split)[:, :, :, :n, ...]

        q, k = by_group(p.q), part(p.k)[:, :, :m, :]
        v = xp.astype(part(p.v)[:, :, :m, :], acc)
        if p.normalize:
            v = xp.concat([v, xp.ones((*v.shape[:3], 1), dtype=acc, device=where)], axis=3)
        top = None
        if made.kind == "exp":
            top = (xp.full((len(items), groups), -math.inf, dtype=acc, device=where)
                   if p.log_scale is None else part(p.log_scale))
        state = (xp.zeros((len(items), groups, made.width(d), e + p.normalize), dtype=acc,
                          device=where) if p.state is None else part(p.state))
        given = [by_group(x) for x in more]
        finite = all(bool(xp.all(xp.isfinite(xp.astype(x, acc)))) for x in (q, k, v, *given))
        yield (Run(p, xp, q, k, v, state, top, p.steps(n, m, offset), projection, finite), items,
               given)


def _whole(xp: Any, found: list[tuple[np.ndarray, Array]], count: int) -> Array:
    """Parts (items, H, N, ...) in the order of all items."""
    if len(found) == 1:
        return found[0][1]
    place = np.argsort(np.concatenate([items for items, _ in found]))
    x = xp.concat([x for _, x in found], axis=0)
    return xp.take(x, from_host(xp, place, device(x)), axis=0)


def _tokens(xp: Any, parts: list[Array], total: int, like: Array) -> Array:
    """Parts of consecutive tokens, (..., tokens, width), and zeros up to `total`."""
    lead, width = like.shape[:-2], like.shape[-1]
    length = sum(x.shape[-2] for x in parts)
    zeros = xp.zeros((*lead, total - length, width), dtype=like.dtype, device=device(like))
    return xp.concat([*parts, zeros], axis=-2)


def forward(problem: Any) -> tuple[Array, Array | None, Array, Array | None]:
    """Output (B, H, N, E); where normalised denominators (B, H, N); the state and its log-scale."""
    p, xp = problem, namespace(problem.q)
    (batch, heads, n, _), e = p.q.shape, p.v.shape[3]
    nums, states, tops = [], [], []
    with np.errstate(all="ignore"):
        for run, items, _ in _runs(p):
            state, top, parts = run.state, run.top, []
            for step in run.steps:
                keys, v = run.keys(step), run.v[..., step.keys, :]
                if step.rows:
                    parts.append(_read(run, step, state, top, keys, v))
                state, top = run.absorb(state, top, keys, v)
            like = xp.zeros((len(items), p.v.shape[1], heads // p.v.shape[1], 0,
                             state.shape[-1]), dtype=state.dtype, device=device(state))
            num = _tokens(xp, parts, n, like)
            nums.append((items, xp.reshape(num, (len(items), heads, n, num.shape[-1]))))
            states.append((items, state))
            tops.append((items, top))
        if not nums:
            return _empty(p)
        num, state = (_whole(xp, x, batch) for x in (nums, states))
        log_scale = None if tops[0][1] is None else _whole(xp, tops, batch)
        if not p.normalize:
            return num, None, state, log_scale
        den = num[..., e]
        # an empty row stays one, with or without an epsilon
        den = xp.where(abs(den) <= p.least, 0.0, den + p.epsilon)
        safe = xp.where(den == 0, xp.ones_like(den), den)
        out = xp.where(den[..., None] == 0, 0.0, num[..., :e] / safe[..., None])
    return out, den, state, log_scale


def _empty(p: Any) -> tuple[Array, Array | None, Array, Array | None]:
    """What a forward of no items, or no heads, returns."""
    xp, where = namespace(p.q), device(p.q)
    acc, (batch, groups, _, e) = accumulator(xp, p.q), p.v.shape
    rows = tuple(p.q.shape[:3])
    den = xp.zeros(rows, dtype=acc, device=where) if p.normalize else None
    wide = (batch, groups, p.feature_map.width(p.q.shape[3]), e + p.normalize)
    top = None
    if p.feature_map.kind == "exp":
        top = xp.full((batch, groups), -math.inf, dtype=acc, device=where)
    return (xp.zeros((*rows, e), dtype=acc, device=where), den,
            xp.zeros(wide, dtype=acc, device=where), top)


def _read(run: Run, step: Any, state: Array, top: Array | None, keys: Tokens, v: Array) -> Array:
    """Numerators and denominators of a step's queries, (b, G, R, queries, W)."""
    xp, phi, seen = run.xp, run.queries(step).phi, run.seen(step)
    before, pair = run.weights(step, top, keys, seen)
    num = xp.matmul(phi, state[:, :, None, :, :])
    num = num if before is None else num * before
    if step.columns:
        a = xp.matmul(phi, xp.matrix_transpose(keys.phi)[:, :, None, :, :])
        num = num + run.apply(run.pairs(a, pair, seen), v[:, :, None, :, :], seen)
    return num


def backward(problem: Any, dout: Array, out: Array, den: Array | None,
             dstate: Array | None) -> dict[str, Array]:
    """Gradients of q, k, v and of the state before the first token."""
    p, xp = problem, namespace(problem.q)
    acc, (batch, _, n, _) = accumulator(xp, p.q), p.q.shape
    found: dict[str, list[Any]] = {"q": [], "k": [], "v": [], "state": []}
    with np.errstate(all="ignore"):
        pull = xp.astype(dout, acc)
        if den is not None:
            # forward: out = num / den
            empty = den[..., None] == 0
            safe = xp.where(empty, 1.0, den[..., None])
            delta = xp.sum(pull * xp.astype(out, acc), axis=-1, keepdims=True)
            pull = xp.where(empty, 0.0, xp.concat([pull, -delta], axis=-1) / safe)
        for run, items, (pull_run,) in _runs(p, pull):
            # the queries of a group are rows of one product
            dqs, tops, state, top = [], [], run.state, run.top
            for step in run.steps:
                keys, v = run.keys(step), run.v[..., step.keys, :]
                if step.rows:
                    dqs.append(_dq(run, step, state, top, keys, v, pull_run))
                tops.append(top)
                state, top = run.absorb(state, top, keys, v)
            later = xp.zeros_like(state)
            if dstate is not None:
                index = from_host(xp, items, device(state))
                later = xp.astype(xp.take(dstate, index, axis=0), acc)
            dks, dvs = [], []
            for step, top in zip(reversed(run.steps), reversed(tops), strict=True):
                dk, dv, later = _dkv(run, step, later, top, pull_run)
                dks.append(dk)
                dvs.append(dv)
            like = xp.zeros((*run.q.shape[:3], 0, run.q.shape[4]), dtype=acc, device=device(p.q))
            dq = _tokens(xp, dqs, n, like)
            found["q"].append((items, xp.reshape(dq, (len(items), *p.q.shape[1:]))))
            for name, parts, x in (("k", dks, p.k), ("v", dvs, p.v)):
                like = xp.zeros((len(items), x.shape[1], 0, x.shape[3]), dtype=acc,
                                device=device(p.q))
                found[name].append((items, _tokens(xp, parts[::-1], x.shape[2], like)))
            found["state"].append((items, later))
    if not found["q"]:
        zeros = {name: xp.zeros(x.shape, dtype=acc, device=device(x))
                 for name, x in (("q", p.q), ("k", p.k), ("v", p.v))}
        return {**zeros, "state": _empty(p)[2]}
    return {name: _whole(xp, parts, batch) for name, parts in found.items()}


def _dq(run: Run, step: Any, state: Array, top: Array | None, keys: Tokens, v: Array,
        pull: Array) -> Array:
    """The gradient of a step's queries."""
    xp, queries, seen = run.xp, run.queries(step), run.seen(step)
    before, pair = run.weights(step, top, keys, seen)
    pull = pull[..., step.queries, :]
    # forward: num = before * phi state + (phi keys^T) v
    weighed = pull if before is None else pull * before
    dphi = xp.matmul(weighed, xp.matrix_transpose(state)[:, :, None, :, :])
    if step.columns:
        da = run.pairs(xp.matmul(pull, xp.matrix_transpose(v)[:, :, None, :, :]), pair, seen)
        dphi = dphi + run.apply(da, keys.phi[:, :, None, :, :], seen)
    return run.pull(queries, dphi)


def _dkv(run: Run, step: Any, later: Array, top: Array | None,
         pull: Array) -> tuple[Array, Array, Array]:
    """Gradients of a step's keys and values, and the state of its and later queries."""
    xp, keys, v = run.xp, run.keys(step), run.v[..., step.keys, :]
    phi, weighed, kept = keys.phi, v, None
    if top is not None and step.columns:
        _, kept, share = run.shares(top, keys)
        phi, weighed = phi * share[..., None], v * share[..., None]
    # forward: state = kept * state + (share * phi)^T v
    dphi = xp.matmul(weighed, xp.matrix_transpose(later))
    dv = xp.matmul(phi, later)
    later = later if kept is None else later * kept[..., None, None]
    if step.rows:
        queries, seen = run.queries(step), run.seen(step)
        before, pair = run.weights(step, top, keys, seen)
        pull = pull[..., step.queries, :]

        def flat(x: Array) -> Array:
            return xp.reshape(x, (*x.shape[:2], x.shape[2] * x.shape[3], x.shape[4]))

        if step.columns:
            # forward: num += (phi keys^T) v
            a = xp.matmul(queries.phi, xp.matrix_transpose(keys.phi)[:, :, None, :, :])
            da = xp.matmul(pull, xp.matrix_transpose(v)[:, :, None, :, :])
            a, da = (xp.matrix_transpose(flat(run.pairs(x, pair, seen))) for x in (a, da))
            if seen is not None:
                seen = xp.concat([xp.matrix_transpose(seen)] * run.q.shape[2], axis=-1)
            dphi = dphi + run.apply(da, flat(queries.phi), seen)
            dv = dv + run.apply(a, flat(pull), seen)
        # forward: num += before * phi state
        pull = pull if before is None else pull * before
        later = later + xp.matmul(xp.matrix_transpose(flat(queries.phi)), flat(pull))
    return run.pull(keys, dphi), dv[..., :run.problem.v.shape[3]], later
