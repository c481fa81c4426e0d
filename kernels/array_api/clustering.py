"""Clustering with whole-array operations; four functions, the same on every backend.

Letters: T rows (points of all heads), K nodes (centroids of all heads), D width, S sets. A `Sets`
table says which rows choose among which nodes. Rows and nodes are arrays of the caller's library in
the accumulating dtype; assignments and lists of members live on the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pyattn.arrays import device, from_host, namespace, to_host

Array = Any
PIECE = 2**21
"""Scores that are held at a time."""


def refuses(problem: Any) -> str | None:
    """Take everything."""
    del problem
    return None


def nearest(x: Array, centroids: Array, shifts: Array, sets: Any, active: np.ndarray,
            assignment: np.ndarray) -> np.ndarray:
    """Return the assignment, int32 (T,), with the rows of active sets given to their best node.

    That is the node of the set with the largest ``x.c - shift``, the first of equals; `assignment`
    holds for the other rows.
    """
    xp, found = namespace(x), assignment.copy()
    for s in np.flatnonzero(active & (sets.node_count > 0)).tolist():
        node, row = int(sets.node_first[s]), int(sets.row_first[s])
        own = slice(node, node + int(sets.node_count[s]))
        columns, shift = centroids[own, :].T, shifts[own]
        end, step = row + int(sets.row_count[s]), max(1, PIECE // int(sets.node_count[s]))
        for begin in range(row, end, step):
            stop = min(begin + step, end)
            best = xp.argmax(x[begin:stop, :] @ columns - shift[None, :], axis=1)
            found[begin:stop] = node + to_host(best)
    return found


def members(assignment: np.ndarray, nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """List the rows of each node, ascending: ``order[start[c]:start[c + 1]]``; -1 is of none."""
    order = np.argsort(assignment, kind="stable").astype(np.int32)
    start = np.searchsorted(assignment[order], np.arange(nodes + 1))
    return start - start[0], order[start[0]:]


def sums(x: Array, start: np.ndarray, order: np.ndarray,
         active: np.ndarray | None = None) -> Array:
    """Add up the rows of each node, (K, D); what it gives for nodes not `active` is not looked at.

    The running sums of a cluster begin anew with it, so that no digits of others are lost: its
    members are laid out in a table of 64 columns, whose rows are summed, until one is left.
    """
    del active
    xp, where, nodes = namespace(x), device(x), start.size - 1
    zeros = xp.zeros((1, x.shape[1]), dtype=x.dtype, device=where)
    table, start = order.astype(np.int64), start.astype(np.int64)
    while nodes:
        count = np.diff(start)
        lines = np.maximum(-(-count // 64), 1)
        first = np.cumsum(lines) - lines
        node = np.repeat(np.arange(nodes), lines)
        place = start[node] + 64 * (np.arange(node.size) - first[node])
        listed = place[:, None] + np.arange(max(1, min(64, int(count.max(initial=0)))))
        real = listed < start[node + 1][:, None]
        rows = np.where(real, table[np.minimum(listed, table.size - 1)] if table.size else 0,
                        x.shape[0])
        padded = xp.concat([x, zeros], axis=0)
        gathered = xp.take(padded, from_host(xp, rows.reshape(-1), where), axis=0)
        x = xp.sum(xp.reshape(gathered, (*rows.shape, x.shape[1])), axis=1)
        if lines.max() == 1:
            return x
        table, start = np.arange(node.size), np.append(first, node.size)
    return x[:0, :]


def distances(x: Array, centroids: Array, assignment: np.ndarray) -> np.ndarray:
    """Return the squared distance of each row to its centroid, on the host; 0 where it has none."""
    xp = namespace(x)
    if not centroids.shape[0]:
        return np.zeros(assignment.size)
    own = from_host(xp, np.maximum(assignment, 0), device(x))
    apart = x - xp.take(centroids, own, axis=0)
    return np.where(assignment >= 0, to_host(xp.sum(apart * apart, axis=1)), 0)
