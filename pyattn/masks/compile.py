"""From a mask to its BlockMask: a quadtree over tiles, level by level.

Boxes of tiles that are all allowed are kept whole, those with nothing allowed are dropped, the rest
split; single tiles that stay undecided get their bits, evaluated once for equal signatures. Rows
and columns of runs are then assembled from the same boxes, a box of s x s tiles giving s entries.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np

from ..checks import require_integer
from .algebra import FULL, PARTIAL, Mask
from .bits import LANES, TILE, low_bits, spans, tiles_of, transpose
from .block_mask import BlockMask, Built, Runs
from .placement import PlainFrame, bottom_right

CHUNK = 256
"""Tiles evaluated at once: 8 MB for an int64 per pair."""


class Cache:
    """The compiled masks used last, up to a number of bytes; may be used from several threads."""

    def __init__(self, limit: int):
        self.limit = limit
        self.held = 0
        self._kept: OrderedDict[tuple[Mask, int, int], tuple[BlockMask, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[Mask, int, int]) -> BlockMask | None:
        """Return what was put under `key`, or None."""
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                return None
            self._kept.move_to_end(key)
            return found[0]

    def put(self, key: tuple[Mask, int, int], blocks: BlockMask) -> BlockMask:
        """Keep `blocks` unless another thread was first; return the one that is kept."""
        size = blocks.nbytes + key[0].nbytes
        with self._lock:
            if key in self._kept:
                return self._kept[key][0]
            if size <= self.limit:
                self._kept[key] = (blocks, size)
                self.held += size
            while self.held > self.limit:
                self.held -= self._kept.popitem(last=False)[1][1]
            return blocks

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._kept.clear()
            self.held = 0


cache = Cache(256 * 2**20)


def compile_mask(mask: Mask, n: int, m: int) -> BlockMask:
    """Compile `mask` for n queries and m keys, or find it in the cache."""
    n, m = require_integer("n", n, minimum=0), require_integer("m", m, minimum=0)
    found = cache.get((mask, n, m))
    return cache.put((mask, n, m), _compile(mask, bottom_right(n, m))) if found is None else found


def _compile(mask: Mask, frame: PlainFrame) -> BlockMask:
    numbers: dict[Mask, int] = {}
    layout = np.empty(mask.lead, np.int32)
    for index in np.ndindex(mask.lead):
        layout[index] = numbers.setdefault(mask.at(index).resolve(frame), len(numbers))

    names: dict[bytes, int] = {}
    entries, boxes, evaluated = [], 0, 0
    for resolved, number in numbers.items():
        found = _Quadtree(resolved, frame.n, frame.m, names)
        entries.append((np.full(len(found.name), number), *found.entries))
        boxes += found.boxes
        evaluated += found.evaluated
    where, row, column, size, name = (
        np.concatenate(part) if part else np.empty(0, np.int64)
        for part in (zip(*entries, strict=True) if entries else [()] * 5))

    bits = np.frombuffer(b"".join(names), "<u8").reshape(-1, TILE)
    return _assembled(mask, frame, layout, len(numbers), (where, row, column, size, name), bits,
                      Built(boxes, evaluated))


def assemble(mask: Mask, frame: PlainFrame, item: np.ndarray, row: np.ndarray, column: np.ndarray,
             bits: np.ndarray) -> BlockMask:
    """Compile a mask whose tiles, with those of each item apart, are known: their bits (T, 64)."""
    high = np.minimum(frame.n - row * TILE, TILE)
    wide = np.minimum(frame.m - column * TILE, TILE)
    full = (bits == np.where(LANES < high[:, None], low_bits(wide)[:, None], 0)).all(1)
    partial = bits.any(1) & ~full
    held = full | partial
    name = np.where(full, -1, np.cumsum(partial) - 1)[held]
    items = mask.lead[0]
    layout = np.arange(items, dtype=np.int32).reshape(mask.lead)
    boxes = item[held], row[held], column[held], np.ones(len(name), np.int64), name
    return _assembled(mask, frame, layout, items, boxes, bits[partial], Built(0, 0))


def _assembled(mask: Mask, frame: PlainFrame, layout: np.ndarray, layouts: int,
               boxes: tuple[np.ndarray, ...], bits: np.ndarray, built: Built) -> BlockMask:
    where, row, column, size, name = boxes
    rows, columns = tiles_of(frame.n), tiles_of(frame.m)
    blocks = BlockMask(
        mask, frame.n, frame.m, np.atleast_1d(layout),
        _runs(where, row, column, size, name, layouts, rows, columns),
        _runs(where, column, row, size, name, layouts, columns, rows),
        bits, transpose(bits), built)
    for array in (blocks.layout, *blocks.rows, *blocks.columns, blocks.bits, blocks.bits_t):
        array.flags.writeable = False
    return blocks


class _Quadtree:
    """Boxes of one resolved mask: tiles (row, column) to (row + size, column + size).

    A box's name is that of its bit tile, or -1 where all is allowed; bit tiles enter `names`.
    """

    def __init__(self, mask: Mask, n: int, m: int, names: dict[bytes, int]):
        self.mask, self.n, self.m, self.names = mask, n, m, names
        self.boxes = self.evaluated = 0
        whole = self._split()
        row, column = self._undecided
        name = self._evaluate(row, column)
        allowed = name >= -1
        full = np.concatenate(whole, axis=1)
        self.row = np.concatenate([full[0], row[allowed]])
        self.column = np.concatenate([full[1], column[allowed]])
        self.size = np.concatenate([full[2], np.ones(np.count_nonzero(allowed), np.int64)])
        self.name = np.concatenate([np.full(full.shape[1], -1), name[allowed]])
        self.entries = self.row, self.column, self.size, self.name

    def _split(self) -> list[np.ndarray]:
        rows, columns = tiles_of(self.n), tiles_of(self.m)
        size = 1 << (max(rows, columns, 1) - 1).bit_length()
        row = column = np.zeros(1 if rows and columns else 0, np.int64)
        whole = []
        while True:
            kind = self.mask.classify(
                row * TILE, np.minimum((row + size) * TILE, self.n) - 1,
                column * TILE, np.minimum((column + size) * TILE, self.m) - 1)
            self.boxes += len(row)
            full, partial = kind == FULL, kind == PARTIAL
            whole.append(np.stack([row[full], column[full],
                                   np.full(np.count_nonzero(full), size)]))
            row, column = row[partial], column[partial]
            if size == 1:
                break
            size //= 2
            row = (row[:, None] + np.array([0, 0, size, size])).ravel()
            column = (column[:, None] + np.array([0, size, 0, size])).ravel()
            inside = (row < rows) & (column < columns)
            row, column = row[inside], column[inside]
        self._undecided = row, column
        return whole

    def _evaluate(self, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """Name single tiles: their bits, -1 if all is allowed after all, -2 if nothing is."""
        i0, j0 = row * TILE, column * TILE
        high, wide = np.minimum(self.n - i0, TILE), np.minimum(self.m - j0, TILE)
        once, which = _distinct(*self.mask.signature(i0, j0), high, wide)
        name = np.empty(len(once), np.int64)
        for at in range(0, len(once), CHUNK):
            tile = once[at:at + CHUNK]
            # indices stay in range: a user's function may look them up in a table
            i = np.minimum(i0[tile, None] + LANES, self.n - 1)
            j = np.minimum(j0[tile, None] + LANES, self.m - 1)
            valid = np.where(LANES < high[tile, None], low_bits(wide[tile])[:, None], 0)
            words = self.mask.words(i, j) & valid
            name[at:at + CHUNK] = np.where((words == valid).all(1), -1, -2)
            partial = np.flatnonzero(words.any(1) & (words != valid).any(1))
            name[at + partial] = [self.names.setdefault(words[tile].tobytes(), len(self.names))
                                  for tile in partial]
        self.evaluated += len(once)
        return name[which]


def _distinct(*columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each distinct row of `columns` is first met, and which of them each row is."""
    order = np.lexsort(columns)
    new = np.ones(len(order), bool)
    new[1:] = np.logical_or.reduce([x[order[1:]] != x[order[:-1]] for x in columns])
    which = np.empty(len(order), np.int64)
    which[order] = np.cumsum(new) - 1
    return order[new], which


def _runs(layout: np.ndarray, line: np.ndarray, other: np.ndarray, size: np.ndarray,
          name: np.ndarray, layouts: int, lines: int, others: int) -> Runs:
    """Assemble boxes that begin at (line, other) into runs along each line."""
    # one entry per line that a box covers
    height = np.minimum(size, lines - line)
    first, count, name = (np.repeat(x, height)
                          for x in (other, np.minimum(size, others - other), name))
    line = np.repeat(layout * lines, height) + spans(line, height)
    order = np.argsort(line * others + first)
    line, first, count, name = line[order], first[order], count[order], name[order]

    # neighbours of one kind are one run
    full = name < 0
    begins = np.ones(len(line), bool)
    begins[1:] = ((line[1:] != line[:-1]) | (first[1:] != first[:-1] + count[:-1])
                  | (full[1:] != full[:-1]))
    head = np.flatnonzero(begins)
    total = np.add.reduceat(count, head) if len(head) else head
    before: np.ndarray = np.cumsum(~full) - ~full
    ends = np.searchsorted(line[head], np.arange(layouts * lines + 1))
    start = ends[np.arange(layouts)[:, None] * lines + np.arange(lines + 1)]
    return Runs(start.astype(np.int64), first[head].astype(np.int32), total.astype(np.int32),
                np.where(full[head], -1, before[head]).astype(np.int32),
                name[~full].astype(np.int32))
