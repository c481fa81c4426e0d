"""Softmax over listed blocks of keys for any array-API namespace, without in-place writes.

Forward, and dq: a few tokens at a time take their blocks out of k and v and are done with. dk and
dv: for each block of keys, the tokens that list it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pyattn.arrays import accumulator, device, from_host, namespace

from .softmax import delta

Array = Any

__all__ = ["backward", "delta", "forward", "refuses"]

NUMBERS = 2**22
"""Gathered numbers of k, or scores, that are held at a time, about."""


def refuses(problem: Any) -> str | None:
    """Nothing: this is the backend that runs everywhere."""
    return None


class Line:
    """One batch item and key/value head: its rows as (N, R, D), its keys as they are."""

    def __init__(self, problem: Any, b: int, g: int) -> None:
        p = self.problem = problem
        self.xp = namespace(p.q)
        self.acc = accumulator(self.xp, p.q)
        self.shared = p.q.shape[1] // p.k.shape[1]
        self.number = b * p.k.shape[1] + g
        self.item, self.heads = b, slice(g * self.shared, (g + 1) * self.shared)
        self.lists, self.seen = p.lists.blocks[b, g], p.lists.seen[b]
        self.scale = self.xp.reshape(p.scale[self.heads], (1, self.shared, 1))
        self.q = self.rows(p.q)
        self.k, self.v = (self.xp.astype(x[b, g, :, :], self.acc) for x in (p.k, p.v))

    def rows(self, x: Array) -> Array:
        """Return this line's part of (B, H, N, ...) as (N, R, ...), in acc."""
        part = self.xp.astype(x[self.item, self.heads, ...], self.acc)
        return self.xp.permute_dims(part, (1, 0, *range(2, part.ndim)))

    def array(self, x: np.ndarray) -> Array:
        """Move what was made on the host to where the problem lives."""
        return from_host(self.xp, x, device(self.problem.q))

    def take(self, x: Array, index: np.ndarray) -> Array:
        """Return rows of `x` by an index of any shape."""
        if not x.shape[0]:
            return self.xp.zeros((*index.shape, *x.shape[1:]), dtype=x.dtype, device=device(x))
        taken = self.xp.take(x, self.array(index.reshape(-1)), axis=0)
        return self.xp.reshape(taken, (*index.shape, *x.shape[1:]))

    def scores(self, raw: Array) -> tuple[Array, Array | None]:
        """Return the scores of products scale * q.k, and how fast they grow with these."""
        cap = self.problem.softcap
        if cap is None:
            return raw, None
        tanh = self.xp.tanh(raw / cap)
        return cap * tanh, 1 - tanh * tanh


def _keys(line: Line, tokens: slice) -> tuple[np.ndarray, np.ndarray]:
    """Return the keys of the blocks that tokens list, (T, count * block_size), and which count."""
    size = line.problem.block_size
    first = line.lists[tokens].astype(np.int64)[..., None] * size
    keys = first + np.arange(size)
    allowed = (first >= 0) & (keys < line.seen[tokens, None, None])
    flat = len(keys), math.prod(keys.shape[1:])
    return np.where(allowed, keys, 0).reshape(flat), allowed.reshape(flat)


def _few_tokens(line: Line) -> list[slice]:
    """Cut the tokens so that what each part gathers stays small."""
    p, n = line.problem, line.q.shape[0]
    keys = max(1, line.lists.shape[1] * p.block_size)
    step = max(1, NUMBERS // (keys * max(p.k.shape[3], p.v.shape[3], line.shared)))
    return [slice(at, min(at + step, n)) for at in range(0, n, step)]


def _lines(problem: Any) -> list[list[Line]]:
    return [[Line(problem, b, g) for g in range(problem.k.shape[1])]
            for b in range(problem.q.shape[0])]


def _joined(problem: Any, parts: list[list[Array]], shape: tuple[int, ...]) -> Array:
    """Put what was found line by line, (N, R, ...) or (M, ...), together in `shape`."""
    xp = namespace(problem.q)
    if 0 in shape:
        return xp.zeros(shape, dtype=accumulator(xp, problem.q), device=device(problem.q))
    return xp.reshape(xp.stack([xp.stack(row) for row in parts]), shape)


def _by_head(xp: Any, parts: list[Array]) -> Array:
    """Join tokens (T, R, ...) as (R, N, ...)."""
    x = xp.concat(parts, axis=0)
    return xp.permute_dims(x, (1, 0, *range(2, x.ndim)))


def forward(problem: Any) -> tuple[Array, Array]:
    """Return out (B, H, N, E) and lse (B, H, N)."""
    xp, rows = namespace(problem.q), problem.q.shape[:3]
    outs, lses = [], []
    with np.errstate(all="ignore"):
        for lines in _lines(problem) if 0 not in rows else []:
            found = [[_attend(line, tokens) for tokens in _few_tokens(line)] for line in lines]
            outs.append([_by_head(xp, [out for out, _ in parts]) for parts in found])
            lses.append([_by_head(xp, [lse for _, lse in parts]) for parts in found])
    return (_joined(problem, outs, (*rows, problem.v.shape[3])), _joined(problem, lses, rows))


def _gathered(line: Line, tokens: slice) -> tuple[Array, Array, np.ndarray, Array]:
    """Return keys and values (T, S, .), zeros where hidden; the keys; which count, (T, 1, S)."""
    xp = line.xp
    keys, allowed = _keys(line, tokens)
    seen = line.array(allowed)
    k, v = (xp.where(seen[..., None], line.take(x, keys), 0.0) for x in (line.k, line.v))
    return k, v, keys, seen[:, None, :]


def _attend(line: Line, tokens: slice) -> tuple[Array, Array]:
    """Compute out (T, R, E) and lse (T, R) of some tokens."""
    xp = line.xp
    k, v, keys, seen = _gathered(line, tokens)
    q = line.q[tokens, ...]
    if not keys.shape[1]:
        empty = xp.sum(q, axis=2) * 0.0
        return xp.zeros((*empty.shape, v.shape[2]), dtype=line.acc, device=device(q)), xp.full(
            empty.shape, -math.inf, dtype=line.acc, device=device(q))
    s, _ = line.scores(line.scale * xp.matmul(q, xp.matrix_transpose(k)))
    s = xp.where(seen, s, -math.inf)
    top = xp.max(s, axis=-1, keepdims=True)
    top = xp.where(top == -math.inf, 0.0, top)
    p = xp.exp(s - top)
    total = xp.sum(p, axis=-1, keepdims=True)
    none = total == 0
    safe = xp.where(none, 1.0, total)
    out = xp.where(none, 0.0, xp.matmul(p, v) / safe)
    lse = xp.where(none, -math.inf, top + xp.log(safe))
    return out, lse[..., 0]


def backward(problem: Any, dout: Array, lse: Array, delta: Array) -> dict[str, Array]:
    """Return the gradients of q, k and v."""
    xp, p = namespace(problem.q), problem
    found: dict[str, list[list[Array]]] = {"q": [], "k": [], "v": []}
    with np.errstate(all="ignore"):
        for lines in _lines(p) if 0 not in p.q.shape[:3] else []:
            for parts in found.values():
                parts.append([])
            for line in lines:
                rows = [line.rows(x) for x in (dout, lse, delta)]
                found["q"][-1].append(_by_head(
                    xp, [_dq(line, tokens, *rows) for tokens in _few_tokens(line)]))
                pairs = [_dk_dv(line, block, *rows) for block in range(p.lists.total)]
                for name, x, parts in zip("kv", (line.k, line.v), zip(*pairs, strict=True)
                                          if pairs else ([], []), strict=True):
                    found[name][-1].append(xp.concat([*parts, x[:0, :]], axis=0))
        if not found["q"]:
            return {name: xp.zeros(x.shape, dtype=accumulator(xp, p.q), device=device(p.q))
                    for name, x in (("q", p.q), ("k", p.k), ("v", p.v))}
    return {name: _joined(p, found[name], tuple(x.shape))
            for name, x in (("q", p.q), ("k", p.k), ("v", p.v))}


def _gradient(line: Line, q: Array, k: Array, v: Array, seen: Array, dout: Array, lse: Array,
              delta: Array) -> tuple[Array, Array]:
    """Return the weights, and the gradients of the products scale * q.k."""
    xp = line.xp
    live = seen & (lse != -math.inf)[..., None]
    s, slope = line.scores(line.scale * xp.matmul(q, xp.matrix_transpose(k)))
    # forward: p = exp(s - lse)
    p = xp.where(live, xp.exp(s - lse[..., None]), 0.0)
    # forward: out = p v
    dp = xp.matmul(dout, xp.matrix_transpose(v))
    ds = p * (dp - delta[..., None])
    return p, xp.where(live, ds if slope is None else ds * slope, 0.0)


def _dq(line: Line, tokens: slice, dout: Array, lse: Array, delta: Array) -> Array:
    """Compute dq (T, R, D) of some tokens."""
    xp = line.xp
    k, v, keys, seen = _gathered(line, tokens)
    q = line.q[tokens, ...]
    if not keys.shape[1]:
        return xp.zeros(q.shape, dtype=line.acc, device=device(q))
    _, ds = _gradient(line, q, k, v, seen, dout[tokens, ...], lse[tokens, ...],
                      delta[tokens, ...])
    # forward: raw = scale q k'
    return line.scale * xp.matmul(ds, k)


def _dk_dv(line: Line, block: int, dout: Array, lse: Array, delta: Array) -> tuple[Array, Array]:
    """Compute dk and dv of a block of keys, from the tokens that list it."""
    xp, p = line.xp, line.problem
    keys = np.arange(block * p.block_size, min((block + 1) * p.block_size, p.k.shape[2]))
    start = p.lists.start[line.number]
    dk, dv = (xp.zeros((len(keys), x.shape[1]), dtype=line.acc, device=device(p.q))
              for x in (line.k, line.v))
    own = slice(int(keys[0]), int(keys[-1]) + 1)
    k, v = line.k[own, :], line.v[own, :]
    step = max(1, NUMBERS // (len(keys) * line.shared))
    for at in range(start[block], start[block + 1], step):
        token = p.lists.token[at:min(at + step, start[block + 1])]
        allowed = keys < line.seen[token][:, None]
        seen = line.array(allowed)[:, None, :]
        q, dout_i, lse_i, delta_i = (line.take(x, token) for x in (line.q, dout, lse, delta))
        # rows that see nothing may hold anything
        live = (lse_i != -math.inf)[..., None]
        q, dout_i = (xp.where(live, x, 0.0) for x in (q, dout_i))
        weights, ds = _gradient(line, q, k, v, seen, dout_i, lse_i, delta_i)
        hidden = not allowed.all()
        dk = dk + _sum(xp, ds, line.scale * q, seen, hidden)
        dv = dv + _sum(xp, weights, dout_i, seen, hidden)
    return dk, dv


def _sum(xp: Any, weights: Array, rows: Array, seen: Array, hidden: bool) -> Array:
    """Sum weights (T, R, S) times rows (T, R, D) over tokens and heads, as (S, D).

    What a row holds reaches only keys that it sees, were it NaN.
    """
    if hidden and not bool(xp.all(xp.isfinite(rows))):
        total = xp.zeros((weights.shape[2], rows.shape[2]), dtype=rows.dtype, device=device(rows))
        for t in range(weights.shape[0]):
            product = xp.matmul(xp.matrix_transpose(weights[t, ...]), rows[t, ...])
            total = total + xp.where(xp.matrix_transpose(seen[t, ...]), product, 0.0)
        return total
    products = xp.matmul(xp.permute_dims(weights, (1, 2, 0)), xp.permute_dims(rows, (1, 0, 2)))
    return xp.sum(products, axis=0)
