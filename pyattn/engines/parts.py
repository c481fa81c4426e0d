"""Softmax attention part by part: tokens reordered for each, partial results merged.

A plan (`pyattn.masks.plan`) divides a mask's pairs among parts, each with an order of tokens that
makes few tiles of them. A part is a problem of its own, whose items are batch items; what it finds
goes back to where its tokens stand. With lse the log-sum-exp of all parts together,

    out = sum over parts of exp(lse_part - lse) out_part

and the backward of each part takes lse and delta of the whole, so that its gradients just add up.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from .. import arrays, masks
from ..arrays import Array
from ..masks.block_mask import Count
from ..masks.order import NONE, Order
from ..masks.plan import Part
from .placement import Placement
from .problem import Problem, Term

Parts = tuple[Part, ...]


def parts_of(mask: masks.Mask, placement: Placement) -> Parts | None:
    """Return the parts that a call is done in; None if its mask is to be visited in place."""
    if not isinstance(mask, masks.plan) or placement.segments is not None:
        return None
    offset = placement.mask_offset
    if isinstance(offset, np.ndarray):
        return None
    parts = mask.parts(offset)
    orders = [order for part in parts for order in (part.queries, part.keys) if order is not None]
    if not all(order.ascends for order in orders) and placement.ragged:
        # padding does not come last in such an order
        return None
    return parts if orders or len(parts) > 1 else None


def forward(kernel: Any, problem: Problem, parts: Parts) -> tuple[Array, Array]:
    """Return out (B, H, N, E) and lse (B, H, N), both in acc."""
    xp = arrays.namespace(problem.q)
    heads, n = problem.q.shape[1:3]
    found = []
    for part in _fitting(parts, problem):
        out, lse = kernel.forward(_problem(xp, problem, part))
        found.append(tuple(_spread_heads(xp, _spread(xp, x, part.queries, part, n, fill),
                                         part.heads, heads, 1, fill)
                           for x, fill in ((out, 0.0), (lse, -math.inf))))
    lses = [lse for _, lse in found]
    if problem.sinks is not None:
        lses.append(xp.broadcast_to(problem.sinks[None, :, None], lses[0].shape))
    lse = _log_sum(xp, lses)
    total = None
    for out, own in found:
        with np.errstate(all="ignore"):
            share = xp.where(own == -math.inf, 0.0, xp.exp(own - lse))[..., None]
        if type(out) is np.ndarray:
            out *= share
        else:
            out = share * out
        total = out if total is None else arrays.added(total, out)
    return total, lse


def backward(kernel: Any, problem: Problem, parts: Parts, dout: Array, lse: Array,
             delta: Array) -> dict[str, Array]:
    """Return the gradients by name as a kernel does, all in acc."""
    xp = arrays.namespace(problem.q)
    total: dict[str, Array] = {}
    for part in _fitting(parts, problem):
        rows = (_taken(xp, _heads(xp, x, part.heads, 1), part.queries, part)
                for x in (dout, lse, delta))
        grads = kernel.backward(_problem(xp, problem, part), *rows)
        if type(dout) is np.ndarray and part.heads is None:
            for name, order in (("q", part.queries), ("k", part.keys), ("v", part.keys)):
                if name in total and order is not None:
                    _add_at(total[name], grads.pop(name), order)
        for name, x in _put_back(xp, grads, part, problem).items():
            total[name] = arrays.added(total[name], x) if name in total else x
    return total


def count(problem: Problem, parts: Parts) -> Count:
    """Count the tiles visited and the pairs allowed."""
    counts = [part.blocks.count(_layout(problem, part),
                                _lengths(problem.q_lengths, part.queries),
                                _lengths(problem.kv_lengths, part.keys))
              for part in parts]
    return Count(sum(found.tiles for found in counts), sum(found.pairs for found in counts))


def _fitting(parts: Parts, problem: Problem) -> Parts:
    """Return parts for all heads where there is dropout, which draws by the head's number."""
    if not problem.dropout:
        return parts
    return tuple(part.for_all(problem.q.shape[1]) for part in parts)


def _problem(xp: Any, p: Problem, part: Part) -> Problem:
    """Return the problem that a part is."""
    chosen = _groups(part.heads, p.q.shape[1], p.k.shape[1])
    changes: dict[str, Any] = {
        "q": _taken(xp, _heads(xp, p.q, part.heads, 1), part.queries, part),
        "k": _taken(xp, _heads(xp, p.k, chosen, 1), part.keys, part),
        "v": _taken(xp, _heads(xp, p.v, chosen, 1), part.keys, part),
        "scale": _heads(xp, p.scale, part.heads, 0), "blocks": part.blocks,
        "layout": _layout(p, part), "q_lengths": _lengths(p.q_lengths, part.queries),
        "kv_lengths": _lengths(p.kv_lengths, part.keys), "sinks": None,
        "summed": ("out", "q", "k", "v")}
    for name in ("bias", "gate"):
        if getattr(p, name) is not None:
            changes[name] = _term(xp, getattr(p, name), part)
    if p.offsets is not None and p.offsets.shape[0] > 1:
        changes["offsets"] = _heads(xp, p.offsets, part.heads, 0)
    for name, order in (("q_positions", part.queries), ("k_positions", part.keys),
                        ("streams", part.queries)):
        given = getattr(p, name)
        if given is not None and order is not None:
            taken = np.broadcast_to(given[:, order.taken],
                                    (p.q.shape[0], order.items, order.slots))
            changes[name] = np.ascontiguousarray(taken.reshape(-1, order.slots))
    return dataclasses.replace(p, **changes)


def _put_back(xp: Any, grads: dict[str, Array], part: Part, p: Problem) -> dict[str, Array]:
    """Return those of a part's gradients that are there as they are for the whole problem."""
    heads, groups = p.q.shape[1], p.k.shape[1]
    chosen = _groups(part.heads, heads, groups)
    found = {"scale": _spread_heads(xp, grads["scale"], part.heads, heads, 0, 0.0)}
    for name, order, own, all_own in (("q", part.queries, part.heads, heads),
                                      ("k", part.keys, chosen, groups),
                                      ("v", part.keys, chosen, groups)):
        if name in grads:
            back = _spread(xp, grads[name], order, part, getattr(p, name).shape[2], 0.0)
            found[name] = _spread_heads(xp, back, own, all_own, 1, 0.0)
    for name in ("bias", "gate"):
        if getattr(p, name) is not None:
            found[name] = _term_gradient(xp, grads[name], getattr(p, name), part)
    if p.offsets is not None:
        table = grads["offsets"]
        found["offsets"] = table if p.offsets.shape[0] == 1 else _spread_heads(
            xp, table, part.heads, heads, 0, 0.0)
    return found


def _layout(p: Problem, part: Part) -> np.ndarray:
    batch, heads = p.q.shape[:2]
    heads = heads if part.heads is None else len(part.heads)
    layout = np.broadcast_to(part.blocks.layout, (batch, part.items, heads))
    return np.ascontiguousarray(layout.reshape(-1, heads))


def _lengths(lengths: np.ndarray, order: Order | None) -> np.ndarray:
    return lengths if order is None else order.lengths(lengths).reshape(-1)


def _groups(heads: tuple[int, ...] | None, all_heads: int, groups: int) -> tuple[int, ...] | None:
    """Return the heads of k and v that a part reads, each once if they are shared evenly."""
    if heads is None:
        return None
    each = [head // (all_heads // groups) for head in heads]
    once = tuple(sorted(set(each)))
    times = len(each) // len(once)
    return once if each == [g for g in once for _ in range(times)] else tuple(each)


def _heads(xp: Any, x: Array, heads: tuple[int, ...] | None, axis: int) -> Array:
    """Take some heads, as a view where they lie side by side."""
    if heads is None:
        return x
    first, last = heads[0], heads[-1] + 1
    if heads == tuple(range(first, last)):
        return x[(slice(None),) * axis + (slice(first, last), ...)]
    return xp.take(x, _index(xp, np.asarray(heads), x), axis=axis)


def _spread_heads(xp: Any, x: Array, heads: tuple[int, ...] | None, total: int, axis: int,
                  fill: float) -> Array:
    """Undo `_heads`: what a head has several times is added up, what it has not is `fill`."""
    if heads is None:
        return x
    found = []
    for head in range(total):
        mine = [x[(slice(None),) * axis + (place, ...)]
                for place, chosen in enumerate(heads) if chosen == head]
        found.append(functools.reduce(lambda a, b: a + b, mine) if mine else xp.full_like(
            x[(slice(None),) * axis + (0, ...)], fill))
    return xp.stack(found, axis=axis)


def _taken(xp: Any, x: Array, order: Order | None, part: Part) -> Array:
    """Take tokens of (B, H, N, ...) in their order: (B * items, H, slots, ...)."""
    if order is None:
        return x
    b, h, _, *rest = x.shape
    x = xp.take(x, _index(xp, order.taken.reshape(-1), x), axis=2)
    x = xp.reshape(x, (b, h, order.items, order.slots, *rest))
    x = xp.permute_dims(x, (0, 2, 1, *range(3, x.ndim)))
    return arrays.reshape(xp, x, (b * order.items, h, order.slots, *rest))


def _spread(xp: Any, x: Array, order: Order | None, part: Part, tokens: int,
            fill: float) -> Array:
    """Undo `_taken`: (B, H, tokens, ...), `fill` where the order has no such token."""
    if order is None:
        return x
    items, h, slots, *rest = x.shape
    x = xp.reshape(x, (items // order.items, order.items, h, slots, *rest))
    if type(x) is np.ndarray:
        out = np.full((x.shape[0], h, tokens, *rest), fill, x.dtype)
        for item, index in enumerate(order.index):
            held = index[index != NONE]
            out[:, :, held] = x[:, item, :, :len(held)]
        return out
    x = xp.permute_dims(x, (0, 2, 1, *range(3, x.ndim)))
    x = arrays.reshape(xp, x, (x.shape[0], h, order.items * slots, *rest))
    x = xp.concat([x, xp.full_like(x[:, :, :1, ...], fill)], axis=2)
    taken = [xp.take(x, _index(xp, place, x), axis=2) for place in order.places(tokens)]
    return functools.reduce(lambda a, b: a + b, taken)


def _add_at(total: np.ndarray, x: np.ndarray, order: Order) -> None:
    """Add tokens where they stand, as `_spread` puts them, without an array of that size."""
    items, h, slots, *rest = x.shape
    x = x.reshape(items // order.items, order.items, h, slots, *rest)
    for item, index in enumerate(order.index):
        held = index[index != NONE]
        total[:, :, held] += x[:, item, :, :len(held)]


def _term(xp: Any, term: Term, part: Part) -> Term:
    """Return a bias or gate as a part has it."""
    array = term.array if term.array.shape[1] == 1 else _heads(xp, term.array, part.heads, 1)
    b, h, n, m = array.shape
    rows, columns = (None if length == 1 else order
                     for length, order in ((n, part.queries), (m, part.keys)))
    if rows is None and columns is None:
        return dataclasses.replace(term, array=array, item=np.repeat(term.item, part.items))
    row = np.arange(n)[None] if rows is None else rows.taken
    column = np.arange(m)[None] if columns is None else columns.taken
    pairs = row[:, :, None] * m + column[:, None, :]
    array = xp.take(xp.reshape(array, (b, h, n * m)), _index(xp, pairs.reshape(-1), array), axis=2)
    array = xp.permute_dims(xp.reshape(array, (b, h, *pairs.shape)), (0, 2, 1, 3, 4))
    item = term.item[:, None] * len(pairs) + np.arange(len(pairs))
    return Term(arrays.reshape(xp, array, (b * len(pairs), h, *pairs.shape[1:])),
                item.reshape(-1).astype(np.int32))


def _term_gradient(xp: Any, grad: Array, term: Term, part: Part) -> Array:
    """Return the gradient of a part's term in the shape of the whole term."""
    b, h, n, m = term.array.shape
    rows, columns = (None if length == 1 else order
                     for length, order in ((n, part.queries), (m, part.keys)))
    if rows is not None or columns is not None:
        items, own, s, t = grad.shape
        grad = xp.permute_dims(xp.reshape(grad, (b, items // b, own, s, t)), (0, 2, 1, 3, 4))
        grad = arrays.reshape(xp, grad, (b, own, items // b * s * t))
        item_i, slot_i = _whereabouts(rows, n, items // b)
        item_j, slot_j = _whereabouts(columns, m, items // b)
        item = np.maximum(item_i[:, None], item_j[None, :])
        met = (((item_i[:, None] == item_j[None, :]) | (item_i[:, None] < 0) | (item_j < 0))
               & (slot_i >= 0)[:, None] & (slot_j >= 0))
        place = (np.maximum(item, 0) * s + slot_i[:, None]) * t + slot_j
        place = np.where(met, place, items // b * s * t)
        grad = xp.concat([grad, xp.zeros_like(grad[:, :, :1])], axis=2)
        grad = xp.take(grad, _index(xp, place.reshape(-1), grad), axis=2)
        grad = xp.reshape(grad, (b, own, n, m))
    return grad if h == 1 else _spread_heads(xp, grad, part.heads, h, 1, 0.0)


def _whereabouts(order: Order | None, tokens: int, items: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each token's item, -1 where it is in every one, and its slot, -1 where it has none."""
    if order is None:
        return np.full(tokens, 0 if items == 1 else -1), np.arange(tokens)
    place = order.places(tokens)[0]
    nowhere = place == order.index.size
    return np.where(nowhere, -1, place // order.slots), np.where(nowhere, -1, place % order.slots)


def _log_sum(xp: Any, lses: list[Array]) -> Array:
    """Return log(sum(exp(lse))), -inf where all are."""
    top = functools.reduce(xp.maximum, lses)
    base = xp.where(top == -math.inf, 0.0, top)
    with np.errstate(all="ignore"):
        total = functools.reduce(lambda a, b: a + b, [xp.exp(lse - base) for lse in lses])
        return base + xp.log(total)


def _index(xp: Any, index: np.ndarray, like: Array) -> Array:
    return arrays.from_host(xp, np.ascontiguousarray(index), arrays.device(like))
