"""Which keys score highest, exactly, a block of queries at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pyattn.arrays import accumulator, cast, device, from_host, namespace, to_host

from .scores import unpack
from .slabs import TILE, Array

SCORED = 2**19
"""Scores that are looked at together, at most, but for one tile of queries."""


def refuses(problem: Any) -> str | None:
    """Say why `problem` cannot run here; there is no such reason."""
    return None


def forward(problem: Any, top: int, floor: float) -> np.ndarray:
    """Return numbers of keys (B, H, N, min(top, M)), int32, ascending, then -1."""
    p, xp = problem, namespace(problem.q)
    acc = accumulator(xp, p.q)
    batch, heads, n, _ = p.q.shape
    groups, m = p.k.shape[1], p.k.shape[2]
    found = np.full((batch, heads, n, min(top, m)), -1, np.int32)
    step = max(1, SCORED // (TILE * max(1, m))) * TILE
    with np.errstate(all="ignore"):
        for b in range(batch):
            ends = min(n, int(p.q_lengths[b])), min(m, int(p.kv_lengths[b]))
            for h in range(heads):
                keys = cast(xp, p.k[b, h // (heads // groups), :, :], acc)
                for i in range(0, ends[0], step):
                    rows = slice(i, min(i + step, ends[0]))
                    reach, allowed = _allowed(p.blocks, int(p.layout[b, h]), rows, ends[1])
                    chosen = _highest(p.scale[h] * cast(xp, p.q[b, h, rows, :], acc),
                                      keys[:reach, :], allowed, top, floor)
                    found[b, h, rows, :chosen.shape[1]] = chosen
    return found


def highest(scores: np.ndarray, top: int, floor: float = -math.inf) -> np.ndarray:
    """Return where the `top` highest scores of each row are that lie above `floor`.

    Of equal scores those of the lowest index come first; NaN counts as the highest.

    Parameters
    ----------
    scores : float array, shape (rows, M)
    top : int >= 1
    floor : float
        Scores that are not above are never taken.

    Returns
    -------
    int32 array, shape (rows, min(top, M))
        Ascending in each row, and -1 behind them where there are fewer.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.kernels.array_api.selection import highest
    >>> highest(np.array([[3., 5., 3., 3.], [1., -np.inf, -np.inf, -np.inf]]), 2)
    array([[ 0,  1],
           [ 0, -1]], dtype=int32)
    """
    if np.isnan(scores.sum()):      # inf - inf is no harm: it costs another look
        scores = np.where(np.isnan(scores), math.inf, scores)
    rows, m = scores.shape
    width = min(top, m)
    taken = scores > floor
    if top < m:
        last = np.partition(scores, m - top, axis=1)[:, m - top, None]
        taken &= scores >= last
        # equal ones at the end of the list: as many as fit, from the left
        over = np.flatnonzero(np.count_nonzero(taken, axis=1) > top)
        if over.size:
            above = scores[over] > last[over]
            level = taken[over] & ~above
            room = top - np.count_nonzero(above, axis=1)
            taken[over] = above | (level & (np.cumsum(level, axis=1) <= room[:, None]))
    row, column = np.divmod(np.flatnonzero(taken), max(1, m))
    counts = np.bincount(row, minlength=rows)
    found = np.full((rows, width), -1, np.int32)
    found[np.arange(width) < counts[:, None]] = column
    return found


def _highest(q: Array, k: Array, allowed: np.ndarray | None, top: int,
             floor: float) -> np.ndarray:
    """`highest` of the products of one block."""
    xp = namespace(q, k)
    scores = xp.matmul(q, xp.matrix_transpose(k))
    if type(scores) is np.ndarray:
        if allowed is not None:
            scores[~allowed] = -math.inf
        return highest(scores, top, floor)
    # the standard has no partition: sort, equal scores as they stand
    infinite = xp.full_like(scores, math.inf)
    scores = xp.where(xp.isnan(scores), infinite, scores)
    if allowed is not None:
        scores = xp.where(from_host(xp, allowed, device(q)), scores, -infinite)
    order = xp.argsort(-scores, axis=-1, stable=True)[:, :top]
    above = xp.take_along_axis(scores, order, axis=-1) > floor
    chosen = np.where(to_host(above), to_host(order), k.shape[0])
    chosen = np.sort(chosen, axis=-1)
    return np.where(chosen < k.shape[0], chosen, -1).astype(np.int32)


def _allowed(blocks: Any, layout: int, rows: slice,
             limit: int) -> tuple[int, np.ndarray | None]:
    """How far the keys reach that these queries see, and which of those; None for all.

    The rows start with a tile.
    """
    runs, first = blocks.rows, rows.start // TILE
    tiles = -(-(rows.stop - rows.start) // TILE)
    start = runs.start[layout, first:first + tiles + 1]
    mine = slice(int(start[0]), int(start[-1]))
    ends = runs.first[mine] + runs.count[mine]
    reach = min(limit, int(ends.max(initial=0)) * TILE)
    columns = -(-reach // TILE)
    full = np.clip(columns - runs.first[mine], 0, runs.count[mine]) * (runs.tile[mine] < 0)
    everywhere = np.bincount(np.repeat(np.arange(tiles), np.diff(start)), full, minlength=tiles)
    if (everywhere == columns).all():
        return reach, None
    allowed = np.zeros((tiles, TILE, columns * TILE), bool)
    for t in range(tiles):
        for run in range(int(start[t]), int(start[t + 1])):
            at, count, name = int(runs.first[run]), int(runs.count[run]), int(runs.tile[run])
            if name < 0:
                allowed[t, :, at * TILE:(at + count) * TILE] = True
            else:
                for u in range(at, min(at + count, columns)):
                    bits = blocks.bits[runs.names[name + u - at]]
                    allowed[t, :, u * TILE:(u + 1) * TILE] = unpack(bits, TILE, TILE)
    return reach, allowed.reshape(tiles * TILE, -1)[:rows.stop - rows.start, :reach]
