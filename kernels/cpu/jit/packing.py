"""Packing: tiles of 64 rows copied to where the micro-kernels want them.

Any strides become contiguous rows, padded with zeros to whole vectors, and where a product needs it
the transpose of each tile. Rows that nobody may read (padding, rows that see no key) become zeros,
so whatever they held is gone. Each tile notes whether a number in it is not finite: masked weights
are zeros, and 0 * NaN must not happen.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..compile import kernel, part
from .access import fetch_add, load, pack_at, rounded, store
from .vector import convert_rows, pair_rows, transpose

TILE = np.int64(64)
NOWHERE = np.int64(0)
AT_ONCE = np.int64(4)
"""A thread takes so many tiles at a time, some two microseconds."""


@intrinsic
def size_of(context, like):
    """Return how many bytes a number of the type of `like` takes; known when compiling."""
    def give(context, builder, signature, values):
        return context.get_constant(types.int64, like.bitwidth // 8)

    return types.int64(like), give


@intrinsic
def strip(context, like):
    """Return the address of stack memory for TILE x TILE numbers of the type of `like`."""
    def reserve(context, builder, signature, values):
        kind = ir.ArrayType(context.get_data_type(like), int(TILE * TILE))
        with builder.goto_entry_block():
            memory = builder.alloca(kind)
            memory.align = 64
            return builder.ptrtoint(memory, context.get_value_type(types.int64))

    return types.int64(like), reserve


@kernel
def pack_tiles(place, queue, units, scratch, unit, operand):
    """Pack the tiles of a whole array, as many as `queue` hands out."""
    pack = pack_at(place)
    size = size_of(operand)
    depth = pack.padded if size == 2 else pack.width
    first = fetch_add(queue, AT_ONCE)
    while first < units:
        for tile in range(first, min(first + AT_ONCE, units)):
            head, t = divmod(tile, pack.tiles)
            b, h = divmod(head, pack.heads)
            rows = pack.rows + tile * TILE * pack.padded * size if pack.rows else NOWHERE
            columns = pack.columns + tile * TILE * depth * size if pack.columns else NOWHERE
            pairs = pack.pairs + tile * TILE * pack.padded * size if pack.pairs else NOWHERE
            note = pack_tile(pack, b, h, t, rows, columns, pairs, unit, operand)
            store(pack.notes + tile, np.uint8(note))
        first = fetch_add(queue, AT_ONCE)


@part
def pack_tile(pack, b, h, t, rows, columns, pairs, unit, operand):
    """Copy tile `t` to `rows`, its transpose to `columns`, and its rows two by two to `pairs`.

    Each of these may be NOWHERE. With bfloat16 operands the numbers of `columns` are pairs, too;
    with others nothing goes to `pairs`. Returns whether a number is not finite.
    """
    size = size_of(operand)
    scale = load(pack.scale + h * size_of(unit), unit) if pack.scale else rounded(1.0, unit)
    across = pack.padded if rows else TILE
    strange = False
    for x in range(0, pack.padded, TILE):
        wide = min(TILE, pack.padded - x)
        count = max(np.int64(0), min(TILE, pack.width - x))
        target = rows + x * size if rows else strip(operand)
        strange |= convert_strip(pack, b, h, t, x, count, wide, scale, target, across, unit,
                                 operand)
        if columns and size == 2:
            transpose(target, across // 2, columns + x * TILE * size, TILE, TILE, wide // 2, unit)
        elif columns:
            transpose(target, across, columns + x * TILE * size, TILE, TILE, count, unit)
        if pairs and size == 2:
            for r in range(0, TILE, 2):
                pair = target + r * across * size
                place = pairs + (r * pack.padded + 2 * x) * size
                pair_rows(pair, pair + across * size, wide, place)
    return strange


@part
def convert_strip(pack, b, h, t, x, count, wide, scale, target, across, unit, operand):
    """Copy `count` numbers from `x` on of a tile's rows, and zeros up to `wide` numbers.

    Neighbouring rows go together as long as they are all to be read, or all to be zeros.
    """
    size = size_of(operand)
    strange = np.int64(0)
    source = pack.at + b * pack.b + h * pack.h + t * TILE * pack.n + x * pack.d
    start = np.int64(0)
    taken = row_counts(pack, b, h, t * TILE, unit)
    for r in range(1, TILE + 1):
        next_taken = r < TILE and row_counts(pack, b, h, t * TILE + r, unit)
        if r == TILE or next_taken != taken:
            strange |= convert_rows(source + start * pack.n, pack.n, pack.d, pack.kind, r - start,
                                    count if taken else 0, wide, scale,
                                    target + start * across * size, across, unit, operand)
            start, taken = r, next_taken
    return strange != 0


@part
def row_counts(pack, b, h, i, unit):
    """Return whether row `i` is to be read: within the length, and of an lse that is not -inf."""
    if i >= min(load(pack.lengths + 4 * b, np.int32(0)), pack.length):
        return False
    if not pack.lse:
        return True
    place = pack.lse + ((b * pack.heads + h) * pack.length + i) * size_of(unit)
    return load(place, unit) != -math.inf
