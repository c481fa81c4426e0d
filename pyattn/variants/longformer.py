"""Longformer: a sliding window, and global tokens with projections of their own."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from .. import arrays, masks
from ..arrays import Array
from ..checks import (
    DtypeError,
    OptionError,
    ShapeError,
    require_broadcast,
    require_choice,
    require_integer,
)
from ..differentiable import Saved, differentiable, gradients
from ..engines.placement import Placement
from ..features.rows import Rows
from ..masks.algebra import host_array
from .attention import CAUSAL, attention

SEED_STEP = 1
"""Between the seeds of dropout of local and of global rows."""


@dataclasses.dataclass(frozen=True)
class LongformerSaved(Saved):
    """The two attentions, and which tokens are global."""

    local: Any
    """Of all tokens; the rows of global ones are empty."""
    overall: Any
    """Of the global tokens alone."""
    rows: Rows
    mask: masks.Mask
    """The pairs that attend, local and global."""
    shared: bool
    """Whether the global projections are the local ones."""

    @property
    def decisions(self) -> dict[str, Array]:
        """``dropout_seed``, where there was dropout."""
        return self.local.decisions

    @property
    def placement(self) -> Placement:
        """Where the tokens stand."""
        return self.local.placement

    @property
    def stats(self) -> dict[str, int]:
        """Counters of both attentions together."""
        overall = self.overall.stats
        return {name: count + overall[name] for name, count in self.local.stats.items()}

    def backward(self, dout: Array, dlse: Array | None = None) -> Any:
        """Gradients of the array arguments given: q, k, v, the global ones, scale."""
        found = self.local.backward(dout, dlse)._asdict()
        xp, take = arrays.namespace(dout), self.rows.take
        dlse = None if dlse is None else take(dlse[..., None])[..., 0]
        overall = self.overall.backward(take(dout), dlse)._asdict()
        if self.shared:
            # local queries of global tokens have no gradient of their own
            found["q"] = self.rows.put(found["q"], overall.pop("q"))
            for name, gradient in overall.items():
                found[name] = arrays.added(found[name], gradient)
            return gradients(tuple(found))(**found)
        overall["q"] = self.rows.put(xp.zeros_like(found["q"]), overall["q"])
        scale = {"scale": found.pop("scale") + overall.pop("scale")} if "scale" in found else {}
        found |= {f"{name}_global": gradient for name, gradient in overall.items()} | scale
        return gradients(tuple(found))(**found)


@differentiable
def longformer_attention(q: Array, k: Array, v: Array, q_global: Array | None = None,
                         k_global: Array | None = None, v_global: Array | None = None, *,
                         window: int, global_index: Any, dilation: Any = 1,
                         causal: bool | str = False, mask: Any = None,
                         scale: float | Array | None = None, softcap: float | None = None,
                         dropout: float = 0.0, rng: Any = None, q_lengths: Any = None,
                         kv_lengths: Any = None, return_lse: bool = False,
                         decisions: dict[str, Any] | None = None) -> tuple[Any, LongformerSaved]:
    """Longformer: neighbours, and a few global tokens that see all and are seen by all.

    T is the set of global tokens. A local token i attends to ``{j: |i - j| <= window} | T``, each
    key once, by one softmax over `q`, `k` and `v`. A global token attends to all tokens, by
    `q_global`, `k_global` and `v_global`. E.g. four tokens, ``window=1, global_index=[0]``::

        0->{0, 1, 2, 3}  1->{0, 1, 2}  2->{0, 1, 2, 3}  3->{0, 2, 3}

    where only row 0 uses the global projections.

    Parameters
    ----------
    q : array, shape (..., H, N, D), float16, bfloat16, float32 or float64
        Queries of local tokens.
    k : array, shape (..., G, N, D), dtype of `q`
        Keys for them; G divides H.
    v : array, shape (..., G, N, E), dtype of `q`
        Values for them.
    q_global, k_global, v_global : arrays, shape and dtype of q, k and v, optional
        The same from the global projections, for all tokens; of `q_global` only the rows of T are
        read. All three or none: without them the local ones serve, and their gradients are those
        of both uses.
    window : int, tokens
        Neighbours on either side, not counting the token itself; half of the paper's w.
    global_index : list of int, or boolean array (N,) or (..., N)
        Positions of the global tokens, the same for the batch, where those beyond N are passed
        over; or whether a token is global, for each item of the leading axes of `q`. Read on the
        host.
    dilation : int, or one for each head
        Only every `dilation`-th neighbour: ``|i - j| <= window * dilation``, divisible by it.
    causal : bool or "top_left"
        All tokens, global ones too, see only keys up to their own position.
    mask : Mask or boolean array broadcasting to (..., H, N, N), optional
        Intersected with the rule above. Packed sequences are ``masks.segments(lengths)``.
    scale : float or array of shape (H,), default D ** -0.5
        Of local and global rows alike.
    softcap : float, optional
        As for `pyattn.attention`.
    dropout : float in [0, 1), default 0
        As for `pyattn.attention`.
    rng : int, numpy.random.Generator or None
        Where the seed of dropout comes from.
    q_lengths, kv_lengths : int or array of int, broadcasting to the leading axes, optional
        Tokens from here on are padding. Queries and keys are the same tokens: one of the two is
        enough, and both must agree.
    return_lse : bool
        Also return the log-sum-exp of each row, (..., H, N).
    decisions : dict, optional
        What an earlier call drew, from its ``saved.decisions``: ``dropout_seed``.

    Returns
    -------
    array, shape (..., H, N, E), dtype of `q`
        Padded rows are 0. With `return_lse` a tuple, as for `pyattn.attention`.

    Raises
    ------
    ShapeError
        There are more queries than keys or fewer, or a shape does not fit the others.
    OptionError
        Some but not all of the global arrays are given, lengths disagree, or an option has a value
        outside its rule.

    Notes
    -----
    Time O(N (2 window + 1 + |T|) (D + E)). Kept for backward: the arguments, both outputs with
    their log-sum-exps, and T. The local arrays get no gradient from the rows of T, which are empty
    there; `k_global` and `v_global` get theirs from these rows alone. Differs from the paper:
    `window` is one-sided; `causal` and `mask` are ours; the six projections belong to the caller.

    References
    ----------
    .. [1] Beltagy et al., "Longformer: The Long-Document Transformer", 2020, arXiv:2004.05150,
       section 3.1 (the pattern, dilation per head, projections for global attention).

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> q, k, v, *others = np.random.default_rng(0).standard_normal((6, 2, 100, 16))
    >>> out, saved = pyattn.longformer_attention.forward(
    ...     q, k, v, *others, window=8, global_index=[0])
    >>> bool(np.allclose(out[:, :1], pyattn.attention(others[0][:, :1], *others[1:])))
    True
    >>> saved.backward(out)._fields
    ('q', 'k', 'v', 'q_global', 'k_global', 'v_global')
    """
    shared = q_global is None and k_global is None and v_global is None
    others: Any = (q, k, v) if shared else (q_global, k_global, v_global)
    _check(q, k, v, *others)
    n = q.shape[-2]
    lengths = _lengths(q_lengths, kv_lengths)
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "dropout": dropout,
                               "return_lse": return_lse, "kv_lengths": lengths}
    held = _held(global_index, n)
    allowed = masks.restrict(
        pattern(n, n, window=window, global_index=global_index, dilation=dilation), mask)
    if require_choice("causal", causal, (False, True, "top_left")) is not False:
        allowed = allowed & CAUSAL
    near = masks.plan(allowed & masks.dense(~held[..., None, :, None]), n, n)
    out, local = attention.forward(q, k, v, mask=near, rng=rng, q_lengths=lengths,
                                   decisions=decisions, **options)
    rows = Rows.of(_unpadded(held, lengths, q))
    seed = {name: np.uint64((int(value) + SEED_STEP) % 2**64)
            for name, value in local.decisions.items()}
    found, overall = attention.forward(rows.take(others[0]), *others[1:], mask=rows.masked(allowed),
                                       q_lengths=rows.counts, decisions=seed, **options)
    saved = LongformerSaved(local, overall, rows, allowed, shared)
    if not return_lse:
        return rows.put(out, found), saved
    (out, lse), (found, found_lse) = out, found
    return (rows.put(out, found), rows.put(lse[..., None], found_lse[..., None])[..., 0]), saved


def pattern(n: int, m: int, *, window: int, global_index: Any, dilation: Any = 1) -> masks.Mask:
    """Return the pairs that attend, of local and global tokens together.

    Examples
    --------
    >>> from pyattn.variants.longformer import pattern
    >>> print(pattern(5, 5, window=1, global_index=[0]).draw(5))
    █████
    ███··
    ████·
    █·███
    █··██
    """
    def near(step: Any) -> masks.Mask:
        return masks.window(reach, reach, require_integer("dilation", step, minimum=1))

    reach = require_integer("window", window, minimum=0)
    steps = host_array(dilation)
    held = _held(global_index, m)
    everywhere: masks.Mask
    if held.ndim == 1:
        everywhere = masks.global_tokens(np.flatnonzero(held))
    else:
        everywhere = masks.dense(held[..., None, :, None]) | masks.dense(held[..., None, None, :])
    if steps.ndim:
        return masks.per_head(tuple(near(step) | everywhere for step in steps.tolist()))
    return near(dilation) | everywhere


def _held(global_index: Any, n: int) -> np.ndarray:
    """Whether each of n tokens is global, bool (N,) or (..., N)."""
    given = host_array(global_index)
    if given.dtype == bool:
        if given.shape[-1:] != (n,):
            raise ShapeError(f"a boolean global_index must be (..., N) with N = {n}; got "
                             f"{given.shape}")
        return given
    if given.size and given.dtype.kind not in "iu":
        raise DtypeError(f"global_index must be positions or booleans; got {given.dtype}")
    if given.ndim != 1 or given.min(initial=0) < 0:
        raise OptionError(f"global_index must be a list of positions, at least 0; got "
                          f"{global_index!r}")
    return np.isin(np.arange(n), given)


def _check(q: Array, k: Array, v: Array, *others: Any) -> None:
    if any(x is None for x in others):
        raise OptionError("q_global, k_global and v_global must be given together, or none of them")
    if q.shape[-2:-1] != k.shape[-2:-1]:
        raise ShapeError(f"the queries and the keys of Longformer are the same tokens; got "
                         f"q {tuple(q.shape)}, k {tuple(k.shape)}")
    for name, own, other in zip("qkv", (q, k, v), others, strict=True):
        if own.shape != other.shape:
            raise ShapeError(f"{name}_global must have the shape of {name}, {tuple(own.shape)}; "
                             f"got {tuple(other.shape)}")


def _lengths(q_lengths: Any, kv_lengths: Any) -> np.ndarray | None:
    """One length for a token as query and as key."""
    q_lengths, kv_lengths = (x if x is None else host_array(x) for x in (q_lengths, kv_lengths))
    if q_lengths is not None and kv_lengths is not None and (q_lengths != kv_lengths).any():
        raise OptionError(f"q_lengths and kv_lengths are of the same tokens and must agree; got "
                          f"{q_lengths.tolist()} and {kv_lengths.tolist()}")
    return kv_lengths if q_lengths is None else q_lengths


def _unpadded(held: np.ndarray, lengths: np.ndarray | None, q: Array) -> np.ndarray:
    """Leave out global tokens that are padding; what remains may differ along the batch of `q`."""
    if lengths is not None:
        held = held & (np.arange(held.shape[-1]) < lengths[..., None])
    require_broadcast("global_index, with the lengths,", held.shape[:-1], tuple(q.shape[:-3]),
                      "the leading axes of q")
    return held
