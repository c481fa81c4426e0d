"""BP-Transformer: what is far is attended to in larger and larger spans."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..checks import (
    ShapeError,
    require_flag,
    require_integer,
    require_real,
)
from ..differentiable import Saved, differentiable, gradients
from ..engines import edges as engine
from ..engines.edges import Edges, EdgesSaved
from ..engines.softmax import require_operands
from ..features.partition import SpanMeansSaved, partition, span_means
from ..features.precision import cast_like, widened


@dataclasses.dataclass(frozen=True)
class Lists:
    """The edges of a call, and what is known of each of them; shared by calls of one shape."""

    edges: Edges
    kind: np.ndarray
    """int64 (edges,): see `pyattn.features.partition.Partition`."""
    log_counts: np.ndarray
    """float64 (edges,): of the node's tokens."""
    step: int
    """At most m: more nodes than there are need no kinds."""
    levels: int

    @property
    def kinds(self) -> int:
        """How many kinds there are."""
        return (2 * self.step + 1) * self.levels

    @property
    def places(self) -> np.ndarray:
        """Where in an array (N, kinds) the edges are, int64 (edges,)."""
        return self.edges.query * np.int64(self.kinds) + self.kind


@functools.lru_cache(maxsize=8)
def lists_of(n: int, m: int, step: int, causal: bool, batch: int, heads: int) -> Lists:
    """Make the lists of the last n of m tokens."""
    step = min(step, max(1, m))
    found = partition(m, step, causal)
    first = int(found.start[m - n])
    start, own = found.start[m - n:] - first, slice(first, None)
    edges = Edges(start[None], found.node[own], np.zeros((batch, heads), np.int32),
                  len(found.counts))
    kind = found.kind[own].astype(np.int64)
    return Lists(edges, kind, np.log(found.counts)[found.node[own]], step,
                 int(kind.max(initial=0)) // (2 * step + 1) + 1)


@dataclasses.dataclass(frozen=True)
class BpSaved(Saved):
    """The engine's record over the nodes, and how these were made of the tokens."""

    attended: EdgesSaved
    pooled_k: SpanMeansSaved
    pooled_v: SpanMeansSaved
    edge_bias: Array | None
    lists: Lists
    step: int

    @property
    def stats(self) -> dict[str, int]:
        """Those of the engine; a span counts as one key."""
        return self.attended.stats

    def backward(self, dout: Array, dlse: Array | None = None) -> Any:
        """Gradients of q, k, v, and of edge_bias where it was given."""
        found = self.attended.backward(dout, dlse)._asdict()
        dbias = found.pop("bias", None)
        for name, pooled in (("k", self.pooled_k), ("v", self.pooled_v)):
            found[name] = pooled.backward(found[name]).x
        if self.edge_bias is not None:
            xp, q, table = widened(q=self.attended.q, edge_bias=self.edge_bias)
            lists, where = self.lists, arrays.device(q)
            # forward: bias[e] = by_kind[query[e], kind[e]]; no query has a kind twice
            edge = np.full(q.shape[-2] * lists.kinds, len(lists.kind))
            edge[lists.places] = np.arange(len(lists.kind))
            dbias = xp.astype(dbias, q.dtype)
            none = xp.zeros((*dbias.shape[:2], 1), dtype=q.dtype, device=where)
            dby_kind = xp.take(xp.concat([dbias, none], axis=2),
                               arrays.from_host(xp, edge, where), axis=2)
            # forward: by_kind = scale q a'
            dproduct = self.attended.scale * xp.reshape(
                dby_kind, (*self.attended.lse.shape, lists.kinds))
            dq = _summed(xp, xp.matmul(dproduct, _by_kind(table, lists, self.step)), q.shape)
            found["q"] = cast_like(xp, xp.astype(found["q"], q.dtype) + dq, self.attended.q)
            dtable = xp.matmul(xp.matrix_transpose(dproduct), q)
            dtable = xp.sum(dtable, axis=tuple(range(dtable.ndim - 2)))
            found["edge_bias"] = cast_like(xp, _by_row(dtable, table, lists, self.step),
                                           self.edge_bias)
        return gradients(tuple(found))(**found)


@differentiable
def bp_attention(q: Array, k: Array, v: Array, edge_bias: Array | None = None, *, step: int,
                 log_size: bool = True, causal: bool = False, scale: float | None = None,
                 return_lse: bool = False) -> tuple[Any, BpSaved]:
    """Attention to near tokens one by one, and to far ones in spans that double with distance.

    The tokens are the leaves of a binary tree; a span node's key and value are the means of its
    leaves'. A query attends to itself and, on each level from the leaves up, to `step` nodes on
    either side of what it has covered: together they hold every token once. Where the nearer half
    of the next node is covered already, only the other half is taken. E.g. ``step=1`` and eight
    tokens: 0->{0, 1, 2-3, 4-7}  2->{2, 1, 3, 0, 4-5, 6-7}  5->{5, 4, 6, 2-3, 7, 0-1}; with
    ``causal=True``: 2->{2, 1, 0}  5->{5, 4, 2-3, 0-1}.

    Parameters
    ----------
    q : array, shape (..., H, N, D), float16, bfloat16, float32 or float64
        Queries: those of the last N of the M tokens.
    k : array, shape (..., G, M, D), dtype of `q`
        Keys; G divides H, and M is at least N.
    v : array, shape (..., G, M, E), dtype of `q`
        Values.
    edge_bias : array, shape (T, D), any float dtype, optional
        An embedding a for each kind of edge, shared by the heads: the score is ``scale * q .
        (key + a)``. The kinds of a level are ``(2 step + 1) level + r`` with r = 0 for the token
        itself, and for s = 0, 1, ... outward ``2 s + 1`` on the left and ``2 s + 2`` on the right.
        T is a multiple of ``2 step + 1``; levels that it does not reach have the kinds of its last
        level. Half a node has the level of that node.
    step : int >= 1
        How many nodes are taken on each side of each level.
    log_size : bool
        Add the logarithm of its number of tokens to a node's score, so that a mean weighs as much
        as the tokens it stands for.
    causal : bool
        Only to the left: what a query sees are the tokens up to its own position, ``i + M - N``.
    scale : float, optional
        Multiplies the scores. Default ``D ** -0.5``.
    return_lse : bool
        Also return the log-sum-exp of each row, (..., H, N).

    Returns
    -------
    array, shape (..., H, N, E), dtype of `q`
        With `return_lse` a tuple, as for `pyattn.attention`.

    Raises
    ------
    ShapeError, DtypeError, OptionError
        Arguments that do not fit; the message names the argument, the rule and what was given.

    Notes
    -----
    Some ``2 step log2(N / step)`` nodes a query, half with `causal`: O(step N log(N / step) (D +
    E)) time. Kept for backward: the arguments, keys and values with the means behind them, with
    `edge_bias` a number for each edge and head, the output and the log-sum-exp.
    Differs from the paper [1]_: there span nodes are states of their own, which start at zero and
    attend to their leaves in every layer; here, within one call, they are means, and the default
    ``log_size=True`` makes equal keys in each span give what dense attention gives. Kinds of edges
    are those of the paper's code, where edges to halves that do not exist, on levels of odd size,
    lead to a node elsewhere; here they are left out.

    References
    ----------
    .. [1] Ye et al., "BP-Transformer: Modelling Long-Range Context via Binary Partitioning", 2019,
       arXiv:1911.04070, sections 3.1 and 3.2.

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 12, 8))
    >>> out, saved = pyattn.bp_attention.forward(q, k, v, step=2)
    >>> out.shape, saved.stats["pairs"]
    ((2, 12, 8), 196)
    >>> np.allclose(pyattn.bp_attention(q, k, v, step=12), pyattn.attention(q, k, v))
    True
    """
    step = require_integer("step", step, minimum=1)
    causal, log_size = require_flag("causal", causal), require_flag("log_size", log_size)
    batch = require_operands(q, k, v)
    (heads, n, d), m = q.shape[-3:], k.shape[-2]
    if n > m:
        raise ShapeError(f"k and v must have as many tokens as q at least; got {n} queries and "
                         f"{m} keys")
    scale = d ** -0.5 if scale is None else require_real("scale", scale)
    lists = lists_of(n, m, step, causal, math.prod(batch), heads)
    bias = None
    if log_size:
        xp = arrays.namespace(k)
        logs = arrays.from_host(xp, lists.log_counts[None, None], arrays.device(k))
        bias = xp.astype(logs, arrays.accumulator(xp, k))
    if edge_bias is not None:
        arrays.require_float("edge_bias", edge_bias)
        if edge_bias.ndim != 2 or edge_bias.shape[1] != d or not edge_bias.shape[0] or (
                edge_bias.shape[0] % (2 * step + 1)):
            raise ShapeError(f"edge_bias must be (T, {d}), T a multiple of 2 step + 1 = "
                             f"{2 * step + 1}; got {tuple(edge_bias.shape)}")
        own = _bias(q, edge_bias, lists, step, scale, batch)
        bias = own if bias is None else own + bias
    nodes_k, pooled_k = span_means.forward(k)
    nodes_v, pooled_v = span_means.forward(v)
    out, attended = engine.forward(q, nodes_k, nodes_v, lists.edges, bias=bias, scale=scale,
                                   return_lse=return_lse)
    return out, BpSaved(attended, pooled_k, pooled_v, edge_bias, lists, step)


def _bias(q: Array, edge_bias: Array, lists: Lists, step: int, scale: float,
          batch: tuple[int, ...]) -> Array:
    """What the embeddings add to each edge's score, (B, H, edges)."""
    arrays.require_same_device({"q": q, "edge_bias": edge_bias})
    xp, wide, table = widened(q=q, edge_bias=edge_bias)
    by_kind = scale * xp.matmul(wide, xp.matrix_transpose(_by_kind(table, lists, step)))
    by_kind = xp.broadcast_to(by_kind, (*batch, *by_kind.shape[-3:]))
    flat = math.prod(batch), q.shape[-3], q.shape[-2] * lists.kinds
    index = arrays.from_host(xp, lists.places, arrays.device(q))
    return xp.take(xp.reshape(by_kind, flat), index, axis=2)


def _by_kind(table: Array, lists: Lists, step: int) -> Array:
    """The table's row for each kind that there is."""
    xp = arrays.namespace(table)
    level, r = np.divmod(np.arange(lists.kinds), 2 * lists.step + 1)
    row = (2 * step + 1) * np.minimum(level, table.shape[0] // (2 * step + 1) - 1) + r
    return xp.take(table, arrays.from_host(xp, row, arrays.device(table)), axis=0)


def _by_row(dtable: Array, table: Array, lists: Lists, step: int) -> Array:
    """Undo `_by_kind`: sums over the kinds of each row."""
    xp, d = arrays.namespace(dtable), table.shape[1]
    levels, width = table.shape[0] // (2 * step + 1), 2 * lists.step + 1

    def zeros(*shape: int) -> Array:
        return xp.zeros(shape, dtype=dtable.dtype, device=arrays.device(dtable))

    dtable = xp.reshape(dtable, (lists.levels, width, d))
    if lists.levels > levels:
        last = xp.sum(dtable[levels - 1:, :, :], axis=0, keepdims=True)
        dtable = xp.concat([dtable[:levels - 1, :, :], last], axis=0)
    dtable = xp.concat([dtable, zeros(levels - dtable.shape[0], width, d)], axis=0)
    dtable = xp.concat([dtable, zeros(levels, 2 * step + 1 - width, d)], axis=1)
    return xp.reshape(dtable, table.shape)


def _summed(xp: Any, x: Array, shape: tuple[int, ...]) -> Array:
    """Undo a broadcast of leading axes."""
    more = x.ndim - len(shape)
    axes = (*range(more), *(more + axis for axis, size in enumerate(shape)
                            if size != x.shape[more + axis]))
    return xp.reshape(xp.sum(x, axis=axes) if axes else x, shape)
