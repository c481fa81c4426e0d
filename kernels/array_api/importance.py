"""Which key blocks are the most important to a group's queries, 64 queries at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pyattn.arrays import accumulator, cast, device, from_host, namespace, to_host

TILE = 64


def refuses(problem: Any) -> str | None:
    """Say why `problem` cannot run here; there is no such reason."""
    return None


def forward(problem: Any) -> np.ndarray:
    """Return numbers of blocks (B, G, N, count), int32, ascending, then -1."""
    p, xp = problem, namespace(problem.q)
    batch, heads, n, _ = p.q.shape
    groups, keys = p.k.shape[1:3]
    rows = [np.zeros((batch, groups, 0, p.count), np.int32)]
    shares = _shares(p, keys)
    for start in range(0, n if batch * groups else 0, TILE):
        i = np.arange(start, min(start + TILE, n))
        position = p.offset[:, None].astype(np.int64) + i
        rows.append(_listed(p, position, i, _weights(p, xp, i, position, heads) @ shares))
    if not batch * groups:
        return np.zeros((batch, groups, n, p.count), np.int32)
    return np.concatenate(rows, axis=2)


def _weights(p: Any, xp: Any, i: np.ndarray, position: np.ndarray, heads: int) -> np.ndarray:
    """Weights of some queries on all compressed keys, summed over a group's heads: (B, G, n, C)."""
    acc, where = accumulator(xp, p.q), device(p.q)
    batch, groups, keys, d = p.k.shape
    shape = (batch, groups, heads // groups, len(i))
    rows = slice(int(i[0]), int(i[-1]) + 1)
    q = xp.reshape(cast(xp, p.q[:, :, rows, :], acc), (*shape, d)) * p.scale
    with np.errstate(invalid="ignore"):
        scores = xp.matmul(q, cast(xp, p.k, acc)[:, :, None, :, :].mT)
    lse = xp.reshape(cast(xp, p.lse[:, :, rows], acc), (*shape, 1))
    c = np.arange(keys)
    seen = (c < p.complete[:, None, None]) & (i < p.q_lengths[:, None])[..., None]
    if p.causal:
        seen = seen & (c * p.stride + p.block_size - 1 <= position[..., None])
    seen = from_host(xp, seen[:, None, None], where) & (lse != -math.inf)
    zero = xp.zeros((), dtype=acc, device=where)
    with np.errstate(over="ignore", invalid="ignore"):
        weights = xp.exp(xp.where(seen, scores - xp.where(seen, lse, zero), zero))
    weights = xp.where(seen & ~xp.isnan(weights), weights, zero)
    return to_host(xp.sum(weights, axis=2))


def _shares(p: Any, keys: int) -> np.ndarray:
    """Strides that compressed blocks and blocks to select have in common: (C, blocks)."""
    start = np.arange(keys)[:, None] * p.stride
    block = np.arange(-(-p.tokens // p.select_block)) * p.select_block
    common = np.minimum(start + p.block_size, block + p.select_block) - np.maximum(start, block)
    return np.maximum(common, 0) / p.stride


def _listed(p: Any, position: np.ndarray, i: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """Choose from importances (B, G, n, blocks) for queries at positions (B, n)."""
    blocks = importance.shape[-1]
    j, own = np.arange(blocks), (position // p.select_block)[..., None]
    there = (j * p.select_block < p.kv_lengths[:, None, None]) & (
        i < p.q_lengths[:, None])[..., None]
    forced = (j < p.num_initial) | (own - p.num_local < j) & (j < own + p.num_local)
    if p.causal:
        there = there & (j * p.select_block <= position[..., None])
    rank = np.where((there & forced)[:, None], math.inf, importance)
    rank = np.where(there[:, None], rank, -math.inf)
    chosen = np.argsort(-rank, axis=-1, kind="stable")[..., :p.count]
    listed = np.take_along_axis(np.broadcast_to(there[:, None], rank.shape), chosen, axis=-1)
    chosen = np.sort(np.where(listed, chosen, blocks), axis=-1)
    return np.where(chosen == blocks, -1, chosen).astype(np.int32)
