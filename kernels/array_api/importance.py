"""Which key blocks are the most important to a group's queries, some queries at a time."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from pyattn.arrays import accumulator, cast, device, from_host, namespace

from .choice import largest

Array = Any

TILE, SCORED = 64, 2**21
"""Queries that are looked at together, at least, and about how many of their scores at most."""


def refuses(problem: Any) -> str | None:
    """Say why `problem` cannot run here; there is no such reason."""
    return None


def forward(problem: Any) -> Array:
    """Return numbers of blocks (B, G, N, count), int32, ascending, then -1."""
    xp, where, beyond = namespace(problem.q), device(problem.q), problem.tokens + 1
    # beyond the tokens sizes make no difference, but they may be too large for int32
    p = dataclasses.replace(problem, **{name: min(getattr(problem, name), beyond) for name in (
        "block_size", "stride", "select_block", "num_local")})
    batch, heads, n, _ = p.q.shape
    groups, keys = p.k.shape[1:3]
    found = [xp.zeros((batch, groups, 0, p.count), dtype=xp.int32, device=where)]
    limits = Limits(p, xp, where)
    shares = _shares(p, xp, limits, keys)
    step = max(1, SCORED // (TILE * max(1, batch * heads * keys))) * TILE
    for start in range(0, n if batch * groups else 0, step):
        i = slice(start, min(start + step, n))
        weights = xp.astype(_weights(p, xp, limits, i, heads), shares.dtype)
        found.append(_listed(p, xp, limits, i, xp.matmul(weights, shares)))
    if not batch * groups:
        return xp.zeros((batch, groups, n, p.count), dtype=xp.int32, device=where)
    return xp.concat(found, axis=2)


class Limits:
    """What is not seen, by item, where the queries live: int32 (B, 1, 1)."""

    def __init__(self, p: Any, xp: Any, where: Any) -> None:
        self.xp, self.where = xp, where
        self.offset, self.q_lengths, self.kv_lengths, self.complete = (
            from_host(xp, x.astype(np.int32)[:, None, None], where)
            for x in (p.offset, p.q_lengths, p.kv_lengths, p.complete))

    def count(self, number: int, first: int = 0) -> Array:
        """Return consecutive numbers, int32 (number,)."""
        return first + self.xp.arange(number, dtype=self.xp.int32, device=self.where)

    def rows(self, i: slice) -> tuple[Array, Array]:
        """Return positions of queries (B, n, 1), and whether they are no padding."""
        row = self.count(i.stop - i.start, i.start)[:, None]
        return self.offset + row, row < self.q_lengths


def _weights(p: Any, xp: Any, limits: Limits, i: slice, heads: int) -> Array:
    """Weights of some queries on all compressed keys, summed over a group's heads: (B, G, n, C)."""
    acc, where = accumulator(xp, p.q), device(p.q)
    batch, groups, keys, d = p.k.shape
    shape = (batch, groups, heads // groups, i.stop - i.start)
    q = xp.reshape(cast(xp, p.q[:, :, i, :], acc), (*shape, d)) * p.scale
    with np.errstate(invalid="ignore"):
        scores = xp.matmul(q, cast(xp, p.k, acc)[:, :, None, :, :].mT)
    lse = xp.reshape(cast(xp, p.lse[:, :, i], acc), (*shape, 1))
    (position, real), c = limits.rows(i), limits.count(keys)
    seen = (c < limits.complete) & real
    if p.causal:
        seen = seen & (c * p.stride + (p.block_size - 1) <= position)
    seen = seen[:, None, None, :, :] & (lse != -math.inf)
    zero = xp.zeros((), dtype=acc, device=where)
    with np.errstate(over="ignore", invalid="ignore"):
        weights = xp.exp(xp.where(seen, scores - xp.where(seen, lse, zero), zero))
    return xp.sum(xp.where(seen & ~xp.isnan(weights), weights, zero), axis=2)


def _shares(p: Any, xp: Any, limits: Limits, keys: int) -> Array:
    """Strides that compressed blocks and blocks to select have in common: (C, blocks).

    In double precision, where the library has it: single-precision weights times these are summed
    without rounding then, in any order.
    """
    start = limits.count(keys)[:, None] * p.stride
    block = limits.count(-(-p.tokens // p.select_block)) * p.select_block
    common = xp.minimum(start + p.block_size, block + p.select_block) - xp.maximum(start, block)
    widest = from_host(xp, np.zeros((), np.float64), limits.where).dtype
    return xp.astype(xp.where(common > 0, common, 0), widest) / p.stride


def _listed(p: Any, xp: Any, limits: Limits, i: slice, importance: Array) -> Array:
    """Choose from importances (B, G, n, blocks)."""
    j, (position, real) = limits.count(importance.shape[-1]), limits.rows(i)
    own = position // p.select_block
    there = (j * p.select_block < limits.kv_lengths) & real
    forced = (j < p.num_initial) | (own - p.num_local < j) & (j < own + p.num_local)
    if p.causal:
        there = there & (j * p.select_block <= position)
    rank = xp.where((there & forced)[:, None, :, :], math.inf, importance)
    return largest(rank, xp.broadcast_to(there[:, None, :, :], rank.shape), p.count)
