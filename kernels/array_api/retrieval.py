"""Retrieval with whole-array operations and a loop over queries; two functions on every backend.

Letters: P heads (of keys), N queries, D width, K nodes of a level, p nodes kept, n tokens chosen.
Queries are (P, N, D) and nodes' and tokens' rows as long, in the accumulating dtype, such that a
product is the score; all that says where to look lives on the host, and so does what is found.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pyattn.arrays import device, from_host, namespace, reshape, to_host

Array = Any
PIECE = 2**21
"""Scores that are held at a time."""


def refuses(problem: Any) -> str | None:
    """Take everything."""
    del problem
    return None


def search(q: Array, layers: Any, roots: list[tuple[np.ndarray, np.ndarray]],
           keep: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the best nodes of each level, int32 (P, N, keep), and how many scores that took.

    Levels count from the leaves; the search starts at the last. A query looks at the level's roots
    ``first[p, i]`` to ``stop[p, i]`` and at the children of the nodes it kept above; of these it
    keeps the `keep` of the highest scores, best first, of equals the lower number. A node of no
    token is not kept; -1 is none.
    """
    xp, (heads, n, width) = namespace(q), q.shape
    scored = np.zeros((heads, n), np.int32)
    found = [np.full((heads, n, keep), -1, np.int32) for _ in layers]
    for level in range(len(layers) - 1, -1, -1):
        layer, (first, stop) = layers[level], roots[level]
        nodes = layer.counts.shape[1]
        parent = None if level + 1 == len(layers) else _parents(layers[level + 1], heads, nodes)
        rows = reshape(xp, layer.rows, (heads, nodes, width))
        number, step = np.arange(nodes), max(1, PIECE // max(nodes, 1))
        for head in range(heads if nodes else 0):
            for begin in range(0, n, step):
                some = slice(begin, min(begin + step, n))
                scores = to_host(q[head, some, :] @ rows[head, :, :].T)
                open_to = (first[head, some, None] <= number) & (number < stop[head, some, None])
                if parent is not None:
                    kept = found[level + 1][head, some]
                    open_to |= (kept[:, :, None] == parent[head]).any(axis=1) & (parent[head] >= 0)
                scored[head, some] += open_to.sum(axis=1, dtype=np.int32)
                # what is not a number is never found
                good = open_to & (layer.counts[head] > 0) & (scores == scores)
                order = np.lexsort((np.broadcast_to(number, good.shape),
                                    -np.where(good, scores, 0), ~good))[:, :keep]
                valid = np.take_along_axis(good, order, axis=1)
                found[level][head, some, :order.shape[1]] = np.where(valid, order, -1)
    return found, scored


def _parents(layer: Any, heads: int, nodes: int) -> np.ndarray:
    """Return the node of `layer` that each node below belongs to, (P, K); -1 for none."""
    own = np.repeat(np.arange(layer.child_start.size - 1), np.diff(layer.child_start))
    head = own // max(layer.counts.shape[1], 1)
    parent = np.full((heads, nodes), -1)
    parent[head, layer.child_order] = own % max(layer.counts.shape[1], 1)
    return parent


def pick(q: Array, rows: Array, order: np.ndarray, runs: np.ndarray, gather: bool, number: int,
         tokens: int, threshold: float | None, duplicate: float | None) -> np.ndarray:
    """Return the best tokens of each query's lists, int32 (P, N, n), ascending; -1 is none.

    Lists are ``order[runs[p, i, r, 0]:runs[p, i, r, 1]]``, and ``order`` holds numbers of tokens
    over all heads, `tokens` each. Row x of `rows` is of token ``order[x]``, or with `gather` of
    token x. Taken are the n of the highest scores, of equals the first token; with a `threshold`
    none of lower score, and with `duplicate` none whose product with one taken before is higher.
    """
    xp, (heads, n, _) = namespace(q), q.shape
    found = np.full((heads, n, number), -1, np.int32)
    for head, i in np.ndindex(heads, n):
        places = np.concatenate([np.arange(*run) for run in runs[head, i]] + [np.arange(0)])
        token, first = np.unique(order[places], return_index=True)
        if not token.size:
            continue
        at = from_host(xp, token if gather else places[first], device(q))
        own = xp.take(rows, at, axis=0)
        scores = to_host(own @ q[head, i, :])
        best = np.lexsort((token, -scores))
        best = best[scores[best] >= (-np.inf if threshold is None else threshold)]
        if duplicate is not None:
            like = to_host(own @ own.T)
            taken: list[int] = []
            for x in best.tolist():
                if len(taken) < number and not (like[x, taken] > duplicate).any():
                    taken.append(x)
            best = np.array(taken, np.int64)
        chosen = np.sort(token[best[:number]]) - head * tokens
        found[head, i, :chosen.size] = chosen
    return found
