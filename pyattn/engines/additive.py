"""Additive attention: scores are sums over features of tanh(a + c), not products.

    score_ij = sum_f w_f tanh(a_if + c_jf) -> mask -> softmax

Tiled as in `softmax`: no array has axes for queries, keys and features at once, nor for all queries
and all keys. Kept for backward: the arguments, the output and the log-sum-exp of each row.

Letters as in `problem`, and A features: D there.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from .. import arrays, dispatch, masks
from ..arrays import Array
from ..checks import DtypeError, ShapeError, require_broadcast
from ..differentiable import Saved, gradients
from .placement import Placement, place
from .problem import record
from .softmax import flat, require_cotangents, unbroadcast

EVERYTHING = masks.full()


@dataclasses.dataclass(frozen=True)
class AdditiveProblem:
    """What a kernel module, ``pyattn.kernels.<backend>.additive``, is handed.

    It has ``refuses(problem)``; ``forward(problem)``, which returns out (B, H, N, E) and lse
    (B, H, N); ``delta`` as for `problem.Problem`; and ``backward(problem, dout, lse, delta)``,
    which returns the gradients of q, k, v and w by name, in acc.
    """

    q: Array
    """(B, H, N, A), acc: the queries as they meet the keys."""
    k: Array
    """(B, G, M, A), acc: the keys likewise."""
    v: Array
    """(B, G, M, E)."""
    w: Array
    """(H, A), acc."""
    blocks: Any
    """The BlockMask over N x M, before lengths are clipped."""
    layout: np.ndarray
    """int32 (B, H): which layout of `blocks` a batch item and head reads."""
    q_lengths: np.ndarray
    """int32 (B,)."""
    kv_lengths: np.ndarray
    """int32 (B,)."""


@dataclasses.dataclass(frozen=True)
class AdditiveSaved(Saved):
    """What the backward needs: the arguments, the output and each row's log-sum-exp."""

    q: Array
    k: Array
    v: Array
    w: Array
    mask: masks.Mask
    placement: Placement
    out: Array
    lse: Array

    @property
    def stats(self) -> dict[str, int]:
        """Counters: pairs allowed, 64 x 64 tiles executed, flops of those, bytes in and out.

        A tanh counts as one operation.
        """
        problem = _problem(self)
        tiles, pairs = problem.blocks.count(problem.layout, problem.q_lengths, problem.kv_lengths)
        each = 4 * self.q.shape[-1] + 2 * self.v.shape[-1]
        moved = (self.q, self.k, self.v, self.w, self.out, self.lse)
        return {"pairs": pairs, "tiles": tiles, "flops": 64 * 64 * tiles * each,
                "bytes": sum(arrays.nbytes(x) for x in moved)}

    def backward(self, dout: Array, dlse: Array | None = None) -> Any:
        """Gradients of q, k, v and w, each in its own dtype and shape.

        Parameters
        ----------
        dout : array, shape and dtype of the output
        dlse : array, shape (..., H, N), optional
            Gradient of the log-sum-exp, where the loss uses it.
        """
        require_cotangents(self, dout, dlse)
        problem, xp, batch = _problem(self), arrays.namespace(self.v), self.placement.batch
        rows = problem.q.shape[:3]
        wide = (*rows, self.v.shape[-1])
        dout, out = arrays.reshape(xp, dout, wide), arrays.reshape(xp, self.out, wide)
        lse = arrays.reshape(xp, self.lse, rows)
        if dlse is not None:
            dlse = arrays.cast(xp, arrays.reshape(xp, dlse, rows), lse.dtype)
        kernel = dispatch.kernel("additive", problem, self.v)
        grads = kernel.backward(problem, dout, lse, kernel.delta(dout, out, lse, dlse))
        found = {name: unbroadcast(xp, grads[name], x, batch)
                 for name, x in (("q", self.q), ("k", self.k), ("v", self.v))}
        return gradients(("q", "k", "v", "w"))(
            **found, w=arrays.cast(xp, grads["w"], self.w.dtype))


def forward(q: Array, k: Array, v: Array, w: Array, *, mask: Any = None,
            alignment: str = "bottom_right", q_lengths: Any = None, kv_lengths: Any = None,
            return_lse: bool = False) -> tuple[Any, AdditiveSaved]:
    """Attention with ``score_ij = sum_f w_f tanh(q_if + k_jf)``.

    Parameters
    ----------
    q : array, shape (..., H, N, A), float32 or float64
        Queries after their projection.
    k : array, shape (..., G, M, A), dtype of `q`
        Keys after theirs; G divides H.
    v : array, shape (..., G, M, E), float64 if `q` is, else any other float dtype
    w : array, shape (H, A), dtype of `q`
    mask : Mask, BlockMask or bool array that broadcasts to (..., H, N, M), optional
    alignment, q_lengths, kv_lengths
        As for `placement.place`.
    return_lse : bool
        Also return the log-sum-exp of each row, (..., H, N).

    Returns
    -------
    array, shape (..., H, N, E), dtype of `v`; and what its backward needs
        A query that sees no key: 0, and log-sum-exp -inf.
    """
    named = {"q": q, "k": k, "v": v, "w": w}
    xp = arrays.namespace(*named.values())
    arrays.require_same_device(named)
    batch = _require_operands(q, k, v, w)
    heads, n, m = q.shape[-3], q.shape[-2], k.shape[-2]
    if mask is None:
        mask = EVERYTHING
    elif not isinstance(mask, masks.Mask):
        mask = masks.dense(arrays.to_host(mask))
    require_broadcast("the leading axes of mask", mask.lead, (*batch, heads), "(..., H)")
    fields = {"q": q, "k": k, "v": v, "w": w, "mask": mask,
              "placement": place(batch, n, m, alignment, q_lengths, kv_lengths, None)}
    problem = _problem(record(AdditiveSaved, fields))
    out, lse = dispatch.kernel("additive", problem, v).forward(problem)
    out = arrays.cast(xp, arrays.reshape(xp, out, (*batch, heads, n, v.shape[-1])), v.dtype)
    saved = record(AdditiveSaved, {**fields, "out": out,
                                   "lse": arrays.reshape(xp, lse, (*batch, heads, n))})
    return ((out, saved.lse) if return_lse else out), saved


def _require_operands(q: Array, k: Array, v: Array, w: Array) -> tuple[int, ...]:
    """Check the arguments; the leading axes that they broadcast to."""
    acc = "float64" if arrays.require_float("v", v) == "float64" else "float32"
    for name, x in (("q", q), ("k", k), ("w", w)):
        if arrays.require_float(name, x) != acc:
            raise DtypeError(f"{name} must be {acc}, as v is {arrays.dtype_name(v)}; got "
                             f"{arrays.dtype_name(x)}")
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if min(q.ndim, k.ndim, v.ndim) < 3 or 0 in (q.shape[-1], v.shape[-1]):
        raise ShapeError("q, k and v must have at least 3 axes (..., heads, tokens, width), the "
                         f"last of at least 1; got {shapes}")
    heads, groups = q.shape[-3], k.shape[-3]
    if k.shape[-3:-1] != v.shape[-3:-1] or (heads % groups if groups else heads):
        raise ShapeError("k and v must have the same tokens and heads, and their heads divide "
                         f"those of q; got {shapes}")
    if not q.shape[-1] == k.shape[-1] == w.shape[-1] or tuple(w.shape[:-1]) != (heads,):
        raise ShapeError("q, k and w must have one width, and w must be (H, A); got "
                         f"{shapes}, w {tuple(w.shape)}")
    try:
        return np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    except ValueError:
        raise ShapeError(f"the leading axes of q, k and v must broadcast ({shapes})") from None


def _problem(saved: AdditiveSaved) -> AdditiveProblem:
    """The kernel's view of a call: leading axes in one."""
    xp, placement = arrays.namespace(saved.v), saved.placement
    batch, heads = placement.batch, saved.q.shape[-3]
    blocks = placement.compile(saved.mask)
    layout = np.broadcast_to(blocks.layout, (*batch, heads)).reshape(math.prod(batch), heads)
    return AdditiveProblem(flat(xp, saved.q, batch), flat(xp, saved.k, batch),
                           flat(xp, saved.v, batch), saved.w, blocks, layout,
                           placement.q_lengths, placement.kv_lengths)
