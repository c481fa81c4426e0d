"""Tokens in another order, and what a mask is for them.

Some patterns are dense only after a permutation: a stride of 128 left in place visits half of all
tiles for 1 % of the pairs, but among the tokens of one residue it is plainly causal. An order
deals tokens out to *items*, each of which is attended to by itself, like another batch item. The
cells of a grid are better listed by patches, whose neighbours are few other patches.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from .algebra import And, Index, Mask, Not, Or
from .placement import Frame, PlainFrame
from .positions import window_2d

NONE = -1
"""In slots that hold no token."""


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
    """Slot s of item x holds token ``index[x, s]``, or none where that is -1.

    In the parts of a plan -1 comes behind an item's last token.
    """

    index: np.ndarray
    """int64 (items, slots)."""

    def __post_init__(self) -> None:
        self.index.flags.writeable = False

    @property
    def items(self) -> int:
        """How many lists of tokens there are."""
        return self.index.shape[0]

    @property
    def slots(self) -> int:
        """How many tokens the longest has."""
        return self.index.shape[1]

    @functools.cached_property
    def ascends(self) -> bool:
        """Whether each item's tokens ascend, so that those below a limit come first."""
        return bool((np.diff(self.taken, axis=1) >= 0).all())

    def lengths(self, limits: np.ndarray) -> np.ndarray:
        """Count each item's tokens below the limits (B,): int32 (B, items)."""
        held = self.index[self.index != NONE]
        item = np.nonzero(self.index != NONE)[0]
        below = held < limits[:, None]
        count = np.zeros((len(limits), self.items), np.int32)
        for found, row in zip(count, below, strict=True):
            found += np.bincount(item[row], minlength=self.items).astype(np.int32)
        return count

    @functools.cached_property
    def taken(self) -> np.ndarray:
        """The index with the item's last token in place of -1: to be read, and not looked at."""
        last = np.count_nonzero(self.index != NONE, axis=1, keepdims=True) - 1
        slot = np.minimum(np.arange(self.slots), np.maximum(last, 0))
        return np.maximum(np.take_along_axis(self.index, slot, axis=1), 0)

    def listing(self, batch: int) -> np.ndarray:
        """Return the index for `batch` sequences, each divided into items: int32 (B, 1, slots)."""
        return self._listing if batch == 1 else np.tile(self._listing, (batch, 1, 1))

    @functools.cached_property
    def _listing(self) -> np.ndarray:
        return np.ascontiguousarray(self.index[:, None], np.int32)

    def picked(self, values: np.ndarray, batch: int) -> np.ndarray:
        """Return what tokens have, (1 or batch, N), slot by slot: (batch * items, slots)."""
        taken = np.broadcast_to(values[:, self.taken], (batch, self.items, self.slots))
        return np.ascontiguousarray(taken.reshape(-1, self.slots))

    def places(self, tokens: int) -> np.ndarray:
        """Return where each token is: numbers of slots, int64 (times, tokens).

        A token that is listed less often than others has ``items * slots`` for the rest.
        """
        flat = self.index.ravel()
        slot = np.flatnonzero(flat != NONE)
        slot = slot[np.argsort(flat[slot], kind="stable")]
        token = flat[slot]
        first = np.searchsorted(token, token)
        turn = np.arange(len(token)) - first
        places = np.full((int(turn.max(initial=0)) + 1, tokens), flat.size)
        places[turn, token] = slot
        return places


def listed(tokens: np.ndarray) -> Order:
    """Return the order of one item that has these tokens."""
    return Order(np.asarray(tokens, np.int64)[None, :])


def residues(tokens: int, step: int, offset: int = 0) -> Order:
    """Deal tokens out by their positions modulo `step`; token i stands at ``i + offset``."""
    slots = -(-tokens // step)
    first = (np.arange(step) - offset) % step
    index = first[:, None] + step * np.arange(slots)
    return Order(np.where(index < tokens, index, NONE))


def patches(tokens: int, columns: int, shape: tuple[int, int], offset: int = 0) -> Order:
    """List the cells of a grid patch by patch; token i is the cell ``i + offset``, row by row."""
    row, column = np.divmod(np.arange(tokens) + offset, columns)
    height, width = shape
    return listed(np.lexsort((column, row, column // width, row // height)))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class reordered(Mask):
    """A mask over storage indices for tokens in another order; there is an axis for the items.

    `queries` and `keys` are tokens by slot, (items, slots), as in `Order.taken`.
    """

    mask: Mask
    queries: np.ndarray
    keys: np.ndarray

    @property
    def lead(self) -> tuple[int, ...]:
        return (max(len(self.queries), len(self.keys)), 1)

    def at(self, index: tuple[int, ...]) -> Mask:
        item = index[0]
        return _Item(self.mask, self.queries[item % len(self.queries)],
                     self.keys[item % len(self.keys)])

    def resolve(self, frame: Frame) -> Mask:
        return self.at((0, 0))

    def allowed(self, i: Index, j: Index) -> np.ndarray:
        return self.at((0, 0)).allowed(i, j)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Item(Mask):
    """What `reordered` is for one item."""

    mask: Mask
    queries: np.ndarray
    keys: np.ndarray

    def resolve(self, frame: Frame) -> Mask:
        return self

    def allowed(self, i: Index, j: Index) -> np.ndarray:
        return self.mask.allowed(self.queries[i], self.keys[j])

    def classify(self, i0: Index, i1: Index, j0: Index, j1: Index) -> np.ndarray:
        # the tokens of a box are some of those of the box that they span
        return self.mask.classify(*extent(self.queries, i0, i1), *extent(self.keys, j0, j1))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Cells(Mask):
    """A rectangle around each cell of a grid, for cells in any order: (row, column) by slot."""

    mask: window_2d
    queries: np.ndarray
    keys: np.ndarray

    def resolve(self, frame: Frame) -> Mask:
        return self

    def allowed(self, i: Index, j: Index) -> np.ndarray:
        return self.mask.reaches(*(self.queries[:, i] - self.keys[:, j]))

    def classify(self, i0: Index, i1: Index, j0: Index, j1: Index) -> np.ndarray:
        rows, columns = ((*extent(x, i0, i1), *extent(y, j0, j1))
                         for x, y in zip(self.queries, self.keys, strict=True))
        return self.mask.classify_cells(rows, columns)


def by_patches(mask: Mask, queries: Order, keys: Order, frame: PlainFrame) -> Mask:
    """Return what a mask is among cells in another order."""
    if isinstance(mask, And | Or):
        return type(mask)(tuple(by_patches(part, queries, keys, frame) for part in mask.masks))
    if isinstance(mask, Not):
        return ~by_patches(mask.mask, queries, keys, frame)
    if isinstance(mask, window_2d):
        mask.resolve(frame)
        return _Cells(mask, *(np.stack(np.divmod(token, mask.shape[1])) for token in (
            queries.index[0] + frame.offset, keys.index[0])))
    return _Item(mask.resolve(frame), queries.index[0], keys.index[0])


def extent(x: np.ndarray, low: Index, high: Index) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and the largest of ``x[low:high + 1]``, for arrays of both."""
    if (np.diff(x) >= 0).all():
        return x[low], x[high]
    edges = np.stack([low.ravel(), high.ravel() + 1], axis=1).ravel()
    least, most = (reduce.reduceat(np.append(x, x[-1]), edges)[::2].reshape(low.shape)
                   for reduce in (np.minimum, np.maximum))
    return least, most
