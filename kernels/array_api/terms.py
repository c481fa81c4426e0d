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
        self.offsets: dict[tuple[int, int], Array] = {}
        self.heads = problem.layout.shape[1]
        """How many heads a slab holds."""

    def add(self, slab: Slab, i: slice, j: slice, ds: Array, dgate: Array | None) -> None:
        """Add one rectangle's gradients of the scores and of the gate."""
        self.heads = slab.heads.stop - slab.heads.start
        if self.problem.bias is not None:
            self._add_term("bias", slab, i, j, ds)
        if self.problem.gate is not None:
            self._add_term("gate", slab, i, j, dgate)
        if self.problem.offsets is not None:
            for start in range(j.start, j.stop, TILE):
                part = slice(start, min(start + TILE, j.stop))
                self._add_offsets(slab, i, part, ds[..., start - j.start:part.stop - j.start])

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

    def _add_offsets(self, slab: Slab, i: slice, j: slice, ds: Array) -> None:
        xp = self.xp
        b, g, r = slab.shape
        columns = columns_of_offsets(slab, i, j)
        ds = xp.reshape(ds, (b, g * r, -1))
        shared = columns.shape[0] == 1
        if shared:
            ds = xp.sum(ds, axis=0, keepdims=True)
        if self.problem.offsets.shape[0] == 1:
            ds = xp.sum(ds, axis=1, keepdims=True)
        h = slab.heads.start if self.problem.offsets.shape[0] != 1 else 0
        for item in range(ds.shape[0]):
            first = int(columns[item].min())
            # summing along diagonals is a product with the 0/1 matrix "pair reads column"
            reads = _reads((columns[item] - first).tobytes(), columns.dtype.str)
            reads = xp.astype(slab.array(reads), ds.dtype)
            piece = xp.matmul(ds[item, ...], reads)
            known = self.offsets.get((h, first))
            if known is not None:
                width = max(known.shape[1], piece.shape[1])
                piece = _placed(xp, known, 0, width) + _placed(xp, piece, 0, width)
            self.offsets[h, first] = piece

    def gradients(self) -> dict[str, Array]:
        """All of them, by the names of the terms that were given."""
        grads = {}
        for name in ("bias", "gate"):
            term = getattr(self.problem, name)
            if term is not None:
                grads[name] = self._assembled(self.tiles[name], term.array.shape)
        if self.problem.offsets is not None:
            grads["offsets"] = self._table()
        return grads

    def _assembled(self, tiles: dict[tuple[int, int, int], Array], shape: tuple[int, ...]) -> Array:
        xp = self.xp
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

    def _table(self) -> Array:
        xp, (heads, width) = self.xp, self.problem.offsets.shape
        if heads * width == 0 or not self.offsets:
            return zeros(self.problem, (heads, width))
        step = min(heads, self.heads)
        rows = []
        for head in range(0, heads, step):
            row = zeros(self.problem, (step, width))
            for (h, first), piece in self.offsets.items():
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
