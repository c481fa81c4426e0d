"""Attention along the edges of a graph: masked, biased by edge type, or GAT's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..checks import DtypeError, OptionError, ShapeError, require_flag, require_real
from ..differentiable import ON_HOST, Saved, differentiable, gradients
from ..engines import edges as engine
from ..engines.edges import Edges, EdgesSaved, sums_by_row
from ..engines.softmax import require_operands
from ..features.precision import cast_like, widened
from ..masks.algebra import host_array


@dataclasses.dataclass(frozen=True)
class GraphSaved(Saved):
    """The engine's record, and the table that made its bias."""

    attended: EdgesSaved
    bias_table: Array | None
    types: np.ndarray | None = dataclasses.field(metadata=ON_HOST)
    """int (edges,): the row of the table for each edge, -1 for a self-loop that was added."""

    @property
    def stats(self) -> dict[str, int]:
        """Those of the engine: pairs are edges, each counted for every head."""
        return self.attended.stats

    def backward(self, dout: Array, dlse: Array | None = None) -> Any:
        """Gradients of q, k, v, and of bias_table where it was given."""
        found = self.attended.backward(dout, dlse)._asdict()
        if self.bias_table is not None and self.types is not None:
            dbias = found.pop("bias")[0, :, :]
            # forward: bias[h, e] = bias_table[types[e], h]
            order = np.argsort(self.types, kind="stable")
            ends = np.searchsorted(self.types[order], np.arange(self.bias_table.shape[0] + 1))
            xp, where = arrays.namespace(dbias), arrays.device(dbias)
            by_type = xp.take(dbias, arrays.from_host(xp, order, where), axis=1)
            table = xp.matrix_transpose(sums_by_row(by_type, ends))
            found["bias_table"] = arrays.cast(xp, table, self.bias_table.dtype)
        return gradients(tuple(found))(**found)


@differentiable
def graph_attention(q: Array, k: Array, v: Array, graph: Any, bias_table: Array | None = None, *,
                    edge_type: Any = None, self_loops: bool = True, scale: float | None = None,
                    softcap: float | None = None,
                    return_lse: bool = False) -> tuple[Any, GraphSaved]:
    """Each query attends to its neighbours in a graph.

    Query i sees key j iff the graph has an edge (i, j), or i = j with `self_loops`; with a
    `bias_table`, ``bias_table[type of (i, j), h]`` joins the score. E.g. a path of four tokens,
    ``0 -> 1 -> 2 -> 3``: 0->{0, 1}  1->{1, 2}  2->{2, 3}  3->{3}; without self-loops 3->{}.

    Parameters
    ----------
    q : array, shape (..., H, N, D), float16, bfloat16, float32 or float64
        Queries.
    k : array, shape (..., G, M, D), dtype of `q`
        Keys; G divides H.
    v : array, shape (..., G, M, E), dtype of `q`
        Values.
    graph : scipy.sparse array or matrix, shape (N, M), of any format, or a sequence of them
        One for all, or one for each batch item. Its stored entries are the edges, stored zeros
        among them, as for `pyattn.masks.graph`: values are not looked at. To leave zeros out, call
        its ``eliminate_zeros()`` first. An entry that is stored twice is one edge.
    bias_table : array, shape (T, H), any float dtype, optional
        A bias for each type of edge, such as a relation or a bucket of the shortest path's length.
    edge_type : scipy.sparse array of integers with the entries of `graph`, or int array, optional
        Types 0 to T - 1, needed with `bias_table`. An int array is aligned with the data of the
        graph in CSR form, ``graph.tocsr().data``. A sequence, if `graph` is one. In a sparse array
        type 0 must be stored, as all entries must be.
    self_loops : bool
        Add an edge (i, i) where there is none; it has no type, and gets no bias. Needs N = M.
    scale : float, optional
        Multiplies the scores. Default ``D ** -0.5``.
    softcap : float, optional
        Scores become ``softcap * tanh(scores / softcap)``, before the bias.
    return_lse : bool
        Also return the log-sum-exp of each row, (..., H, N).

    Returns
    -------
    array, shape (..., H, N, E), dtype of `q`
        A query without edges: 0. With `return_lse` a tuple, as for `pyattn.attention`.

    Raises
    ------
    ShapeError, DtypeError, OptionError
        Arguments that do not fit; the message names the argument, the rule and what was given.

    Notes
    -----
    Time O(edges (D + E)), no N x M array. Kept for backward: the arguments, the lists, the output
    and the log-sum-exp; during it two numbers for each edge and head. The gradient of a row of the
    table is the sum of its edges' score gradients. This is a transformer's attention on a sparse
    graph [1]_ and, with shortest-path buckets for types, Graphormer's spatial bias [2]_ on edges.

    References
    ----------
    .. [1] Dwivedi, Bresson, "A Generalization of Transformer Networks to Graphs", 2020,
       arXiv:2012.09699, section 2.2.
    .. [2] Ying et al., "Do Transformers Really Perform Bad for Graph Representation?", 2021,
       arXiv:2106.05234, section 3.1.2.

    Examples
    --------
    >>> import numpy as np, pyattn, scipy.sparse
    >>> path = scipy.sparse.diags_array(np.ones(3), offsets=1, shape=(4, 4))
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 4, 8))
    >>> out, saved = pyattn.graph_attention.forward(q, k, v, path)
    >>> bool(np.allclose(out[0, 3], v[0, 3])), saved.stats["pairs"]
    (True, 7)
    """
    batch = math.prod(require_operands(q, k, v))
    if (bias_table is None) != (edge_type is None):
        raise OptionError("bias_table and edge_type must be given both or neither")
    edges, types = lists_of(graph, batch, q.shape[-3], (q.shape[-2], k.shape[-2]),
                            self_loops=self_loops, edge_type=edge_type)
    bias = None
    if bias_table is not None and types is not None:
        bias = _expanded(bias_table, types, q.shape[-3], v)
    out, attended = engine.forward(q, k, v, edges, bias=bias, scale=scale, softcap=softcap,
                                   return_lse=return_lse)
    return out, GraphSaved(attended, bias_table, types)


def _expanded(table: Array, types: np.ndarray, heads: int, like: Array) -> Array:
    """The bias of each edge, (1, H, edges)."""
    arrays.require_float("bias_table", table)
    if table.ndim != 2 or table.shape[1] != heads:
        raise ShapeError(f"bias_table must be (T, H) with H = {heads}; got {tuple(table.shape)}")
    if types.size and types.max(initial=-1) >= table.shape[0]:
        raise OptionError(f"edge_type must lie in 0..{table.shape[0] - 1}, the rows of "
                          f"bias_table; got {types.max()}")
    xp = arrays.namespace(table, like)
    wide = arrays.cast(xp, table, arrays.accumulator(xp, like))
    none = xp.zeros((1, heads), dtype=wide.dtype, device=arrays.device(table))
    index = arrays.from_host(xp, np.where(types < 0, table.shape[0], types), arrays.device(table))
    return xp.matrix_transpose(xp.take(xp.concat([wide, none], axis=0), index, axis=0))[None, :, :]


def lists_of(graph: Any, batch: int, heads: int, shape: tuple[int, int], *, self_loops: bool,
             edge_type: Any = None) -> tuple[Edges, np.ndarray | None]:
    """Turn graphs of `shape` (N, M) into lists, and types into one for each edge of these."""
    self_loops = require_flag("self_loops", self_loops)
    several = isinstance(graph, Sequence)
    graphs = list(graph) if several else [graph]
    if several and len(graphs) != batch:
        raise ShapeError(f"graph must be one, or a sequence of {batch}, one for each batch item; "
                         f"got {len(graphs)}")
    kinds = list(edge_type) if several and edge_type is not None else [edge_type] * len(graphs)
    if len(kinds) != len(graphs):
        raise ShapeError(f"edge_type must be a sequence of {len(graphs)}, as graph is; got "
                         f"{len(kinds)}")
    found = [_entries(one, shape, self_loops, kind)
             for one, kind in zip(graphs, kinds, strict=True)]
    counts = np.asarray([count for count, _, _ in found], np.int64).reshape(len(found), shape[0])
    key = np.concatenate([np.zeros(0, np.int32), *(key for _, key, _ in found)])
    own = np.arange(batch) if several else np.zeros(batch, int)
    owner = np.repeat(own.astype(np.int32)[:, None], heads, axis=1)
    types = None
    if edge_type is not None:
        types = np.concatenate([np.zeros(0, np.int64), *(kind for _, _, kind in found)])
    return Edges(engine.offsets(counts), key, owner, shape[1]), types


def _entries(graph: Any, shape: tuple[int, int], self_loops: bool,
             edge_type: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges of each query, the keys, and the types, in order; -1 for a loop that was added."""
    row, key, csr = _pairs("graph", graph)
    n, m = shape
    if tuple(csr.shape) != shape:
        raise ShapeError(f"graph must be (N, M) = {shape}; got {tuple(csr.shape)}")
    types = np.zeros(row.size, np.int64)
    if edge_type is not None:
        types = _types(edge_type, row, key, shape)
    if self_loops:
        if n != m:
            raise OptionError(f"self_loops needs N = M, for a token to be query and key; got {n} "
                              f"queries and {m} keys: pass self_loops=False")
        loops = np.arange(n)
        row, key = np.concatenate([row, loops]), np.concatenate([key, loops])
        types = np.concatenate([types, np.full(n, -1)])
    code = row * m + key
    order = np.argsort(code, kind="stable")
    code = code[order]
    # of equal ones the first is kept: the one that has a type
    first = np.ones(code.size, bool)
    first[1:] = code[1:] != code[:-1]
    order = order[first]
    return np.bincount(row[order], minlength=n), key[order].astype(np.int32), types[order]


def _pairs(name: str, graph: Any) -> tuple[np.ndarray, np.ndarray, Any]:
    """Rows and columns of the entries that are stored, int64, in the order of the CSR form."""
    if not hasattr(graph, "tocsr"):
        raise DtypeError(f"{name} must be a scipy.sparse array; got {type(graph).__name__}")
    csr = graph.tocsr()
    if len(csr.shape) != 2:
        raise ShapeError(f"{name} must be (N, M); got {csr.shape}")
    row = np.repeat(np.arange(csr.shape[0]), np.diff(csr.indptr))
    return row, csr.indices.astype(np.int64), csr


def _types(edge_type: Any, row: np.ndarray, key: np.ndarray,
           shape: tuple[int, int]) -> np.ndarray:
    """The type of each entry of a graph."""
    if hasattr(edge_type, "tocsr"):
        own_row, own_key, csr = _pairs("edge_type", edge_type)
        place, own = row * shape[1] + key, own_row * shape[1] + own_key
        order, own_order = np.argsort(place, kind="stable"), np.argsort(own, kind="stable")
        if (tuple(csr.shape) != shape or place.size != own.size
                or (place[order] != own[own_order]).any()):
            raise ShapeError("edge_type must have the entries of graph, stored zeros included; "
                             f"got {own.size} entries of {tuple(csr.shape)}, the graph has "
                             f"{place.size} of {shape}")
        types = np.empty_like(csr.data)
        types[order] = csr.data[own_order]
    else:
        types = host_array(edge_type)
        if types.shape != row.shape:
            raise ShapeError("edge_type must be aligned with the data of graph in CSR form, "
                             f"{row.shape}; got {types.shape}")
    if types.dtype.kind not in "iu":
        raise DtypeError(f"edge_type must be integers; got {types.dtype}")
    if types.size and types.min() < 0:
        raise OptionError(f"edge_type must not be negative; got {types.min()}")
    return types.astype(np.int64, copy=False)


@dataclasses.dataclass(frozen=True)
class GatSaved(Saved):
    """The arguments, the engine's record, and how steep the scores are at each edge."""

    h: Array
    a_query: Array
    a_key: Array
    attended: EdgesSaved
    slope: Array
    """1 or `negative_slope`, (B or 1, H, edges)."""

    @property
    def stats(self) -> dict[str, int]:
        """Those of the engine."""
        return self.attended.stats

    def backward(self, dout: Array) -> Any:
        """Gradients of h, a_query and a_key."""
        xp, h, a_query, a_key = widened(h=self.h, a_query=self.a_query, a_key=self.a_key)
        grads, edges = self.attended.backward(dout), self.attended.edges
        # forward: bias = leaky_relu(left[query] + right[key])
        dscore = xp.astype(grads.bias, h.dtype) * self.slope
        lead = tuple(self.h.shape[:-1])
        dleft = xp.reshape(_per_token(dscore, edges.start), lead)
        by_key = edges.by_key
        order = by_key.edge + np.repeat(edges.start[:, 0], np.diff(by_key.start[:, [0, -1]])[:, 0])
        by_key_scores = xp.take(dscore, arrays.from_host(xp, order, arrays.device(h)), axis=2)
        dright = xp.reshape(_per_token(by_key_scores, by_key.start), lead)
        # forward: left = a_query . h, right = a_key . h
        dh = (xp.astype(grads.v, h.dtype) + dleft[..., None] * a_query[:, None, :]
              + dright[..., None] * a_key[:, None, :])
        axes = (*range(h.ndim - 3), h.ndim - 2)
        found = (dh, xp.sum(dleft[..., None] * h, axis=axes),
                 xp.sum(dright[..., None] * h, axis=axes))
        return gradients(("h", "a_query", "a_key"))(*(
            cast_like(xp, x, like) for x, like in zip(found, (self.h, self.a_query, self.a_key),
                                                      strict=True)))


@differentiable
def gat_attention(h: Array, a_query: Array, a_key: Array, graph: Any, *,
                  negative_slope: float = 0.2, self_loops: bool = True) -> tuple[Any, GatSaved]:
    """Graph attention network: neighbours are weighed by a sum of two scores, then averaged.

    Token i attends to token j along the edge (i, j) with score ``leaky_relu(a_query . h_i +
    a_key . h_j)``, and takes the mean of its neighbours' `h` with the softmax of those. E.g. a
    path ``0 -> 1 -> 2``: 0->{0, 1}  1->{1, 2}  2->{2}.

    Parameters
    ----------
    h : array, shape (..., H, N, D), float16, bfloat16, float32 or float64
        Features of the tokens in each head, projected already: ``W x``.
    a_query, a_key : array, shape (H, D), any float dtype
        The two halves of the paper's vector a: for the token that attends, and its neighbour.
    graph : scipy.sparse array or matrix, shape (N, N), of any format, or a sequence of them
        As for `graph_attention`.
    negative_slope : float
        Of the leaky ReLU.
    self_loops : bool
        Add an edge (i, i) where there is none.

    Returns
    -------
    array, shape (..., H, N, D), dtype of `h`
        A token without edges: 0.

    Raises
    ------
    ShapeError, DtypeError, OptionError
        Arguments that do not fit; the message names the argument, the rule and what was given.

    Notes
    -----
    Time O(edges D), and a number for each edge and head kept for backward beside the arguments,
    the output and the log-sum-exp. At a score of exactly 0 the slope is `negative_slope`.
    Differs from the paper: W, the nonlinearity behind, dropout, and concatenation or mean over
    heads are the caller's.

    References
    ----------
    .. [1] Veličković et al., "Graph Attention Networks", 2017, arXiv:1710.10903, section 2.1.

    Examples
    --------
    >>> import numpy as np, pyattn, scipy.sparse
    >>> path = scipy.sparse.diags_array(np.ones(2), offsets=1, shape=(3, 3))
    >>> h = np.arange(3.0).reshape(1, 3, 1)
    >>> pyattn.gat_attention(h, np.zeros((1, 1)), np.zeros((1, 1)), path).ravel()
    array([0.5, 1.5, 2. ])
    """
    for name, x in (("h", h), ("a_query", a_query), ("a_key", a_key)):
        arrays.require_float(name, x)
    xp, wide, left, right = widened(h=h, a_query=a_query, a_key=a_key)
    arrays.require_same_device({"h": h, "a_query": a_query, "a_key": a_key})
    if h.ndim < 3:
        raise ShapeError(f"h must be (..., H, N, D); got {tuple(h.shape)}")
    *lead, heads, n, d = h.shape
    for name, x in (("a_query", a_query), ("a_key", a_key)):
        if tuple(x.shape) != (heads, d):
            raise ShapeError(f"{name} must be (H, D) = {(heads, d)}; got {tuple(x.shape)}")
    negative_slope = require_real("negative_slope", negative_slope)
    batch = math.prod(lead)
    edges, _ = lists_of(graph, batch, heads, (n, n), self_loops=self_loops)
    score = (_per_edge(xp.sum(wide * left[:, None, :], axis=-1), edges, edges.query)
             + _per_edge(xp.sum(wide * right[:, None, :], axis=-1), edges, edges.key))
    one = xp.ones_like(score)
    slope = xp.where(score > 0, one, negative_slope * one)
    _, attended = engine.forward(None, None, h, edges, bias=score * slope)
    return attended.out, GatSaved(h, a_query, a_key, attended, slope)


def _per_edge(x: Array, edges: Edges, token: np.ndarray) -> Array:
    """Numbers of tokens, (..., H, N), as those of edges: (B or 1, H, edges).

    With lists of their own, items share no edge, so one axis of edges has them all.
    """
    xp, lists = arrays.namespace(x), len(edges.start)
    heads, n = x.shape[-2:]
    x = xp.reshape(x, (-1 if n * heads else edges.owner.shape[0], heads, n))
    token = token.astype(np.int64)
    if lists > 1:
        x = xp.reshape(xp.permute_dims(x, (1, 0, 2)), (1, heads, x.shape[0] * n))
        token += n * np.repeat(np.arange(lists), edges.start[:, -1] - edges.start[:, 0])
    return xp.take(x, arrays.from_host(xp, token, arrays.device(x)), axis=2)


def _per_token(x: Array, start: np.ndarray) -> Array:
    """Sums over the edges of each token: (B or 1, H, edges) as (B, H, tokens)."""
    xp = arrays.namespace(x)
    lists, n = start.shape[0], start.shape[1] - 1
    sums = sums_by_row(x, np.append(start[:, :-1].ravel(), x.shape[2]))
    if lists > 1:
        sums = xp.permute_dims(xp.reshape(sums, (x.shape[1], lists, n)), (1, 0, 2))
    return sums
