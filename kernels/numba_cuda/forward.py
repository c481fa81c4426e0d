"""Flash attention, forward: softmax over the tiles that a BlockMask lists, online.

A block of threads owns a tile of queries of one head and batch item, and up to `width` columns of
its output. It walks the tiles of keys:

    keys ->    [tile] [tile] [tile]            scores = q k^T, in registers, 4 to 32 per thread
    queries    [tile]  ->  weights, shared     out   += weights v, in registers

Of each row all of its threads know the largest score so far (`tops`), and each sums the weights in
its own columns (`sums`). When a row's largest score grows, what was summed is scaled down to match.
Nothing is written until the last tile, and nothing is shared between blocks.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from .compile import cuda, device, exp, kernel, log
from .pairs import NO_GATE, dropout_factor, gate_of, score, within
from .tiles import add_scores, add_weighted, clear, place, put
from .tiling import MASK_TILE, Tiling
from .walk import name_of_tile, own_queries, runs


@device
def row_sum(shared, r, count):
    """Return the sum of what the threads of a row left there, in order."""
    total = shared[0, r]
    for x in range(1, count):
        total += shared[x, r]
    return total


@device
def row_top(shared, r, count):
    """Return the largest of what the threads of a row left there, none of which is NaN."""
    top = shared[0, r]
    for x in range(1, count):
        top = max(top, shared[x, r])
    return top


@functools.cache
def forward(tiling: Tiling) -> Any:
    """Return the kernel for a tiling; a block for each (batch item, head, columns, query tile)."""
    NUMBER = tiling.dtype
    ROWS, COLUMNS, SLAB = tiling.rows, tiling.columns, tiling.slab
    DOWN, ACROSS = tiling.thread_rows, tiling.thread_columns
    DEPTH, WIDTH = tiling.depth, tiling.width
    PADDED_ROWS = ROWS + 1
    OWN_ROWS, OWN_COLUMNS, OWN_WIDTH = ROWS // DOWN, COLUMNS // ACROSS, WIDTH // ACROSS

    @kernel
    def forward(p, results):
        left = cuda.shared.array((DEPTH, PADDED_ROWS), NUMBER)
        right = cuda.shared.array((DEPTH, PADDED_ROWS), NUMBER)
        slab = cuda.shared.array((SLAB, WIDTH), NUMBER)
        weights = cuda.shared.array((COLUMNS, PADDED_ROWS), NUMBER)
        seen = cuda.shared.array((COLUMNS, ROWS), np.uint8)
        scores = cuda.local.array((OWN_ROWS, OWN_COLUMNS), NUMBER)
        out = cuda.local.array((OWN_ROWS, OWN_WIDTH), NUMBER)
        tops = cuda.local.array(OWN_ROWS, NUMBER)
        sums = cuda.local.array(OWN_ROWS, NUMBER)
        shrinks = cuda.local.array(OWN_ROWS, NUMBER)

        n = p.q.shape[2]
        i0, offset, b, h = own_queries(p, p.v.shape[3], ROWS, WIDTH)
        g = h // (p.q.shape[1] // p.k.shape[1])
        row, column = place(ACROSS)
        queries, keys = p.q_lengths[b], p.kv_lengths[b]
        layout, line = p.layout[b, h], i0 // MASK_TILE
        zero = NUMBER(0)

        clear(out)
        for a in range(OWN_ROWS):
            tops[a] = -math.inf
            sums[a] = 0
        first, last = runs(p.rows, layout, line, i0 < queries)
        for run in range(first, last):
            # the tiles of a run, each of them in parts of COLUMNS keys
            for step in range(p.rows.length[run] * (MASK_TILE // COLUMNS)):
                j0 = p.rows.first[run] * MASK_TILE + step * COLUMNS
                if j0 >= keys:
                    break
                name = name_of_tile(p.rows, run, step * COLUMNS // MASK_TILE)

                clear(scores)
                add_scores(scores, p.q[b, h], p.k[b, g], i0, queries, j0, keys, left, right, row,
                           column, DOWN, ACROSS)
                put(weights, scores, row, column, DOWN, ACROSS)
                all_seen = True
                for a in range(OWN_ROWS):
                    r, top = row + a * DOWN, tops[a]
                    for x in range(column, COLUMNS, ACROSS):
                        visible, value = False, zero
                        if within(p, name, i0 + r, queries, j0 + x, keys):
                            visible, value, _, gate = score(p, b, h, i0 + r, j0 + x, weights[x, r])
                            visible = visible and gate != 0
                        weights[x, r] = value
                        seen[x, r] = visible
                        all_seen = all_seen and visible
                        if visible and value > top:
                            top = value
                    left[column, r] = top
                whole = cuda.syncthreads_and(np.int32(all_seen))

                for a in range(OWN_ROWS):
                    r = row + a * DOWN
                    top = row_top(left, r, ACROSS)
                    shift = zero if top == -math.inf else top
                    shrinks[a] = exp(tops[a] - shift)
                    tops[a] = top
                    sums[a] *= shrinks[a]
                    for x in range(column, COLUMNS, ACROSS):
                        weight = zero
                        if whole or seen[x, r]:
                            weight = exp(weights[x, r] - shift)
                            if p.gate_form != NO_GATE:
                                weight *= gate_of(p, b, h, i0 + r, j0 + x)
                            sums[a] += weight
                            if p.dropping:
                                weight *= dropout_factor(p, b, h, i0 + r, j0 + x)
                        weights[x, r] = weight
                for a in range(OWN_ROWS):
                    for c in range(OWN_WIDTH):
                        out[a, c] *= shrinks[a]
                add_weighted(out, weights, seen, whole, p.v[b, g], j0, keys, offset, slab, row,
                             column, DOWN, ACROSS)

        for a in range(OWN_ROWS):
            left[column, row + a * DOWN] = sums[a]
        cuda.syncthreads()
        for a in range(OWN_ROWS):
            i = i0 + row + a * DOWN
            total = row_sum(left, row + a * DOWN, ACROSS)
            top, lse = tops[a], NUMBER(-math.inf)
            if p.has_sinks:
                # the sink is a key of value 0
                top = max(top, p.sinks[h])
            shift = zero if top == -math.inf else top
            shrink = exp(tops[a] - shift)
            total *= shrink
            if p.has_sinks:
                total += exp(p.sinks[h] - shift)
            shrinks[a] = zero
            if total != 0:
                shrinks[a] = shrink / total
                lse = shift + log(total)
            if i < n and offset == 0 and column == 0:
                results.lse[b, h, i] = lse
        for a in range(OWN_ROWS):
            for c in range(OWN_WIDTH):
                i, x = i0 + row + a * DOWN, offset + column + c * ACROSS
                if i < n and x < p.v.shape[3]:
                    results.out[b, h, i, x] = out[a, c] * shrinks[a]

    return forward
