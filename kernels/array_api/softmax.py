"""Tiled softmax attention for any array-API namespace: no in-place writes, no N x M array.

Rows of 64 queries walk the runs of their BlockMask layout with an online softmax. The backward
walks the rows once for dq and the gradients of bias, gate and offsets, and the columns once for dk
and dv.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from pyattn.arrays import accumulator, namespace

from .scores import Scores, dropout_factor, scores_of
from .slabs import TILE, Array, Slab, grouped, rows_of, slabs_of, together, walk, zeros
from .terms import TermGradients

INDEXED = False


def refuses(problem: Any) -> str | None:
    """Nothing: this is the backend that runs everywhere."""
    return None


def _all_finite(xp: Any, *arrays: Array) -> bool:
    return all(bool(xp.all(xp.isfinite(xp.astype(x, accumulator(xp, x))))) for x in arrays)


def _apply(xp: Any, weights: Array, x: Array, allowed: Array | None, finite: bool) -> Array:
    """Weights @ x, in which a pair that is not allowed adds nothing, whatever `x` holds there."""
    if finite or allowed is None:
        return xp.matmul(weights, x)
    total = xp.zeros_like(xp.matmul(weights, x))
    for j in range(0, x.shape[-2], 8):
        part = slice(j, min(j + 8, x.shape[-2]))
        product = weights[..., part][..., None] * x[..., None, part, :]
        total = total + xp.sum(xp.where(allowed[..., part][..., None], product,
                                        xp.zeros_like(product)), axis=-2)
    return total


def forward(problem: Any) -> tuple[Array, Array]:
    """Output (B, H, N, E) and log-sum-exp (B, H, N)."""
    xp = namespace(problem.q)
    rows = problem.q.shape[:3]
    if 0 in rows:
        return zeros(problem, (*rows, problem.v.shape[3])), zeros(problem, rows)
    with np.errstate(all="ignore"):
        finite = _all_finite(xp, problem.v)
        parts = [[_forward(slab, finite) for slab in row] for row in slabs_of(problem)]
        return (together(xp, [[out for out, _ in row] for row in parts]),
                together(xp, [[lse for _, lse in row] for row in parts]))


def _forward(slab: Slab, finite: bool) -> tuple[Array, Array]:
    xp, blocks, n, m = slab.xp, slab.problem.blocks, slab.q.shape[3], slab.k.shape[3]
    outs, lses = [], []
    for tile in range(-(-n // TILE)):
        i = slice(tile * TILE, min((tile + 1) * TILE, n))
        pieces = ((i, j, bits) for j, bits in walk(blocks.rows, blocks.bits, slab.layout, tile, m))
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
    high = slab.zeros(*rows) - math.inf
    total = slab.zeros(*rows)
    out = slab.zeros(*rows, slab.v.shape[4])
    for i, j, bits in pieces:
        s = scores_of(slab, i, j, bits)
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
        factor = dropout_factor(slab, i, j)
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
    n, m = problem.q.shape[2], problem.k.shape[2]
    if 0 in (*problem.q.shape[:3], m):
        return zeros(problem, (*problem.q.shape[:3], m))

    def row(slab: Slab, tile: int) -> Array:
        i = slice(tile * TILE, min((tile + 1) * TILE, n))
        pieces, reached = [], 0
        for j, bits in walk(blocks.rows, blocks.bits, slab.layout, tile, m):
            pieces.append(slab.zeros(*slab.shape, i.stop - i.start, j.start - reached))
            p, _ = _probabilities(slab, scores_of(slab, i, j, bits), rows_of(slab, lse, i))
            pieces.append(p)
            reached = j.stop
        pieces.append(slab.zeros(*slab.shape, i.stop - i.start, m - reached))
        return xp.concat(pieces, axis=-1)

    with np.errstate(all="ignore"):
        return together(xp, [[xp.concat([row(slab, tile) for tile in range(-(-n // TILE))], axis=3)
                               for slab in slabs] for slabs in slabs_of(problem)])


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
    s = scores_of(slab, i, j, bits)
    lse, delta = rows_of(slab, lse, i), rows_of(slab, delta, i)
    p, u = _probabilities(slab, s, lse)
    live = (lse != -math.inf)[..., None]
    permitted = live if s.allowed is None else live & s.allowed
    met = permitted if s.gate is None else permitted & (s.gate != 0)
    # forward: out = (p * factor) v
    v = xp.astype(slab.v[:, :, :, j, :], acc)
    dp = xp.matmul(xp.astype(rows_of(slab, dout, i), acc), xp.matrix_transpose(v))
    factor = dropout_factor(slab, i, j)
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


def delta(dout: Array, out: Array, lse: Array, dlse: Array | None) -> Array:
    """Return rowsum(dout * out) - dlse, and 0 in rows that see no key."""
    xp, acc = namespace(dout), lse.dtype
    with np.errstate(all="ignore"):
        found = xp.sum(xp.astype(dout, acc) * xp.astype(out, acc), axis=-1)
        if dlse is not None:
            found = found - dlse
        return xp.where(lse != -math.inf, found, 0.0)


def backward(problem: Any, dout: Array, lse: Array, delta: Array) -> dict[str, Array]:
    """Gradients of q, k, v, scale, and of bias, gate and offsets where given."""
    xp = namespace(problem.q)
    terms = TermGradients(problem, xp)
    if 0 not in problem.q.shape[:3]:
        with np.errstate(all="ignore"):
            finite = _all_finite(xp, problem.q, problem.k, dout)
            queries, keys, values, scales = [], [], [], []
            for row in slabs_of(problem):
                rows = [_rows_pass(slab, dout, lse, delta, finite, terms) for slab in row]
                columns = [_columns_pass(slab, dout, lse, delta, finite) for slab in row]
                queries.append([dq for dq, _ in rows])
                scales.append([dscale for _, dscale in rows])
                keys.append([dk for dk, _ in columns])
                values.append([dv for _, dv in columns])
            grads = {"q": together(xp, queries), "k": grouped(problem, xp, keys),
                     "v": grouped(problem, xp, values),
                     "scale": xp.sum(together(xp, scales), axis=(0, 2))}
    else:
        grads = {name: zeros(problem, getattr(problem, name).shape)
                 for name in ("q", "k", "v", "scale")}
    return grads | terms.gradients()


def _rows_pass(slab: Slab, dout: Array, lse: Array, delta: Array, finite: bool,
               terms: TermGradients) -> tuple[Array, Array]:
    xp, acc, blocks = slab.xp, accumulator(slab.xp, slab.q), slab.problem.blocks
    n, m = slab.q.shape[3], slab.k.shape[3]
    scale = xp.reshape(slab.problem.scale[slab.heads], (1, *slab.shape[1:], 1, 1))
    dqs, dscales = [], []
    for tile in range(-(-n // TILE)):
        i = slice(tile * TILE, min((tile + 1) * TILE, n))
        dq = slab.zeros(*slab.shape, i.stop - i.start, slab.q.shape[4])
        dscale = slab.zeros(*slab.shape, i.stop - i.start)
        for j, bits in walk(blocks.rows, blocks.bits, slab.layout, tile, m):
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
        dk = slab.zeros(b, g, j.stop - j.start, slab.k.shape[4])
        dv = slab.zeros(b, g, j.stop - j.start, slab.v.shape[4])
        for i, bits in walk(blocks.columns, blocks.bits, slab.layout, tile, n):
            step = _step(slab, i, j, bits, dout, lse, delta)
            allowed = xp.matrix_transpose(step.allowed)
            q = xp.astype(slab.q[:, :, :, i, :], acc)
            dout_i = xp.astype(rows_of(slab, dout, i), acc)
            # forward: raw = q k'
            draw = xp.matrix_transpose(scale * step.draw)
            dk = dk + xp.sum(_apply(xp, draw, q, allowed, finite), axis=2)
            # forward: out = p v
            p = xp.matrix_transpose(step.p)
            dv = dv + xp.sum(_apply(xp, p, dout_i, allowed, finite), axis=2)
        dks.append(dk)
        dvs.append(dv)
    if not dks:
        return (slab.zeros(b, g, 0, slab.k.shape[4]),
                slab.zeros(b, g, 0, slab.v.shape[4]))
    return xp.concat(dks, axis=2), xp.concat(dvs, axis=2)
