"""Flash attention, backward: the weights are computed again, tile by tile, from lse.

    weights p = gate * exp(score - lse)      dscore = p * (dout v^T - delta)

Two passes, and no two threads write to one place. `rows` owns 64 queries and walks its row of key
tiles for dq; `columns` owns 64 keys and walks its column of query tiles, through all heads of the
group, for dk and dv. A pass packs as a whole what it streams, and for itself what it owns, so at
most three packed copies live at once.

The gradient of a bias or gate is kept in the term's own shape, and whatever unit of work owns a
part of it also sums over the axes it was broadcast along, in a fixed order: `rows` where the term
has a query axis, else `columns` where it has a key axis. Where it has neither, `rows` leaves a sum
per tile. `pairs` lists, unit by unit, the (batch, head) pairs that share such an owner. The offset
table is summed in float64, one copy per unit.
"""

from __future__ import annotations

import math

import numpy as np

from ..compile import kernel, part
from .access import job_at, load, numbers, store
from .masking import (
    ONE,
    STRAIGHT,
    TRANSPOSED,
    allowed,
    bit_tile,
    exact_product,
    runs_of,
)
from .packing import NOWHERE, TILE, pack_tile
from .terms import (
    add_terms,
    cap_scores,
    clear,
    dropout_row,
    key_position,
    query_position,
    term_row,
)
from .vector import exp_sum, gemm, select

SQUARE = TILE * TILE
WORD = np.int64(8)


def scratch_bytes(d_padded: int, e_padded: int, size: int) -> int:
    """Return how much memory a thread needs, in either pass."""
    return (2 * TILE * (d_padded + e_padded) + 4 * SQUARE + 3 * TILE) * size + TILE * 8


@kernel
def rows_pass(place, first, last, scratch, unit):
    """Compute dq, the scale's gradient, and what the rows of tiles own of the terms' gradients."""
    job = job_at(place)
    size = job.size
    q = scratch
    dout = q + TILE * job.d_padded * size
    dq_at = dout + TILE * job.e_padded * size
    square = dq_at + TILE * job.d_padded * size
    dq = numbers(dq_at, TILE * job.d_padded, unit)
    for task in range(first, last):
        component, part = divmod(task, job.slices)
        pair = load(job.pair_start + 8 * component, np.int64(0))
        pairs = load(job.pair_start + 8 * component + 8, np.int64(0)) - pair
        t_first = part * job.row_tiles // job.slices
        t_last = (part + 1) * job.row_tiles // job.slices
        table = job.doffsets + task * job.doffsets_unit if job.doffsets else NOWHERE
        for step in range((t_last - t_first) * pairs):
            t = t_first + step // pairs
            head = load(job.pairs + 8 * (pair + step % pairs), np.int64(0))
            b, h = divmod(head, job.heads)
            group = b * job.groups + h // (job.heads // job.groups)
            rows = min(load(job.q.lengths + 4 * b, np.int32(0)) - t * TILE, TILE)
            keys = np.int64(load(job.k.lengths + 4 * b, np.int32(0)))
            key_tiles = -(-keys // TILE) if rows > 0 else 0
            dq[:] = 0
            pack_tile(job.q, b, h, t, q, NOWHERE, unit)
            pack_tile(job.dout, b, h, t, dout, NOWHERE, unit)
            start, stop = runs_of(job.rows, load(job.layout + 4 * head, np.int32(0)), t)
            for run in range(start, stop):
                run_first = np.int64(load(job.rows.first + 4 * run, np.int32(0)))
                run_stop = run_first + load(job.rows.count + 4 * run, np.int32(0))
                for tile in range(run_first, min(run_stop, key_tiles)):
                    count = min(TILE, keys - tile * TILE)
                    name = bit_tile(job.rows, run, tile - run_first)
                    packed = group * job.key_tiles + tile
                    masked = gradient_tile(job, b, h, t * TILE, tile * TILE, rows, count, name,
                                           q, job.k.columns + packed * job.d * TILE * size,
                                           dout, job.v.columns + packed * job.e * TILE * size,
                                           square, table, unit)
                    strange = load(job.k.notes + packed, np.uint8(0)) != 0
                    add_product(job, STRAIGHT, strange and masked, rows, count, job.d,
                                job.d_padded, square, square + SQUARE * size,
                                job.k.rows + packed * TILE * job.d_padded * size, dq_at, unit)
            write_dq(job, b, h, t, rows, dq, unit)


@part
def write_dq(job, b, h, t, rows, dq, unit):
    """Write a tile's dq, and the sum of dscore * (q.k) = q.dq before dq is scaled."""
    size = job.size
    scale = load(job.scale + h * size, unit)
    dscale = 0.0
    for r in range(min(TILE, job.n - t * TILE)):
        i = t * TILE + r
        place = (b * job.heads + h) * job.n + i
        alive = r < rows and load(job.lse + place * size, unit) != -math.inf
        q = job.q.at + b * job.q.b + h * job.q.h + i * job.q.n
        for x in range(job.d):
            value = dq[r * job.d_padded + x] if alive else unit - unit
            # a row that sees no key may hold anything, and its lse may be a sink
            if value != 0:
                dscale += np.float64(value) * np.float64(load(q + x * job.q.d, unit))
            store(job.dq + (place * job.d + x) * size, value * scale)
    store(job.dscale + ((b * job.heads + h) * job.row_tiles + t) * 8, dscale)


@kernel
def columns_pass(place, first, last, scratch, unit):
    """Compute dk, dv, and what the columns of tiles own of the terms' gradients."""
    job = job_at(place)
    size = job.size
    keys_t = scratch
    values_t = keys_t + TILE * job.d_padded * size
    dk_at = values_t + TILE * job.e_padded * size
    dv_at = dk_at + TILE * job.d_padded * size
    square = dv_at + TILE * job.e_padded * size
    dk = numbers(dk_at, TILE * job.d_padded, unit)
    dv = numbers(dv_at, TILE * job.e_padded, unit)
    shared_by = job.heads // job.groups
    for task in range(first, last):
        component, t = divmod(task, job.key_tiles)
        for pair in range(load(job.pair_start + 8 * component, np.int64(0)),
                          load(job.pair_start + 8 * component + 8, np.int64(0))):
            group = load(job.pairs + 8 * pair, np.int64(0))
            b, g = divmod(group, job.groups)
            queries = np.int64(load(job.q.lengths + 4 * b, np.int32(0)))
            count = min(TILE, load(job.k.lengths + 4 * b, np.int32(0)) - t * TILE)
            query_tiles = -(-queries // TILE) if count > 0 else 0
            dk[:] = 0
            dv[:] = 0
            pack_tile(job.k, b, g, t, NOWHERE, keys_t, unit)
            pack_tile(job.v, b, g, t, NOWHERE, values_t, unit)
            for h in range(g * shared_by, (g + 1) * shared_by):
                head = b * job.heads + h
                start, stop = runs_of(job.columns, load(job.layout + 4 * head, np.int32(0)), t)
                for run in range(start, stop):
                    run_first = np.int64(load(job.columns.first + 4 * run, np.int32(0)))
                    run_stop = run_first + load(job.columns.count + 4 * run, np.int32(0))
                    for tile in range(run_first, min(run_stop, query_tiles)):
                        rows = min(TILE, queries - tile * TILE)
                        name = bit_tile(job.columns, run, tile - run_first)
                        packed = head * job.row_tiles + tile
                        q = job.q.rows + packed * TILE * job.d_padded * size
                        dout = job.dout.rows + packed * TILE * job.e_padded * size
                        masked = gradient_tile(job, b, h, tile * TILE, t * TILE, rows, count, name,
                                               q, keys_t, dout, values_t, square, NOWHERE, unit)
                        strange = load(job.dout.notes + packed, np.uint8(0)) != 0
                        add_product(job, TRANSPOSED, strange and masked, rows, count, job.e,
                                    job.e_padded, square, square, dout, dv_at, unit)
                        strange = load(job.q.notes + packed, np.uint8(0)) != 0
                        add_product(job, TRANSPOSED, strange and masked, rows, count, job.d,
                                    job.d_padded, square, square + SQUARE * size, q, dk_at, unit)
            for r in range(min(TILE, job.m - t * TILE)):
                key = group * job.m + t * TILE + r
                for x in range(job.d):
                    store(job.dk + (key * job.d + x) * size, dk[r * job.d_padded + x])
                for x in range(job.e):
                    store(job.dv + (key * job.e + x) * size, dv[r * job.e_padded + x])


@part
def add_product(job, transposed, strange, rows, keys, width, padded, square, tile, source, target,
                unit):
    """Add tile @ source (transposed: tile^T @ source) to target, all packed."""
    if strange:
        exact_product(rows, width, job.size, tile, TILE * job.size, square + 4 * SQUARE * job.size,
                      WORD, transposed, source, target, padded, unit)
    elif transposed:
        gemm(keys, padded, rows, tile, 1, TILE, source, padded, target, padded, 1, unit)
    else:
        gemm(rows, padded, keys, tile, TILE, 1, source, padded, target, padded, 1, unit)


@part
def gradient_tile(job, b, h, i0, j0, rows, keys, name, q, keys_t, dout, values_t, square, table,
                  unit):
    """Compute a tile's weights (as they meet v) and the gradient of its products scale * q.k.

    They come to lie in `square`, TILE * TILE numbers each; the rows' words follow after four such
    tiles. The gradients of the terms are added to theirs. Return whether pairs may be masked, so
    that the words count.
    """
    size = job.size
    masked = name >= 0 or keys < TILE or job.bias.at != 0 or job.gate.at != 0
    row_bytes = TILE * size
    weights, dscores = square, square + SQUARE * size
    slopes, dgates = square + 2 * SQUARE * size, square + 3 * SQUARE * size
    words = square + 4 * SQUARE * size
    buffer = numbers(words + 8 * TILE, TILE, unit)
    kept = numbers(words + 8 * TILE + row_bytes, TILE, unit)
    gemm(rows, TILE, job.d, q, job.d_padded, 1, keys_t, TILE, weights, TILE, 0, unit)
    gemm(rows, TILE, job.e, dout, job.e_padded, 1, values_t, TILE, dscores, TILE, 0, unit)
    for r in range(rows):
        i, word = i0 + r, words + 8 * r
        place = ((b * job.heads + h) * job.n + i) * size
        lse, delta = load(job.lse + place, unit), load(job.delta + place, unit)
        p_at, ds_at, dgate_at = (weights + r * row_bytes, dscores + r * row_bytes,
                                 dgates + r * row_bytes)
        p, ds = numbers(p_at, TILE, unit), numbers(ds_at, TILE, unit)
        slope, dgate = numbers(slopes + r * row_bytes, TILE, unit), numbers(dgate_at, TILE, unit)
        if lse == -math.inf:
            p[:] = 0
            ds[:] = 0
            slope[:] = 0
            dgate[:] = 0
            store(word, ONE - ONE)
            continue
        if masked:
            store(word, allowed(job.bits, name, r, keys))
        if job.softcap > 0:
            cap_scores(job, p_at, TILE, unit)
            for x in range(TILE):
                tanh = p[x] / job.softcap
                slope[x] = 1 - tanh * tanh
        add_terms(job, b, h, i, j0, keys, p_at, word, buffer, unit)
        exp_sum(p_at, TILE, lse, unit)
        if job.threshold:
            dropout_row(job, b, h, i, j0, keys, kept)
            for x in range(keys):
                ds[x] *= kept[x]
        for x in range(TILE):
            ds[x] -= delta
        if job.gate.at:
            term_row(job.gate, size, b, h, i, j0, keys, buffer)
            for x in range(keys):
                dgate[x] = p[x] * ds[x]
                p[x] *= buffer[x]
            select(dgate_at, load(word, ONE), 0.0, unit)
            # a closed gate masks for all but itself: its p may be 0 * inf
            clear(word, buffer, keys, 0.0)
        for x in range(TILE):
            ds[x] *= p[x]
        if job.threshold:
            for x in range(keys):
                p[x] *= kept[x]
        if masked:
            select(p_at, load(word, ONE), 0.0, unit)
            select(ds_at, load(word, ONE), 0.0, unit)
    add_gradient(job, job.dbias, b, h, i0, j0, rows, keys, dscores, buffer, unit)
    add_gradient(job, job.dgate, b, h, i0, j0, rows, keys, dgates, buffer, unit)
    if table:
        add_to_table(job, b, h, i0, j0, rows, keys, dscores, table, unit)
    if job.softcap > 0:
        for r in range(rows):
            ds = numbers(dscores + r * row_bytes, TILE, unit)
            slope = numbers(slopes + r * row_bytes, TILE, unit)
            for x in range(TILE):
                ds[x] *= slope[x]
            if masked:
                select(dscores + r * row_bytes, load(words + 8 * r, ONE), 0.0, unit)
    return masked


@part
def add_gradient(job, gradient, b, h, i0, j0, rows, keys, tile, buffer, unit):
    """Add a tile to a term's gradient, summed over the axes that the term lacks."""
    size = job.size
    if gradient.total:
        total = 0.0
        for r in range(rows):
            row = numbers(tile + r * TILE * size, TILE, unit)
            for x in range(keys):
                total += row[x]
        place = gradient.total + ((b * job.heads + h) * job.row_tiles + i0 // TILE) * 8
        store(place, load(place, 0.0) + total)
    if gradient.at:
        corner = (gradient.at + load(gradient.item + 4 * b, np.int32(0)) * gradient.b
                  + h * gradient.h + i0 * gradient.n + j0 * gradient.m)
        buffer[:] = 0
        for r in range(rows):
            row = numbers(tile + r * TILE * size, TILE, unit)
            if gradient.n == 0:
                for x in range(keys):
                    buffer[x] += row[x]
            elif gradient.m == 0:
                total = unit - unit
                for x in range(keys):
                    total += row[x]
                place = corner + r * gradient.n
                store(place, load(place, unit) + total)
            else:
                target = numbers(corner + r * gradient.n, keys, unit)
                for x in range(keys):
                    target[x] += row[x]
        if gradient.n == 0:
            target = numbers(corner, keys, unit)
            for x in range(keys):
                target[x] += buffer[x]


@part
def add_to_table(job, b, h, i0, j0, rows, keys, tile, table, unit):
    """Add a tile to the offset table, by distance."""
    size = job.size
    sums = numbers(table + h * job.doffsets_h, job.offsets_width, 0.0)
    for r in range(rows):
        row = numbers(tile + r * TILE * size, TILE, unit)
        first = query_position(job, b, i0 + r) + job.offset_origin
        for x in range(keys):
            column = key_position(job, b, j0 + x) - first
            if 0 <= column < job.offsets_width:
                sums[column] += row[x]
