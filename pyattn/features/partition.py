"""Binary partitions of a sequence: a tree of spans, and which of them a token attends to.

Level 0 has the n tokens, level j the spans of 2^j tokens (the last may be shorter), up to a root.
Nodes are numbered level by level: n = 5 has nodes 0-4, then {0, 1} {2, 3} {4} as 5-7, {0-3} {4} as
8-9, and the root {0-4} as 10. Letters: n tokens, D width.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..checks import ShapeError
from ..differentiable import Saved, differentiable, gradients
from .precision import cast_like, require_same_shape, widened


def level_sizes(n: int) -> list[int]:
    """Return how many nodes each level has.

    Examples
    --------
    >>> from pyattn.features.partition import level_sizes
    >>> level_sizes(5), level_sizes(1), level_sizes(0)
    ([5, 3, 2, 1], [1], [])
    """
    sizes = [n] if n else []
    while sizes and sizes[-1] > 1:
        sizes.append((sizes[-1] + 1) // 2)
    return sizes


def node_counts(n: int) -> np.ndarray:
    """Return how many tokens each node holds, int64 (nodes,).

    Examples
    --------
    >>> from pyattn.features.partition import node_counts
    >>> node_counts(5)
    array([1, 1, 1, 1, 1, 2, 2, 1, 4, 1, 5])
    """
    found = [np.zeros(0, np.int64)]
    for level, size in enumerate(level_sizes(n)):
        ends = np.minimum(np.arange(size + 1, dtype=np.int64) << level, n)
        found.append(np.diff(ends))
    return np.concatenate(found)


@dataclasses.dataclass(frozen=True, eq=False)
class Partition:
    """Which nodes each token attends to; made by `partition`."""

    start: np.ndarray
    """int64 (n + 1,): offsets into the others."""
    node: np.ndarray
    """int32 (edges,): ascending and distinct within a token."""
    kind: np.ndarray
    """int32 (edges,): ``(2 step + 1) level + r``: r is 0 for the token itself, and 2 s + 1 for the
    node s on the left, 2 s + 2 for that on the right, counted from 0 outward."""
    counts: np.ndarray
    """int64 (nodes,): how many tokens each node holds."""


@functools.lru_cache(maxsize=16)
def partition(n: int, step: int, causal: bool) -> Partition:
    """Partition the n tokens, as each of them sees them, into nodes: the farther, the larger.

    A token takes itself; then, on each level from the tokens up, `step` nodes to its left and,
    unless it is causal, to its right. Where the next node's inner half has been taken before,
    the other half stands for it, one level below.

    Parameters
    ----------
    n : int
    step : int >= 1
    causal : bool

    Returns
    -------
    Partition
        The nodes of token i partition 0..n - 1, or with `causal` 0..i.

    Notes
    -----
    O(step n log(n / step)) time and edges. Differs from the paper's code in one place: on a level
    of odd size the last node's right half does not exist; the code takes the next level's first
    node for it, here there is no edge.

    References
    ----------
    .. [1] Ye et al., "BP-Transformer: Modelling Long-Range Context via Binary Partitioning", 2019,
       arXiv:1911.04070, section 3.1; edges and their kinds are those of its code.

    Examples
    --------
    >>> from pyattn.features.partition import partition
    >>> found = partition(5, 1, False)
    >>> [found.node[a:b].tolist() for a, b in zip(found.start[:-1], found.start[1:])]
    [[0, 1, 6, 9], [0, 1, 2, 3, 9], [0, 1, 2, 3, 7], [2, 3, 4, 5], [2, 3, 4, 5]]
    """
    sizes, counts = level_sizes(n), node_counts(n)
    first = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
    token = np.arange(n)
    tokens, nodes, kinds = [token], [token], [np.zeros(n, np.int64)]

    def add(there: np.ndarray, node: np.ndarray, kind: int) -> None:
        tokens.append(token[there])
        nodes.append(node[there])
        kinds.append(np.full(len(tokens[-1]), kind))

    left, right = token - 1, token + 1
    # whether the inner half of the next node has been taken
    half_left = half_right = np.zeros(n, bool)
    for level, size in enumerate(sizes):
        below = first[level - 1] if level else 0
        for s in range(step):
            kind = (2 * step + 1) * level + 2 * s
            node = np.where(half_left, below + 2 * left, first[level] + left)
            add(left >= 0, node, kind + 1)
            if not causal:
                outer = 2 * right + 1
                missing = half_right & (outer >= (sizes[level - 1] if level else 0))
                node = np.where(half_right, below + outer, first[level] + right)
                add((right < size) & ~missing, node, kind + 2)
            half_left = half_right = np.zeros(n, bool)
            left, right = left - 1, right + 1
        half_left, half_right = left % 2 == 0, right % 2 == 1
        left, right = left >> 1, right >> 1
    row, node = np.concatenate(tokens), np.concatenate(nodes)
    order = np.argsort(row * max(1, len(counts)) + node)
    start = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=n), dtype=np.int64)])
    found = Partition(start.astype(np.int64), node[order].astype(np.int32),
                      np.concatenate(kinds)[order].astype(np.int32), counts)
    for x in (found.start, found.node, found.kind, found.counts):
        x.flags.writeable = False
    return found


@dataclasses.dataclass(frozen=True)
class SpanMeansSaved(Saved):
    """The argument of `span_means`, for its shape and dtype."""

    x: Array

    def backward(self, dout: Array) -> Any:
        """Gradient of x: a token has its share of every span that it is in."""
        n = self.x.shape[-2]
        counts = node_counts(n)
        require_same_shape("dout", dout, (*self.x.shape[:-2], len(counts), self.x.shape[-1]))
        xp, dy = widened(dout=dout)
        dy = dy / _column(xp, counts, dy)
        sizes = level_sizes(n)
        end, dsum = len(counts), None
        # forward: the sum of a span is that of its two halves
        for size in reversed(sizes):
            own = dy[..., end - size:end, :]
            end -= size
            dsum = own if dsum is None else own + xp.repeat(dsum, 2, axis=-2)[..., :size, :]
        dx = dy if dsum is None else dsum
        return gradients(("x",))(cast_like(xp, dx, self.x))


@differentiable
def span_means(x: Array) -> tuple[Array, SpanMeansSaved]:
    """Means of all spans of a binary partition, the tokens themselves first.

    Parameters
    ----------
    x : array, shape (..., n, D), float16 / bfloat16 / float32 / float64

    Returns
    -------
    array, shape (..., nodes, D), dtype of `x`
        Fewer than ``2 n + log2 n`` nodes.

    Raises
    ------
    ShapeError
        `x` has fewer than two axes.

    Notes
    -----
    O(n D). Sums in float32, or float64 for float64. Kept for backward: the argument.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features.partition import span_means
    >>> span_means(np.array([[0.], [2.], [7.]])).ravel()
    array([0., 2., 7., 1., 7., 3.])
    """
    arrays.require_float("x", x)
    if x.ndim < 2:
        raise ShapeError(f"x must be (..., n, D); got {tuple(x.shape)}")
    xp, level = widened(x=x)
    levels: list[Array] = []
    for size in level_sizes(x.shape[-2]):
        if levels:
            if level.shape[-2] % 2:
                level = xp.concat([level, xp.zeros_like(level[..., :1, :])], axis=-2)
            level = level[..., ::2, :] + level[..., 1::2, :]
        levels.append(level[..., :size, :])
    if not levels:
        return x, SpanMeansSaved(x)
    sums = xp.concat(levels, axis=-2)
    means = sums / _column(xp, node_counts(x.shape[-2]), sums)
    return cast_like(xp, means, x), SpanMeansSaved(x)


def _column(xp: Any, counts: np.ndarray, like: Array) -> Array:
    return xp.astype(arrays.from_host(xp, counts[:, None], arrays.device(like)), like.dtype)
