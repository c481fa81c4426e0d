"""Flash attention, forward: softmax over the tiles that a BlockMask lists, online.

A unit of work is 64 queries of one head of one batch item. It walks its runs of key tiles, up to
CHUNK tiles at a time, and keeps of each row the largest score so far (`tops`), the sum of
exp(score - top) (`sums`) and the product of these weights with the values (`acc`):

    keys ->   ..........[chunk]......      scores = q k^T      64 x (64 * CHUNK), stays in cache
    queries  [unit]                        acc   += weights v  64 x E

When a row's largest score grows, what was summed is scaled down to match.
Nothing is shared between units, so any number of threads gives the same bits.
"""

from __future__ import annotations

import math

import numpy as np

from ..compile import kernel, part
from .access import job_at, load, numbers, rounded, store
from .masking import ONE, STRAIGHT, allowed, bit_tile, exact_product, runs_of
from .packing import NOWHERE, TILE, pack_tile
from .terms import add_terms, cap_scores, clear, dropout_row, term_row
from .vector import exp_sum, gemm, row_max, select

CHUNK = np.int64(4)


def scratch_bytes(d_padded: int, e_padded: int, size: int) -> int:
    """Return how much memory a thread needs."""
    numbers_held = TILE * (d_padded + e_padded + TILE * CHUNK) + 2 * TILE + TILE * CHUNK
    return numbers_held * size + TILE * CHUNK * 8


@kernel
def forward(place, first, last, scratch, unit):
    """Compute out and lse for units of work `first` to `last`."""
    job = job_at(place)
    size = job.size
    width = TILE * CHUNK
    q = scratch
    scores = q + TILE * job.d_padded * size
    acc_at = scores + TILE * width * size
    tops_at = acc_at + TILE * job.e_padded * size
    words = tops_at + (2 * TILE + width) * size
    acc = numbers(acc_at, TILE * job.e_padded, unit)
    tops = numbers(tops_at, TILE, unit)
    sums = numbers(tops_at + TILE * size, TILE, unit)
    buffer = numbers(tops_at + 2 * TILE * size, width, unit)

    for task in range(first, last):
        head, t = divmod(task, job.row_tiles)
        b, h = divmod(head, job.heads)
        group = b * job.groups + h // (job.heads // job.groups)
        rows = min(load(job.q.lengths + 4 * b, np.int32(0)) - t * TILE, TILE)
        keys = np.int64(load(job.k.lengths + 4 * b, np.int32(0)))
        key_tiles = -(-keys // TILE) if rows > 0 else 0
        acc[:] = 0
        tops[:] = -math.inf
        sums[:] = 0
        pack_tile(job.q, b, h, t, q, NOWHERE, unit)
        start, stop = runs_of(job.rows, load(job.layout + 4 * head, np.int32(0)), t)
        for run in range(start, stop):
            run_first = np.int64(load(job.rows.first + 4 * run, np.int32(0)))
            run_stop = min(run_first + load(job.rows.count + 4 * run, np.int32(0)), key_tiles)
            for tile in range(run_first, run_stop, CHUNK):
                tiles = min(CHUNK, run_stop - tile)
                count = min(tiles * TILE, keys - tile * TILE)
                named = bit_tile(job.rows, run, tile - run_first) >= 0
                masked = named or count < tiles * TILE or job.bias.at != 0 or job.gate.at != 0
                packed = group * job.key_tiles + tile
                strange = False
                for u in range(tiles):
                    gemm(rows, TILE, job.d, q, job.d_padded, 1,
                         job.k.columns + (packed + u) * job.d * TILE * size, TILE,
                         scores + u * TILE * size, width, 0, unit)
                    strange |= load(job.v.notes + packed + u, np.uint8(0)) != 0
                for r in range(rows):
                    row_words = words + 8 * r * CHUNK
                    if masked:
                        for u in range(tiles):
                            name = bit_tile(job.rows, run, tile - run_first + u)
                            word = allowed(job.bits, name, r, keys - (tile + u) * TILE)
                            store(row_words + 8 * u, word)
                    weigh_row(job, b, h, t * TILE + r, tile * TILE, tiles, count, masked,
                              scores + r * width * size, row_words, buffer,
                              r, tops, sums, acc, unit)
                values = job.v.rows + packed * TILE * job.e_padded * size
                if not (strange and masked):
                    gemm(rows, job.e_padded, tiles * TILE, scores, width, 1,
                         values, job.e_padded, acc_at, job.e_padded, 1, unit)
                else:
                    for u in range(tiles):
                        exact_product(rows, job.e, size, scores + u * TILE * size, width * size,
                                      words + 8 * u, 8 * CHUNK, STRAIGHT,
                                      values + u * TILE * job.e_padded * size, acc_at,
                                      job.e_padded, unit)
        finish(job, b, h, t, rows, tops, sums, acc, unit)


@part
def weigh_row(job, b, h, i, j, tiles, count, masked, row, words, buffer, r, tops, sums, acc, unit):
    """Turn products of query `i` and keys from `j` on into weights, as they are to meet v.

    `r` is its place among the rows of `tops`, `sums` and `acc`.
    """
    width = tiles * TILE
    cap_scores(job, row, width, unit)
    add_terms(job, b, h, i, j, count, row, words, buffer, unit)
    if job.gate.at:
        term_row(job.gate, job.size, b, h, i, j, count, buffer)
        clear(words, buffer, count, 0.0)
    if masked:
        for u in range(tiles):
            select(row + u * TILE * job.size, load(words + 8 * u, ONE), -math.inf, unit)
    top = row_max(row, width, tops[r], unit)
    if top > tops[r]:
        if sums[r] != 0:
            decay = rounded(math.exp(np.float64(tops[r]) - np.float64(top)), unit)
            sums[r] *= decay
            for x in range(r * job.e_padded, (r + 1) * job.e_padded):
                acc[x] *= decay
        tops[r] = top
    total = exp_sum(row, width, top if top > -math.inf else unit - unit, unit)
    weights = numbers(row, count, unit)
    if job.gate.at:
        total = unit - unit
        for x in range(count):
            weights[x] *= buffer[x]
            total += weights[x]
    sums[r] += total
    if job.threshold:
        dropout_row(job, b, h, i, j, count, buffer)
        for x in range(count):
            weights[x] *= buffer[x]


@part
def finish(job, b, h, t, rows, tops, sums, acc, unit):
    """Divide by the sums, let the sink join them, and write out and lse."""
    size = job.size
    for r in range(min(TILE, job.n - t * TILE)):
        place = (b * job.heads + h) * job.n + t * TILE + r
        lse, share = -math.inf, 0.0
        if r < rows and sums[r] != 0:
            lse = np.float64(tops[r]) + math.log(np.float64(sums[r]))
            share = 1 / np.float64(sums[r])
        if job.sinks:
            sink = np.float64(load(job.sinks + h * size, unit))
            top = max(lse, sink)
            joint = top + math.log(math.exp(lse - top) + math.exp(sink - top))
            joint = sink if lse == -math.inf else joint
            share *= math.exp(lse - joint) if share != 0 else 0.0
            lse = joint
        store(job.lse + place * size, rounded(lse, unit))
        factor_r = rounded(share, unit)
        for x in range(job.e):
            store(job.out + (place * job.e + x) * size, acc[r * job.e_padded + x] * factor_r)
