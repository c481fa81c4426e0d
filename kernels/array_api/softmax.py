"""Tiled softmax attention for any array-API namespace: no in-place writes, no N x M array.

Rows of 64 queries walk the runs of their BlockMask layout with an online softmax. The backward
walks the rows once for dq and the gradients of bias, gate and offsets, and the columns once for dk
and dv. Batch items and heads that share a layout are computed together, as (b, g, r, n, d): r query
heads for each of g key/value heads.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from pyattn.arrays import accumulator, device, from_host, namespace

from .philox import kept

Array = Any
TILE = 64
PIECE = 8 * TILE
"""Keys (or queries) that are scored at once; bounds the memory of a step."""


def refuses(problem: Any) -> str | None:
    """Nothing: this is the backend that runs everywhere."""
    return None


@dataclasses.dataclass(frozen=True)
class Slab:
    """Batch items and heads that share one layout."""

    problem: Any
    xp: Any
    items: slice
    heads: slice
    layout: int
    q: Array
    k: Array
    v: Array

    @property
    def shape(self) -> tuple[int, int, int]:
        """(b, g, r)."""
        return self.q.shape[0], self.q.shape[1], self.q.shape[2]

    def array(self, x: np.ndarray) -> Array:
        """Move what was made on the host to where the problem lives."""
        return from_host(self.xp, x, device(self.q))


def _slabs(problem: Any) -> list[list[Slab]]:
    """The slabs, in rows of batch items and columns of heads."""
    xp = namespace(problem.q)
    batch, heads = problem.layout.shape
    group = heads // max(problem.k.shape[1], 1)
    layout = problem.layout
    together = bool((layout == layout[:1]).all())
    items = [slice(0, batch)] if together else [slice(b, b + 1) for b in range(batch)]
    together = bool((layout == layout[:, :1]).all())
    columns = [slice(0, heads)] if together else [slice(h, h + 1) for h in range(heads)]

    def slab(b: slice, h: slice) -> Slab:
        g = slice(h.start // group, (h.stop - 1) // group + 1)
        q, k, v = problem.q[b, h, :, :], problem.k[b, g, :, :], problem.v[b, g, :, :]
        groups = k.shape[1]
        q = xp.reshape(q, (q.shape[0], groups, q.shape[1] // groups, *q.shape[2:]))
        return Slab(problem, xp, b, h, int(layout[b.start, h.start]), q,
                    k[:, :, None, :, :], v[:, :, None, :, :])

    return [[slab(b, h) for h in columns] for b in items]


def _walk(runs: Any, bits: np.ndarray, layout: int, tile: int, limit: int,
          ) -> Iterator[tuple[slice, np.ndarray | None]]:
    """The pieces that tile row `tile` visits: a slice of the other axis, and bits if partial."""
    for run in range(runs.start[layout, tile], runs.start[layout, tile + 1]):
        first, count, names = int(runs.first[run]), int(runs.count[run]), int(runs.tile[run])
        step = PIECE // TILE if names < 0 else 1
        for t in range(0, count, step):
            start = (first + t) * TILE
            stop = min((first + min(t + step, count)) * TILE, limit)
            words = None if names < 0 else bits[runs.names[names + t]]
            yield slice(start, stop), words


def _unpack(words: np.ndarray, rows: int, columns: int) -> np.ndarray:
    return np.unpackbits(words.view(np.uint8).reshape(TILE, 8), axis=1,
                         bitorder="little")[:rows, :columns].astype(bool)


@dataclasses.dataclass(frozen=True)
class Scores:
    """One rectangle of scores, (b, g, r, n, m)."""

    raw: Array
    """q.k before the scale."""
    value: Array
    """After softcap, bias and offsets; -inf where not allowed."""
    slope: Array | None
    """d(softcapped) / d(scaled)."""
    allowed: Array | None
    """None: every pair is allowed."""
    gate: Array | None


def _heads(slab: Slab, x: Array) -> Array:
    """(b, 1 or h, n, m) as (b, 1 or g, 1 or r, n, m)."""
    _, g, r = slab.shape
    split = (g, r) if x.shape[1] != 1 else (1, 1)
    return slab.xp.reshape(x, (x.shape[0], *split, *x.shape[2:]))


def _term(slab: Slab, term: Any, i: slice, j: slice) -> Array:
    """The part of a bias or gate that lies over the rectangle, in the accumulator's dtype."""
    array, item = term.array, term.item[slab.items]
    if array.shape[0] == 1:
        item = item[:1]
    if not np.array_equal(item, np.arange(array.shape[0])):
        array = slab.xp.take(array, slab.array(item), axis=0)
    h = slab.heads if array.shape[1] != 1 else slice(0, 1)
    i = i if array.shape[2] != 1 else slice(0, 1)
    j = j if array.shape[3] != 1 else slice(0, 1)
    return _heads(slab, slab.xp.astype(array[:, h, i, j], accumulator(slab.xp, slab.q)))


def _positions(slab: Slab, x: np.ndarray, part: slice) -> np.ndarray:
    return (x if x.shape[0] == 1 else x[slab.items])[:, part]


def _columns_of_offsets(slab: Slab, i: slice, j: slice) -> np.ndarray:
    """Which column of the offset table each pair reads, (1 or b, n, m)."""
    problem = slab.problem
    columns = (_positions(slab, problem.k_positions, j)[:, None, :]
               - _positions(slab, problem.q_positions, i)[:, :, None] - problem.offset_origin)
    # pairs that no mask allows (padding, other segments) may lie beyond the table
    return np.clip(columns, 0, problem.offsets.shape[1] - 1)


def _scores(slab: Slab, i: slice, j: slice, bits: np.ndarray | None) -> Scores:
    problem, xp = slab.problem, slab.xp
    acc = accumulator(xp, slab.q)
    _, g, r = slab.shape
    k = xp.astype(slab.k[:, :, :, j, :], acc)
    raw = xp.matmul(xp.astype(slab.q[:, :, :, i, :], acc), xp.matrix_transpose(k))
    value = raw * xp.reshape(problem.scale[slab.heads], (1, g, r, 1, 1))
    slope = None
    if problem.softcap is not None:
        bent = xp.tanh(value / problem.softcap)
        value, slope = problem.softcap * bent, 1.0 - bent * bent

    allowed = None
    if bits is not None:
        allowed = slab.array(_unpack(bits, i.stop - i.start, j.stop - j.start))
    inside = _inside(slab, i, j)
    if inside is not None:
        inside = slab.array(inside[:, None, None, :, :])
        allowed = inside if allowed is None else allowed & inside
    if problem.bias is not None:
        bias = _term(slab, problem.bias, i, j)
        value = value + bias
        open_ = bias != -math.inf
        allowed = open_ if allowed is None else allowed & open_
    if problem.offsets is not None:
        columns = _columns_of_offsets(slab, i, j)
        table = problem.offsets[slab.heads, :] if problem.offsets.shape[0] != 1 else problem.offsets
        picked = xp.take(xp.astype(table, acc), slab.array(columns.reshape(-1)), axis=1)
        picked = xp.reshape(picked, (table.shape[0], *columns.shape))
        value = value + _heads(slab, xp.permute_dims(picked, (1, 0, 2, 3)))
    if allowed is not None:
        allowed = xp.broadcast_to(allowed, value.shape)
        value = xp.where(allowed, value, xp.full_like(value, -math.inf))
    gate = None if problem.gate is None else xp.broadcast_to(_term(slab, problem.gate, i, j),
                                                            value.shape)
    return Scores(raw, value, slope, allowed, gate)


def _inside(slab: Slab, i: slice, j: slice) -> np.ndarray | None:
    """Pairs within the lengths of their batch item, (b, n, m), or None when all are."""
    queries, keys = slab.problem.q_lengths[slab.items], slab.problem.kv_lengths[slab.items]
    if (queries >= i.stop).all() and (keys >= j.stop).all():
        return None
    return ((np.arange(i.start, i.stop)[None, :, None] < queries[:, None, None])
            & (np.arange(j.start, j.stop)[None, None, :] < keys[:, None, None]))


def _dropped(slab: Slab, i: slice, j: slice) -> Array | None:
    """The factor of dropout on each weight, or None without dropout."""
    problem, xp = slab.problem, slab.xp
    if not problem.dropout:
        return None
    heads = np.arange(slab.heads.start, slab.heads.stop)[None, :, None, None]
    keep = kept(problem.dropout, problem.dropout_seed,
                _positions(slab, problem.streams, i)[:, None, :, None], heads,
                _positions(slab, problem.q_positions, i)[:, None, :, None],
                _positions(slab, problem.k_positions, j)[:, None, None, :])
    factor = xp.astype(slab.array(keep), accumulator(xp, slab.q)) / (1.0 - problem.dropout)
    return _heads(slab, factor)


def _all_finite(xp: Any, *arrays: Array) -> bool:
    return all(bool(xp.all(xp.isfinite(xp.astype(x, accumulator(xp, x))))) for x in arrays)


def _apply(xp: Any, weights: Array, x: Array, allowed: Array | None, finite: bool) -> Array:
    """Weights @ x, in which a pair that is not allowed adds nothing, whatever `x` holds there."""
    if finite or allowed is None:
        return xp.matmul(weights, x)
    total = xp.zeros_like(xp.matmul(weights, x))
    for j in range(0, x.shape[-2], 8):
        part = slice(j, j + 8)
        product = weights[..., part][..., None] * x[..., None, part, :]
        total = total + xp.sum(xp.where(allowed[..., part][..., None], product,
                                        xp.zeros_like(product)), axis=-2)
    return total


def _together(xp: Any, rows: list[list[Array]]) -> Array:
    """Results of slabs, (b, g, r, ...), as one (B, H, ...)."""
    def merged(x: Array) -> Array:
        return xp.reshape(x, (x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:]))
    return xp.concat([xp.concat([merged(x) for x in row], axis=1) for row in rows], axis=0)


def forward(problem: Any) -> tuple[Array, Array]:
    """Output (B, H, N, E) and log-sum-exp (B, H, N)."""
    xp = namespace(problem.q)
    rows = problem.q.shape[:3]
    if 0 in rows:
        acc = accumulator(xp, problem.q)
        return xp.zeros((*rows, problem.v.shape[3]), dtype=acc), xp.zeros(rows, dtype=acc)
    with np.errstate(all="ignore"):
        finite = _all_finite(xp, problem.v)
        parts = [[_forward(slab, finite) for slab in row] for row in _slabs(problem)]
        return (_together(xp, [[out for out, _ in row] for row in parts]),
                _together(xp, [[lse for _, lse in row] for row in parts]))


def _forward(slab: Slab, finite: bool) -> tuple[Array, Array]:
    xp, blocks, n, m = slab.xp, slab.problem.blocks, slab.q.shape[3], slab.k.shape[3]
    outs, lses = [], []
    for tile in range(-(-n // TILE)):
        i = slice(tile * TILE, min((tile + 1) * TILE, n))
        pieces = ((i, j, bits) for j, bits in _walk(blocks.rows, blocks.bits, slab.layout, tile, m))
        out, lse = _row(slab, i, pieces, finite)
        outs.append(out)
        lses.append(lse)
    return xp.concat(outs, axis=3), xp.concat(lses, axis=3)


def _row(slab: Slab, i: slice, pieces: Any, finite: bool) -> tuple[Array, Array]:
    """Online softmax of the queries `i` over their pieces."""
    problem, xp = slab.problem, slab.xp
    acc = accumulator(xp, slab.q)
    b, g, r = slab.shape
    rows = (b, g, r, i.stop - i.start)
    high = xp.full(rows, -math.inf, dtype=acc)
    total = xp.zeros(rows, dtype=acc)
    out = xp.zeros((*rows, slab.v.shape[4]), dtype=acc)
    for i, j, bits in pieces:
        s = _scores(slab, i, j, bits)
        value, allowed = s.value, s.allowed
        if s.gate is not None:
            open_ = s.gate != 0
            allowed = open_ if allowed is None else allowed & open_
            value = xp.where(open_, value, xp.full_like(value, -math.inf))
        highest = xp.maximum(high, xp.max(value, axis=-1))
        shift = xp.where(highest == -math.inf, xp.zeros_like(highest), highest)
        weight = xp.exp(value - shift[..., None])
        if s.gate is not None:
            weight = xp.where(allowed, weight * s.gate, xp.zeros_like(weight))
        shrink = xp.exp(high - shift)
        total = total * shrink + xp.sum(weight, axis=-1)
        factor = _dropped(slab, i, j)
        v = xp.astype(slab.v[:, :, :, j, :], acc)
        out = out * shrink[..., None] + _apply(
            xp, weight if factor is None else weight * factor, v, allowed, finite)
        high = highest
    if problem.sinks is not None:
        sinks = xp.reshape(problem.sinks[slab.heads], (1, g, r, 1))
        highest = xp.maximum(high, sinks)
        shift = xp.where(highest == -math.inf, 0.0, highest)
        shrink = xp.exp(high - shift)
        total = total * shrink + xp.exp(sinks - shift)
        out, high = out * shrink[..., None], highest
    shift = xp.where(high == -math.inf, 0.0, high)
    empty = total == 0
    safe = xp.where(empty, xp.ones_like(total), total)
    lse = xp.where(empty, xp.full_like(total, -math.inf), shift + xp.log(safe))
    return out / safe[..., None], lse


def weights(problem: Any, lse: Array) -> Array:
    """The probabilities before dropout, (B, H, N, M): dense by definition."""
    xp, blocks = namespace(problem.q), problem.blocks
    acc = accumulator(xp, problem.q)
    n, m = problem.q.shape[2], problem.k.shape[2]
    if 0 in (*problem.q.shape[:3], m):
        return xp.zeros((*problem.q.shape[:3], m), dtype=acc)

    def row(slab: Slab, tile: int) -> Array:
        i = slice(tile * TILE, min((tile + 1) * TILE, n))
        pieces, reached = [], 0
        for j, bits in _walk(blocks.rows, blocks.bits, slab.layout, tile, m):
            pieces.append(xp.zeros((*slab.shape, i.stop - i.start, j.start - reached), dtype=acc))
            p, _ = _probabilities(slab, _scores(slab, i, j, bits), _part(slab, lse, i))
            pieces.append(p)
            reached = j.stop
        pieces.append(xp.zeros((*slab.shape, i.stop - i.start, m - reached), dtype=acc))
        return xp.concat(pieces, axis=-1)

    with np.errstate(all="ignore"):
        return _together(xp, [[xp.concat([row(slab, tile) for tile in range(-(-n // TILE))], axis=3)
                               for slab in slabs] for slabs in _slabs(problem)])


def _part(slab: Slab, x: Array, i: slice) -> Array:
    """Rows `i` of a (B, H, N, ...) array, as the slab's (b, g, r, n, ...)."""
    part = x[slab.items, slab.heads, i, ...]
    return slab.xp.reshape(part, (*slab.shape, *part.shape[2:]))


def _probabilities(slab: Slab, s: Scores, lse: Array) -> tuple[Array, Array]:
    """P = gate u and u = exp(s - lse); both 0 in rows that see no key."""
    xp = slab.xp
    live = (lse != -math.inf)[..., None]
    u = xp.where(live, xp.exp(s.value - xp.where(live, lse[..., None], 0.0)), 0.0)
    return (u if s.gate is None else xp.where(s.gate == 0, 0.0, s.gate * u)), u


@dataclasses.dataclass(frozen=True)
class Step:
    """The backward of one rectangle."""

    scores: Scores
    p: Array
    """Weights as they met v: after dropout."""
    ds: Array
    """Gradient of the score after softcap, as bias and offsets saw it."""
    dgate: Array | None
    draw: Array
    """Gradient of scale * q.k."""
    allowed: Array | None
    """Pairs through which q, k, v and dout meet."""


def _step(slab: Slab, i: slice, j: slice, bits: np.ndarray | None, dout: Array, lse: Array,
          delta: Array) -> Step:
    xp, acc = slab.xp, accumulator(slab.xp, slab.q)
    s = _scores(slab, i, j, bits)
    lse, delta = _part(slab, lse, i), _part(slab, delta, i)
    p, u = _probabilities(slab, s, lse)
    live = (lse != -math.inf)[..., None]
    permitted = live if s.allowed is None else live & s.allowed
    met = permitted if s.gate is None else permitted & (s.gate != 0)
    # forward: out = (p * factor) v
    v = xp.astype(slab.v[:, :, :, j, :], acc)
    dp = xp.matmul(xp.astype(_part(slab, dout, i), acc), xp.matrix_transpose(v))
    factor = _dropped(slab, i, j)
    if factor is not None:
        dp, p_out = dp * factor, p * factor
    else:
        p_out = p
    pull = xp.where(permitted, dp - delta[..., None], 0.0)
    # forward: p = gate exp(s - lse)
    ds = xp.where(met, p * pull, 0.0)
    dgate = None if s.gate is None else xp.where(permitted, u * pull, 0.0)
    # forward: s = softcap tanh(raw scale / softcap) + bias
    draw = ds if s.slope is None else xp.where(met, ds * s.slope, 0.0)
    return Step(s, p_out, ds, dgate, draw, xp.broadcast_to(met, p.shape))


def backward(problem: Any, dout: Array, lse: Array, delta: Array) -> dict[str, Array]:
    """Gradients of q, k, v, scale, and of bias, gate and offsets where given."""
    xp = namespace(problem.q)
    terms = _Terms(problem, xp)
    if 0 not in problem.q.shape[:3]:
        with np.errstate(all="ignore"):
            finite = _all_finite(xp, problem.q, problem.k, dout)
            queries, keys, values, scales = [], [], [], []
            for row in _slabs(problem):
                rows = [_rows_pass(slab, dout, lse, delta, finite, terms) for slab in row]
                columns = [_columns_pass(slab, dout, lse, delta, finite) for slab in row]
                queries.append([dq for dq, _ in rows])
                scales.append([dscale for _, dscale in rows])
                keys.append([dk for dk, _ in columns])
                values.append([dv for _, dv in columns])
            grads = {"q": _together(xp, queries), "k": _groups(problem, xp, keys),
                     "v": _groups(problem, xp, values),
                     "scale": xp.sum(_together(xp, scales), axis=(0, 2))}
    else:
        acc = accumulator(xp, problem.q)
        grads = {name: xp.zeros(getattr(problem, name).shape, dtype=acc)
                 for name in ("q", "k", "v", "scale")}
    return grads | terms.gradients()


def _rows_pass(slab: Slab, dout: Array, lse: Array, delta: Array, finite: bool,
               terms: _Terms) -> tuple[Array, Array]:
    xp, acc, blocks = slab.xp, accumulator(slab.xp, slab.q), slab.problem.blocks
    n, m = slab.q.shape[3], slab.k.shape[3]
    scale = xp.reshape(slab.problem.scale[slab.heads], (1, *slab.shape[1:], 1, 1))
    dqs, dscales = [], []
    for tile in range(-(-n // TILE)):
        i = slice(tile * TILE, min((tile + 1) * TILE, n))
        dq = xp.zeros((*slab.shape, i.stop - i.start, slab.q.shape[4]), dtype=acc)
        dscale = xp.zeros((*slab.shape, i.stop - i.start), dtype=acc)
        for j, bits in _walk(blocks.rows, blocks.bits, slab.layout, tile, m):
            step = _step(slab, i, j, bits, dout, lse, delta)
            # forward: raw = q k'
            k = xp.astype(slab.k[:, :, :, j, :], acc)
            dq = dq + _apply(xp, step.draw, k, step.allowed, finite)
            pulled = xp.where(step.allowed, step.draw * step.scores.raw, 0.0)
            dscale = dscale + xp.sum(pulled, axis=-1)
            terms.add(slab, i, j, step)
        dqs.append(scale * dq)
        dscales.append(dscale)
    return xp.concat(dqs, axis=3), xp.concat(dscales, axis=3)


def _columns_pass(slab: Slab, dout: Array, lse: Array, delta: Array,
                  finite: bool) -> tuple[Array, Array]:
    xp, acc, blocks = slab.xp, accumulator(slab.xp, slab.q), slab.problem.blocks
    n, m = slab.q.shape[3], slab.k.shape[3]
    scale = xp.reshape(slab.problem.scale[slab.heads], (1, *slab.shape[1:], 1, 1))
    b, g, _ = slab.shape
    dks, dvs = [], []
    for tile in range(-(-m // TILE)):
        j = slice(tile * TILE, min((tile + 1) * TILE, m))
        dk = xp.zeros((b, g, j.stop - j.start, slab.k.shape[4]), dtype=acc)
        dv = xp.zeros((b, g, j.stop - j.start, slab.v.shape[4]), dtype=acc)
        for i, bits in _walk(blocks.columns, blocks.bits, slab.layout, tile, n):
            step = _step(slab, i, j, bits, dout, lse, delta)
            allowed = xp.matrix_transpose(step.allowed)
            # forward: raw = q k'
            dk = dk + xp.sum(_apply(xp, xp.matrix_transpose(scale * step.draw),
                                    xp.astype(slab.q[:, :, :, i, :], acc), allowed, finite), axis=2)
            # forward: out = p v
            dv = dv + xp.sum(_apply(xp, xp.matrix_transpose(step.p),
                                    xp.astype(_part(slab, dout, i), acc), allowed, finite), axis=2)
        dks.append(dk)
        dvs.append(dv)
    if not dks:
        return (xp.zeros((b, g, 0, slab.k.shape[4]), dtype=acc),
                xp.zeros((b, g, 0, slab.v.shape[4]), dtype=acc))
    return xp.concat(dks, axis=2), xp.concat(dvs, axis=2)


def _groups(problem: Any, xp: Any, rows: list[list[Array]]) -> Array:
    """Gradients by slab as (B, G, M, .): slabs of one head are summed into their group."""
    groups = problem.k.shape[1]
    joined = []
    for row in rows:
        share = max(len(row) // groups, 1)
        joined.append(xp.concat([functools.reduce(xp.add, row[at:at + share])
                                 for at in range(0, len(row), share)], axis=1))
    return xp.concat(joined, axis=0)


class _Terms:
    """Gradients of bias, gate and offsets, gathered tile by tile in the terms' own shapes."""

    def __init__(self, problem: Any, xp: Any) -> None:
        self.problem, self.xp = problem, xp
        self.tiles: dict[str, dict[tuple[int, int, int], Array]] = {"bias": {}, "gate": {}}
        self.offsets: dict[tuple[int, int], Array] = {}
        self.heads = problem.layout.shape[1]
        """How many heads a slab holds."""

    def add(self, slab: Slab, i: slice, j: slice, step: Step) -> None:
        self.heads = slab.heads.stop - slab.heads.start
        if self.problem.bias is not None:
            self._add_term("bias", slab, i, j, step.ds)
        if self.problem.gate is not None:
            self._add_term("gate", slab, i, j, step.dgate)
        if self.problem.offsets is not None:
            for start in range(j.start, j.stop, TILE):
                part = slice(start, min(start + TILE, j.stop))
                self._add_offsets(slab, i, part,
                                  step.ds[..., start - j.start:part.stop - j.start])

    def _add_term(self, name: str, slab: Slab, i: slice, j: slice, d: Array) -> None:
        xp, term = self.xp, getattr(self.problem, name)
        b, g, r = slab.shape
        d = xp.reshape(d, (b, g * r, *d.shape[3:]))
        _, h, n, m = term.array.shape
        shared = tuple(axis for axis, size in ((1, h), (2, n), (3, m))
                       if size == 1 and d.shape[axis] != 1)
        if shared:
            d = xp.sum(d, axis=shared, keepdims=True)
        d = _by_item(xp, d, term.item[slab.items], term.array.shape[0])
        step = j.stop - j.start if m == 1 else TILE
        for start in range(j.start, j.stop, step):
            stop = min(start + step, j.stop)
            key = (slab.heads.start if h != 1 else 0, i.start if n != 1 else 0,
                   start if m != 1 else 0)
            piece = d if m == 1 else d[..., start - j.start:stop - j.start]
            known = self.tiles[name].get(key)
            self.tiles[name][key] = piece if known is None else known + piece

    def _add_offsets(self, slab: Slab, i: slice, j: slice, ds: Array) -> None:
        xp = self.xp
        b, g, r = slab.shape
        columns = _columns_of_offsets(slab, i, j)
        ds = xp.reshape(ds, (b, g * r, -1))
        shared = columns.shape[0] == 1
        if shared:
            ds = xp.sum(ds, axis=0, keepdims=True)
        if self.problem.offsets.shape[0] == 1:
            ds = xp.sum(ds, axis=1, keepdims=True)
        h = slab.heads.start if self.problem.offsets.shape[0] != 1 else 0
        for item in range(ds.shape[0]):
            first = int(columns[item].min())
            # summing along diagonals is a product with the 0/1 matrix "pair reads column"
            reads = _reads((columns[item] - first).tobytes(), columns.dtype.str)
            reads = xp.astype(slab.array(reads), ds.dtype)
            piece = xp.matmul(ds[item, ...], reads)
            known = self.offsets.get((h, first))
            if known is not None:
                width = max(known.shape[1], piece.shape[1])
                piece = _placed(xp, known, 0, width) + _placed(xp, piece, 0, width)
            self.offsets[h, first] = piece

    def gradients(self) -> dict[str, Array]:
        grads = {}
        for name in ("bias", "gate"):
            term = getattr(self.problem, name)
            if term is not None:
                grads[name] = self._assembled(self.tiles[name], term.array.shape)
        if self.problem.offsets is not None:
            grads["offsets"] = self._table()
        return grads

    def _assembled(self, tiles: dict[tuple[int, int, int], Array], shape: tuple[int, ...]) -> Array:
        xp, acc = self.xp, accumulator(self.xp, self.problem.q)
        b, h, n, m = shape
        step = max(min(h, self.heads), 1)

        def tile(head: int, i: int, j: int) -> Array:
            found = tiles.get((head, i, j))
            return found if found is not None else xp.zeros(
                (b, min(step, h - head), min(TILE, n - i), min(TILE, m - j)), dtype=acc)

        if 0 in shape:
            return xp.zeros(shape, dtype=acc)
        def row(head: int, i: int) -> Array:
            return xp.concat([tile(head, i, j) for j in range(0, m, TILE)], axis=3)

        return xp.concat([xp.concat([row(head, i) for i in range(0, n, TILE)], axis=2)
                          for head in range(0, h, step)], axis=1)

    def _table(self) -> Array:
        xp, (heads, width) = self.xp, self.problem.offsets.shape
        if heads * width == 0 or not self.offsets:
            return xp.zeros((heads, width), dtype=accumulator(xp, self.problem.q))
        step = min(heads, self.heads)
        rows = []
        for head in range(0, heads, step):
            row = xp.zeros((step, width), dtype=accumulator(xp, self.problem.q))
            for (h, first), piece in self.offsets.items():
                if h == head:
                    row = row + _placed(xp, piece, first, width)
            rows.append(row)
        return xp.concat(rows, axis=0)


def _by_item(xp: Any, d: Array, item: np.ndarray, size: int) -> Array:
    """Sum the batch items that read the same row of a term: (b, ...) to (size, ...)."""
    if size == 1:
        return xp.sum(d, axis=0, keepdims=True)
    if np.array_equal(item, np.arange(size)):
        return d
    rows = []
    for own in range(size):
        members = [d[at:at + 1, ...] for at in np.flatnonzero(item == own)]
        rows.append(functools.reduce(xp.add, members) if members else xp.zeros_like(d[:1, ...]))
    return xp.concat(rows, axis=0)


@functools.lru_cache(maxsize=64)
def _reads(columns: bytes, dtype: str) -> np.ndarray:
    """0/1 matrix (pairs, columns) of which column a pair reads."""
    flat = np.frombuffer(columns, dtype)
    return (flat[:, None] == np.arange(flat.max() + 1)).astype(np.float32)


def _placed(xp: Any, piece: Array, first: int, width: int) -> Array:
    """`piece` at column `first` of a table of zeros."""
    before = xp.zeros((piece.shape[0], first), dtype=piece.dtype)
    after = xp.zeros((piece.shape[0], width - first - piece.shape[1]), dtype=piece.dtype)
    return xp.concat([before, piece, after], axis=1)
