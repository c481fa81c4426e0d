"""Flash attention, backward: the weights are computed again, tile by tile, from lse.

    weights p = gate * exp(score - lse)      dscore = p * (dout v^T - delta)
    dv = p^T dout      dk = scale * dscore^T q      dq = scale * dscore k

Every pair adds to a row of dq and to a row of dk and dv. Blocks of threads run in no order, and
sums must have one: so there are two kernels, and each computes all weights it needs.

    by_queries    a block owns a tile of dq, and walks the tiles of keys:       3 products
    by_keys       a block owns a tile of dk and dv of one key/value head, and
                  walks the query heads that share it and their tiles:          4 products

Seven products where five would do, no atomic additions, and the same bits every time. On the way
by_queries sums the gradients of terms that have one number for all keys, and by_keys of those
that have one for all queries; `terms` does the rest.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from .compile import cuda, device, kernel
from .forward import row_sum
from .pairs import pair_gradient, within
from .tiles import (
    add_scores,
    add_weighted,
    aside,
    clear,
    place,
    put,
    put_aside,
    set_aside,
)
from .tiling import MASK_TILE, Tiling
from .walk import name_of_tile, own_queries, runs


@device
def products(total, ours, theirs, our_values, their_values, first, limit, start, stop, left, right,
             tile, row, column, down, across):
    """Compute q k^T into `tile` and dout v^T aside, each thread its own pairs.

    Ours are the block's rows, from `first` on, theirs the columns, from `start` on.
    """
    clear(total)
    add_scores(total, ours, theirs, first, limit, start, stop, left, right, row, column, down,
               across)
    put(tile, total, row, column, down, across)
    clear(total)
    add_scores(total, our_values, their_values, first, limit, start, stop, left, right, row, column,
               down, across)
    put_aside(left, right, total, row, column, down, across)


@functools.cache
def delta(tiling: Tiling) -> Any:
    """Return the kernel for rowsum(dout * out) - dlse; a block for each tile of queries."""
    NUMBER = tiling.dtype
    ROWS, DOWN, ACROSS = tiling.rows, tiling.thread_rows, tiling.thread_columns
    PADDED_ROWS = ROWS + 1

    @kernel
    def delta(rows, results):
        sums = cuda.shared.array((ACROSS, PADDED_ROWS), NUMBER)
        heads, n, width = rows.out.shape[1:]
        tiles = (n + ROWS - 1) // ROWS
        head, i0 = cuda.blockIdx.x // tiles, cuda.blockIdx.x % tiles * ROWS
        b, h = head // heads, head % heads
        row, column = place(ACROSS)
        for r in range(row, ROWS, DOWN):
            total = NUMBER(0)
            if i0 + r < n:
                for x in range(column, width, ACROSS):
                    total += NUMBER(rows.dout[b, h, i0 + r, x]) * NUMBER(rows.out[b, h, i0 + r, x])
            sums[column, r] = total
        cuda.syncthreads()
        for r in range(cuda.threadIdx.x, ROWS, cuda.blockDim.x):
            i = i0 + r
            if i < n:
                total = row_sum(sums, r, ACROSS)
                if rows.has_dlse:
                    total -= rows.dlse[b, h, i]
                # rows that see no key may hold anything
                seen = rows.lse[b, h, i] != -math.inf
                results.delta[b, h, i] = total if seen else NUMBER(0)

    return delta


@functools.cache
def by_queries(tiling: Tiling) -> Any:
    """Return the kernel for dq; a block for each (batch item, head, columns, query tile)."""
    NUMBER = tiling.dtype
    ROWS, COLUMNS, SLAB = tiling.rows, tiling.columns, tiling.slab
    DOWN, ACROSS = tiling.thread_rows, tiling.thread_columns
    DEPTH, WIDTH = tiling.depth, tiling.width
    PADDED_ROWS = ROWS + 1
    OWN_ROWS, OWN_COLUMNS, OWN_WIDTH = ROWS // DOWN, COLUMNS // ACROSS, WIDTH // ACROSS

    @kernel
    def by_queries(p, rows, results):
        left = cuda.shared.array((DEPTH, PADDED_ROWS), NUMBER)
        right = cuda.shared.array((DEPTH, PADDED_ROWS), NUMBER)
        slab = cuda.shared.array((SLAB, WIDTH), NUMBER)
        weights = cuda.shared.array((COLUMNS, PADDED_ROWS), NUMBER)
        seen = cuda.shared.array((COLUMNS, ROWS), np.uint8)
        total = cuda.local.array((OWN_ROWS, OWN_COLUMNS), NUMBER)
        dq = cuda.local.array((OWN_ROWS, OWN_WIDTH), NUMBER)
        # of each row, summed over the thread's columns
        dscale = cuda.local.array(OWN_ROWS, NUMBER)
        dbias = cuda.local.array(OWN_ROWS, NUMBER)
        dgate = cuda.local.array(OWN_ROWS, NUMBER)

        n = p.q.shape[2]
        i0, offset, b, h = own_queries(p, p.q.shape[3], ROWS, WIDTH)
        g = h // (p.q.shape[1] // p.k.shape[1])
        row, column = place(ACROSS)
        queries, keys = p.q_lengths[b], p.kv_lengths[b]
        layout, line = p.layout[b, h], i0 // MASK_TILE
        zero = NUMBER(0)

        clear(dq)
        for a in range(OWN_ROWS):
            dscale[a] = 0
            dbias[a] = 0
            dgate[a] = 0
        first, last = runs(p.rows, layout, line, i0 < queries)
        for run in range(first, last):
            for step in range(p.rows.length[run] * (MASK_TILE // COLUMNS)):
                j0 = p.rows.first[run] * MASK_TILE + step * COLUMNS
                if j0 >= keys:
                    break
                name = name_of_tile(p.rows, run, step * COLUMNS // MASK_TILE)

                products(total, p.q[b, h], p.k[b, g], rows.dout[b, h], p.v[b, g], i0, queries, j0,
                         keys, left, right, weights, row, column, DOWN, ACROSS)
                all_seen = True
                for a in range(OWN_ROWS):
                    r = row + a * DOWN
                    i = i0 + r
                    lse = rows.lse[b, h, i] if i < queries else NUMBER(-math.inf)
                    mean = rows.delta[b, h, i] if i < queries else zero
                    for x in range(column, COLUMNS, ACROSS):
                        met, draw = False, zero
                        if lse != -math.inf and within(p, name, i, queries, j0 + x, keys):
                            raw = weights[x, r]
                            met, _, ds, dg, draw = pair_gradient(
                                p, b, h, i, j0 + x, raw, aside(left, right, x, r), lse, mean)
                            dbias[a] += ds
                            dgate[a] += dg
                            if met:
                                dscale[a] += draw * raw
                        weights[x, r] = draw
                        seen[x, r] = met
                        all_seen = all_seen and met
                whole = cuda.syncthreads_and(np.int32(all_seen))
                # forward: raw = q k^T
                add_weighted(dq, weights, seen, whole, p.k[b, g], j0, keys, offset, slab, row,
                             column, DOWN, ACROSS)

        for a in range(OWN_ROWS):
            for c in range(OWN_WIDTH):
                i, x = i0 + row + a * DOWN, offset + column + c * ACROSS
                if i < n and x < p.q.shape[3]:
                    results.dq[b, h, i, x] = dq[a, c] * p.scale[h]
        # the threads of a row, in order
        for kind in range(3):
            for a in range(OWN_ROWS):
                own = dscale[a]
                if kind == 1:
                    own = dbias[a]
                elif kind == 2:
                    own = dgate[a]
                left[column, row + a * DOWN] = own
            cuda.syncthreads()
            for r in range(cuda.threadIdx.x, ROWS, cuda.blockDim.x):
                if i0 + r < n and offset == 0:
                    results.sums[kind, b, h, i0 + r] = row_sum(left, r, ACROSS)
            cuda.syncthreads()

    return by_queries


@functools.cache
def by_keys(tiling: Tiling) -> Any:
    """Return the kernel for dk and dv; a block for each (item, k/v head, columns, key tile).

    Here the rows of a tile are keys, and its columns are queries.
    """
    NUMBER = tiling.dtype
    ROWS, COLUMNS, SLAB = tiling.rows, tiling.columns, tiling.slab
    DOWN, ACROSS = tiling.thread_rows, tiling.thread_columns
    DEPTH, WIDTH = tiling.depth, tiling.width
    PADDED_ROWS = ROWS + 1
    OWN_ROWS, OWN_COLUMNS, OWN_WIDTH = ROWS // DOWN, COLUMNS // ACROSS, WIDTH // ACROSS

    @kernel
    def by_keys(p, rows, results):
        left = cuda.shared.array((DEPTH, PADDED_ROWS), NUMBER)
        right = cuda.shared.array((DEPTH, PADDED_ROWS), NUMBER)
        slab = cuda.shared.array((SLAB, WIDTH), NUMBER)
        weights = cuda.shared.array((COLUMNS, PADDED_ROWS), NUMBER)
        seen = cuda.shared.array((COLUMNS, ROWS), np.uint8)
        total = cuda.local.array((OWN_ROWS, OWN_COLUMNS), NUMBER)
        dk = cuda.local.array((OWN_ROWS, OWN_WIDTH), NUMBER)
        dv = cuda.local.array((OWN_ROWS, OWN_WIDTH), NUMBER)
        # of each key, summed over the thread's queries
        dbias = cuda.local.array(OWN_ROWS, NUMBER)
        dgate = cuda.local.array(OWN_ROWS, NUMBER)

        heads, groups, m = p.q.shape[1], p.k.shape[1], p.k.shape[2]
        d, e = p.q.shape[3], p.v.shape[3]
        tiles = (m + ROWS - 1) // ROWS
        slices = (max(d, e) + WIDTH - 1) // WIDTH
        unit = cuda.blockIdx.x
        j0 = unit % tiles * ROWS
        offset = unit // tiles % slices * WIDTH
        group = unit // (tiles * slices)
        b, g = group // groups, group % groups
        row, column = place(ACROSS)
        queries, keys = p.q_lengths[b], p.kv_lengths[b]
        line, shared_by = j0 // MASK_TILE, heads // groups
        zero = NUMBER(0)

        clear(dk)
        clear(dv)
        for h in range(g * shared_by, (g + 1) * shared_by):
            for a in range(OWN_ROWS):
                dbias[a] = 0
                dgate[a] = 0
            layout = p.layout[b, h]
            first, last = runs(p.columns, layout, line, j0 < keys)
            for run in range(first, last):
                for step in range(p.columns.length[run] * (MASK_TILE // COLUMNS)):
                    i0 = p.columns.first[run] * MASK_TILE + step * COLUMNS
                    if i0 >= queries:
                        break
                    name = name_of_tile(p.columns, run, step * COLUMNS // MASK_TILE)

                    products(total, p.k[b, g], p.q[b, h], p.v[b, g], rows.dout[b, h], j0, keys, i0,
                             queries, left, right, weights, row, column, DOWN, ACROSS)
                    all_seen = True
                    for x in range(column, COLUMNS, ACROSS):
                        i = i0 + x
                        lse = rows.lse[b, h, i] if i < queries else NUMBER(-math.inf)
                        mean = rows.delta[b, h, i] if i < queries else zero
                        for r in range(row, ROWS, DOWN):
                            a = r // DOWN
                            met, weight, draw = False, zero, zero
                            if lse != -math.inf and within(p, name, i, queries, j0 + r, keys):
                                met, weight, ds, dg, draw = pair_gradient(
                                    p, b, h, i, j0 + r, weights[x, r], aside(left, right, x, r),
                                    lse, mean)
                                dbias[a] += ds
                                dgate[a] += dg
                            weights[x, r] = weight
                            set_aside(left, right, x, r, draw * p.scale[h])
                            seen[x, r] = met
                            all_seen = all_seen and met
                    whole = cuda.syncthreads_and(np.int32(all_seen))
                    # forward: out = p v
                    add_weighted(dv, weights, seen, whole, rows.dout[b, h], i0, queries, offset,
                                 slab, row, column, DOWN, ACROSS)
                    for x in range(column, COLUMNS, ACROSS):
                        for r in range(row, ROWS, DOWN):
                            weights[x, r] = aside(left, right, x, r)
                    # forward: raw = q k^T
                    add_weighted(dk, weights, seen, whole, p.q[b, h], i0, queries, offset, slab,
                                 row, column, DOWN, ACROSS)
            if results.column_sums.shape[0] > 0:
                # the threads of a row, in order
                for kind in range(2):
                    for a in range(OWN_ROWS):
                        left[column, row + a * DOWN] = dgate[a] if kind == 1 else dbias[a]
                    cuda.syncthreads()
                    for r in range(cuda.threadIdx.x, ROWS, cuda.blockDim.x):
                        if j0 + r < m and offset == 0:
                            results.column_sums[kind, b, h, j0 + r] = row_sum(left, r, ACROSS)
                    cuda.syncthreads()

        for a in range(OWN_ROWS):
            for c in range(OWN_WIDTH):
                j, x = j0 + row + a * DOWN, offset + column + c * ACROSS
                if j < m and x < d:
                    results.dk[b, g, j, x] = dk[a, c]
                if j < m and x < e:
                    results.dv[b, g, j, x] = dv[a, c]

    return by_keys
