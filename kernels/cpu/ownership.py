"""Who sums what in the backward: pieces of work that own all of what they add to.

Two (batch item, group) pairs that add to the same numbers of a term's gradient must belong to one
owner, which takes them in order. So pairs are joined into owners, by the item and head rows that
the terms give them; without such terms each pair is its own. Where that leaves few owners, they
are cut into slices, and every slice adds to a copy of the gradients; copies are summed in order.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from .memory import address

UNITS = 16
"""Units of work that a backward is to have at least, so that so many cores may share it."""

COPIES = 2**23
"""Bytes that copies of the terms' gradients may take together."""


def components(labels: list[np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Join what shares a label; return the members, component by component, and where each starts.

    Each of `labels` is int64 (count,), any numbers from 0 on.
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


@dataclasses.dataclass(frozen=True)
class Pieces:
    """How (batch, group) pairs are divided: piece i has ``pairs[start[i]:start[i + 1]]``."""

    pairs: np.ndarray
    start: np.ndarray
    slice: np.ndarray
    """By piece, which slice of its owner it is, and so which copy of the gradients it adds to."""
    slices: int
    chunks: int
    """Into how many chunks the tiles of keys and queries are cut."""

    def __len__(self) -> int:
        return len(self.start) - 1

    @classmethod
    def of(cls, pairs: int, labels: list[np.ndarray], tiles: int, copy_bytes: int) -> Pieces:
        """Divide `pairs`; `tiles` is the fewer of key and query tiles."""
        members, start = components(labels, pairs) if labels else (
            np.arange(pairs), np.arange(pairs + 1))
        owners = max(1, len(start) - 1)
        wanted = -(-UNITS // owners)
        slices = 1
        if labels and wanted > 1:
            longest = int(np.diff(start).max(initial=1))
            slices = max(1, min(wanted, longest, COPIES // max(1, copy_bytes)))
        if slices > 1:
            sizes = np.diff(start)[:, None]
            cuts = start[:-1, None] + sizes * np.arange(slices) // slices
            start = np.append(cuts.ravel(), pairs)
        chunks = max(1, min(-(-UNITS // (owners * slices)), tiles // 4))
        return cls(members.astype(np.int64), start.astype(np.int64),
                   np.tile(np.arange(slices, dtype=np.int64), owners), slices, chunks)


class TermGradient:
    """The gradient of a bias or gate in its own shape."""

    def __init__(self, term: Any, block: int = 1) -> None:
        self.item = np.ascontiguousarray(term.item, np.int32)
        self.shape, self.block = term.array.shape, block
        _, heads, n, m = self.shape
        self.per_head = heads > 1
        self.whole = n == m == 1

    def labels(self, groups: int) -> np.ndarray:
        """Return the rows of the gradient that (batch, group) pairs add to."""
        group = np.arange(groups) if self.per_head else np.zeros(groups, np.int64)
        return (self.item[:, None] * np.int64(groups) + group).ravel()

    def nbytes(self, dtype: Any) -> int:
        """Return the size of a copy."""
        if self.whole:
            return 0
        numbers = int(np.prod(self.shape))
        return numbers * (8 * UNITS if self.block > 1 else np.dtype(dtype).itemsize)

    def allocate(self, pieces: Pieces, batch: int, heads: int, dtype: Any) -> tuple[int, ...]:
        """Make room for the sums; return the record that tells kernels where it is."""
        if self.whole:
            self.sums = np.zeros((batch, heads, pieces.chunks))
            return 0, address(self.item), 0, 0, 0, 0, 0, address(self.sums), 0
        in_blocks = self.block > 1
        self.sums = np.zeros((pieces.slices, pieces.chunks if in_blocks else 1, *self.shape),
                             np.float64 if in_blocks else dtype)
        copy, chunk, *strides = self.sums.strides
        strides = [0 if size == 1 else step for size, step in zip(self.shape, strides, strict=True)]
        return (address(self.sums), address(self.item), copy, *strides, 0,
                chunk if in_blocks else 0)

    def result(self, dtype: Any) -> np.ndarray:
        """Return the gradient."""
        if not self.whole:
            copies = self.sums.shape[0] * self.sums.shape[1]
            sums = self.sums.reshape(copies, *self.shape)
            return (sums[0] if len(sums) == 1 else sums.sum(0)).astype(dtype, copy=False)
        sums = self.sums.sum(2)
        total = np.zeros(self.shape[:2])
        np.add.at(total, self.item, sums if self.per_head else sums.sum(1, keepdims=True))
        return total.astype(dtype)[:, :, None, None]


class TableGradient:
    """The gradient of a table by offset: a float64 copy per unit of work, added up in order."""

    def __init__(self, shape: tuple[int, int], groups: int) -> None:
        self.shape, self.groups = shape, groups

    def labels(self, batch: int) -> np.ndarray:
        """Return the rows of the table that (batch, group) pairs add to."""
        rows = np.arange(self.groups) if self.shape[0] > 1 else np.zeros(self.groups, np.int64)
        return np.tile(rows, batch)

    def nbytes(self, tiles: int) -> int:
        """Return the size of a slice's copies."""
        return 8 * self.shape[0] * self.shape[1] * max(1, min(UNITS, tiles // 4))

    def allocate(self, pieces: Pieces) -> tuple[int, int, int, int]:
        """Make room for the sums; return its address, its strides by unit and head, its rows."""
        rows, width = self.shape
        # an owner holds all items of one group, unless another term joins the groups
        self.first = None
        if rows > 1 and len(pieces) == pieces.slices * self.groups:
            rows //= self.groups
            owner = np.arange(len(pieces)) // pieces.slices * pieces.slices
            self.first = pieces.pairs[pieces.start[owner]] % self.groups * rows
        self.copies = np.zeros((len(pieces), pieces.chunks, rows, width))
        unit, head = self.copies.strides[1], self.copies.strides[2]
        return address(self.copies), unit, head, rows

    def result(self, dtype: Any) -> np.ndarray:
        """Return the gradient in the table's own shape."""
        sums = self.copies.sum(1)
        if self.first is None:
            return sums.sum(0).astype(dtype)
        total = np.zeros(self.shape)
        for first, rows in zip(self.first, sums, strict=True):
            total[first:first + len(rows)] += rows
        return total.astype(dtype)
