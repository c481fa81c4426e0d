"""Softmax attention whose heads are mixed, before the softmax and after it.

    products = scale * q k^T -> w_pre -> mask -> softmax -> w_post + b_post -> mask -> times v

Each mix is over the heads of one pair, so that tiles of all heads are done together: O(N) memory
for each head beside the operands, no array of all pairs. The weights are mixed once their rows are
whole, and their gradients need a sum over the row first, so that each pass walks the tiles twice.

Letters as in `problem`; Hq heads of q, H of the softmax, Hv of the output.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from .. import arrays, dispatch, masks
from ..arrays import Array
from ..checks import ShapeError, require_broadcast, require_real
from ..differentiable import Saved, gradients
from .placement import Placement, place
from .problem import record
from .softmax import flat, require_cotangents, require_operands, unbroadcast

EVERYTHING = masks.full()


@dataclasses.dataclass(frozen=True)
class TalkingHeadsProblem:
    """What a kernel module, ``pyattn.kernels.<backend>.talking_heads``, is handed.

    It has ``refuses(problem)``; ``forward(problem)``, which returns out (B, Hv, N, E) and the
    log-sum-exp of the mixed scores (B, H, N); and ``backward(problem, dout, lse)``, which returns
    gradients by name, in acc: those of q, k, v, w_pre, w_post and, asked for or not, b_post.
    """

    q: Array
    """(B, Hq, N, D)."""
    k: Array
    """(B, Gk, M, D), Gk a divisor of Hq."""
    v: Array
    """(B, Gv, M, E), Gv a divisor of Hv."""
    w_pre: Array
    """(Hq, H), acc."""
    w_post: Array
    """(H, Hv), acc."""
    b_post: Array | None
    """(Hv,), acc."""
    scale: float
    blocks: Any
    """The BlockMask over N x M, before lengths are clipped."""
    layout: np.ndarray
    """int32 (B, 1): which layout of `blocks` a batch item reads."""
    q_lengths: np.ndarray
    """int32 (B,)."""
    kv_lengths: np.ndarray
    """int32 (B,)."""


@dataclasses.dataclass(frozen=True)
class TalkingHeadsSaved(Saved):
    """What the backward needs: the arguments and each row's log-sum-exp."""

    q: Array
    k: Array
    v: Array
    w_pre: Array
    w_post: Array
    b_pre: Array | None
    b_post: Array | None
    scale: float
    mask: masks.Mask
    placement: Placement
    out: Array
    lse: Array
    """(..., H, N), of the mixed scores without `b_pre`, which moves no weight."""

    @property
    def stats(self) -> dict[str, int]:
        """Counters: pairs allowed and 64 x 64 tiles executed, for each head of the softmax.

        And flops of one walk over these tiles, bytes in and out.
        """
        problem, (heads_in, heads) = _problem(self), self.w_pre.shape
        heads_out = self.w_post.shape[1]
        tiles, pairs = problem.blocks.count(problem.layout, problem.q_lengths, problem.kv_lengths)
        each = (heads_in * (self.q.shape[-1] + heads)
                + heads_out * (self.v.shape[-1] + heads))
        moved = (self.q, self.k, self.v, self.w_pre, self.w_post, self.out, self.lse)
        return {"pairs": heads * pairs, "tiles": heads * tiles, "flops": 2 * 64 * 64 * tiles * each,
                "bytes": sum(arrays.nbytes(x) for x in moved)}

    def backward(self, dout: Array) -> Any:
        """Gradients of the array arguments that were given, each in its own dtype and shape.

        Parameters
        ----------
        dout : array, shape and dtype of the output
        """
        require_cotangents(self, dout, None)
        problem, xp, batch = _problem(self), arrays.namespace(self.q), self.placement.batch
        flat_batch = math.prod(batch)
        dout = arrays.reshape(xp, dout, (flat_batch, *self.out.shape[-3:]))
        lse = arrays.reshape(xp, self.lse, (flat_batch, *self.lse.shape[-2:]))
        grads = dispatch.kernel("talking_heads", problem, self.q).backward(problem, dout, lse)
        found = {name: unbroadcast(xp, grads[name], x, batch)
                 for name, x in (("q", self.q), ("k", self.k), ("v", self.v))}
        for name in ("w_pre", "w_post"):
            found[name] = arrays.cast(xp, grads[name], getattr(self, name).dtype)
        if self.b_pre is not None:
            # a softmax does not change if all its scores grow alike
            found["b_pre"] = xp.zeros_like(self.b_pre)
        if self.b_post is not None:
            found["b_post"] = arrays.cast(xp, grads["b_post"], self.b_post.dtype)
        return gradients(tuple(found))(**found)


def forward(q: Array, k: Array, v: Array, w_pre: Array, w_post: Array, b_pre: Array | None = None,
            b_post: Array | None = None, *, scale: float | None = None, mask: Any = None,
            alignment: str = "bottom_right", q_lengths: Any = None,
            kv_lengths: Any = None) -> tuple[Array, TalkingHeadsSaved]:
    """Talking-heads attention; see `pyattn.talking_heads_attention` for the arguments."""
    named = {"q": q, "k": k, "v": v, "w_pre": w_pre, "w_post": w_post, "b_pre": b_pre,
             "b_post": b_post}
    xp = arrays.namespace(*named.values())
    arrays.require_same_device(named)
    batch = _require_operands(**named)
    n, m, heads_out = q.shape[-2], k.shape[-2], w_post.shape[1]
    if mask is None:
        mask = EVERYTHING
    elif not isinstance(mask, masks.Mask):
        mask = masks.dense(arrays.to_host(mask))
    if mask.lead and mask.lead[-1] != 1:
        raise ShapeError("mask must be one for all heads, as these are mixed: its axis of heads "
                         f"must be 1; got leading axes {mask.lead}")
    require_broadcast("the leading axes of mask", mask.lead, (*batch, 1), "(..., 1)")
    scale = q.shape[-1] ** -0.5 if scale is None else require_real("scale", scale)
    fields = {**named, "scale": scale, "mask": mask,
              "placement": place(batch, n, m, alignment, q_lengths, kv_lengths, None)}
    problem = _problem(record(TalkingHeadsSaved, fields))
    out, lse = dispatch.kernel("talking_heads", problem, q).forward(problem)
    out = arrays.cast(xp, arrays.reshape(xp, out, (*batch, heads_out, n, v.shape[-1])), q.dtype)
    lse = arrays.reshape(xp, lse, (*batch, *lse.shape[-2:]))
    return out, record(TalkingHeadsSaved, {**fields, "out": out, "lse": lse})


def _require_operands(q: Array, k: Array, v: Array, w_pre: Array, w_post: Array,
                      b_pre: Array | None, b_post: Array | None) -> tuple[int, ...]:
    """Check the arguments; the leading axes that q, k and v broadcast to."""
    for name, w, letters in (("w_pre", w_pre, "(heads of q, heads of the softmax)"),
                             ("w_post", w_post, "(heads of the softmax, heads of the output)")):
        arrays.require_float(name, w)
        if w.ndim != 2 or 0 in w.shape:
            raise ShapeError(f"{name} must be {letters}, at least one of each; got "
                             f"{tuple(w.shape)}")
    if w_pre.shape[1] != w_post.shape[0]:
        raise ShapeError("w_pre must have as many columns as w_post has rows; got "
                         f"{tuple(w_pre.shape)} and {tuple(w_post.shape)}")
    for name, b, heads in (("b_pre", b_pre, w_pre.shape[1]), ("b_post", b_post, w_post.shape[1])):
        if b is not None:
            arrays.require_float(name, b)
            if tuple(b.shape) != (heads,):
                raise ShapeError(f"{name} must be ({heads},), a number for each column of "
                                 f"w_{name[2:]}; got {tuple(b.shape)}")
    for name, x, heads, w in (("q", q, w_pre.shape[0], "rows of w_pre"),
                              ("v", v, w_post.shape[1], "columns of w_post")):
        arrays.require_float(name, x)
        if x.ndim < 3:
            raise ShapeError(f"{name} must have at least 3 axes (..., heads, tokens, width); got "
                             f"{tuple(x.shape)}")
        count = x.shape[-3]
        if (name == "q" and count != heads) or not count or heads % count:
            rule = "as many heads as" if name == "q" else "heads that divide the number of"
            raise ShapeError(f"{name} must have {rule} {w}, {heads}; got {tuple(x.shape)}")
    if hasattr(k, "shape") and k.ndim >= 3 and v.shape[-2] != k.shape[-2]:
        raise ShapeError(f"v has {v.shape[-2]} tokens but k has {k.shape[-2]}; they must be equal")
    # v has heads of its own; what else is to be checked of it is the same for one head of k
    values = v[..., :1, :, :]
    batch = require_operands(q, k, k)
    require_operands(k[..., :1, :, :], k[..., :1, :, :], values)
    try:
        return np.broadcast_shapes(batch, v.shape[:-3])
    except ValueError:
        raise ShapeError(f"the leading axes of q, k and v must broadcast (q {tuple(q.shape)}, "
                         f"k {tuple(k.shape)}, v {tuple(v.shape)})") from None


def _problem(saved: TalkingHeadsSaved) -> TalkingHeadsProblem:
    """The kernel's view of a call: leading axes in one."""
    xp, placement = arrays.namespace(saved.q), saved.placement
    batch, acc = placement.batch, arrays.accumulator(xp, saved.q)
    blocks = placement.compile(saved.mask)
    layout = np.broadcast_to(blocks.layout, (*batch, 1)).reshape(math.prod(batch), 1)
    b_post = None if saved.b_post is None else arrays.cast(xp, saved.b_post, acc)
    return TalkingHeadsProblem(
        flat(xp, saved.q, batch), flat(xp, saved.k, batch), flat(xp, saved.v, batch),
        arrays.cast(xp, saved.w_pre, acc), arrays.cast(xp, saved.w_post, acc), b_post,
        saved.scale, blocks, layout, placement.q_lengths, placement.kv_lengths)
