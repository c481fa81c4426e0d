"""The highest scores of each query, exactly, while only those that may be among them are kept.

A block of 64 queries walks its runs of key tiles, as in a forward. Scores above a query's floor are
put behind those that it holds, in the order of keys:

    held   [ top | room ]      When the room is full, the `top` highest stay, of equals the first,
                               in their order, and the least of them becomes the floor.

Keys in random order exceed the floor ever more rarely, so most scores are compared, 64 at a time,
and forgotten.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from ..compile import kernel, part
from ..host import vector_bytes
from .access import fetch_add, job_at, load, numbers, rounded, store
from .masking import allowed, next_tiles, runs_of
from .packing import NOWHERE, TILE, pack_tile
from .retrieval import count_above, lowest_bit
from .vector import multiply, select
from .vector.emit import I64, Vectors, typed

STEP, ZERO, NONE = np.int64(1), np.int64(0), np.int32(-1)
ALL = np.uint64(0xFFFFFFFFFFFFFFFF)


def _not_below(v: Vectors, scores: Any, floor: Any) -> None:
    """Return a word that says which of 64 scores are above a floor, or not numbers."""
    build = v.builder
    word, limit = I64(0), v.splat(floor)
    for first in range(0, 64, v.lanes):
        more = build.fcmp_unordered(">", v.load(scores, I64(first)), limit)
        bits = build.zext(build.bitcast(more, ir.IntType(v.lanes)), I64)
        word = build.or_(word, build.shl(bits, I64(first)))
    build.ret(word)


@intrinsic
def not_below(context, scores, floor, unit):
    """Emit `_not_below` for the host."""
    return typed(_not_below, vector_bytes(), "i", "if", unit)


@kernel
def choose(place, queue, units, scratch, unit, operand):
    """List the keys of the highest scores for blocks of queries."""
    job = job_at(place)
    task = fetch_add(queue, STEP)
    while task < units:
        # the last blocks first: under a causal mask they take longest
        head, t = divmod(units - STEP - task, job.row_tiles)
        b, h = divmod(head, job.heads)
        choose_block(job, b, h, t, scratch, unit, operand)
        task = fetch_add(queue, STEP)


@part
def choose_block(job, b, h, t, scratch, unit, operand):
    """List them for a block."""
    size, top, room = job.size, job.choice.top, job.choice.room
    q, scores = scratch + job.choice.q, scratch + job.choice.scores
    names, floors = scratch + job.choice.names, numbers(scratch + job.choice.floors, TILE, unit)
    held = numbers(scratch + job.choice.held, TILE, STEP)
    floors[:] = rounded(job.floor, unit)
    held[:] = 0
    rows = min(np.int64(load(job.q.lengths + 4 * b, NONE)) - t * TILE, TILE)
    keys = np.int64(load(job.k.lengths + 4 * b, NONE))
    pair = b * job.groups + h // (job.heads // job.groups)
    columns = job.k.columns + pair * job.key_tiles * TILE * job.d_depth * size
    if rows > 0:
        pack_tile(job.q, b, h, t, q, NOWHERE, NOWHERE, unit, operand)
    key_tiles = -(-keys // TILE) if rows > 0 else ZERO
    run, stop = runs_of(job.rows, load(job.layout + 4 * (b * job.heads + h), NONE), t)
    step = ZERO
    while True:
        run, step, tile, tiles = next_tiles(job.rows, run, step, stop, key_tiles, STEP, names)
        if tiles == 0:
            break
        multiply(rows, TILE, job.d_depth, q, job.d_padded, 1,
                 columns + tile * TILE * job.d_depth * size, TILE, scores, TILE, 0, unit, operand)
        name = load(names, ZERO)
        for r in range(rows):
            row = scores + r * TILE * size
            word = allowed(job.bits, name, r, keys - tile * TILE)
            if word != ALL:
                select(row, word, -math.inf, unit)
            above = not_below(row, floors[r], unit)
            while above != 0:
                x = lowest_bit(above)
                above &= above - STEP
                score = load(row + x * size, unit)
                if score != score:
                    score = rounded(math.inf, unit)
                if not score > floors[r]:
                    continue
                at = r * room + held[r]
                store(scratch + job.choice.values + at * size, score)
                store(scratch + job.choice.keys + at * 4, np.int32(tile * TILE + x))
                held[r] += STEP
                if held[r] == room:
                    floors[r] = cut(job, r, room, scratch, unit)
                    held[r] = top
    count = job.choice.count
    for r in range(min(TILE, job.n - t * TILE)):
        if held[r] > top:
            cut(job, r, held[r], scratch, unit)
            held[r] = top
        out = job.choice.out + ((b * job.heads + h) * job.n + t * TILE + r) * count * 4
        for x in range(count):
            store(out + 4 * x,
                  load(scratch + job.choice.keys + (r * room + x) * 4, NONE) if x < held[r]
                  else NONE)


@part
def cut(job, r, count, scratch, unit):
    """Leave a query the `top` highest of `count` scores; return a floor that others must exceed.

    Floats of one sign are ordered as their bits are, so that bisection of these finds what fewer
    than `top` exceed.
    """
    top, size = job.choice.top, job.size
    at = scratch + job.choice.values + r * job.choice.room * size
    values = numbers(at, job.choice.room, unit)
    keys = numbers(scratch + job.choice.keys + r * job.choice.room * 4, job.choice.room, NONE)
    words = -(-count // TILE)
    for x in range(count, words * TILE):
        values[x] = -math.inf
    place = scratch + job.choice.word
    low, high = rank_of(job, place, rounded(-math.inf, unit)), rank_of(
        job, place, rounded(math.inf, unit))
    more, floor = ZERO, rounded(math.inf, unit)
    while high - low > 1:
        middle = (low >> STEP) + (high >> STEP) + (low & high & STEP)
        value = number_of(job, place, middle, unit)
        above = count_above(at, words, value, unit)
        if above > top:
            low = middle
        else:
            high, more, floor = middle, above, value
            if above == top:
                break
    kept, equal = ZERO, top - more
    for x in range(count):
        if values[x] > floor or (values[x] == floor and equal > 0):
            equal -= STEP if values[x] == floor else ZERO
            values[kept], keys[kept] = values[x], keys[x]
            kept += STEP
    return floor


@part
def rank_of(job, place, x):
    """Return an integer that is larger for larger floats; `place` has room for a word."""
    store(place, x)
    if job.size == 8:
        bits = load(place, ZERO)
        return bits ^ np.int64(0x7FFFFFFFFFFFFFFF) if bits < 0 else bits
    bits = np.int64(load(place, NONE))
    return bits ^ np.int64(0x7FFFFFFF) if bits < 0 else bits


@part
def number_of(job, place, rank, unit):
    """Undo `rank_of`."""
    if job.size == 8:
        store(place, rank ^ np.int64(0x7FFFFFFFFFFFFFFF) if rank < 0 else rank)
    else:
        store(place, np.int32(rank ^ np.int64(0x7FFFFFFF) if rank < 0 else rank))
    return load(place, unit)
