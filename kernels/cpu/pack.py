"""Packing: tiles of 64 rows copied to where the micro-kernels want them.

Any strides become contiguous rows, padded with zeros to whole vectors, and where a product needs it
the transpose of each tile. Rows that nobody may read (padding, rows that see no key) become zeros,
so whatever they held is gone. Each tile notes whether a number in it is not finite: masked weights
are zeros, and 0 * NaN must not happen.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from . import threads
from .compile import kernel, part
from .memory import address, aligned, load, store
from .records import PACK, pack_at
from .vector import vector_bytes

TILE = np.int64(64)
NOWHERE = np.int64(0)


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
    threads.run(lambda first, last, _: _pack_tiles(place, first, last, unit), tiles, chunk)
    return packed, transposed, notes


@kernel
def _pack_tiles(place, first, last, unit):
    pack = pack_at(place)
    row_tile = TILE * pack.padded * pack.size
    column_tile = TILE * pack.width * pack.size
    for tile in range(first, last):
        head, t = divmod(tile, pack.tiles)
        b, h = divmod(head, pack.heads)
        rows = pack.rows + tile * row_tile if pack.rows else 0
        columns = pack.columns + tile * column_tile if pack.columns else 0
        note = pack_tile(pack, b, h, t, rows, columns, unit)
        store(pack.notes + tile, np.uint8(note))


@part
def pack_tile(pack, b, h, t, rows, columns, unit):
    """Copy tile `t` to `rows` and its transpose to `columns`, either of which may be NOWHERE.

    Returns whether it holds a number that is not finite.
    """
    size = pack.size
    scale = load(pack.scale + h * size, unit) if pack.scale else unit
    live = min(load(pack.lengths + 4 * b, np.int32(0)), pack.length) - t * TILE
    strange = False
    for r in range(TILE):
        i = t * TILE + r
        at = pack.at + b * pack.b + h * pack.h + i * pack.n
        taken = r < live
        if taken and pack.lse:
            lse = load(pack.lse + ((b * pack.heads + h) * pack.length + i) * size, unit)
            taken = lse != -math.inf
        for x in range(pack.width):
            value = load(at + x * pack.d, unit) * scale if taken else unit - unit
            strange |= value - value != 0
            if rows:
                store(rows + (r * pack.padded + x) * size, value)
            if columns:
                store(columns + (x * TILE + r) * size, value)
        if rows:
            for x in range(pack.width, pack.padded):
                store(rows + (r * pack.padded + x) * size, unit - unit)
    return strange
