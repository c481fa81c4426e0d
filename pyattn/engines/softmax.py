"""Tiled softmax attention over the pairs that a mask allows.

    scores = scale * q.k -> softcap -> + bias -> x gate / mask -> softmax with sinks

Online softmax over tiles of 64 x 64: O(N) memory beside the operands, forward and backward. Kept
for backward: the arguments, the output and the log-sum-exp of each row; scores are computed again.
"""

from __future__ import annotations

import dataclasses
import functools
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
from ..masks.order import Order
from . import indexed, parts
from .placement import Placement, place
from .problem import BY_STRIDES, GateForm, Problem, Term, record

DECISIONS = ("dropout_seed",)

EVERYTHING = masks.full()


@dataclasses.dataclass(frozen=True)
class Call(Saved):
    """The arguments of one call, as the caller gave them."""

    q: Array
    k: Array
    v: Array
    bias: Array | None
    gate: Array | None
    gate_form: GateForm
    scale: Array | float
    sinks: Array | None
    offsets: Array | None
    mask: masks.Mask
    placement: Placement
    softcap: float | None
    dropout: float
    dropout_seed: int | None
    order: Order | None

    @property
    def batch(self) -> tuple[int, ...]:
        """The leading axes of q, k and v; with an order the placement has its items beside them."""
        return self.placement.batch if self.order is None else self.placement.batch[:-1]


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
        divided = _divided(self)
        problem = _problem(self, divided)
        tiles, pairs = (problem.blocks.count(problem.layout, problem.q_lengths, problem.kv_lengths)
                        if divided is None else parts.count(problem, divided))
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
        require_cotangents(self, dout, dlse)
        divided = _divided(self)
        problem, xp = _problem(self, divided), arrays.namespace(self.q)
        acc = arrays.accumulator(xp, self.q)
        rows = problem.q.shape[:3]
        wide = (*rows, self.v.shape[-1])
        dout, out = arrays.reshape(xp, dout, wide), arrays.reshape(xp, self.out, wide)
        lse = arrays.reshape(xp, self.lse, rows)
        if dlse is not None:
            dlse = arrays.cast(xp, arrays.reshape(xp, dlse, rows), acc)
        kernel = dispatch.kernel("softmax", problem, self.q)
        delta = _delta(kernel, xp, problem, dout, out, lse, dlse)
        grads = (indexed.backward(kernel, problem, dout, lse, delta) if divided is None else
                 parts.backward(kernel, problem, divided, dout, lse, delta))

        found = {name: unbroadcast(xp, grads[name], x, self.batch)
                 for name, x in (("q", self.q), ("k", self.k), ("v", self.v))}
        for name, x in (("bias", self.bias), ("gate", self.gate)):
            if x is not None:
                found[name] = arrays.cast(xp, arrays.reshape(xp, grads[name], x.shape), x.dtype)
        if is_array(self.scale):
            found["scale"] = _summed_to(xp, grads["scale"], self.scale)
        if problem.sinks is not None:
            # the sink is a key of value 0: p (dp - delta) with dp = 0
            share = xp.exp(problem.sinks[None, :, None] - xp.where(lse == -math.inf, math.inf, lse))
            found["sinks"] = _summed_to(xp, -xp.sum(share * delta, axis=(0, 2)), self.sinks)
        if self.offsets is not None:
            found["offsets"] = arrays.cast(xp, grads["offsets"], acc)
        return gradients(tuple(found))(**found)


def forward(q: Array, k: Array, v: Array, *, mask: Any = None, alignment: str = "bottom_right",
            bias: Array | None = None, gate: Any = None, gate_form: GateForm = BY_STRIDES,
            scale: Array | float | None = None, softcap: float | None = None,
            sinks: Array | None = None, offsets: Any = None, dropout: float = 0.0, rng: Any = None,
            q_lengths: Any = None, kv_lengths: Any = None, segments: Any = None,
            return_lse: bool = False, return_weights: bool = False,
            decisions: dict[str, Any] | None = None,
            order: Order | None = None) -> tuple[Any, SoftmaxSaved]:
    """Attention over the pairs that `mask` allows; see `pyattn.attention` for the arguments.

    `offsets` is a function of the distances (key position - query position), an int array, that
    returns the table (1 or H, distances) to add to the scores. A `gate` whose form is `by_offset`
    is such a function, too; one by blocks is (..., H, query blocks, key blocks), one that is a ramp
    (..., H, N, 1), or what broadcasts to it.

    `order` deals tokens out to items, which attend to themselves like batch items: mask, bias,
    lengths and all else are those of (..., items, H, slots, slots), where a slot without a token
    holds zeros; operands and results are still those of the tokens in their place.
    """
    named = {"q": q, "k": k, "v": v, "bias": bias,
             "gate": None if gate_form.by_offset else gate, "sinks": sinks,
             "scale": scale if is_array(scale) else None}
    xp = arrays.namespace(*named.values())
    batch = require_operands(q, k, v)
    arrays.require_same_device(named)
    heads, n, m = q.shape[-3], q.shape[-2], k.shape[-2]
    rows = (*batch, heads, n)
    if order is not None:
        batch, n, m = (*batch, order.items), order.slots, order.slots
    if bias is not None:
        arrays.require_float("bias", bias)
        require_broadcast("bias", bias.shape, (*batch, heads, n, m), "(..., H, N, M)")
    if named["gate"] is not None:
        _check_gate(gate, gate_form, (*batch, heads), n, m)
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
    if gate_form.by_offset:
        gate = gate(placement.distances)
    decisions = _check_decisions(decisions)
    mask = _check_mask(mask, (*batch, heads))

    call = record(Call, {
        "q": q, "k": k, "v": v, "bias": bias, "gate": gate, "gate_form": gate_form, "scale": scale,
        "sinks": sinks,
        "offsets": None if offsets is None else offsets(placement.distances), "mask": mask,
        "placement": placement, "softcap": None if softcap is None else float(softcap),
        "dropout": _check_dropout(dropout), "dropout_seed": _seed(dropout, rng, decisions),
        "order": order})
    divided = _divided(call)
    problem = _problem(call, divided)
    kernel = dispatch.kernel("softmax", problem, q)
    out, lse = (indexed.forward(kernel, problem) if divided is None else
                parts.forward(kernel, problem, divided))
    result = arrays.cast(xp, arrays.reshape(xp, out, (*rows, v.shape[-1])), q.dtype)
    saved = record(SoftmaxSaved, {**vars(call), "out": result,
                                  "lse": arrays.reshape(xp, lse, rows)})
    extras = [saved.lse] if return_lse else []
    if return_weights:
        whole = problem if divided is None else _problem(call)
        weights = arrays.reshape(xp, kernel.weights(whole, lse), (*rows, m))
        extras.append(arrays.cast(xp, weights, q.dtype))
    return ((result, *extras) if extras else result), saved


def _divided(call: Call) -> parts.Parts | None:
    """The parts that a call is done in, if its mask is planned so."""
    # blocks of a gate are of tokens in their place
    if call.order is not None or call.gate_form.block > 1:
        return None
    return parts.parts_of(call.mask, call.placement)


def is_array(x: Any) -> bool:
    """Whether a scale was given as an array, which has a gradient, and not as a number."""
    return hasattr(x, "shape") and not isinstance(x, np.generic)


def require_operands(q: Array, k: Array, v: Array) -> tuple[int, ...]:
    """Check q, k and v; the leading axes that they broadcast to."""
    dtypes = (arrays.require_float("q", q), arrays.require_float("k", k),
              arrays.require_float("v", v))
    if not dtypes[0] == dtypes[1] == dtypes[2]:
        raise DtypeError("q, k and v must share one dtype; got q {}, k {}, v {}".format(*dtypes))
    return _check_shapes(tuple(q.shape), tuple(k.shape), tuple(v.shape))


@functools.lru_cache(1024)
def _check_shapes(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> tuple[int, ...]:
    shapes = f"q {q}, k {k}, v {v}"
    for name, shape in (("q", q), ("k", k), ("v", v)):
        if len(shape) < 3:
            raise ShapeError(f"{name} must have at least 3 axes (..., heads, tokens, width); "
                             f"got {shape}")
        if shape[-1] == 0:
            raise ShapeError(f"{name} must have a width of at least 1; got {shape}")
    if q[-1] != k[-1]:
        raise ShapeError(f"k has width {k[-1]} but q has width {q[-1]}; they must be equal "
                         f"({shapes})")
    if k[-2] != v[-2]:
        raise ShapeError(f"v has {v[-2]} tokens but k has {k[-2]}; they must be equal ({shapes})")
    if k[-3] != v[-3]:
        raise ShapeError(f"v has {v[-3]} heads but k has {k[-3]}; they must be equal ({shapes})")
    heads, groups = q[-3], k[-3]
    if (groups == 0 and heads > 0) or (groups > 0 and heads % groups):
        raise ShapeError(f"q has {heads} heads, which must be a multiple of the {groups} heads of "
                         f"k and v ({shapes})")
    try:
        return np.broadcast_shapes(q[:-3], k[:-3], v[:-3])
    except ValueError:
        raise ShapeError(f"the leading axes of q, k and v must broadcast ({shapes})") from None


def require_cotangents(saved: Any, dout: Array, dlse: Array | None) -> None:
    """Raise unless dout and dlse fit the out and lse of `saved`."""
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


def _check_gate(gate: Array, form: GateForm, rows: tuple[int, ...], n: int, m: int) -> None:
    arrays.require_float("gate", gate)
    if form.ramp:
        require_broadcast("span", gate.shape, (*rows, n, 1), "(..., H, N, 1)")
    elif form.block > 1:
        require_broadcast("gate", gate.shape, (*rows, -(-n // form.block), -(-m // form.block)),
                          "(..., H, query blocks, key blocks)")
    else:
        require_broadcast("gate", gate.shape, (*rows, n, m), "(..., H, N, M)")


def _check_dropout(dropout: float) -> float:
    rate = require_real("dropout", dropout)
    if not 0 <= rate < 1:
        raise OptionError(f"dropout must be at least 0 and below 1; got {rate}")
    return rate


def _check_decisions(decisions: dict[str, Any] | None) -> dict[str, Any]:
    if decisions is None:
        return {}
    unknown = sorted(set(decisions) - set(DECISIONS))
    if unknown:
        raise OptionError(f"decisions may hold {', '.join(DECISIONS)}; got {', '.join(unknown)}")
    return decisions


def _seed(dropout: float, rng: Any, decisions: dict[str, Any]) -> int | None:
    if not dropout:
        return None
    if "dropout_seed" in decisions:
        return int(decisions["dropout_seed"])
    return int(np.random.default_rng(rng).integers(2**64, dtype=np.uint64))


def _check_mask(mask: Any, rows: tuple[int, ...]) -> masks.Mask:
    if mask is None:
        return EVERYTHING
    if not isinstance(mask, masks.Mask):
        mask = masks.dense(arrays.to_host(mask))
    require_broadcast("the leading axes of mask", mask.lead, rows, "(..., H)")
    return mask


def _problem(call: Call, divided: parts.Parts | None = None) -> Problem:
    """The kernel's view of a call: leading axes in one, every option in its neutral form.

    Where it is to be divided into parts, these have the masks.
    """
    q, placement, own = call.q, call.placement, call.batch
    xp, batch, heads = arrays.namespace(q), placement.batch, q.shape[-3]
    acc = arrays.accumulator(xp, q)
    blocks = placement.compile(call.mask if divided is None else EVERYTHING)
    fields = {
        "q": flat(xp, q, own), "k": flat(xp, call.k, own), "v": flat(xp, call.v, own),
        "scale": per_head(xp, call.scale, heads, acc, q), "blocks": blocks,
        "layout": _layout(blocks.layout, batch, heads), "q_lengths": placement.q_lengths,
        "kv_lengths": placement.kv_lengths, "softcap": call.softcap,
        "bias": _term(xp, call.bias, batch), "gate": _term(xp, _gate(xp, call), batch),
        "gate_form": call.gate_form,
        "offsets": call.offsets, "dropout": call.dropout, "dropout_seed": call.dropout_seed or 0}
    if not q.shape[:-3] == call.k.shape[:-3] == call.v.shape[:-3]:
        operands = (("q", q), ("k", call.k), ("v", call.v))
        fields["summed"] = tuple(name for name, x in operands if _shared_axes(x, own))
    if call.order is not None:
        fields["q_index"] = fields["k_index"] = call.order.listing(math.prod(own))
    if call.sinks is not None:
        fields["sinks"] = per_head(xp, call.sinks, heads, acc, q)
    if call.offsets is not None or call.dropout or call.gate_form.positional:
        fields |= {"q_positions": placement.q_positions, "k_positions": placement.k_positions,
                   "streams": placement.streams, "offset_origin": placement.distance_origin}
    return record(Problem, fields)


def _gate(xp: Any, call: Call) -> Array | None:
    """The gate as a term's array: a table is a single row."""
    return xp.expand_dims(call.gate, axis=-2) if call.gate_form.by_offset else call.gate


def _layout(layout: np.ndarray, batch: tuple[int, ...], heads: int) -> np.ndarray:
    if layout.size == 1:
        return np.zeros((math.prod(batch), heads), np.int32)      # there is only number 0
    return np.broadcast_to(layout, (*batch, heads)).reshape(math.prod(batch), heads)


def per_head(xp: Any, value: Array | float, heads: int, acc: Any, like: Array) -> Array:
    """A number, or an array that broadcasts to (H,), as (H,) in the dtype `acc`."""
    if is_array(value):
        return xp.broadcast_to(arrays.cast(xp, value, acc), (heads,))
    if type(like) is np.ndarray:
        return _filled(heads, value, acc)
    return xp.full((heads,), value, dtype=acc, device=arrays.device(like))


@functools.lru_cache(256)
def _filled(size: int, value: float, dtype: Any) -> np.ndarray:
    """Return a read-only array of one value, shared by the calls that need it."""
    array = np.full(size, value, dtype)
    array.flags.writeable = False
    return array


def flat(xp: Any, x: Array, batch: tuple[int, ...]) -> Array:
    """(..., H, N, D) as (B, H, N, D): a view unless broadcast axes cannot be merged in place."""
    if x.shape[:-3] != batch:
        x = xp.broadcast_to(x, (*batch, *x.shape[-3:]))
    if len(batch) == 1:
        return x
    return arrays.reshape(xp, x, (math.prod(batch), *x.shape[-3:]))


def _term(xp: Any, x: Array | None, batch: tuple[int, ...]) -> Term | None:
    if x is None:
        return None
    shape = (1,) * (len(batch) + 3 - x.ndim) + tuple(x.shape)
    own = shape[:-3]
    size = math.prod(own)
    item = np.broadcast_to(np.arange(size, dtype=np.int32).reshape(own), batch)
    return Term(xp.reshape(x, (size, *shape[-3:])), np.ascontiguousarray(item).reshape(-1))


def unbroadcast(xp: Any, gradient: Array, x: Array, batch: tuple[int, ...]) -> Array:
    """The gradient (B, ...) in the shape and dtype of `x`, summed over axes that it broadcast."""
    shared = _shared_axes(x, batch)
    if shared:
        gradient = arrays.reshape(xp, gradient, (*batch, *x.shape[-3:]))
        gradient = xp.sum(gradient, axis=shared)
    return arrays.cast(xp, arrays.reshape(xp, gradient, x.shape), x.dtype)


def _shared_axes(x: Array, batch: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of `batch` along which `x` is repeated."""
    if x.shape[:-3] == batch:
        return ()
    own = (1,) * (len(batch) + 3 - x.ndim) + tuple(x.shape[:-3])
    return tuple(axis for axis, size in enumerate(own) if size != batch[axis])


def _summed_to(xp: Any, per_head: Array, x: Array) -> Array:
    """A gradient (H,) in the shape and dtype of `x`, which may hold one value for all heads."""
    if tuple(x.shape) != tuple(per_head.shape):
        per_head = xp.sum(per_head)
    return arrays.cast(xp, xp.reshape(per_head, x.shape), x.dtype)


def _delta(kernel: Any, xp: Any, problem: Problem, dout: Array, out: Array, lse: Array,
           dlse: Array | None) -> Array:
    """rowsum(dout * out) - dlse; rows that see no key take nothing from what dout holds there."""
    if problem.sinks is None:
        return kernel.delta(dout, out, lse, dlse)
    # such a row has the sink for its lse, and may have a gradient of that
    blind = lse == problem.sinks[None, :, None]
    delta = kernel.delta(dout, out, xp.where(blind, -math.inf, lse), dlse)
    return delta if dlse is None else xp.where(blind & (lse != -math.inf), -dlse, delta)
