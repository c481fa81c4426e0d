"""Tiled softmax attention over the pairs that a mask allows.

    scores = scale * q.k -> softcap -> + bias -> x gate / mask -> softmax with sinks

Online softmax over tiles of 64 x 64: O(N) memory beside the operands, forward and backward. Kept
for backward: the arguments, the output and the log-sum-exp of each row; scores are computed again.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from .. import arrays, dispatch, masks
from ..arrays import Array
from ..checks import (
    DtypeError,
    OptionError,
    ShapeError,
    require_broadcast,
    require_real,
)
from ..differentiable import Saved, gradients
from .placement import Placement, place
from .problem import Problem, Term

DECISIONS = ("dropout_seed",)


@dataclasses.dataclass(frozen=True)
class Call(Saved):
    """The arguments of one call, as the caller gave them."""

    q: Array
    k: Array
    v: Array
    bias: Array | None
    gate: Array | None
    scale: Array | float
    sinks: Array | None
    offsets: Array | None
    mask: masks.Mask
    placement: Placement
    softcap: float | None
    dropout: float
    dropout_seed: int | None


@dataclasses.dataclass(frozen=True)
class SoftmaxSaved(Call):
    """What the backward needs: the arguments, the output and each row's log-sum-exp.

    The mask is kept as it was described, never compiled, so that another backend can take over.
    """

    out: Array
    lse: Array

    @property
    def decisions(self) -> dict[str, Array]:
        """``dropout_seed``, where there was dropout."""
        if self.dropout_seed is None:
            return {}
        return {"dropout_seed": np.asarray(self.dropout_seed, dtype=np.uint64)}

    @property
    def stats(self) -> dict[str, int]:
        """Counters: pairs allowed, 64 x 64 tiles executed, flops of those, bytes in and out."""
        problem = _problem(self)
        tiles, pairs = problem.blocks.count(problem.layout, problem.q_lengths, problem.kv_lengths)
        widths = self.q.shape[-1] + self.v.shape[-1]
        moved = (self.q, self.k, self.v, self.out, self.lse)
        return {"pairs": pairs, "tiles": tiles, "flops": 2 * 64 * 64 * tiles * widths,
                "bytes": sum(arrays.nbytes(x) for x in moved)}

    def backward(self, dout: Array, dlse: Array | None = None) -> Any:
        """Gradients of the array arguments that were given, each in its own dtype and shape.

        Parameters
        ----------
        dout : array, shape and dtype of the output
        dlse : array, shape (..., H, N), optional
            Gradient of the log-sum-exp, where the loss uses it.
        """
        _check_cotangents(self, dout, dlse)
        problem, xp = _problem(self), arrays.namespace(self.q)
        acc = arrays.accumulator(xp, self.q)
        rows = problem.q.shape[:3]
        dout = xp.reshape(dout, (*rows, self.v.shape[-1]))
        lse = xp.reshape(self.lse, rows)
        delta = _delta(self, xp, dout, lse, dlse)
        kernel = dispatch.kernel("softmax", problem, self.q)
        grads = kernel.backward(problem, dout, lse, delta)

        found = {name: _unbroadcast(xp, grads[name], getattr(self, name), self.placement.batch)
                 for name in ("q", "k", "v")}
        for name in ("bias", "gate"):
            if (given := getattr(self, name)) is not None:
                found[name] = arrays.cast(xp, xp.reshape(grads[name], given.shape), given.dtype)
        if is_array(self.scale):
            found["scale"] = _summed_to(xp, grads["scale"], self.scale)
        if problem.sinks is not None:
            # the sink is a key of value 0: p (dp - delta) with dp = 0
            share = xp.exp(problem.sinks[None, :, None] - xp.where(lse == -math.inf, math.inf, lse))
            found["sinks"] = _summed_to(xp, -xp.sum(share * delta, axis=(0, 2)), self.sinks)
        if self.offsets is not None:
            found["offsets"] = xp.astype(grads["offsets"], acc)
        return gradients(tuple(found))(**found)


def forward(q: Array, k: Array, v: Array, *, mask: Any = None, alignment: str = "bottom_right",
            bias: Array | None = None, gate: Array | None = None,
            scale: Array | float | None = None, softcap: float | None = None,
            sinks: Array | None = None, offsets: Any = None, dropout: float = 0.0, rng: Any = None,
            q_lengths: Any = None, kv_lengths: Any = None, segments: Any = None,
            return_lse: bool = False, return_weights: bool = False,
            decisions: dict[str, Any] | None = None) -> tuple[Any, SoftmaxSaved]:
    """Attention over the pairs that `mask` allows; see `pyattn.attention` for the arguments.

    `offsets` is a function of the distances (key position - query position), an int array, that
    returns the table (1 or H, distances) to add to the scores.
    """
    batch = _check_operands(q, k, v)
    named = {"q": q, "k": k, "v": v, "bias": bias, "gate": gate, "sinks": sinks,
             "scale": scale if is_array(scale) else None}
    xp = arrays.namespace(*named.values())
    arrays.require_same_device(named)
    heads, n, m = q.shape[-3], q.shape[-2], k.shape[-2]
    for name, term in (("bias", bias), ("gate", gate)):
        if term is not None:
            arrays.require_float(name, term)
            require_broadcast(name, term.shape, (*batch, heads, n, m), "(..., H, N, M)")
    for name, per_head in (("sinks", sinks), ("scale", named["scale"])):
        if per_head is not None:
            arrays.require_float(name, per_head)
            require_broadcast(name, per_head.shape, (heads,), "(H,)")
    if scale is None:
        scale = q.shape[-1] ** -0.5
    elif not is_array(scale):
        scale = require_real("scale", scale)
    if softcap is not None and require_real("softcap", softcap) <= 0:
        raise OptionError(f"softcap must be positive; got {softcap}")
    placement = place(batch, n, m, alignment, q_lengths, kv_lengths, segments)
    decisions = _check_decisions(decisions)
    mask = _check_mask(mask, (*batch, heads))

    call = Call(
        q=q, k=k, v=v, bias=bias, gate=gate, scale=scale, sinks=sinks,
        offsets=None if offsets is None else offsets(placement.distances), mask=mask,
        placement=placement, softcap=None if softcap is None else float(softcap),
        dropout=_check_dropout(dropout), dropout_seed=_seed(dropout, rng, decisions))
    problem = _problem(call)
    kernel = dispatch.kernel("softmax", problem, q)
    out, lse = kernel.forward(problem)
    rows = (*batch, heads, n)
    result = arrays.cast(xp, xp.reshape(out, (*rows, v.shape[-1])), q.dtype)
    fields = {field.name: getattr(call, field.name) for field in dataclasses.fields(call)}
    saved = SoftmaxSaved(**fields, out=result, lse=xp.reshape(lse, rows))
    extras = [saved.lse] if return_lse else []
    if return_weights:
        weights = xp.reshape(kernel.weights(problem, lse), (*rows, m))
        extras.append(arrays.cast(xp, weights, q.dtype))
    return ((result, *extras) if extras else result), saved


def is_array(x: Any) -> bool:
    """Whether a scale was given as an array, which has a gradient, and not as a number."""
    return hasattr(x, "shape") and not isinstance(x, np.generic)


def _check_operands(q: Array, k: Array, v: Array) -> tuple[int, ...]:
    """Check q, k and v; the leading axes that they broadcast to."""
    arrays.namespace(q, k, v)
    dtypes = {name: arrays.require_float(name, x) for name, x in (("q", q), ("k", k), ("v", v))}
    if len(set(dtypes.values())) > 1:
        raise DtypeError("q, k and v must share one dtype; got "
                         + ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items()))
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim < 3:
            raise ShapeError(f"{name} must have at least 3 axes (..., heads, tokens, width); "
                             f"got {tuple(x.shape)}")
        if x.shape[-1] == 0:
            raise ShapeError(f"{name} must have a width of at least 1; got {tuple(x.shape)}")
    if q.shape[-1] != k.shape[-1]:
        raise ShapeError(f"k has width {k.shape[-1]} but q has width {q.shape[-1]}; they must be "
                         f"equal ({shapes})")
    if k.shape[-2] != v.shape[-2]:
        raise ShapeError(f"v has {v.shape[-2]} tokens but k has {k.shape[-2]}; they must be equal "
                         f"({shapes})")
    if k.shape[-3] != v.shape[-3]:
        raise ShapeError(f"v has {v.shape[-3]} heads but k has {k.shape[-3]}; they must be equal "
                         f"({shapes})")
    heads, groups = q.shape[-3], k.shape[-3]
    if (groups == 0 and heads > 0) or (groups > 0 and heads % groups):
        raise ShapeError(f"q has {heads} heads, which must be a multiple of the {groups} heads of "
                         f"k and v ({shapes})")
    try:
        return np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    except ValueError:
        raise ShapeError(f"the leading axes of q, k and v must broadcast ({shapes})") from None


def _check_cotangents(saved: SoftmaxSaved, dout: Array, dlse: Array | None) -> None:
    arrays.namespace(saved.q, dout, dlse)
    if tuple(dout.shape) != tuple(saved.out.shape):
        raise ShapeError(f"dout must have the shape of the output, {tuple(saved.out.shape)}; got "
                         f"{tuple(dout.shape)}")
    if dout.dtype != saved.out.dtype:
        raise DtypeError(f"dout must have the dtype of the output, {arrays.dtype_name(saved.out)}; "
                         f"got {arrays.dtype_name(dout)}")
    if dlse is not None and tuple(dlse.shape) != tuple(saved.lse.shape):
        raise ShapeError(f"dlse must have the shape of lse, {tuple(saved.lse.shape)}; got "
                         f"{tuple(dlse.shape)}")


def _check_dropout(dropout: float) -> float:
    rate = require_real("dropout", dropout)
    if not 0 <= rate < 1:
        raise OptionError(f"dropout must be at least 0 and below 1; got {rate}")
    return rate


def _check_decisions(decisions: dict[str, Any] | None) -> dict[str, Any]:
    unknown = sorted(set(decisions or ()) - set(DECISIONS))
    if unknown:
        raise OptionError(f"decisions may hold {', '.join(DECISIONS)}; got {', '.join(unknown)}")
    return decisions or {}


def _seed(dropout: float, rng: Any, decisions: dict[str, Any]) -> int | None:
    if not dropout:
        return None
    if "dropout_seed" in decisions:
        return int(decisions["dropout_seed"])
    return int(np.random.default_rng(rng).integers(2**64, dtype=np.uint64))


def _check_mask(mask: Any, rows: tuple[int, ...]) -> masks.Mask:
    if mask is None:
        return masks.full()
    if not isinstance(mask, masks.Mask):
        mask = masks.dense(arrays.to_host(mask))
    require_broadcast("the leading axes of mask", mask.lead, rows, "(..., H)")
    return mask


def _problem(call: Call) -> Problem:
    """The kernel's view of a call: leading axes in one, every option in its neutral form."""
    xp, placement = arrays.namespace(call.q), call.placement
    acc, heads = arrays.accumulator(xp, call.q), call.q.shape[-3]
    blocks = placement.compile(call.mask)
    layout = np.broadcast_to(blocks.layout, (*placement.batch, heads))
    scale = (xp.broadcast_to(xp.astype(call.scale, acc), (heads,)) if is_array(call.scale)
             else xp.full((heads,), call.scale, dtype=acc, device=arrays.device(call.q)))
    sinks = None if call.sinks is None else xp.broadcast_to(xp.astype(call.sinks, acc), (heads,))
    positions: dict[str, Any] = {}
    if call.offsets is not None or call.dropout:
        positions = {"q_positions": placement.q_positions, "k_positions": placement.k_positions,
                     "streams": placement.streams, "offset_origin": placement.distance_origin}
    return Problem(
        q=_flat(xp, call.q, placement.batch), k=_flat(xp, call.k, placement.batch),
        v=_flat(xp, call.v, placement.batch), scale=scale, blocks=blocks,
        layout=layout.reshape(math.prod(placement.batch), heads), q_lengths=placement.q_lengths,
        kv_lengths=placement.kv_lengths, softcap=call.softcap,
        bias=_term(xp, call.bias, placement.batch), gate=_term(xp, call.gate, placement.batch),
        offsets=call.offsets, sinks=sinks, dropout=call.dropout,
        dropout_seed=call.dropout_seed or 0, **positions)


def _flat(xp: Any, x: Array, batch: tuple[int, ...]) -> Array:
    """(..., H, N, D) as (B, H, N, D): a view unless broadcast axes cannot be merged in place."""
    if x.shape[:-3] != batch:
        x = xp.broadcast_to(x, (*batch, *x.shape[-3:]))
    return x if len(batch) == 1 else xp.reshape(x, (math.prod(batch), *x.shape[-3:]))


def _term(xp: Any, x: Array | None, batch: tuple[int, ...]) -> Term | None:
    if x is None:
        return None
    shape = (1,) * (len(batch) + 3 - x.ndim) + tuple(x.shape)
    own = shape[:-3]
    size = math.prod(own)
    item = np.broadcast_to(np.arange(size, dtype=np.int32).reshape(own), batch)
    return Term(xp.reshape(x, (size, *shape[-3:])), np.ascontiguousarray(item).reshape(-1))


def _unbroadcast(xp: Any, gradient: Array, x: Array, batch: tuple[int, ...]) -> Array:
    """The gradient (B, ...) in the shape and dtype of `x`, summed over axes that it broadcast."""
    gradient = xp.reshape(gradient, (*batch, *x.shape[-3:]))
    own = (1,) * (len(batch) + 3 - x.ndim) + tuple(x.shape[:-3])
    shared = tuple(axis for axis, size in enumerate(own) if size != batch[axis])
    if shared:
        gradient = xp.sum(gradient, axis=shared)
    return arrays.cast(xp, xp.reshape(gradient, x.shape), x.dtype)


def _summed_to(xp: Any, per_head: Array, x: Array) -> Array:
    """A gradient (H,) in the shape and dtype of `x`, which may hold one value for all heads."""
    if tuple(x.shape) != tuple(per_head.shape):
        per_head = xp.sum(per_head)
    return arrays.cast(xp, xp.reshape(per_head, x.shape), x.dtype)


def _delta(saved: SoftmaxSaved, xp: Any, dout: Array, lse: Array, dlse: Array | None) -> Array:
    """rowsum(dout * out) - dlse; 0 for rows that see no key, whatever dout holds there."""
    acc = arrays.accumulator(xp, saved.q)
    out = xp.reshape(saved.out, dout.shape)
    seen = lse != -math.inf
    if saved.sinks is not None:
        sinks = xp.broadcast_to(xp.astype(saved.sinks, acc), (lse.shape[1],))
        seen = seen & (lse != sinks[None, :, None])
    with np.errstate(all="ignore"):
        product = xp.sum(xp.astype(dout, acc) * xp.astype(out, acc), axis=-1)
        delta = xp.where(seen, product, 0.0)
        if dlse is not None:
            dlse = xp.reshape(xp.astype(dlse, acc), lse.shape)
            delta = xp.where(lse != -math.inf, delta - dlse, 0.0)
    return delta
