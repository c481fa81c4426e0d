"""Attention inside clusters of tokens that lie close to one centroid (Routing Transformer)."""

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
    require_choice,
    require_decisions,
    require_flag,
    require_integer,
    require_real,
)
from ..differentiable import ON_HOST, Saved, differentiable, gradients
from ..engines import softmax
from ..engines.placement import place
from ..features.clustering import Sets
from ..features.gathering import spread_tokens, take_tokens
from ..features.normalise import StandardiseSaved, standardise
from ..features.padding import without_padding
from ..features.regrouping import Regrouped, regroup, sorted_tokens
from ..masks.algebra import host_array
from ..masks.tiled import Listing, Round, between, rounds

NONE = -1


@dataclasses.dataclass(frozen=True)
class RoutingSaved(Saved):
    """What the engine keeps, what normalised q and k, and which tokens are in which cluster."""

    attended: softmax.SoftmaxSaved
    q: Array
    k: Array
    v: Array
    centroids: Array
    normal_q: StandardiseSaved
    normal_k: StandardiseSaved
    mode: str
    clusters: np.ndarray = dataclasses.field(metadata=ON_HOST)
    key_clusters: np.ndarray = dataclasses.field(metadata=ON_HOST)

    @property
    def decisions(self) -> dict[str, Array]:
        """``clusters`` of the queries and ``key_clusters``, and the engine's."""
        return {"clusters": self.clusters, "key_clusters": self.key_clusters,
                **self.attended.decisions}

    @property
    def stats(self) -> dict[str, int]:
        """Those of the engine."""
        return self.attended.stats

    def backward(self, dout: Array, dlse: Array | None = None) -> Any:
        """Gradients of q, k and v, and zeros for the centroids, which only decide."""
        q, k = self.normal_q.x, self.normal_k.x
        xp, rows = arrays.namespace(q), self.attended.lse.shape
        *batch, heads, n, _ = q.shape
        m = k.shape[-2]
        if self.mode == "assign":
            dlse = None if dlse is None else arrays.reshape(xp, dlse, rows)
            dq, dk, dv = self.attended.backward(
                arrays.reshape(xp, dout, (*rows, dout.shape[-1])), dlse)
        else:
            queries, keys = (_flat_lists(x) for x in (self.clusters, self.key_clusters))
            # forward: out = the mean of what a token's clusters found
            shares = take_tokens(_divided(xp, _flat(xp, dout), queries), queries)
            found = self.attended.backward(arrays.reshape(xp, shares, (*rows, dout.shape[-1])))
            dq, dk, dv = (
                spread_tokens(arrays.reshape(xp, x, (*lists.shape, x.shape[-1])), lists, tokens)
                for x, lists, tokens in zip(found, (queries, keys, keys), (n, m, m), strict=True))
        dk, dv = (_summed_heads(xp, x, (*batch, k.shape[-3], m, x.shape[-1]), heads)
                  for x in (dk, dv))
        dq = self.normal_q.backward(arrays.reshape(xp, dq, q.shape)).x
        dk = self.normal_k.backward(dk).x
        return gradients(("q", "k", "v", "centroids"))(
            *(softmax.unbroadcast(xp, gradient, x, tuple(batch))
              for gradient, x in ((dq, self.q), (dk, self.k), (dv, self.v))),
            xp.zeros_like(self.centroids))


@differentiable
def routing_attention(q: Array, k: Array, v: Array, centroids: Array, *, cluster_size: int,
                      mode: str | None = None, causal: bool | str = False,
                      reference: bool = False, scale: float | None = None, q_lengths: Any = None,
                      kv_lengths: Any = None, softcap: float | None = None, dropout: float = 0.0,
                      rng: Any = None, return_lse: bool = False,
                      decisions: dict[str, Any] | None = None) -> tuple[Any, RoutingSaved]:
    """Attention of each query to keys of its cluster.

    Queries and keys are normalised to mean 0 and variance 1, without weights, and belong to the
    centroids with which their products are largest:

    - ``mode="assign"``: each token to one cluster. A query sees the last `cluster_size` keys of its
      cluster up to its own position, and if not causal the next `cluster_size` as well. Causal
      calls are strictly so. With clusters (0, 1, 0, 1) of four tokens: 0->{0}  1->{1}  2->{0, 2}
      3->{1, 3}.
    - ``mode="top"``, the paper's: each cluster takes the `cluster_size` queries and as many keys
      with the largest products, and these queries see these keys. A token in several clusters gets
      the mean of what it found in each, one in none 0. Which tokens a cluster takes depends on
      later tokens.

    Parameters
    ----------
    q : array, shape (..., H, N, D), float16, bfloat16, float32 or float64
        Queries.
    k : array, shape (..., G, M, D), dtype of `q`
        Keys; G divides H. The heads of a group cluster its keys apart.
    v : array, shape (..., G, M, E), dtype of `q`
        Values.
    centroids : array, shape (H, C, D), any float dtype
        C clusters' centroids; see `pyattn.features.update_centroids` and
        `pyattn.features.commitment_loss`.
    cluster_size : int, >= 1, tokens
    mode : {"assign", "top"}, optional
        "assign" by default if causal, else "top".
    causal : bool or "top_left"
        Whether keys stand at or before their queries, as for `pyattn.attention`.
    reference : bool
        With ``mode="top"`` and causal, do as the original does: of a cluster's keys its query of
        rank r sees the first r + 1, wherever they stand.
    scale : float, default D ** -0.5
    q_lengths, kv_lengths, softcap, dropout
        As for `pyattn.attention`; padding is in no cluster.
    rng : int, numpy.random.Generator or None
        Where the seed of dropout comes from.
    return_lse : bool
        Also return the log-sum-exp of each row; with ``mode="assign"`` alone.
    decisions : dict, optional
        What an earlier call decided, from its ``saved.decisions``: ``clusters`` and
        ``key_clusters``. In mode "assign" each token's, int (..., H, N) and (..., H, M); in mode
        "top" each cluster's tokens, ascending, int (..., H, C, w), -1 for none, last; w is
        `cluster_size`, or if that is less the larger of N and M.

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
    Time O(N C D + N cluster_size (D + E)), O(N sqrt(N)) for C of sqrt(N) and clusters of as many.
    Memory O(N) beside the operands in mode "assign", O(C cluster_size + block of N C) in mode
    "top". Kept for backward: the arguments, q and k normalised, the output and the log-sum-exp.
    Clusters are constants of the backward; the gradient of the centroids is 0. Later tokens of a
    causal call in mode "assign" move where keys are cut into tiles, and so, if anything, the last
    bit. Different from [1]_: causality by positions, not ranks; causal calls assign by default, as
    which tokens are a cluster's top ones is not known before the last; means divide by exact
    counts.

    References
    ----------
    .. [1] Roy, Saffar, Vaswani, Grangier, "Efficient Content-Based Sparse Attention with Routing
       Transformers", 2020, arXiv:2003.05997, section 4.1.

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 6, 8))
    >>> one = np.zeros((1, 1, 8))                               # one cluster for all
    >>> out = pyattn.routing_attention(q, k, v, one, cluster_size=6, causal=True)
    >>> normal = [pyattn.features.standardise(x) for x in (q, k)]
    >>> np.allclose(out, pyattn.attention(*normal, v, causal=True))
    True
    """
    causal = require_choice("causal", causal, (False, True, "top_left"))
    reference = require_flag("reference", reference)
    return_lse = require_flag("return_lse", return_lse)
    mode = require_choice("mode", mode, (None, "assign", "top"))
    if mode is None:
        mode = "assign" if causal is not False and not reference else "top"
    if reference and mode == "assign":
        raise OptionError("reference=True is mode 'top', as in the paper; got mode='assign'")
    if return_lse and mode == "top":
        raise OptionError("return_lse needs mode='assign': the mean over several clusters has no "
                          "log-sum-exp")
    cluster_size = require_integer("cluster_size", cluster_size, minimum=1)
    scale = None if scale is None else require_real("scale", scale)
    arrays.require_float("centroids", centroids)
    xp = arrays.namespace(q, k, v, centroids)
    batch = softmax.require_operands(q, k, v)
    heads, n, m = q.shape[-3], q.shape[-2], k.shape[-2]
    # a larger cluster holds no more
    cluster_size = min(cluster_size, max(n, m, 1))
    if centroids.ndim != 3 or (centroids.shape[0], centroids.shape[2]) != (heads, q.shape[-1]):
        raise ShapeError(f"centroids must be (H, C, D) with H = {heads}, D = {q.shape[-1]}; got "
                         f"{tuple(centroids.shape)}")
    if not centroids.shape[1]:
        raise ShapeError("centroids must hold at least one cluster; got none")
    alignment = "top_left" if causal == "top_left" else "bottom_right"
    placement = place(batch, n, m, alignment, q_lengths, kv_lengths, None)
    wide_q, wide_k, wide_v = (xp.broadcast_to(x, (*batch, *x.shape[-3:])) for x in (q, k, v))
    normal_q, saved_q = standardise.forward(without_padding(wide_q, q_lengths))
    normal_k, saved_k = standardise.forward(without_padding(wide_k, kv_lengths))
    limits = [np.repeat(x.astype(np.int64), heads)
              for x in (placement.q_lengths, placement.kv_lengths, placement.offset)]
    queries, keys = _flat(xp, normal_q), _flat(xp, _repeated(xp, normal_k, heads))
    given = require_decisions(decisions, ("clusters", "key_clusters", *softmax.DECISIONS))
    found, there = [], []
    for name, x, lengths in (("clusters", queries, limits[0]), ("key_clusters", keys, limits[1])):
        lists = given.pop(name, None)
        if lists is None:
            lists = _decide(xp, x, centroids, lengths, mode, cluster_size)
        else:
            shape = x.shape[1:2] if mode == "assign" else (centroids.shape[1], cluster_size)
            lists = _check_lists(name, lists, (*batch, heads, *shape), mode,
                                 centroids.shape[1] if mode == "assign" else x.shape[1])
            lists = lists.reshape(len(lengths), *shape)
            if mode == "top":
                _check_order(name, lists, lengths)
        found.append(lists)
        if type(lists) is not np.ndarray:
            there += [lists] + ([sorted_tokens(lists, lengths)] if mode == "assign" else [])
    home = iter(arrays.decided(*there) if there else ())
    tokens: list[np.ndarray | None] = [None, None]
    for side, lists in enumerate(found):
        if type(lists) is not np.ndarray:
            found[side] = next(home)
            tokens[side] = next(home) if mode == "assign" else None

    values = _flat(xp, _repeated(xp, wide_v, heads))
    options = {"scale": scale, "softcap": softcap, "dropout": dropout, "rng": rng,
               "return_lse": return_lse, "decisions": given}
    if mode == "assign":
        grouped = [regroup(lists, lengths, order)
                   for lists, lengths, order in zip(found, limits[:2], tokens, strict=True)]
        out, attended = _assign(xp, queries, keys, values, grouped, limits, cluster_size,
                                causal is not False, options)
    else:
        out, attended = _top(xp, queries, keys, values, found, limits, cluster_size,
                             causal is not False, reference, options)
    clusters, key_clusters = (x.reshape(*batch, heads, *x.shape[1:]) for x in found)
    saved = RoutingSaved(attended, q, k, v, centroids, saved_q, saved_k, mode, clusters,
                         key_clusters)
    shape = (*batch, heads, n)
    if return_lse:
        return (arrays.reshape(xp, out[0], (*shape, v.shape[-1])),
                arrays.reshape(xp, out[1], shape)), saved
    return arrays.reshape(xp, out, (*shape, v.shape[-1])), saved


def _flat(xp: Any, x: Array) -> Array:
    """(..., H, N, D) as (I, N, D)."""
    return arrays.reshape(xp, x, (math.prod(x.shape[:-2]), *x.shape[-2:]))


def _flat_lists(lists: np.ndarray) -> np.ndarray:
    """(..., H, C, w) as (I, C * w)."""
    return lists.reshape(math.prod(lists.shape[:-2]), lists.shape[-2] * lists.shape[-1])


def _repeated(xp: Any, x: Array, heads: int) -> Array:
    """(..., G, M, D) as (..., H, M, D)."""
    *lead, groups, m, width = x.shape
    if groups == heads:
        return x
    wide = xp.broadcast_to(xp.expand_dims(x, axis=-3),
                           (*lead, groups, heads // groups, m, width))
    return arrays.reshape(xp, wide, (*lead, heads, m, width))


def _summed_heads(xp: Any, gradient: Array, shape: tuple[int, ...], heads: int) -> Array:
    """Undo `_repeated` for a gradient: (..., G, M, D), summed over the heads of each group."""
    *lead, groups, m, width = shape
    if groups == heads:
        return arrays.reshape(xp, gradient, shape)
    wide = arrays.reshape(xp, gradient, (*lead, groups, heads // groups, m, width))
    acc = arrays.accumulator(xp, gradient)
    return arrays.cast(xp, xp.sum(arrays.cast(xp, wide, acc), axis=-3), gradient.dtype)


def _decide(xp: Any, x: Array, centroids: Array, lengths: np.ndarray, mode: str,
            size: int) -> Array:
    """Return each token's cluster (I, N), or each cluster's tokens (I, C, size), int32."""
    acc = arrays.accumulator(xp, x)
    items, n, width = x.shape
    heads, count, _ = centroids.shape
    centroids = arrays.cast(xp, centroids, acc)
    kernel = dispatch.kernel("clustering", None, x)
    if not kernel.ON_HOST:
        x, times = arrays.cast(xp, x, acc), items // max(1, heads)
        centroids = arrays.reshape(
            xp, xp.broadcast_to(centroids, (times, heads, count, width)), (items, count, width))
        inside = xp.arange(n, dtype=xp.int32, device=arrays.device(x)) < arrays.from_host(
            xp, lengths.astype(np.int32)[:, None], arrays.device(x))
        if mode == "assign":
            found = kernel.nearest(x, centroids, xp.zeros_like(centroids[:, :, 0]))
            # padding is in cluster 0, which nobody looks at
            return xp.where(inside, found, 0)
        return _largest_on_device(xp, centroids, x, inside, size)
    if mode == "assign":
        nodes = arrays.reshape(xp, centroids, (heads * count, width))
        first = np.arange(items) % heads * count
        sets = Sets(np.arange(items) * n, lengths, first, np.full(items, count))
        rows = arrays.reshape(xp, arrays.cast(xp, x, acc), (items * n, width))
        none = np.full(items * n, NONE, np.int32)
        node = kernel.nearest(rows, nodes, xp.zeros_like(nodes[:, 0]), sets, lengths > 0, none)
        return np.maximum(node.reshape(items, n) - first[:, None], 0).astype(np.int32)
    found = np.zeros((items, count, size), np.int32)
    for item in range(items):
        products = xp.matmul(centroids[item % heads, ...],
                             xp.matrix_transpose(arrays.cast(xp, x[item, ...], acc)))
        found[item] = _largest(products, int(lengths[item]), size)
    return found


def _largest_on_device(xp: Any, centroids: Array, x: Array, inside: Array, size: int) -> Array:
    """Return the tokens of the largest products with each centroid, where the tokens live."""
    from pyattn.kernels.array_api.choice import largest
    from pyattn.kernels.array_api.clustering import PIECE

    items, n, _ = x.shape
    count = centroids.shape[1]
    some = max(1, PIECE // max(1, count * n))
    parts = [xp.zeros((0, count, size), dtype=xp.int32, device=arrays.device(x))]
    for item in range(0, items, some):
        own = slice(item, min(item + some, items))
        products = xp.matmul(centroids[own, :, :], xp.matrix_transpose(x[own, :, :]))
        # what is not a number is never among the largest, if others are there
        products = xp.where(xp.isnan(products), -math.inf, products)
        eligible = xp.broadcast_to(inside[own, None, :], products.shape)
        parts.append(largest(products, eligible, size))
    return xp.concat(parts, axis=0)


def _largest(products: np.ndarray, length: int, size: int) -> np.ndarray:
    """Return the columns of the largest of each row, ascending; of equals the first."""
    products = products[:, :length]
    with np.errstate(invalid="ignore", over="ignore"):
        suspect = np.isnan(products.sum())
    if suspect:
        # what is not a number is never among the largest, if others are there
        products = np.where(np.isnan(products), -np.inf, products)
    found = np.full((len(products), size), NONE, np.int32)
    if length <= size:
        found[:, :length] = np.arange(length)
        return found
    least = np.partition(products, length - size, axis=1)[:, length - size, None]
    chosen = products >= least
    if np.count_nonzero(chosen) > found.size:
        above, equal = products > least, products == least
        room = size - np.count_nonzero(above, axis=1, keepdims=True)
        chosen = above | (equal & (np.cumsum(equal, axis=1) <= room))
    place = np.flatnonzero(chosen).reshape(found.shape)
    found[:] = place - np.arange(len(products))[:, None] * length
    return found


def _check_lists(name: str, lists: Any, shape: tuple[int, ...], mode: str,
                 limit: int) -> np.ndarray:
    lists = host_array(lists)
    if lists.shape != shape:
        raise ShapeError(f"decisions[{name!r}] must have shape {shape} in mode {mode!r}; got "
                         f"{lists.shape}")
    if lists.dtype.kind not in "iu":
        raise DtypeError(f"decisions[{name!r}] must be integers; got {lists.dtype}")
    lowest = 0 if mode == "assign" else NONE
    if lists.size and not (lists.min() >= lowest and lists.max() < limit):
        raise OptionError(f"decisions[{name!r}] must lie in {lowest}..{limit - 1}; got "
                          f"{lists.min()}..{lists.max()}")
    return lists


def _check_order(name: str, lists: np.ndarray, lengths: np.ndarray) -> None:
    if (lists >= lengths[:, None, None]).any():
        raise OptionError(f"decisions[{name!r}] must name no padding")
    before, after = lists[..., :-1], lists[..., 1:]
    if not np.where(after == NONE, True, (NONE < before) & (before < after)).all():
        raise OptionError(f"decisions[{name!r}] must list each cluster's tokens in ascending "
                          "order, each once, and -1 for none behind them")


def _assign(xp: Any, q: Array, k: Array, v: Array, grouped: list[Regrouped],
            limits: list[np.ndarray], size: int, causal: bool,
            options: dict[str, Any]) -> tuple[Any, Any]:
    """Let queries see the keys of their cluster that are nearest before them, or around them."""
    q_lengths, kv_lengths, offset = limits
    queries, keys = grouped
    items, n, m = len(offset), q.shape[1], k.shape[1]
    # numbers that ascend from slot to slot, item after item: by cluster, then position
    step = m + 1
    count = 1 + int(max(queries.label.max(initial=0), keys.label.max(initial=0)))
    base = np.arange(items)[:, None] * (count + 1) * step
    number = np.where(keys.token >= 0, keys.label * step + keys.token, count * step) + base

    def rank(target: np.ndarray) -> np.ndarray:
        """Count the keys of an item that come before the number `target`."""
        return np.searchsorted(number.ravel(), (target + base).ravel()).reshape(
            target.shape) - np.arange(items)[:, None] * m

    label = np.maximum(queries.label, 0)
    position = np.clip(queries.token + offset[:, None], -1, m - 1)
    here = rank(label * step + position + 1)
    first = np.maximum(rank(label * step), here - size)
    stop = here if causal else np.minimum(rank((label + 1) * step), here + size)
    stop = np.where(queries.token >= 0, stop, 0)
    mask = rounds((Round(Listing(queries.token), Listing(keys.token),
                         between(first[..., None], stop[..., None], m)),), items, n, m)
    return softmax.forward(*(xp.expand_dims(x, axis=1) for x in (q, k, v)), mask=mask,
                           alignment="top_left", q_lengths=q_lengths, kv_lengths=kv_lengths,
                           **options)


def _top(xp: Any, q: Array, k: Array, v: Array, found: list[np.ndarray],
         limits: list[np.ndarray], size: int, causal: bool, reference: bool,
         options: dict[str, Any]) -> tuple[Any, Any]:
    """Let the queries of each cluster see its keys; return the mean over a query's clusters."""
    queries, keys = found
    items, count, _ = queries.shape
    flat = [_flat_lists(x) for x in found]
    taken = [arrays.reshape(xp, take_tokens(x, lists), (items * count, 1, size, x.shape[-1]))
             for x, lists in ((q, flat[0]), (k, flat[1]), (v, flat[1]))]
    mask = None
    if causal:
        position = queries + limits[2][:, None, None]
        stop = np.arange(1, size + 1) + np.zeros_like(queries)
        if not reference:
            # how many of the cluster's keys do not stand later
            later = np.where(keys < 0, k.shape[1], keys)[..., None, :] > position[..., :, None]
            stop = size - np.count_nonzero(later, axis=-1)
        stop = np.where(queries >= 0, stop, 0).reshape(items * count, size, 1)
        mask = between(np.zeros_like(stop), stop, size)
    lengths = [np.count_nonzero(x >= 0, axis=-1).reshape(-1) for x in found]
    out, attended = softmax.forward(*taken, mask=mask, q_lengths=lengths[0],
                                    kv_lengths=lengths[1], alignment="top_left", **options)
    spread = spread_tokens(arrays.reshape(xp, out, (items, count * size, v.shape[-1])), flat[0],
                           q.shape[1])
    return _divided(xp, spread, flat[0]), attended


def _divided(xp: Any, x: Array, lists: np.ndarray) -> Array:
    """Divide tokens (I, N, D) by how often they are listed."""
    items, n, _ = x.shape
    # one more than there are tokens: what is none comes before the first
    place = lists.astype(np.int64) + 1 + np.arange(items)[:, None] * (n + 1)
    times = np.bincount(place.ravel(), minlength=items * (n + 1)).reshape(items, n + 1)
    times = np.maximum(times[:, 1:], 1)[..., None]
    return arrays.cast(xp, x / xp.astype(arrays.from_host(xp, times, arrays.device(x)), x.dtype),
                       x.dtype)
