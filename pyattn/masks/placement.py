"""Where queries and keys stand: from masks over positions to masks over storage indices."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np

from ..checks import DtypeError, ShapeError, require_integer
from .algebra import Index, Mask


class Frame(Protocol):
    """Where n queries and m keys stand."""

    @property
    def n(self) -> int:
        """The number of queries."""

    @property
    def m(self) -> int:
        """The number of keys."""

    @property
    def end(self) -> int:
        """All positions are below this one."""

    def place(self, mask: Mask) -> Mask:
        """Return `mask`, which speaks of positions, over storage indices."""


@dataclasses.dataclass(frozen=True)
class PlainFrame:
    """Query i stands at position ``i + offset``, key j at j."""

    n: int
    m: int
    offset: int

    @property
    def end(self) -> int:
        """All positions are below this one."""
        return max(self.m, self.n + self.offset if self.n else 0)

    def place(self, mask: Mask) -> Mask:
        """Return `mask`, which speaks of positions, over storage indices."""
        return shifted(mask, self.offset) if self.offset else mask


def bottom_right(n: int, m: int) -> PlainFrame:
    """Return the frame where the last query stands at the last key."""
    n, m = require_integer("n", n, minimum=0), require_integer("m", m, minimum=0)
    return PlainFrame(n, m, m - n)


class Positional(Mask):
    """A mask over positions; over storage indices it is what the frame makes of it."""

    def resolve(self, frame: Frame) -> Mask:
        return frame.place(self)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class shifted(Mask):
    """A mask over positions where query i stands at ``i + offset``."""

    mask: Mask
    offset: int

    def allowed(self, i: Index, j: Index) -> np.ndarray:
        return self.mask.allowed(i + self.offset, j)

    def classify(self, i0: Index, i1: Index, j0: Index, j1: Index) -> np.ndarray:
        return self.mask.classify(i0 + self.offset, i1 + self.offset, j0, j1)

    def words(self, i: Index, j: Index) -> np.ndarray:
        return self.mask.words(i + self.offset, j)

    def signature(self, i0: Index, j0: Index) -> tuple[np.ndarray, ...]:
        return self.mask.signature(i0 + self.offset, j0)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class placed(Mask):
    """`mask` with query 0 of each batch item at its own position, whatever the lengths.

    Parameters
    ----------
    mask : Mask
    offset : int or array of int, shape (B...,)
    """

    mask: Mask
    offset: Any

    def __post_init__(self) -> None:
        offset = np.array(self.offset)
        if offset.dtype.kind not in "iu":
            raise DtypeError(f"offset must hold integers; got {offset.dtype}")
        offset = offset.astype(np.int64)
        offset.flags.writeable = False
        self._set(offset=offset)
        _ = self.lead

    @property
    def lead(self) -> tuple[int, ...]:
        if not self.offset.ndim:
            return self.mask.lead
        try:
            return np.broadcast_shapes(self.mask.lead, (*self.offset.shape, 1))
        except ValueError:
            raise ShapeError(f"offset {self.offset.shape} must broadcast to the batch axes of the "
                             f"mask's leading axes {self.mask.lead}") from None

    def at(self, index: tuple[int, ...]) -> Mask:
        batch = index[:-1] if self.offset.ndim else ()
        own = batch[len(batch) - self.offset.ndim:]
        offset = self.offset[tuple(x if size > 1 else 0
                                   for x, size in zip(own, self.offset.shape, strict=True))]
        return placed(self.mask.pick(index), offset)

    def resolve(self, frame: Frame) -> Mask:
        return self.mask.resolve(PlainFrame(frame.n, frame.m, int(self.offset)))
