"""Groups of keys and searches in them where the tokens live; what is found comes home at once.

The same decisions as those of `retrieval` on the host. Letters: P heads of keys, N queries, M keys,
K nodes, D width.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from .. import arrays, dispatch
from ..arrays import Array
from .device_clustering import Crowd, lloyd, nearest_members
from .precision import unit_rows


@dataclasses.dataclass(frozen=True)
class Means:
    """Who is in a node, and the means of nodes."""

    rows: Array
    """(P * K, D); zeros for a node of none."""
    start: Array
    """(P * K + 1,): the tokens of node c are ``order[start[c]:start[c + 1]]``."""
    order: Array

    @property
    def counts(self) -> Array:
        """How many tokens each node holds."""
        return self.start[1:] - self.start[:-1]


def means_of(x: Array, across: Array, nodes: int, most: int) -> Means:
    """Return the means of tokens (T, D) by node, int32 (T,), -1 for none."""
    xp, kernel = arrays.namespace(x), dispatch.kernel("clustering", None, x)
    start, order = kernel.members(across, nodes)
    counts = start[1:] - start[:-1]
    total = kernel.sums(x, start, order, most=most)
    return Means(total / xp.astype(xp.where(counts > 0, counts, 1), x.dtype)[:, None], start, order)


def over_all_heads(xp: Any, own: Array, nodes: int) -> Array:
    """Return numbers (P, M) within heads as numbers over all heads, int32 (P * M,); -1 stays."""
    first = nodes * xp.arange(own.shape[0], dtype=xp.int32, device=arrays.device(own))[:, None]
    return xp.reshape(xp.where(own >= 0, own + first, -1), (-1,))


def segment_clusters(points: Array, over: np.ndarray, k: Array, segment: int, num_clusters: int,
                     iterations: int, cosine: bool, branching: int,
                     tree: bool) -> tuple[list[np.ndarray], int]:
    """Cluster each segment, and in a tree the nodes of `branching` of them, and so on.

    `points` are the tokens of the segments that fit into M, (P * count * segment, D), and `over`,
    bool (P, count), says which of them are over. Returns for each level the node of each key, int32
    (..., G, M), and how many products were computed.
    """
    xp, (*lead, m, _), (heads, count) = arrays.namespace(k), k.shape, over.shape
    owner = np.where(over.reshape(-1, 1), np.arange(over.size)[:, None], np.full(segment, -1))
    crowd = Crowd(dispatch.kernel("clustering", None, k), points, _there(k, owner.reshape(-1)),
                  np.full(over.size, num_clusters), segment, cosine)
    _, found, rounds = lloyd(crowd, None, iterations)
    nodes, most = [count * num_clusters], segment
    own = _padded(xp, _within(xp, found, heads, nodes[0]), m)
    levels, moved = [own], [rounds]
    while tree and count >= branching:
        count //= branching
        own, rounds = _merged(k, own, nodes[-1], count, branching * num_clusters, num_clusters,
                              most, iterations, cosine)
        levels.append(own)
        moved.append(rounds)
        nodes.append(count * num_clusters)
        most *= branching
    home = arrays.decided(*levels, *moved)
    levels_home, times = list(home[:len(levels)]), home[len(levels):]
    rows, pairs = over.reshape(-1) * np.int64(segment), 0
    for level, moves in enumerate(times):
        if level:
            rows = _held_nodes(levels_home[level - 1], len(moves), branching * num_clusters)
        # nodes that moved were looked at once more afterwards
        pairs += int((rows * num_clusters * (moves + np.int64(1))).sum())
    return [x.reshape(*lead, m) for x in levels_home], pairs


def _merged(k: Array, own: Array, nodes: int, count: int, each: int, num_clusters: int, most: int,
            iterations: int, cosine: bool) -> tuple[Array, Array]:
    """Cluster the nodes of a level, `each` of them `count` times, of at most `most` keys.

    Returns the new node of each key, int32 (P, M), and how often these nodes moved.
    """
    xp, (*lead, m, width) = arrays.namespace(k), k.shape
    heads = math.prod(lead)
    wide = arrays.reshape(xp, xp.astype(k, arrays.accumulator(xp, k)), (heads * m, width))
    across = over_all_heads(xp, own, nodes)
    means = means_of(wide, across, heads * nodes, most)
    # as the means of narrow keys are narrow themselves
    rows = arrays.cast(xp, arrays.cast(xp, means.rows, k.dtype), wide.dtype)
    rows = unit_rows(xp, rows) if cosine else rows
    # nodes without a token, and those of segments that no new one covers, take no part
    alive = xp.reshape(means.counts > 0, (heads, nodes))[:, :count * each]
    rows = xp.reshape(xp.reshape(rows, (heads, nodes, width))[:, :count * each, :],
                      (heads * count * each, width))
    owner = xp.arange(heads * count * each, dtype=xp.int32, device=arrays.device(k)) // each
    crowd = Crowd(dispatch.kernel("clustering", None, k), rows,
                  xp.where(xp.reshape(alive, (-1,)), owner, -1),
                  np.full(heads * count, num_clusters), each, cosine)
    _, found, rounds = lloyd(crowd, None, iterations)
    parent = _padded(xp, _within(xp, found, heads, count * num_clusters), nodes)
    new = xp.take(xp.reshape(parent, (-1,)), xp.where(across >= 0, across, 0))
    return xp.reshape(xp.where(across >= 0, new, -1), (heads, m)), rounds


def _within(xp: Any, found: Array, heads: int, nodes: int) -> Array:
    """Return numbers over all heads, (P * any,), as numbers within heads, (P, any); -1 stays."""
    found = xp.reshape(found, (heads, found.shape[0] // max(1, heads)))
    first = nodes * xp.arange(heads, dtype=xp.int32, device=arrays.device(found))[:, None]
    return xp.where(found >= 0, found - first, -1)


def _padded(xp: Any, x: Array, width: int) -> Array:
    """Return (P, any) as (P, width), filled up with -1."""
    none = xp.full((x.shape[0], width - x.shape[1]), -1, dtype=xp.int32, device=arrays.device(x))
    return xp.concat([x, none], axis=1)


def _held_nodes(own: np.ndarray, sets: int, each: int) -> np.ndarray:
    """Count for each of several sets of `each` nodes, of all heads, those that any key is in."""
    limit = sets // max(1, len(own)) * each
    held = np.zeros((len(own), limit + 1), bool)
    covered = np.where((own >= 0) & (own < limit), own, limit).astype(np.int64)
    np.put_along_axis(held, covered, True, axis=1)
    return held[:, :limit].reshape(sets, each).sum(axis=1)


def medoids(k: Array, assignments: tuple[np.ndarray, ...], nodes: tuple[int, ...],
            cosine: bool) -> tuple[np.ndarray, ...]:
    """Return for each level the member nearest to the mean of each node, int32 (..., G, K)."""
    xp, kernel, (*lead, m, width) = (arrays.namespace(k), dispatch.kernel("clustering", None, k),
                                     k.shape)
    heads = math.prod(lead)
    rows = arrays.reshape(xp, xp.astype(k, arrays.accumulator(xp, k)), (heads * m, width))
    rows, found = unit_rows(xp, rows) if cosine else rows, []
    for own, count in zip(assignments, nodes, strict=True):
        across = over_all_heads(xp, _there(k, own.reshape(heads, m)), count)
        means = means_of(rows, across, heads * count, m).rows
        means = unit_rows(xp, means) if cosine else means
        apart = kernel.distances(rows, means, across)
        nearest = nearest_members(kernel, apart, across, heads * count)
        found.append(xp.where(nearest >= 0, nearest % max(m, 1), -1))
    return tuple(x.reshape(*lead, count)
                 for x, count in zip(arrays.decided(*found), nodes, strict=True))


def _there(like: Array, x: np.ndarray) -> Array:
    return arrays.from_host(arrays.namespace(like), x.astype(np.int32), arrays.device(like))


@dataclasses.dataclass(frozen=True)
class Layer:
    """A level of nodes as a search reads it."""

    rows: Array
    """(P, K, D): centroids of unit length."""
    some: Array
    """bool (P, K): whether any token is in a node."""
    parent: Array | None
    """int32 (P, K): its node in the level above; -1 for none."""


class Index:
    """Keys and their groups, made ready for searches where the keys live."""

    def __init__(self, k: Array, groups: Any) -> None:
        xp, (*lead, m, width) = arrays.namespace(k), k.shape
        self.groups, self.m, heads = groups, m, math.prod(lead)
        self.heads, assignments = heads, [x.reshape(heads, m) for x in groups.assignments]
        wide = arrays.reshape(xp, xp.astype(k, arrays.accumulator(xp, k)), (heads * m, width))
        self.rows = unit_rows(xp, wide)
        self.layers, self.levels = list[Layer](), list[Means]()
        own = [_there(k, x) for x in assignments]
        for level, nodes in enumerate(groups.nodes):
            across = over_all_heads(xp, own[level], nodes)
            means = means_of(wide, across, heads * nodes, m)
            some, parent = means.counts > 0, None
            if level + 1 < len(own):
                # all tokens of a node are in one node of the level above
                token = xp.take(means.order, xp.where(some, means.start[:-1], 0))
                parent = xp.where(some, xp.take(xp.reshape(own[level + 1], (-1,)), token), -1)
                parent = xp.reshape(parent, (heads, nodes))
            self.layers.append(Layer(xp.reshape(unit_rows(xp, means.rows), (heads, nodes, width)),
                                     xp.reshape(some, (heads, nodes)), parent))
            self.levels.append(means)

    def select(self, q: Array, last: np.ndarray, keep: int, number: int, threshold: float | None,
               duplicate: float | None) -> tuple[np.ndarray, int]:
        """Return the tokens chosen for queries (P, N, D), and how many scores that took."""
        xp, (heads, n, _) = arrays.namespace(q), q.shape
        kernel = dispatch.kernel("retrieval", None, q)
        roots = [tuple(x.reshape(heads, n) for x in pair) for pair in self.groups.roots(last)]
        kept, scored = kernel.search(q, self.layers, roots, keep)
        leaves, start = kept[0], self.levels[0].start
        nodes = self.groups.nodes[0]
        if not nodes:
            return np.full((heads, n, number), -1, np.int32), 0
        first = nodes * xp.arange(heads, dtype=xp.int32, device=arrays.device(q))[:, None, None]
        node = xp.reshape(xp.where(leaves >= 0, leaves + first, 0), (-1,))
        begin, end = (xp.reshape(xp.take(start, x), leaves.shape) for x in (node, node + 1))
        runs = xp.stack([begin, xp.where(leaves >= 0, end, begin)], axis=3)
        found = kernel.pick(q, self.rows, self.levels[0].order, runs, self._most(keep), number,
                            self.m, threshold, duplicate)
        scored = scored + xp.astype(xp.sum(runs[..., 1] - runs[..., 0], axis=2), xp.int32)
        indices, scores = arrays.decided(found, scored)
        return indices, int(scores.sum(dtype=np.int64))

    def _most(self, keep: int) -> int:
        """Return how many tokens the `keep` largest leaves of a head have."""
        own, nodes = self.groups.assignments[0].reshape(self.heads, self.m), self.groups.nodes[0]
        across = (own + nodes * np.arange(self.heads, dtype=np.int64)[:, None])[own >= 0]
        sizes = np.bincount(across, minlength=self.heads * nodes).reshape(self.heads, nodes)
        return int(np.sort(sizes, axis=1)[:, -keep:].sum(axis=1).max(initial=0))


def select_from_buckets(q: Array, k: Array, buckets: tuple[np.ndarray, np.ndarray],
                        lengths: np.ndarray, stop: np.ndarray, num_candidates: int, number: int,
                        threshold: float | None, duplicate: float | None,
                        ) -> tuple[np.ndarray, int]:
    """Return the tokens chosen of the buckets of queries, and how many scores that took.

    `q` is (P, N, D), `k` (P, M, D), `buckets` (P, rounds, N) and (P, rounds, M), `lengths` (P,) and
    `stop` (P, N), the last token that each query sees.
    """
    from .regrouping import sorted_tokens

    xp, (heads, m, width), (rounds, n) = arrays.namespace(q), k.shape, buckets[0].shape[1:]
    kernel, where = dispatch.kernel("retrieval", None, q), arrays.device(q)
    own, theirs = (_there(q, x) for x in buckets)
    order = xp.reshape(sorted_tokens(theirs, lengths), (heads * rounds, m))
    if not m:
        return np.full((heads, n, number), -1, np.int32), 0
    # padding, which is sorted behind all else, has tokens that no query sees
    line = m * xp.arange(heads * rounds, dtype=xp.int32, device=where)[:, None]
    inside = xp.arange(m, dtype=xp.int32, device=where) < xp.repeat(
        _there(q, lengths), rounds)[:, None]
    theirs = xp.where(inside, xp.reshape(theirs, order.shape), xp.iinfo(xp.int32).max)
    in_order = xp.reshape(xp.take(xp.reshape(theirs, (-1,)), xp.reshape(line + order, (-1,))),
                          order.shape)
    ends = xp.broadcast_to(_there(q, stop)[:, None, :], (heads, rounds, n))
    runs = kernel.last_of_bucket(order, in_order, xp.reshape(own, (heads * rounds, n)),
                                 xp.reshape(ends, (heads * rounds, n)), num_candidates)
    runs = xp.permute_dims(xp.reshape(runs + line[:, :, None], (heads, rounds, n, 2)), (0, 2, 1, 3))
    head = xp.arange(heads, dtype=xp.int32, device=where)[:, None, None]
    tokens = xp.reshape(xp.reshape(order, (heads, rounds, m)) + m * head, (-1,))
    rows = unit_rows(xp, arrays.reshape(xp, xp.astype(k, q.dtype), (heads * m, width)))
    found = kernel.pick(q, rows, tokens, runs, min(rounds * num_candidates, rounds * m), number, m,
                        threshold, duplicate)
    scored = xp.astype(xp.sum(runs[..., 1] - runs[..., 0], axis=2), xp.int32)
    indices, scores = arrays.decided(found, scored)
    return indices, int(scores.sum(dtype=np.int64))
