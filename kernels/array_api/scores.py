"""The scores of one rectangle of pairs, with all terms, and which of the pairs are allowed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from pyattn.arrays import accumulator

from .philox import kept
from .slabs import TILE, Array, Slab


def unpack(words: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Return which pairs of a tile's first rows and columns its words allow."""
    return np.unpackbits(words.view(np.uint8).reshape(TILE, 8), axis=1,
                         bitorder="little")[:rows, :columns].astype(bool)


@dataclasses.dataclass(frozen=True)
class Scores:
    """One rectangle of scores, (b, g, r, n, m)."""

    raw: Array
    """q.k before the scale."""
    value: Array
    """After softcap, bias and offsets; -inf where not allowed."""
    slope: Array | None
    """d(softcapped) / d(scaled)."""
    allowed: Array | None
    """None: every pair is allowed."""
    gate: Array | None


def split_heads(slab: Slab, x: Array) -> Array:
    """(b, 1 or h, n, m) as (b, 1 or g, 1 or r, n, m)."""
    _, g, r = slab.shape
    split = (g, r) if x.shape[1] != 1 else (1, 1)
    return slab.xp.reshape(x, (x.shape[0], *split, *x.shape[2:]))


def _term(slab: Slab, term: Any, i: slice, j: slice) -> Array:
    """The part of a bias or gate that lies over the rectangle, in the accumulator's dtype."""
    array, item = term.array, term.item[slab.items]
    if array.shape[0] == 1:
        item = item[:1]
    if not np.array_equal(item, np.arange(array.shape[0])):
        array = slab.xp.take(array, slab.array(item), axis=0)
    h = slab.heads if array.shape[1] != 1 else slice(0, 1)
    i = i if array.shape[2] != 1 else slice(0, 1)
    j = j if array.shape[3] != 1 else slice(0, 1)
    return split_heads(slab, slab.xp.astype(array[:, h, i, j], accumulator(slab.xp, slab.q)))


def _positions(slab: Slab, x: np.ndarray, part: slice) -> np.ndarray:
    return (x if x.shape[0] == 1 else x[slab.items])[:, part]


def _ahead(slab: Slab, i: slice, j: slice) -> np.ndarray:
    """Key position - query position, (1 or b, n, m)."""
    problem = slab.problem
    return (_positions(slab, problem.k_positions, j)[:, None, :]
            - _positions(slab, problem.q_positions, i)[:, :, None])


def columns_of_offsets(slab: Slab, i: slice, j: slice, width: int) -> np.ndarray:
    """Which column of a table by offset each pair reads, (1 or b, n, m)."""
    # pairs that no mask allows (padding, other segments) may lie beyond the table
    return np.clip(_ahead(slab, i, j) - slab.problem.offset_origin, 0, width - 1)


def _read(slab: Slab, table: Array, i: slice, j: slice) -> Array:
    """What the pairs read of a table (1 or H, W)."""
    xp = slab.xp
    columns = columns_of_offsets(slab, i, j, table.shape[1])
    table = table[slab.heads, :] if table.shape[0] != 1 else table
    picked = xp.take(xp.astype(table, accumulator(xp, slab.q)), slab.array(columns.reshape(-1)),
                     axis=1)
    picked = xp.reshape(picked, (table.shape[0], *columns.shape))
    return split_heads(slab, xp.permute_dims(picked, (1, 0, 2, 3)))


def _gate(slab: Slab, i: slice, j: slice) -> Array:
    """The gate of each pair, in one of the forms of `GateForm`."""
    problem, xp = slab.problem, slab.xp
    form, gate = problem.gate_form, problem.gate
    if form.by_offset:
        return _read(slab, gate.array[0, :, 0, :], i, j)
    if form.ramp:
        reach = _term(slab, gate, i, slice(0, 1)) + form.ramp
        ahead = slab.array((_ahead(slab, i, j) + form.shift)[:, None, None, :, :])
        return xp.clip((reach + xp.astype(ahead, reach.dtype)) / form.ramp, 0.0, 1.0)
    if form.block > 1:
        found = _term(slab, gate, *(slice(part.start // form.block, -(-part.stop // form.block))
                                    for part in (i, j)))
        for axis, part in ((-2, i), (-1, j)):
            if found.shape[axis] != 1:
                block = np.arange(part.start, part.stop) // form.block - part.start // form.block
                found = xp.take(found, slab.array(block), axis=axis)
        return found
    return _term(slab, gate, i, j)


def scores_of(slab: Slab, i: slice, j: slice, bits: np.ndarray | None) -> Scores:
    """Score queries `i` against keys `j`; `bits` are those of a partial tile."""
    problem, xp = slab.problem, slab.xp
    acc = accumulator(xp, slab.q)
    _, g, r = slab.shape
    k = xp.astype(slab.k[:, :, :, j, :], acc)
    raw = xp.matmul(xp.astype(slab.q[:, :, :, i, :], acc), xp.matrix_transpose(k))
    value = raw * xp.reshape(problem.scale[slab.heads], (1, g, r, 1, 1))
    slope = None
    if problem.softcap is not None:
        bent = xp.tanh(value / problem.softcap)
        value, slope = problem.softcap * bent, 1.0 - bent * bent

    allowed = None
    if bits is not None:
        allowed = slab.array(unpack(bits, i.stop - i.start, j.stop - j.start))
    inside = _inside(slab, i, j)
    if inside is not None:
        inside = slab.array(inside[:, None, None, :, :])
        allowed = inside if allowed is None else allowed & inside
    if problem.bias is not None:
        bias = _term(slab, problem.bias, i, j)
        value = value + bias
        open_ = bias != -math.inf
        allowed = open_ if allowed is None else allowed & open_
    if problem.offsets is not None:
        value = value + _read(slab, problem.offsets, i, j)
    if allowed is not None:
        allowed = xp.broadcast_to(allowed, value.shape)
        value = xp.where(allowed, value, xp.full_like(value, -math.inf))
    gate = None if problem.gate is None else xp.broadcast_to(_gate(slab, i, j), value.shape)
    return Scores(raw, value, slope, allowed, gate)


def _inside(slab: Slab, i: slice, j: slice) -> np.ndarray | None:
    """Pairs within the lengths of their batch item, (b, n, m), or None when all are."""
    queries, keys = slab.problem.q_lengths[slab.items], slab.problem.kv_lengths[slab.items]
    if (queries >= i.stop).all() and (keys >= j.stop).all():
        return None
    return ((np.arange(i.start, i.stop)[None, :, None] < queries[:, None, None])
            & (np.arange(j.start, j.stop)[None, None, :] < keys[:, None, None]))


def dropout_factor(slab: Slab, i: slice, j: slice) -> Array | None:
    """The factor of dropout on each weight, or None without dropout."""
    problem, xp = slab.problem, slab.xp
    if not problem.dropout:
        return None
    heads = np.arange(slab.heads.start, slab.heads.stop)[None, :, None, None]
    keep = kept(problem.dropout, problem.dropout_seed,
                _positions(slab, problem.streams, i)[:, None, :, None], heads,
                _positions(slab, problem.q_positions, i)[:, None, :, None],
                _positions(slab, problem.k_positions, j)[:, None, None, :])
    factor = xp.astype(slab.array(keep), accumulator(xp, slab.q)) / (1.0 - problem.dropout)
    return split_heads(slab, factor)
