"""Tokens in another order, and what a mask is for them.

Some patterns are dense only after a permutation: a stride of 128 left in place visits half of all
tiles for 1 % of the pairs, but among the tokens of one residue it is plainly causal. An order
deals tokens out to *items*, each of which is attended to by itself, like another batch item.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from .algebra import Index, Mask
from .placement import Frame

NONE = -1
"""In the slots behind an item's last token."""


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
    """Slot s of item x holds token ``index[x, s]``; tokens ascend, and -1 comes behind the last."""

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
        return np.maximum(np.maximum.accumulate(self.index, axis=1), 0)

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
        # tokens ascend, so those of a box lie in the box between its corners
        return self.mask.classify(self.queries[i0], self.queries[i1], self.keys[j0], self.keys[j1])
