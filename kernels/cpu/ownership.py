"""Who sums what in the backward: units of work that own a part of every gradient they add to.

Two (batch item, head) pairs that add to the same numbers of a term's gradient must belong to one
unit, which takes them in order. So pairs are joined into components, by the item and head rows that
the terms give them; without such terms each pair is its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .memory import address
from .records import GRADIENT

COPIES = 32
"""The offset table's gradient is summed in at most so many copies, or one per head."""


def components(labels: list[np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Join what shares a label; return the members, component by component, and where each starts.

    Each of `labels` is int64 (count,), any numbers below `count` times the heads.
    """
    least = np.arange(count)
    while labels:
        before = least
        for label in labels:
            found = np.full(label.max(initial=-1) + 1, count)
            np.minimum.at(found, label, least)
            least = found[label]
        if np.array_equal(before, least):
            break
    members = np.argsort(least, kind="stable")
    _, start = np.unique(least[members], return_index=True)
    return members, np.append(start, count)


class TermGradient:
    """The gradient of a bias or gate in its own shape."""

    def __init__(self, term: Any, batch: int, heads: int, row_tiles: int, dtype: Any) -> None:
        self.item = np.ascontiguousarray(term.item, np.int32)
        self.shape = term.array.shape
        _, own_heads, n, m = self.shape
        self.per_head = own_heads > 1
        self.owner = "columns" if n == 1 != m else "rows"
        if n == m == 1:
            self.array, self.totals = None, np.zeros((batch, heads, row_tiles))
        else:
            self.array, self.totals = np.zeros(self.shape, dtype), None

    def labels(self, heads: int) -> np.ndarray:
        """Return the rows of the gradient that pairs of an item and one of `heads` add to."""
        return (self.item[:, None] * np.int64(heads)
                + (np.arange(heads) if self.per_head else 0 * np.arange(heads))).ravel()

    def record(self) -> np.void:
        """Tell kernels where the gradient is."""
        strides = (0, 0, 0, 0)
        if self.array is not None:
            strides = tuple(0 if size == 1 else step for size, step in
                            zip(self.shape, self.array.strides, strict=True))
        return np.array((address(self.array), address(self.item), *strides, address(self.totals)),
                        GRADIENT)[()]

    def result(self, dtype: Any) -> np.ndarray:
        """Return the gradient; sums per tile are added up in order."""
        if self.array is not None:
            return self.array
        sums = self.totals.sum(2)
        total = np.zeros(self.shape[:2])
        np.add.at(total, self.item, sums if self.per_head else sums.sum(1, keepdims=True))
        return total.astype(dtype)[:, :, None, None]


class TableGradient:
    """The gradient of the offset table: a float64 copy per unit of work, added up in order."""

    def __init__(self, shape: tuple[int, int], heads: int, members: np.ndarray, start: np.ndarray,
                 row_tiles: int) -> None:
        self.shape = shape
        count = len(start) - 1
        # a component holds all items of one head, unless another term joins the heads
        self.heads = members[start[:-1]] % heads if 1 < shape[0] == count else None
        rows = 1 if self.heads is not None else shape[0]
        self.slices = max(1, min(row_tiles, COPIES // max(1, count * rows)))
        self.copies = np.zeros((count, self.slices, rows, shape[1]))
        _, unit, head, _ = self.copies.strides
        self.strides = unit, 0 if rows == 1 else head

    @staticmethod
    def labels(rows: int, batch: int, heads: int) -> np.ndarray:
        """Return the rows of the table that pairs add to."""
        return np.tile(np.arange(heads) if rows > 1 else np.zeros(heads, np.int64), batch)

    def result(self, dtype: Any) -> np.ndarray:
        """Return the gradient in the table's own shape."""
        sums = self.copies.sum(1)
        if self.heads is None:
            return sums.sum(0).astype(dtype)
        total = np.empty(self.shape, dtype)
        total[self.heads] = sums[:, 0]
        return total
