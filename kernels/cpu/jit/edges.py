"""Softmax over listed keys: each query's row of products, 64 keys at a time, read where they lie.

The heads of a run share a list and a key/value head; they are the rows of a small tile. Forward:
a unit of work is some queries of a run. Backward, by query: scores again, dq, and for each edge
the weight and its score's gradient, which are kept; then by key: dk and dv from what was kept, as
the lists by key tell. Each number is summed by one unit, in the order of the lists.
"""

from __future__ import annotations

import math

import numpy as np

from ..compile import kernel, part
from ..records import EDGES
from .access import fetch_add, load, numbers, record_at, rounded, store
from .packing import NOWHERE, TILE, size_of
from .vector import (
    accumulate_listed,
    convert_rows,
    differentiate,
    dots_listed,
    lane_sums,
    row_dots,
    scale_rows,
    soft_cap,
    weigh,
    write_rows,
)

STEP = np.int64(1)
ONE = np.uint64(1)
NONE = np.uint64(0)
ALL = ~NONE
RUN_BYTES = np.int64(40)
MASKED = -1.0
"""A weight that says that the edge is not there for this head."""

edges_at = record_at(EDGES)


@kernel
def forward(place, queue, units, scratch, unit, operand):
    """Compute out and lse."""
    job = edges_at(place)
    task = fetch_add(queue, STEP)
    while task < units:
        run, chunk = divmod(task, job.chunks)
        for i in range(chunk * job.rows, min((chunk + 1) * job.rows, job.n)):
            attend(job, job.runs + run * RUN_BYTES, i, scratch, unit)
        task = fetch_add(queue, STEP)


@part
def field(run, index):
    """Return one of a run's numbers: item, group, first head, heads, list."""
    return load(run + 8 * index, np.int64(0))


@part
def attend(job, run, i, scratch, unit):
    """Attend to the keys of query `i`."""
    size, shared = job.size, field(run, 3)
    b, h = field(run, 0), field(run, 2)
    acc, scores = scratch + job.at_out, scratch + job.at_scores
    tops, sums = scratch + job.at_tops, scratch + job.at_sums
    decays, shares = scratch + job.at_decays, scratch + job.at_factors
    words = scratch + job.at_words
    place = job.start + 8 * (field(run, 4) * (job.n + 1) + i)
    first, limit = load(place, np.int64(0)), load(place + 8, np.int64(0))
    numbers(tops, shared, unit)[:] = -math.inf
    numbers(sums, shared * job.lanes, unit)[:] = 0
    numbers(acc, shared * job.e_padded, unit)[:] = 0
    read_rows(job.q, b, h, i, shared, job.d, job.d_padded, rounded(job.scale, unit), size,
              scratch + job.at_q, unit)
    v = job.v.at + b * job.v.b + field(run, 1) * job.v.h
    for e in range(first, limit, TILE):
        count = min(limit - e, TILE)
        masked = score(job, run, e, count, scratch, unit)
        if weigh(scores, TILE, shared, STEP, words if masked else NOWHERE, STEP, NOWHERE, tops,
                 sums, decays, unit):
            scale_rows(acc, job.e_padded, shared, job.e_padded, decays, unit)
        add_rows(shared, count, job.e, scores, words, masked, v, job.v, job.key + 4 * e, acc,
                 job.e_padded, size, unit)
    lane_sums(sums, shared, shares, unit)
    for r in range(shared):
        top, total = load(tops + r * size, unit), load(shares + r * size, unit)
        share, lse = unit - unit, rounded(-math.inf, unit)
        if total != 0:
            share, lse = unit / total, top + math.log(total)
        store(shares + r * size, share)
        store(job.lse + ((b * job.heads + h + r) * job.n + i) * size, lse)
    write_rows(acc, job.e_padded, shared, job.e, shares,
               job.out.at + b * job.out.b + h * job.out.h + i * job.out.n, job.out.h,
               job.out.kind, unit)


@part
def read_rows(source, b, h, i, shared, width, padded, scale, size, target, unit):
    """Read row `i` of some heads."""
    step = size if source.kind < 2 else size // 2
    convert_rows(source.at + b * source.b + h * source.h + i * source.n, source.h, step,
                 source.kind, shared, width, padded, scale, target, padded, unit, unit)


@part
def score(job, run, e, count, scratch, unit):
    """Score up to 64 edges from `e` on; tell whether `words` says which of them count."""
    size, shared = job.size, field(run, 3)
    b, h = field(run, 0), field(run, 2)
    scores, words = scratch + job.at_scores, scratch + job.at_words
    dots_listed(shared, count, job.d, scratch + job.at_q, job.d_padded,
                job.k.at + b * job.k.b + field(run, 1) * job.k.h, job.k.n, job.key + 4 * e,
                job.k.kind, scores, TILE, unit)
    if job.softcap > 0:
        for r in range(shared):
            row = scores + r * TILE * size
            soft_cap(row, TILE, rounded(job.softcap, unit), unit)
            copy(row, scratch + job.at_slopes + r * TILE * size, count, unit)
    full = ALL if count == TILE else (ONE << np.uint64(count)) - ONE
    masked = count < TILE
    for r in range(shared):
        word = full
        if job.bias:
            row = numbers(scores + r * TILE * size, count, unit)
            bias = numbers(job.bias + b * job.bias_b + (h + r) * job.bias_h + e * size, count, unit)
            for x in range(count):
                row[x] += bias[x]
            for x in range(count):
                if bias[x] == -math.inf:
                    word &= ~(ONE << np.uint64(x))
            masked |= word != full
        store(words + 8 * r, word)
    return masked


@part
def copy(source, target, count, unit):
    """Copy some numbers."""
    for x in range(count):
        store(target + x * size_of(unit), load(source + x * size_of(unit), unit))


@part
def add_rows(shared, count, width, weights, words, masked, values, source, index, acc, acc_row,
             size, unit):
    """Add weights times listed rows to acc, edges that count alone: others may not be finite."""
    full = ALL if count == TILE else (ONE << np.uint64(count)) - ONE
    whole = True
    if masked:
        for r in range(shared):
            whole &= load(words + 8 * r, ONE) == full
    if whole:
        accumulate_listed(shared, count, width, weights, TILE, values, source.n, index,
                          source.kind, acc, acc_row, unit)
    else:
        for r in range(shared):
            word = load(words + 8 * r, ONE)
            for x in range(count):
                if (word >> np.uint64(x)) & ONE:
                    accumulate_listed(STEP, STEP, width, weights + (r * TILE + x) * size, TILE,
                                      values, source.n, index + 4 * x, source.kind,
                                      acc + r * acc_row * size, acc_row, unit)


@kernel
def by_query(place, queue, units, scratch, unit, operand):
    """Compute dq and dbias, and keep the weights and the gradients of scores."""
    job = edges_at(place)
    task = fetch_add(queue, STEP)
    while task < units:
        run, chunk = divmod(task, job.chunks)
        for i in range(chunk * job.rows, min((chunk + 1) * job.rows, job.n)):
            differentiate_row(job, run, i, scratch, unit)
        task = fetch_add(queue, STEP)


@part
def differentiate_row(job, number, i, scratch, unit):
    """Do one query of a run."""
    run = job.runs + number * RUN_BYTES
    size, shared = job.size, field(run, 3)
    b, g, h = field(run, 0), field(run, 1), field(run, 2)
    q, dout, out = scratch + job.at_q, scratch + job.at_dout, scratch + job.at_out
    scores, dscores = scratch + job.at_scores, scratch + job.at_dscores
    lse, delta = scratch + job.at_tops, scratch + job.at_decays
    words, factors = scratch + job.at_words, scratch + job.at_factors
    place = job.start + 8 * (field(run, 4) * (job.n + 1) + i)
    first, limit = load(place, np.int64(0)), load(place + 8, np.int64(0))
    read_rows(job.q, b, h, i, shared, job.d, job.d_padded, rounded(job.scale, unit), size, q, unit)
    read_rows(job.dout, b, h, i, shared, job.e, job.e_padded, unit, size, dout, unit)
    read_rows(job.out, b, h, i, shared, job.e, job.e_padded, unit, size, out, unit)
    row_dots(dout, out, job.e_padded, shared, job.e_padded, delta, unit)
    numbers(factors, shared, unit)[:] = rounded(job.scale, unit)
    for r in range(shared):
        at = ((b * job.heads + h + r) * job.n + i) * size
        store(lse + r * size, load(job.lse + at, unit))
        if job.dlse:
            store(delta + r * size, load(delta + r * size, unit) - load(job.dlse + at, unit))
    # from here on the memory of out is that of dq
    dq = out
    numbers(dq, shared * job.d_padded, unit)[:] = 0
    k = job.k.at + b * job.k.b + g * job.k.h
    v = job.v.at + b * job.v.b + g * job.v.h
    begin = load(job.start + 8 * field(run, 4) * (job.n + 1), np.int64(0))
    edges = load(job.start + 8 * (field(run, 4) * (job.n + 1) + job.n), np.int64(0)) - begin
    kept = job.kept + (load(job.kept_at + 8 * number, np.int64(0)) + 2 * (first - begin)) * size
    for e in range(first, limit, TILE):
        count = min(limit - e, TILE)
        masked = score(job, run, e, count, scratch, unit)
        for r in range(shared):
            if load(lse + r * size, unit) == -math.inf:
                store(words + 8 * r, NONE)
                masked = True
        # forward: out = p v
        dots_listed(shared, count, job.e, dout, job.e_padded, v, job.v.n, job.key + 4 * e,
                    job.v.kind, dscores, TILE, unit)
        # forward: p = exp(s - lse)
        differentiate(scores, dscores, TILE, shared, words if masked else NOWHERE, lse, delta,
                      unit)
        for r in range(shared):
            ds = numbers(dscores + r * TILE * size, TILE, unit)
            if job.dbias:
                copy(dscores + r * TILE * size,
                     job.dbias + b * job.dbias_b + (h + r) * job.dbias_h + e * size, count, unit)
            if job.softcap > 0:
                # forward: s = cap tanh(raw / cap)
                capped = numbers(scratch + job.at_slopes + r * TILE * size, count, unit)
                for x in range(count):
                    ratio = capped[x] / rounded(job.softcap, unit)
                    if ds[x] != 0:
                        ds[x] *= unit - ratio * ratio
            p = numbers(scores + r * TILE * size, count, unit)
            word = load(words + 8 * r, ONE) if masked else ALL
            for x in range(count):
                at = kept + 2 * (r * edges + x) * size
                weight = p[x]
                if not (word >> np.uint64(x)) & ONE:
                    weight = rounded(MASKED, unit)
                store(at, weight)
                store(at + size, ds[x])
        kept += 2 * count * size
        # forward: raw = scale q k
        if job.d:
            add_rows(shared, count, job.d, dscores, words, masked, k, job.k, job.key + 4 * e, dq,
                     job.d_padded, size, unit)
    if job.d:
        write_rows(dq, job.d_padded, shared, job.d, factors,
                   job.dq.at + b * job.dq.b + h * job.dq.h + i * job.dq.n, job.dq.h, job.dq.kind,
                   unit)


@kernel
def by_key(place, queue, units, scratch, unit, operand):
    """Compute dk and dv."""
    job = edges_at(place)
    lists = numbers(scratch + job.at_list, 2 * TILE, np.int32(0))
    lists[:] = 0
    chunks = -(-job.m // job.rows)
    task = fetch_add(queue, STEP)
    while task < units:
        pair, chunk = divmod(task, chunks)
        first = chunk * job.rows
        gather(job, pair, first, min(job.rows, job.m - first), scratch, unit)
        task = fetch_add(queue, STEP)


@part
def gather(job, pair, first, keys, scratch, unit):
    """Sum up dk and dv of some keys, head by head."""
    size = job.size
    dk, dv, factors = scratch + job.at_dk, scratch + job.at_dv, scratch + job.at_factors
    b, g = divmod(pair, job.groups)
    numbers(dk, keys * job.d_padded, unit)[:] = 0
    numbers(dv, keys * job.e_padded, unit)[:] = 0
    runs = job.pair_runs + 8 * pair
    for number in range(load(runs, np.int64(0)), load(runs + 8, np.int64(0))):
        run = job.runs + number * RUN_BYTES
        lists = job.columns + 8 * field(run, 4) * (job.m + 1)
        edges = load(lists + 8 * job.m, np.int64(0)) - load(lists, np.int64(0))
        kept = job.kept + load(job.kept_at + 8 * number, np.int64(0)) * size
        for r in range(field(run, 3)):
            for j in range(keys):
                place = lists + 8 * (first + j)
                limit = load(place + 8, np.int64(0))
                for e in range(load(place, np.int64(0)), limit, TILE):
                    add_edges(job, b, field(run, 2) + r, e, min(limit - e, TILE), kept,
                              dk + j * job.d_padded * size, dv + j * job.e_padded * size, scratch,
                              unit)
            kept += 2 * edges * size
    numbers(factors, keys, unit)[:] = rounded(job.scale, unit)
    if job.d:
        write_rows(dk, job.d_padded, keys, job.d, factors,
                   job.dk.at + b * job.dk.b + g * job.dk.h + first * job.dk.n, job.dk.n,
                   job.dk.kind, unit)
    write_rows(dv, job.e_padded, keys, job.e, NOWHERE,
               job.dv.at + b * job.dv.b + g * job.dv.h + first * job.dv.n, job.dv.n, job.dv.kind,
               unit)


@part
def add_edges(job, b, h, e, count, kept, dk, dv, scratch, unit):
    """Add what up to 64 edges to one key bring it from one head."""
    size = job.size
    weights, dscores = scratch + job.at_scores, scratch + job.at_dscores
    p, ds = numbers(weights, TILE, unit), numbers(dscores, TILE, unit)
    short = scratch + job.at_list
    found = np.int64(0)
    for x in range(count):
        at = kept + 2 * np.int64(load(job.edge + 4 * (e + x), np.int32(0))) * size
        weight = load(at, unit)
        if weight != MASKED:
            p[found], ds[found] = weight, load(at + size, unit)
            store(short + 4 * found, load(job.query + 4 * (e + x), np.int32(0)))
            found += STEP
    # the whole list goes on with the next key's, which are then fetched ahead
    index = job.query + 4 * e if found == count else short
    # forward: out = p v
    accumulate_listed(STEP, found, job.e, weights, TILE, job.dout.at + b * job.dout.b
                      + h * job.dout.h, job.dout.n, index, job.dout.kind, dv, job.e_padded, unit)
    # forward: raw = scale q k
    if job.d:
        accumulate_listed(STEP, found, job.d, dscores, TILE, job.q.at + b * job.q.b + h * job.q.h,
                          job.q.n, index, job.q.kind, dk, job.d_padded, unit)
