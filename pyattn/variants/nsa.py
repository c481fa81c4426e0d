"""Native sparse attention: compressed, selected and nearby keys, mixed by gates."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..checks import (
    DtypeError,
    OptionError,
    ShapeError,
    require_broadcast,
    require_choice,
    require_decisions,
    require_integer,
    require_real,
)
from ..differentiable import Saved, differentiable, gradients
from . import nsa_blocks, nsa_clusters
from .attention import attention

BRANCHES = ("compressed", "selected", "window")
"""In the order of the gates."""

ROWS = 2**12
"""So many rows of outputs are mixed at a time on the host, where they stay in the cache."""


@dataclasses.dataclass(frozen=True)
class Branch(Saved):
    """What one branch found, and the names of the arguments that were its keys and values."""

    out: Array
    lse: Array
    saved: Any
    k: str
    v: str


@dataclasses.dataclass(frozen=True)
class NsaSaved(Saved):
    """The three branches, and the gates that mix them."""

    branches: tuple[Branch, ...]
    gates: Array
    combine: str
    names: tuple[str, ...]
    """Of the array arguments given, in order."""

    @property
    def decisions(self) -> dict[str, Array]:
        """What the selected branch selected: ``blocks`` (..., G, N, count); the branches' own."""
        found: dict[str, Array] = {}
        for branch in self.branches:
            found |= branch.saved.decisions
        return found

    @property
    def stats(self) -> dict[str, int]:
        """Counters of the three branches together, and of the selection."""
        total: dict[str, int] = {}
        for stats in self.branch_stats.values():
            total = {name: total.get(name, 0) + count for name, count in stats.items()}
        return total

    @property
    def branch_stats(self) -> dict[str, dict[str, int]]:
        """Counters of each branch by name."""
        return {name: branch.saved.stats
                for name, branch in zip(BRANCHES, self.branches, strict=True)}

    def backward(self, dout: Array) -> Any:
        """Gradients of the array arguments given; those of weights are dicts."""
        mix = _GATED[self.combine].backward
        found: dict[str, Any] = {}
        dgates, pulls = mix(self.branches, self.gates, dout)
        for branch, (dbranch, dlse) in zip(self.branches, pulls, strict=True):
            grads = branch.saved.backward(dbranch, dlse)._asdict()
            grads |= {branch.k: grads.pop("k"), branch.v: grads.pop("v")}
            for name, grad in grads.items():
                found[name] = arrays.added(found[name], grad) if name in found else grad
            # each is as large as the output: the next branch needs the room
            del dbranch, grads, grad
        found["gates"] = dgates
        return gradients(self.names)(**{name: found[name] for name in self.names})


@differentiable
def nsa_attention(q: Array, k: Array, v: Array, gates: Array, k_compressed: Array | None = None,
                  v_compressed: Array | None = None, k_window: Array | None = None,
                  v_window: Array | None = None, k_weights: Mapping[str, Array] | None = None,
                  v_weights: Mapping[str, Array] | None = None, *, mode: str = "paper",
                  window: int = 511, num_selected: int | None = None, block_size: int = 32,
                  stride: int = 16, select_block: int = 64, num_initial: int = 1,
                  num_local: int = 2, compression: str = "mean", activation: str = "gelu",
                  num_clusters: int | None = None, iterations: int = 10, metric: str = "l2",
                  representative: str = "mean", tree: bool = False, num_top_clusters: int = 8,
                  num_buckets: Any = 16, num_rounds: int = 4, rng: Any = None,
                  rotations: Array | None = None, num_candidates: int = 64,
                  segment: int | None = None, threshold: float | None = None,
                  duplicate_threshold: float | None = None, combine: str = "gates",
                  causal: bool | str = True, scale: float | None = None, q_lengths: Any = None,
                  kv_lengths: Any = None, decisions: Mapping[str, Any] | None = None,
                  ) -> tuple[Array, NsaSaved]:
    """Native sparse attention: a summary of all, a few blocks in full, and the neighbours.

    A query attends three times, and its gates mix what the three branches find:
    ``out = g_0 compressed + g_1 selected + g_2 window``.

    - *compressed*: overlapping blocks of `block_size` tokens, one every `stride`, each summed up in
      one key and one value (`pyattn.features.compress`); seen once the block is complete.
    - *selected*: blocks of `select_block` keys, up to the query's own position. All heads that
      share a key/value head read the same `num_selected` blocks: the first `num_initial`, the last
      `num_local` with the query's own, and those that these heads together weigh most in the
      compressed branch (`pyattn.features.important_blocks`).
    - *window*: ``0 <= i - j <= window``.

    That is ``mode="paper"``. In the other modes keys are grouped by what they hold. With
    ``mode="kmeans"`` groups are clusters: in the compressed branch a key and a value that stand for
    the members, with ``log |c|`` added to the score, and in the selected branch the `num_selected`
    keys whose cosines with the query are largest, of the clusters nearest to it. Causal, tokens are
    clustered segment by segment, and a segment's clusters are seen once it is over. With
    ``mode="lsh"`` keys are selected of the query's own buckets of random hashes, in several rounds,
    and the groups of the compressed branch are those of a coarser hash.

    E.g., in the paper's mode, six tokens, ``block_size=2, stride=1, select_block=2,
    num_selected=2, num_local=1, window=1``: query 5 sees compressed {0, 1} {1, 2} {2, 3} {3, 4}
    {4, 5}, selected blocks {0, 1} and {4, 5}, window {4, 5}; query 0 sees no compressed block,
    {0} and {0}.

    Parameters
    ----------
    q : array, shape (..., H, N, D), float16, bfloat16, float32 or float64
        Queries.
    k : array, shape (..., G, M, D), dtype of `q`
        Keys; any G that divides H.
    v : array, shape (..., G, M, E), dtype of `q`
        Values.
    gates : array broadcasting to (..., H, N, 3), values in [0, 1], any float dtype
        Of the compressed, the selected and the window branch; usually ``sigmoid(x @ w)``.
    k_compressed, v_compressed, k_window, v_window : arrays, shapes of `k` and `v`, optional
        Keys and values that a branch has for itself, as in the paper, k and v together. Without
        them it has `k` and `v`, which are always those of the selected branch. `k_compressed` holds
        tokens, before they are compressed.
    k_weights, v_weights : dicts of arrays, optional
        What keys and values are compressed with: ``pe`` (block_size, D), and ``w1, b1, w2, b2`` for
        ``compression="mlp"``, ``kernel`` for ``"conv"``, as for `pyattn.features.compress`.
    mode : {"paper", "kmeans", "lsh"}
    window : int, tokens
        Neighbours before the query, besides itself: the paper's 512 keys are 511. Two-sided if not
        causal.
    num_selected : int, default 16 blocks, or 64 keys in the modes without blocks
        How long a list is.
    block_size, stride, select_block : int, tokens
        Of the paper's mode, as above.
    num_initial, num_local : int
        Blocks that are always in the list; of the paper's mode.
    compression : {"mean", "mlp", "conv"}
        Of the paper's mode.
    activation : {"gelu", "relu", "gelu_tanh", "silu"}
        Of ``compression="mlp"``.
    num_clusters : int
        Groups of a segment, by default one for each 16 tokens, or of all, if not causal, by default
        sqrt(M); with ``"lsh"`` rounded down to an even number, at least 2, and at most the sum of
        `num_buckets`.
    iterations, metric
        Of ``"kmeans"``, as for `pyattn.features.kmeans`.
    representative : {"mean", "medoid"}
        What stands for a cluster.
    tree : bool
        Clusters of clusters, eight by eight: what is long past is seen coarsely, and lists are
        found from the top down, in O(log N) for each query.
    num_top_clusters : int
        Clusters that keys are selected from.
    num_buckets, num_rounds, rng, rotations
        Of ``"lsh"``, as for `pyattn.features.lsh_hash`: the buckets that keys are selected from.
        The groups of the compressed branch are coarser, as every later query reads them all: keys
        that the first ``num_clusters / 2`` rotations of the first round tell apart no more.
    num_candidates : int
        Keys of the query's bucket, in each round of hashes, that may be selected.
    segment : int, default 64, tokens
        Grouped on their own, if causal; of ``"kmeans"`` and ``"lsh"``.
    threshold, duplicate_threshold : float, optional
        Keys with a smaller cosine to the query are not selected, nor those with a larger one to a
        key that is; of ``"kmeans"`` and ``"lsh"``.
    combine : {"gates", "single_softmax"}
        ``"gates"`` as above, each branch with a softmax of its own. ``"single_softmax"``: one
        softmax over the keys of all three, where a gate multiplies its branch's exponentials; a key
        that two branches see counts twice.
    causal : bool or "top_left"
        Positions as for `pyattn.attention`. If False, all compressed and all selected blocks may be
        seen, of which `num_local` on either side (its own among them) are always listed.
    scale : float, default D ** -0.5
    q_lengths, kv_lengths : int or array of int, broadcasting to the leading axes, optional
        Tokens from here on are padding; a block that reaches there is not compressed. `kv_lengths`
        must broadcast to the leading axes of `k` and of `v`.
    decisions : dict, optional
        What an earlier call selected, from its ``saved.decisions``: ``blocks`` (..., G, N, count);
        in the other modes ``indices`` (..., G, N, num_selected), and ``clusters`` and ``medoids``,
        or ``buckets``.

    Returns
    -------
    array, shape (..., H, N, E), dtype of `q`
        A branch that sees no key adds 0.

    Raises
    ------
    ShapeError, DtypeError, OptionError
        Arguments that do not fit, more blocks that are always listed than `num_selected`, or an
        option that is another mode's.

    Notes
    -----
    Time, in the paper's mode, O(N M / stride + N num_selected select_block + N window), each times
    H (D + E), where M is halved by causality: not O(N log N). Telling importance costs as much
    again as the compressed branch's products of queries and keys. With ``"kmeans"``
    O(N (C + num_top_clusters M / C + num_selected + window)) for C clusters. Kept for backward: the
    arguments, for each branch its output and log-sum-exp, compressed keys and values, and the
    lists. ``saved.branch_stats`` counts each branch apart. Lists and groups are constants of the
    backward, so compression learns from the compressed branch alone. A branch is computed even
    where its gates are 0: its gates learn from it.

    Differs from the paper: importance goes by the tokens that blocks share (its equation 9 sums
    over other indices than its text); sizes need not divide one another. The modes without blocks
    are not the paper's; they need equal leading axes of q, k and v, and take no weights. With keys
    of their own for each branch, groups are those of `k_compressed`.

    References
    ----------
    .. [1] Yuan et al., "Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse
       Attention", 2025, arXiv:2502.11089, section 3.

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 100, 16))
    >>> gates = np.zeros((2, 100, 3))
    >>> gates[..., 1] = 1                                   # 16 blocks of 64 are all there is
    >>> out, saved = pyattn.nsa_attention.forward(q, k, v, gates)
    >>> np.allclose(out, pyattn.attention(q, k, v, causal=True))
    True
    >>> saved.backward(out)._fields, saved.decisions["blocks"].shape
    (('q', 'k', 'v', 'gates'), (2, 100, 2))
    """
    require_choice("mode", mode, tuple(_OPTIONS))
    require_choice("combine", combine, tuple(_GATED))
    window = require_integer("window", window, minimum=0)
    causal = require_choice("causal", causal, (False, True, "top_left"))
    scale = None if scale is None else require_real("scale", scale)
    options = _options(mode, {
        "num_selected": num_selected, "block_size": block_size, "stride": stride,
        "select_block": select_block, "num_initial": num_initial, "num_local": num_local,
        "compression": compression, "activation": activation, "num_clusters": num_clusters,
        "iterations": iterations, "metric": metric, "representative": representative,
        "tree": tree, "num_top_clusters": num_top_clusters, "num_buckets": num_buckets,
        "num_rounds": num_rounds, "rng": rng, "rotations": rotations,
        "num_candidates": num_candidates, "segment": segment, "threshold": threshold,
        "duplicate_threshold": duplicate_threshold, "k_weights": k_weights,
        "v_weights": v_weights})
    given: dict[str, Any] = {
        "q": q, "k": k, "v": v, "gates": gates, "k_compressed": k_compressed,
        "v_compressed": v_compressed, "k_window": k_window, "v_window": v_window,
        "k_weights": k_weights, "v_weights": v_weights}
    names = tuple(name for name, x in given.items() if x is not None)
    keys = {name: _keys(name, given) for name in BRANCHES}
    _check_keys(given, q, gates)
    for name in ("k_weights", "v_weights"):
        if not isinstance(given[name], Mapping | None):
            raise DtypeError(f"{name} must be a dict of arrays; got {type(given[name]).__name__}")
    decisions = require_decisions(decisions, _DECISIONS[mode])
    (k_far, v_far), _, (k_near, v_near) = (map(given.get, keys[name]) for name in BRANCHES)
    placed: dict[str, Any] = {"causal": causal, "scale": scale, "q_lengths": q_lengths,
                              "kv_lengths": kv_lengths}
    near, window_saved = attention.forward(
        q, k_near, v_near, window=window, return_lse=True, **placed)
    if mode == "paper":
        (coarse, compressed_saved), (fine, selected_saved) = nsa_blocks.branches(
            q, (k_far, v_far), (k, v), (k_weights, v_weights), **options, **placed,
            decisions=decisions)
    else:
        (coarse, compressed_saved), (fine, selected_saved) = _by_content(
            mode, q, (k_far, v_far), (k, v), options, placed, decisions)
    branches = tuple(Branch(out, lse, saved, *keys[name]) for name, (out, lse), saved in (
        ("compressed", coarse, compressed_saved), ("selected", fine, selected_saved),
        ("window", near, window_saved)))
    _check_gates(gates, near[0])
    return (_GATED[combine].forward(branches, gates),
            NsaSaved(branches, gates, combine, names))


_GROUPING = {"kmeans": ("num_clusters", "iterations", "metric", "representative", "segment",
                        "tree"),
             "lsh": ("num_clusters", "num_buckets", "num_rounds", "rng", "rotations", "segment")}
_CHOOSING = {"kmeans": ("num_selected", "num_top_clusters", "threshold", "duplicate_threshold"),
             "lsh": ("num_selected", "num_candidates", "threshold", "duplicate_threshold")}
_OPTIONS = {"paper": ("num_selected", "block_size", "stride", "select_block", "num_initial",
                      "num_local", "compression", "activation", "k_weights", "v_weights"),
            **{mode: (*_GROUPING[mode], *_CHOOSING[mode]) for mode in _GROUPING}}
"""Which options a mode has, of those that not all have."""

_DECISIONS = {"paper": ("blocks",), "kmeans": ("clusters", "medoids", "indices"),
              "lsh": ("clusters", "buckets", "indices")}
"""What may be given back to a mode."""

_SELECTED = {"paper": 16, "kmeans": 64, "lsh": 64}
"""The default of `num_selected`."""


def _options(mode: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a mode, or raise OptionError if others are not at their defaults."""
    parameters = inspect.signature(nsa_attention).parameters
    for name, value in values.items():
        default = parameters[name].default
        if name not in _OPTIONS[mode] and value is not default and (
                type(value) is not type(default) or value != default):
            modes = " and ".join(repr(other) for other in _OPTIONS if name in _OPTIONS[other])
            raise OptionError(f"{name} must be left out: it is of mode {modes}, not {mode!r}")
    found = {name: values[name] for name in _OPTIONS[mode] if "weights" not in name}
    if found["num_selected"] is None:
        found["num_selected"] = _SELECTED[mode]
    return found


def _by_content(mode: str, q: Array, far: tuple[Array, Array], listed: tuple[Array, Array],
                options: dict[str, Any], placed: dict[str, Any],
                decisions: Mapping[str, Any] | None) -> tuple[Any, Any]:
    """Return the compressed and the selected branch of a mode that groups keys."""
    grouping = nsa_clusters.group(
        q, far[0], mode=mode, **{name: options[name] for name in _GROUPING[mode]},
        causal=placed["causal"], kv_lengths=placed["kv_lengths"], decisions=decisions)
    return (nsa_clusters.compressed(q, far[0], far[1], grouping=grouping, **placed),
            nsa_clusters.selected_tokens(
                q, listed[0], listed[1], grouping=grouping, **placed, decisions=decisions,
                **{name: options[name] for name in _CHOOSING[mode]}))


def _keys(branch: str, given: Mapping[str, Any]) -> tuple[str, str]:
    """Return the names of a branch's keys and values."""
    own = f"k_{branch}", f"v_{branch}"
    there = [given.get(name) is not None for name in own]
    if any(there) != all(there):
        raise OptionError(f"{' and '.join(own)} must be given together, or neither of them")
    return own if all(there) else ("k", "v")


def _check_keys(given: Mapping[str, Any], q: Array, gates: Array) -> None:
    """Check that all are arrays, and that the branches' keys and values are alike."""
    if gates is None:
        raise DtypeError("gates must be an array; got None")
    arrays.namespace(q, gates, *(given[name] for name in _PAIRED))
    for name, like in _PAIRED.items():
        x = given[name]
        if x is not None and tuple(x.shape[-3:]) != tuple(given[like].shape[-3:]):
            raise ShapeError(f"{name} must have the heads, tokens and width of {like}; got "
                             f"{name} {tuple(x.shape)}, {like} {tuple(given[like].shape)}")


_PAIRED = {"k": "k", "v": "v", "k_compressed": "k", "v_compressed": "v", "k_window": "k",
           "v_window": "v"}
"""Keys and values, and those they are like."""


def _check_gates(gates: Array, out: Array) -> None:
    arrays.require_float("gates", gates)
    arrays.require_same_device({"q": out, "gates": gates})
    require_broadcast("gates", tuple(gates.shape), (*out.shape[:-1], 3), "(..., H, N, 3)")


def _open(xp: Any, branches: tuple[Branch, ...], gates: Array) -> list[Array]:
    """Return each branch's gate (..., H, N), 0 where the branch sees no key, in acc."""
    acc = branches[0].lse.dtype
    wide = xp.broadcast_to(arrays.cast(xp, gates, acc), (*branches[0].lse.shape, 3))
    return [xp.where(branch.lse == -math.inf, xp.zeros_like(branch.lse), wide[..., c])
            for c, branch in enumerate(branches)]


def _mixed(xp: Any, branches: tuple[Branch, ...], shares: list[Array]) -> Array:
    """Return the sum of the branches' outputs, each row times its share."""
    shape, dtype = branches[0].out.shape, branches[0].out.dtype
    count = math.prod(shape[:-1])
    parts = [(arrays.reshape(xp, share, (count, 1)),
              arrays.reshape(xp, branch.out, (count, shape[-1])))
             for branch, share in zip(branches, shares, strict=True)]
    if arrays.library(branches[0].out) != "numpy":
        return arrays.reshape(xp, _weighted(xp, parts, dtype), shape)
    found = np.empty((count, shape[-1]), dtype)
    for start in range(0, count, ROWS):
        rows = slice(start, start + ROWS)
        found[rows] = _weighted(xp, [(share[rows], out[rows]) for share, out in parts], dtype)
    return found.reshape(shape)


def _weighted(xp: Any, parts: list[tuple[Array, Array]], dtype: Any) -> Array:
    """Return the sum of shares times outputs, in `dtype`."""
    products = [share * arrays.cast(xp, out, share.dtype) for share, out in parts]
    return arrays.cast(xp, arrays.added(arrays.added(products[0], products[1]), products[2]), dtype)


def _pulls(xp: Any, branches: tuple[Branch, ...], dout: Array) -> list[Array]:
    """Return what a larger share of each branch would do, (..., H, N); 0 where it sees no key."""
    acc = branches[0].lse.dtype
    wide = arrays.cast(xp, dout, acc)
    with np.errstate(invalid="ignore"):
        found = [xp.vecdot(wide, arrays.cast(xp, branch.out, acc)) for branch in branches]
    return [xp.where(branch.lse == -math.inf, xp.zeros_like(pull), pull)
            for branch, pull in zip(branches, found, strict=True)]


def _dgates(xp: Any, parts: list[Array], gates: Array) -> Array:
    """Return the gradient of the gates in their own shape and dtype."""
    found = xp.stack(parts, axis=-1)
    extra = found.ndim - gates.ndim
    if extra:
        found = xp.sum(found, axis=tuple(range(extra)))
    shared = tuple(axis for axis, size in enumerate(gates.shape)
                   if size == 1 and found.shape[axis] != 1)
    if shared:
        found = xp.sum(found, axis=shared, keepdims=True)
    return arrays.cast(xp, found, gates.dtype)


def _scaled(xp: Any, share: Array, dout: Array) -> Array:
    """Return the gradient of a branch's output; rows that see no key may hold NaN."""
    with np.errstate(invalid="ignore"):
        scaled = share[..., None] * arrays.cast(xp, dout, share.dtype)
    return arrays.cast(xp, scaled, dout.dtype)


class _Gates:
    """``out = sum of g_c out_c``."""

    @staticmethod
    def forward(branches: tuple[Branch, ...], gates: Array) -> Array:
        """Mix the branches."""
        xp = arrays.namespace(gates, branches[0].out)
        return _mixed(xp, branches, _open(xp, branches, gates))

    @staticmethod
    def backward(branches: tuple[Branch, ...], gates: Array, dout: Array) -> Any:
        """Return the gradient of the gates, and an iterator of those of out and lse."""
        xp = arrays.namespace(gates, dout)
        dgates = _dgates(xp, _pulls(xp, branches, dout), gates)
        # one at a time: each is as large as the output
        return dgates, ((_scaled(xp, share, dout), None)
                        for share in _open(xp, branches, gates))


class _SingleSoftmax:
    """``out = sum of p_c out_c`` with ``p_c = g_c exp(lse_c) / sum of g exp(lse)``."""

    @staticmethod
    def _shares(xp: Any, branches: tuple[Branch, ...],
                gates: Array) -> tuple[list[Array], list[Array]]:
        """Return p_c, and ``u_c = exp(lse_c - lse)``, which is finite where the gate is 0."""
        opened = _open(xp, branches, gates)
        tops = [xp.where(gate > 0, branch.lse, xp.full_like(gate, -math.inf))
                for gate, branch in zip(opened, branches, strict=True)]
        top = xp.maximum(xp.maximum(tops[0], tops[1]), tops[2])
        seen = top > -math.inf
        zero = xp.zeros_like(top)
        with np.errstate(over="ignore", invalid="ignore"):
            grown = [xp.where(seen, xp.exp(xp.where(seen, branch.lse - top, zero)), zero)
                     for branch in branches]
        total = sum(gate * size for gate, size in zip(opened[1:], grown[1:], strict=True))
        total = total + opened[0] * grown[0]
        total = xp.where(total > 0, total, xp.ones_like(total))
        u = [size / total for size in grown]
        return [gate * x for gate, x in zip(opened, u, strict=True)], u

    @classmethod
    def forward(cls, branches: tuple[Branch, ...], gates: Array) -> Array:
        """Mix the branches."""
        xp = arrays.namespace(gates, branches[0].out)
        return _mixed(xp, branches, cls._shares(xp, branches, gates)[0])

    @classmethod
    def backward(cls, branches: tuple[Branch, ...], gates: Array, dout: Array) -> Any:
        """Return the gradient of the gates, and an iterator of those of out and lse."""
        xp = arrays.namespace(gates, dout)
        shares, u = cls._shares(xp, branches, gates)
        pulls = _pulls(xp, branches, dout)
        mean = shares[0] * pulls[0] + shares[1] * pulls[1] + shares[2] * pulls[2]
        blind = [branch.lse == -math.inf for branch in branches]
        pulls = [xp.where(none, xp.zeros_like(mean), pull - mean)
                 for none, pull in zip(blind, pulls, strict=True)]
        dgates = _dgates(xp, [x * pull for x, pull in zip(u, pulls, strict=True)], gates)
        return dgates, ((_scaled(xp, share, dout), share * pull)
                        for share, pull in zip(shares, pulls, strict=True))


_GATED: dict[str, Any] = {"gates": _Gates, "single_softmax": _SingleSoftmax}
