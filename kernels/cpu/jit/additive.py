"""Additive attention: softmax over scores sum_f w_f tanh(a_if + c_jf), online, tile by tile.

The forward is that of jit/forward.py, with this sum in place of a product. The backward is laid
out as in jit/backward.py, in a square of chunks done a diagonal at a time; in it each tanh is
computed once: a row of 64 scores leaves its tanhs, (features, 64), in the nearest cache, where
their gradients meet them.

    t = tanh(a + c)    score = w.t    y = dscore w (1 - t^2)    da += y, dc += y, dw += dscore t
"""

from __future__ import annotations

import math

import numpy as np

from ..compile import kernel, part
from .access import fetch_add, job_at, load, numbers, store
from .forward import finish
from .masking import (
    ALL,
    NONE,
    STRAIGHT,
    TRANSPOSED,
    allowed,
    exact_product,
    next_tiles,
    runs_of,
)
from .packing import NO_TOKEN, NOWHERE, TILE, add_to_result, lse_place, pack_tile, row_token
from .vector import (
    differentiate,
    lane_sums,
    multiply,
    scale_rows,
    tanh_gradients,
    tanh_sums,
    tanh_sums_kept,
    transpose,
    weigh,
)

STEP = np.int64(1)


@kernel
def forward(place, queue, units, scratch, unit, operand):
    """Compute out and lse; a unit is a block of queries."""
    job = job_at(place)
    task = fetch_add(queue, STEP)
    while task < units:
        # the last blocks first: under a causal mask they take longest
        head, t = divmod(units - 1 - task, job.row_tiles)
        b, h = divmod(head, job.heads)
        attend(job, b, h, t, scratch, unit, operand)
        task = fetch_add(queue, STEP)


@part
def attend(job, b, h, t, scratch, unit, operand):
    """Compute out and lse of a block of queries."""
    size, g = job.size, h // (job.heads // job.groups)
    a, acc, scores = scratch + job.ahead.q, scratch + job.ahead.acc, scratch + job.ahead.scores
    tops, sums = scratch + job.ahead.tops, scratch + job.ahead.sums
    decays = scratch + job.ahead.decays
    words, names = scratch + job.ahead.words, scratch + job.ahead.names
    c, v = scratch + job.ahead.keys, scratch + job.ahead.values
    w = job.additive.w + h * job.additive.w_h
    numbers(acc, TILE * job.e_padded, unit)[:] = 0
    numbers(tops, TILE, unit)[:] = -math.inf
    numbers(sums, TILE * job.lanes, unit)[:] = 0
    run, stop = runs_of(job.rows, load(job.layout + 4 * (b * job.heads + h), np.int32(0)), t)
    rows = min(np.int64(load(job.q.lengths + 4 * b, np.int32(0))) - t * TILE, TILE)
    keys = np.int64(load(job.k.lengths + 4 * b, np.int32(0)))
    key_tiles = -(-keys // TILE) if rows > 0 else 0
    if rows > 0:
        pack_tile(job.q, b, h, t, a, NOWHERE, NOWHERE, unit, operand)
    step = np.int64(0)
    while True:
        run, step, tile, tiles = next_tiles(job.rows, run, step, stop, key_tiles, STEP, names)
        if tiles == 0:
            break
        count = min(TILE, keys - tile * TILE)
        name = load(names, np.int64(0))
        masked = name >= 0 or count < TILE
        pack_tile(job.k, b, g, tile, NOWHERE, c, NOWHERE, unit, operand)
        strange = pack_tile(job.v, b, g, tile, v, NOWHERE, NOWHERE, unit, operand)
        for r in range(rows):
            word = allowed(job.bits, name, r, count) if masked else ALL
            store(words + 8 * r, word)
            if word:
                tanh_sums(STEP, job.d, a + r * job.d_padded * size, job.d_padded, c, w,
                          scores + r * TILE * size, TILE, unit)
            else:
                numbers(scores + r * TILE * size, TILE, unit)[:] = 0
        if weigh(scores, TILE, rows, STEP, words if masked else NOWHERE, STEP, NOWHERE, tops, sums,
                 decays, unit):
            scale_rows(acc, job.e_padded, rows, job.e_padded, decays, unit)
        if strange and masked:
            exact_product(job, rows, job.e, scores, TILE, words, 8, STRAIGHT, v, acc, job.e_padded,
                          unit, operand)
        else:
            multiply(rows, job.e_padded, count, scores, TILE, 1, v, job.e_padded, acc,
                     job.e_padded, 1, unit, operand)
    finish(job, b, h, t, rows, tops, sums, acc, decays, unit)


@kernel
def backward(place, queue, units, scratch, unit, operand):
    """Do a phase; a unit is a chunk of keys of a group."""
    job = job_at(place)
    task = fetch_add(queue, STEP)
    while task < units:
        pair, chunk = divmod(task, job.chunks)
        b, g = divmod(pair, job.groups)
        other = (chunk + job.phase) % job.chunks
        rows_first = other * job.row_tiles // job.chunks
        rows_last = (other + 1) * job.row_tiles // job.chunks
        for t in range(chunk * job.key_tiles // job.chunks,
                       (chunk + 1) * job.key_tiles // job.chunks):
            column(job, b, g, t, rows_first, rows_last,
                   job.additive.dw + task * job.additive.dw_unit, scratch, unit, operand)
        task = fetch_add(queue, STEP)


@part
def column(job, b, g, t, rows_first, rows_last, dw, scratch, unit, operand):
    """Let a tile of keys meet the query tiles `rows_first` to `rows_last`."""
    near, shared = job.additive, job.heads // job.groups
    c, v = scratch + near.keys, scratch + near.values
    dc, dv, names = scratch + near.dkeys, scratch + near.dvalues, scratch + near.names
    dw_lanes, totals = scratch + near.dw_lanes, scratch + near.totals
    queries = np.int64(load(job.q.lengths + 4 * b, np.int32(0)))
    count = min(TILE, np.int64(load(job.k.lengths + 4 * b, np.int32(0))) - t * TILE)
    limit = min(rows_last, -(-queries // TILE)) if count > 0 else np.int64(0)
    packed = False
    for r in range(shared):
        h = g * shared + r
        run, stop = runs_of(job.columns, load(job.layout + 4 * (b * job.heads + h), np.int32(0)), t)
        step = np.int64(0)
        numbers(dw_lanes, job.d * job.lanes, unit)[:] = 0
        while True:
            run, step, tile, tiles = next_tiles(job.columns, run, step, stop, limit, STEP, names)
            if tiles == 0:
                break
            if tile < rows_first:
                continue
            if not packed:
                pack_tile(job.k, b, g, t, NOWHERE, c, NOWHERE, unit, operand)
                pack_tile(job.v, b, g, t, NOWHERE, v, NOWHERE, unit, operand)
                numbers(dc, TILE * job.d, unit)[:] = 0
                numbers(dv, TILE * job.e_padded, unit)[:] = 0
                packed = True
            gradients(job, b, h, tile, min(TILE, queries - tile * TILE), count,
                      load(names, np.int64(0)), scratch, unit, operand)
        lane_sums(dw_lanes, job.d, totals, unit)
        sums, found = numbers(dw + r * job.d * 8, job.d, 0.0), numbers(totals, job.d, unit)
        for f in range(job.d):
            sums[f] += found[f]
    if packed:
        rows = scratch + near.dkey_rows
        transpose(dc, TILE, rows, job.d_padded, job.d, TILE, unit)
        add_to_result(job.dk, b, g, t * TILE, count, rows, job.d_padded, job.d, unit)
        add_to_result(job.dv, b, g, t * TILE, count, dv, job.e_padded, job.e, unit)


@part
def gradients(job, b, h, tile, rows, count, name, scratch, unit, operand):
    """Add what a tile of queries and one of keys bring to all gradients."""
    size, near = job.size, job.additive
    a, dout = scratch + near.q, scratch + near.dout
    c, v = scratch + near.keys, scratch + near.values
    weights, dscores, tanhs = scratch + near.scores, scratch + near.dscores, scratch + near.tanhs
    words, shifts, means = scratch + near.words, scratch + near.shifts, scratch + near.means
    w = near.w + h * near.w_h
    masked = name >= 0 or count < TILE
    pack_tile(job.q, b, h, tile, a, NOWHERE, NOWHERE, unit, operand)
    strange = pack_tile(job.dout, b, h, tile, dout, NOWHERE, NOWHERE, unit, operand)
    # forward: out = p v
    multiply(rows, TILE, job.e, dout, job.e_padded, 1, v, TILE, dscores, TILE, 0, unit, operand)
    for r in range(rows):
        token, word = row_token(job.q, b, h, tile * TILE + r, unit), NONE
        if token >= 0:
            word = allowed(job.bits, name, r, count)
            place = lse_place(job.q, b, h, token, unit)
            store(shifts + r * size, load(place, unit))
            store(means + r * size, load(job.delta + place - job.q.lse, unit))
        masked |= token == NO_TOKEN
        store(words + 8 * r, word)
        p, ds = weights + r * TILE * size, dscores + r * TILE * size
        if not word:
            numbers(p, TILE, unit)[:] = 0
            continue
        which = words + 8 * r if masked else NOWHERE
        tanh_sums_kept(job.d, a + r * job.d_padded * size, c, w, tanhs, p, unit)
        # forward: p = exp(score - lse)
        differentiate(p, ds, TILE, STEP, which, shifts + r * size, means + r * size, unit)
        # forward: score = sum_f w_f tanh(a_f + c_f)
        tanh_gradients(job.d, tanhs, ds, w, which,
                       job.dq.at + b * job.dq.b + h * job.dq.h + (tile * TILE + r) * job.dq.n,
                       scratch + near.dkeys, scratch + near.dw_lanes, unit)
    # forward: out = p v
    if strange and masked:
        exact_product(job, rows, job.e, weights, TILE, words, 8, TRANSPOSED, dout,
                      scratch + near.dvalues, job.e_padded, unit, operand)
    else:
        multiply(count, job.e_padded, rows, weights, 1, TILE, dout, job.e_padded,
                 scratch + near.dvalues, job.e_padded, 1, unit, operand)
