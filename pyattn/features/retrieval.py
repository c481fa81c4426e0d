"""Tokens found by what they hold: the best clusters of a query, then the best tokens in them.

Letters: H query heads, G key/value heads, N queries, M keys, D width, n tokens chosen; P all the
key heads of a batch. Scores are cosines; the heads of a group share what they find, by the mean of
their cosines. All that is found lives on the host.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from .. import arrays, dispatch
from ..arrays import Array
from ..checks import OptionError, ShapeError, require_flag, require_integer, require_real
from . import device_retrieval
from .clustering import (
    Sets,
    kmeans,
    lloyd,
    nearest_members,
    over_all_heads,
    require_metric,
    require_numbers,
    segment_means,
    split_counts,
    strided_seeds,
    token_rows,
)
from .hashing import hashed
from .precision import unit_rows

BRANCHING = 8
"""Children of a node of a tree, where the tree is over time on average."""


@dataclasses.dataclass(frozen=True)
class Groups:
    """The clusters of keys, on one level or several, and who may look at them when.

    Without `segment` every query sees all clusters. With it keys are cut into segments of as many
    tokens, whose clusters can be seen from the segment's last token on; so what a query sees never
    depends on later tokens. In a tree over segments, eight of a level make one of the next, whose
    nodes are clusters of their nodes, and which replaces them for those that see it as a whole.
    E.g. four tokens, segments of two, one cluster each: 0->{}  1->{a}  2->{a}  3->{a, b}.
    """

    assignments: tuple[np.ndarray, ...]
    """int32 (..., G, M) for each level, from the leaves: the node of each key, -1 for none."""
    nodes: tuple[int, ...]
    """How many nodes each level has, in each head."""
    segment: int | None = None
    each: int = 0
    """Nodes of a segment, on every level."""
    pairs: int = 0
    """Products that the clustering took."""

    def segments_seen(self, last: np.ndarray, level: int) -> np.ndarray:
        """Return how many segments of a level are over for queries that see tokens up to `last`."""
        if self.segment is None:
            raise OptionError("there are no segments")
        count = self.nodes[level] // max(self.each, 1)
        return np.minimum((last + 1) // (self.segment * BRANCHING**level), count)

    def roots(self, last: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return for each level the nodes, first and stop, that no node above stands for.

        `last` is the last token that a query sees, -1 for none; any shape.
        """
        found = []
        for level, nodes in enumerate(self.nodes):
            top = level + 1 == len(self.nodes)
            if self.segment is None:
                stop = np.where(last >= 0, nodes if top else 0, 0)
                first = np.zeros_like(stop)
            else:
                stop = self.each * self.segments_seen(last, level)
                first = np.zeros_like(stop) if top else (
                    self.each * BRANCHING * self.segments_seen(last, level + 1))
            found.append((first.astype(np.int32), stop.astype(np.int32)))
        return found


@dataclasses.dataclass(frozen=True)
class Layer:
    """A level of nodes as the kernels read it; all heads' behind one another."""

    rows: Array
    """(P * K, D): centroids of unit length."""
    counts: np.ndarray
    """int64 (P, K): tokens below a node; one without is never found."""
    child_rows: Array
    """The rows of the children, those of a node side by side."""
    child_order: np.ndarray
    """int32: numbers of the children; nodes within their head, but tokens over all heads."""
    child_start: np.ndarray
    """int64 (P * K + 1,): where the children of each node begin in `child_order`."""


def group_keys(k: Array, *, num_clusters: int, iterations: int = 10, metric: str = "l2",
               segment: int | None = None, tree: bool = False, lengths: Any = None) -> Groups:
    """Cluster keys: all of them, or each segment on its own; with `tree` in levels.

    Parameters
    ----------
    k : array, shape (..., G, M, D)
    num_clusters : int, >= 1
        Of all keys, or of each segment.
    iterations, metric
        As for `kmeans`.
    segment : int, >= 1, optional
        Tokens of a segment. Tokens of a segment that is not over are in no cluster.
    tree : bool
        Without segments, k-means from the top (`kmeans`); with segments, the nodes of eight
        segments are clustered into `num_clusters` nodes of the next level, and so on.
    lengths : int or array of int, broadcasting to the leading axes with G, optional

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features.retrieval import group_keys
    >>> k = np.array([[[1.0], [8.0], [9.0], [2.0], [5.0]]])
    >>> group_keys(k, num_clusters=2).assignments[0]
    array([[0, 1, 1, 0, 0]], dtype=int32)
    >>> group_keys(k, num_clusters=1, segment=2).assignments[0]
    array([[ 0,  0,  1,  1, -1]], dtype=int32)
    """
    tree = require_flag("tree", tree)
    if segment is None:
        found = kmeans(k, num_clusters=num_clusters, iterations=iterations, metric=metric,
                       lengths=lengths, tree=tree, branching=BRANCHING)
        levels, own = [found.assignment], found.assignment
        for level in reversed(found.levels):
            parent = np.repeat(np.arange(level.children.size - 1), np.diff(level.children))
            own = np.where(own >= 0, parent[own], -1).astype(np.int32)
            levels.append(own)
        tables = split_counts(num_clusters, BRANCHING) if tree else [np.array([0, num_clusters])]
        return Groups(tuple(levels), tuple(int(table[-1]) for table in reversed(tables)),
                      pairs=found.pairs)
    segment = require_integer("segment", segment, minimum=1)
    if not dispatch.kernel("clustering", None, k).ON_HOST:
        return _segments_on_device(k, num_clusters, iterations, metric, segment, lengths, tree)
    own, pairs = _segment_clusters(k, num_clusters, iterations, metric, segment, lengths)
    count = k.shape[-2] // segment
    levels, nodes = [own], [count * num_clusters]
    while tree and count >= BRANCHING:
        count //= BRANCHING
        own, some = _merged(k, own, nodes[-1], count, num_clusters, iterations, metric)
        pairs += some
        levels.append(own)
        nodes.append(count * num_clusters)
    return Groups(tuple(levels), tuple(nodes), segment, num_clusters, pairs)


def _segment_clusters(k: Array, num_clusters: int, iterations: int, metric: str, segment: int,
                      lengths: Any) -> tuple[np.ndarray, int]:
    """Cluster each segment that is over."""
    *lead, m, width = k.shape
    xp, count = arrays.namespace(k), m // segment
    assignment = np.full((*lead, m), -1, np.int32)
    if not count:
        return assignment, 0
    pieces = xp.reshape(k[..., :count * segment, :], (*lead, count, segment, width))
    found = kmeans(pieces, num_clusters=num_clusters, iterations=iterations, metric=metric,
                   lengths=_over(tuple(lead), m, segment, lengths) * segment)
    first = np.arange(count, dtype=np.int32)[:, None] * num_clusters
    numbers = np.where(found.assignment >= 0, found.assignment + first, -1)
    assignment[..., :count * segment] = numbers.reshape(*lead, count * segment)
    return assignment, found.pairs


def _over(lead: tuple[int, ...], m: int, segment: int, lengths: Any) -> np.ndarray:
    """Tell which segments are over, bool (..., count)."""
    whole = np.broadcast_to(m if lengths is None else lengths, lead)[..., None]
    return np.arange(1, m // segment + 1) * segment <= whole


def _segments_on_device(k: Array, num_clusters: int, iterations: int, metric: str, segment: int,
                        lengths: Any, tree: bool) -> Groups:
    """Do what `group_keys` does with segments where the keys live."""
    num_clusters = require_integer("num_clusters", num_clusters, minimum=1)
    iterations = require_integer("iterations", iterations, minimum=0)
    cosine = require_metric(metric)
    *lead, m, width = k.shape
    xp, heads, count = arrays.namespace(k), math.prod(lead), m // segment
    over = _over(tuple(lead), m, segment, lengths).reshape(heads, count)
    with np.errstate(invalid="ignore", over="ignore"):
        pieces = xp.reshape(k[..., :count * segment, :], (heads * count, segment, width))
        points, _ = token_rows(xp, pieces, over.reshape(-1) * np.int64(segment), cosine)
        levels, pairs = device_retrieval.segment_clusters(
            points, over, k, segment, num_clusters, iterations, cosine, BRANCHING, tree)
    nodes = tuple(count // BRANCHING**level * num_clusters for level in range(len(levels)))
    return Groups(tuple(levels), nodes, segment, num_clusters, pairs)


def _merged(k: Array, own: np.ndarray, nodes: int, count: int, num_clusters: int, iterations: int,
            metric: str) -> tuple[np.ndarray, int]:
    """Cluster the nodes of eight segments each, `count` times; the new node of each key."""
    *lead, width = k.shape[:-2] + k.shape[-1:]
    heads, xp, each = math.prod(lead), arrays.namespace(k), BRANCHING * num_clusters
    means, saved = segment_means.forward(k, own, nodes)
    acc = arrays.accumulator(xp, k)
    rows = xp.reshape(xp.astype(means, acc), (heads * nodes, width))
    rows = unit_rows(xp, rows) if metric == "cosine" else rows
    # nodes without a token, and those of segments that no new one covers, take no part
    alive = saved.counts.reshape(heads, nodes) > 0
    alive[:, count * each:] = False
    chosen = np.flatnonzero(alive)
    sizes = alive[:, :count * each].reshape(heads * count, each).sum(axis=1)
    first = np.arange(heads * count) * num_clusters
    sets = Sets(np.cumsum(sizes) - sizes, sizes, first, np.full(heads * count, num_clusters))
    points = xp.take(rows, arrays.from_host(xp, chosen, arrays.device(k)), axis=0)
    kernel = dispatch.kernel("clustering", None, k)
    _, found, _, pairs = lloyd(kernel, points, strided_seeds(xp, points, sets), sets, iterations,
                                metric == "cosine")
    parent = np.full(heads * nodes, -1, np.int32)
    parent[chosen] = found - (chosen // max(nodes, 1)) * count * num_clusters
    below = over_all_heads(own.reshape(heads, own.shape[-1]), nodes)
    return np.where(below >= 0, parent[below], -1).reshape(own.shape).astype(np.int32), pairs


def find_medoids(k: Array, groups: Groups, metric: str) -> tuple[np.ndarray, ...]:
    """Return for each level the member nearest to the mean of each node, int32 (..., G, K)."""
    xp, (*lead, m, width) = arrays.namespace(k), k.shape
    kernel, heads = dispatch.kernel("clustering", None, k), math.prod(lead)
    if not kernel.ON_HOST:
        return device_retrieval.medoids(k, groups.assignments, groups.nodes, metric == "cosine")
    rows, found = xp.astype(k, arrays.accumulator(xp, k)), []
    rows = unit_rows(xp, rows) if metric == "cosine" else rows
    for own, nodes in zip(groups.assignments, groups.nodes, strict=True):
        means = xp.reshape(segment_means(rows, own, nodes), (heads * nodes, width)) if (
            nodes) else xp.zeros((0, width), dtype=rows.dtype)
        means = unit_rows(xp, means) if metric == "cosine" else means
        across = over_all_heads(own.reshape(heads, m), nodes).reshape(-1)
        apart = kernel.distances(xp.reshape(rows, (heads * m, width)), means, across)
        nearest = nearest_members(apart, across, heads * nodes)
        nearest = np.where(nearest >= 0, nearest % max(m, 1), -1)
        found.append(nearest.astype(np.int32).reshape(*lead, nodes))
    return tuple(found)


def group_queries(q: Array, groups: int) -> Array:
    """Return the mean of the unit-length queries of each group, (..., G, N, D), wide.

    Its product with a unit-length key is the mean of the heads' cosines.
    """
    *lead, heads, n, width = q.shape
    xp = arrays.namespace(q)
    unit = unit_rows(xp, xp.astype(q, arrays.accumulator(xp, q)))
    shared = xp.reshape(unit, (*lead, groups, heads // groups if groups else 1, n, width))
    return xp.mean(shared, axis=-3)


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search has found for the queries of each key head."""

    kept: tuple[np.ndarray, ...]
    """int32 (..., G, N, p) for each level, from the leaves: the nodes kept, best first; or -1."""
    scored: int
    """How many scores of nodes that took."""


class Index:
    """Keys and their groups, made ready for searches on the host."""

    def __init__(self, k: Array, groups: Groups) -> None:
        xp, (*lead, m, width) = arrays.namespace(k), k.shape
        self.groups, self.lead, self.m = groups, tuple(lead), m
        heads = math.prod(lead)
        wide = xp.astype(k, arrays.accumulator(xp, k))
        rows = xp.reshape(unit_rows(xp, wide), (heads * m, width))
        kernel, where = dispatch.kernel("clustering", None, wide), arrays.device(k)
        below = np.arange(heads * m)        # for each token, what of the level below it is in
        layers: list[Layer] = []
        for own, nodes in zip(groups.assignments, groups.nodes, strict=True):
            across = over_all_heads(own.reshape(heads, m), nodes).reshape(-1)
            size = rows.shape[0]
            parent = np.full(size, -1, np.int32)
            held = (across >= 0) & (below >= 0)
            parent[below[held]] = across[held]
            start, order = kernel.members(parent, heads * nodes)
            children = xp.take(rows, arrays.from_host(xp, order, where), axis=0)
            if layers:
                order = (order % max(size // heads, 1)).astype(np.int32) if heads else order
            counts = np.bincount(across[across >= 0], minlength=heads * nodes)
            means = segment_means(wide, own, nodes) if nodes else wide[..., :0, :]
            rows = xp.reshape(unit_rows(xp, means), (heads * nodes, width))
            layers.append(Layer(rows, counts.reshape(heads, nodes), children, order, start))
            below = across
        self.layers = tuple(layers)

    def search(self, q: Array, last: np.ndarray, keep: int) -> Found:
        """Find the `keep` best nodes of each level for grouped queries `q` (..., G, N, D).

        `last` (..., G, N) is the last token that each query sees, -1 for none. The search starts at
        the roots of the highest level and goes on with the children of the nodes that it keeps (a
        beam), and what roots the level has.
        """
        xp, (*lead, n, width) = arrays.namespace(q), q.shape
        heads = math.prod(lead)
        flat = xp.reshape(q, (heads, n, width))
        roots = [(first.reshape(heads, n), stop.reshape(heads, n))
                 for first, stop in self.groups.roots(last)]
        kernel = dispatch.kernel("retrieval", None, flat)
        kept, scored = kernel.search(flat, self.layers, roots, keep)
        return Found(tuple(x.reshape(*lead, n, keep) for x in kept),
                     int(scored.sum(dtype=np.int64)))

    def runs(self, leaves: np.ndarray) -> np.ndarray:
        """Return where the tokens of leaves (..., G, N, p) lie, int64 (P, N, p, 2)."""
        nodes, start = self.groups.nodes[0], self.layers[0].child_start
        flat = leaves.reshape(math.prod(self.lead), *leaves.shape[-2:])
        across = np.maximum(flat, 0) + nodes * np.arange(len(flat))[:, None, None]
        if not nodes or start.size < 2:
            return np.zeros((*flat.shape, 2), np.int64)
        ends = np.where(flat >= 0, start[across + 1], start[across])
        return np.stack([start[across], ends], axis=-1)


@dataclasses.dataclass(frozen=True)
class Selection:
    """Tokens chosen for each query and key head."""

    indices: np.ndarray
    """int32 (..., G, N, n), ascending; -1 fills up."""
    scored: int
    """Scores of nodes and tokens that were computed."""


def select_tokens(q: Array, k: Array, groups: Groups | Index, last: Any, *, num_top_clusters: int,
                  num_selected: int, threshold: float | None = None,
                  duplicate_threshold: float | None = None) -> Selection:
    """Choose keys in two stages: the clusters nearest to the query, then the keys nearest in them.

    The nearest `num_top_clusters` clusters by the cosine of the query and the mean of their keys;
    then of their members the `num_selected` of the largest cosine. Where H > G, the heads of a
    group choose together, by the mean of their cosines. E.g. keys at 0, 10, 90 and 100 degrees in
    two clusters, a query at 80: with one cluster and one key, the key at 90.

    Parameters
    ----------
    q : array, shape (..., H, N, D), floating point
    k : array, shape (..., G, M, D), dtype of `q`; G divides H
    groups : Groups or Index
        What `group_keys` made of `k`; with segments only the clusters of those that are over for a
        query count, and only their tokens.
    last : int array, broadcasting to (..., G, N)
        The last token that each query sees; -1 for a query of padding, which finds nothing.
    num_top_clusters, num_selected : int, >= 1
        In a tree, also how many nodes are kept of each level.
    threshold : float, optional
        Only keys of at least this cosine.
    duplicate_threshold : float, optional
        Leave out a key whose cosine with one already taken, in the order of their scores, is larger
        ("filter redundancy").

    Returns
    -------
    Selection
        Indices int32 (..., G, N, n), ascending, -1 for none; and the number of scores computed.

    Raises
    ------
    ShapeError, OptionError
        Arguments that do not fit.

    Notes
    -----
    Of equal cosines the lower number. Time O(N (C D + p M / C D)) with C clusters of which p are
    kept; in a tree O(N p 8 log8(C) D + N p M / C D). Lengths of vectors have no say: scaling all
    keys changes nothing that is chosen inside given clusters. A key of zeros has cosine 0.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features.retrieval import group_keys, select_tokens
    >>> turn = np.deg2rad([[0, 10, 90, 100]])
    >>> k, q = np.stack([np.cos(turn), np.sin(turn)], -1), np.array([[[0.2, 1.0]]])
    >>> groups = group_keys(k, num_clusters=2)
    >>> select_tokens(q, k, groups, 3, num_top_clusters=1, num_selected=1).indices
    array([[[2]]], dtype=int32)
    """
    keep = require_integer("num_top_clusters", num_top_clusters, minimum=1)
    (grouped, last), m = _queries(q, k, last), k.shape[-2]
    keep = min(keep, max(1, *(groups.groups if isinstance(groups, Index) else groups).nodes))
    limits = _limits(num_selected, m, threshold, duplicate_threshold)
    flat, (*lead, n, _) = _flat(grouped), grouped.shape
    if not dispatch.kernel("retrieval", None, flat).ON_HOST:
        known = groups.groups if isinstance(groups, Index) else groups
        chosen, scored = device_retrieval.Index(k, known).select(flat, last, keep, *limits)
        return Selection(chosen.reshape(*lead, n, limits[0]), scored)
    index = groups if isinstance(groups, Index) else Index(k, groups)
    found = index.search(grouped, last, keep)
    leaf = index.layers[0]
    runs = index.runs(found.kept[0])
    chosen = _pick(flat, leaf.child_rows, leaf.child_order, runs, False, m, *limits)
    return Selection(chosen.reshape(*lead, n, limits[0]),
                     found.scored + int((runs[..., 1] - runs[..., 0]).sum()))


def _queries(q: Array, k: Array, last: Any) -> tuple[Array, np.ndarray]:
    """Check q against k; the grouped queries, and `last` in full."""
    arrays.require_float("q", q)
    arrays.require_float("k", k)
    if q.ndim < 3 or k.ndim < 3:
        raise ShapeError("q must be (..., H, N, D) and k (..., G, M, D); got q "
                         f"{tuple(q.shape)}, k {tuple(k.shape)}")
    heads, groups = q.shape[-3], k.shape[-3]
    if q.shape[-1] != k.shape[-1] or tuple(q.shape[:-3]) != tuple(k.shape[:-3]) or (
            heads % groups if groups else heads):
        raise ShapeError("q (..., H, N, D) and k (..., G, M, D) must have equal leading axes and "
                         f"widths, and G must divide H; got q {tuple(q.shape)}, "
                         f"k {tuple(k.shape)}")
    return group_queries(q, groups), np.broadcast_to(
        np.asarray(last, np.int64), (*q.shape[:-3], groups, q.shape[-2]))


def _flat(q: Array) -> Array:
    """(..., G, N, D) as (P, N, D)."""
    return arrays.reshape(arrays.namespace(q), q, (math.prod(q.shape[:-2]), *q.shape[-2:]))


def _limits(number: int, tokens: int, threshold: float | None,
            duplicate: float | None) -> tuple[int, float | None, float | None]:
    """Check what limits a list: its length, and the two thresholds."""
    number = require_integer("num_selected", number, minimum=1)
    if threshold is not None:
        threshold = require_real("threshold", threshold)
    if duplicate is not None:
        duplicate = require_real("duplicate_threshold", duplicate)
    return min(number, max(tokens, 1)), threshold, duplicate


def _pick(q: np.ndarray, rows: np.ndarray, order: np.ndarray, runs: np.ndarray, gather: bool,
          tokens: int, number: int, threshold: float | None, duplicate: float | None) -> np.ndarray:
    """Choose on the host for queries (P, N, D)."""
    kernel = dispatch.kernel("retrieval", None, q)
    return kernel.pick(q, rows, order, runs, gather, number, tokens, threshold, duplicate)


def hash_tokens(q: Array, k: Array, *, num_buckets: Any, num_rounds: int, rng: Any = None,
                rotations: Array | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Hash queries, one for each group, and keys by the same rotations.

    Returns int32 (..., G, rounds, N) and (..., G, rounds, M) on the host; a query and a key of one
    direction are in one bucket.
    """
    n = q.shape[-2]
    buckets, = arrays.decided(hashed_tokens(q, k, num_buckets=num_buckets, num_rounds=num_rounds,
                                            rng=rng, rotations=rotations))
    return buckets[..., :n], buckets[..., n:]


def hashed_tokens(q: Array, k: Array, *, num_buckets: Any, num_rounds: int, rng: Any = None,
                  rotations: Array | None = None) -> Array:
    """Return what `hash_tokens` does, queries before keys, where they live."""
    xp, grouped = arrays.namespace(q, k), group_queries(q, k.shape[-3])
    both = xp.concat([grouped, xp.astype(k, grouped.dtype)], axis=-2)
    return hashed(both, num_buckets=num_buckets, num_rounds=num_rounds, rng=rng,
                  rotations=rotations)


def select_from_buckets(q: Array, k: Array, buckets: tuple[Any, Any], last: Any, *,
                        num_candidates: int, num_selected: int, lengths: Any = None,
                        threshold: float | None = None,
                        duplicate_threshold: float | None = None) -> Selection:
    """Choose keys that hash like the query: of its bucket in each round, the nearest ones.

    Candidates are in each round the last `num_candidates` members of the query's bucket up to the
    last token it sees; of all rounds' the `num_selected` of the largest cosine are taken. E.g.
    buckets of keys 0 1 0 0, a query in bucket 0 that sees all, two candidates: 2 and 3.

    Parameters
    ----------
    q, k, last, num_selected, threshold, duplicate_threshold
        As for `select_tokens`.
    buckets : pair of int arrays, (..., G, rounds, N) and (..., G, rounds, M)
        What `hash_tokens` returns.
    num_candidates : int, >= 1
    lengths : int or array of int, broadcasting to (..., G), optional
        Keys from here on are padding, which is in no bucket.

    Returns
    -------
    Selection

    Raises
    ------
    ShapeError, OptionError

    Notes
    -----
    Time O(rounds (M log M + N (log M + num_candidates D))).

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features.retrieval import select_from_buckets
    >>> q, k = np.ones((1, 1, 2)), np.ones((1, 4, 2))
    >>> buckets = np.array([[[0]]]), np.array([[[0, 1, 0, 0]]])
    >>> select_from_buckets(q, k, buckets, 3, num_candidates=2, num_selected=2).indices
    array([[[2, 3]]], dtype=int32)
    """
    num_candidates = require_integer("num_candidates", num_candidates, minimum=1)
    grouped, last = _queries(q, k, last)
    xp, (*lead, m, width) = arrays.namespace(k), k.shape
    num_candidates = min(num_candidates, max(m, 1))
    n, heads = q.shape[-2], math.prod(lead)
    rounds = np.shape(buckets[0])[-2]
    own = require_numbers("buckets of queries", buckets[0], (*lead, rounds, n), 2**31)
    theirs = require_numbers("buckets of keys", buckets[1], (*lead, rounds, m), 2**31)
    whole = np.broadcast_to(m if lengths is None else lengths, tuple(lead))
    limits = _limits(num_selected, m, threshold, duplicate_threshold)
    queries = _flat(grouped)
    if not dispatch.kernel("retrieval", None, queries).ON_HOST:
        chosen, scored = device_retrieval.select_from_buckets(
            queries, arrays.reshape(xp, k, (heads, m, width)),
            (own.reshape(heads, rounds, n), theirs.reshape(heads, rounds, m)), whole.reshape(heads),
            np.minimum(last, whole[..., None] - 1).reshape(heads, n), num_candidates, *limits)
        return Selection(chosen.reshape(*lead, n, limits[0]), scored)
    runs = np.zeros((heads, rounds, n, 2), np.int64)
    order = np.empty((heads, rounds, m), np.int32)
    flat = (own.reshape(heads, rounds, n).astype(np.int64),
            theirs.reshape(heads, rounds, m).astype(np.int64))
    stop = np.minimum(last, whole[..., None] - 1).reshape(heads, n)
    inside = np.arange(m) < whole.reshape(heads, 1)
    for head, turn in np.ndindex(heads, rounds):
        # sorted by bucket and place in one: a query's members up to its last lie before `ends`
        place = np.where(inside[head], flat[1][head, turn], 2**31) * (m + 1) + np.arange(m)
        sort = np.argsort(flat[1][head, turn] + (2**31 * ~inside[head]), kind="stable")
        place = place[sort]
        bucket = flat[0][head, turn] * (m + 1)
        ends = np.searchsorted(place, bucket + stop[head], "right")
        begins = np.maximum(np.searchsorted(place, bucket), ends - num_candidates)
        order[head, turn] = sort + head * m
        first = (head * rounds + turn) * m
        runs[head, turn] = first + np.stack([np.minimum(begins, ends), ends], axis=-1)
    wide = xp.astype(k, arrays.accumulator(xp, k))
    rows = xp.reshape(unit_rows(xp, wide), (heads * m, width))
    runs = np.ascontiguousarray(runs.transpose(0, 2, 1, 3))
    chosen = _pick(queries, rows, order.reshape(-1), runs, True, m, *limits)
    return Selection(chosen.reshape(*lead, n, limits[0]), int((runs[..., 1] - runs[..., 0]).sum()))
