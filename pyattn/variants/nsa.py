"""Native sparse attention: compressed, selected and nearby keys, mixed by gates."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..checks import (
    OptionError,
    require_broadcast,
    require_choice,
    require_integer,
    require_real,
)
from ..differentiable import Saved, differentiable, gradients
from . import nsa_blocks
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
        found["gates"] = dgates
        return gradients(self.names)(**{name: found[name] for name in self.names})


@differentiable
def nsa_attention(q: Array, k: Array, v: Array, gates: Array, k_compressed: Array | None = None,
                  v_compressed: Array | None = None, k_window: Array | None = None,
                  v_window: Array | None = None, k_weights: Mapping[str, Array] | None = None,
                  v_weights: Mapping[str, Array] | None = None, *, mode: str = "paper",
                  window: int = 511, block_size: int = 32, stride: int = 16,
                  select_block: int = 64, num_selected: int = 16, num_initial: int = 1,
                  num_local: int = 2, compression: str = "mean", activation: str = "gelu",
                  combine: str = "gates", causal: bool | str = True, scale: float | None = None,
                  q_lengths: Any = None, kv_lengths: Any = None,
                  decisions: Mapping[str, Any] | None = None) -> tuple[Array, NsaSaved]:
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

    E.g. six tokens, ``block_size=2, stride=1, select_block=2, num_selected=2, num_local=1,
    window=1``: query 5 sees compressed {0, 1} {1, 2} {2, 3} {3, 4} {4, 5}, selected blocks
    {0, 1} and {4, 5}, window {4, 5}; query 0 sees no compressed block, {0} and {0}.

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
    mode : {"paper"}
    window : int, tokens
        Neighbours before the query, besides itself: the paper's 512 keys are 511. Two-sided if not
        causal.
    block_size, stride, select_block : int, tokens
    num_selected, num_initial, num_local : int
        Blocks in a list, and of these the ones that are always in it.
    compression : {"mean", "mlp", "conv"}
    activation : {"gelu", "relu", "gelu_tanh", "silu"}
        Of ``compression="mlp"``.
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
        What an earlier call selected, from its ``saved.decisions``: ``blocks`` (..., G, N, count).

    Returns
    -------
    array, shape (..., H, N, E), dtype of `q`
        A branch that sees no key adds 0.

    Raises
    ------
    ShapeError, DtypeError, OptionError
        Arguments that do not fit, or more blocks that are always listed than `num_selected`.

    Notes
    -----
    Time O(N M / stride + N num_selected select_block + N window), each times H (D + E), where M
    is halved by causality: not O(N log N). Telling importance costs as much again as the compressed
    branch's products of queries and keys. Kept for backward: the arguments, for each branch its
    output and log-sum-exp, compressed keys and values, and the lists. ``saved.branch_stats`` counts
    each branch apart. The lists are constants of the backward, so compression learns from the
    compressed branch alone. A branch is computed even where its gates are 0, whose gradient it is.

    Differs from the paper: importance goes by the tokens that blocks share (its equation 9 sums
    over other indices than its text); sizes need not divide one another.

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
    require_choice("mode", mode, ("paper",))
    require_choice("combine", combine, tuple(_GATED))
    window = require_integer("window", window, minimum=0)
    causal = require_choice("causal", causal, (False, True, "top_left"))
    scale = None if scale is None else require_real("scale", scale)
    given: dict[str, Any] = {
        "q": q, "k": k, "v": v, "gates": gates, "k_compressed": k_compressed,
        "v_compressed": v_compressed, "k_window": k_window, "v_window": v_window,
        "k_weights": k_weights, "v_weights": v_weights}
    names = tuple(name for name, x in given.items() if x is not None)
    keys = {name: _keys(name, given) for name in BRANCHES}
    (k_far, v_far), _, (k_near, v_near) = (map(given.get, keys[name]) for name in BRANCHES)
    placed: dict[str, Any] = {"causal": causal, "scale": scale, "q_lengths": q_lengths,
                              "kv_lengths": kv_lengths}
    near, window_saved = attention.forward(
        q, k_near, v_near, window=window, return_lse=True, **placed)
    sizes: dict[str, Any] = {"block_size": block_size, "stride": stride}
    coarse, compressed_saved = nsa_blocks.compressed(
        q, k_far, v_far, k_weights=k_weights, v_weights=v_weights, compression=compression,
        activation=activation, **sizes, **placed)
    fine, selected_saved = nsa_blocks.selected(
        q, k, v, lse=coarse[1], by=compressed_saved, select_block=select_block,
        num_selected=num_selected, num_initial=num_initial, num_local=num_local,
        decisions=decisions, **sizes, **placed)
    branches = tuple(Branch(out, lse, saved, *keys[name]) for name, (out, lse), saved in (
        ("compressed", coarse, compressed_saved), ("selected", fine, selected_saved),
        ("window", near, window_saved)))
    _check_gates(gates, near[0])
    return (_GATED[combine].forward(branches, gates),
            NsaSaved(branches, gates, combine, names))


def _keys(branch: str, given: Mapping[str, Any]) -> tuple[str, str]:
    """Return the names of a branch's keys and values."""
    own = f"k_{branch}", f"v_{branch}"
    there = [given.get(name) is not None for name in own]
    if any(there) != all(there):
        raise OptionError(f"{' and '.join(own)} must be given together, or neither of them")
    return own if all(there) else ("k", "v")


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
