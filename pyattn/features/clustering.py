"""Clusters of tokens: k-means, the means that stand for clusters, and centroids that are learned.

Letters: N tokens, D width, C clusters. Inside, the points of all heads are rows of one matrix, and
their centroids, the nodes, rows of another; `Sets` says which rows choose among which nodes. So
heads, segments and the nodes of a tree are clustered alike, all in one go.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from .. import arrays, dispatch
from ..arrays import Array
from ..checks import (
    DtypeError,
    OptionError,
    ShapeError,
    require_broadcast,
    require_choice,
    require_flag,
    require_integer,
    require_real,
)
from ..differentiable import ON_HOST, Saved, differentiable, gradients
from ..masks.algebra import host_array
from . import device_clustering
from .gathering import spread_tokens
from .precision import cast_like, require_same_shape, unit_rows, widened

METRICS = ("l2", "cosine")


@dataclasses.dataclass(frozen=True)
class Sets:
    """Rows that choose among nodes: ``row_first[s] + range(row_count[s])``, and so for nodes."""

    row_first: np.ndarray
    row_count: np.ndarray
    node_first: np.ndarray
    node_count: np.ndarray

    @property
    def products(self) -> np.ndarray:
        """How many pairs of a row and a node each set has."""
        return self.row_count * self.node_count


@dataclasses.dataclass(frozen=True)
class Level:
    """A level of a tree above its leaves."""

    centroids: Array
    """(..., K, D)."""
    counts: np.ndarray
    """int64 (..., K): tokens below each node."""
    children: np.ndarray
    """int64 (K + 1,): node c has nodes ``children[c]`` to ``children[c + 1]`` of the next level."""


@dataclasses.dataclass(frozen=True)
class Clusters:
    """What `kmeans` finds. Centroids and inertia live where the tokens do, all else on the host."""

    centroids: Array
    """(..., C, D), float64 for float64, else float32; of unit length for the metric "cosine"."""
    assignment: np.ndarray
    """int32 (..., N): the cluster of each token, -1 for padding."""
    counts: np.ndarray
    """int64 (..., C): tokens of each cluster; 0 where one stayed empty."""
    medoids: np.ndarray | None
    """int32 (..., C): the member nearest to each centroid, -1 of none; None unless asked for."""
    inertia: Array
    """(...): sum of squared distances to the own centroid (of unit vectors: 2 - 2 cos)."""
    iterations: np.ndarray
    """int64 (...): how often the centroids moved; the most of any node in a tree."""
    levels: tuple[Level, ...]
    """The levels of a tree above the clusters, from the top; () without one."""
    pairs: int
    """How many products of a token and a centroid were computed."""


def kmeans(x: Array, *, num_clusters: int, iterations: int = 10, metric: str = "l2",
           lengths: Any = None, representative: str = "mean", tree: bool = False,
           branching: int = 8, start: Array | None = None) -> Clusters:
    """Cluster the tokens of each head by Lloyd's k-means; deterministic.

    Each token goes to its nearest centroid (of equals the first), each centroid to the mean of its
    tokens, until nothing changes or `iterations` times; then tokens go to the nearest once more.
    E.g. tokens 0, 1, 8, 9 and two clusters: seeds are tokens 0 and 2; 0, 1 go to the first, 8, 9 to
    the second; centroids become 0.5 and 8.5; nothing changes any more.

    Parameters
    ----------
    x : array, shape (..., N, D), float16 / bfloat16 / float32 / float64
        Tokens, any leading axes; each of these heads is clustered on its own.
    num_clusters : int, >= 1
    iterations : int, >= 0
        How often centroids move, at most.
    metric : "l2" or "cosine"
        The squared distance; or the angle: tokens are brought to unit length, and so is each mean.
    lengths : int or array of int, broadcasting to the leading axes, optional
        Tokens from here on are padding: they are in no cluster, whatever they hold.
    representative : "mean" or "medoid"
        With "medoid", also find the member of each cluster that is nearest to its centroid.
    tree : bool
        Cluster from the top: into `branching` clusters, these into as many each, and so on. A token
        then meets ``branching * log(num_clusters, branching)`` centroids, not `num_clusters`, and
        may end up in a cluster that is not the nearest.
    branching : int, >= 2
    start : array, shape (..., C, D), optional
        Centroids to start from; by default tokens ``floor(c * length / C)``.

    Returns
    -------
    Clusters
        A frozen record: centroids, assignment, counts, medoids, inertia, iterations, levels, pairs.

    Raises
    ------
    ShapeError, OptionError, DtypeError
        Arguments that do not fit.

    Notes
    -----
    Time O(iterations N C D), or with a tree O(iterations N branching log C D); memory O((N + C) D).
    Tokens that are not NumPy's are clustered where they live, and what is settled is computed again
    until `iterations` are over: asking would wait for the device. An empty cluster takes the token
    that is farthest from its own centroid, unless that is alone there; for several, in order,
    tokens in that order. If every token lies where its centroid is (fewer tokens than clusters,
    duplicates), what is empty stays so, with its centroid as it was. A head without tokens has
    centroids 0. Distances are computed around the mean of the head; sums in float32, or float64 for
    float64. Unlike scikit-learn's, a cluster of one token never gives it away.

    References
    ----------
    .. [1] Lloyd, "Least squares quantization in PCM", 1982.
    .. [2] Dhillon, Modha, "Concept decompositions for large sparse text data using clustering",
       2001 (the metric "cosine").
    .. [3] Nister, Stewenius, "Scalable Recognition with a Vocabulary Tree", 2006 (the tree).

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features import kmeans
    >>> found = kmeans(np.array([[[0.0], [1.0], [8.0], [9.0]]]), num_clusters=2)
    >>> found.assignment, found.centroids.ravel(), found.counts
    (array([[0, 0, 1, 1]], dtype=int32), array([0.5, 8.5]), array([[2, 2]]))
    """
    arrays.require_float("x", x)
    if x.ndim < 2 or x.shape[-1] == 0:
        raise ShapeError(f"x must be (..., N, D) with D of at least 1; got {tuple(x.shape)}")
    num_clusters = require_integer("num_clusters", num_clusters, minimum=1)
    iterations = require_integer("iterations", iterations, minimum=0)
    branching = require_integer("branching", branching, minimum=2)
    cosine = require_metric(metric)
    require_choice("representative", representative, ("mean", "medoid"))
    tree = require_flag("tree", tree)
    if start is not None:
        arrays.require_float("start", start)
    xp = arrays.namespace(x, start)
    *lead, n, width = x.shape
    heads, counted = math.prod(lead), _lengths(lengths, tuple(lead), n)
    if tree and start is not None:
        raise OptionError("start cannot be given for a tree")
    tables = split_counts(num_clusters, branching) if tree else [np.array([0, num_clusters])]
    kernel = dispatch.kernel("clustering", None, x)
    with np.errstate(invalid="ignore", over="ignore"):
        points, middle = token_rows(xp, x, counted, cosine)
        seeds = None
        if start is not None:
            if tuple(start.shape) != (*lead, num_clusters, width):
                raise ShapeError(f"start must be {(*lead, num_clusters, width)}; got "
                                 f"{tuple(start.shape)}")
            given = xp.astype(xp.reshape(start, (heads, num_clusters, width)), points.dtype)
            given = unit_rows(xp, given) if cosine else given - middle
            seeds = xp.reshape(given, (heads * num_clusters, width))
        run = _run_on_host if kernel.ON_HOST else _run_on_device
        found = run(kernel, points, counted, seeds, tables, iterations, cosine,
                    representative == "medoid")
    shape, medoids = tuple(lead), found.medoids
    if medoids is not None:
        medoids = _within(medoids, n).reshape(*lead, num_clusters)
    counts = _tokens_below(found.assignment, heads, tables)
    levels = [Level(_uncentred(nodes, children.size - 1, middle, shape),
                    sizes.reshape(*lead, children.size - 1), children)
              for nodes, sizes, children in zip(found.above, counts[:-1], tables[1:], strict=True)]
    return Clusters(_uncentred(found.nodes, num_clusters, middle, shape),
                    _within(found.assignment, num_clusters).reshape(*lead, n),
                    counts[-1].reshape(*lead, num_clusters), medoids,
                    arrays.reshape(xp, found.inertia, shape), found.rounds.reshape(lead),
                    tuple(levels), found.pairs)


@dataclasses.dataclass(frozen=True)
class _Run:
    """What clustering the rows of all heads has found, numbered over all heads."""

    nodes: Array
    """Of the last level."""
    above: list[Array]
    """The nodes of the levels before, from the top."""
    assignment: np.ndarray
    """To the nodes of the last level."""
    medoids: np.ndarray | None
    inertia: Array
    rounds: np.ndarray
    """int64 (heads,)."""
    pairs: int


def _run_on_host(kernel: Any, points: Array, counted: np.ndarray, seeds: Array | None,
                 tables: list[np.ndarray], iterations: int, cosine: bool, medoid: bool) -> _Run:
    """Cluster on the host, until nothing changes."""
    xp, heads, each = arrays.namespace(points), counted.size, int(tables[-1][-1])
    n, above = points.shape[0] // max(1, heads), list[Array]()
    if len(tables) > 1:
        nodes, assignment, rounds, pairs = _grow(kernel, points, counted, n, above, iterations,
                                                 tables, cosine)
    else:
        sets = _one_set_each(counted, n, each)
        seeds = strided_seeds(xp, points, sets) if seeds is None else seeds
        nodes, assignment, rounds, pairs = lloyd(kernel, points, seeds, sets, iterations, cosine)
    apart = kernel.distances(points, nodes, assignment)
    medoids = nearest_members(apart, assignment, heads * each) if medoid else None
    inertia = np.asarray(apart, np.float64).reshape(heads, n).sum(axis=1)
    return _Run(nodes, above, assignment, medoids, inertia, rounds, pairs)


def _run_on_device(kernel: Any, points: Array, counted: np.ndarray, seeds: Array | None,
                   tables: list[np.ndarray], iterations: int, cosine: bool, medoid: bool) -> _Run:
    """Cluster where the points live, and bring home whose each token is, all at once."""
    xp, heads, n = arrays.namespace(points), counted.size, points.shape[0] // max(1, counted.size)
    owner = np.where(np.arange(n) < counted[:, None], np.arange(heads)[:, None], -1)
    assignment = arrays.from_host(xp, owner.reshape(-1).astype(np.int32), arrays.device(points))
    levels, moved = list[Array](), list[Array]()
    for depth, children in enumerate(tables):
        # the children of the first level are those of one root
        crowd = device_clustering.Crowd(kernel, points, assignment,
                                        np.tile(np.diff(children), heads),
                                        n if depth == 0 else None, cosine)
        nodes, assignment, rounds = device_clustering.lloyd(crowd, seeds, iterations)
        levels.append(nodes)
        moved.append(rounds)
    apart = kernel.distances(points, nodes, assignment)
    inertia = xp.sum(xp.reshape(apart, (heads, n)), axis=1)
    if medoid:
        moved.append(device_clustering.nearest_members(kernel, apart, assignment, nodes.shape[0]))
    home, *others = arrays.decided(assignment, *moved)
    pairs, most = 0, np.zeros(heads, np.int64)
    sizes = [counted, *_tokens_below(home, heads, tables)]
    for children, rows, rounds in zip(tables, sizes, others, strict=False):
        products = rows.reshape(heads, children.size - 1) * np.diff(children)
        times = rounds.reshape(products.shape)
        # nodes that moved were looked at once more afterwards
        pairs += int((products * (times + np.int64(1))).sum())
        most = np.maximum(most, times.max(axis=1, initial=0))
    return _Run(nodes, levels[:-1], home, others[-1] if medoid else None, inertia, most, pairs)


def _tokens_below(assignment: np.ndarray, heads: int, tables: list[np.ndarray]) -> list[np.ndarray]:
    """Count for each level, from the top, the tokens below each node, int64 (heads * K,)."""
    each = int(tables[-1][-1])
    counts = [np.bincount(assignment[assignment >= 0], minlength=heads * each)]
    for children in reversed(tables[1:]):
        below = counts[0].reshape(heads, int(children[-1]))
        before = np.concatenate([np.zeros((heads, 1), np.int64), np.cumsum(below, axis=1)], axis=1)
        counts.insert(0, np.diff(before[:, children], axis=1).reshape(-1))
    return counts


def require_metric(metric: Any) -> bool:
    """Return whether the metric, which must be one of METRICS, is "cosine"."""
    return require_choice("metric", metric, METRICS) == "cosine"


def _lengths(lengths: Any, lead: tuple[int, ...], n: int) -> np.ndarray:
    """Return how many tokens each head has, int64 (heads,)."""
    given = host_array(n if lengths is None else lengths)
    require_broadcast("lengths", given.shape, lead, "the leading axes")
    if given.size and given.dtype.kind not in "iu":
        raise OptionError(f"lengths must be integers; got {given.dtype}")
    if given.size and not (given.min() >= 0 and given.max() <= n):
        raise ShapeError(f"lengths must lie in 0..{n}; got {given.min()}..{given.max()}")
    return np.broadcast_to(given, lead).reshape(-1).astype(np.int64)


def token_rows(xp: Any, x: Array, counted: np.ndarray, cosine: bool) -> tuple[Array, Array]:
    """Return the rows (heads * N, D), around the mean of each head or of unit length, and means.

    Padding becomes zeros. The means are (heads, 1, D), zeros where nothing was taken off.
    """
    n, width = x.shape[-2:]
    heads, acc, where = counted.size, arrays.accumulator(xp, x), arrays.device(x)
    x = xp.astype(xp.reshape(x, (heads, n, width)), acc)
    short = counted < n
    if short.any():
        inside = np.arange(n) < counted[:, None]
        x = xp.where(arrays.from_host(xp, inside[:, :, None], where), x, xp.zeros_like(x))
    if cosine:
        x, middle = unit_rows(xp, x), xp.zeros((heads, 1, width), dtype=acc, device=where)
    else:
        size = xp.astype(arrays.from_host(xp, np.maximum(counted, 1)[:, None, None], where), acc)
        middle = xp.sum(x, axis=1, keepdims=True) / size
        x = x - middle
    return xp.reshape(x, (heads * n, width)), middle


def _uncentred(nodes: Array, each: int, middle: Array, lead: tuple[int, ...]) -> Array:
    """Return `each` centroids of each head, (..., K, D), where the tokens are."""
    xp, (heads, _, width) = arrays.namespace(nodes), middle.shape
    return xp.reshape(xp.reshape(nodes, (heads, each, width)) + middle, (*lead, each, width))


def _within(numbers: np.ndarray, each: int) -> np.ndarray:
    """Return numbers over all heads as numbers within a head; -1 stays."""
    return np.where(numbers >= 0, numbers % max(each, 1), -1).astype(np.int32)


def _one_set_each(counted: np.ndarray, n: int, nodes: int) -> Sets:
    heads = np.arange(counted.size)
    return Sets(heads * n, counted, heads * nodes, np.full(counted.size, nodes))


def strided_seeds(xp: Any, points: Array, sets: Sets) -> Array:
    """Return the tokens that centroids start from; zeros for a set without tokens."""
    total = int(sets.node_count.sum())
    owner = np.repeat(np.arange(sets.node_count.size), sets.node_count)
    place = np.arange(total) - np.repeat(sets.node_first, sets.node_count)
    row = sets.row_first[owner] + place * sets.row_count[owner] // np.maximum(
        sets.node_count[owner], 1)
    where = arrays.device(points)
    if not points.shape[0]:
        return xp.zeros((total, points.shape[1]), dtype=points.dtype, device=where)
    some = sets.row_count[owner] > 0
    seeds = xp.take(points, arrays.from_host(xp, np.where(some, row, 0), where), axis=0)
    return seeds if some.all() else xp.where(
        arrays.from_host(xp, some[:, None], where), seeds, xp.zeros_like(seeds))


def lloyd(kernel: Any, x: Array, nodes: Array, sets: Sets, iterations: int,
           cosine: bool) -> tuple[Array, np.ndarray, np.ndarray, int]:
    """Cluster the rows of each set; nodes, assignment, how often the nodes of a set moved, pairs.

    The sets' nodes follow one another without gaps.
    """
    assignment = np.full(x.shape[0], -1, np.int32)
    active = (sets.row_count > 0) & (sets.node_count > 0)
    rounds, pairs = np.zeros(active.size, np.int64), 0
    for _ in range(iterations):
        found = kernel.nearest(x, nodes, _shifts(nodes, cosine), sets, active, assignment)
        pairs += int(sets.products[active].sum())
        _fill_empty(kernel, x, nodes, found, sets, active)
        changed = np.zeros(active.size, bool)
        changed[np.searchsorted(sets.row_first, np.flatnonzero(found != assignment), "right")
                - 1] = True
        active, assignment = active & changed, found
        if not active.any():
            break
        rounds += active
        nodes = _moved(kernel, x, nodes, assignment, np.repeat(active, sets.node_count), cosine)
    if active.any():
        assignment = kernel.nearest(x, nodes, _shifts(nodes, cosine), sets, active, assignment)
        pairs += int(sets.products[active].sum())
    return nodes, assignment, rounds, pairs


def _shifts(nodes: Array, cosine: bool) -> Array:
    """|x - c|^2 is least where x.c - |c|^2 / 2 is largest; angles go by x.c alone."""
    xp = arrays.namespace(nodes)
    return xp.zeros_like(nodes[:, 0]) if cosine else xp.sum(nodes * nodes, axis=1) / 2


def _moved(kernel: Any, x: Array, nodes: Array, assignment: np.ndarray, active: np.ndarray,
           cosine: bool) -> Array:
    """Return the active nodes at the means of their members, the others where they were."""
    xp, where = arrays.namespace(x), arrays.device(x)
    start, order = kernel.members(assignment, nodes.shape[0])
    counts = np.diff(start)
    total = kernel.sums(x, start, order, active)
    size = arrays.from_host(xp, np.maximum(counts, 1)[:, None], where)
    mean = total / xp.astype(size, total.dtype)
    moves = arrays.from_host(xp, (active & (counts > 0))[:, None], where)
    if cosine:
        mean = unit_rows(xp, mean)
        moves = moves & xp.any(mean != 0, axis=1, keepdims=True)
    return xp.where(moves, mean, nodes)


def _fill_empty(kernel: Any, x: Array, nodes: Array, found: np.ndarray, sets: Sets,
                active: np.ndarray) -> None:
    """Give each empty node of an active set, in order, the row farthest from its own, in place."""
    counts = np.bincount(found[found >= 0], minlength=nodes.shape[0])
    owner = np.repeat(np.arange(active.size), sets.node_count)
    filled = np.bincount(owner[counts > 0], minlength=active.size)
    # where no node has two rows, none can be spared
    wanting = np.flatnonzero(active & (filled < sets.node_count) & (filled < sets.row_count))
    if not wanting.size:
        return
    apart = kernel.distances(x, nodes, found)
    for s in wanting.tolist():
        first, node = int(sets.row_first[s]), int(sets.node_first[s])
        rows = slice(first, first + int(sets.row_count[s]))
        empty = node + np.flatnonzero(counts[node:node + int(sets.node_count[s])] == 0)
        farthest = iter((first + np.argsort(-apart[rows], kind="stable")).tolist())
        for target in empty.tolist():
            row = next((r for r in farthest if counts[found[r]] > 1), None)
            if row is None or not apart[row] > 0:
                break
            counts[found[row]] -= 1
            found[row], counts[target] = target, 1


def split_counts(num_clusters: int, branching: int) -> list[np.ndarray]:
    """Return for each level of a tree the children (K + 1,) of its nodes, from the root down.

    A node that is to have q leaves has ``min(branching, q)`` children, which share them evenly.

    Examples
    --------
    >>> from pyattn.features.clustering import split_counts
    >>> split_counts(5, 2)
    [array([0, 2]), array([0, 2, 4]), array([0, 2, 3, 4, 5])]
    """
    leaves = np.array([num_clusters])
    found: list[np.ndarray] = []
    while not found or leaves.max() > 1:
        parts = np.minimum(leaves, branching)
        children = np.append(0, np.cumsum(parts))
        place = np.arange(children[-1]) - np.repeat(children[:-1], parts)
        leaves, parts = np.repeat(leaves, parts), np.repeat(parts, parts)
        leaves = leaves // parts + (place < leaves % parts)
        found.append(children)
    return found


def _grow(kernel: Any, x: Array, counted: np.ndarray, n: int, above: list[Array], iterations: int,
          tables: list[np.ndarray], cosine: bool) -> tuple[Array, np.ndarray, np.ndarray, int]:
    """Cluster level by level from the top; what `lloyd` returns, of the last level.

    `tables` has the children of each level's nodes. The nodes of the levels before the last are
    added to `above`.
    """
    xp, where, heads = arrays.namespace(x), arrays.device(x), counted.size
    inside = np.arange(n) < counted[:, None]
    assignment = np.where(inside, np.arange(heads)[:, None], -1).reshape(-1).astype(np.int32)
    rounds, pairs, nodes = np.zeros(heads, np.int64), 0, x[:0, :]
    for depth, children in enumerate(tables):
        own, each = children.size - 1, int(children[-1])
        start, order = kernel.members(assignment, heads * own)
        first = (np.arange(heads)[:, None] * each + children[:-1]).reshape(-1)
        sets = Sets(start[:-1], np.diff(start), first, np.tile(np.diff(children), heads))
        rows = xp.take(x, arrays.from_host(xp, order, where), axis=0)
        start_from = strided_seeds(xp, rows, sets)
        nodes, found, moved, some = lloyd(kernel, rows, start_from, sets, iterations, cosine)
        assignment = np.full_like(assignment, -1)
        assignment[order] = found
        rounds = np.maximum(rounds, moved.reshape(heads, own).max(axis=1, initial=0))
        pairs += some
        if depth + 1 < len(tables):
            above.append(nodes)
    return nodes, assignment, rounds, pairs


def nearest_members(apart: np.ndarray, assignment: np.ndarray, nodes: int) -> np.ndarray:
    """Return the row of each node with the least distance, the first of equals; -1 of none."""
    rows = np.flatnonzero(assignment >= 0)
    order = rows[np.lexsort((apart[rows], assignment[rows]))]
    start = np.searchsorted(assignment[order], np.arange(nodes + 1))
    found = np.full(nodes, -1)
    some = np.diff(start) > 0
    found[some] = order[start[:-1][some]]
    return found


@dataclasses.dataclass(frozen=True)
class SegmentMeansSaved(Saved):
    """The argument of `segment_means`, for its shape and dtype, and who belongs where."""

    x: Array
    assignment: np.ndarray = dataclasses.field(metadata=ON_HOST)
    medoids: np.ndarray | None = dataclasses.field(metadata=ON_HOST)
    counts: np.ndarray = dataclasses.field(metadata=ON_HOST)

    @property
    def decisions(self) -> dict[str, Array]:
        """``clusters``, the assignment, and ``medoids`` if these stand for their clusters."""
        chosen = {"clusters": self.assignment, "medoids": self.medoids}
        return {name: x for name, x in chosen.items() if x is not None}

    def backward(self, dout: Array) -> Any:
        """Gradient of x: each member gets its share of the mean's, or the medoid all of it."""
        *lead, n, width = self.x.shape
        clusters = self.counts.shape[-1]
        require_same_shape("dout", dout, (*lead, clusters, width))
        xp, dy = widened(dout=dout)
        where, heads = arrays.device(dout), math.prod(lead)
        if self.medoids is None:
            size = arrays.from_host(xp, np.maximum(self.counts, 1)[..., None], where)
            dx = _rows_at(xp, xp.reshape(dy / xp.astype(size, dy.dtype), (heads * clusters, width)),
                          self.assignment.reshape(heads, n), clusters)
        else:
            # a token may stand for several clusters
            dx = spread_tokens(xp.reshape(dy, (heads, clusters, width)),
                               self.medoids.reshape(heads, clusters), n)
        return gradients(("x",))(cast_like(xp, xp.reshape(dx, (*lead, n, width)), self.x))


@differentiable
def segment_means(x: Array, assignment: Any, num_clusters: int, *,
                  medoids: Any = None) -> tuple[Array, SegmentMeansSaved]:
    """Mean of the tokens of each cluster, or its medoid.

    E.g. tokens 1, 2, 6 and assignment 0, 1, 0: means 3.5 and 2. With medoids 2 and 1: 6 and 2.

    Parameters
    ----------
    x : array, shape (..., N, D), float16 / bfloat16 / float32 / float64
    assignment : int array, shape (..., N)
        The cluster of each token, on the host; -1 is none, and what such a token holds has no say.
    num_clusters : int, >= 1
        C.
    medoids : int array, shape (..., C), optional
        The token that stands for each cluster instead of its mean; -1 for none.

    Returns
    -------
    array, shape (..., C, D), dtype of `x`
        Zeros for an empty cluster.

    Raises
    ------
    ShapeError, OptionError
        Numbers outside 0 to C - 1 (of medoids: N - 1), or shapes that do not fit.

    Notes
    -----
    O(N D). Sums in float32, or float64 for float64, those of a cluster in the order of its tokens.
    The gradient of a mean spreads to its members, ``1 / count`` each; that of a medoid goes to the
    one token. Which token belongs where is constant. Kept: `x`, for dtype and shape, assignment.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features import segment_means
    >>> y, saved = segment_means.forward(np.array([[1.0], [2.0], [6.0]]), [0, 1, 0], 2)
    >>> y.ravel(), saved.backward(np.ones((2, 1))).x.ravel()
    (array([3.5, 2. ]), array([0.5, 1. , 0.5]))
    """
    num_clusters = require_integer("num_clusters", num_clusters, minimum=1)
    arrays.require_float("x", x)
    if x.ndim < 2:
        raise ShapeError(f"x must be (..., N, D); got {tuple(x.shape)}")
    *lead, n, width = x.shape
    heads, shape = math.prod(lead), tuple(lead)
    assignment = require_numbers("assignment", assignment, (*shape, n), num_clusters)
    xp, wide = widened(x=x)
    kernel = dispatch.kernel("clustering", None, wide)
    wide = xp.reshape(wide, (heads * n, width))
    nodes = over_all_heads(assignment.reshape(heads, n), num_clusters).reshape(-1)
    start, order = kernel.members(nodes, heads * num_clusters)
    counts = np.diff(start)
    if medoids is None:
        size = arrays.from_host(xp, np.maximum(counts, 1)[:, None], arrays.device(x))
        out = kernel.sums(wide, start, order) / xp.astype(size, wide.dtype)
    else:
        medoids = require_numbers("medoids", medoids, (*shape, num_clusters), n)
        out = _rows_at(xp, wide, medoids.reshape(heads, num_clusters), n)
    out = cast_like(xp, xp.reshape(out, (*shape, num_clusters, width)), x)
    return out, SegmentMeansSaved(x, assignment, medoids, counts.reshape(*shape, num_clusters))


def require_numbers(name: str, given: Any, shape: tuple[int, ...], limit: int) -> np.ndarray:
    """Check integers from -1 to below `limit`; int32 of that shape."""
    found = host_array(given)
    if found.dtype.kind not in "iu" and found.size:
        raise DtypeError(f"{name} must hold integers; got {found.dtype}")
    if found.shape != shape:
        raise ShapeError(f"{name} must be {shape}; got {found.shape}")
    if found.size and not (found.min() >= -1 and found.max() < limit):
        raise OptionError(f"{name} must lie in -1..{limit - 1}; got {found.min()}..{found.max()}")
    return found.astype(np.int32)


def over_all_heads(numbers: np.ndarray, each: int) -> np.ndarray:
    """Return numbers (heads, n) within heads as numbers over all heads, int32; -1 stays."""
    first = np.arange(len(numbers), dtype=np.int64)[:, None] * each
    return np.where(numbers >= 0, numbers + first, -1).astype(np.int32)


def _rows_at(xp: Any, x: Array, index: np.ndarray, each: int) -> Array:
    """Return rows of `x` (heads * each, D) at `index` (heads, n); zeros where that is -1."""
    rows, where = over_all_heads(index, each).reshape(-1), arrays.device(x)
    if not x.shape[0] or not rows.size:
        return xp.zeros((rows.size, x.shape[1]), dtype=x.dtype, device=where)
    found = xp.take(x, arrays.from_host(xp, np.maximum(rows, 0), where), axis=0)
    if (rows >= 0).all():
        return found
    return xp.where(arrays.from_host(xp, (rows >= 0)[:, None], where), found,
                    xp.zeros_like(found))


@dataclasses.dataclass(frozen=True)
class Centroids:
    """Centroids and the running counts and sums they come from; see `update_centroids`."""

    centroids: Array
    """(..., C, D)."""
    counts: Array
    """(..., C): running number of tokens."""
    sums: Array
    """(..., C, D): running sum of tokens."""

    @classmethod
    def of(cls, centroids: Array) -> Centroids:
        """Start from centroids as if each stood for one token."""
        xp, wide = widened(centroids=centroids)
        return cls(wide, xp.ones_like(wide[..., 0]), wide)


def update_centroids(state: Centroids | Array, x: Array, assignment: Any, *, decay: float = 0.999,
                     form: str = "counts", epsilon: float = 1e-5) -> Centroids:
    """Move centroids towards the tokens of a batch: an exponential moving average.

    ``form="counts"``: counts n and sums s both decay, ``n <- l n + (1 - l) count`` and
    ``s <- l s + (1 - l) sum``; a centroid is s / n', with n' the counts smoothed by `epsilon`.
    ``form="directions"``: ``c <- l c + (1 - l) mean / |mean|``. E.g. one cluster at 2 (n = 1,
    s = 2), tokens 4 and 6, l = 0.5: n = 1.5, s = 6, the centroid is 4.

    Parameters
    ----------
    state : Centroids, or array, shape (..., C, D)
        What an earlier call returned; or centroids to start from, by `Centroids.of`.
    x : array, shape (..., N, D), floating point
        Tokens; may have more leading axes than the centroids, which are summed over.
    assignment : int array, shape (..., N)
        The cluster of each token, on the host; -1 for padding, which is left out.
    decay : float in [0, 1]
        l: how much of the old remains.
    form : "counts" or "directions"
        That of google-research's Routing Transformer and of VQ-VAE, or that of lucidrains'.
    epsilon : float >= 0
        Smooths counts: ``n' = (n + epsilon) / (sum + C epsilon) * sum``, sum over the head's n.

    Returns
    -------
    Centroids
        New arrays, float32 or float64; nothing is written to. The state changes only here, so a
        recomputed forward leaves it alone.

    Raises
    ------
    ShapeError, OptionError
        Arguments that do not fit.

    Notes
    -----
    O(N D). A cluster without a token in the batch keeps its centroid, while counts and sums decay.
    Data parallel training adds up counts and sums over the batches first: give it all tokens.

    References
    ----------
    .. [1] Roy et al., "Efficient Content-Based Sparse Attention with Routing Transformers", 2020,
       arXiv:2003.05997, section 4.
    .. [2] van den Oord et al., "Neural Discrete Representation Learning", 2017, arXiv:1711.00937,
       appendix A.1.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features import update_centroids
    >>> new = update_centroids(np.array([[2.0]]), np.array([[4.0], [6.0]]), [0, 0], decay=0.5)
    >>> new.centroids, new.counts, new.sums
    (array([[4.]]), array([1.5]), array([[6.]]))
    """
    decay, epsilon = require_real("decay", decay), require_real("epsilon", epsilon)
    require_choice("form", form, ("counts", "directions"))
    if not 0 <= decay <= 1:
        raise OptionError(f"decay must lie in 0..1; got {decay}")
    if epsilon < 0:
        raise OptionError(f"epsilon must be at least 0; got {epsilon}")
    arrays.require_float("x", x)
    if not isinstance(state, Centroids):
        arrays.require_float("state", state)
        if state.ndim < 2:
            raise ShapeError(f"state must be (..., C, D); got {tuple(state.shape)}")
        state = Centroids.of(state)
    xp, old, n, s, wide = widened(centroids=state.centroids, counts=state.counts, sums=state.sums,
                                  x=x)
    *lead, clusters, width = old.shape
    extra = x.ndim - old.ndim
    if extra < 0 or tuple(x.shape[extra:-2]) != tuple(lead) or x.shape[-1] != width:
        raise ShapeError(f"x must be (..., N, D) with the leading axes and the width of the "
                         f"centroids {tuple(old.shape)}; got {tuple(x.shape)}")
    given = require_numbers("assignment", assignment, tuple(x.shape[:-1]), clusters)
    kernel = dispatch.kernel("clustering", None, wide)
    nodes = _shared_nodes(given, tuple(old.shape))
    start, order = kernel.members(nodes, math.prod(lead) * clusters)
    total = kernel.sums(xp.reshape(wide, (nodes.size, width)), start, order)
    total = xp.reshape(total, tuple(old.shape))
    found = arrays.from_host(xp, np.diff(start).reshape(*lead, clusters), arrays.device(x))
    count = xp.astype(found, old.dtype)
    seen = (found > 0)[..., None]
    n = decay * n + (1 - decay) * count
    s = decay * s + (1 - decay) * total
    if form == "counts":
        everything = xp.sum(n, axis=-1, keepdims=True)
        smooth = (n + epsilon) / (everything + clusters * epsilon) * everything
        new = s / xp.where(smooth > 0, smooth, xp.ones_like(smooth))[..., None]
    else:
        new = decay * old + (1 - decay) * unit_rows(xp, total)
    return Centroids(xp.where(seen, new, old), n, s)


@dataclasses.dataclass(frozen=True)
class CommitmentLossSaved(Saved):
    """The arguments of `commitment_loss`."""

    x: Array
    centroids: Array
    assignment: np.ndarray = dataclasses.field(metadata=ON_HOST)
    beta: float
    codebook: float

    @property
    def decisions(self) -> dict[str, Array]:
        """``clusters``: the assignment."""
        return {"clusters": self.assignment}

    def backward(self, dout: Array | float = 1.0) -> Any:
        """Gradients of x, towards its centroids, and of these, zeros unless `codebook` is given."""
        xp, apart, size = _apart(self.x, self.centroids, self.assignment)
        shape = tuple(self.centroids.shape)
        kernel = dispatch.kernel("clustering", None, apart)
        nodes = _shared_nodes(self.assignment, shape)
        start, order = kernel.members(nodes, math.prod(shape[:-1]))
        pulled = kernel.sums(xp.reshape(apart, (nodes.size, shape[-1])), start, order)
        pull = 2 * dout / size
        dx = cast_like(xp, self.beta * pull * apart, self.x)
        dcentroids = xp.reshape(-self.codebook * pull * pulled, shape)
        return gradients(("x", "centroids"))(dx, cast_like(xp, dcentroids, self.centroids))


@differentiable
def commitment_loss(x: Array, centroids: Array, assignment: Any, *, beta: float = 1e-4,
                    codebook: float = 0.0) -> tuple[Array, CommitmentLossSaved]:
    """Mean squared distance of tokens to their centroids: it draws tokens to their clusters.

    ``loss = beta mean |x - sg(c)|^2 + codebook mean |sg(x) - c|^2``, means over the numbers of all
    tokens that are no padding; sg(...) counts as constant. E.g. tokens 1 and 4 with centroids 0 and
    2, beta = 1: (1 + 4) / 2 = 2.5, and the gradient of x is (1, 2).

    Parameters
    ----------
    x : array, shape (..., N, D), floating point
        Tokens; may have more leading axes than the centroids.
    centroids : array, shape (..., C, D)
    assignment : int array, shape (..., N)
        The cluster of each token, on the host; -1 for padding.
    beta : float
        Weight of the tokens' part.
    codebook : float
        Weight of the centroids' part, for centroids that are learned; 0 for those moved by
        `update_centroids`, and then they have no gradient.

    Returns
    -------
    array, shape (), float32, or float64 if an argument is
        0 if there are no tokens.

    Raises
    ------
    ShapeError, OptionError
        Arguments that do not fit.

    Notes
    -----
    O(N D). Kept for backward: the arguments. Gradients: ``dx = 2 beta (x - c) / numel`` and
    ``dc = 2 codebook sum(c - x) / numel`` over a cluster's tokens.

    References
    ----------
    .. [1] van den Oord et al., "Neural Discrete Representation Learning", 2017, arXiv:1711.00937,
       equation 3.
    .. [2] Roy et al., 2020, arXiv:2003.05997, section 4.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features import commitment_loss
    >>> x, centroids = np.array([[1.0], [4.0]]), np.array([[0.0], [2.0]])
    >>> loss, saved = commitment_loss.forward(x, centroids, [0, 1], beta=1.0)
    >>> float(loss), saved.backward(1.0).x.ravel()
    (2.5, array([1., 2.]))
    """
    beta, codebook = require_real("beta", beta), require_real("codebook", codebook)
    arrays.require_float("x", x)
    arrays.require_float("centroids", centroids)
    if centroids.ndim < 2:
        raise ShapeError(f"centroids must be (..., C, D); got {tuple(centroids.shape)}")
    extra = x.ndim - centroids.ndim
    if extra < 0 or (*x.shape[extra:-2], x.shape[-1]) != (*centroids.shape[:-2],
                                                          centroids.shape[-1]):
        raise ShapeError(f"x must be (..., N, D) with the leading axes and the width of the "
                         f"centroids {tuple(centroids.shape)}; got {tuple(x.shape)}")
    given = require_numbers("assignment", assignment, tuple(x.shape[:-1]), centroids.shape[-2])
    xp, apart, size = _apart(x, centroids, given)
    loss = (beta + codebook) * xp.sum(apart * apart) / size
    return loss, CommitmentLossSaved(x, centroids, given, beta, codebook)


def _apart(x: Array, centroids: Array, assignment: np.ndarray) -> tuple[Any, Array, int]:
    """Return the namespace, x - centroid with zeros at padding, and how many numbers count."""
    xp, wide, near = widened(x=x, centroids=centroids)
    where, width = arrays.device(x), x.shape[-1]
    flat = xp.reshape(near, (math.prod(near.shape[:-1]), width))
    real = assignment >= 0
    index = np.maximum(_shared_nodes(assignment, tuple(near.shape)), 0)
    if not index.size:
        return xp, wide, 1
    own = xp.reshape(xp.take(flat, arrays.from_host(xp, index, where), axis=0), tuple(x.shape))
    apart = wide - own
    if not real.all():
        apart = xp.where(arrays.from_host(xp, real[..., None], where), apart, xp.zeros_like(apart))
    return xp, apart, max(1, int(real.sum()) * width)


def _shared_nodes(assignment: np.ndarray, centroids: tuple[int, ...]) -> np.ndarray:
    """Return the node of each token, int32 (all of them,), where batch items share centroids."""
    *lead, clusters, _ = centroids
    first = clusters * np.arange(math.prod(lead)).reshape(*lead, 1)
    return np.where(assignment >= 0, assignment + first, -1).astype(np.int32).reshape(-1)
