"""Each query attends to a fixed number of learned mixtures of all keys."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..checks import OptionError, ShapeError, require_choice
from ..differentiable import Saved, differentiable, gradients
from ..engines.softmax import SoftmaxSaved, require_operands, unbroadcast
from ..features.padding import require_lengths, without_padding
from ..features.precision import cast_like, widened
from ..masks.algebra import host_array
from .attention import attention


@dataclasses.dataclass(frozen=True)
class LinformerSaved(Saved):
    """The arguments that are mixed, and the engine's record of the mixtures."""

    k: Array
    v: Array
    e: Array
    f: Array | None
    kv_lengths: tuple[Any, ...] | int | None
    attended: SoftmaxSaved

    @property
    def decisions(self) -> dict[str, Array]:
        """Those of attention: ``dropout_seed``, where there was dropout."""
        return self.attended.decisions

    @property
    def stats(self) -> dict[str, int]:
        """Those of attention, whose pairs are with mixtures; flops and bytes with the mixing."""
        found, m = self.attended.stats, self.k.shape[-2]
        for x, mixed in ((self.k, self.attended.k), (self.v, self.attended.v)):
            found["flops"] += 2 * m * math.prod(mixed.shape)
            found["bytes"] += arrays.nbytes(x)
        given = (self.e,) if self.f is None else (self.e, self.f)
        found["bytes"] += sum(arrays.nbytes(x) // max(1, x.shape[-1]) * m for x in given)
        return found

    def backward(self, dout: Array, dlse: Array | None = None) -> Any:
        """Gradients of q, k, v, e, f if it was given, and of `scale` if it was an array."""
        found = self.attended.backward(dout, dlse)._asdict()
        f = self.e if self.f is None else self.f
        # forward: k, v = e k, f v
        found["k"], de = _mix_gradients(self.k, self.e, found["k"], self.kv_lengths)
        found["v"], df = _mix_gradients(self.v, f, found["v"], self.kv_lengths)
        xp = arrays.namespace(de)
        named = {name: found.pop(name) for name in ("q", "k", "v")}
        if self.f is None:
            named["e"] = cast_like(xp, de + df, self.e)
        else:
            named |= {"e": cast_like(xp, de, self.e), "f": cast_like(xp, df, self.f)}
        named |= found
        return gradients(tuple(named))(**named)


@differentiable
def linformer_attention(q: Array, k: Array, v: Array, e: Array, f: Array | None = None, *,
                        scale: float | Array | None = None, softcap: float | None = None,
                        dropout: float = 0.0, rng: Any = None, q_lengths: Any = None,
                        kv_lengths: Any = None, causal: bool = False, mask: Any = None,
                        return_lse: bool = False,
                        decisions: dict[str, Any] | None = None) -> tuple[Any, LinformerSaved]:
    """Attention to mixtures of tokens: R of them, however many keys there are.

    ``out = softmax(scale q (E k)^T) F v``, with E and F learned: row r of E says how much of each
    key the r-th mixture has, and row r of F how much of each value. E.g. four keys and
    ``E = (1/2 1/2 0 0; 0 0 1/2 1/2)``: every query chooses between the mean of keys 0 and 1 and
    that of 2 and 3.

    Parameters
    ----------
    q : array, shape (..., H, N, D), float16, bfloat16, float32 or float64
        Queries.
    k : array, shape (..., G, M, D), dtype of `q`
        Keys; G divides H.
    v : array, shape (..., G, M, E), dtype of `q`
        Values.
    e : array, shape (R, L), (G, R, L) or (H, R, L), any float dtype
        What mixes keys: the same for all heads, or for each. L is the longest sequence; of its
        columns the first M are taken.
    f : array, likewise, optional
        What mixes values; without it `e` does. One array in several layers is shared by them: add
        up its gradients.
    scale : float or array of shape (H,), default D ** -0.5
        As an array it has a gradient.
    softcap : float, optional
        Scores become ``softcap * tanh(scores / softcap)``.
    dropout : float in [0, 1), default 0
        Probability that the weight of a mixture becomes 0.
    rng : int, numpy.random.Generator or None
        Where the seed of dropout comes from.
    q_lengths, kv_lengths : int or array of int, broadcasting to the leading axes, optional
        Tokens from here on are padding: such keys and values are not mixed in, such queries get 0.
    causal, mask
        Refused: each mixture has tokens of the whole sequence, so there is none that a query might
        see without its future.
    return_lse : bool
        Also return the log-sum-exp of each row, (..., H, N).
    decisions : dict, optional
        What an earlier call drew: ``dropout_seed``.

    Returns
    -------
    array, shape (..., H, N, E), dtype of `q`
        0 where there is no key. With `return_lse` a tuple, as for `pyattn.attention`.

    Raises
    ------
    OptionError
        `causal` or `mask` is given.
    ShapeError, DtypeError
        Arguments that do not fit; the message names the argument, the rule and what was given.

    Notes
    -----
    Time O(R (M + N) (D + E)), memory O(R (D + E)) beside the operands. Mixtures are sums in
    float32 (float64 for float64), rounded to the dtype of `q`. Kept for backward: the arguments,
    the mixtures, the output and the log-sum-exps. Gradients: q, k, v, e, f if it was given, and
    `scale` if it was an array. The sharing that the paper compares: none (an `e` and an `f` for
    each head), headwise (2-D arrays), key-value (no `f`), layerwise (the same `e` in all layers).
    Sequences of fewer tokens take columns as fairseq's code does; the paper has one length.

    References
    ----------
    .. [1] Wang, Li, Khabsa, Fang, Ma, "Linformer", 2020, arXiv:2006.04768, equation 7 and
       section 4.

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> q = k = v = np.eye(4)[None]
    >>> e = np.array([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    >>> pyattn.linformer_attention(q, k, v, e, scale=1e4)[0]
    array([[0.5, 0.5, 0. , 0. ],
           [0.5, 0.5, 0. , 0. ],
           [0. , 0. , 0.5, 0.5],
           [0. , 0. , 0.5, 0.5]])
    """
    if require_choice("causal", causal, (False, True, "top_left")) is not False:
        raise OptionError(f"causal must be False, as every mixture has future tokens in it; got "
                          f"{causal!r}")
    if mask is not None:
        raise OptionError("mask must be None, as a mixture is of all keys; leave padding out by "
                          f"kv_lengths; got {type(mask).__name__}")
    named = {"q": q, "k": k, "v": v, "e": e, "f": f}
    xp = arrays.namespace(*named.values())
    batch = require_operands(q, k, v)
    arrays.require_same_device(named)
    heads, groups, m = q.shape[-3], k.shape[-3], k.shape[-2]
    for name, x in (("e", e), ("f", f)):
        if x is not None:
            _require_mixer(name, x, heads, groups, m)
    if f is not None and f.shape[-2] != e.shape[-2]:
        raise ShapeError(f"f must have as many rows as e, {e.shape[-2]}; got {tuple(f.shape)}")
    lengths = require_lengths("kv_lengths", kv_lengths, batch, m)
    mixed = [_mix(x, w, lengths) for x, w in ((k, e), (v, e if f is None else f))]
    most = max(x.shape[-3] for x in mixed)
    if groups:
        # one of them may be mixed for each query head, the other for each of k and v
        mixed = [xp.repeat(x, most // x.shape[-3], axis=-3) if x.shape[-3] < most else x
                 for x in mixed]
    seen = None
    if lengths is not None or not m:
        # mixtures of nothing are no keys
        seen = np.where(host_array(m if lengths is None else lengths) > 0, e.shape[-2], 0)
    out, saved = attention.forward(
        q, *mixed, scale=scale, softcap=softcap, dropout=dropout, rng=rng, q_lengths=q_lengths,
        kv_lengths=seen, return_lse=return_lse, decisions=decisions)
    return out, LinformerSaved(k, v, e, f, lengths, saved)


def _require_mixer(name: str, x: Array, heads: int, groups: int, m: int) -> None:
    arrays.require_float(name, x)
    lead = tuple(x.shape[:-2])
    if x.ndim < 2 or lead not in ((), (1,), (groups,), (heads,)) or not x.shape[-2]:
        raise ShapeError(f"{name} must be (R, L), (G, R, L) or (H, R, L) with G = {groups} and "
                         f"H = {heads}; got {tuple(x.shape)}")
    if x.shape[-1] < m:
        raise ShapeError(f"{name} must have a column for each of the {m} keys; got "
                         f"{tuple(x.shape)}")


def _mix(x: Array, w: Array, lengths: Any) -> Array:
    """Return the mixtures (..., G or H, R, D) of tokens (..., G, M, D)."""
    xp, wide, rows = _operands(x, w, lengths)
    # the query heads of a group lie one after the other in its rows
    mixed = xp.reshape(xp.matmul(rows, wide), (*wide.shape[:-3], _owners(x, w), w.shape[-2],
                                               x.shape[-1]))
    return cast_like(xp, mixed, x)


def _mix_gradients(x: Array, w: Array, dmixed: Array, lengths: Any) -> tuple[Array, Array]:
    """Gradients of tokens, as they were given, and of what mixed them, in the computing dtype."""
    xp, wide, rows = _operands(x, w, lengths)
    lead, groups = tuple(wide.shape[:-3]), x.shape[-3]
    owners = _owners(x, w)
    dmixed = xp.astype(dmixed, wide.dtype, copy=False)
    if dmixed.shape[-3] != owners:
        # forward: repeated for the other operand's heads
        dmixed = xp.reshape(dmixed, (*lead, owners, -1, *dmixed.shape[-2:]))
        dmixed = xp.sum(dmixed, axis=-3)
    dmixed = xp.reshape(dmixed, (*lead, groups, rows.shape[-2], x.shape[-1]))
    # forward: mixed = rows wide
    dx = unbroadcast(xp, without_padding(xp.matmul(rows.mT, dmixed), lengths), x, lead)
    apart = [slice(g, g + 1) for g in range(groups)] if rows.shape[0] > 1 else [slice(None)]
    drows = [_contracted(xp, dmixed[..., g, :, :], wide[..., g, :, :]) for g in apart]
    m, longest = x.shape[-2], w.shape[-1]
    dw = xp.reshape(xp.concat(drows, axis=0), (*w.shape[:-1], m))
    if m < longest:
        unused = xp.zeros((*w.shape[:-1], longest - m), dtype=dw.dtype, device=arrays.device(x))
        dw = xp.concat([dw, unused], axis=-1)
    return dx, dw


def _operands(x: Array, w: Array, lengths: Any) -> tuple[Any, Array, Array]:
    """Tokens (..., G, M, D) without padding, and the rows that mix them, (1 or G, rows, M)."""
    xp, wide, rows = widened(x=x, w=w)
    if lengths is not None:
        lead = np.broadcast_shapes(x.shape[:-3], host_array(lengths).shape)
        wide = without_padding(xp.broadcast_to(wide, (*lead, *x.shape[-3:])), lengths)
    rows = rows[..., :x.shape[-2]]
    groups = x.shape[-3] if math.prod(w.shape[:-2]) > 1 else 1
    each = math.prod(w.shape[:-2]) // max(1, groups)
    return xp, wide, xp.reshape(rows, (groups, each * w.shape[-2], x.shape[-2]))


def _owners(x: Array, w: Array) -> int:
    """How many heads the mixtures have."""
    return max(x.shape[-3], math.prod(w.shape[:-2])) if x.shape[-3] else 0


def _contracted(xp: Any, a: Array, b: Array) -> Array:
    """Sum of ``a b^T`` over leading axes: (..., R, D) and (..., M, D) to (R, M)."""
    axes = (*range(a.ndim - 2), a.ndim - 1)
    return xp.tensordot(a, b, axes=(axes, axes))
