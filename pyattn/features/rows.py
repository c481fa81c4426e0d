"""Some tokens of each sequence taken out into an array of their own, and put back.

Letters: H heads, N tokens, D width, T tokens taken.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from .. import arrays, masks
from ..arrays import Array
from ..masks.placement import Frame, bottom_right


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which tokens of each sequence are taken; lives on the host.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features.rows import Rows
    >>> rows = Rows.of(np.array([False, True, False, True]))
    >>> x = np.arange(4.0).reshape(1, 4, 1)
    >>> taken = rows.take(x)
    >>> taken.ravel(), rows.put(x, 10 * taken).ravel()
    (array([1., 3.]), array([ 0., 10.,  2., 30.]))
    """

    index: np.ndarray
    """int (..., T), ascending; sequences with fewer than T are filled up with their last token."""
    counts: np.ndarray
    """int (...): how many of the T were asked for."""
    places: np.ndarray
    """int (..., N): where each token is found behind one another in all N and the T taken."""

    @classmethod
    def of(cls, held: np.ndarray) -> Rows:
        """Take the tokens where `held`, bool (..., N), is True."""
        counts, n = np.count_nonzero(held, axis=-1), held.shape[-1]
        rank = np.arange(counts.max(initial=0))
        # a stable sort of what is left out behind what is taken
        order = np.argsort(~held, axis=-1, kind="stable")[..., :rank.size]
        return cls(np.where(rank < counts[..., None], order, n - 1), counts,
                   np.where(held, n - 1 + np.cumsum(held, axis=-1), np.arange(n)))

    def take(self, x: Array) -> Array:
        """Return the rows of `x` (..., H, N, D) as (..., H, T, D)."""
        return _gathered(x, self.index)

    def put(self, x: Array, rows: Array) -> Array:
        """Return `x` (..., H, N, D) with `rows` (..., H, T, D) in place of those taken."""
        xp = arrays.namespace(x, rows)
        return _gathered(xp.concat([x, rows], axis=-2), self.places)

    def masked(self, mask: masks.Mask) -> masks.Mask:
        """Return the rows of a mask over N x M; T rows."""
        return Taken(mask, self.index, self.places.shape[-1])


def _gathered(x: Array, index: np.ndarray) -> Array:
    """Return rows `index` (..., L) of `x` (..., H, N, D), the same for every head."""
    xp, where = arrays.namespace(x), arrays.device(x)
    if index.ndim == 1:
        return xp.take(x, arrays.from_host(xp, index, where), axis=-2)
    *lead, n, width = x.shape
    first = n * np.arange(math.prod(lead)).reshape(*lead, 1)
    flat = (first + index[..., None, :]).reshape(-1)
    rows = xp.take(xp.reshape(x, (math.prod(lead) * n, width)),
                   arrays.from_host(xp, flat, where), axis=0)
    return xp.reshape(rows, (*lead, index.shape[-1], width))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Taken(masks.Mask):
    """Row r of this mask is row ``index[..., r]`` of a mask for n queries."""

    mask: masks.Mask
    index: np.ndarray
    n: int

    @property
    def lead(self) -> tuple[int, ...]:
        """Those of the mask and of the index together."""
        own = self.index.shape[:-1]
        return np.broadcast_shapes(self.mask.lead, (*own, 1)) if own else self.mask.lead

    def at(self, index: tuple[int, ...]) -> masks.Mask:
        """Return the mask at one index into `lead`."""
        batch = index[len(index) - self.index.ndim:-1]
        own = tuple(x if size > 1 else 0
                    for x, size in zip(batch, self.index.shape[:-1], strict=True))
        return Taken(self.mask.pick(index), self.index[own], self.n)

    def resolve(self, frame: Frame) -> masks.Mask:
        """Return the rows of the whole mask, resolved where it stands."""
        whole = bottom_right(self.n, frame.m)
        return Taken(self.mask.resolve(whole), self.index, self.n)

    def allowed(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Ask for the rows of the whole mask."""
        return self.mask.allowed(self.index[i], j)

    def classify(self, i0: np.ndarray, i1: np.ndarray, j0: np.ndarray,
                 j1: np.ndarray) -> np.ndarray:
        """Ask for the box of the first and the last row: the index ascends."""
        return self.mask.classify(self.index[i0], self.index[i1], j0, j1)
