"""Softmax attention over listed keys: each query has a list of its own.

    scores = scale * q.k -> softcap -> + bias -> softmax over the list

What costs is the edges: O(edges (D + E)) time, and beside the operands O(edges) memory in the
backward alone, which computes the scores again from the log-sum-exps in one pass over the queries,
and sums dk and dv in one over the keys. Nothing is scattered, so results are the same each time.

Letters as in `problem`, and L lists.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import numpy as np

from .. import arrays, dispatch
from ..arrays import Array
from ..checks import (
    DtypeError,
    OptionError,
    ShapeError,
    require_broadcast,
    require_flag,
    require_real,
)
from ..differentiable import Saved, gradients
from .problem import record
from .softmax import flat, require_operands, unbroadcast


class ByKey(NamedTuple):
    """Lists of edges turned round: which queries list a key."""

    start: np.ndarray
    """int64 (L, M + 1): offsets into the others."""
    query: np.ndarray
    """int32 (edges,): the query of each edge; ascending within a key."""
    edge: np.ndarray
    """int32 (edges,): which edge of its list it is, counted by query."""


@dataclasses.dataclass(frozen=True, eq=False)
class Edges:
    """Lists of keys, on the host: query i of list l attends key[start[l, i]:start[l, i + 1]].

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.engines.edges import Edges
    >>> edges = Edges.from_lists(np.array([[[0, -1], [1, 0], [2, 2]]]), batch=1, heads=2, tokens=3)
    >>> edges.start.tolist(), edges.key.tolist(), edges.owner.tolist(), edges.pairs
    ([[0, 1, 3, 4]], [0, 0, 1, 2], [[0, 0]], 8)
    """

    start: np.ndarray
    """int64 (L, N + 1): offsets into `key`."""
    key: np.ndarray
    """int32 (edges,): ascending and distinct within a query."""
    owner: np.ndarray
    """int32 (B, H): which list a batch item and head reads."""
    tokens: int
    """M; all keys are below."""

    @classmethod
    def from_lists(cls, indices: np.ndarray, *, batch: int, heads: int, tokens: int) -> Edges:
        """Make lists from `indices`, int (L', N, n) for all items, or (B, L', N, n).

        -1 stands for no key, and a key that is listed twice counts once. Consecutive heads share
        the lists: L' divides H.
        """
        indices = np.asarray(indices)
        *lead, lists, n, most = indices.shape
        if not (lead in ([], [batch]) and (heads % lists == 0 if lists else heads == 0)):
            raise ShapeError(f"lists of keys must be (B, L, N, n) = ({batch}, divisor of {heads}, "
                             f"N, n) or (L, N, n); got {tuple(indices.shape)}")
        if indices.size and not (indices.min() >= -1 and indices.max() < tokens):
            raise OptionError(f"listed keys must lie in -1..{tokens - 1}; got {indices.min()}.."
                              f"{indices.max()}")
        rows = indices.reshape(math.prod(lead) * lists, n, most).astype(np.int32, copy=False)
        rows = np.sort(rows, axis=-1)
        kept = rows >= 0
        kept[..., 1:] &= rows[..., 1:] != rows[..., :-1]
        first = np.arange(batch)[:, None] * lists * bool(lead)
        owner = first + np.arange(heads) // max(1, heads // max(1, lists))
        return cls(offsets(np.count_nonzero(kept, axis=-1)), rows[kept], owner.astype(np.int32),
                   tokens)

    @property
    def pairs(self) -> int:
        """Edges executed: those of a list count for each head that reads it."""
        counts = self.start[:, -1] - self.start[:, 0]
        return int(counts[self.owner].sum())

    @functools.cached_property
    def apart(self) -> bool:
        """Whether no list is read by two items, so that their edges are no one else's."""
        lists = len(self.start)
        read = np.unique(np.arange(len(self.owner))[:, None] * lists + self.owner) % max(1, lists)
        return len(np.unique(read)) == len(read)

    @functools.cached_property
    def query(self) -> np.ndarray:
        """The query of each edge, int32 (edges,)."""
        n = self.start.shape[1] - 1
        counts = np.diff(self.start, axis=1).ravel()
        return np.repeat(np.tile(np.arange(n, dtype=np.int32), len(self.start)), counts)

    @functools.cached_property
    def by_key(self) -> ByKey:
        """The lists by key."""
        import scipy.sparse

        n, counts, queries, edges = self.start.shape[1] - 1, [], [], []
        for start in self.start:
            key = self.key[start[0]:start[-1]]
            counts.append(np.bincount(key, minlength=self.tokens))
            if key.size:
                number = np.arange(key.size, dtype=np.int32)
                lists = scipy.sparse.csr_array((number, key, start - start[0]),
                                               shape=(n, self.tokens)).tocsc()
                queries.append(lists.indices.astype(np.int32, copy=False))
                edges.append(lists.data)
        none = np.zeros(0, np.int32)
        return ByKey(offsets(np.asarray(counts).reshape(len(self.start), self.tokens)),
                     np.concatenate([none, *queries]), np.concatenate([none, *edges]))

    def runs(self, groups: int, most: int) -> np.ndarray:
        """Return which heads share a list and a key/value head, int64 (runs, 5), in order.

        The columns are item, group, first head, how many heads (at most `most`), and list.

        Examples
        --------
        >>> import numpy as np
        >>> from pyattn.engines.edges import Edges
        >>> edges = Edges(np.zeros((2, 1), int), np.zeros(0, int), np.array([[0, 0, 0, 1]]), 5)
        >>> edges.runs(groups=2, most=8).tolist()
        [[0, 0, 0, 2, 0], [0, 1, 2, 1, 0], [0, 1, 3, 1, 1]]
        """
        batch, heads = self.owner.shape
        each = max(1, heads // max(1, groups))
        new = np.ones((batch, heads), bool)
        new[:, 1:] = self.owner[:, 1:] != self.owner[:, :-1]
        new[:, np.arange(heads) % each % most == 0] = True
        item, first = np.nonzero(new)
        place = item * heads + first
        count = np.diff(np.append(place, new.size))
        return np.stack([item, first // each, first, count, self.owner[item, first]], axis=1,
                        dtype=np.int64, casting="unsafe")


def sums_by_row(x: Array, start: np.ndarray) -> Array:
    """Return the sums of entries start[i]:start[i + 1] of the last axis, in the dtype of `x`.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.engines.edges import sums_by_row
    >>> sums_by_row(np.array([[1., 2., 4., 8.]]), np.array([0, 1, 1, 4]))
    array([[ 1.,  0., 14.]])
    """
    from pyattn.kernels.array_api.edges import chunks

    xp, lead = arrays.namespace(x), tuple(x.shape[:-1])
    place, found = np.zeros(len(start) - 1, np.int64), [xp.zeros_like(x[..., :1])]
    filled = 1
    if not x.shape[-1]:
        return xp.zeros((*lead, len(place)), dtype=x.dtype, device=arrays.device(x))
    for chunk in chunks(start, math.prod(lead)):
        index = arrays.from_host(xp, chunk.entry.reshape(-1), arrays.device(x))
        there = arrays.from_host(xp, chunk.there, arrays.device(x))
        padded = xp.reshape(xp.take(x, index, axis=-1), (*lead, *chunk.entry.shape))
        found.append(xp.sum(xp.where(there, padded, xp.zeros_like(padded)), axis=-1))
        place[chunk.rows] = filled + np.arange(len(chunk.rows))
        filled += len(chunk.rows)
    return xp.take(xp.concat(found, axis=-1),
                   arrays.from_host(xp, place, arrays.device(x)), axis=-1)


def offsets(counts: np.ndarray) -> np.ndarray:
    """Return where the entries of each row start, for counts (L, N), int64 (L, N + 1).

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.engines.edges import offsets
    >>> offsets(np.array([[1, 2], [0, 4]]))
    array([[0, 1, 3],
           [3, 3, 7]])
    """
    lists, n = counts.shape
    ends = np.cumsum(counts, dtype=np.int64).reshape(lists, n)
    start = np.zeros((lists, n + 1), np.int64)
    start[:, 1:] = ends
    if n:
        start[1:, 0] = ends[:-1, -1]
    return start


@dataclasses.dataclass(frozen=True)
class EdgesProblem:
    """What a kernel module, ``pyattn.kernels.<backend>.edges``, is handed.

    It has ``refuses(problem)``; ``forward(problem)``, which returns out (B, H, N, E) and lse
    (B, H, N); and ``backward(problem, dout, out, lse, dlse)``, which returns gradients by name:
    those of q, k and v, and that of the bias as (copies, H, edges). Numbers as for
    `problem.Problem`.
    """

    q: Array | None
    """(B, H, N, D), or None with `k`: the scores are the bias alone."""
    k: Array | None
    """(B, G, M, D)."""
    v: Array
    """(B, G, M, E)."""
    edges: Edges
    scale: float
    softcap: float | None = None
    bias: Array | None = None
    """(B or 1, H or 1, edges), acc: one number for each entry of `edges.key`; -inf masks."""

    @property
    def copies(self) -> int:
        """How many items the gradient of the bias is kept apart for."""
        shared = self.bias is not None and self.bias.shape[0] == 1 and self.edges.apart
        return 1 if shared else self.edges.owner.shape[0]


@dataclasses.dataclass(frozen=True)
class EdgesSaved(Saved):
    """What the backward needs: the arguments, the output and each row's log-sum-exp."""

    q: Array | None
    k: Array | None
    v: Array
    bias: Array | None
    edges: Edges
    scale: float
    softcap: float | None
    out: Array
    lse: Array

    @property
    def stats(self) -> dict[str, int]:
        """Counters: pairs (edges executed), flops of the forward, bytes in and out."""
        widths = self.v.shape[-1] + (0 if self.q is None else self.q.shape[-1])
        moved = [x for x in (self.q, self.k, self.v, self.bias, self.out, self.lse)
                 if x is not None]
        return {"pairs": self.edges.pairs, "flops": 2 * self.edges.pairs * widths,
                "bytes": sum(map(arrays.nbytes, moved)) + self.edges.start.nbytes
                + self.edges.key.nbytes}

    def backward(self, dout: Array, dlse: Array | None = None) -> Any:
        """Gradients of the array arguments that were given, each in its own dtype and shape.

        Parameters
        ----------
        dout : array, shape and dtype of the output
        dlse : array, shape (..., H, N), optional
            Gradient of the log-sum-exp, where the loss uses it.
        """
        xp = arrays.namespace(self.v, dout, dlse)
        for name, x, like in (("dout", dout, self.out), ("dlse", dlse, self.lse)):
            if x is not None and tuple(x.shape) != tuple(like.shape):
                raise ShapeError(f"{name} must have shape {tuple(like.shape)}; got "
                                 f"{tuple(x.shape)}")
        if dout.dtype != self.out.dtype:
            raise DtypeError("dout must have the dtype of the output, "
                             f"{arrays.dtype_name(self.out)}; got {arrays.dtype_name(dout)}")
        batch = self.lse.shape[:-2]
        problem = _problem(self, batch)
        rows = (math.prod(batch), *self.lse.shape[-2:])
        wide = (*rows, self.v.shape[-1])
        dout, out = arrays.reshape(xp, dout, wide), arrays.reshape(xp, self.out, wide)
        lse = arrays.reshape(xp, self.lse, rows)
        if dlse is not None:
            dlse = arrays.cast(xp, arrays.reshape(xp, dlse, rows), lse.dtype)
        grads = dispatch.kernel("edges", problem, self.v).backward(problem, dout, out, lse, dlse)
        found = {name: unbroadcast(xp, grads[name], x, batch)
                 for name, x in (("q", self.q), ("k", self.k), ("v", self.v)) if x is not None}
        if self.bias is not None:
            dbias, given = grads["bias"], self.bias.shape
            shared = tuple(axis for axis in (0, 1) if given[axis] != dbias.shape[axis])
            if shared:
                dbias = xp.sum(dbias, axis=shared, keepdims=True)
            found["bias"] = arrays.cast(xp, dbias, self.bias.dtype)
        return gradients(tuple(found))(**found)


def forward(q: Array | None, k: Array | None, v: Array, edges: Edges, *,
            bias: Array | None = None, scale: float | None = None, softcap: float | None = None,
            return_lse: bool = False) -> tuple[Any, EdgesSaved]:
    """Attention of each query to the keys that `edges` lists for it.

    Parameters
    ----------
    q : array, shape (..., H, N, D), or None
        None with `k`: the scores are the bias alone.
    k : array, shape (..., G, M, D), dtype of `q`, or None
        G divides H.
    v : array, shape (..., G, M, E), dtype of `q`
    edges : Edges
        Lists for N queries over M keys; its B is the product of the leading axes.
    bias : array, shape (B or 1, H or 1, edges), optional
        Added to the scores, one number for each of ``edges.key``; -inf masks an edge.
    scale : float, optional
        Default ``D ** -0.5``.
    softcap : float, optional
        Scores become ``softcap * tanh(scores / softcap)``.
    return_lse : bool
        Also return the log-sum-exp of each row, (..., H, N).

    Returns
    -------
    array, shape (..., H, N, E), dtype of `v`; and what its backward needs
        A query without keys: 0, and log-sum-exp -inf.
    """
    if (q is None) != (k is None) or (q is None and bias is None):
        raise OptionError("q and k must be given both or neither, and without them a bias")
    named = {"q": q, "k": k, "v": v, "bias": bias}
    xp = arrays.namespace(*named.values())
    arrays.require_same_device(named)
    batch = require_operands(v if q is None else q, v if k is None else k, v)
    n, (batch_size, heads) = edges.start.shape[1] - 1, edges.owner.shape
    wanted = (batch_size, heads, n, edges.tokens)
    given = (math.prod(batch), *((heads, n) if q is None else q.shape[-3:-1]), v.shape[-2])
    if given != wanted or (q is None and (heads % v.shape[-3] if v.shape[-3] else heads)):
        raise ShapeError(f"lists are for (B, H, N, M) = {wanted}; the arrays have {given}, and "
                         f"{v.shape[-3]} key/value heads")
    if bias is not None:
        arrays.require_float("bias", bias)
        wide = (batch_size, heads, len(edges.key))
        require_broadcast("bias", tuple(bias.shape), wide, "(B, H, edges)")
        if bias.ndim != 3 or bias.shape[2] != wide[2]:
            raise ShapeError(f"bias must be (B or 1, H or 1, edges) of {wide}; got "
                             f"{tuple(bias.shape)}")
    if scale is None:
        scale = 1.0 if q is None else q.shape[-1] ** -0.5
    if softcap is not None and require_real("softcap", softcap) <= 0:
        raise OptionError(f"softcap must be positive; got {softcap}")
    return_lse = require_flag("return_lse", return_lse)
    fields = {"q": q, "k": k, "v": v, "bias": bias, "edges": edges,
              "scale": require_real("scale", scale),
              "softcap": None if softcap is None else float(softcap)}
    problem = _problem(record(EdgesSaved, fields), batch)
    out, lse = dispatch.kernel("edges", problem, v).forward(problem)
    out = arrays.cast(xp, arrays.reshape(xp, out, (*batch, heads, n, v.shape[-1])), v.dtype)
    saved = record(EdgesSaved, {**fields, "out": out,
                                "lse": arrays.reshape(xp, lse, (*batch, heads, n))})
    return ((out, saved.lse) if return_lse else out), saved


def _problem(saved: EdgesSaved, batch: tuple[int, ...]) -> EdgesProblem:
    """The kernel's view of a call: leading axes in one."""
    xp = arrays.namespace(saved.v)
    q, k, v = (None if x is None else flat(xp, x, batch)
               for x in (saved.q, saved.k, saved.v))
    bias = saved.bias
    if bias is not None:
        bias = arrays.cast(xp, bias, arrays.accumulator(xp, v))
    return EdgesProblem(q, k, v, saved.edges, saved.scale, saved.softcap, bias)
