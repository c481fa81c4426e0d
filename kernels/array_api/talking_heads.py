"""Talking-heads attention for any array-API namespace: rows of tiles, all heads at once.

Each row of tiles is walked twice: for the log-sum-exps, then for the weights that are mixed; in the
backward for sum_j p dp, then for the gradients.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from pyattn.arrays import accumulator, namespace

from .scores import allowed_pairs
from .slabs import TILE, Array, Slab, walk, zeros
from .sums import all_finite, weighted


def refuses(problem: Any) -> str | None:
    """Nothing: this is the backend that runs everywhere."""
    return None


def _slabs(problem: Any) -> list[Slab]:
    """Batch items that share a layout, with all their heads."""
    layout = problem.layout
    alike = bool((layout == layout[:1]).all())
    items = [slice(0, len(layout))] if alike else [slice(b, b + 1) for b in range(len(layout))]
    return [Slab(problem, namespace(problem.q), b, slice(0, problem.w_pre.shape[1]),
                 int(layout[b.start, 0]), *(x[b, ...] for x in (problem.q, problem.k, problem.v)))
            for b in items]


def _split(xp: Any, x: Array, groups: int) -> Array:
    """Heads (b, H, ...) as (b, G, r, ...)."""
    return xp.reshape(x, (x.shape[0], groups, x.shape[1] // max(groups, 1), *x.shape[2:]))


def _joined(xp: Any, x: Array) -> Array:
    """Heads (b, G, r, ...) as (b, H, ...)."""
    return xp.reshape(x, (x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:]))


def _mix(xp: Any, x: Array, w: Array) -> Array:
    """sum_h x[:, h] w[h, s]: (b, H, n, m) as (b, S, n, m)."""
    flat = xp.reshape(x, (x.shape[0], x.shape[1], x.shape[2] * x.shape[3]))
    mixed = xp.matmul(xp.matrix_transpose(w), flat)
    return xp.reshape(mixed, (x.shape[0], w.shape[1], *x.shape[2:]))


@dataclasses.dataclass(frozen=True)
class Tile:
    """Some rows of queries of all heads against some keys; (b, heads, n, m)."""

    products: Array
    """scale q k^T, in the heads of q."""
    scores: Array
    """In the heads of the softmax; -inf where not allowed."""
    allowed: Array | None
    """(b or 1, 1, n, m); None: every pair is allowed."""


def _tile(slab: Slab, i: slice, j: slice, bits: np.ndarray | None) -> Tile:
    xp, p = slab.xp, slab.problem
    acc, groups = accumulator(xp, slab.q), slab.k.shape[1]
    q = p.scale * xp.astype(slab.q[:, :, i, :], acc)
    k = xp.astype(slab.k[:, :, j, :], acc)[:, :, None, :, :]
    products = _joined(xp, xp.matmul(_split(xp, q, groups), xp.matrix_transpose(k)))
    scores, allowed = _mix(xp, products, p.w_pre), allowed_pairs(slab, i, j, bits)
    if allowed is not None:
        if allowed.ndim == 5:
            allowed = allowed[:, :, 0, :, :]
        else:
            allowed = allowed[None, None, :, :]
        scores = xp.where(allowed, scores, xp.full_like(scores, -math.inf))
    return Tile(products, scores, allowed)


def _where_allowed(xp: Any, x: Array, allowed: Array | None) -> Array:
    return x if allowed is None else xp.where(allowed, x, xp.zeros_like(x))


def _mixed_weights(slab: Slab, weights: Array, allowed: Array | None) -> Array:
    """Weights as they meet the values, in the heads of out."""
    xp, p = slab.xp, slab.problem
    mixed = _mix(xp, weights, p.w_post)
    if p.b_post is not None:
        mixed = mixed + p.b_post[None, :, None, None]
    return _where_allowed(xp, mixed, allowed)


def _weights(xp: Any, tile: Tile, lse: Array) -> Array:
    live = (lse != -math.inf)[..., None]
    return xp.where(live, xp.exp(tile.scores - xp.where(live, lse[..., None], 0.0)), 0.0)


def _sums(xp: Any, weights: Array, x: Array, allowed: Array | None, finite: bool) -> Array:
    """Weights (b, H, n, m) times a group's rows (b, G, m, d): (b, H, n, d)."""
    groups = x.shape[1]
    if allowed is not None:
        allowed = xp.broadcast_to(allowed, weights.shape)
        allowed = _split(xp, allowed, groups)
    x = xp.astype(x, weights.dtype)[:, :, None, :, :]
    return _joined(xp, weighted(xp, _split(xp, weights, groups), x, allowed, finite))


def _sums_by_key(xp: Any, weights: Array, x: Array, allowed: Array | None, groups: int,
                 finite: bool) -> Array:
    """Weights (b, H, n, m), transposed, times rows (b, H, n, d), by group: (b, G, m, d)."""
    if allowed is not None:
        allowed = xp.matrix_transpose(xp.broadcast_to(allowed, weights.shape))
    x = xp.astype(x, weights.dtype)
    found = weighted(xp, xp.matrix_transpose(weights), x, allowed, finite)
    return xp.sum(_split(xp, found, groups), axis=2)


def forward(problem: Any) -> tuple[Array, Array]:
    """Output (B, Hv, N, E) and the log-sum-exp of the mixed scores (B, H, N)."""
    p, xp = problem, namespace(problem.q)
    batch, n = p.q.shape[0], p.q.shape[2]
    heads, heads_out = p.w_post.shape
    if 0 in (batch, n):
        return zeros(p, (batch, heads_out, n, p.v.shape[3])), zeros(p, (batch, heads, n))
    with np.errstate(all="ignore"):
        finite = all_finite(xp, p.v)
        parts = [_forward(slab, finite) for slab in _slabs(p)]
        return tuple(xp.concat(list(x), axis=0) for x in zip(*parts, strict=True))


def _forward(slab: Slab, finite: bool) -> tuple[Array, Array]:
    xp, p, (b, _, n, _) = slab.xp, slab.problem, slab.q.shape
    heads, heads_out = p.w_post.shape
    outs, lses = [], []
    for tile in range(-(-n // TILE)):
        i = slice(tile * TILE, min((tile + 1) * TILE, n))
        rows = i.stop - i.start
        high, total = slab.zeros(b, heads, rows) - math.inf, slab.zeros(b, heads, rows)
        for j, bits in _walk(slab, tile):
            scores = _tile(slab, i, j, bits).scores
            highest = xp.maximum(high, xp.max(scores, axis=-1))
            shift = xp.where(highest == -math.inf, xp.zeros_like(highest), highest)
            total = (total * xp.exp(high - shift)
                     + xp.sum(xp.exp(scores - shift[..., None]), axis=-1))
            high = highest
        empty = total == 0
        safe = xp.where(empty, xp.ones_like(total), total)
        lse = xp.where(empty, xp.full_like(total, -math.inf), high + xp.log(safe))
        out = slab.zeros(b, heads_out, rows, slab.v.shape[3])
        for j, bits in _walk(slab, tile):
            met = _tile(slab, i, j, bits)
            mixed = _mixed_weights(slab, _weights(xp, met, lse), met.allowed)
            out = out + _sums(xp, mixed, slab.v[:, :, j, :], met.allowed, finite)
        outs.append(out)
        lses.append(lse)
    return xp.concat(outs, axis=2), xp.concat(lses, axis=2)


def _walk(slab: Slab, tile: int) -> Any:
    blocks = slab.problem.blocks
    return walk(blocks.rows, blocks.bits, slab.layout, tile, slab.k.shape[2])


def backward(problem: Any, dout: Array, lse: Array) -> dict[str, Array]:
    """Gradients by argument, in acc; that of b_post always."""
    p, xp = problem, namespace(problem.q)
    heads_in, heads = p.w_pre.shape
    heads_out = p.w_post.shape[1]
    if 0 in (p.q.shape[0], p.q.shape[2]):
        found = {name: zeros(p, getattr(p, name).shape) for name in ("q", "k", "v")}
        return found | {"w_pre": zeros(p, (heads_in, heads)),
                        "w_post": zeros(p, (heads, heads_out)), "b_post": zeros(p, (heads_out,))}
    with np.errstate(all="ignore"):
        finite = all_finite(xp, p.q, p.k, dout)
        parts = [_backward(slab, dout[slab.items, ...], lse[slab.items, ...], finite)
                 for slab in _slabs(p)]
    found = {name: xp.concat([part[name] for part in parts], axis=0) for name in ("q", "k", "v")}
    for name in ("w_pre", "w_post", "b_post"):
        found[name] = xp.sum(xp.stack([part[name] for part in parts]), axis=0)
    return found


def _backward(slab: Slab, dout: Array, lse: Array, finite: bool) -> dict[str, Array]:
    xp, p, (b, heads_in, n, d) = slab.xp, slab.problem, slab.q.shape
    heads, heads_out = p.w_post.shape
    m, e = slab.v.shape[2:]
    dqs = []
    dks = [slab.zeros(b, slab.k.shape[1], min(TILE, m - at), d) for at in range(0, m, TILE)]
    dvs = [slab.zeros(b, slab.v.shape[1], min(TILE, m - at), e) for at in range(0, m, TILE)]
    dw_pre, dw_post = slab.zeros(heads_in, heads), slab.zeros(heads, heads_out)
    db_post = slab.zeros(heads_out)
    for tile in range(-(-n // TILE)):
        i = slice(tile * TILE, min((tile + 1) * TILE, n))
        row = dout[:, :, i, :], lse[:, :, i]
        delta = slab.zeros(b, heads, i.stop - i.start)
        for j, bits in _walk(slab, tile):
            _, weights, dweights, _ = _gradients_of_weights(slab, i, j, bits, *row)
            delta = delta + xp.sum(weights * dweights, axis=-1)
        dq = slab.zeros(b, heads_in, i.stop - i.start, d)
        for j, bits in _walk(slab, tile):
            met, weights, dweights, dmixed = _gradients_of_weights(slab, i, j, bits, *row)
            # forward: mixed_v = sum_s weights_s w_post[s, v] + b_post[v]
            dw_post = dw_post + _products(xp, weights, dmixed)
            db_post = db_post + xp.sum(dmixed, axis=(0, 2, 3))
            mixed = _mixed_weights(slab, weights, met.allowed)
            dv = _sums_by_key(xp, mixed, row[0], met.allowed, slab.v.shape[1], finite)
            # forward: weights = softmax(scores), scores_s = sum_h products_h w_pre[h, s]
            dscores = weights * (dweights - delta[..., None])
            dw_pre = dw_pre + _products(xp, _where_allowed(xp, met.products, met.allowed), dscores)
            dproducts = p.scale * _mix(xp, dscores, xp.matrix_transpose(p.w_pre))
            # forward: products = scale q k^T
            dq = dq + _sums(xp, dproducts, slab.k[:, :, j, :], met.allowed, finite)
            dk = _sums_by_key(xp, dproducts, slab.q[:, :, i, :], met.allowed, slab.k.shape[1],
                              finite)
            for at in range(j.start, j.stop, TILE):
                part = slice(at - j.start, min(at + TILE, j.stop) - j.start)
                dks[at // TILE] = dks[at // TILE] + dk[:, :, part, :]
                dvs[at // TILE] = dvs[at // TILE] + dv[:, :, part, :]
        dqs.append(dq)
    return {"q": xp.concat(dqs, axis=2),
            "k": xp.concat([slab.zeros(b, slab.k.shape[1], 0, d), *dks], axis=2),
            "v": xp.concat([slab.zeros(b, slab.v.shape[1], 0, e), *dvs], axis=2),
            "w_pre": dw_pre, "w_post": dw_post, "b_post": db_post}


def _gradients_of_weights(slab: Slab, i: slice, j: slice, bits: np.ndarray | None, dout: Array,
                          lse: Array) -> tuple[Tile, Array, Array, Array]:
    """A tile, its weights, and the gradients of these and of the mixed ones; 0 where masked."""
    xp, p = slab.xp, slab.problem
    met = _tile(slab, i, j, bits)
    weights = _where_allowed(xp, _weights(xp, met, lse), met.allowed)
    # forward: out_v = mixed_v values
    groups = slab.v.shape[1]
    v = xp.astype(slab.v[:, :, j, :], weights.dtype)[:, :, None, :, :]
    dout = _split(xp, xp.astype(dout, weights.dtype), groups)
    dmixed = _joined(xp, xp.matmul(dout, xp.matrix_transpose(v)))
    dmixed = _where_allowed(xp, dmixed, met.allowed)
    # forward: mixed_v = sum_s weights_s w_post[s, v] + b_post[v]
    return met, weights, _mix(xp, dmixed, xp.matrix_transpose(p.w_post)), dmixed


def _products(xp: Any, x: Array, y: Array) -> Array:
    """sum_bnm x[b, h, n, m] y[b, s, n, m]: (heads of x, heads of y)."""
    x, y = (xp.reshape(z, (z.shape[0], z.shape[1], z.shape[2] * z.shape[3])) for z in (x, y))
    return xp.sum(xp.matmul(x, xp.matrix_transpose(y)), axis=0)
