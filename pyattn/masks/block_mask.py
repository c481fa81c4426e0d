"""The compiled form of a mask: for each row of tiles, runs of key tiles; and the transpose."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import numpy as np

from ..checks import ShapeError
from .algebra import Mask
from .bits import LANES, TILE, low_bits, spans, tiles_of, unpack
from .placement import Frame


class Runs(NamedTuple):
    """Lists of runs of tiles, one list per line (a row, or column, of tiles) and layout.

    Example, rows of ``causal()`` with N = M = 256: line 2 is ``[(0, 2, full), (2, 1, bits #0)]``.
    """

    start: np.ndarray
    """int64 (L, T + 1): the runs of line t in layout l are start[l, t] : start[l, t + 1]."""
    first: np.ndarray
    """int32 (R,): the first tile of a run."""
    count: np.ndarray  # type: ignore[assignment]  # hides tuple.count, unused here
    """int32 (R,): how many tiles it has."""
    tile: np.ndarray
    """int32 (R,): -1 for a full run, else where in `names` its tiles begin."""
    names: np.ndarray
    """int32 (S,): numbers of bit tiles."""


class Tiles(NamedTuple):
    """How many tiles of each kind there are, over all leading axes."""

    full: int
    partial: int
    empty: int


class Count(NamedTuple):
    """Work: tiles that a kernel visits, and allowed pairs."""

    tiles: int
    pairs: int


class Built(NamedTuple):
    """What compiling took: boxes classified, and tiles whose bits were evaluated."""

    boxes: int
    evaluated: int


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BlockMask(Mask):
    """A mask compiled for n queries and m keys, on tiles of 64 x 64. Made by `Mask.compile`.

    A full tile at the ragged edge is full; who reads it clips to n and m. Bits beyond are 0. As a
    Mask it stands for its source, so that ``&``, ``|``, ``~`` compile anew.

    Examples
    --------
    >>> from pyattn import masks
    >>> blocks = masks.causal().compile(256, 256)
    >>> blocks.rows.first[2:4], blocks.rows.count[2:4]      # of the second row of tiles
    (array([1, 0], dtype=int32), array([1, 2], dtype=int32))
    >>> len(blocks.bits)                                    # all rows share the lower triangle
    1
    """

    source: Mask
    n: int
    m: int
    layout: np.ndarray
    """int32, leading axes (batch..., heads), at least one, to be broadcast."""
    rows: Runs
    """For each query tile, runs of key tiles."""
    columns: Runs
    """For each key tile, runs of query tiles."""
    bits: np.ndarray
    """uint64 (P, 64): bit j of word i is set where query i of the tile may see its key j."""
    bits_t: np.ndarray
    """uint64 (P, 64): the same tiles; bit i of word j."""
    built: Built

    @property
    def lead(self) -> tuple[int, ...]:
        return self.source.lead

    def at(self, index: tuple[int, ...]) -> Mask:
        return self.source.at(index).compile(self.n, self.m)

    def resolve(self, frame: Frame) -> Mask:
        self._check(frame.n, frame.m)
        return self.source.resolve(frame)

    def compile(self, n: int, m: int, *, offset: Any = None) -> BlockMask:
        self._check(n, m)
        if offset is None or (np.ndim(offset) == 0 and offset == m - n):
            return self
        return self.source.compile(n, m, offset=offset)

    def draw(self, n: int | None = None, m: int | None = None, *,
             index: tuple[int, ...] | None = None) -> str:
        return super().draw(self.n if n is None else n, self.m if m is None else m, index=index)

    def plot(self, n: int | None = None, m: int | None = None, *, ax: Any = None,
             index: tuple[int, ...] | None = None) -> Any:
        return super().plot(self.n if n is None else n, self.m if m is None else m, ax=ax,
                            index=index)

    def _check(self, n: int, m: int) -> None:
        if (n, m) != (self.n, self.m):
            raise ShapeError(f"this BlockMask was compiled for n = {self.n}, m = {self.m}; "
                             f"got n = {n}, m = {m}")

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(x.nbytes for x in (self.layout, *self.rows, *self.columns, self.bits,
                                      self.bits_t))

    def dense(self, n: int | None = None, m: int | None = None, *, offset: Any = None,
              columns: bool = False) -> np.ndarray:
        """Decode runs and bits: booleans, shape ``lead + (n, m)``; from `columns` if asked."""
        self._check(self.n if n is None else n, self.m if m is None else m)
        if offset is not None:
            return self.source.dense(self.n, self.m, offset=offset)
        runs, bits = (self.columns, self.bits_t) if columns else (self.rows, self.bits)
        length, across = (self.m, self.n) if columns else (self.n, self.m)
        layouts, lines, others = len(runs.start), tiles_of(length), tiles_of(across)
        grid = np.zeros((layouts * lines, others, TILE, TILE), bool)
        line = np.repeat(np.arange(layouts * lines), np.diff(runs.start).ravel())
        for full in (True, False):
            mine = (runs.tile < 0) == full
            count = runs.count[mine]
            at = np.repeat(line[mine], count), spans(runs.first[mine], count)
            grid[at] = True if full else unpack(bits[runs.names[spans(runs.tile[mine], count)]])
        pairs = grid.transpose(0, 2, 1, 3).reshape(layouts, lines * TILE, others * TILE)
        pairs = pairs[:, :length, :across]
        if columns:
            pairs = pairs.transpose(0, 2, 1)
        return pairs[self.layout].reshape(*self.lead, self.n, self.m)

    @functools.cached_property
    def tiles(self) -> Tiles:
        """How many tiles are full, partial and empty, over all leading axes."""
        layouts, times = np.unique(self.layout, return_counts=True)
        work = [self._work(layout, self.n, self.m) for layout in layouts.tolist()]
        full, partial, _ = (times @ np.array(work, np.int64).reshape(-1, 3)).tolist()
        everything = tiles_of(self.n) * tiles_of(self.m) * self.layout.size
        return Tiles(full, partial, everything - full - partial)

    def count(self, layout: np.ndarray | None = None, q_lengths: np.ndarray | None = None,
              kv_lengths: np.ndarray | None = None) -> Count:
        """Count the tiles that a kernel visits and the pairs that are allowed.

        Parameters
        ----------
        layout : int array (B, H), optional
            Layout of each batch item and head; `self.layout` by default.
        q_lengths, kv_lengths : int array (B,), optional
            Queries and keys from there on are padding; n and m by default.
        """
        layout = self.layout if layout is None else np.asarray(layout)
        layout = layout.reshape(math.prod(layout.shape[:-1]), layout.shape[-1])
        lengths = [np.broadcast_to(full if given is None else given, len(layout))
                   for given, full in ((q_lengths, self.n), (kv_lengths, self.m))]
        items = np.stack([np.broadcast_to(x, layout.shape).ravel()
                          for x in (layout, *(x[:, None] for x in lengths))], axis=1)
        distinct, times = np.unique(items, axis=0, return_counts=True)
        work = np.array([self._work(*item) for item in distinct.tolist()], np.int64).reshape(-1, 3)
        full, partial, pairs = (times @ work).tolist()
        return Count(full + partial, pairs)

    @functools.cached_property
    def _known_work(self) -> dict[tuple[int, int, int], tuple[int, int, int]]:
        return {}

    @functools.cached_property
    def _population(self) -> np.ndarray:
        return np.bitwise_count(self.bits).sum(1, dtype=np.int64)

    def _work(self, layout: int, q_length: int, kv_length: int) -> tuple[int, int, int]:
        """Full tiles, partial tiles and pairs of one layout clipped to the lengths."""
        key = (layout, q_length, kv_length)
        known = self._known_work.get(key)
        if known is None:
            if len(self._known_work) > 4096:
                self._known_work.clear()
            known = self._known_work[key] = self._measure(*key)
        return known

    def _measure(self, layout: int, q_length: int, kv_length: int) -> tuple[int, int, int]:
        start = self.rows.start[layout]
        mine = slice(start[0], start[-1])
        row = np.repeat(np.arange(len(start) - 1), np.diff(start))
        first, tile = self.rows.first[mine].astype(np.int64), self.rows.tile[mine]
        high = np.clip(q_length - row * TILE, 0, TILE)
        count = np.clip(tiles_of(kv_length) - first, 0, self.rows.count[mine]) * (high > 0)
        wide = np.clip(kv_length - first * TILE, 0, count * TILE)
        full = tile < 0
        pairs = int((high * wide)[full].sum())

        partial = ~full
        count_p = count[partial]
        name = self.rows.names[spans(tile[partial], count_p)]
        high = np.repeat(high[partial], count_p)
        wide = np.clip(kv_length - spans(first[partial], count_p) * TILE, 0, TILE)
        cut = (high < TILE) | (wide < TILE)
        pairs += int(self._population[name[~cut]].sum())
        words = np.where(LANES < high[cut, None], self.bits[name[cut]], 0)
        pairs += int(np.bitwise_count(words & low_bits(wide[cut])[:, None]).sum(dtype=np.int64))
        return int(count[full].sum()), int(count_p.sum()), pairs

    @property
    def _key(self) -> tuple[Any, ...]:  # type: ignore[override]  # Mask caches its own
        return BlockMask, self.source, self.n, self.m

    def __repr__(self) -> str:
        return f"{self.source!r}"
