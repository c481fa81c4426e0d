"""Linear attention, 64 tokens at a time: features, products and the state stay in the cache.

A unit of work is a segment of the steps of one item and key/value head (see pyattn.engines.linear);
the query heads that share the head take turns at each step. The state before a segment is there
when its unit starts. Tiles of features have a token per column, (F, 64), so that one layout serves
every product: with features for rows to add to a state, with tokens for rows to read it.

    acc = phi_q T;  acc += (phi_q phi_k^T) v where seen;  then T += phi_k^T [v, 1]

The last column of a state, for the denominators, is kept a second time as a row of its own.
"""

from __future__ import annotations

import math

import numpy as np

from ..compile import kernel, part
from ..records import LINEAR
from .access import fetch_add, load, numbers, record_at, rounded, store
from .packing import NOWHERE, TILE, size_of
from .vector import (
    convert_rows,
    decay_pairs,
    dots,
    exp_columns,
    gemm,
    map_features,
    row_dots,
    scale_rows,
    select,
    transpose,
    write_rows,
)

NONE = np.int64(0)
STEP = np.int64(1)
EXP = np.int64(3)
FLOAT32 = np.int64(1)
BLOCK = np.int64(16)
"""Tokens whose pairs are multiplied at a time, each block up to where its last token sees."""
HALF = np.int64(32)
BIT = np.uint64(1)

linear_at = record_at(LINEAR)


@part
def clipped(x, limit):
    """Return x within 0 and `limit`."""
    return min(max(x, NONE), limit)


@part
def step_at(job, b, s):
    """Return a step's first query and their count, first key and their count, and its diagonal."""
    n, m = load(job.q_lengths + 8 * b, NONE), load(job.kv_lengths + 8 * b, NONE)
    offset = load(job.offset + 8 * b, NONE)
    if job.direct:
        return NONE, n, NONE, m, offset if job.causal else m
    if job.causal:
        start = min(NONE, offset) // job.chunk * job.chunk + s * job.chunk
        i, j = clipped(start - offset, n), clipped(start, m)
        return (i, clipped(start + job.chunk - offset, n) - i, j,
                clipped(start + job.chunk, m) - j, i + offset - j)
    before = -(-m // job.chunk)
    if s < before:
        return NONE, NONE, s * job.chunk, min(job.chunk, m - s * job.chunk), NONE
    i = (s - before) * job.chunk
    return i, min(job.chunk, n - i), m, NONE, NONE


@part
def segment_at(job, b, segment):
    """Return the first step of a segment, and that of the next."""
    count = load(job.counts + 8 * b, NONE)
    each = -(-count // job.segments)
    return min(segment * each, count), min((segment + 1) * each, count)


@part
def read_rows(source, b, h, first, count, filled, width, padded, scale, target, unit):
    """Copy rows, and zeros up to `filled` of them; return whether a number is not finite."""
    strange = convert_rows(source.at + b * source.b + h * source.h + first * source.n, source.n,
                           source.step, source.kind, count, width, padded, scale, target, padded,
                           unit, unit)
    convert_rows(source.at, source.n, source.step, source.kind, filled - count, NONE, padded, scale,
                 target + count * padded * size_of(unit), padded, unit, unit)
    return strange != 0


@part
def wide(job, count):
    """Return how many columns of a tile hold `count` tokens."""
    return -(-count // job.lanes) * job.lanes


@part
def read_features(job, source, b, h, first, count, phi, top, scratch, unit):
    """Compute the features of some tokens, (F, 64), and for kind "exp" their stabilisers.

    The tokens themselves, scaled, stay in `at_x`. Returns whether one of them is not finite.
    """
    x, columns = scratch + job.at_x, wide(job, count)
    strange = read_rows(source, b, h, first, count, columns, job.d, job.d_padded,
                        rounded(job.scale, unit), x, unit)
    if job.projection:
        turned = scratch + job.at_columns
        transpose(x, job.d_padded, turned, TILE, columns, job.d, unit)
        gemm(job.f, columns, job.d, job.projection, job.d_padded, STEP, turned, TILE, phi, TILE,
             NONE, unit)
    else:
        transpose(x, job.d_padded, phi, TILE, columns, job.d, unit)
    if job.kind == EXP:
        half = scratch + job.at_found
        row_dots(x, x, job.d_padded, columns, job.d_padded, half, unit)
        exp_columns(phi, job.f, columns, top, unit)
        tops, squares = numbers(top, TILE, unit), numbers(half, columns, unit)
        for r in range(count):
            tops[r] -= squares[r] / 2
        for r in range(count, TILE):
            tops[r] = -math.inf
    else:
        map_features(phi, job.f, columns, job.kind, rounded(job.epsilon, unit), unit)
    return strange


@part
def read_keys(job, b, g, first, count, scratch, unit):
    """Read the keys and values of a step; return whether keys, and values, are not finite."""
    strange_k = read_features(job, job.k, b, g, first, count, scratch + job.at_phi_k,
                              scratch + job.at_top, scratch, unit)
    strange_v = read_rows(job.v, b, g, first, count, wide(job, count), job.e, job.e_padded, unit,
                          scratch + job.at_v, unit)
    share = numbers(scratch + job.at_share, TILE, unit)
    for c in range(TILE):
        share[c] = 1 if c < count else 0
    return strange_k, strange_v


@part
def turn_values(job, count, scratch, unit):
    """Write the values of a step with a token per column, and the ones of the normaliser."""
    columns, turned = wide(job, count), scratch + job.at_v_columns
    transpose(scratch + job.at_v, job.e_padded, turned, TILE, columns, job.e, unit)
    if job.normalize:
        ones = numbers(turned + job.e * TILE * job.size, TILE, unit)
        for c in range(columns):
            ones[c] = 1 if c < count else 0


@part
def weigh_step(job, top, rows, columns, shift, scratch, unit):
    """Work out the factors of a step with kind "exp"; return the stabiliser after it.

    Those are `base`, each query's stabiliser; `before`, what its reading of the state is multiplied
    by; and `share`, what the keys are when they join the state.
    """
    tops = numbers(scratch + job.at_top, TILE, unit)
    base, before = (numbers(scratch + job.at_base, TILE, unit),
                    numbers(scratch + job.at_before, TILE, unit))
    largest, seen = top, NONE
    for r in range(rows):
        limit = min(r + shift + 1, columns)
        while seen < limit:
            largest = max_number(largest, tops[seen])
            seen += 1
        base[r] = finite(largest)
        before[r] = math.exp(top - base[r])
    for r in range(rows, TILE):
        base[r] = before[r] = 0
    after = top
    for c in range(columns):
        after = max_number(after, tops[c])
    share = numbers(scratch + job.at_share, TILE, unit)
    for c in range(TILE):
        share[c] = math.exp(tops[c] - finite(after)) if c < columns else 0
    return after


@part
def max_number(x, y):
    """Return the larger; x if y is NaN."""
    return y if y > x else x


@part
def finite(top):
    """Return a stabiliser that can be subtracted: before the first key it is -inf."""
    return 0.0 if top == -math.inf else top


@part
def scale_all(x, count, factor, unit):
    """Multiply numbers by a factor."""
    if factor != 1:
        row = numbers(x, count, unit)
        for c in range(count):
            row[c] *= factor


@part
def absorb(job, columns, top, after, scratch, unit):
    """Add the keys and values of a step to the state; the values change."""
    size, state, found = job.size, scratch + job.at_state, scratch + job.at_found
    phi, v, share = scratch + job.at_phi_k, scratch + job.at_v, scratch + job.at_share
    if job.kind == EXP:
        kept = rounded(math.exp(top - finite(after)), unit)
        scale_all(state, job.f * job.w_padded, kept, unit)
        scale_all(scratch + job.at_sums, job.f, kept, unit)
        scale_rows(v, job.e_padded, columns, job.e_padded, share, unit)
    gemm(job.f, job.e_padded, columns, phi, TILE, STEP, v, job.e_padded, state, job.w_padded, STEP,
         unit)
    if job.normalize:
        dots(STEP, job.f, columns, share, TILE, phi, TILE * size, FLOAT32, found, job.f, unit)
        sums, more = numbers(scratch + job.at_sums, job.f, unit), numbers(found, job.f, unit)
        last = state + job.e * size
        for f in range(job.f):
            sums[f] += more[f]
            store(last + f * job.w_padded * size, sums[f])


@part
def load_state(job, place, scratch, unit):
    """Bring the state before a segment near."""
    size, total = job.size, job.f * job.w_padded
    state, given = numbers(scratch + job.at_state, total, unit), numbers(place, total, unit)
    for x in range(total):
        state[x] = given[x]
    if job.normalize:
        sums = numbers(scratch + job.at_sums, job.f, unit)
        for f in range(job.f):
            sums[f] = load(place + (f * job.w_padded + job.e) * size, unit)


@part
def keep_state(job, place, scratch, unit):
    """Write the state to where that of a segment is kept."""
    total = job.f * job.w_padded
    state, kept = numbers(scratch + job.at_state, total, unit), numbers(place, total, unit)
    for x in range(total):
        kept[x] = state[x]


@part
def state_place(job, base, unit_number):
    """Return where the state of a unit's segment is."""
    return base + unit_number * job.f * job.w_padded * job.size


@part
def top_place(job, pair, s):
    """Return where the stabiliser before a step is."""
    return job.tops + (pair * job.tops_row + s) * job.size


@part
def mask_pairs(tile, rows, columns, shift, size, unit):
    """Make zeros of what the queries of a step do not see."""
    for r in range(rows):
        limit = clipped(r + shift + 1, columns)
        if limit < TILE:
            select(tile + r * TILE * size, (BIT << np.uint64(limit)) - BIT, unit - unit, unit)


@part
def multiply_pairs(job, rows, columns, shift, depth, a, a_row, a_depth, b, tile, scratch, unit):
    """Write the products of a step's queries with the keys that they see; zeros for the others."""
    size = job.size
    for r in range(NONE, rows, HALF):
        height = min(HALF, rows - r)
        across = wide(job, clipped(r + height + shift, columns))
        gemm(height, across, depth, a + r * a_row * size, a_row, a_depth, b, TILE,
             tile + r * TILE * size, TILE, NONE, unit)
    if job.kind == EXP:
        decay_pairs(tile, rows, wide(job, columns), scratch + job.at_top, scratch + job.at_base,
                    unit)
    mask_pairs(tile, rows, columns, shift, size, unit)


@kernel
def sums(place, queue, units, scratch, unit, operand):
    """Compute the state that each segment makes of its own keys, but for the last."""
    job = linear_at(place)
    task = fetch_add(queue, STEP)
    while task < units:
        pair, segment = divmod(task, job.segments)
        b, g = divmod(pair, job.groups)
        first, last = segment_at(job, b, segment)
        if segment + 1 < job.segments and first < last:
            own = state_place(job, job.state, task + 1)
            load_state(job, own, scratch, unit)
            top = rounded(-math.inf, unit)
            for s in range(first, last):
                _, _, j, columns, _ = step_at(job, b, s)
                if columns:
                    read_keys(job, b, g, j, columns, scratch, unit)
                    after = top
                    if job.kind == EXP:
                        after = weigh_step(job, top, NONE, columns, NONE, scratch, unit)
                    absorb(job, columns, top, after, scratch, unit)
                    top = after
            keep_state(job, own, scratch, unit)
            if job.kind == EXP:
                store(top_place(job, pair, last), top)
        task = fetch_add(queue, STEP)


@kernel
def forward(place, queue, units, scratch, unit, operand):
    """Compute out, the denominators, and the state after the last key."""
    job = linear_at(place)
    task = fetch_add(queue, STEP)
    while task < units:
        pair, segment = divmod(task, job.segments)
        b, g = divmod(pair, job.groups)
        first, last = segment_at(job, b, segment)
        own = state_place(job, job.state, task)
        load_state(job, own, scratch, unit)
        top = load(top_place(job, pair, first), unit)
        some = job.given != 0 or segment > 0
        shared = job.heads // job.groups
        for s in range(first, last):
            i, rows, j, columns, shift = step_at(job, b, s)
            strange = False
            if columns:
                _, strange = read_keys(job, b, g, j, columns, scratch, unit)
            after = top
            if job.kind == EXP:
                after = weigh_step(job, top, rows, columns, shift, scratch, unit)
            if rows:
                for h in range(g * shared, (g + 1) * shared):
                    attend(job, b, h, i, rows, columns, shift, some, strange, scratch, unit)
            if columns:
                absorb(job, columns, top, after, scratch, unit)
                some, top = True, after
        if segment + 1 == job.segments:
            keep_state(job, own, scratch, unit)
            store(top_place(job, pair, load(job.counts + 8 * b, NONE)), top)
        task = fetch_add(queue, STEP)


@part
def attend(job, b, h, i, rows, columns, shift, some, strange, scratch, unit):
    """Attend the queries of one head in a step."""
    size, acc, phi = job.size, scratch + job.at_out, scratch + job.at_phi_q
    den, before = scratch + job.at_den, scratch + job.at_before
    read_features(job, job.q, b, h, i, rows, phi, scratch + job.at_delta, scratch, unit)
    dens = numbers(den, TILE, unit)
    dens[:] = 0
    if some:
        gemm(rows, job.e_padded, job.f, phi, STEP, TILE, scratch + job.at_state, job.w_padded, acc,
             job.e_padded, NONE, unit)
        if job.normalize:
            gemm(STEP, wide(job, rows), job.f, scratch + job.at_sums, NONE, STEP, phi, TILE, den,
                 TILE, NONE, unit)
        if job.kind == EXP:
            scale_rows(acc, job.e_padded, rows, job.e_padded, before, unit)
            shares = numbers(before, TILE, unit)
            for r in range(rows):
                dens[r] *= shares[r]
    else:
        numbers(acc, rows * job.e_padded, unit)[:] = 0
    if columns:
        a, found = scratch + job.at_a, scratch + job.at_found
        multiply_pairs(job, rows, columns, shift, job.f, phi, STEP, TILE, scratch + job.at_phi_k, a,
                       scratch, unit)
        # values that are not finite are not to be multiplied by zeros
        block = STEP if strange else BLOCK
        for r in range(NONE, rows, block):
            height = min(block, rows - r)
            gemm(height, job.e_padded, clipped(r + height + shift, columns), a + r * TILE * size,
                 TILE, STEP, scratch + job.at_v, job.e_padded, acc + r * job.e_padded * size,
                 job.e_padded, STEP, unit)
        if job.normalize:
            dots(STEP, rows, columns, job.ones, TILE, a, TILE * size, FLOAT32, found,
                 TILE, unit)
            more = numbers(found, TILE, unit)
            for r in range(rows):
                dens[r] += more[r]
    factors = NOWHERE
    if job.normalize:
        factors = scratch + job.at_delta
        each = numbers(factors, TILE, unit)
        kept = job.den + ((b * job.heads + h) * job.n + i) * size
        for r in range(rows):
            total = dens[r]
            # an empty row stays one
            if abs(total) <= job.least:
                total = unit - unit
                numbers(acc + r * job.e_padded * size, job.e_padded, unit)[:] = 0
                each[r] = 0
            else:
                total += rounded(job.added, unit)
                each[r] = unit / total
            store(kept + r * size, total)
    write_rows(acc, job.e_padded, rows, job.e, factors,
               job.out.at + b * job.out.b + h * job.out.h + i * job.out.n, job.out.n, job.out.kind,
               unit)
