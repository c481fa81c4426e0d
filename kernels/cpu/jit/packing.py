"""Packing: tiles of 64 rows copied to where the micro-kernels want them, and results back.

Any strides become contiguous rows, padded with zeros to whole vectors, and where a product needs it
the transpose of each tile. Rows that nobody may read (padding, rows that see no key) become zeros,
so whatever they held is gone. Rows may be tokens from anywhere, as an index lists them; what is
computed of them goes back there. Each tile notes whether a number in it is not finite: masked
weights are zeros, and 0 * NaN must not happen.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..compile import kernel, part
from .access import fetch_add, load, numbers, pack_at, prefetch, rounded, store
from .vector import (
    add_rows,
    convert_rows,
    gather_rows,
    pair_rows,
    scatter_rows,
    transpose,
    write_rows,
)

TILE = np.int64(64)
NOWHERE = np.int64(0)
LINE = np.int64(64)
NO_TOKEN = np.int64(-1)
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


@intrinsic
def row_list(context):
    """Return the address of stack memory for TILE int64s."""
    def reserve(context, builder, signature, values):
        kind = ir.ArrayType(ir.IntType(64), int(TILE))
        with builder.goto_entry_block():
            memory = builder.alloca(kind)
            memory.align = 64
            return builder.ptrtoint(memory, context.get_value_type(types.int64))

    return types.int64(), reserve


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
    expect_rows(pack, pack.at + b // pack.items * pack.b + h * pack.h, pack.n,
                pack.width * pack.d, b, h, t * TILE, TILE)
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
    """Copy `count` numbers from `x` on of a tile's rows, and zeros up to `wide` numbers."""
    source, first = pack.at + b // pack.items * pack.b + h * pack.h, t * TILE * pack.n + x * pack.d
    if pack.index or pack.lse:
        places = row_list()
        for r in range(TILE):
            token = row_token(pack, b, h, t * TILE + r, unit)
            store(places + 8 * r, source + token * pack.n if token >= 0 else NOWHERE)
        return gather_rows(places, x * pack.d, pack.d, pack.kind, TILE, count, wide, scale, target,
                           across, unit, operand) != 0
    length = min(load(pack.lengths + 4 * b, np.int32(0)), pack.length)
    live = min(max(length - t * TILE, NOWHERE), TILE)
    strange = convert_rows(source + first, pack.n, pack.d, pack.kind, live, count, wide, scale,
                           target, across, unit, operand)
    convert_rows(source, pack.n, pack.d, pack.kind, TILE - live, NOWHERE, wide, scale,
                 target + live * across * size_of(operand), across, unit, operand)
    return strange != 0


@part
def expect_rows(pack, base, stride, nbytes, b, h, i, count):
    """Have rows from anywhere, those of the tokens that stand from `i` on, brought near."""
    if pack.index:
        for r in range(i, min(i + count, pack.length)):
            row = base + max(NOWHERE, token_at(pack, b, h, r)) * stride
            for x in range(0, nbytes, LINE):
                prefetch(row + x)


@part
def row_token(pack, b, h, i, unit):
    """Return which token row `i` is; -1 if it is beyond the length, or of an lse of -inf."""
    if i >= min(load(pack.lengths + 4 * b, np.int32(0)), pack.length):
        return NO_TOKEN
    return token_to_read(pack, b, h, i, unit)


@part
def token_to_read(pack, b, h, i, unit):
    """Return which token row `i`, within the length, is; -1 if of an lse of -inf."""
    token = token_at(pack, b, h, i)
    if pack.lse and token >= 0 and load(lse_place(pack, b, h, token, unit), unit) == -math.inf:
        return NO_TOKEN
    return token


@part
def lse_place(pack, b, h, token, unit):
    """Return where the lse of a token is."""
    return pack.lse + ((b // pack.items * pack.heads + h) * pack.tokens + token) * size_of(unit)


@part
def token_at(pack, b, h, i):
    """Return which token stands at `i`; -1 if none does."""
    if not pack.index:
        return i
    return np.int64(load(pack.index + b * pack.index_b + h * pack.index_h + 4 * i, np.int32(0)))


@part
def expect_result(result, pack, b, h, i, count, width):
    """Have the rows that `put_back` will write to brought near."""
    expect_rows(pack, result.at + b // pack.items * result.b + h * result.h, result.n,
                width * result.size, b, h, i, count)


@part
def put_back(result, pack, b, h, i, count, rows, padded, width, factors, kept, unit):
    """Write `count` rows, each times its factor, to the tokens that stand from `i` on in `pack`.

    Where results are added to what is there, that is multiplied by `kept` first.
    """
    base = result.at + b // pack.items * result.b + h * result.h
    if not pack.index and not result.onto:
        write_rows(rows, padded, count, width, factors, base + i * result.n, result.n, result.kind,
                   unit)
        return
    places = row_list()
    for r in range(count):
        token = token_at(pack, b, h, i + r)
        store(places + 8 * r, base + token * result.n if token >= 0 else NOWHERE)
    if result.onto:
        add_rows(rows, padded, count, width, factors, kept, places, unit)
    else:
        scatter_rows(rows, padded, count, width, factors, places, result.kind, unit)


@part
def add_to_result(result, b, h, first, count, rows, padded, width, unit):
    """Add `count` rows to those of a result, in acc, from `first` on."""
    for r in range(count):
        row = result.at + b * result.b + h * result.h + (first + r) * result.n
        new, kept = numbers(rows + r * padded * result.size, width, unit), numbers(row, width, unit)
        for x in range(width):
            kept[x] += new[x]
