"""Which keys score highest, exactly, a block of queries at a time."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from pyattn.arrays import accumulator, cast, device, from_host, namespace

from .choice import largest
from .scores import unpack
from .slabs import TILE, Array

SCORED = 2**19
"""Scores that are looked at together, at most, but for one tile of queries."""

BYTES, FULL, NONE = 8, 0, 1
"""Bytes of a row of a tile, and the tiles that stand before all others."""


def refuses(problem: Any) -> str | None:
    """Say why `problem` cannot run here; there is no such reason."""
    return None


def forward(problem: Any, top: int, floor: float) -> Array:
    """Return numbers of keys (B, H, N, min(top, M)), int32, ascending, then -1."""
    p, xp = problem, namespace(problem.q)
    acc, where = accumulator(xp, p.q), device(p.q)
    batch, heads, n, _ = p.q.shape
    groups, m = p.k.shape[1], p.k.shape[2]
    step, width = max(1, SCORED // (TILE * max(1, m))) * TILE, min(top, m)
    allowed = (functools.partial(_on_host, p.blocks) if type(p.q) is np.ndarray else
               Tiles(p.blocks, xp, where))
    found = [xp.zeros((0, width), dtype=xp.int32, device=where)]
    with np.errstate(all="ignore"):
        for b in range(batch):
            ends = min(n, int(p.q_lengths[b])), min(m, int(p.kv_lengths[b]))
            for h in range(heads):
                keys = cast(xp, p.k[b, h // (heads // groups), :, :], acc)
                for i in range(0, ends[0], step):
                    rows = slice(i, min(i + step, ends[0]))
                    reach, kinds = _kinds(p.blocks, int(p.layout[b, h]), rows, ends[1])
                    seen = None if kinds is None else allowed(kinds, rows, reach)
                    found.append(_highest(
                        p.scale[h] * cast(xp, p.q[b, h, rows, :], acc), keys[:reach, :], seen,
                        width, floor))
                found.append(xp.full((n - ends[0], width), -1, dtype=xp.int32, device=where))
    return xp.reshape(xp.concat(found, axis=0), (batch, heads, n, width))


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


def _highest(q: Array, k: Array, allowed: Array | None, width: int, floor: float) -> Array:
    """`highest` of the products of one block, -1 up to `width`."""
    xp = namespace(q, k)
    scores = xp.matmul(q, xp.matrix_transpose(k))
    if type(scores) is np.ndarray:
        if allowed is not None:
            scores[~allowed] = -math.inf
        found = highest(scores, width, floor)
        return np.pad(found, ((0, 0), (0, width - found.shape[1])), constant_values=-1)
    # the standard has no partition
    scores = xp.where(xp.isnan(scores), math.inf, scores)
    eligible = scores > floor
    return largest(scores, eligible if allowed is None else eligible & allowed, width)


def _kinds(blocks: Any, layout: int, rows: slice, limit: int) -> tuple[int, np.ndarray | None]:
    """How far the keys reach that these queries see, and where their tiles are in `Tiles`.

    The rows start with a tile. Where they see all keys that far, there is no need of tiles.
    """
    runs, first = blocks.rows, rows.start // TILE
    tiles = -(-(rows.stop - rows.start) // TILE)
    start = runs.start[layout, first:first + tiles + 1]
    mine = slice(int(start[0]), int(start[-1]))
    ends = runs.first[mine] + runs.count[mine]
    reach = min(limit, int(ends.max(initial=0)) * TILE)
    columns = -(-reach // TILE)
    kinds = np.full((tiles, columns), NONE, np.int32)
    for tile in range(tiles):
        for run in range(int(start[tile]), int(start[tile + 1])):
            at, count, name = int(runs.first[run]), int(runs.count[run]), int(runs.tile[run])
            here = kinds[tile, at:at + count]
            here[:] = FULL if name < 0 else runs.names[name:name + here.size] + 2
    return reach, None if (kinds == FULL).all() else kinds


def _on_host(blocks: Any, kinds: np.ndarray, rows: slice, reach: int) -> np.ndarray:
    """Return which keys queries see, bool (rows, reach)."""
    tiles, columns = kinds.shape
    allowed = np.zeros((tiles, TILE, columns * TILE), bool)
    for tile, column in np.argwhere(kinds != NONE).tolist():
        kind = int(kinds[tile, column])
        allowed[tile, :, column * TILE:(column + 1) * TILE] = (
            True if kind == FULL else unpack(blocks.bits[kind - 2], TILE, TILE))
    return allowed.reshape(tiles * TILE, -1)[:rows.stop - rows.start, :reach]


class Tiles:
    """The distinct tiles of a mask, one full and one empty, as bytes where the queries live."""

    def __init__(self, blocks: Any, xp: Any, where: Any) -> None:
        bits = np.ascontiguousarray(blocks.bits).view(np.uint8).reshape(-1, TILE * BYTES)
        ends = np.array([[255], [0]], np.uint8) + np.zeros(TILE * BYTES, np.uint8)
        self.xp, self.where = xp, where
        self.bytes = from_host(xp, np.concatenate([ends, bits]), where)

    def __call__(self, kinds: np.ndarray, rows: slice, reach: int) -> Array:
        """Do what `_on_host` does."""
        xp, (tiles, columns) = self.xp, kinds.shape
        words = xp.take(self.bytes, from_host(xp, kinds.reshape(-1), self.where), axis=0)
        words = xp.reshape(words, (tiles, columns, TILE, BYTES, 1))
        bit = xp.arange(8, dtype=xp.uint8, device=self.where)
        seen = (words >> bit) & xp.ones_like(bit) == xp.ones_like(bit)
        seen = xp.reshape(seen, (tiles, columns, TILE, TILE))
        seen = xp.reshape(xp.permute_dims(seen, (0, 2, 1, 3)), (tiles * TILE, columns * TILE))
        return seen[:rows.stop - rows.start, :reach]
