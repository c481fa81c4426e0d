"""How large tiles are, and how they are divided among the threads of a block."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

MASK_TILE = 64
"""Rows and columns of the tiles of a BlockMask."""


@dataclasses.dataclass(frozen=True)
class Tiling:
    """A block has rows x columns scores at a time; the threads stand in a grid beside them.

    The thread at (row, column) of that grid owns the scores at rows ``row, row + thread_rows, ..``
    and columns ``column, column + thread_columns, ..``. Of an output it owns the same rows and,
    among `width` columns, ``column, column + thread_columns, ..``.
    """

    rows: int
    columns: int
    thread_rows: int
    thread_columns: int
    depth: int
    """How much of q and k (or dout and v) is in shared memory at a time, in columns."""
    width: int
    """Columns of an output that a block owns; wider outputs are divided among blocks."""
    slab: int
    """How many rows of v (or k, q, dout) are in shared memory at a time."""
    dtype: Any
    """What sums are carried in.

    There are as many rows as columns, and `depth` is at least half of that: two slices hold a tile.
    """

    @property
    def threads(self) -> int:
        """How many threads a block has."""
        return self.thread_rows * self.thread_columns


def forward_tiling(dtype: Any, width: int) -> Tiling:
    """Return the tiling for outputs of a width: more scores per thread save shared-memory reads."""
    if dtype == np.float64:
        return Tiling(32, 32, 8, 16, 16, _fitting(width, (32, 64)), 16, dtype)
    return Tiling(64, 64, 16, 16, 32, _fitting(width, (32, 64, 128)), 16, dtype)


def backward_tiling(dtype: Any, width: int) -> Tiling:
    """Return the tiling for the backward, which holds two products of scores and two outputs."""
    if dtype == np.float64:
        return Tiling(32, 32, 8, 16, 16, _fitting(width, (32, 64)), 16, dtype)
    return Tiling(64, 64, 16, 16, 32, _fitting(width, (32, 64, 128)), 16, dtype)


def _fitting(width: int, choices: tuple[int, ...]) -> int:
    """Return the least choice that holds `width`, or the largest."""
    return next((choice for choice in choices if width <= choice), choices[-1])
