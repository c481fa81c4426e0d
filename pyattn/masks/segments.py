"""Sequences packed one after another along one axis, and masks inside each of them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from ..checks import ShapeError, require_choice
from .algebra import PARTIAL, And, Index, Mask, within
from .bits import TILE
from .placement import Frame
from .positions import whole_numbers

ALIGNMENTS = ("bottom_right", "top_left")


class _Line:
    """Segments along one axis."""

    def __init__(self, sizes: np.ndarray):
        self.ends = np.cumsum(sizes)
        self.starts = self.ends - sizes

    def number(self, index: Index) -> np.ndarray:
        """Which segment each token is of."""
        return np.searchsorted(self.ends, index, side="right")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class segments(Mask):
    """Packed sequences: a query sees the keys of its own segment.

    Parameters
    ----------
    q_lengths : sequence of int, >= 0
        Queries of each segment, in storage order; they add up to N.
    kv_lengths : sequence of int, optional
        Keys of each segment, adding up to M; as many as queries by default.

    Examples
    --------
    >>> from pyattn import masks
    >>> print(masks.segments([1, 2], [2, 3]).draw(3, 5))
    ██···
    ··███
    ··███
    """

    q_lengths: Any
    kv_lengths: Any = None

    def __post_init__(self) -> None:
        self._set(q_lengths=whole_numbers("segments' lengths", self.q_lengths, ndim=1))
        if self.kv_lengths is not None:
            self._set(kv_lengths=whole_numbers("segments' kv_lengths", self.kv_lengths, ndim=1))
            if self.kv_lengths.shape != self.q_lengths.shape:
                raise ShapeError(f"segments must be as many for queries and keys; got "
                                 f"{self.q_lengths.size} and {self.kv_lengths.size}")

    @property
    def _sizes(self) -> tuple[np.ndarray, np.ndarray]:
        return self.q_lengths, self.q_lengths if self.kv_lengths is None else self.kv_lengths

    @functools.cached_property
    def _lines(self) -> tuple[_Line, _Line]:
        queries, keys = self._sizes
        return _Line(queries), _Line(keys)

    def resolve(self, frame: Frame) -> Mask:
        for name, length, sizes in zip("NM", (frame.n, frame.m), self._sizes, strict=True):
            if sizes.sum() != length:
                raise ShapeError(f"segment lengths must add up to {name} = {length}; "
                                 f"got {sizes.sum()} in {sizes.size} segments")
        return self

    def allowed(self, i: Index, j: Index) -> np.ndarray:
        queries, keys = self._lines
        return queries.number(i) == keys.number(j)

    def classify(self, i0: Index, i1: Index, j0: Index, j1: Index) -> np.ndarray:
        queries, keys = self._lines
        return within(queries.number(i0) - keys.number(j1), queries.number(i1) - keys.number(j0),
                      0, 0)

    def inside(self, i0: Index, i1: Index, j0: Index, j1: Index) -> np.ndarray:
        """Tell which boxes touch one segment of queries and one of keys."""
        queries, keys = self._lines
        return ((queries.number(i0) == queries.number(i1))
                & (keys.number(j0) == keys.number(j1)))

    def signature(self, i0: Index, j0: Index) -> tuple[np.ndarray, ...]:
        # one that lies inside segments is full or empty
        queries, keys = self._lines
        inside = self.inside(i0, i0 + TILE - 1, j0, j0 + TILE - 1)
        same = queries.number(i0) == keys.number(j0)
        return np.where(inside, -1 - same, i0), np.where(inside, -1, j0)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class packed(Mask):
    """`mask` inside each packed sequence: positions start anew, and no segment sees another.

    Parameters
    ----------
    mask : Mask
        Over positions; parts that speak of storage keep doing so.
    q_lengths, kv_lengths
        As for `segments`.
    alignment : {"bottom_right", "top_left"}
        Whether a segment's last query stands at its last key, or its first at its first.

    Examples
    --------
    >>> from pyattn import masks
    >>> print(masks.packed(masks.causal(), [2, 2], [3, 2]).draw(4, 5))
    ██···
    ███··
    ···█·
    ···██
    """

    mask: Mask
    q_lengths: Any
    kv_lengths: Any = None
    alignment: str = "bottom_right"

    def __post_init__(self) -> None:
        own = segments(self.q_lengths, self.kv_lengths)
        require_choice("alignment", self.alignment, ALIGNMENTS)
        self._set(q_lengths=own.q_lengths, kv_lengths=own.kv_lengths)

    @property
    def lead(self) -> tuple[int, ...]:
        return self.mask.lead

    def at(self, index: tuple[int, ...]) -> Mask:
        return packed(self.mask.at(index), self.q_lengths, self.kv_lengths, self.alignment)

    def resolve(self, frame: Frame) -> Mask:
        own = segments(self.q_lengths, self.kv_lengths)
        own.resolve(frame)
        return And((own, self.mask.resolve(PackedFrame(own, self.alignment))))


@dataclasses.dataclass(frozen=True)
class PackedFrame:
    """Positions start anew in each segment: query r of segment s stands at ``r + shift[s]``."""

    segments: segments
    alignment: str

    @property
    def n(self) -> int:
        """Queries of all segments."""
        return int(self.segments._sizes[0].sum())

    @property
    def m(self) -> int:
        """Keys of all segments."""
        return int(self.segments._sizes[1].sum())

    @functools.cached_property
    def shift(self) -> np.ndarray:
        """The position of each segment's first query."""
        queries, keys = self.segments._sizes
        return keys - queries if self.alignment == "bottom_right" else 0 * queries

    @property
    def end(self) -> int:
        """All positions are below this one."""
        queries, keys = self.segments._sizes
        return int(np.maximum(keys, np.where(queries > 0, queries + self.shift, 0)).max(initial=0))

    def place(self, mask: Mask) -> Mask:
        """Return `mask`, which speaks of positions, over storage indices."""
        return restarted(mask, self)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class restarted(Mask):
    """A mask over positions that start anew in each segment; what it says across is unspecified."""

    mask: Mask
    frame: PackedFrame

    def _positions(self, i: Index, j: Index) -> tuple[np.ndarray, np.ndarray]:
        queries, keys = self.frame.segments._lines
        of_query, of_key = queries.number(i), keys.number(j)
        return i - queries.starts[of_query] + self.frame.shift[of_query], j - keys.starts[of_key]

    def allowed(self, i: Index, j: Index) -> np.ndarray:
        return self.mask.allowed(*self._positions(i, j))

    def words(self, i: Index, j: Index) -> np.ndarray:
        return self.mask.words(*self._positions(i, j))

    def classify(self, i0: Index, i1: Index, j0: Index, j1: Index) -> np.ndarray:
        inside = self.frame.segments.inside(i0, i1, j0, j1)
        (first_i, first_j), (last_i, last_j) = self._positions(i0, j0), self._positions(i1, j1)
        return np.where(inside, self.mask.classify(first_i, last_i, first_j, last_j), PARTIAL)

    def signature(self, i0: Index, j0: Index) -> tuple[np.ndarray, ...]:
        inside = self.frame.segments.inside(i0, i0 + TILE - 1, j0, j0 + TILE - 1)
        own = self.mask.signature(*self._positions(i0, j0))
        return (np.where(inside, -1, i0), np.where(inside, -1, j0),
                *(np.where(inside, x, 0) for x in own))
