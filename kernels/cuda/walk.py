"""A BlockMask on coarser steps: kernels whose blocks have 128 rows or take 128 keys at a time.

A *line* is `rows` consecutive lines of 64 x 64 tiles, a *step* along it `columns` consecutive tiles
of each. So a step is up to 2 x 2 tiles, and each tile is full, empty or partial by itself:

    causal, N = 256, two by two     line 0: step 0 [partial, none; full, partial]
                                    line 1: step 0 [full, full; full, full], step 1 as above

Steps whose tiles are of the same kinds form runs, as in the BlockMask itself. What is built is
proportional to its runs, not to its tiles.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import numpy as np

FULL, NONE = -1, -2


class Walk(NamedTuple):
    """Lists of runs of steps, one list per line and layout.

    The kinds of the tiles of a step are in row-major order: tile (row, column) of a step is number
    ``row * columns + column``.
    """

    start: np.ndarray
    """int64 (L, T + 1): the runs of line t in layout l are start[l, t] : start[l, t + 1]."""
    first: np.ndarray
    """int32 (R,): the first step of a run; it begins at tile ``first * columns``."""
    count: np.ndarray  # type: ignore[assignment]  # hides tuple.count, unused here
    """int32 (R,): how many steps it has."""
    at: np.ndarray
    """int32 (R, rows * columns): for each tile of the first step FULL, NONE, or where in `names`
    its name is. The name of the same tile of the next step is `columns` places on."""
    names: np.ndarray
    """int32 (S,): numbers of bit tiles; those of the BlockMask."""
    bits: np.ndarray
    """uint64 (P, 64): word i, bit j of a tile; row i is of the line, column j along it."""

    @property
    def steps(self) -> np.ndarray:
        """int64 (L, T): how many steps a line has."""
        before = np.concatenate([[0], np.cumsum(self.count, dtype=np.int64)])
        return np.diff(before[self.start], axis=-1)


_patterns: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def pattern(blocks: Any) -> str:
    """Return what a BlockMask is like: how many of all tiles hold pairs."""
    if blocks not in _patterns:
        layouts, lines = blocks.rows.start.shape
        tiles = layouts * (lines - 1) * (blocks.columns.start.shape[1] - 1)
        share = float(blocks.rows.count.sum(dtype=np.int64)) / max(1, tiles)
        _patterns[blocks] = "dense" if share > 0.75 else "causal" if share > 0.25 else "sparse"
    return _patterns[blocks]


_known: weakref.WeakKeyDictionary[Any, dict[tuple[int, int, bool], Walk]] = (
    weakref.WeakKeyDictionary())


def coarse(blocks: Any, rows: int, columns: int, transposed: bool = False) -> Walk:
    """Return the walk over a BlockMask with lines of `rows` tiles and steps of `columns`.

    If `transposed`, lines are those of the columns (key tiles), and steps go along the queries.
    Walks are kept as long as their BlockMask is.
    """
    walks = _known.setdefault(blocks, {})
    key = (rows, columns, transposed)
    if key not in walks:
        runs, bits = ((blocks.columns, blocks.bits_t) if transposed else
                      (blocks.rows, blocks.bits))
        walks[key] = Walk(*_coarse(runs, rows, columns), np.ascontiguousarray(runs.names),
                          np.ascontiguousarray(bits))
    return walks[key]


def _coarse(runs: Any, rows: int, columns: int) -> tuple[np.ndarray, ...]:
    layouts, fine = runs.start.shape[0], runs.start.shape[1] - 1
    lines = -(-fine // rows)
    layout, line = np.divmod(np.repeat(np.arange(layouts * fine), np.diff(runs.start).ravel()),
                             max(fine, 1))
    first, stop = runs.first.astype(np.int64), runs.first.astype(np.int64) + runs.count
    # steps of all lines on one axis, so that a sorted search finds a step of any line
    length = int(stop.max(initial=0)) // columns + 2
    base = (layout * lines + line // rows) * length

    # the tiles at one place (row, column) of their steps: each run of tiles holds a range of steps
    places = []
    for place in range(rows * columns):
        row, column = divmod(place, columns)
        begin, end = -(-(first - column) // columns), -(-(stop - column) // columns)
        mine = np.flatnonzero((line % rows == row) & (begin < end))
        mine = mine[np.argsort(base[mine] + begin[mine])]
        tile = runs.tile[mine].astype(np.int64)
        name = np.where(tile < 0, FULL, tile + begin[mine] * columns + column - first[mine])
        places.append((base[mine] + begin[mine], base[mine] + end[mine], name))

    # a run of steps ends where a range of any place begins or ends
    cuts = np.unique(np.concatenate([cut for begin, end, _ in places for cut in (begin, end)]))
    begin, end = cuts[:-1], cuts[1:]
    at = np.full((len(begin), rows * columns), NONE, np.int64)
    for place, (starts, stops, name) in enumerate(places):
        if not len(starts):
            continue
        range_ = np.searchsorted(starts, begin, "right") - 1
        inside = (range_ >= 0) & (begin < stops[range_])
        range_ = range_[inside]
        on = (begin[inside] - starts[range_]) * columns
        at[inside, place] = np.where(name[range_] < 0, FULL, name[range_] + on)
    held = (at != NONE).any(axis=1)
    begin, end, at = begin[held], end[held], at[held]

    line, step = np.divmod(begin, length)
    counts = np.bincount(line, minlength=layouts * lines).reshape(layouts, lines)
    start = np.zeros((layouts, lines + 1), np.int64)
    np.cumsum(counts, axis=1, out=start[:, 1:])
    start += np.concatenate([[0], np.cumsum(counts.sum(axis=1))])[:-1, None]
    return (start, step.astype(np.int32), (end - begin).astype(np.int32), at.astype(np.int32))
