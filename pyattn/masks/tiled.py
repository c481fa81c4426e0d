"""Masks that are found tile by tile from what tokens hold, and attention in rounds of them.

Where a token stands among those like it decides whom it sees: tokens are listed by bucket or
cluster, in an order of each item's own, and what a query sees is then a stretch of that list.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from .algebra import Index, Mask
from .bits import LANES, TILE, low_bits, pack, spans, tiles_of
from .block_mask import BlockMask
from .compile import assemble
from .placement import Frame, bottom_right

ONE = np.uint64(1)
AT_ONCE = 1024
"""Tiles whose pairs are looked at together: 32 MB for an int64 per pair."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Tiled(Mask):
    """A mask for each item, by the bits of those tiles that are not empty."""

    items: int
    n: int
    m: int
    item: np.ndarray
    """int64 (T,); item, row and column of a tile ascend in this order."""
    row: np.ndarray
    column: np.ndarray
    bits: np.ndarray
    """uint64 (T, 64): bit j of word i is set where query i of the tile may see its key j."""

    @property
    def lead(self) -> tuple[int, ...]:
        return self.items, 1

    def at(self, index: tuple[int, ...]) -> Mask:
        own = slice(*np.searchsorted(self.item, [index[0], index[0] + 1]))
        return _Item(self.n, self.m, self.row[own], self.column[own], self.bits[own])

    def resolve(self, frame: Frame) -> Mask:
        return self.at((0, 0))

    def compile(self, n: int, m: int, *, offset: Any = None) -> BlockMask:
        """Assemble the tiles; there is nothing to be found out."""
        return assemble(self, bottom_right(n, m), self.item, self.row, self.column, self.bits)

    @property
    def seen(self) -> np.ndarray:
        """How many keys each query sees, int64 (items, N)."""
        rows = tiles_of(self.n)
        count = np.zeros((self.items * rows, TILE), np.int64)
        np.add.at(count, self.item * rows + self.row, np.bitwise_count(self.bits))
        return count.reshape(self.items, rows * TILE)[:, :self.n]

    def where(self, test: Callable[[Index, Index, Index], np.ndarray]) -> Tiled:
        """Keep the pairs for which ``test(item, i, j)``, for arrays that broadcast, is True."""
        bits = np.empty_like(self.bits)
        for at in range(0, len(bits), AT_ONCE):
            part = slice(at, at + AT_ONCE)
            i, j = (np.minimum(x[part, None] * TILE + LANES, length - 1)
                    for x, length in ((self.row, self.n), (self.column, self.m)))
            found = test(self.item[part, None, None], i[:, :, None], j[:, None, :])
            bits[part] = self.bits[part] & pack(found)
        return dataclasses.replace(self, bits=bits)

    def with_diagonal(self, kept: np.ndarray) -> Tiled:
        """Let query i see key i where `kept`, bool (items, N), and nowhere else."""
        own = np.flatnonzero(self.row == self.column)
        rows = tiles_of(self.n)
        padded = np.zeros((self.items, rows * TILE), bool)
        padded[:, :self.n] = kept
        chosen = padded.reshape(self.items * rows, TILE)[self.item[own] * rows + self.row[own]]
        bit = ONE << LANES.astype(np.uint64)
        bits = self.bits.copy()
        bits[own] = np.where(chosen, bits[own] | bit, bits[own] & ~bit)
        return dataclasses.replace(self, bits=bits)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Item(Mask):
    """What `Tiled` is for one item."""

    n: int
    m: int
    row: np.ndarray
    column: np.ndarray
    bits: np.ndarray

    def resolve(self, frame: Frame) -> Mask:
        return self

    def allowed(self, i: Index, j: Index) -> np.ndarray:
        i, j = np.broadcast_arrays(i, j)
        if not len(self.bits):
            return np.zeros(i.shape, bool)
        columns = tiles_of(self.m)
        key = i // TILE * columns + j // TILE
        held = self.row * columns + self.column
        place = np.minimum(np.searchsorted(held, key), len(held) - 1)
        word = self.bits[place, i % TILE]
        return (held[place] == key) & (word >> (j % TILE).astype(np.uint64) & ONE != 0)


def between(first: np.ndarray, stop: np.ndarray, m: int) -> Tiled:
    """Let each query see keys ``first`` to ``stop - 1``, for one or several stretches of them.

    Parameters
    ----------
    first, stop : int arrays, shape (items, N, stretches)
        Nothing is seen where `stop` is not larger.
    m : int
        Keys.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.masks.tiled import between
    >>> print(between(np.array([[[0], [0], [2]]]), np.array([[[1], [2], [4]]]), 4).draw(3, 4))
    █···
    ██··
    ··██
    """
    items, n, stretches = first.shape
    rows, columns = tiles_of(n), tiles_of(m)
    padded = np.zeros((2, items, rows * TILE, stretches), np.int64)
    padded[0, :, :n], padded[1, :, :n] = first, stop
    first, stop = padded.reshape(2, items * rows, TILE, stretches)
    some = first < stop
    low = np.where(some, first, m).min(1) // TILE
    high = tiles_of_each(np.where(some, stop, 0).max(1))
    count = np.maximum(high - low, 0).ravel()
    line, column = np.repeat(np.arange(count.size) // stretches, count), spans(low.ravel(), count)
    if stretches > 1:
        line, column = np.divmod(np.unique(line * columns + column), max(1, columns))
    bits = np.zeros((len(line), TILE), np.uint64)
    for stretch in range(stretches):
        start, end = (np.clip(x[line, :, stretch] - TILE * column[:, None], 0, TILE)
                      for x in (first, stop))
        bits |= low_bits(end) & ~low_bits(start)
    held = bits.any(1)
    line, column = line[held], column[held]
    return Tiled(items, n, m, line // max(1, rows), line % max(1, rows), column, bits[held])


def tiles_of_each(lengths: np.ndarray) -> np.ndarray:
    """Return the number of tiles that cover each of several lengths."""
    return -(-lengths // TILE)


@dataclasses.dataclass(frozen=True, eq=False)
class Listing:
    """An order of each item's own: slot s of item b holds token ``index[b, s]``.

    As an `Order` of one item, but for each item of the batch. Padding comes last.
    """

    index: np.ndarray
    """int32 (items, slots); -1 for none."""

    def __post_init__(self) -> None:
        self.index.flags.writeable = False

    @property
    def slots(self) -> int:
        """How many slots there are."""
        return self.index.shape[1]

    def lengths(self, limits: np.ndarray) -> np.ndarray:
        """Count each item's tokens below the limits (items,): they come first."""
        below = (self.index >= 0) & (self.index < limits[:, None])
        return np.count_nonzero(below, axis=1).astype(np.int32)[:, None]

    def listing(self, batch: int) -> np.ndarray:
        """Return the index as kernels take it, int32 (items, 1, slots)."""
        del batch
        return self.index[:, None]

    def picked(self, values: np.ndarray, batch: int) -> np.ndarray:
        """Return what tokens have, (1 or items, N), slot by slot; anything where there is none."""
        values = np.broadcast_to(values, (batch, values.shape[1]))
        return np.take_along_axis(values, np.maximum(self.index, 0).astype(np.int64), axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class Round:
    """A part of attention, as those of a plan are, with an order of each item's own."""

    queries: Listing
    keys: Listing
    mask: Tiled
    """Over slots."""
    heads: None = None
    items: int = 1

    @functools.cached_property
    def blocks(self) -> BlockMask:
        """The mask, compiled."""
        return self.mask.compile(self.queries.slots, self.keys.slots)

    def for_all(self, heads: int) -> Round:
        """Return this round: it is for all heads."""
        del heads
        return self

    def layouts(self, batch: int, heads: int) -> np.ndarray:
        """Return which layout each item reads, int32 (items, heads)."""
        return np.ascontiguousarray(np.broadcast_to(self.blocks.layout, (batch, heads)))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "blocks"}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class rounds(Mask):
    """Several rounds, merged by their log-sum-exps: a pair counts as often as it is met.

    There is one head; its items are those of the rounds.
    """

    each: tuple[Round, ...]
    items: int
    n: int
    m: int

    @property
    def lead(self) -> tuple[int, ...]:
        return self.items, 1

    def at(self, index: tuple[int, ...]) -> Mask:
        from .stored import dense

        met = np.zeros((self.n, self.m), bool)
        for part in self.each:
            query, key = part.queries.index[index[0]], part.keys.index[index[0]]
            slot, other = np.nonzero(part.mask.at(index).dense(len(query), len(key)))
            met[query[slot], key[other]] = True
        return dense(met)

    def resolve(self, frame: Frame) -> Mask:
        return self.at((0, 0)).resolve(frame)
