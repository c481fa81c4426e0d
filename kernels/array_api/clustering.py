"""Clustering with whole-array operations, where the points live: nothing waits for a device.

Letters: S sets, R rows of each, T rows in all (points of all heads), K nodes (centroids of all
heads), D width. Rows and nodes are in the accumulating dtype; assignments, int32, and lists of
members are of the same library.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pyattn.arrays import device, from_host, namespace

Array = Any
PIECE = 2**21
"""Scores that are held at a time."""

NARROW, WIDE = 8, 64
"""Members of a node that are added up at once, at least and at most."""

ON_HOST = False
"""Whether assignments are made on the host, by the functions that the CPU's kernels have."""


def refuses(problem: Any) -> str | None:
    """Take everything."""
    del problem
    return None


def nearest(x: Array, nodes: Array, shifts: Array) -> Array:
    """Return which node of its set is best for each row, int32 (S, R), of equals the first.

    `x` is (S, R, D), `nodes` (S, K, D) and `shifts` (S, K): the best has the largest
    ``x.c - shift``.
    """
    xp, (sets, rows, _), each = namespace(x), x.shape, nodes.shape[1]
    if not sets * rows:
        return xp.zeros((sets, rows), dtype=xp.int32, device=device(x))
    some_sets, some_rows = max(1, PIECE // (rows * each)), max(1, PIECE // each)
    columns, shifts = xp.matrix_transpose(nodes), shifts[:, None, :]
    found = []
    for s in range(0, sets, some_sets):
        own = slice(s, min(s + some_sets, sets))
        parts = [xp.argmax(xp.matmul(x[own, r:min(r + some_rows, rows), :], columns[own, :, :])
                           - shifts[own, :, :], axis=2) for r in range(0, rows, some_rows)]
        found.append(xp.concat(parts, axis=1))
    return xp.astype(xp.concat(found, axis=0), xp.int32)


def nearest_of_few(x: Array, nodes: Array, shifts: Array, first: Array, count: Array,
                   most: int) -> Array:
    """Return the best node of each row, int32 (T,), among its own: ``first + range(count)``.

    `count`, at least 1, is at most `most`.
    """
    xp, best, found = namespace(x), None, first
    for turn in range(most):
        node = first + turn * xp.astype(count > turn, first.dtype)
        score = xp.sum(x * xp.take(nodes, node, axis=0), axis=1) - xp.take(shifts, node)
        if best is None:
            best = score
            continue
        better = (count > turn) & (score > best)
        best, found = xp.where(better, score, best), xp.where(better, node, found)
    return found


def members(assignment: Array, nodes: int) -> tuple[Array, Array]:
    """List the rows of each node, ascending: ``order[start[c]:start[c + 1]]``.

    Rows of no node, -1, come before all others.
    """
    xp = namespace(assignment)
    order = xp.argsort(assignment, stable=True)
    number = xp.arange(nodes + 1, dtype=assignment.dtype, device=device(assignment))
    return xp.searchsorted(xp.take(assignment, order), number), order


def sums(x: Array, start: Array, order: Array, active: np.ndarray | None = None,
         most: int | None = None) -> Array:
    """Add up the rows of each node, (K, D).

    The running sums of a node begin anew with it, so that no digits of others are lost: its members
    are laid out in lines of a few, which are summed, until one line is left. `start` and `order`
    are those of `members`, or NumPy's. No node has more than `most` rows.
    """
    del active
    xp, where, nodes = namespace(x), device(x), start.shape[0] - 1
    if type(start) is np.ndarray and type(x) is not np.ndarray:
        most = int(np.diff(start).max(initial=0))
        start, order = from_host(xp, start, where), from_host(xp, order, where)
    if not nodes or not order.shape[0]:
        return xp.zeros((nodes, x.shape[1]), dtype=x.dtype, device=where)
    most = order.shape[0] if most is None else most
    table: Array | None = order
    width = max(NARROW, min(WIDE, order.shape[0] // nodes))
    while True:
        # as many lines as there can be; the last ones stay empty
        rows = x.shape[0] if table is None else table.shape[0]
        number = xp.arange(rows // width + nodes, dtype=start.dtype, device=where)
        lines = (start[1:] - start[:-1] + width - 1) // width
        stop = xp.cumulative_sum(lines)
        node = xp.searchsorted(stop, number, side="right")
        own = xp.where(node < nodes, node, nodes - 1)
        line = number - xp.take(stop - lines, own)
        columns = xp.arange(width, dtype=start.dtype, device=where)
        place = (xp.take(start, own) + width * line)[:, None] + columns
        held = (place < xp.take(start[1:], own)[:, None]) & (node < nodes)[:, None]
        row = xp.reshape(xp.where(held, place, 0), (-1,))
        row = row if table is None else xp.take(table, row)
        listed = xp.reshape(xp.take(x, row, axis=0), (*place.shape, x.shape[1]))
        x = xp.sum(xp.where(held[:, :, None], listed, xp.zeros_like(listed)), axis=1)
        table, most = None, -(-most // width)
        if most <= 1:
            break
        start = xp.concat([xp.zeros_like(stop[:1]), stop])
    found = xp.take(x, xp.where(lines > 0, stop - lines, 0), axis=0)
    return xp.where((lines > 0)[:, None], found, xp.zeros_like(found))


def distances(x: Array, centroids: Array, assignment: Array) -> Array:
    """Return the squared distance of each row to its centroid; 0 where it has none."""
    xp = namespace(x)
    if type(assignment) is np.ndarray and type(x) is not np.ndarray:
        assignment = from_host(xp, assignment, device(x))
    if not centroids.shape[0]:
        return xp.zeros_like(x[:, 0])
    none = assignment < 0
    apart = x - xp.take(centroids, xp.where(none, 0, assignment), axis=0)
    found = xp.sum(apart * apart, axis=1)
    return xp.where(none, xp.zeros_like(found), found)
