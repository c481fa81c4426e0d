"""A mask by the distance between query and key alone, any set of distances."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from ..checks import DtypeError, ShapeError
from .algebra import Index, Mask, host_array, share
from .bits import TILE
from .placement import Positional


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class distances(Positional):
    """A query sees the keys at certain distances, on either side: ``table[|i - j|]``.

    Parameters
    ----------
    table : bool array, shape (L,) or (..., H, L)
        Copied; entry d is for distance d. Pairs L and more apart are not allowed.

    Examples
    --------
    >>> from pyattn import masks
    >>> print(masks.distances([True, False, True]).draw(5))
    █·█··
    ·█·█·
    █·█·█
    ·█·█·
    ··█·█
    """

    table: Any

    def __post_init__(self) -> None:
        table = np.array(host_array(self.table))
        if table.dtype != bool:
            raise DtypeError(f"the table of distances must be boolean; got {table.dtype}")
        if table.ndim < 1:
            raise ShapeError("the table of distances must be (..., H, L); got one value")
        table.flags.writeable = False
        self._set(table=table)

    @property
    def lead(self) -> tuple[int, ...]:
        return self.table.shape[:-1]

    def at(self, index: tuple[int, ...]) -> Mask:
        return distances(self.table[index]) if index else self

    @property
    def _reach(self) -> int:
        """From here on nothing is allowed."""
        return self.table.shape[-1]

    @functools.cached_property
    def _both(self) -> np.ndarray:
        """By distance + reach, of either sign; False at both ends."""
        return np.concatenate([[False], self.table[:0:-1], self.table, [False]])

    @functools.cached_property
    def _before(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self._both)])

    def _place(self, distance: Index) -> np.ndarray:
        return np.clip(distance, -self._reach, self._reach) + self._reach

    def allowed(self, i: Index, j: Index) -> np.ndarray:
        return self._both[self._place(i - j)]

    def classify(self, i0: Index, i1: Index, j0: Index, j1: Index) -> np.ndarray:
        least, most = i0 - j1, i1 - j0
        count = self._before[self._place(most) + 1] - self._before[self._place(least)]
        return share(count, most - least + 1)

    def signature(self, i0: Index, j0: Index) -> tuple[np.ndarray, ...]:
        # tiles that lie wholly beyond the table are alike
        return (np.clip(i0 - j0, -self._reach - TILE, self._reach + TILE),)
