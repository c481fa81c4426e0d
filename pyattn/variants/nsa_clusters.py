"""Two branches of native sparse attention by content: to clusters of keys, and to chosen keys.

Keys are grouped by k-means or by their hashes. In the compressed branch one key and one value stand
for each group; in the selected branch each query attends to the keys nearest to it in the groups
nearest to it. Both read one `Grouping`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import arrays, masks
from ..arrays import Array
from ..checks import (
    OptionError,
    ShapeError,
    require_choice,
    require_flag,
    require_integer,
    require_rng,
)
from ..differentiable import ON_HOST, Saved, gradients
from ..engines import edges
from ..engines.placement import first_position
from ..features.clustering import require_numbers, segment_means
from ..features.hashing import hashed, require_buckets
from ..features.retrieval import (
    BRANCHING,
    Groups,
    Selection,
    find_medoids,
    group_keys,
    hashed_tokens,
    select_from_buckets,
    select_tokens,
)
from ..masks.algebra import EMPTY, FULL, PARTIAL, host_array
from ..masks.placement import Positional
from .attention import attention

SEGMENT, TOKENS_OF_A_CLUSTER = 64, 16
"""Of causal k-means, unless said otherwise."""

FOREVER = 2**40


@dataclasses.dataclass(frozen=True)
class Grouping:
    """Which keys belong together, for both branches; lives on the host."""

    groups: Groups
    medoids: tuple[np.ndarray, ...] | None = None
    """For each level the key that stands for a group, int32 (..., G, K); None: the mean does."""
    buckets: tuple[np.ndarray, np.ndarray] | None = None
    """Of the queries and of the keys, (..., G, rounds, N or M), if hashes tell the groups."""
    width: int = 0
    """D, for what grouping has cost."""

    @property
    def decisions(self) -> dict[str, Array]:
        """``clusters`` (..., G, levels, M), ``medoids`` (..., G, K) of all levels, ``buckets``."""
        found = {"clusters": np.stack(self.groups.assignments, axis=-2)}
        if self.medoids is not None:
            found["medoids"] = np.concatenate(self.medoids, axis=-1)
        if self.buckets is not None:
            found["buckets"] = np.concatenate(self.buckets, axis=-1)
        return found

    @property
    def flops(self) -> int:
        """Operations of the products that clustering took."""
        return 2 * self.groups.pairs * self.width


def group(q: Array, k: Array, *, mode: str = "kmeans", num_clusters: int | None = None,
          iterations: int = 10, metric: str = "l2", representative: str = "mean",
          segment: int | None = None, tree: bool = False, num_buckets: Any = 16,
          num_rounds: int = 4, rng: Any = None, rotations: Array | None = None,
          causal: bool | str = True, kv_lengths: Any = None,
          decisions: Mapping[str, Any] | None = None) -> Grouping:
    """Group the keys, by k-means or by hashing; see `pyattn.nsa_attention` for the options.

    If causal, tokens are cut into segments of `segment`, each grouped on its own: what has not been
    read decides nothing. Otherwise all keys are grouped together.
    """
    require_choice("mode", mode, ("kmeans", "lsh"))
    causal = require_choice("causal", causal, (False, True, "top_left"))
    tree, decisions = require_flag("tree", tree), decisions or {}
    _require_alike(q, k, k)
    *lead, m, width = k.shape
    if q.shape[-1] != width:
        raise ShapeError(f"k has width {width} but q has width {q.shape[-1]}; they must be equal")
    if causal is False and segment is not None:
        raise OptionError("segment is for causal attention; without causal keys are grouped as a "
                          f"whole; got segment={segment!r}")
    if causal is not False:
        # in a longer one nothing is over either
        segment = min(m + 1, require_integer("segment", SEGMENT if segment is None else segment,
                                             minimum=1))
    lengths = None if kv_lengths is None else host_array(kv_lengths)[..., None]
    if num_clusters is None:
        num_clusters = math.isqrt(m) if segment is None else segment // TOKENS_OF_A_CLUSTER
        num_clusters = max(1, num_clusters)
    # more than there are tokens would be empty
    num_clusters = min(require_integer("num_clusters", num_clusters, minimum=1),
                       max(1, m if segment is None else segment))
    if mode == "lsh":
        if tree or representative != "mean":
            raise OptionError('tree and representative="medoid" are for mode="kmeans"')
        return _by_hash(q, k, num_clusters, require_buckets(num_buckets), num_rounds, rng,
                        rotations, segment, lengths, decisions)
    require_choice("representative", representative, ("mean", "medoid"))
    if "clusters" in decisions:
        groups = _remembered(decisions["clusters"], _unassigned(k, num_clusters, segment, tree), k)
    else:
        groups = group_keys(k, num_clusters=num_clusters, iterations=iterations, metric=metric,
                            segment=segment, tree=tree, lengths=lengths)
    medoids = None
    if representative == "medoid":
        medoids = find_medoids(k, groups, metric)
        if "medoids" in decisions:
            given = require_numbers("decisions' medoids", decisions["medoids"],
                                    (*lead, sum(groups.nodes)), m)
            medoids = tuple(np.split(given, np.cumsum(groups.nodes)[:-1], axis=-1))
    return Grouping(groups, medoids, None, width)


def _remembered(clusters: Any, groups: Groups, k: Array) -> Groups:
    """Return the groups with the assignments of an earlier call."""
    *lead, m, _ = k.shape
    levels = len(groups.nodes)
    given = require_numbers("decisions' clusters", clusters, (*lead, levels, m),
                            max((*groups.nodes, 1)))
    return dataclasses.replace(groups, assignments=tuple(
        np.ascontiguousarray(given[..., level, :]) for level in range(levels)))


def _unassigned(k: Array, num_clusters: int, segment: int | None, tree: bool) -> Groups:
    """Return groups like those that k-means makes, without assignments."""
    if segment is None:
        return group_keys(k[..., :0, :], num_clusters=num_clusters, tree=tree)
    count = k.shape[-2] // segment
    nodes = [count * num_clusters]
    while tree and count >= BRANCHING:
        count //= BRANCHING
        nodes.append(count * num_clusters)
    return Groups((), tuple(nodes), segment, num_clusters)


def _by_hash(q: Array, k: Array, num_clusters: int, factors: tuple[int, ...], num_rounds: int,
             rng: Any, rotations: Array | None, segment: int | None, lengths: Any,
             decisions: Mapping[str, Any]) -> Grouping:
    """Hash queries and keys; the groups are keys that the first few rotations tell apart no more.

    The buckets that keys are chosen from are many, so that each is small; groups, each of which all
    later queries read, are to be few.
    """
    *lead, m, width = k.shape
    n, xp = q.shape[-2], arrays.namespace(q, k)
    num_rounds, rng = require_integer("num_rounds", num_rounds, minimum=1), require_rng(rng)
    if rotations is None:
        shape = (k.shape[-3], width, num_rounds, sum(factors) // 2)
        rotations = arrays.from_host(xp, rng.standard_normal(shape), arrays.device(k))
    elif arrays.require_float("rotations", rotations) and rotations.ndim != 4:
        raise ShapeError("rotations must be (G or 1, D, num_rounds, half the sum of num_buckets); "
                         f"got {tuple(rotations.shape)}")
    few = min(max(1, num_clusters // 2), rotations.shape[-1])
    groups = Groups((), (2 * few,)) if segment is None else Groups(
        (), (m // segment * 2 * few,), segment, 2 * few)
    found = []
    if "buckets" not in decisions:
        found.append(hashed_tokens(q, k, num_buckets=factors, num_rounds=num_rounds,
                                   rotations=rotations))
    if "clusters" not in decisions:
        found.append(hashed(k, num_buckets=2 * few, num_rounds=1,
                            rotations=rotations[..., :1, :few]))
    home = list(arrays.decided(*found)) if found else []
    both = home.pop(0) if "buckets" not in decisions else require_numbers(
        "decisions' buckets", decisions["buckets"], (*lead, num_rounds, n + m), math.prod(factors))
    buckets = both[..., :n], both[..., n:]
    if "clusters" in decisions:
        return Grouping(_remembered(decisions["clusters"], groups, k), None, buckets, width)
    own, = home
    place = np.arange(m)
    whole = np.broadcast_to(m if lengths is None else lengths, tuple(lead))[..., None]
    number = 0 * place if segment is None else place // segment
    over = place < whole if segment is None else (number + 1) * segment <= whole
    numbers = np.where(over, own[..., 0, :] + number * 2 * few, -1).astype(np.int32)
    return Grouping(dataclasses.replace(groups, assignments=(numbers,)), None, buckets, width)


@dataclasses.dataclass(frozen=True)
class CompressedSaved(Saved):
    """Attention to what stands for the groups, and how that was made of keys and values."""

    attended: Any
    k: tuple[Any, ...]
    v: tuple[Any, ...]
    grouping: Grouping

    @property
    def decisions(self) -> dict[str, Array]:
        """Those of the grouping: ``clusters``, ``medoids``, ``buckets``."""
        return self.grouping.decisions

    @property
    def stats(self) -> dict[str, int]:
        """Those of the attention, in which a group counts as one key; flops with clustering's."""
        stats = self.attended.stats
        return stats | {"flops": stats["flops"] + self.grouping.flops}

    def backward(self, dout: Array, dlse: Array | None = None) -> Any:
        """Gradients of q, k and v: what stands for a group gives its own back to the members."""
        grads = self.attended.backward(dout, dlse)
        found = {"q": grads.q}
        for name, levels in (("k", self.k), ("v", self.v)):
            start, total = 0, None
            for level in levels:
                stop = start + level.counts.shape[-1]
                own = level.backward(getattr(grads, name)[..., start:stop, :]).x
                total, start = own if total is None else arrays.added(total, own), stop
            found[name] = total
        return gradients(("q", "k", "v"))(**found)


def compressed(q: Array, k: Array, v: Array, *, grouping: Grouping | None = None,
               causal: bool | str = True, scale: float | None = None, q_lengths: Any = None,
               kv_lengths: Any = None, decisions: Mapping[str, Any] | None = None,
               **options: Any) -> tuple[tuple[Array, Array], CompressedSaved]:
    """Attend to groups of keys, each by the one key and value that stand for it.

    That is the mean of its keys and of its values, or its medoid's; with ``log |c|`` added to the
    score, a group weighs as much as its keys. A causal query sees the groups of the segments that
    are over. In a tree it sees the fewest nodes that stand for these, so that what is long past is
    seen coarsely: O(log N) of them; and without segments the finest level that has at most
    ``8 log2(M)`` nodes. E.g. four tokens, segments of two, a group each: 0->{} 1->{a} 2->{a}
    3->{a, b}.

    Parameters
    ----------
    q, k, v, causal, scale, q_lengths, kv_lengths
        As for `pyattn.attention`, with equal leading axes.
    grouping : Grouping, optional
        What `group` made, of these keys or of others of the same tokens; else it is made of `k`
        with the `options`, and what `decisions` hold of an earlier one.

    Returns
    -------
    ((out, lse), saved)
        A query that sees no group: 0, and log-sum-exp -inf.
    """
    _require_alike(q, k, v)
    if grouping is None:
        grouping = group(q, k, causal=causal, kv_lengths=kv_lengths, decisions=decisions, **options)
    groups, medoids = grouping.groups, grouping.medoids
    levels = _levels_seen(groups, k.shape[-2])
    xp, heads, n = arrays.namespace(q, k, v), q.shape[-3], q.shape[-2]
    made: dict[str, list[Any]] = {"k": [], "v": []}
    for name, x in (("k", k), ("v", v)):
        for level in levels:
            chosen = None if medoids is None else medoids[level]
            made[name].append(segment_means.forward(
                x, groups.assignments[level], groups.nodes[level], medoids=chosen)
                if groups.nodes[level] else _nothing(x, groups.assignments[level]))
    saved = {name: tuple(pair[1] for pair in pairs) for name, pairs in made.items()}
    keys, values = (xp.concat([pair[0] for pair in pairs], axis=-2) for pairs in made.values())
    counts = np.concatenate([level.counts for level in saved["k"]], axis=-1)
    with np.errstate(divide="ignore"):
        weight = np.log(np.repeat(counts, heads // max(1, k.shape[-3]), axis=-2))[..., None, :]
    bias = xp.astype(arrays.from_host(xp, weight, arrays.device(k)), arrays.accumulator(xp, k))
    mask: masks.Mask | None = None
    if groups.segment is not None:
        mask = masks.placed(_seen(groups, levels),
                            first_position(n, k.shape[-2], causal, q_lengths, kv_lengths))
    found, attended = attention.forward(q, keys, values, mask=mask, bias=bias, scale=scale,
                                        q_lengths=q_lengths, return_lse=True)
    return found, CompressedSaved(attended, saved["k"], saved["v"], grouping)


def _require_alike(q: Array, k: Array, v: Array) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.shape[:-3] == k.shape[:-3] == v.shape[:-3]:
        raise ShapeError(f"the leading axes of q, k and v must be equal ({shapes})")
    if k.shape[-2] != v.shape[-2]:
        raise ShapeError(f"k and v must have equally many tokens ({shapes})")


def _nothing(x: Array, assignment: np.ndarray) -> tuple[Array, Any]:
    """Return no means at all, where tokens do not fill a segment."""
    means, saved = segment_means.forward(x, assignment, 1)
    return means[..., :0, :], dataclasses.replace(saved, counts=saved.counts[..., :0])


def _levels_seen(groups: Groups, m: int) -> range:
    """Return which levels the compressed branch shows."""
    levels = range(len(groups.nodes))
    if groups.segment is not None or len(levels) == 1:
        return levels
    few = BRANCHING * max(1, math.ceil(math.log2(max(m, 2))))
    level = next((level for level in levels if groups.nodes[level] <= few), levels[-1])
    return range(level, level + 1)


def _seen(groups: Groups, levels: range) -> masks.Mask:
    """Return who sees which node: from the end of its segment until that of the one above."""
    begins, ends = [], []
    for level in levels:
        number = np.arange(groups.nodes[level]) // max(1, groups.each)
        span = (groups.segment or 1) * BRANCHING**level
        begins.append((number + 1) * span - 1)
        above = number // BRANCHING
        replaced = (level + 1 < len(groups.nodes)) & (
            above < groups.nodes[min(level + 1, len(groups.nodes) - 1)] // max(1, groups.each))
        ends.append(np.where(replaced, (above + 1) * span * BRANCHING - 1, FOREVER))
    return spans(np.concatenate(begins), np.concatenate(ends))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class spans(Positional):
    """Key j is seen from positions ``begins[j]`` to ``ends[j]``, which is not one of them."""

    begins: np.ndarray
    ends: np.ndarray

    @functools.cached_property
    def _largest(self) -> np.ndarray:
        """Of runs of keys, 2**level long from each key on: the largest of four numbers."""
        table = np.stack([-self.begins, self.begins, -self.ends, self.ends])
        tables, reach = [table], 1
        while 2 * reach <= table.shape[1]:
            rest = np.full((4, reach), -FOREVER - 1)
            table = np.maximum(table, np.concatenate([table[:, reach:], rest], axis=1))
            tables.append(table)
            reach *= 2
        return np.stack(tables)

    def _ranges(self, j0: np.ndarray, j1: np.ndarray) -> list[np.ndarray]:
        """Return the least and the largest begin of keys j0 to j1, and so of their ends."""
        level = np.log2(j1 - j0 + 1).astype(np.int64)
        last = j1 + 1 - 2**level
        found = np.maximum(self._largest[level, :, j0], self._largest[level, :, last])
        sign = np.array([-1, 1, -1, 1])
        return list(np.moveaxis(sign * found, -1, 0))

    def allowed(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Tell by the span of the key."""
        j = np.minimum(j, self.begins.size - 1)
        return (self.begins[j] <= i) & (i < self.ends[j])

    def classify(self, i0: np.ndarray, i1: np.ndarray, j0: np.ndarray,
                 j1: np.ndarray) -> np.ndarray:
        """Tell by the first and the last of the keys to begin and to end."""
        j1 = np.minimum(j1, self.begins.size - 1)
        first, last, soonest, latest = self._ranges(np.minimum(j0, j1), j1)
        full = (last <= i0) & (i1 < soonest)
        return np.where(full, FULL, np.where((first > i1) | (latest <= i0), EMPTY, PARTIAL))


@dataclasses.dataclass(frozen=True)
class SelectedSaved(Saved):
    """Attention to the keys listed, and how they were found."""

    attended: Any
    indices: np.ndarray = dataclasses.field(metadata=ON_HOST)
    grouping: Grouping | None
    scored: int
    """Products of queries with groups and keys that choosing took."""
    owns_grouping: bool = False
    """Whether the grouping was made here, and so counts here."""

    @property
    def decisions(self) -> dict[str, Array]:
        """``indices`` (..., G, N, n), and those of the grouping."""
        return ({} if self.grouping is None else self.grouping.decisions) | {
            "indices": self.indices}

    @property
    def stats(self) -> dict[str, int]:
        """Those of the attention, ``scores`` that choosing took, and flops with theirs."""
        stats, width = self.attended.stats, self.attended.q.shape[-1]
        own = self.grouping.flops if self.grouping is not None and self.owns_grouping else 0
        return stats | {"scores": self.scored,
                        "flops": stats["flops"] + own + 2 * self.scored * width}

    def backward(self, dout: Array, dlse: Array | None = None) -> Any:
        """Gradients of q, k and v: the lists are constants."""
        return self.attended.backward(dout, dlse)


def selected_tokens(q: Array, k: Array, v: Array, *, grouping: Grouping | None = None,
                    num_top_clusters: int = 8, num_selected: int = 64,
                    num_candidates: int = 64, threshold: float | None = None,
                    duplicate_threshold: float | None = None, causal: bool | str = True,
                    scale: float | None = None, q_lengths: Any = None, kv_lengths: Any = None,
                    decisions: Mapping[str, Any] | None = None,
                    **options: Any) -> tuple[tuple[Array, Array], SelectedSaved]:
    """Attend to the keys nearest to each query among those of the groups nearest to it.

    Choosing goes by cosines, attention by ordinary scaled products; the heads of a group share one
    list, chosen by the mean of their cosines. See `pyattn.features.retrieval.select_tokens`; with
    hashes, `select_from_buckets`.

    Parameters
    ----------
    q, k, v, causal, scale, q_lengths, kv_lengths
        As for `pyattn.attention`, with equal leading axes.
    grouping, decisions, options
        As for `compressed`; `decisions` may hold ``indices``, which nothing is computed for then.
    num_top_clusters, num_selected, threshold, duplicate_threshold
        As for `select_tokens`.
    num_candidates : int
        Of each round of hashes.

    Returns
    -------
    ((out, lse), saved)
        A query that has no key: 0, and log-sum-exp -inf.
    """
    _require_alike(q, k, v)
    *lead, heads, n, _ = q.shape
    groups, m = k.shape[-3:-1]
    batch, decisions = math.prod(lead), decisions or {}
    owns = False
    if "indices" in decisions:
        given = host_array(decisions["indices"])
        indices = require_numbers("decisions' indices", given,
                                  (*lead, groups, n, given.shape[-1] if given.ndim else 0), m)
        lists = edges.Edges.from_lists(indices.reshape(batch, groups, n, indices.shape[-1]),
                                       batch=batch, heads=heads, tokens=m)
        scored = 0
    else:
        if grouping is None:
            owns = True
            grouping = group(q, k, causal=causal, kv_lengths=kv_lengths, decisions=decisions,
                             **options)
        chosen = _choose(q, k, grouping, _last(q, k, causal, q_lengths, kv_lengths), kv_lengths,
                         num_candidates, {
                             "num_top_clusters": num_top_clusters, "num_selected": num_selected,
                             "threshold": threshold, "duplicate_threshold": duplicate_threshold})
        indices, scored = chosen.indices, chosen.scored
        lists = _lists(indices.reshape(batch * groups, n, indices.shape[-1]), batch, heads, m)
    found, attended = edges.forward(q, k, v, lists, scale=scale, return_lse=True)
    return found, SelectedSaved(attended, indices, grouping, scored, owns)


def _choose(q: Array, k: Array, grouping: Grouping, last: np.ndarray, kv_lengths: Any,
            num_candidates: int, options: dict[str, Any]) -> Selection:
    if grouping.buckets is None:
        return select_tokens(q, k, grouping.groups, last, **options)
    del options["num_top_clusters"]
    lengths = None if kv_lengths is None else host_array(kv_lengths)[..., None]
    return select_from_buckets(q, k, grouping.buckets, last, num_candidates=num_candidates,
                               lengths=lengths, **options)


def _last(q: Array, k: Array, causal: bool | str, q_lengths: Any, kv_lengths: Any) -> np.ndarray:
    """Return the last key that each query may see, (B..., 1, N); -1 for padding."""
    (n, m), lead = (q.shape[-2], k.shape[-2]), tuple(q.shape[:-3])
    place, ends = np.arange(n), host_array(m if kv_lengths is None else kv_lengths)[..., None]
    alive = place < host_array(n if q_lengths is None else q_lengths)[..., None]
    last = ends - 1 + 0 * place
    if causal is not False:
        offset = host_array(first_position(n, m, causal, q_lengths, kv_lengths))[..., None]
        last = np.minimum(np.maximum(place + offset, -1), last)
    return np.broadcast_to(np.where(alive, last, -1), (*lead, n))[..., None, :]


def _lists(rows: np.ndarray, batch: int, heads: int, tokens: int) -> edges.Edges:
    """Make lists of rows (B G, N, n) that are ascending, -1 filling up."""
    there = rows >= 0
    groups = len(rows) // max(1, batch)
    owner = np.arange(batch)[:, None] * groups + np.arange(heads) // max(1, heads // max(1, groups))
    return edges.Edges(edges.offsets(np.count_nonzero(there, axis=-1)), rows[there],
                       owner.astype(np.int32), tokens)
