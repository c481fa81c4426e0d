"""Gradients of bias, gate and offsets, gathered tile by tile."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from pyattn.arrays import device

from .scores import columns_of_offsets
from .slabs import TILE, Array, Slab, zeros


class TermGradients:
    """Gradients in the terms' own shapes: what a term was broadcast along is summed."""

    def __init__(self, problem: Any, xp: Any) -> None:
        self.problem, self.xp = problem, xp
        self.tiles: dict[str, dict[tuple[int, int, int], Array]] = {"bias": {}, "gate": {}}
        self.tables: dict[str, dict[tuple[int, int], Array]] = {"offsets": {}, "gate": {}}
        self.blocks: dict[int, Array] = {}
        """The gradient of a gate in blocks, by the first head of a slab."""
        self.heads = problem.layout.shape[1]
        """How many heads a slab holds."""

    def add(self, slab: Slab, i: slice, j: slice, step: Any) -> None:
        """Add one rectangle's gradients of the scores and of the gate."""
        self.heads = slab.heads.stop - slab.heads.start
        problem = self.problem
        if problem.bias is not None:
            self._add_term("bias", slab, i, j, step.ds)
        if problem.gate is not None:
            self._add_gate(slab, i, j, step)
        if problem.offsets is not None:
            self._add_table("offsets", problem.offsets.shape, slab, i, j, step.ds)

    def _add_gate(self, slab: Slab, i: slice, j: slice, step: Any) -> None:
        form, dgate = self.problem.gate_form, step.dgate
        if form.by_offset:
            _, heads, _, width = self.problem.gate.array.shape
            self._add_table("gate", (heads, width), slab, i, j, dgate)
        elif form.block > 1:
            self._add_blocks(slab, i, j, dgate)
        else:
            if form.ramp:
                # forward: gate = clip((ramp + span - distance) / ramp, 0, 1)
                gate = step.scores.gate
                dgate = self.xp.where((0 < gate) & (gate < 1), dgate / form.ramp, 0.0)
            self._add_term("gate", slab, i, j, dgate)

    def _add_blocks(self, slab: Slab, i: slice, j: slice, d: Array) -> None:
        """Sum over blocks by products with the 0/1 matrices "token is of block"."""
        xp, term, block = self.xp, self.problem.gate, self.problem.gate_form.block
        b, g, r = slab.shape
        d = xp.reshape(d, (b, g * r, *d.shape[3:]))
        _, h, n, m = term.array.shape
        if h == 1:
            d = xp.sum(d, axis=1, keepdims=True)
        d = _by_item(xp, d, term.item[slab.items], term.array.shape[0])
        rows, columns = (
            xp.astype(slab.array((np.arange(part.start, part.stop) // block)[:, None] * (size > 1)
                                 == np.arange(size)), d.dtype)
            for part, size in ((i, n), (j, m)))
        found = xp.matmul(xp.matmul(xp.matrix_transpose(rows), d), columns)
        head = slab.heads.start if h != 1 else 0
        known = self.blocks.get(head)
        self.blocks[head] = found if known is None else known + found

    def _add_table(self, name: str, shape: tuple[int, int], slab: Slab, i: slice, j: slice,
                   d: Array) -> None:
        for start in range(j.start, j.stop, TILE):
            part = slice(start, min(start + TILE, j.stop))
            self._add_diagonals(name, shape, slab, i, part,
                                d[..., start - j.start:part.stop - j.start])

    def _add_term(self, name: str, slab: Slab, i: slice, j: slice, d: Array) -> None:
        xp, term = self.xp, getattr(self.problem, name)
        b, g, r = slab.shape
        d = xp.reshape(d, (b, g * r, *d.shape[3:]))
        _, h, n, m = term.array.shape
        shared = tuple(axis for axis, size in ((1, h), (2, n), (3, m))
                       if size == 1 and d.shape[axis] != 1)
        if shared:
            d = xp.sum(d, axis=shared, keepdims=True)
        d = _by_item(xp, d, term.item[slab.items], term.array.shape[0])
        step = j.stop - j.start if m == 1 else TILE
        for start in range(j.start, j.stop, step):
            stop = min(start + step, j.stop)
            key = (slab.heads.start if h != 1 else 0, i.start if n != 1 else 0,
                   start if m != 1 else 0)
            piece = d if m == 1 else d[..., start - j.start:stop - j.start]
            known = self.tiles[name].get(key)
            self.tiles[name][key] = piece if known is None else known + piece

    def _add_diagonals(self, name: str, shape: tuple[int, int], slab: Slab, i: slice, j: slice,
                       ds: Array) -> None:
        xp, table = self.xp, self.tables[name]
        b, g, r = slab.shape
        columns = columns_of_offsets(slab, i, j, shape[1])
        ds = xp.reshape(ds, (b, g * r, -1))
        shared = columns.shape[0] == 1
        if shared:
            ds = xp.sum(ds, axis=0, keepdims=True)
        if shape[0] == 1:
            ds = xp.sum(ds, axis=1, keepdims=True)
        h = slab.heads.start if shape[0] != 1 else 0
        for item in range(ds.shape[0]):
            first = int(columns[item].min())
            # summing along diagonals is a product with the 0/1 matrix "pair reads column"
            reads = _reads((columns[item] - first).tobytes(), columns.dtype.str)
            reads = xp.astype(slab.array(reads), ds.dtype)
            piece = xp.matmul(ds[item, ...], reads)
            known = table.get((h, first))
            if known is not None:
                width = max(known.shape[1], piece.shape[1])
                piece = _placed(xp, known, 0, width) + _placed(xp, piece, 0, width)
            table[h, first] = piece

    def gradients(self) -> dict[str, Array]:
        """All of them, by the names of the terms that were given."""
        grads, problem = {}, self.problem
        if problem.bias is not None:
            grads["bias"] = self._assembled("bias", problem.bias.array.shape)
        if problem.gate is not None:
            _, heads, _, width = shape = problem.gate.array.shape
            if problem.gate_form.by_offset:
                grads["gate"] = self._table("gate", (heads, width))
            elif problem.gate_form.block > 1:
                grads["gate"] = self._joined(shape)
            else:
                grads["gate"] = self._assembled("gate", shape)
        if problem.offsets is not None:
            grads["offsets"] = self._table("offsets", problem.offsets.shape)
        return grads

    def _joined(self, shape: tuple[int, ...]) -> Array:
        b, heads, n, m = shape
        step = max(min(heads, self.heads), 1)
        found = [self.blocks[head] if head in self.blocks else zeros(self.problem, (b, step, n, m))
                 for head in range(0, heads, step)]
        return self.xp.concat(found, axis=1) if found else zeros(self.problem, shape)

    def _assembled(self, name: str, shape: tuple[int, ...]) -> Array:
        xp, tiles = self.xp, self.tiles[name]
        b, h, n, m = shape
        step = max(min(h, self.heads), 1)

        def tile(head: int, i: int, j: int) -> Array:
            found = tiles.get((head, i, j))
            size = (b, min(step, h - head), min(TILE, n - i), min(TILE, m - j))
            return zeros(self.problem, size) if found is None else found

        if 0 in shape:
            return zeros(self.problem, shape)
        def row(head: int, i: int) -> Array:
            return xp.concat([tile(head, i, j) for j in range(0, m, TILE)], axis=3)

        return xp.concat([xp.concat([row(head, i) for i in range(0, n, TILE)], axis=2)
                          for head in range(0, h, step)], axis=1)

    def _table(self, name: str, shape: tuple[int, int]) -> Array:
        xp, (heads, width), table = self.xp, shape, self.tables[name]
        if heads * width == 0 or not table:
            return zeros(self.problem, (heads, width))
        step = min(heads, self.heads)
        rows = []
        for head in range(0, heads, step):
            row = zeros(self.problem, (step, width))
            for (h, first), piece in table.items():
                if h == head:
                    row = row + _placed(xp, piece, first, width)
            rows.append(row)
        return xp.concat(rows, axis=0)


def _by_item(xp: Any, d: Array, item: np.ndarray, size: int) -> Array:
    """Sum the batch items that read the same row of a term: (b, ...) to (size, ...)."""
    if size == 1:
        return xp.sum(d, axis=0, keepdims=True)
    if np.array_equal(item, np.arange(size)):
        return d
    rows = []
    for own in range(size):
        members = [d[at:at + 1, ...] for at in np.flatnonzero(item == own)]
        rows.append(functools.reduce(xp.add, members) if members else xp.zeros_like(d[:1, ...]))
    return xp.concat(rows, axis=0)


@functools.lru_cache(maxsize=64)
def _reads(columns: bytes, dtype: str) -> np.ndarray:
    """0/1 matrix (pairs, columns) of which column a pair reads."""
    flat = np.frombuffer(columns, dtype)
    return (flat[:, None] == np.arange(flat.max() + 1)).astype(np.float32)


def _placed(xp: Any, piece: Array, first: int, width: int) -> Array:
    """`piece` at column `first` of a table of zeros."""
    where = {"dtype": piece.dtype, "device": device(piece)}
    before = xp.zeros((piece.shape[0], first), **where)
    after = xp.zeros((piece.shape[0], width - first - piece.shape[1]), **where)
    return xp.concat([before, piece, after], axis=1)
