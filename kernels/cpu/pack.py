"""Packed copies of whole arrays, made in parallel."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import threads
from .jit.packing import TILE, pack_tiles
from .jit.vector import vector_bytes
from .memory import address, aligned
from .records import PACK


def padded(width: int, dtype: Any) -> int:
    """Return `width` rounded up to whole vectors."""
    lanes = vector_bytes() // np.dtype(dtype).itemsize
    return -(-width // lanes) * lanes


def source(x: np.ndarray, lengths: int, scale: int = 0, lse: int = 0) -> np.ndarray:
    """Describe an array (batch, heads, length, width) for `pack_tile`."""
    batch, heads, length, width = x.shape
    return np.array([(address(x), *x.strides, x.itemsize, batch, heads, length, -(-length // TILE),
                      width, padded(width, x.dtype), lengths, scale, lse, 0, 0, 0)], PACK)


def pack(record: np.ndarray, dtype: Any, *, rows: bool = False, columns: bool = False,
         ) -> tuple[np.ndarray | None, ...]:
    """Pack a whole array in parallel; return its tiles, their transposes, and a note per tile."""
    what = record[0]
    tiles = int(what["batch"] * what["heads"] * what["tiles"])
    packed = aligned((tiles, TILE, int(what["padded"])), dtype) if rows else None
    transposed = aligned((tiles, int(what["width"]), TILE), dtype) if columns else None
    notes = np.empty(tiles, np.uint8)
    what["rows"], what["columns"], what["notes"] = map(address, (packed, transposed, notes))
    place, unit = address(record), np.dtype(dtype).type(1)
    chunk = max(1, 2**16 // (TILE * max(1, int(what["width"]))))
    threads.run(lambda first, last, _: pack_tiles(place, first, last, unit), tiles, chunk)
    return packed, transposed, notes
