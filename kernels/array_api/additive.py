"""Additive attention for any array-API namespace: scores are summed feature by feature.

So no array has axes for queries, keys and features at once. The backward walks the columns alone:
the gradients of queries are kept by tile, in a list, until all keys have met them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pyattn.arrays import accumulator, namespace

from .scores import allowed_pairs
from .slabs import TILE, Array, Slab, grouped, rows_of, slabs_of, together, walk, zeros
from .softmax import delta
from .sums import all_finite, weighted

__all__ = ["backward", "delta", "forward", "refuses"]


def refuses(problem: Any) -> str | None:
    """Nothing: this is the backend that runs everywhere."""
    return None


def _weights_of_features(slab: Slab) -> Array:
    """Return w as (A, 1, g, r, 1, 1)."""
    _, g, r = slab.shape
    w = slab.xp.matrix_transpose(slab.problem.w[slab.heads, :])
    return slab.xp.reshape(w, (w.shape[0], 1, g, r, 1, 1))


def _tanh(slab: Slab, i: slice, j: slice, f: int) -> Array:
    """What feature `f` makes of each pair, (b, g, r, n, m)."""
    return slab.xp.tanh(slab.q[:, :, :, i, f][..., :, None] + slab.k[:, :, :, j, f][..., None, :])


def _scores(slab: Slab, w: Array, i: slice, j: slice,
            bits: np.ndarray | None) -> tuple[Array, Array | None]:
    """Scores, -inf where not allowed, and which pairs are (None: all)."""
    xp = slab.xp
    value = slab.zeros(*slab.shape, i.stop - i.start, j.stop - j.start)
    for f in range(w.shape[0]):
        value = value + w[f, ...] * _tanh(slab, i, j, f)
    allowed = allowed_pairs(slab, i, j, bits)
    if allowed is not None:
        allowed = xp.broadcast_to(allowed, value.shape)
        value = xp.where(allowed, value, xp.full_like(value, -math.inf))
    return value, allowed


def forward(problem: Any) -> tuple[Array, Array]:
    """Output (B, H, N, E) and log-sum-exp (B, H, N)."""
    xp, rows = namespace(problem.q), problem.q.shape[:3]
    if 0 in rows:
        return zeros(problem, (*rows, problem.v.shape[3])), zeros(problem, rows)
    with np.errstate(all="ignore"):
        finite = all_finite(xp, problem.v)
        parts = [[_forward(slab, finite) for slab in row] for row in slabs_of(problem)]
        return (together(xp, [[out for out, _ in row] for row in parts]),
                together(xp, [[lse for _, lse in row] for row in parts]))


def _forward(slab: Slab, finite: bool) -> tuple[Array, Array]:
    xp, blocks, n = slab.xp, slab.problem.blocks, slab.q.shape[3]
    tiles = [slice(at, min(at + TILE, n)) for at in range(0, n, TILE)]
    w = _weights_of_features(slab)
    parts = [_row(slab, w, i, walk(blocks.rows, blocks.bits, slab.layout, t, slab.k.shape[3]),
                  finite) for t, i in enumerate(tiles)]
    return (xp.concat([out for out, _ in parts], axis=3),
            xp.concat([lse for _, lse in parts], axis=3))


def _row(slab: Slab, w: Array, i: slice, pieces: Any, finite: bool) -> tuple[Array, Array]:
    """Online softmax of the queries `i` over their pieces."""
    xp, acc = slab.xp, accumulator(slab.xp, slab.q)
    rows = (*slab.shape, i.stop - i.start)
    high, total = slab.zeros(*rows) - math.inf, slab.zeros(*rows)
    out = slab.zeros(*rows, slab.v.shape[4])
    for j, bits in pieces:
        value, allowed = _scores(slab, w, i, j, bits)
        highest = xp.maximum(high, xp.max(value, axis=-1))
        shift = xp.where(highest == -math.inf, xp.zeros_like(highest), highest)
        weight, shrink = xp.exp(value - shift[..., None]), xp.exp(high - shift)
        total = total * shrink + xp.sum(weight, axis=-1)
        v = xp.astype(slab.v[:, :, :, j, :], acc)
        out = out * shrink[..., None] + weighted(xp, weight, v, allowed, finite)
        high = highest
    empty = total == 0
    safe = xp.where(empty, xp.ones_like(total), total)
    lse = xp.where(empty, xp.full_like(total, -math.inf), high + xp.log(safe))
    return out / safe[..., None], lse


def backward(problem: Any, dout: Array, lse: Array, delta: Array) -> dict[str, Array]:
    """Gradients of q, k, v and w, in acc."""
    xp = namespace(problem.q)
    if 0 in problem.q.shape[:3]:
        return {name: zeros(problem, getattr(problem, name).shape) for name in ("q", "k", "v", "w")}
    with np.errstate(all="ignore"):
        finite = all_finite(xp, dout)
        found = [[_backward(slab, dout, lse, delta, finite) for slab in row]
                 for row in slabs_of(problem)]
        dq, dk, dv, dw = ([[x[name] for x in row] for row in found] for name in range(4))
        return {"q": together(xp, dq), "k": grouped(problem, xp, dk), "v": grouped(problem, xp, dv),
                "w": xp.sum(together(xp, dw), axis=0)}


def _backward(slab: Slab, dout: Array, lse: Array, delta: Array,
              finite: bool) -> tuple[Array, Array, Array, Array]:
    """Gradients of q (b, g, r, N, A), k and v (b, g, M, .) and w (b, g, r, A) of a slab."""
    xp, blocks = slab.xp, slab.problem.blocks
    (b, g, r), n, m = slab.shape, slab.q.shape[3], slab.k.shape[3]
    w = _weights_of_features(slab)
    features = w.shape[0]
    dqs = [slab.zeros(b, g, r, min(TILE, n - at), features) for at in range(0, n, TILE)]
    dks, dvs = [slab.zeros(b, g, 0, features)], [slab.zeros(b, g, 0, slab.v.shape[4])]
    dw = slab.zeros(b, g, r, features)
    for tile in range(-(-m // TILE)):
        j = slice(tile * TILE, min((tile + 1) * TILE, m))
        dk = slab.zeros(b, g, j.stop - j.start, features)
        dv = slab.zeros(b, g, j.stop - j.start, slab.v.shape[4])
        for i, bits in walk(blocks.columns, blocks.bits, slab.layout, tile, n):
            p, ds, met = _gradient_of_scores(slab, w, i, j, bits, dout, lse, delta)
            # forward: out = p v
            dout_i, by_key = xp.astype(rows_of(slab, dout, i), p.dtype), xp.matrix_transpose(met)
            dv = dv + xp.sum(weighted(xp, xp.matrix_transpose(p), dout_i, by_key, finite), axis=2)
            found_q, found_k, found_w = [], [], []
            for f in range(features):
                # forward: score = sum_f w_f t_f, t_f = tanh(q_f + k_f)
                t = _tanh(slab, i, j, f)
                found_w.append(xp.sum(xp.where(met, ds * t, 0.0), axis=(3, 4)))
                y = xp.where(met, w[f, ...] * (ds * (1.0 - t * t)), 0.0)
                found_q.append(xp.sum(y, axis=4))
                found_k.append(xp.sum(y, axis=(2, 3)))
            dk, dw = dk + xp.stack(found_k, axis=-1), dw + xp.stack(found_w, axis=-1)
            dq = xp.stack(found_q, axis=-1)
            for at in range(i.start, i.stop, TILE):
                part = dq[:, :, :, at - i.start:min(at + TILE, i.stop) - i.start, :]
                dqs[at // TILE] = dqs[at // TILE] + part
        dks.append(dk)
        dvs.append(dv)
    return xp.concat(dqs, axis=3), xp.concat(dks, axis=2), xp.concat(dvs, axis=2), dw


def _gradient_of_scores(slab: Slab, w: Array, i: slice, j: slice, bits: np.ndarray | None,
                        dout: Array, lse: Array, delta: Array) -> tuple[Array, Array, Array]:
    """Weights, gradients of the scores, and through which pairs anything passes."""
    xp, acc = slab.xp, accumulator(slab.xp, slab.q)
    value, allowed = _scores(slab, w, i, j, bits)
    lse, delta = rows_of(slab, lse, i), rows_of(slab, delta, i)
    live = (lse != -math.inf)[..., None]
    met = xp.broadcast_to(live if allowed is None else live & allowed, value.shape)
    # forward: p = exp(score - lse)
    p = xp.where(met, xp.exp(value - xp.where(live, lse[..., None], 0.0)), 0.0)
    # forward: out = p v
    v = xp.astype(slab.v[:, :, :, j, :], acc)
    dp = xp.matmul(xp.astype(rows_of(slab, dout, i), acc), xp.matrix_transpose(v))
    return p, xp.where(met, p * (dp - delta[..., None]), 0.0), met
