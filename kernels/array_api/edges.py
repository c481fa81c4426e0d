"""Softmax over listed keys for any array-API namespace.

Queries with about as many keys are done together: their lists are padded to the longest, and so
many are taken at once that what is gathered stays small. The backward does the same once more by
key, from weights and gradients that the pass over the queries left for each edge.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from pyattn.arrays import accumulator, device, from_host, namespace

Array = Any

GATHERED = 2**20
"""Numbers that are gathered at once, of keys or of queries."""


def refuses(problem: Any) -> str | None:
    """Nothing: this is the backend that runs everywhere."""
    return None


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some rows of a list of lists, padded to one length; all on the host."""

    rows: np.ndarray
    """int (rows,)."""
    entry: np.ndarray
    """int (rows, most): places in the flat list, 0 where there is none."""
    there: np.ndarray
    """bool (rows, most)."""


def chunks(start: np.ndarray, width: int) -> Iterator[Chunk]:
    """Divide the rows start[i]:start[i + 1] that are not empty, the shortest first."""
    counts = np.diff(start)
    order = np.argsort(counts, kind="stable")
    at = int(np.count_nonzero(counts == 0))
    while at < len(order):
        ahead = counts[order[at:]]
        fit = np.arange(1, len(ahead) + 1) * ahead * max(1, width) <= GATHERED
        rows = order[at:at + max(1, int(np.count_nonzero(fit)))]
        place = np.arange(int(counts[rows[-1]]))
        there = place < counts[rows][:, None]
        yield Chunk(rows, np.where(there, start[rows][:, None] + place, 0), there)
        at += len(rows)


@dataclasses.dataclass(frozen=True)
class Run:
    """Heads of one item that share a list and a key/value head."""

    problem: Any
    xp: Any
    item: int
    group: int
    heads: slice
    start: np.ndarray
    number: int

    @property
    def shared(self) -> int:
        """How many heads."""
        return self.heads.stop - self.heads.start

    def index(self, x: np.ndarray) -> Array:
        """Move integers or booleans to where the problem lives."""
        return from_host(self.xp, x, device(self.problem.v))

    def taken(self, x: Array, index: np.ndarray) -> Array:
        """Rows `index`, of any shape, of `x` (rows, width), in acc."""
        rows = self.xp.take(x, self.index(index.reshape(-1)), axis=0)
        rows = self.xp.astype(rows, accumulator(self.xp, self.problem.v))
        return self.xp.reshape(rows, (*index.shape, x.shape[1]))

    def by_head(self, x: Array, index: np.ndarray) -> Array:
        """Rows `index`, of any shape, of each head of `x` (B, H, N, width): (..., heads, width)."""
        heads = [self.taken(x[self.item, h, :, :], index)
                 for h in range(self.heads.start, self.heads.stop)]
        return self.xp.stack(heads, axis=index.ndim)

    def numbers(self, x: Array, index: np.ndarray) -> Array:
        """Entries `index` (rows,) of each head of `x` (B, H, N): (rows, heads)."""
        part = self.xp.take(x[self.item, self.heads, :], self.index(index), axis=1)
        return self.xp.matrix_transpose(part)


def _runs(problem: Any) -> list[Run]:
    xp, edges = namespace(problem.v), problem.edges
    groups = problem.v.shape[1]
    return [Run(problem, xp, b, g, slice(h, h + count), edges.start[number], number)
            for b, g, h, count, number in edges.runs(groups, edges.owner.size or 1).tolist()]


def _scores(run: Run, chunk: Chunk, keys: np.ndarray) -> tuple[Array, Array, Array | None]:
    """Scores (rows, heads, most), which of them count, and the slope of the softcap."""
    p, xp = run.problem, run.xp
    acc = accumulator(xp, p.v)
    there = run.index(chunk.there)[:, None, :]
    slope = None
    if p.q is None:
        s = xp.zeros((len(chunk.rows), run.shared, keys.shape[1]), dtype=acc, device=device(p.v))
    else:
        q = p.scale * run.by_head(p.q, chunk.rows)
        k = run.taken(p.k[run.item, run.group, :, :], keys)
        s = xp.matmul(q, xp.matrix_transpose(k))
        if p.softcap is not None:
            ratio = xp.tanh(s / p.softcap)
            s, slope = p.softcap * ratio, 1 - ratio**2
    allowed = xp.broadcast_to(there, s.shape)
    if p.bias is not None:
        bias = p.bias[min(run.item, p.bias.shape[0] - 1), :, :]
        bias = bias[run.heads, :] if bias.shape[0] > 1 else bias
        index = run.index(chunk.entry.reshape(-1))
        bias = xp.reshape(xp.take(bias, index, axis=1), (bias.shape[0], *chunk.entry.shape))
        bias = xp.permute_dims(bias, (1, 0, 2))
        allowed = allowed & (bias != -math.inf)
        s = s + bias
    return xp.where(allowed, s, -math.inf), allowed, slope


def _sums(xp: Any, weights: Array, x: Array, allowed: Array) -> Array:
    """Weights (rows, heads, most) @ x (rows, most, width), over pairs that are allowed alone."""
    if bool(xp.all(xp.isfinite(x))):
        return xp.matmul(weights, x)
    product = weights[..., None] * x[:, None, :, :]
    return xp.sum(xp.where(allowed[..., None], product, xp.zeros_like(product)), axis=2)


def _placed(run: Run, count: int, rows: list[np.ndarray], parts: list[Array], fill: float,
            shape: tuple[int, ...]) -> Array:
    """Parts (rows, ...) in the order of all `count` rows; those in none are `fill`."""
    xp, p = run.xp, run.problem
    acc = accumulator(xp, p.v)
    filling = xp.full((1, *shape), fill, dtype=acc, device=device(p.v))
    place = np.zeros(count, np.int64)
    if rows:
        place[np.concatenate(rows)] = np.arange(1, 1 + sum(map(len, rows)))
    return xp.take(xp.concat([filling, *parts], axis=0), run.index(place), axis=0)


def forward(problem: Any) -> tuple[Array, Array]:
    """Output (B, H, N, E) and log-sum-exp (B, H, N)."""
    xp, (batch, heads) = namespace(problem.v), problem.edges.owner.shape
    n, width = problem.edges.start.shape[1] - 1, problem.v.shape[3]
    outs, lses = [], []
    with np.errstate(all="ignore"):
        for run in _runs(problem):
            rows, out, lse = [], [], []
            for chunk in chunks(run.start, _width(problem)):
                keys = problem.edges.key[chunk.entry]
                s, allowed, _ = _scores(run, chunk, keys)
                v = run.taken(problem.v[run.item, run.group, :, :], keys)
                top = xp.max(s, axis=-1)
                shift = xp.where(top == -math.inf, xp.zeros_like(top), top)
                weight = xp.where(allowed, xp.exp(s - shift[..., None]), 0.0)
                total = xp.sum(weight, axis=-1)
                empty = total == 0
                safe = xp.where(empty, xp.ones_like(total), total)
                rows.append(chunk.rows)
                out.append(_sums(xp, weight, v, allowed) / safe[..., None])
                lse.append(xp.where(empty, -math.inf, shift + xp.log(safe)))
            shared = run.shared
            outs.append(xp.permute_dims(_placed(run, n, rows, out, 0.0, (shared, width)),
                                        (1, 0, 2)))
            lses.append(xp.matrix_transpose(_placed(run, n, rows, lse, -math.inf, (shared,))))
    acc, where = accumulator(xp, problem.v), device(problem.v)
    outs.append(xp.zeros((0, n, width), dtype=acc, device=where))
    lses.append(xp.zeros((0, n), dtype=acc, device=where))
    return (xp.reshape(xp.concat(outs, axis=0), (batch, heads, n, width)),
            xp.reshape(xp.concat(lses, axis=0), (batch, heads, n)))


def _width(problem: Any) -> int:
    return max(problem.v.shape[3], 0 if problem.q is None else problem.q.shape[3])


def backward(problem: Any, dout: Array, out: Array, lse: Array,
             dlse: Array | None) -> dict[str, Array]:
    """Gradients of q, k and v where given, and of the bias as (copies, H, edges)."""
    p, xp = problem, namespace(problem.v)
    acc, (batch, heads) = lse.dtype, p.edges.owner.shape
    n, groups, m = p.edges.start.shape[1] - 1, p.v.shape[1], p.v.shape[2]

    def zeros(*shape: int) -> Array:
        return xp.zeros(shape, dtype=acc, device=device(p.v))

    with np.errstate(all="ignore"):
        delta = xp.sum(xp.astype(dout, acc) * xp.astype(out, acc), axis=-1)
        delta = delta if dlse is None else delta - dlse
        dq: list[Array] = []
        dbias: dict[tuple[int, int, int], Array] = {}
        d = 0 if p.q is None else p.q.shape[3]
        dk = [[zeros(m, d) for _ in range(groups)] for _ in range(batch)]
        dv = [[zeros(m, p.v.shape[3]) for _ in range(groups)] for _ in range(batch)]
        for run in _runs(p):
            kept, kept_at, allowed_at, dq_run = _by_query(run, dout, lse, delta, d, zeros)
            dq.append(dq_run)
            if p.bias is not None:
                ds = xp.take(kept[2], run.index(kept_at), axis=0)
                for r in range(run.shared):
                    dbias[run.item % p.copies, run.heads.start + r, run.number] = ds[:, r]
            more_k, more_v = _by_key(run, dout, kept, kept_at, allowed_at, m)
            dk[run.item][run.group] = dk[run.item][run.group] + more_k
            dv[run.item][run.group] = dv[run.item][run.group] + more_v
    found = {"v": _stacked(xp, dv, zeros(0, m, p.v.shape[3]), p.v.shape)}
    if p.q is not None:
        found["q"] = xp.reshape(xp.concat([zeros(0, n, d), *dq], axis=0), p.q.shape)
        found["k"] = _stacked(xp, dk, zeros(0, m, d), p.k.shape)
    if p.bias is not None:
        # one after another, as the lists lie
        parts = [dbias.get((b, h, l), zeros(int(start[-1] - start[0])))
                 for b in range(p.copies) for h in range(heads)
                 for l, start in enumerate(p.edges.start)]
        found["bias"] = xp.reshape(xp.concat([zeros(0), *parts]),
                                   (p.copies, heads, len(p.edges.key)))
    return found


def _stacked(xp: Any, rows: list[list[Array]], none: Array, shape: tuple[int, ...]) -> Array:
    parts = [x[None, :, :] for row in rows for x in row]
    return xp.reshape(xp.concat([none, *parts], axis=0), shape)


def _by_query(run: Run, dout: Array, lse: Array, delta: Array, d: int, zeros: Any) -> Any:
    """The gradient of q, and for each edge what was found: see below."""
    p, xp = run.problem, run.xp
    n, first = len(run.start) - 1, int(run.start[0])
    rows, dqs, kept = [], [], [[zeros(1, run.shared)] for _ in range(3)]
    seen = [xp.zeros((1, run.shared), dtype=xp.bool, device=device(p.v))]
    kept_at, filled = np.zeros(int(run.start[-1]) - first, np.int64), 1
    for chunk in chunks(run.start, _width(p)):
        keys = p.edges.key[chunk.entry]
        s, allowed, slope = _scores(run, chunk, keys)
        v = run.taken(p.v[run.item, run.group, :, :], keys)
        shift = run.numbers(lse, chunk.rows)[..., None]
        allowed = allowed & (shift != -math.inf)
        # forward: p = exp(s - lse), out = p v
        weight = xp.where(allowed, xp.exp(s - shift), 0.0)
        dp = xp.matmul(run.by_head(dout, chunk.rows), xp.matrix_transpose(v))
        ds = xp.where(allowed, weight * (dp - run.numbers(delta, chunk.rows)[..., None]), 0.0)
        # forward: s = softcap tanh(raw / softcap) + bias, raw = scale q k
        draw = ds if slope is None else xp.where(allowed, ds * slope, 0.0)
        if p.q is not None:
            k = run.taken(p.k[run.item, run.group, :, :], keys)
            dqs.append(p.scale * _sums(xp, draw, k, allowed))
        rows.append(chunk.rows)
        for found, x in zip((*kept, seen), (weight, draw, ds, allowed), strict=True):
            found.append(xp.reshape(xp.matrix_transpose(x), (-1, run.shared)))
        place = filled + np.arange(chunk.entry.size).reshape(chunk.entry.shape)
        kept_at[chunk.entry[chunk.there] - first] = place[chunk.there]
        filled += chunk.entry.size
    dq = (None if p.q is None else
          xp.permute_dims(_placed(run, n, rows, dqs, 0.0, (run.shared, d)), (1, 0, 2)))
    return [xp.concat(x, axis=0) for x in kept], kept_at, xp.concat(seen, axis=0), dq


def _by_key(run: Run, dout: Array, kept: list[Array], kept_at: np.ndarray, seen: Array,
            m: int) -> tuple[Array, Array]:
    """Gradients of the keys and values of a group, from one run of its heads."""
    p, xp, by_key = run.problem, run.xp, run.problem.edges.by_key
    rows, dks, dvs = [], [], []
    for chunk in chunks(by_key.start[run.number], run.shared * _width(p)):
        if not len(by_key.edge):
            break
        query = by_key.query[chunk.entry]
        # what stands for none is an edge of the first list, which may be longer than this one
        edge = np.where(chunk.there, by_key.edge[chunk.entry], 0)
        at = np.where(chunk.there, kept_at[edge], 0)
        allowed = _flat(xp, run, seen, at)
        rows.append(chunk.rows)
        # forward: out = p v
        dvs.append(_sums(xp, _flat(xp, run, kept[0], at), _rows(xp, run, dout, query),
                         allowed)[:, 0, :])
        if p.q is not None:
            # forward: raw = scale q k
            dks.append(p.scale * _sums(xp, _flat(xp, run, kept[1], at),
                                       _rows(xp, run, p.q, query), allowed)[:, 0, :])
    dk = 0.0 if p.q is None else _placed(run, m, rows, dks, 0.0, (p.q.shape[3],))
    return dk, _placed(run, m, rows, dvs, 0.0, (p.v.shape[3],))


def _flat(xp: Any, run: Run, x: Array, at: np.ndarray) -> Array:
    """Rows `at` (keys, most) of `x` (edges, heads), as (keys, 1, most * heads)."""
    found = xp.take(x, run.index(at.reshape(-1)), axis=0)
    return xp.reshape(found, (at.shape[0], 1, at.shape[1] * run.shared))


def _rows(xp: Any, run: Run, x: Array, query: np.ndarray) -> Array:
    """Rows `query` (keys, most) of each head of `x`, as (keys, most * heads, width)."""
    found = run.by_head(x, query)
    return xp.reshape(found, (query.shape[0], query.shape[1] * run.shared, x.shape[3]))
