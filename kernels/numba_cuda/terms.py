"""Gradients of what was added to the scores or multiplied the weights, in the terms' own shapes.

A number of a term may be read by many pairs, of many heads and batch items. Each number of its
gradient has one owner, who adds up in a fixed order:

    one for all keys, or all queries    by_queries and by_keys (`backward`) leave a sum for each
                                        query or key; `sum_cells` adds up those that share a number
    one for each pair                   `by_tiles`: a block owns a tile of the term, and walks the
                                        heads and batch items that read it
    one for each block of pairs         likewise; the block leaves a sum for each cell that its tile
                                        touches, and `join_cells` adds up those of a cell
    one for each distance               `by_distance`: a block adds to a table of its own, and
                                        `join_tables` adds up the tables

No array of N x M is made, unless a term is one itself.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from .backward import products
from .compile import cuda, device, kernel
from .pairs import NOWHERE, column_of, distance, pair_gradient, within
from .tiles import aside, clear, place, put
from .tiling import MASK_TILE, Tiling
from .walk import name_at, name_of_tile, runs

THREADS = 128
"""Of the blocks that only add up."""


@device
def pair_gradients(sums, left, right, p, rows, b, h, i0, queries, j0, keys, name, of_gate, row,
                   column, down, across):
    """Turn the thread's products into the gradients of its scores, or `of_gate` of its gates."""
    zero = sums.dtype.type(0)
    for r in range(row, sums.shape[1] - 1, down):
        i = i0 + r
        seen = i < queries and rows.lse[b, h, i] != -math.inf
        for x in range(column, sums.shape[0], across):
            own = zero
            if seen and within(p, name, i, queries, j0 + x, keys):
                _, _, ds, dgate, _ = pair_gradient(
                    p, b, h, i, j0 + x, sums[x, r], aside(left, right, x, r),
                    rows.lse[b, h, i], rows.delta[b, h, i])
                own = dgate if of_gate else ds
            sums[x, r] = own


@functools.cache
def by_tiles(tiling: Tiling, *, of_gate: bool) -> Any:
    """Return the kernel for a term with a number for each pair, or each block of pairs.

    There is a block of threads for each (row of the term, head of the term, tile).
    """
    NUMBER = tiling.dtype
    ROWS, COLUMNS = tiling.rows, tiling.columns
    DOWN, ACROSS, DEPTH = tiling.thread_rows, tiling.thread_columns, tiling.depth
    PADDED_ROWS = ROWS + 1
    OWN_ROWS, OWN_COLUMNS = ROWS // DOWN, COLUMNS // ACROSS
    OF_GATE = of_gate

    @kernel
    def by_tiles(p, rows, results):
        left = cuda.shared.array((DEPTH, PADDED_ROWS), NUMBER)
        right = cuda.shared.array((DEPTH, PADDED_ROWS), NUMBER)
        sums = cuda.shared.array((COLUMNS, PADDED_ROWS), NUMBER)
        total = cuda.local.array((OWN_ROWS, OWN_COLUMNS), NUMBER)
        gradient = cuda.local.array((OWN_ROWS, OWN_COLUMNS), NUMBER)

        batch, heads, n, m = p.q.shape[0], p.q.shape[1], p.q.shape[2], p.k.shape[2]
        own_heads = results.heads
        tiles = (n + ROWS - 1) // ROWS
        across = (m + COLUMNS - 1) // COLUMNS
        unit = cuda.blockIdx.x
        j0 = unit % across * COLUMNS
        i0 = unit // across % tiles * ROWS
        own_head = unit // (across * tiles) % own_heads
        own_item = unit // (across * tiles * own_heads)
        row, column = place(ACROSS)

        clear(gradient)
        for b in range(batch):
            queries, keys = p.q_lengths[b], p.kv_lengths[b]
            if results.item[b] == own_item and i0 < queries and j0 < keys:
                for shared in range(heads // own_heads):
                    h = own_head + shared
                    g = h // (heads // p.k.shape[1])
                    name = name_at(p.rows, p.layout[b, h], i0 // MASK_TILE, j0 // MASK_TILE)
                    if name != NOWHERE:
                        products(total, p.q[b, h], p.k[b, g], rows.dout[b, h], p.v[b, g], i0,
                                 queries, j0, keys, left, right, sums, row, column, DOWN, ACROSS)
                        pair_gradients(sums, left, right, p, rows, b, h, i0, queries, j0, keys,
                                       name, OF_GATE, row, column, DOWN, ACROSS)
                        for a in range(OWN_ROWS):
                            for c in range(OWN_COLUMNS):
                                gradient[a, c] += sums[column + c * ACROSS, row + a * DOWN]
                        # the next head's products lie where some may still read this one's
                        cuda.syncthreads()
        block = results.block
        if block == 1:
            for a in range(OWN_ROWS):
                for c in range(OWN_COLUMNS):
                    i, j = i0 + row + a * DOWN, j0 + column + c * ACROSS
                    if i < n and j < m:
                        results.gradient[own_item, own_head, i, j] = gradient[a, c]
        else:
            put(sums, gradient, row, column, DOWN, ACROSS)
            cuda.syncthreads()
            # cells that the tile touches: pairs outside of N and M have added nothing
            cells = results.gradient.shape[2]
            for x in range(cuda.threadIdx.x, cells * cells, cuda.blockDim.x):
                first = (i0 // block + x // cells) * block - i0
                start = (j0 // block + x % cells) * block - j0
                cell = NUMBER(0)
                for i in range(max(first, 0), min(first + block, ROWS)):
                    for j in range(max(start, 0), min(start + block, COLUMNS)):
                        cell += sums[j, i]
                results.gradient[unit, 0, x // cells, x % cells] = cell

    return by_tiles


@functools.cache
def join_cells(tiling: Tiling) -> Any:
    """Return the kernel that adds up what by_tiles left of each cell; a thread for each."""
    NUMBER = tiling.dtype
    ROWS, COLUMNS = tiling.rows, tiling.columns

    @kernel
    def join_cells(cells):
        n, m, block, gradient = cells.n, cells.m, cells.block, cells.gradient
        heads, down, across = gradient.shape[1], gradient.shape[2], gradient.shape[3]
        tiles = (n + ROWS - 1) // ROWS
        tiles_across = (m + COLUMNS - 1) // COLUMNS
        x = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        if x < gradient.size:
            own = x // (down * across)
            i, j = x // across % down * block, x % across * block
            total = NUMBER(0)
            for t in range(i // ROWS, (min(i + block, n) + ROWS - 1) // ROWS):
                for u in range(j // COLUMNS, (min(j + block, m) + COLUMNS - 1) // COLUMNS):
                    unit = (own * tiles + t) * tiles_across + u
                    total += cells.parts[unit, 0, i // block - t * ROWS // block,
                                         j // block - u * COLUMNS // block]
            gradient[own // heads, own % heads, i // block, j // block] = total

    return join_cells


@kernel
def sum_cells(cells):
    """Add up sums (B, H, L) of a kind to the gradient (items, heads, cells); a block for each.

    A cell has `block` of the L. Sums are carried in float64.
    """
    partial = cuda.shared.array(THREADS, np.float64)
    sums = cells.sums[cells.kind]
    batch, heads, length = sums.shape
    _, own_heads, number = cells.gradient.shape
    unit = cuda.blockIdx.x
    cell = unit % number
    own_head, own_item = unit // number % own_heads, unit // (number * own_heads)
    shared_by = heads // own_heads
    first = cell * cells.block
    count = min(cells.block, length - first)
    total = np.float64(0)
    for x in range(cuda.threadIdx.x, batch * shared_by * count, THREADS):
        b, h = x // (shared_by * count), own_head + x // count % shared_by
        if cells.item[b] == own_item:
            total += np.float64(sums[b, h, first + x % count])
    partial[cuda.threadIdx.x] = total
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        total = np.float64(0)
        for x in range(THREADS):
            total += partial[x]
        cells.gradient[own_item, own_head, cell] = total


@functools.cache
def by_distance(tiling: Tiling, *, of_gate: bool) -> Any:
    """Return the kernel for a table by offset; blocks (part, head) take tiles of queries in turn.

    Each adds to ``results.tables[part, head]``, whose numbers change owners from tile to tile, with
    the barriers of the products in between. Where positions follow each other, as they do but for
    packed segments, the pairs of a diagonal of a tile have one distance; else each thread looks
    through the tile for the columns of the table that it owns.
    """
    NUMBER = tiling.dtype
    ROWS, COLUMNS = tiling.rows, tiling.columns
    DOWN, ACROSS, DEPTH = tiling.thread_rows, tiling.thread_columns, tiling.depth
    PADDED_ROWS = ROWS + 1
    OWN_ROWS, OWN_COLUMNS = ROWS // DOWN, COLUMNS // ACROSS
    OF_GATE = of_gate

    @kernel
    def by_distance(p, rows, results):
        left = cuda.shared.array((DEPTH, PADDED_ROWS), NUMBER)
        right = cuda.shared.array((DEPTH, PADDED_ROWS), NUMBER)
        sums = cuda.shared.array((COLUMNS, PADDED_ROWS), NUMBER)
        total = cuda.local.array((OWN_ROWS, OWN_COLUMNS), NUMBER)

        batch, heads, n = p.q.shape[0], p.q.shape[1], p.q.shape[2]
        parts, width = results.tables.shape[0], results.tables.shape[2]
        tiles = (n + ROWS - 1) // ROWS
        part, h = cuda.blockIdx.x // heads, cuda.blockIdx.x % heads
        g = h // (heads // p.k.shape[1])
        table = results.tables[part, h]
        thread, threads = cuda.threadIdx.x, cuda.blockDim.x
        row, column = place(ACROSS)

        for x in range(thread, width, threads):
            table[x] = 0
        for unit in range(part, batch * tiles, parts):
            b, i0 = unit // tiles, unit % tiles * ROWS
            queries, keys = p.q_lengths[b], p.kv_lengths[b]
            layout, line = p.layout[b, h], i0 // MASK_TILE
            first, last = runs(p.rows, layout, line, i0 < queries)
            for run in range(first, last):
                for step in range(p.rows.length[run] * (MASK_TILE // COLUMNS)):
                    j0 = p.rows.first[run] * MASK_TILE + step * COLUMNS
                    if j0 >= keys:
                        break
                    name = name_of_tile(p.rows, run, step * COLUMNS // MASK_TILE)
                    products(total, p.q[b, h], p.k[b, g], rows.dout[b, h], p.v[b, g], i0, queries,
                             j0, keys, left, right, sums, row, column, DOWN, ACROSS)
                    pair_gradients(sums, left, right, p, rows, b, h, i0, queries, j0, keys, name,
                                   OF_GATE, row, column, DOWN, ACROSS)
                    ahead = distance(p, b, i0, j0)
                    straight = True
                    for r in range(thread, min(ROWS, queries - i0), threads):
                        straight = straight and distance(p, b, i0 + r, j0) == ahead - r
                    for x in range(thread, min(COLUMNS, keys - j0), threads):
                        straight = straight and distance(p, b, i0, j0 + x) == ahead + x
                    if cuda.syncthreads_and(np.int32(straight)):
                        for x in range(thread, ROWS + COLUMNS - 1, threads):
                            diagonal = x - (ROWS - 1)
                            found = NUMBER(0)
                            for r in range(max(0, -diagonal), min(ROWS, COLUMNS - diagonal)):
                                found += sums[r + diagonal, r]
                            entry = ahead + diagonal - p.origin
                            # pairs that no mask allows may lie beyond the table
                            if 0 <= entry and entry < width:
                                table[entry] += found
                    else:
                        for r in range(min(ROWS, queries - i0)):
                            for x in range(min(COLUMNS, keys - j0)):
                                entry = column_of(p, b, i0 + r, j0 + x, width)
                                if entry % threads == thread:
                                    table[entry] += sums[x, r]

    return by_distance


@kernel
def join_tables(joined):
    """Add up tables (parts, H, W) to the gradient (heads, W), a thread for each number."""
    tables, gradient = joined.tables, joined.gradient
    heads, width = gradient.shape
    x = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if x < heads * width:
        shared_by = tables.shape[1] // heads
        head, entry = x // width, x % width
        total = np.float64(0)
        for part in range(tables.shape[0]):
            for shared in range(shared_by):
                total += tables[part, head * shared_by + shared, entry]
        gradient[head, entry] = total
