"""Which key blocks matter most to the heads of a group together, query by query.

A unit of work is 64 queries of all heads of a group. The weights of its heads on 64 compressed keys
are summed, and a product with what the two kinds of blocks share (`shares`) adds them to the
importances of the blocks that are selected from:

    compressed keys ->  ..........[tile]......    totals = sum over heads of exp(q k^T - lse)
    queries             [64]                      row   += totals shares      64 x blocks

So no array of queries by compressed keys is there for more than a tile.
"""

from __future__ import annotations

import math

import numpy as np

from ..compile import kernel, part
from ..importance import IMPORTANCE
from .access import fetch_add, load, numbers, record_at, rounded, store
from .packing import NOWHERE, TILE, pack_tile
from .vector import enter_tiles, exp_rows, gemm, leave_tiles, multiply

STEP = np.int64(1)
NONE, ZERO = np.int32(-1), np.int64(0)
INT32 = np.int64(4)

importance_at = record_at(IMPORTANCE)


@kernel
def select(place, queue, units, scratch, unit, operand):
    """List the blocks for 64 queries of a group, as many times as `queue` hands out."""
    job = importance_at(place)
    enter_tiles(unit, operand)
    task = fetch_add(queue, STEP)
    while task < units:
        # the last queries first: under the causal rule they take longest
        pair, t = divmod(units - 1 - task, job.row_tiles)
        b, g = divmod(pair, job.groups)
        weigh_blocks(job, b, g, t, scratch, unit, operand)
        list_blocks(job, b, g, t, scratch, unit)
        task = fetch_add(queue, STEP)
    leave_tiles(unit, operand)


@part
def rows_of(job, b, t):
    """Return how many queries of tile `t` are no padding."""
    return min(np.int64(load(job.q.lengths + INT32 * b, np.int32(0))), job.n) - t * TILE


@part
def position(job, b, i):
    """Return where query `i` stands."""
    return np.int64(load(job.offset + INT32 * b, np.int32(0))) + i


@part
def visible(job, b, i):
    """Return how many compressed keys query `i` sees."""
    there = np.int64(load(job.k.lengths + INT32 * b, np.int32(0)))
    if not job.causal:
        return there
    before = position(job, b, i) - job.block + 1
    return min(before // job.stride + 1, there) if before >= 0 else ZERO


@part
def weigh_blocks(job, b, g, t, scratch, unit, operand):
    """Sum up the importances of all blocks for a tile of queries."""
    size, shared = job.size, job.heads // job.groups
    queries, scores = scratch + job.ahead.queries, scratch + job.ahead.scores
    totals, shares = scratch + job.ahead.totals, scratch + job.ahead.shares
    row, lse = scratch + job.ahead.row, scratch + job.ahead.lse
    rows = min(rows_of(job, b, t), TILE)
    numbers(row, TILE * job.across, unit)[:] = 0
    most = visible(job, b, t * TILE + rows - 1) if rows > 0 else ZERO
    if most <= 0:
        return
    for s in range(shared):
        h = g * shared + s
        pack_tile(job.q, b, h, t, queries + s * TILE * job.d_padded * job.operand, NOWHERE, NOWHERE,
                  unit, operand)
        for r in range(rows):
            own = load(job.lse + ((b * job.heads + h) * job.n + t * TILE + r) * size, unit)
            # a row that sees nothing has weights of 0
            store(lse + (s * TILE + r) * size,
                  rounded(math.inf, unit) if own == -math.inf else own)
    keys = job.k.columns + (b * job.groups + g) * job.key_tiles * TILE * job.d_depth * job.operand
    for tile in range(-(-most // TILE)):
        first = tile * TILE
        numbers(totals, TILE * TILE, unit)[:] = 0
        for s in range(shared):
            multiply(rows, TILE, job.d_depth, queries + s * TILE * job.d_padded * job.operand,
                     job.d_padded, 1, keys + first * job.d_depth * job.operand, TILE * job.fold,
                     scores, TILE, 0, unit, operand)
            exp_rows(scores, TILE, rows, lse + s * TILE * size, unit)
            for r in range(rows):
                count = min(visible(job, b, t * TILE + r) - first, TILE)
                if count > 0:
                    add_row(totals + r * TILE * size, scores + r * TILE * size, count, unit)
        block = first * job.stride // job.select
        share_blocks(job, first, block, shares, unit)
        gemm(rows, job.width, min(most - first, TILE), totals, TILE, 1, shares, job.width,
             row + block * size, job.across, 1, unit)


@part
def add_row(total, weights, count, unit):
    """Add `count` weights to a row of totals; NaN counts as 0."""
    sums, new = numbers(total, count, unit), numbers(weights, count, unit)
    for x in range(count):
        sums[x] += new[x] if new[x] == new[x] else unit - unit


@part
def share_blocks(job, first, block, shares, unit):
    """Write what compressed keys from `first` on share with blocks from `block` on, in strides."""
    table = numbers(shares, TILE * job.width, unit)
    table[:] = 0
    for i in range(TILE):
        start = (first + i) * job.stride
        end = start + job.block
        for j in range(start // job.select, (end - 1) // job.select + 1):
            common = min(end, (j + 1) * job.select) - max(start, j * job.select)
            table[i * job.width + j - block] = rounded(
                np.float64(common) / np.float64(job.stride), unit)


@part
def list_blocks(job, b, g, t, scratch, unit):
    """Write the lists of a tile of queries."""
    rows = min(job.n - t * TILE, TILE)
    alive = rows_of(job, b, t)
    tokens = np.int64(load(job.tokens + INT32 * b, np.int32(0)))
    for r in range(rows):
        out = job.out + ((b * job.groups + g) * job.n + t * TILE + r) * job.count * INT32
        listed = ZERO
        if r < alive:
            listed = list_row(job, position(job, b, t * TILE + r), tokens,
                              scratch + job.ahead.row + r * job.across * job.size,
                              scratch + job.ahead.best, scratch + job.ahead.place, out, unit)
        for x in range(listed, job.count):
            store(out + INT32 * x, NONE)


@part
def list_row(job, at, tokens, row, best_at, place_at, out, unit):
    """Write the list of the query that stands at `at`; return how long it is."""
    there = -(-tokens // job.select)
    own = at // job.select
    if job.causal:
        there = min(there, own + 1) if at >= 0 else ZERO
    if there <= job.count:
        for j in range(there):
            store(out + INT32 * j, np.int32(j))
        return there
    # blocks before `initial`, and from `low` up to `high`, are listed whatever their importance
    initial = job.initial
    low = max(own - job.local + 1, initial)
    high = min(own + (1 if job.causal else job.local), there)
    importance, best = numbers(row, there, unit), numbers(best_at, job.count, unit)
    place = numbers(place_at, job.count, STEP)
    free = job.count - initial - max(high - low, ZERO)
    held = ZERO
    for j in range(initial, there):
        if low <= j < high:
            continue
        x = importance[j]
        if held == free and (free == 0 or not x > best[held - 1]):
            continue
        spot = held if held < free else held - 1
        # of equals the lowest number stays ahead
        while spot > 0 and x > best[spot - 1]:
            best[spot], place[spot] = best[spot - 1], place[spot - 1]
            spot -= 1
        best[spot], place[spot] = x, j
        held = min(held + 1, free)
    for j in range(low, high):
        place[held] = j
        held += 1
    sort(place, held)
    for j in range(initial):
        store(out + INT32 * j, np.int32(j))
    for x in range(held):
        store(out + INT32 * (initial + x), np.int32(place[x]))
    return initial + held


@part
def sort(x, count):
    """Sort the first `count` integers."""
    for i in range(1, count):
        value, j = x[i], i
        while j > 0 and x[j - 1] > value:
            x[j] = x[j - 1]
            j -= 1
        x[j] = value
