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
from .pairs import NO_GATE, dropout_factor, score, within
from .tiles import add_scores, add_weighted, clear
from .tiling import MASK_TILE, Tiling


@device
def row_sum(shared, r, count):
    """Return the sum of a row's first numbers, in order."""
    total = shared[r, 0]
    for x in range(1, count):
        total += shared[r, x]
    return total


@device
def row_top(shared, r, count):
    """Return the largest of a row's first numbers, none of which is NaN."""
    top = shared[r, 0]
    for x in range(1, count):
        top = max(top, shared[r, x])
    return top


@functools.cache
def forward(tiling: Tiling) -> Any:
    """Return the kernel for a tiling; a block for each (batch item, head, columns, query tile)."""
    NUMBER = tiling.dtype
    ROWS, COLUMNS, SLAB = tiling.rows, tiling.columns, tiling.slab
    DOWN, ACROSS = tiling.thread_rows, tiling.thread_columns
    DEPTH, WIDTH = tiling.depth, tiling.width
    PADDED_DEPTH, PADDED_COLUMNS = DEPTH + 1, COLUMNS + 1
    OWN_ROWS, OWN_COLUMNS, OWN_WIDTH = ROWS // DOWN, COLUMNS // ACROSS, WIDTH // ACROSS

    @kernel
    def forward(p, results):
        left = cuda.shared.array((ROWS, PADDED_DEPTH), NUMBER)
        right = cuda.shared.array((COLUMNS, PADDED_DEPTH), NUMBER)
        slab = cuda.shared.array((SLAB, WIDTH), NUMBER)
        weights = cuda.shared.array((ROWS, PADDED_COLUMNS), NUMBER)
        seen = cuda.shared.array((ROWS, COLUMNS), np.uint8)
        scores = cuda.local.array((OWN_ROWS, OWN_COLUMNS), NUMBER)
        out = cuda.local.array((OWN_ROWS, OWN_WIDTH), NUMBER)
        tops = cuda.local.array(OWN_ROWS, NUMBER)
        sums = cuda.local.array(OWN_ROWS, NUMBER)

        heads, n = p.q.shape[1], p.q.shape[2]
        tiles = (n + ROWS - 1) // ROWS
        slices = (p.v.shape[3] + WIDTH - 1) // WIDTH
        # the last tiles first: under a causal mask they take longest
        unit = cuda.gridDim.x - 1 - cuda.blockIdx.x
        i0 = unit % tiles * ROWS
        offset = unit // tiles % slices * WIDTH
        head = unit // (tiles * slices)
        b, h = head // heads, head % heads
        g = h // (heads // p.k.shape[1])
        row, column = cuda.threadIdx.x // ACROSS, cuda.threadIdx.x % ACROSS
        queries, keys = p.q_lengths[b], p.kv_lengths[b]
        layout, line = p.layout[b, h], i0 // MASK_TILE
        zero = NUMBER(0)

        clear(out)
        for a in range(OWN_ROWS):
            tops[a] = -math.inf
            sums[a] = 0
        last = p.rows.start[layout, line + 1] if i0 < queries else p.rows.start[layout, line]
        for run in range(p.rows.start[layout, line], last):
            names = p.rows.tile[run]
            # the tiles of a run, each of them in parts of COLUMNS keys
            for step in range(p.rows.length[run] * (MASK_TILE // COLUMNS)):
                j0 = p.rows.first[run] * MASK_TILE + step * COLUMNS
                if j0 >= keys:
                    break
                name = -1
                if names >= 0:
                    name = p.rows.names[names + step * COLUMNS // MASK_TILE]

                clear(scores)
                add_scores(scores, p.q[b, h], p.k[b, g], i0, queries, j0, keys, left, right, DEPTH,
                           row, column, DOWN, ACROSS)
                all_seen = True
                for a in range(OWN_ROWS):
                    i = i0 + row + a * DOWN
                    top = tops[a]
                    for c in range(OWN_COLUMNS):
                        j = j0 + column + c * ACROSS
                        visible, value, gate = False, zero, zero
                        if within(p, name, i, queries, j, keys):
                            visible, value, _, gate = score(p, b, h, i, j, scores[a, c])
                            visible = visible and gate != 0
                        seen[row + a * DOWN, column + c * ACROSS] = visible
                        scores[a, c] = value
                        # keeps the gate until the weight is known
                        weights[row + a * DOWN, column + c * ACROSS] = gate
                        all_seen = all_seen and visible
                        if visible and value > top:
                            top = value
                    left[row + a * DOWN, column] = top
                whole = cuda.syncthreads_and(np.int32(all_seen))

                for a in range(OWN_ROWS):
                    i = i0 + row + a * DOWN
                    top = row_top(left, row + a * DOWN, ACROSS)
                    shift = zero if top == -math.inf else top
                    shrink = exp(tops[a] - shift)
                    tops[a] = top
                    sums[a] *= shrink
                    for c in range(OWN_WIDTH):
                        out[a, c] *= shrink
                    for c in range(OWN_COLUMNS):
                        r, x = row + a * DOWN, column + c * ACROSS
                        weight = zero
                        if whole or seen[r, x]:
                            weight = exp(scores[a, c] - shift)
                            if p.gate_form != NO_GATE:
                                weight *= weights[r, x]
                            sums[a] += weight
                            if p.dropping:
                                weight *= dropout_factor(p, b, h, i, j0 + x)
                        weights[r, x] = weight
                add_weighted(out, weights, seen, whole, p.v[b, g], j0, keys, offset, WIDTH, slab,
                             False, row, column, DOWN, ACROSS)

        for a in range(OWN_ROWS):
            left[row + a * DOWN, column] = sums[a]
        cuda.syncthreads()
        for a in range(OWN_ROWS):
            i = i0 + row + a * DOWN
            if i < n:
                total = row_sum(left, row + a * DOWN, ACROSS)
                top, share, lse = tops[a], zero, NUMBER(-math.inf)
                if p.has_sinks:
                    # the sink is a key of value 0
                    top = max(top, p.sinks[h])
                shift = zero if top == -math.inf else top
                shrink = exp(tops[a] - shift)
                total *= shrink
                if p.has_sinks:
                    total += exp(p.sinks[h] - shift)
                if total != 0:
                    share = shrink / total
                    lse = shift + log(total)
                for c in range(OWN_WIDTH):
                    x = offset + column + c * ACROSS
                    if x < p.v.shape[3]:
                        results.out[b, h, i, x] = out[a, c] * share
                if offset == 0 and column == 0:
                    results.lse[b, h, i] = lse

    return forward
