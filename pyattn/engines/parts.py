"""Softmax attention part by part: tokens reordered for each, partial results merged.

A plan (`pyattn.masks.plan`) divides a mask's pairs among parts, each with an order of tokens that
makes few tiles of them. A part is a problem of its own, whose items are batch items that list their
tokens; what it finds goes to where these stand, on top of what the parts before it found. With lse
the log-sum-exp of all parts together,

    out = sum over parts of exp(lse_part - lse) out_part

and the backward of each part takes lse and delta of the whole, so that its gradients just add up.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import numpy as np

from .. import arrays, masks
from ..arrays import Array
from ..masks.block_mask import Count
from ..masks.order import Order
from ..masks.plan import Part
from ..masks.tiled import Listing, Round, rounds
from . import indexed
from .placement import Placement
from .problem import Problem, Term

Piece = Part | Round
Parts = tuple[Piece, ...]

OPERANDS = ("q", "k", "v")


def parts_of(mask: masks.Mask, placement: Placement) -> Parts | None:
    """Return the parts that a call is done in; None if its mask is to be visited in place."""
    if isinstance(mask, rounds):
        return mask.each
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
    """Return out (B, H, N, E) and lse (B, H, N); out in acc unless it is in the dtype of q."""
    xp, found = arrays.namespace(problem.q), None
    acc = arrays.accumulator(xp, problem.q)
    for part in _fitting(kernel, parts, problem):
        own = _problem(problem, part, alone=len(parts) == 1)
        if part.heads is None:
            found = indexed.forward(kernel, own, found)
            continue
        if found is None:
            rows = problem.q.shape[:3]
            found = (np.zeros((*rows, problem.v.shape[3]), acc), np.full(rows, -math.inf, acc))
        indexed.forward(kernel, own, (found[0][:, _span(part.heads)],
                                      found[1][:, _span(part.heads)]))
    assert found is not None
    return found if problem.sinks is None else _with_sinks(xp, *found, problem.sinks)


def backward(kernel: Any, problem: Problem, parts: Parts, dout: Array, lse: Array,
             delta: Array) -> dict[str, Array]:
    """Return the gradients by name as a kernel does, those of q, k and v in acc or as they are."""
    xp = arrays.namespace(problem.q)
    total: dict[str, Array] = {}
    for part in _fitting(kernel, parts, problem):
        own = _problem(problem, part, alone=len(parts) == 1)
        onto = {name: total[name] for name in OPERANDS} if total else None
        rows = (dout, lse, delta)
        if part.heads is not None:
            if onto is None:
                onto = {name: np.zeros(getattr(problem, name).shape, lse.dtype)
                        for name in OPERANDS}
                total |= onto
            groups = _groups(part.heads, problem)
            onto = {name: x[:, _span(part.heads if name == "q" else groups)]
                    for name, x in onto.items()}
            rows = tuple(x[:, _span(part.heads)] for x in rows)
        grads = indexed.backward(kernel, own, *rows, onto)
        if part.heads is None:
            total |= {name: grads[name] for name in OPERANDS}
        for name, x in _of_the_whole(xp, grads, part, problem).items():
            total[name] = arrays.added(total[name], x) if name in total else x
    return total


def count(problem: Problem, parts: Parts) -> Count:
    """Count the tiles visited and the pairs allowed."""
    counts = [part.blocks.count(part.layouts(*problem.q.shape[:2]),
                                _lengths(problem.q_lengths, part.queries),
                                _lengths(problem.kv_lengths, part.keys))
              for part in parts]
    return Count(sum(found.tiles for found in counts), sum(found.pairs for found in counts))


def _fitting(kernel: Any, parts: Parts, problem: Problem) -> Parts:
    """Return parts that are for all heads, or for some that lie side by side.

    Dropout draws by the head's number, so it takes all.
    """
    def fits(part: Piece) -> bool:
        return part.heads is None or (
            kernel.INDEXED and not problem.dropout and _side_by_side(part.heads)
            and len(_groups(part.heads, problem)) * problem.q.shape[1]
            == len(part.heads) * problem.k.shape[1])

    return tuple(part if fits(part) else part.for_all(problem.q.shape[1]) for part in parts)


def _problem(p: Problem, part: Piece, *, alone: bool) -> Problem:
    """Return the problem that a part is; results are added to others unless it is `alone`."""
    batch = len(p.q_lengths)
    changes: dict[str, Any] = {
        "blocks": part.blocks, "layout": part.layouts(*p.q.shape[:2]), "sinks": None,
        "q_lengths": _lengths(p.q_lengths, part.queries),
        "kv_lengths": _lengths(p.kv_lengths, part.keys)}
    if not alone:
        changes["summed"] = ("out", *OPERANDS)
    if part.heads is not None:
        groups = _span(_groups(part.heads, p))
        changes |= {"q": p.q[:, _span(part.heads)], "k": p.k[:, groups], "v": p.v[:, groups],
                    "scale": p.scale[_span(part.heads)]}
    for name, order in (("q_index", part.queries), ("k_index", part.keys)):
        if order is not None:
            changes[name] = order.listing(batch)
    for name, term in (("bias", p.bias), ("gate", None if p.gate_form.by_offset else p.gate)):
        if term is not None:
            changes[name] = _term(term, cast("Part", part))
    if p.gate is not None and p.gate_form.by_offset:
        changes["gate"] = _table_term(p.gate, part, len(changes["q_lengths"]))
    if p.offsets is not None and p.offsets.shape[0] > 1 and part.heads is not None:
        changes["offsets"] = p.offsets[_span(part.heads)]
    for name, order in (("q_positions", part.queries), ("k_positions", part.keys),
                        ("streams", part.queries)):
        given = getattr(p, name)
        if given is not None and order is not None:
            changes[name] = order.picked(given, batch)
    return dataclasses.replace(p, **changes)


def _of_the_whole(xp: Any, grads: dict[str, Array], part: Piece, p: Problem) -> dict[str, Array]:
    """Return a part's gradients, but for those of the operands, as they are for all heads."""
    heads = p.q.shape[1]
    found = {"scale": _spread_heads(xp, grads["scale"], part.heads, heads, 0)}
    for name, term in (("bias", p.bias), ("gate", None if p.gate_form.by_offset else p.gate)):
        if term is not None:
            found[name] = _term_gradient(xp, grads[name], term, cast("Part", part))
    if p.gate is not None and p.gate_form.by_offset:
        table = grads["gate"]
        found["gate"] = table if p.gate.array.shape[1] == 1 else _spread_heads(
            xp, table, part.heads, heads, 1)
    if p.offsets is not None:
        table = grads["offsets"]
        found["offsets"] = table if p.offsets.shape[0] == 1 else _spread_heads(
            xp, table, part.heads, heads, 0)
    return found


def _lengths(lengths: np.ndarray, order: Order | Listing | None) -> np.ndarray:
    return lengths if order is None else order.lengths(lengths).reshape(-1)


def _groups(heads: tuple[int, ...], p: Problem) -> tuple[int, ...]:
    """Return the heads of k and v that some heads read."""
    shared = p.q.shape[1] // p.k.shape[1]
    return tuple(sorted({head // shared for head in heads}))


def _side_by_side(heads: tuple[int, ...]) -> bool:
    return heads == tuple(range(heads[0], heads[-1] + 1))


def _span(heads: tuple[int, ...]) -> slice:
    return slice(heads[0], heads[-1] + 1)


def _spread_heads(xp: Any, x: Array, heads: tuple[int, ...] | None, total: int,
                  axis: int) -> Array:
    """Return what some heads have as an array for all, zeros for the others."""
    if heads is None:
        return x
    shape = [*x.shape]
    pieces = []
    for size, piece in ((heads[0], None), (len(heads), x), (total - heads[-1] - 1, None)):
        shape[axis] = size
        pieces.append(xp.zeros(tuple(shape), dtype=x.dtype) if piece is None else piece)
    return xp.concat(pieces, axis=axis)


def _term(term: Term, part: Part) -> Term:
    """Return a bias or gate as a part has it."""
    array, xp = term.array, arrays.namespace(term.array)
    if part.heads is not None and array.shape[1] > 1:
        array = array[:, _span(part.heads)]
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


def _table_term(term: Term, part: Piece, items: int) -> Term:
    """Return a gate by offset as a part has it: the table is shared by all items."""
    array = term.array
    if part.heads is not None and array.shape[1] > 1:
        array = array[:, _span(part.heads)]
    return Term(array, np.zeros(items, np.int32))


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
    return grad if h == 1 else _spread_heads(xp, grad, part.heads, h, 1)


def _whereabouts(order: Order | None, tokens: int, items: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each token's item, -1 where it is in every one, and its slot, -1 where it has none."""
    if order is None:
        return np.full(tokens, 0 if items == 1 else -1), np.arange(tokens)
    place = order.places(tokens)[0]
    nowhere = place == order.index.size
    return np.where(nowhere, -1, place // order.slots), np.where(nowhere, -1, place % order.slots)


def _with_sinks(xp: Any, out: Array, lse: Array, sinks: Array) -> tuple[Array, Array]:
    joint = indexed.log_sum(xp, lse, xp.broadcast_to(sinks[None, :, None], lse.shape))
    with np.errstate(all="ignore"):
        share = xp.where(lse == -math.inf, 0.0, xp.exp(lse - joint))[..., None]
    return arrays.cast(xp, share * arrays.cast(xp, out, lse.dtype), out.dtype), joint


def _index(xp: Any, index: np.ndarray, like: Array) -> Array:
    return arrays.from_host(xp, np.ascontiguousarray(index), arrays.device(like))
