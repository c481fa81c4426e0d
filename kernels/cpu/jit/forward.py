"""Flash attention, forward: softmax over the tiles that a BlockMask lists, online.

A block of 64 queries of one head of one batch item walks its runs of key tiles, a few tiles at a
time. It keeps of each row the largest score so far (`tops`), the sum of exp(score - top) (`sums`,
lane by lane) and the product of these weights with the values (`acc`):

    keys ->   ..........[tiles]......      scores = q k^T      64 x (64 * tiles), stays in cache
    queries  [block]                       acc   += weights v  64 x E

When a row's largest score grows, what was summed is scaled down to match.

Keys and values are packed beforehand, or, where those of a group fit in the cache beside its
queries, by the thread that needs them (`job.per_group`). Nothing is shared between units of work,
so any number of threads gives the same bits.
"""

from __future__ import annotations

import math

import numpy as np

from ..compile import kernel, part
from .access import fetch_add, job_at, load, numbers, rounded, store
from .masking import (
    STRAIGHT,
    allowed,
    any_named,
    exact_product,
    next_tiles,
    runs_of,
)
from .packing import NOWHERE, TILE, expect_result, pack_tile, put_back, token_at
from .strips import add_seen, multiply_seen
from .terms import add_terms, cap_scores, clear, dropout_row, gate_row
from .vector import (
    enter_tiles,
    lane_sums,
    leave_tiles,
    multiply,
    round_row,
    scale_rows,
    weigh,
)

STEP = np.int64(1)
CLEAN = np.bool_(False)


@kernel
def forward(place, queue, units, scratch, unit, operand):
    """Compute out and lse; a unit is a block of queries, or per_group a group of heads."""
    job = job_at(place)
    shared = job.heads // job.groups
    enter_tiles(unit, operand)
    task = fetch_add(queue, STEP)
    while task < units:
        if job.per_group:
            # items of one source in turn, as their tokens lie side by side
            pair, item = divmod(task, job.q.items)
            b, g = pair // job.groups * job.q.items + item, pair % job.groups
            keys, values = scratch + job.ahead.keys, scratch + job.ahead.values
            strange = pack_group(job, b, g, keys, values, unit, operand)
            for block in range(shared * job.row_tiles):
                h, t = g * shared + block // job.row_tiles, block % job.row_tiles
                attend(job, b, h, t, keys, values, NOWHERE, strange, scratch, unit, operand)
        else:
            # the last blocks first: under a causal mask they take longest
            head, t = divmod(units - 1 - task, job.row_tiles)
            b, h = divmod(head, job.heads)
            first = (b * job.groups + h // shared) * job.key_tiles
            values = job.v.pairs if job.fold > 1 else job.v.rows
            attend(job, b, h, t, job.k.columns + first * TILE * job.d_depth * job.operand,
                   values + first * TILE * job.e_padded * job.operand,
                   job.v.notes + first, CLEAN, scratch, unit, operand)
        task = fetch_add(queue, STEP)
    leave_tiles(unit, operand)


@part
def pack_group(job, b, g, keys, values, unit, operand):
    """Pack the keys and values of a group; return whether a value is not finite."""
    strange = False
    for t in range(job.key_tiles):
        pack_tile(job.k, b, g, t, NOWHERE, keys + t * TILE * job.d_depth * job.operand, NOWHERE,
                  unit, operand)
        v = values + t * TILE * job.e_padded * job.operand
        strange |= pack_tile(job.v, b, g, t, NOWHERE if job.fold > 1 else v, NOWHERE,
                             v if job.fold > 1 else NOWHERE, unit, operand)
    return strange


@part
def attend(job, b, h, t, k_at, v_at, notes, strange_group, scratch, unit, operand):
    """Compute out and lse of a block of queries."""
    size, most, lane = job.size, job.chunk, job.lanes
    width = most * TILE
    q, acc, scores = scratch + job.ahead.q, scratch + job.ahead.acc, scratch + job.ahead.scores
    tops, sums = scratch + job.ahead.tops, scratch + job.ahead.sums
    words, names = scratch + job.ahead.words, scratch + job.ahead.names
    gates = scratch + job.ahead.gates if job.gate.at else NOWHERE
    layout = load(job.layout + 4 * (b * job.heads + h), np.int32(0))
    run, stop = runs_of(job.rows, layout, t)
    if job.out.onto and run == stop:
        return
    numbers(acc, TILE * job.e_padded, unit)[:] = 0
    numbers(tops, TILE, unit)[:] = -math.inf
    numbers(sums, TILE * lane, unit)[:] = 0
    rows = min(np.int64(load(job.q.lengths + 4 * b, np.int32(0))) - t * TILE, TILE)
    keys = np.int64(load(job.k.lengths + 4 * b, np.int32(0)))
    key_tiles = -(-keys // TILE) if rows > 0 else 0
    if rows > 0:
        expect_result(job.out, job.q, b, h, t * TILE, rows, job.e)
        pack_tile(job.q, b, h, t, q, NOWHERE, NOWHERE, unit, operand)
    step = np.int64(0)
    changed = job.softcap > 0 or job.bias.at or job.offsets or job.gate.at
    while True:
        run, step, tile, tiles = next_tiles(job.rows, run, step, stop, key_tiles, most, names)
        if tiles == 0:
            break
        count = min(tiles * TILE, keys - tile * TILE)
        masked = (any_named(names, tiles) or count < tiles * TILE or job.bias.at != 0
                  or job.gate.at != 0)
        if masked:
            for r in range(rows):
                for u in range(tiles):
                    store(words + 8 * (r * most + u),
                          allowed(job.bits, load(names + 8 * u, np.int64(0)), r,
                                  keys - (tile + u) * TILE))
        strange, strips = strange_group, False
        for u in range(tiles):
            columns = k_at + (tile + u) * TILE * job.d_depth * job.operand
            if job.fold == 1 and load(names + 8 * u, np.int64(0)) >= 0:
                strips = True
                multiply_seen(job, rows, job.d_depth, q, job.d_padded, columns, words + 8 * u,
                              8 * most, scores + u * TILE * size, width, unit, operand)
            else:
                multiply(rows, TILE, job.d_depth, q, job.d_padded, 1, columns, TILE * job.fold,
                         scores + u * TILE * size, width, 0, unit, operand)
            strange |= notes != 0 and load(notes + tile + u, np.uint8(0)) != 0
        if changed:
            for r in range(rows):
                change_row(job, b, h, t * TILE + r, tile * TILE, tiles, count,
                           scores + r * width * size, words + 8 * r * most,
                           gates + r * width * size, scratch + job.ahead.row, unit)
        grew = weigh(scores, width, rows, tiles, words if masked else NOWHERE, most, gates, tops,
                     sums, scratch + job.ahead.decays, unit)
        if grew:
            scale_rows(acc, job.e_padded, rows, job.e_padded, scratch + job.ahead.decays, unit)
        if job.threshold:
            kept = numbers(scratch + job.ahead.row, width, unit)
            for r in range(rows):
                dropout_row(job, b, h, t * TILE + r, tile * TILE, count, kept)
                weights = numbers(scores + r * width * size, width, unit)
                for x in range(count):
                    weights[x] *= kept[x]
        v = v_at + tile * TILE * job.e_padded * job.operand
        if strange and masked:
            for u in range(tiles):
                exact_product(job, rows, job.e, scores + u * TILE * size, width, words + 8 * u,
                              8 * most, STRAIGHT, v + u * TILE * job.e_padded * job.operand, acc,
                              job.e_padded, unit, operand)
        elif strips:
            for u in range(tiles):
                add_seen(job, rows, job.e_padded, scores + u * TILE * size, width, words + 8 * u,
                         8 * most, v + u * TILE * job.e_padded * size, acc, unit, operand)
        else:
            if job.fold > 1:
                for r in range(rows):
                    row = scores + r * width * size
                    round_row(row, tiles * TILE, row)
            # beyond the last key are zeros, which pairs of operands may need
            depth = tiles * TILE if job.fold > 1 else count
            multiply(rows, job.e_padded, depth, scores, width * job.fold, 1,
                     v, job.e_padded * job.fold, acc, job.e_padded, 1, unit, operand)
    finish(job, b, h, t, rows, tops, sums, acc, scratch + job.ahead.decays, unit)


@part
def change_row(job, b, h, i, j, tiles, count, scores, words, gates, buffer, unit):
    """Apply all score terms to the row of query `i`, from key `j` on."""
    width = tiles * TILE
    cap_scores(job, scores, width, unit)
    add_terms(job, b, h, i, j, count, scores, words, numbers(buffer, width, unit), unit)
    if job.gate.at:
        gate = numbers(gates, width, unit)
        gate_row(job, b, h, i, j, count, gate)
        clear(words, gate, count, 0.0)
        for x in range(count, width):
            gate[x] = 0


@part
def finish(job, b, h, t, rows, tops, sums, acc, shares, unit):
    """Divide by the sums, let the sink and what was found before join them, write out and lse."""
    size = job.size
    count = min(TILE, job.n - t * TILE)
    b_own = b // job.q.items
    lane_sums(sums, count, shares, unit)
    for r in range(count):
        top, total = load(tops + r * size, unit), load(shares + r * size, unit)
        share, lse = unit - unit, rounded(-math.inf, unit)
        if r < rows and total != 0:
            share, lse = unit / total, top + math.log(total)
        else:
            # a query beyond its length may have been computed along with others, from anything
            numbers(acc + r * job.e_padded * size, job.e_padded, unit)[:] = 0
        if job.sinks:
            sink = load(job.sinks + h * size, unit)
            joint = log_sum(lse, sink)
            share *= share_of(lse, joint, unit)
            lse = joint
        token = token_at(job.q, b, h, t * TILE + r)
        if token >= 0:
            place = job.lse + b_own * job.lse_b + h * job.lse_h + token * size
            if job.out.onto:
                before = load(place, unit)
                joint = log_sum(lse, before)
                # what was found before stands in the memory of out, to which this is added
                store(tops + r * size, share_of(before, joint, unit))
                share *= share_of(lse, joint, unit)
                lse = joint
            store(place, lse)
        store(shares + r * size, share)
    put_back(job.out, job.q, b, h, t * TILE, count, acc, job.e_padded, job.e, shares, tops, unit)


@part
def log_sum(x, y):
    """Return log(exp(x) + exp(y))."""
    most = max(x, y)
    if most == -math.inf:
        return most
    return most + math.log(math.exp(x - most) + math.exp(y - most))


@part
def share_of(lse, joint, unit):
    """Return exp(lse - joint), 0 for an lse of -inf."""
    return unit - unit if lse == -math.inf else rounded(math.exp(lse - joint), unit)
