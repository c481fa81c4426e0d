"""Batch items and heads that share a layout, computed together as (b, g, r, n, d).

r query heads for each of g key/value heads; arrays with one head for each group have r = 1.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from pyattn.arrays import accumulator, device, from_host, namespace

Array = Any
TILE = 64
PIECE = 8 * TILE
"""Keys (or queries) that are scored at once; bounds the memory of a step."""


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

    def zeros(self, *shape: int) -> Array:
        """Zeros that sums can be carried in, where the problem lives."""
        return zeros(self.problem, shape)


def zeros(problem: Any, shape: tuple[int, ...]) -> Array:
    """Zeros in the accumulator's dtype, where the problem lives."""
    xp = namespace(problem.q)
    return xp.zeros(shape, dtype=accumulator(xp, problem.q), device=device(problem.q))


def slabs_of(problem: Any) -> list[list[Slab]]:
    """The slabs, in rows of batch items and columns of heads."""
    xp = namespace(problem.q)
    batch, heads = problem.layout.shape
    group = heads // max(problem.k.shape[1], 1)
    layout = problem.layout
    items = _parts(batch, bool((layout == layout[:1]).all()))
    columns = _parts(heads, bool((layout == layout[:, :1]).all()))

    def slab(b: slice, h: slice) -> Slab:
        g = slice(h.start // group, (h.stop - 1) // group + 1)
        q, k, v = problem.q[b, h, :, :], problem.k[b, g, :, :], problem.v[b, g, :, :]
        groups = k.shape[1]
        q = xp.reshape(q, (q.shape[0], groups, q.shape[1] // groups, *q.shape[2:]))
        return Slab(problem, xp, b, h, int(layout[b.start, h.start]), q,
                    k[:, :, None, :, :], v[:, :, None, :, :])

    return [[slab(b, h) for h in columns] for b in items]


def _parts(size: int, alike: bool) -> list[slice]:
    return [slice(0, size)] if alike else [slice(at, at + 1) for at in range(size)]


def walk(runs: Any, bits: np.ndarray, layout: int, tile: int, limit: int,
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


def rows_of(slab: Slab, x: Array, i: slice) -> Array:
    """Rows `i` of a (B, H, N, ...) array, as the slab's (b, g, r, n, ...)."""
    part = x[slab.items, slab.heads, i, ...]
    return slab.xp.reshape(part, (*slab.shape, *part.shape[2:]))


def together(xp: Any, rows: list[list[Array]]) -> Array:
    """Results of slabs, (b, g, r, ...), as one (B, H, ...)."""
    def merged(x: Array) -> Array:
        return xp.reshape(x, (x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:]))
    return xp.concat([xp.concat([merged(x) for x in row], axis=1) for row in rows], axis=0)


def grouped(problem: Any, xp: Any, rows: list[list[Array]]) -> Array:
    """Gradients by slab as (B, G, M, .): slabs of one head are summed into their group."""
    groups = problem.k.shape[1]
    joined = []
    for row in rows:
        share = max(len(row) // groups, 1)
        joined.append(xp.concat([functools.reduce(xp.add, row[at:at + share])
                                 for at in range(0, len(row), share)], axis=1))
    return xp.concat(joined, axis=0)
