"""Talking heads: scores mixed across heads before the softmax, weights mixed after it.

A block of a few queries of all heads meets a tile of keys. Scores lie head by head, so that a mix
is a product of its small matrix with long rows:

    products q k^T   (heads of q, rows * 64)   -> w_pre^T  -> scores  (heads, rows * 64)
    scores -> exp(score - lse) -> weights      -> w_post^T -> mixed   (heads of out, rows * 64)

The softmax must be whole before its weights are mixed, so the forward walks its row of tiles twice;
where there is room for a row's weights they wait in scratch, else they are computed again. The
backward needs sum_j p dp of each row and head before the gradients: two walks, too. The second is
laid out in a square of chunks, as in jit/backward.py.
"""

from __future__ import annotations

import math

import numpy as np

from ..compile import kernel, part
from .access import fetch_add, job_at, load, numbers, rounded, store
from .masking import (
    ALL,
    ONE,
    STRAIGHT,
    TRANSPOSED,
    allowed,
    exact_product,
    next_tiles,
    runs_of,
)
from .packing import NOWHERE, TILE, add_to_result
from .vector import (
    differentiate,
    dots,
    exp_rows,
    lane_sums,
    multiply,
    row_dots,
    scale_rows,
    select,
    weigh,
    write_rows,
)

STEP, NOTHING = np.int64(1), np.int64(0)
FLOAT64, FLOAT32 = np.int64(0), np.int64(1)


@part
def block_of(job, task):
    """Return the batch item, the tile of queries and the first row in it of a unit of work."""
    each = TILE // job.talking.rows
    b, block = divmod(task, job.row_tiles * each)
    t, first = divmod(block, each)
    return b, t, first * job.talking.rows


@kernel
def forward(place, queue, units, scratch, unit, operand):
    """Compute out and lse; a unit is a block of queries of all heads."""
    job = job_at(place)
    task = fetch_add(queue, STEP)
    while task < units:
        # the last blocks first: under a causal mask they take longest
        b, t, first = block_of(job, units - 1 - task)
        attend(job, b, t, first, scratch, unit, operand)
        task = fetch_add(queue, STEP)


@part
def attend(job, b, t, first, scratch, unit, operand):
    """Compute out and lse of a block of queries."""
    near, size = job.talking, job.size
    i, strip = t * TILE + first, near.strip * size
    present = min(near.rows, job.n - i)
    rows = min(present, np.int64(load(job.q.lengths + 4 * b, np.int32(0))) - i)
    keys = np.int64(load(job.k.lengths + 4 * b, np.int32(0)))
    key_tiles = -(-keys // TILE) if rows > 0 else NOTHING
    acc, names, words = scratch + near.acc, scratch + near.names, scratch + near.words
    tops, sums, factors = scratch + near.tops, scratch + near.sums, scratch + near.factors
    row_tops = near.heads * near.rows * size
    numbers(tops, near.heads * near.rows, unit)[:] = -math.inf
    numbers(sums, near.heads * near.rows * job.lanes, unit)[:] = 0
    numbers(scratch + near.found, TILE, unit)[:] = 0
    begin, stop = runs_of(job.rows, load(job.layout + 4 * b, np.int32(0)), t)
    run, step, slot = begin, NOTHING, NOTHING
    while True:
        run, step, tile, tiles = next_tiles(job.rows, run, step, stop, key_tiles, STEP, names)
        if tiles == 0:
            break
        count = min(TILE, keys - tile * TILE)
        masked = mask_rows(job, load(names, NOTHING), first, rows, count, words)
        scores = scratch + near.scores + slot * near.heads * strip
        score(job, b, i, rows, tile, scores, scratch, unit, operand)
        for h in range(near.heads):
            weigh(scores + h * strip, TILE, rows, STEP, words if masked else NOWHERE, STEP, NOWHERE,
                  tops + h * near.rows * size, sums + h * near.rows * job.lanes * size,
                  factors + h * near.rows * size, unit)
        if near.slots:
            slot += STEP
            # what these weights are relative to
            so_far = numbers(tops, near.heads * near.rows, unit)
            kept = numbers(tops + slot * row_tops, near.heads * near.rows, unit)
            for x in range(near.heads * near.rows):
                kept[x] = so_far[x]
    lse = scratch + near.row
    finish_sums(job, b, i, present, rows, tops, sums, factors, lse, unit)
    numbers(acc, job.dout.heads * near.rows * job.e_padded, unit)[:] = 0
    run, step, slot = begin, NOTHING, NOTHING
    while True:
        run, step, tile, tiles = next_tiles(job.rows, run, step, stop, key_tiles, STEP, names)
        if tiles == 0:
            break
        count = min(TILE, keys - tile * TILE)
        masked = mask_rows(job, load(names, NOTHING), first, rows, count, words)
        scores = scratch + near.scores + slot * near.heads * strip
        if near.slots:
            slot += STEP
            finish_weights(job, rows, tops + slot * row_tops, lse, scores, factors,
                           scratch + near.found, unit)
        else:
            score(job, b, i, rows, tile, scores, scratch, unit, operand)
            for h in range(near.heads):
                exp_rows(scores + h * strip, TILE, rows, lse + h * near.rows * size, unit)
        mixed = scratch + near.mixed
        mix_weights(job, rows, masked, scores, mixed, words, unit, operand)
        add_values(job, b, rows, tile, count, masked, mixed, words, acc, unit, operand)
    for h in range(job.dout.heads):
        write_rows(acc + h * near.rows * job.e_padded * size, job.e_padded, present, job.e, NOWHERE,
                   job.out.at + b * job.out.b + h * job.out.h + i * job.out.n, job.out.n,
                   job.out.kind, unit)


@part
def finish_weights(job, rows, tops, lse, weights, factors, zeros, unit):
    """Turn weights exp(score - top) into exp(score - lse)."""
    near, count = job.talking, job.talking.heads * job.talking.rows
    shares, before, after = (numbers(factors, count, unit), numbers(tops, count, unit),
                             numbers(lse, count, unit))
    for x in range(count):
        shares[x] = before[x] - after[x]
    exp_rows(factors, TILE, -(-count // TILE), zeros, unit)
    for h in range(near.heads):
        scale_rows(weights + h * near.strip * job.size, TILE, rows, TILE,
                   factors + h * near.rows * job.size, unit)


@part
def mask_rows(job, name, first, rows, count, words):
    """Write the words of rows from `first` on of a tile; return whether any pair is masked."""
    masked = name >= 0 or count < TILE
    for r in range(rows):
        store(words + 8 * r, allowed(job.bits, name, first + r, count) if masked else ALL)
    return masked


@part
def score(job, b, i, rows, tile, scores, scratch, unit, operand):
    """Compute products and, mixed, the scores of a block of queries and a tile of keys."""
    near = job.talking
    products = scratch + near.products
    multiply_heads(job, job.q, job.k, b, i, rows, tile, products, unit, operand)
    # scores_s = sum_h products_h w_pre[h, s]
    multiply(near.heads, rows * TILE, job.q.heads, near.w_pre, STEP, near.heads, products,
             near.strip, scores, near.strip, NOTHING, unit, operand)


@part
def multiply_heads(job, left, right, b, i, rows, tile, target, unit, operand):
    """Multiply rows from `i` on of all heads with a tile of keys, or of values."""
    size, shared = job.size, left.heads // right.heads
    for h in range(left.heads):
        multiply(rows, TILE, left.width,
                 left.rows + ((b * left.heads + h) * job.row_tiles * TILE + i) * left.padded * size,
                 left.padded, STEP,
                 right.columns + ((b * right.heads + h // shared) * job.key_tiles + tile) * TILE
                 * right.width * size, TILE, target + h * job.talking.strip * size, TILE, NOTHING,
                 unit, operand)


@part
def finish_sums(job, b, i, present, rows, tops, sums, totals, shifts, unit):
    """Write the lse of a block of queries, and what is to be subtracted from its scores."""
    near, size = job.talking, job.size
    for h in range(near.heads):
        at = h * near.rows
        lane_sums(sums + at * job.lanes * size, near.rows, totals + at * size, unit)
        for r in range(near.rows):
            total = load(totals + (at + r) * size, unit)
            lse = rounded(-math.inf, unit)
            if r < rows and total != 0:
                lse = load(tops + (at + r) * size, unit) + math.log(total)
            if r < present:
                store(job.lse + ((b * near.heads + h) * job.n + i + r) * size, lse)
            store(shifts + (at + r) * size, lse if lse != -math.inf else rounded(math.inf, unit))


@part
def mix_weights(job, rows, masked, weights, mixed, words, unit, operand):
    """Mix the weights; pairs that are masked stay so, whatever the bias."""
    near = job.talking
    for h in range(job.dout.heads):
        if near.b_post:
            bias = load(near.b_post + h * job.size, unit)
            numbers(mixed + h * near.strip * job.size, rows * TILE, unit)[:] = bias
    # mixed_v = sum_s weights_s w_post[s, v] + b_post[v]
    multiply(job.dout.heads, rows * TILE, near.heads, near.w_post, STEP, job.dout.heads, weights,
             near.strip, mixed, near.strip, np.int64(near.b_post != 0), unit, operand)
    if masked:
        clear_masked(job, job.dout.heads, rows, mixed, words, unit)


@part
def clear_masked(job, heads, rows, tile, words, unit):
    """Put 0 where a pair is masked, for all heads."""
    for h in range(heads):
        for r in range(rows):
            select(tile + (h * job.talking.strip + r * TILE) * job.size, load(words + 8 * r, ONE),
                   0.0, unit)


@part
def add_values(job, b, rows, tile, count, masked, mixed, words, acc, unit, operand):
    """Add to acc the mixed weights times a tile of values."""
    near, size, shared = job.talking, job.size, job.dout.heads // job.v.heads
    for h in range(job.dout.heads):
        at = (b * job.v.heads + h // shared) * job.key_tiles + tile
        values = job.v.rows + at * TILE * job.e_padded * size
        weights = mixed + h * near.strip * size
        target = acc + h * near.rows * job.e_padded * size
        if masked and load(job.v.notes + at, np.uint8(0)) != 0:
            exact_product(job, rows, job.e, weights, TILE, words, 8, STRAIGHT, values, target,
                          job.e_padded, unit, operand)
        else:
            multiply(rows, job.e_padded, count, weights, TILE, STEP, values, job.e_padded, target,
                     job.e_padded, STEP, unit, operand)


@kernel
def means(place, queue, units, scratch, unit, operand):
    """Compute delta = sum_j p dp of each query and head; a unit is a block of queries."""
    job = job_at(place)
    near, size = job.talking, job.size
    words, names = scratch + near.words, scratch + near.names
    scores, dweights = scratch + near.scores, scratch + near.dweights
    found = scratch + near.found
    task = fetch_add(queue, STEP)
    while task < units:
        b, t, first = block_of(job, units - 1 - task)
        i = t * TILE + first
        present = min(near.rows, job.n - i)
        rows = min(present, np.int64(load(job.q.lengths + 4 * b, np.int32(0))) - i)
        keys = np.int64(load(job.k.lengths + 4 * b, np.int32(0)))
        for h in range(near.heads):
            if present > 0:
                delta = near.delta + ((b * near.heads + h) * job.n + i) * size
                numbers(delta, present, unit)[:] = 0
        load_shifts(job, b, i, rows, scratch, unit)
        run, stop = runs_of(job.rows, load(job.layout + 4 * b, np.int32(0)), t)
        key_tiles, step = -(-keys // TILE) if rows > 0 else NOTHING, NOTHING
        while True:
            run, step, tile, tiles = next_tiles(job.rows, run, step, stop, key_tiles, STEP, names)
            if tiles == 0:
                break
            count = min(TILE, keys - tile * TILE)
            masked = mask_rows(job, load(names, NOTHING), first, rows, count, words)
            score(job, b, i, rows, tile, scores, scratch, unit, operand)
            gradients_of_weights(job, b, i, rows, tile, masked, scratch, unit, operand)
            for h in range(near.heads):
                at = h * near.strip * size
                exp_rows(scores + at, TILE, rows, scratch + near.tops + h * near.rows * size, unit)
            if masked:
                clear_masked(job, near.heads, rows, scores, words, unit)
            for h in range(near.heads):
                at = h * near.strip * size
                row_dots(scores + at, dweights + at, TILE, rows, TILE, found, unit)
                delta = near.delta + ((b * near.heads + h) * job.n + i) * size
                new, kept = numbers(found, rows, unit), numbers(delta, rows, unit)
                for r in range(rows):
                    kept[r] += new[r]
        task = fetch_add(queue, STEP)


@part
def load_shifts(job, b, i, rows, scratch, unit):
    """Read what is to be subtracted from the scores of a block, and their means so far."""
    near, size = job.talking, job.size
    for h in range(near.heads):
        for r in range(rows):
            place, at = ((b * near.heads + h) * job.n + i + r) * size, (h * near.rows + r) * size
            lse = load(job.lse + place, unit)
            store(scratch + near.tops + at, lse if lse != -math.inf else rounded(math.inf, unit))
            store(scratch + near.factors + at, load(near.delta + place, unit))


@part
def gradients_of_weights(job, b, i, rows, tile, masked, scratch, unit, operand):
    """Compute the gradients of mixed and of plain weights."""
    near, dmixed = job.talking, scratch + job.talking.dmixed
    # forward: out_v = mixed_v values
    multiply_heads(job, job.dout, job.v, b, i, rows, tile, dmixed, unit, operand)
    if masked:
        clear_masked(job, job.dout.heads, rows, dmixed, scratch + near.words, unit)
    # forward: mixed_v = sum_s weights_s w_post[s, v] + b_post[v]
    multiply(near.heads, rows * TILE, job.dout.heads, near.w_post, job.dout.heads, STEP, dmixed,
             near.strip, scratch + near.dweights, near.strip, NOTHING, unit, operand)


@kernel
def backward(place, queue, units, scratch, unit, operand):
    """Do a phase; a unit is a chunk of keys of a batch item."""
    job = job_at(place)
    near, size = job.talking, job.size
    dk, dv = scratch + near.dk, scratch + near.dv
    numbers(scratch + near.scores + near.heads * near.strip * size, near.strip, unit)[:] = 1
    task = fetch_add(queue, STEP)
    while task < units:
        b, chunk = divmod(task, job.chunks)
        other = (chunk + job.phase) % job.chunks
        rows_first = other * job.row_tiles // job.chunks
        rows_last = (other + 1) * job.row_tiles // job.chunks
        for t in range(chunk * job.key_tiles // job.chunks,
                       (chunk + 1) * job.key_tiles // job.chunks):
            count = min(TILE, np.int64(load(job.k.lengths + 4 * b, np.int32(0))) - t * TILE)
            if column(job, b, t, count, rows_first, rows_last, near.dw + task * near.dw_unit,
                      scratch, unit, operand):
                for g in range(job.k.heads):
                    add_to_result(job.dk, b, g, t * TILE, count,
                                  dk + g * TILE * job.d_padded * size, job.d_padded, job.d, unit)
                for g in range(job.v.heads):
                    add_to_result(job.dv, b, g, t * TILE, count,
                                  dv + g * TILE * job.e_padded * size, job.e_padded, job.e, unit)
        task = fetch_add(queue, STEP)


@part
def column(job, b, t, count, rows_first, rows_last, dw, scratch, unit, operand):
    """Let a tile of keys meet the query tiles `rows_first` to `rows_last`; tell if it met any."""
    near, names = job.talking, scratch + job.talking.names
    queries = np.int64(load(job.q.lengths + 4 * b, np.int32(0)))
    limit = min(rows_last, -(-queries // TILE)) if count > 0 else NOTHING
    run, stop = runs_of(job.columns, load(job.layout + 4 * b, np.int32(0)), t)
    step, met = NOTHING, False
    while True:
        run, step, tile, tiles = next_tiles(job.columns, run, step, stop, limit, STEP, names)
        if tiles == 0:
            return met
        if tile < rows_first:
            continue
        if not met:
            numbers(scratch + near.dk, job.k.heads * TILE * job.d_padded, unit)[:] = 0
            numbers(scratch + near.dv, job.v.heads * TILE * job.e_padded, unit)[:] = 0
            met = True
        rows = min(TILE, queries - tile * TILE)
        for block in range(-(-rows // near.rows)):
            first = block * near.rows
            gradients(job, b, tile, first, min(near.rows, rows - first), t, count,
                      load(names, NOTHING), dw, scratch, unit, operand)


@part
def gradients(job, b, row_tile, first, rows, tile, count, name, dw, scratch, unit, operand):
    """Add what a block of queries and a tile of keys bring to all gradients."""
    near, size, i = job.talking, job.size, row_tile * TILE + first
    words, strip = scratch + near.words, near.strip * size
    products, weights = scratch + near.products, scratch + near.scores
    dscores, mixed, dmixed = (scratch + near.dweights, scratch + near.mixed,
                              scratch + near.dmixed)
    masked = mask_rows(job, name, first, rows, count, words)
    load_shifts(job, b, i, rows, scratch, unit)
    score(job, b, i, rows, tile, weights, scratch, unit, operand)
    gradients_of_weights(job, b, i, rows, tile, masked, scratch, unit, operand)
    # forward: p = exp(score - lse)
    for h in range(near.heads):
        at = h * near.rows * size
        differentiate(weights + h * strip, dscores + h * strip, TILE, rows,
                      words if masked else NOWHERE, scratch + near.tops + at,
                      scratch + near.factors + at, unit)
    mix_weights(job, rows, masked, weights, mixed, words, unit, operand)
    # forward: mixed_v = sum_s weights_s w_post[s, v] + b_post[v]: the bias meets the strip of ones
    add_dots(job, near.heads + STEP, job.dout.heads, rows, weights, dmixed, dw, scratch, unit)
    if masked:
        clear_masked(job, job.q.heads, rows, products, words, unit)
    # forward: scores_s = sum_h products_h w_pre[h, s]
    add_dots(job, job.q.heads, near.heads, rows, products, dscores,
             dw + (near.heads + STEP) * job.dout.heads * 8, scratch, unit)
    dproducts = products
    multiply(job.q.heads, rows * TILE, near.heads, near.w_pre, near.heads, STEP, dscores,
             near.strip, dproducts, near.strip, NOTHING, unit, operand)
    # forward: out_v = mixed_v values
    add_transposed(job, job.dout, b, row_tile, first, rows, count, masked, mixed, words,
                   scratch + near.dv, job.v.heads, unit, operand)
    # forward: products = q k^T
    add_transposed(job, job.q, b, row_tile, first, rows, count, masked, dproducts, words,
                   scratch + near.dk, job.k.heads, unit, operand)
    shared = job.q.heads // job.k.heads
    for h in range(job.q.heads):
        at = (b * job.k.heads + h // shared) * job.key_tiles + tile
        keys = job.k.rows + at * TILE * job.d_padded * size
        dq = near.dq + ((b * job.q.heads + h) * job.row_tiles * TILE + i) * job.d_padded * size
        if masked and load(job.k.notes + at, np.uint8(0)) != 0:
            exact_product(job, rows, job.d, dproducts + h * strip, TILE, words, 8, STRAIGHT, keys,
                          dq, job.d_padded, unit, operand)
        else:
            multiply(rows, job.d_padded, count, dproducts + h * strip, TILE, STEP, keys,
                     job.d_padded, dq, job.d_padded, STEP, unit, operand)


@part
def add_dots(job, rows, columns, queries, left, right, sums, scratch, unit):
    """Add to float64 sums (rows, columns) the products of strips of the left and the right."""
    near, size, found = job.talking, job.size, scratch + job.talking.found
    across = -(-columns // job.lanes) * job.lanes
    dots(rows, columns, queries * TILE, left, near.strip, right, near.strip * size,
         FLOAT64 if size == 8 else FLOAT32, found, across, unit)
    for r in range(rows):
        kept = numbers(sums + r * columns * 8, columns, 0.0)
        new = numbers(found + r * across * size, columns, unit)
        for x in range(columns):
            kept[x] += new[x]


@part
def add_transposed(job, source, b, row_tile, first, rows, count, masked, tile, words, target,
                   groups, unit, operand):
    """Add to each group's target (64, width) the transposed tiles of its heads times source."""
    near, size, shared = job.talking, job.size, source.heads // groups
    for h in range(source.heads):
        at = (b * source.heads + h) * job.row_tiles + row_tile
        x = source.rows + (at * TILE + first) * source.padded * size
        to = target + h // shared * TILE * source.padded * size
        weights = tile + h * near.strip * size
        if masked and load(source.notes + at, np.uint8(0)) != 0:
            exact_product(job, rows, source.width, weights, TILE, words, 8, TRANSPOSED, x, to,
                          source.padded, unit, operand)
        else:
            multiply(count, source.padded, rows, weights, STEP, TILE, x, source.padded, to,
                     source.padded, STEP, unit, operand)
