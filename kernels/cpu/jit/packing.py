"""Packing: tiles of 64 rows copied to where the micro-kernels want them.

Any strides become contiguous rows, padded with zeros to whole vectors, and where a product needs it
the transpose of each tile. Rows that nobody may read (padding, rows that see no key) become zeros,
so whatever they held is gone. Each tile notes whether a number in it is not finite: masked weights
are zeros, and 0 * NaN must not happen.
"""

from __future__ import annotations

import math

import numpy as np

from ..compile import kernel, part
from .access import load, pack_at, store

TILE = np.int64(64)
NOWHERE = np.int64(0)


@kernel
def pack_tiles(place, first, last, unit):
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
