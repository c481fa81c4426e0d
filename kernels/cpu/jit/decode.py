"""Few queries against a long cache: keys and values are read where they lie, once.

The queries of all heads of a group, at most a tile's worth, are the rows of one block. Its keys
are split among units of work, each of which leaves its own `tops`, `sums` and `acc` (as in
forward.py) in a part of memory; `join` puts the parts of a group together in order.
"""

from __future__ import annotations

import math

import numpy as np

from ..compile import kernel, part
from .access import fetch_add, job_at, load, numbers, rounded, store
from .forward import change_row, finish
from .masking import ALL, ONE, allowed, any_named, next_tiles, runs_of
from .packing import NOWHERE, TILE
from .terms import dropout_row
from .vector import accumulate_rows, convert_rows, dots, scale_rows, weigh

STEP = np.int64(1)


@kernel
def decode(place, queue, units, scratch, unit, operand):
    """Attend to a split of a group's keys."""
    job = job_at(place)
    task = fetch_add(queue, STEP)
    while task < units:
        pair, split = divmod(task, job.splits)
        # a group that is not split needs no memory that outlasts it
        part_at = job.parts + task * job.part_bytes if job.parts else scratch + job.ahead.part
        attend_split(job, pair // job.groups, pair % job.groups, split, part_at, scratch, unit)
        if not job.parts:
            finish_group(job, pair, part_at, scratch, unit)
        task = fetch_add(queue, STEP)


@part
def attend_split(job, b, g, split, part_at, scratch, unit):
    """Compute the part of one split."""
    size, most, shared = job.size, job.chunk, job.heads // job.groups
    width, rows = most * TILE, shared * job.n
    q, scores = scratch + job.ahead.q, scratch + job.ahead.scores
    words, names = scratch + job.ahead.words, scratch + job.ahead.names
    decays = scratch + job.ahead.decays
    gates = scratch + job.ahead.gates if job.gate.at else NOWHERE
    kept = numbers(scratch + job.ahead.row, width, unit)
    tops = part_at
    sums = tops + rows * size
    acc = sums + rows * job.lanes * size
    numbers(tops, rows, unit)[:] = -math.inf
    numbers(sums, rows * (job.lanes + job.e_padded), unit)[:] = 0
    keys = np.int64(load(job.k.lengths + 4 * b, np.int32(0)))
    for s in range(shared):
        h = g * shared + s
        convert_rows(job.q.at + b * job.q.b + h * job.q.h, job.q.n, job.q.d, job.q.kind, job.n,
                     job.d, job.d_padded, load(job.q.scale + h * size, unit),
                     q + s * job.n * job.d_padded * size, job.d_padded, unit, unit)
    k_at = job.k.at + b * job.k.b + g * job.k.h
    v_at = job.v.at + b * job.v.b + g * job.v.h
    first = split * job.key_tiles // job.splits
    limit = min((split + 1) * job.key_tiles // job.splits, -(-keys // TILE))
    changed = job.softcap > 0 or job.bias.at or job.offsets or job.gate.at
    layout = load(job.layout + 4 * (b * job.heads + g * shared), np.int32(0))
    run, stop = runs_of(job.rows, layout, 0)
    step = np.int64(0)
    while True:
        run, step, tile, tiles = next_tiles(job.rows, run, step, stop, limit, most, names)
        if tiles == 0:
            break
        passed = min(max(first - tile, 0), tiles)
        tile, tiles, named = tile + passed, tiles - passed, names + 8 * passed
        if tiles == 0:
            continue
        j = tile * TILE
        count = min(tiles * TILE, keys - j)
        masked = (any_named(named, tiles) or count < tiles * TILE or job.bias.at != 0
                  or job.gate.at != 0)
        dots(rows, count, job.d, q, job.d_padded, k_at + j * job.k.n, job.k.n, job.k.kind, scores,
             width, unit)
        if masked:
            for r in range(rows):
                for u in range(tiles):
                    name = load(named + 8 * u, np.int64(0))
                    store(words + 8 * (r * most + u),
                          allowed(job.bits, name, r % job.n, keys - (tile + u) * TILE))
        if changed:
            for r in range(rows):
                h, i = g * shared + r // job.n, r % job.n
                change_row(job, b, h, i, j, tiles, count, scores + r * width * size,
                           words + 8 * r * most, gates + r * width * size,
                           scratch + job.ahead.row, unit)
        grew = weigh(scores, width, rows, tiles, words if masked else NOWHERE, most, gates, tops,
                     sums, decays, unit)
        if grew:
            scale_rows(acc, job.e_padded, rows, job.e_padded, decays, unit)
        if job.threshold:
            for r in range(rows):
                dropout_row(job, b, g * shared + r // job.n, r % job.n, j, count, kept)
                weights = numbers(scores + r * width * size, width, unit)
                for x in range(count):
                    weights[x] *= kept[x]
        if not masked:
            accumulate_rows(rows, count, job.e, scores, width, v_at + j * job.v.n, job.v.n,
                            job.v.kind, acc, job.e_padded, unit)
        else:
            for u in range(tiles):
                add_values(job, rows, min(TILE, count - u * TILE), scores + u * TILE * size, width,
                           words + 8 * u, 8 * most, v_at + (j + u * TILE) * job.v.n, acc, unit)


@part
def add_values(job, rows, keys, weights, weights_row, words, words_row, values, acc, unit):
    """Add weights @ values of a tile to acc, allowed pairs alone: others may not be finite."""
    full = ALL if keys == TILE else (ONE << np.uint64(keys)) - ONE
    whole = True
    for r in range(rows):
        whole = whole and load(words + r * words_row, ONE) == full
    if whole:
        accumulate_rows(rows, keys, job.e, weights, weights_row, values, job.v.n, job.v.kind, acc,
                        job.e_padded, unit)
    else:
        for r in range(rows):
            word = load(words + r * words_row, ONE)
            for j in range(keys):
                if (word >> np.uint64(j)) & ONE:
                    accumulate_rows(STEP, STEP, job.e, weights + (r * weights_row + j) * job.size,
                                    weights_row, values + j * job.v.n, job.v.n, job.v.kind,
                                    acc + r * job.e_padded * job.size, job.e_padded, unit)


@kernel
def join(place, queue, units, scratch, unit, operand):
    """Join the parts of a group and write out and lse."""
    job = job_at(place)
    rows = job.heads // job.groups * job.n
    task = fetch_add(queue, STEP)
    while task < units:
        first = job.parts + task * job.splits * job.part_bytes
        for split in range(1, job.splits):
            add_part(job, rows, first, first + split * job.part_bytes, unit)
        finish_group(job, task, first, scratch, unit)
        task = fetch_add(queue, STEP)


@part
def finish_group(job, pair, part_at, scratch, unit):
    """Write out and lse of a group from its one part."""
    size, shared = job.size, job.heads // job.groups
    sums = part_at + shared * job.n * size
    acc = sums + shared * job.n * job.lanes * size
    b, g = divmod(pair, job.groups)
    alive = min(np.int64(load(job.q.lengths + 4 * b, np.int32(0))), job.n)
    for s in range(shared):
        r = s * job.n
        finish(job, b, g * shared + s, 0, alive, part_at + r * size,
               sums + r * job.lanes * size, acc + r * job.e_padded * size,
               scratch + job.ahead.decays, unit)


@part
def add_part(job, rows, first, other, unit):
    """Add a part to the first one."""
    size, lanes, e = job.size, job.lanes, job.e_padded
    tops, more_tops = numbers(first, rows, unit), numbers(other, rows, unit)
    for r in range(rows):
        top = max(tops[r], more_tops[r])
        if top == -math.inf:
            continue
        mine = rounded(math.exp(np.float64(tops[r]) - np.float64(top)), unit)
        others = rounded(math.exp(np.float64(more_tops[r]) - np.float64(top)), unit)
        tops[r] = top
        for start, wide in ((rows + r * lanes, lanes), (rows * (1 + lanes) + r * e, e)):
            sums = numbers(first + start * size, wide, unit)
            more = numbers(other + start * size, wide, unit)
            for x in range(wide):
                sums[x] = sums[x] * mine + more[x] * others
