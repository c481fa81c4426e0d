"""Lloyd's iterations where the tokens live: nothing is brought to the host on the way.

So they are not ended when nothing changes any more: what is settled is computed once more and kept.
Rows with equal distances keep their order in all sorts, so the result is that of the loops on the
host in `clustering`. Letters: T rows, of S sets, K nodes, D width.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from .precision import unit_rows


@dataclasses.dataclass(frozen=True)
class Crowd:
    """Rows in sets, each of which has nodes of its own to choose from."""

    kernel: Any
    x: Array
    """(T, D)."""
    owner: Array
    """int32 (T,): the set of each row, -1 for none."""
    counts: np.ndarray
    """(S,): how many nodes each set has, at least 1; they follow one another."""
    each: int | None
    """Rows of a set, where row r is of set ``r // each`` or of none and all sets have equally many
    nodes; else None."""
    cosine: bool
    """Whether nodes are of unit length."""

    @property
    def xp(self) -> Any:
        """The rows' namespace."""
        return arrays.namespace(self.x)

    @property
    def nodes(self) -> int:
        """K."""
        return int(self.counts.sum())

    @property
    def most(self) -> int:
        """How many rows a node can have."""
        return self.x.shape[0] if self.each is None else self.each

    def there(self, x: np.ndarray) -> Array:
        """Copy numbers of the host to where the rows are."""
        return arrays.from_host(self.xp, x.astype(np.int32), arrays.device(self.x))

    @functools.cached_property
    def node_set(self) -> Array:
        """The set of each node, int32 (K,)."""
        return self.there(np.repeat(np.arange(self.counts.size), self.counts))

    @functools.cached_property
    def set_nodes(self) -> tuple[Array, Array]:
        """The first node of each set, and how many it has, int32 (S,)."""
        return self.there(np.cumsum(self.counts) - self.counts), self.there(self.counts)

    @functools.cached_property
    def of_row(self) -> Array:
        """The set of each row, 0 for those of none, which is an index."""
        return self.xp.where(self.owner < 0, 0, self.owner)

    @functools.cached_property
    def by_set(self) -> tuple[Array, Array]:
        """The rows set by set: where each set begins, (S + 1,), and the rows."""
        return self.kernel.members(self.owner, self.counts.size)


def lloyd(crowd: Crowd, nodes: Array | None, iterations: int) -> tuple[Array, Array, Array]:
    """Cluster the rows of each set, from strided rows if no nodes are given.

    Returns the nodes (K, D), the assignment, int32 (T,), -1 for rows of no set, and how often the
    nodes of each set moved, int32 (S,).
    """
    xp, where = crowd.xp, arrays.device(crowd.x)
    nodes = seeds(crowd) if nodes is None else nodes
    assignment = xp.full_like(crowd.owner, -1)
    active = xp.ones(crowd.counts.size, dtype=xp.bool, device=where)
    rounds = xp.zeros(crowd.counts.size, dtype=xp.int32, device=where)
    if not crowd.x.shape[0] or not crowd.counts.size:
        return nodes, assignment, rounds
    for _ in range(iterations):
        found = with_no_node_empty(crowd, nodes, nearest(crowd, nodes))
        found = xp.where(xp.take(active, crowd.of_row), found, assignment)
        active = active & (count_by_set(crowd, found != assignment) > 0)
        assignment = found
        rounds = rounds + xp.astype(active, xp.int32)
        nodes = _moved(crowd, nodes, assignment, active)
    found = nearest(crowd, nodes)
    return nodes, xp.where(xp.take(active, crowd.of_row), found, assignment), rounds


def seeds(crowd: Crowd) -> Array:
    """Return rows ``floor(c * rows / nodes)`` of each set; zeros for a set without rows."""
    xp, (start, order) = crowd.xp, crowd.by_set
    if not crowd.x.shape[0]:
        return xp.zeros((crowd.nodes, crowd.x.shape[1]), dtype=crowd.x.dtype,
                        device=arrays.device(crowd.x))
    place = np.arange(crowd.nodes) - np.repeat(np.cumsum(crowd.counts) - crowd.counts, crowd.counts)
    first = xp.take(start, crowd.node_set)
    size = xp.take(start, crowd.node_set + 1) - first
    rank = crowd.there(place) * size // crowd.there(np.repeat(crowd.counts, crowd.counts))
    row = xp.take(order, xp.where(size > 0, first + rank, 0))
    found = xp.take(crowd.x, row, axis=0)
    return xp.where((size > 0)[:, None], found, xp.zeros_like(found))


def nearest(crowd: Crowd, nodes: Array) -> Array:
    """Return the nearest node of each row, the first of equals; -1 for rows of no set."""
    xp, (first, count) = crowd.xp, crowd.set_nodes
    # |x - c|^2 is least where x.c - |c|^2 / 2 is largest; angles go by x.c alone
    shifts = xp.zeros_like(nodes[:, 0]) if crowd.cosine else xp.sum(nodes * nodes, axis=1) / 2
    first = xp.take(first, crowd.of_row)
    if crowd.each is None:
        found = crowd.kernel.nearest_of_few(crowd.x, nodes, shifts, first,
                                            xp.take(count, crowd.of_row), int(crowd.counts.max()))
    else:
        sets = crowd.counts.size
        own = crowd.kernel.nearest(
            xp.reshape(crowd.x, (sets, crowd.each, crowd.x.shape[1])),
            xp.reshape(nodes, (sets, crowd.nodes // sets, nodes.shape[1])),
            xp.reshape(shifts, (sets, crowd.nodes // sets)))
        found = first + xp.reshape(own, crowd.owner.shape)
    return xp.where(crowd.owner < 0, -1, found)


def count_by_set(crowd: Crowd, flags: Array) -> Array:
    """Count the rows of each set for which a flag, bool (T,), is set."""
    start, order = crowd.by_set
    return _between(crowd.xp, _set_before(crowd.xp, crowd.xp.take(flags, order)), start)


def _set_before(xp: Any, flags: Array) -> Array:
    """Return how many flags are set before each place, int32 (T + 1,)."""
    return xp.cumulative_sum(xp.astype(flags, xp.int32), dtype=xp.int32, include_initial=True)


def _between(xp: Any, before: Array, start: Array) -> Array:
    """Return how much is added from the start of each part to that of the next."""
    return xp.take(before, start[1:]) - xp.take(before, start[:-1])


def with_no_node_empty(crowd: Crowd, nodes: Array, found: Array) -> Array:
    """Give each empty node, in order, the row of its set that is farthest from its own node.

    A row that is the last of its node is not taken, nor one that lies where its node is.
    """
    xp, kernel, (set_start, _) = crowd.xp, crowd.kernel, crowd.by_set
    apart = kernel.distances(crowd.x, nodes, found)
    far = apart > 0
    falling = xp.argsort(xp.where(far, -apart, xp.zeros_like(apart)), stable=True)
    # the rows of each set, the farthest first; and of these, those of each node
    rows = xp.take(falling, xp.argsort(xp.take(crowd.owner, falling), stable=True))
    own = xp.take(found, rows)
    start, by_node = kernel.members(own, crowd.nodes)
    ends = xp.take(own, by_node)
    last = xp.concat([ends[1:] != ends[:-1], xp.ones_like(ends[:1], dtype=xp.bool)])
    spare = ~xp.take(last, xp.argsort(by_node)) & xp.take(far, rows) & (own >= 0)

    empty = start[1:] == start[:-1]
    node_start = xp.concat([crowd.set_nodes[0], crowd.set_nodes[0][:1] * 0 + crowd.nodes])
    empties, taken = _set_before(xp, empty), _set_before(xp, spare)
    wanted = _between(xp, empties, node_start)
    # the rank of a spare row among those of its set is that of the empty node it goes to
    row_set = xp.take(crowd.of_row, rows)
    rank = taken[:-1] - xp.take(xp.take(taken, set_start[:-1]), row_set)
    goes = spare & (rank < xp.take(wanted, row_set))
    rank = rank + xp.take(xp.take(empties, node_start[:-1]), row_set)
    empty_first = xp.argsort(xp.astype(~empty, xp.int32), stable=True)
    node = xp.take(empty_first, xp.where(goes, rank, 0))
    own = xp.where(goes, xp.astype(node, own.dtype), own)
    return xp.take(own, xp.argsort(rows))


def _moved(crowd: Crowd, nodes: Array, assignment: Array, active: Array) -> Array:
    """Return the nodes of active sets at the means of their members, the others where they were."""
    xp = crowd.xp
    start, order = crowd.kernel.members(assignment, crowd.nodes)
    count = start[1:] - start[:-1]
    # summed around one of them, so that equal members have a mean that is exactly theirs
    first = xp.take(crowd.x, xp.take(order, xp.where(count > 0, start[:-1], 0)), axis=0)
    around = crowd.x - xp.take(first, xp.where(assignment < 0, 0, assignment), axis=0)
    total = crowd.kernel.sums(around, start, order, most=crowd.most)
    mean = first + total / xp.astype(xp.where(count > 0, count, 1), total.dtype)[:, None]
    moves = (xp.take(active, crowd.node_set) & (count > 0))[:, None]
    if crowd.cosine:
        mean = unit_rows(xp, mean)
        moves = moves & xp.any(mean != 0, axis=1, keepdims=True)
    return xp.where(moves, mean, nodes)


def nearest_members(kernel: Any, apart: Array, assignment: Array, nodes: int) -> Array:
    """Return the row of each node with the least distance, int32 (K,), the first; -1 of none."""
    xp = arrays.namespace(apart)
    if not apart.shape[0]:
        return xp.full((nodes,), -1, dtype=xp.int32, device=arrays.device(apart))
    # sorts put what is not a number anywhere
    rising = xp.argsort(xp.where(apart >= 0, apart, xp.full_like(apart, float("inf"))), stable=True)
    start, order = kernel.members(xp.take(assignment, rising), nodes)
    some = start[1:] > start[:-1]
    row = xp.take(rising, xp.take(order, xp.where(some, start[:-1], 0)))
    return xp.astype(xp.where(some, row, -1), xp.int32)
