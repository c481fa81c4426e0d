"""Connections that are cut while training: how many, and which.

What is least important goes: pairs or blocks of attention by `connection_importance`, weights by
their size. A mask is a decision, constant until the next one is made.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .. import arrays, masks
from ..arrays import Array
from ..checks import OptionError, ShapeError, require_choice, require_integer, require_real
from ..masks.algebra import host_array
from ..masks.placement import bottom_right

ROWS = 64
"""Queries whose weights are looked at together."""


def pruning_schedule(step: int, steps: int, *, final: float, initial: float = 0.0) -> float:
    """Say how sparse to be at a step: ``final + (initial - final) * (1 - step / steps) ** 3``.

    Much is cut early, when there is much to spare. E.g. from 0 to 0.8 in 4 steps: 0, 0.4625, 0.7,
    0.7875, 0.8.

    Parameters
    ----------
    step : int, >= 0
        Beyond `steps` the sparsity stays.
    steps : int, >= 1
    final, initial : float in [0, 1]
        Sparsity, the share that is cut, at the end and at step 0.

    Returns
    -------
    float

    References
    ----------
    .. [1] Zhu, Gupta, "To Prune, or Not to Prune", 2017, arXiv:1710.01878, section 3.

    Examples
    --------
    >>> from pyattn.features import pruning_schedule
    >>> [round(pruning_schedule(step, 4, final=0.8), 4) for step in range(6)]
    [0.0, 0.4625, 0.7, 0.7875, 0.8, 0.8]
    """
    step = require_integer("step", step, minimum=0)
    steps = require_integer("steps", steps, minimum=1)
    final, initial = _share("final", final), _share("initial", initial)
    left = 1 - min(step, steps) / steps
    return final + (initial - final) * left ** 3


def _share(name: str, value: Any) -> float:
    share = require_real(name, value)
    if not 0 <= share <= 1:
        raise OptionError(f"{name} must lie in 0..1; got {share}")
    return share


def _top(importance: np.ndarray, sparsity: float) -> np.ndarray:
    """True for the largest of each row, at least one; of equals the first."""
    size = importance.shape[-1]
    if not size:
        return np.zeros(importance.shape, bool)
    kept = max(1, size - math.floor(sparsity * size))
    order = np.argsort(-importance, axis=-1, kind="stable")
    top = np.zeros(importance.shape, bool)
    np.put_along_axis(top, order[..., :kept], True, axis=-1)
    return top


def prune(importance: Array, sparsity: float, *, block_size: int = 1) -> masks.Mask:
    """Keep the most important keys of every query, or key blocks of every block of queries.

    Of M keys ``M - floor(sparsity * M)`` are kept, at least one. E.g. a row 0.1, 0.5, 0.2, 0.2 and
    ``sparsity=0.5``: the second and the third.

    Parameters
    ----------
    importance : array, shape (..., H, N, M), or of blocks (..., H, query blocks, key blocks)
        Read on the host. Of equals the first is kept; NaN counts as least.
    sparsity : float in [0, 1]
        The share that is cut.
    block_size : int, >= 1
        Tokens of a block.

    Returns
    -------
    Mask
        For ``mask=`` of any variant: what is cut is not computed, where whole tiles are, and gets
        no gradient.

    Raises
    ------
    OptionError, ShapeError
        A share outside 0..1, an importance of fewer than two axes.

    Notes
    -----
    Sorting: O(size log M), and memory for the size of `importance`.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features import prune
    >>> print(prune(np.array([[0.1, 0.5, 0.2, 0.2], [4, 3, 2, 1]]), 0.5).draw(2, 4))
    ·██·
    ██··
    """
    sparsity = _share("sparsity", sparsity)
    host = host_array(importance)
    if host.ndim < 2:
        raise ShapeError(f"importance must be (..., queries, keys); got shape {host.shape}")
    host = np.nan_to_num(host.astype(np.float64), nan=-np.inf)
    block_size = require_integer("block_size", block_size, minimum=1)
    kept = _top(host, sparsity)
    return masks.dense(kept) if block_size == 1 else masks.blocks(kept, block_size)


def connection_importance(q: Array, k: Array, v: Array | None = None, dout: Array | None = None,
                          *, kind: str = "gradient", block_size: int = 1, mask: Any = None,
                          scale: float | None = None) -> np.ndarray:
    """Measure how much pairs matter: by their weight, or by weight times its gradient.

    ``kind="weight"``: the mean of p over a block. ``kind="gradient"``: the mean of ``|p * dp|``,
    with ``dp = dout.v``, what the loss would change by, to first order, without the pair. E.g. one
    query with equal scores for two keys: weights 0.5, 0.5.

    Parameters
    ----------
    q : array, shape (..., H, N, D), float16 / bfloat16 / float32 / float64
    k : array, shape (..., G, M, D)
    v : array, shape (..., G, M, E), for "gradient"
    dout : array, shape (..., H, N, E), for "gradient"
        Gradient of the attention's output.
    kind : "gradient" or "weight"
    block_size : int, >= 1
        1 for every pair by itself.
    mask : Mask or boolean array, optional
        Pairs that are not allowed have importance 0.
    scale : float, default D ** -0.5

    Returns
    -------
    float64 array on the host, shape (..., H, ceil(N / block_size), ceil(M / block_size))
        A last block that is shorter is averaged over what it has.

    Raises
    ------
    OptionError, ShapeError
        Gradients without `v` and `dout`; shapes that do not fit.

    Notes
    -----
    O(N M (D + E)) on the host, by rows of 64 queries: an occasional measurement, not a part of
    training's every step.

    References
    ----------
    .. [1] Michel et al., "Are Sixteen Heads Really Better than One?", 2019, arXiv:1905.10650,
       section 4.1 (importance by gradient, there of heads).

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features import connection_importance
    >>> connection_importance(np.zeros((1, 1, 2)), np.zeros((1, 2, 2)), kind="weight")
    array([[[0.5, 0.5]]])
    """
    require_choice("kind", kind, ("gradient", "weight"))
    size = require_integer("block_size", block_size, minimum=1)
    if kind == "gradient" and (v is None or dout is None):
        raise OptionError('importance by "gradient" takes v and dout')
    given = {"q": q, "k": k, **({"v": v, "dout": dout} if kind == "gradient" else {})}
    for name, x in given.items():
        arrays.require_float(name, x)
        if x.ndim < 3:
            raise ShapeError(f"{name} must be (..., heads, tokens, width); got {tuple(x.shape)}")
    heads = q.shape[-3]
    if k.shape[-3] == 0 or heads % k.shape[-3] or q.shape[-1] != k.shape[-1]:
        raise ShapeError("H must be a multiple of G, and q and k of one width; got q "
                         f"{tuple(q.shape)}, k {tuple(k.shape)}")
    scale = q.shape[-1] ** -0.5 if scale is None else require_real("scale", scale)
    host = {name: arrays.to_host(x).astype(np.float64) for name, x in given.items()}
    for name in ("k", "v"):
        if name in host:
            host[name] = np.repeat(host[name], heads // k.shape[-3], axis=-3)
    n, m = q.shape[-2], k.shape[-2]
    pattern = None if mask is None else masks.restrict(masks.full(), mask)
    starts = np.arange(0, m, size)
    rows = []
    # rows of whole blocks, some 64 queries
    step = size * max(1, ROWS // size)
    for first in range(0, n, step):
        part = slice(first, min(first + step, n))
        scores = scale * host["q"][..., part, :] @ np.swapaxes(host["k"], -1, -2)
        if pattern is not None:
            scores = np.where(_allowed(pattern, part, n, m), scores, -np.inf)
        p = _softmax(scores)
        if kind == "gradient":
            dp = host["dout"][..., part, :] @ np.swapaxes(host["v"], -1, -2)
            p = np.where(p > 0, np.abs(p * dp), 0)
        p = np.add.reduceat(p, starts, axis=-1) if m else p
        counts = np.diff([*range(0, part.stop - first, size), part.stop - first])
        p = np.add.reduceat(p, np.arange(0, part.stop - first, size), axis=-2)
        rows.append(p / (counts[:, None] * np.diff([*starts, m])))
    if not rows:
        return np.zeros((*q.shape[:-2], 0, -(-m // size)))
    return np.concatenate(rows, axis=-2)


def _allowed(pattern: masks.Mask, part: slice, n: int, m: int) -> np.ndarray:
    i, j = np.arange(part.start, part.stop)[:, None], np.arange(m)[None, :]
    found = np.empty((*pattern.lead, i.size, m), bool)
    for index in np.ndindex(pattern.lead):
        found[index] = pattern.at(index).resolve(bottom_right(n, m)).allowed(i, j)
    return found


def _softmax(scores: np.ndarray) -> np.ndarray:
    high = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    weight = np.exp(scores - np.where(high == -np.inf, 0, high))
    total = weight.sum(axis=-1, keepdims=True)
    return weight / np.where(total == 0, 1, total)


def update_importance(old: Array | None, new: Array, *, decay: float = 0.9) -> np.ndarray:
    """Average importance over steps: ``decay * old + (1 - decay) * new``.

    E.g. 4 and then 2, ``decay=0.5``: 3.

    Parameters
    ----------
    old : array or None
        None at the first step, which is taken as it is.
    new : array, shape of `old`
    decay : float in [0, 1]

    Returns
    -------
    float64 array on the host

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features import update_importance
    >>> update_importance(np.array([4.0]), np.array([2.0]), decay=0.5)
    array([3.])
    """
    decay, fresh = _share("decay", decay), host_array(new).astype(np.float64)
    if old is None:
        return fresh
    known = host_array(old)
    if known.shape != fresh.shape:
        raise ShapeError(f"old and new must have one shape; got {known.shape} and {fresh.shape}")
    return decay * known + (1 - decay) * fresh


def prune_weights(w: Array, sparsity: float) -> np.ndarray:
    """Keep the weights of largest magnitude: True where ``|w|`` is among them.

    ``floor(sparsity * size)`` are cut, of equals the last. E.g. weights 3, -5, 1 and
    ``sparsity=0.4``: all but the 1.

    Parameters
    ----------
    w : array, any shape, floating point
        Weights, of a whole model's layer; read on the host.
    sparsity : float in [0, 1]

    Returns
    -------
    bool array on the host, shape of `w`
        Multiply the weights, and their gradients, with it.

    References
    ----------
    .. [1] Xu et al., "Rethinking Network Pruning - under the Pre-train and Fine-tune Paradigm",
       2021, arXiv:2104.08682 (the other SparseBERT), section 3.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features import prune_weights
    >>> prune_weights(np.array([3.0, -5.0, 1.0]), 0.4)
    array([ True,  True, False])
    """
    sparsity = _share("sparsity", sparsity)
    arrays.require_float("w", w)
    size = np.abs(arrays.to_host(w).astype(np.float64)).ravel()
    kept = np.zeros(size.size, bool)
    kept[np.argsort(-size, kind="stable")[:size.size - math.floor(sparsity * size.size)]] = True
    return kept.reshape(w.shape)
