"""Flash attention, backward: the weights are computed again, tile by tile, from lse.

    weights p = gate * exp(score - lse)      dscore = p * (dout v^T - delta)
    dv += p^T dout      dk += dscore^T q     dq += dscore k

A tile of 64 keys walks its column of query tiles, through all heads of the group, with its dk and
dv at hand. Every tile adds to a dq that other key tiles add to as well, so the work is laid out as
a square of chunks of keys and chunks of queries, done a diagonal at a time:

    queries ->  0 1 2 3        In phase p, key chunk c meets query chunk (c + p) mod chunks.
    keys  0     0 1 2 3        No two units of a phase share a row or a column of the square, so
          1     3 0 1 2        each owns what it adds to, and every sum has one order, however
          2     2 3 0 1        many threads there are.
          3     1 2 3 0

Where there are groups enough there is one chunk, and the whole backward is one phase. If moreover
they are small, what is packed of a group's queries never leaves the cache (`job.per_pair`).

A bias or gate that is broadcast ties (batch, group) pairs together: those that add to the same
numbers belong to one `piece`, which takes them in order, or have copies of them to add to. Each
gradient is kept in its term's own shape, summed over the axes that it was broadcast along; where
that leaves neither queries nor keys it is a sum per (batch, head) and chunk. The offset table is
summed in float64, a copy per piece and chunk, and so is the table of a gate; a gate in blocks,
which may reach across chunks, has a copy per chunk of keys.
"""

from __future__ import annotations

import math

import numpy as np

from ..compile import kernel, part
from .access import delta_at, fetch_add, job_at, load, numbers, rounded, store
from .masking import (
    NONE,
    ONE,
    STRAIGHT,
    TRANSPOSED,
    allowed,
    exact_product,
    next_tiles,
    runs_of,
)
from .packing import (
    NO_TOKEN,
    NOWHERE,
    TILE,
    convert_strip,
    expect_result,
    lse_place,
    pack_tile,
    put_back,
    row_token,
)
from .strips import WORD, add_seen, add_seen_transposed, multiply_seen
from .terms import (
    add_terms,
    cap_scores,
    clear,
    dropout_row,
    gate_row,
    key_position,
    query_position,
)
from .vector import (
    convert_rows,
    differentiate,
    dots,
    enter_tiles,
    exp_rows,
    leave_tiles,
    multiply,
    pair_rounded,
    round_row,
    row_dots,
    select,
)

STEP, NOTHING = np.int64(1), np.int64(0)


@kernel
def prepare(place, queue, units, scratch, unit, operand):
    """Pack blocks of queries with what belongs to them, and clear the sums of dq."""
    job = job_at(place)
    task = fetch_add(queue, STEP)
    while task < units:
        head, t = divmod(task, job.row_tiles)
        b, h = divmod(head, job.heads)
        prepare_tile(job, b, h, t, NOWHERE, NOTHING, unit, operand)
        task = fetch_add(queue, STEP)


@kernel
def backward(place, queue, units, scratch, unit, operand):
    """Do a phase; a unit is a chunk of keys of a piece."""
    job = job_at(place)
    shared = job.heads // job.groups
    enter_tiles(unit, operand)
    task = fetch_add(queue, STEP)
    while task < units:
        piece, chunk = divmod(task, job.chunks)
        other = (chunk + job.phase) % job.chunks
        rows_first = other * job.row_tiles // job.chunks
        rows_last = (other + 1) * job.row_tiles // job.chunks
        copy = load(job.piece_slice + 8 * piece, np.int64(0))
        for pair in range(load(job.piece_start + 8 * piece, np.int64(0)),
                          load(job.piece_start + 8 * piece + 8, np.int64(0))):
            b, g = divmod(load(job.pairs + 8 * pair, np.int64(0)), job.groups)
            space, first = NOWHERE, NOTHING
            if job.per_pair:
                space = scratch + job.back.packed
                first = (b * job.heads + g * shared) * job.row_tiles
            if job.chunks == 1:
                for block in range(shared * job.row_tiles):
                    h, t = g * shared + block // job.row_tiles, block % job.row_tiles
                    prepare_tile(job, b, h, t, space, first, unit, operand)
            for t in range(chunk * job.key_tiles // job.chunks,
                           (chunk + 1) * job.key_tiles // job.chunks):
                column(job, b, g, t, chunk, rows_first, rows_last, copy, task, space, first,
                       scratch, unit, operand)
            if job.chunks == 1:
                for block in range(shared * job.row_tiles):
                    h, t = g * shared + block // job.row_tiles, block % job.row_tiles
                    finish_tile(job, b, h, t, space, first, scratch, unit)
        task = fetch_add(queue, STEP)
    leave_tiles(unit, operand)


@kernel
def finish(place, queue, units, scratch, unit, operand):
    """Write dq and the gradient of the scale."""
    job = job_at(place)
    task = fetch_add(queue, STEP)
    while task < units:
        head, t = divmod(task, job.row_tiles)
        b, h = divmod(head, job.heads)
        finish_tile(job, b, h, t, NOWHERE, NOTHING, scratch, unit)
        task = fetch_add(queue, STEP)


@kernel
def delta(place, queue, units, scratch, unit, operand):
    """Compute rowsum(dout * out) - dlse, and 0 in rows that see no key; a unit is TILE rows."""
    job = delta_at(place)
    size, blocks = job.size, -(-job.n // TILE)
    tile = TILE * job.e_padded * size
    dout, out, products = scratch, scratch + tile, scratch + 2 * tile
    one = rounded(1.0, unit)
    task = fetch_add(queue, STEP)
    while task < units:
        head, t = divmod(task, blocks)
        b, h = divmod(head, job.heads)
        rows = min(TILE, job.n - t * TILE)
        convert_rows(job.dout + b * job.dout_b + h * job.dout_h + t * TILE * job.dout_n, job.dout_n,
                     job.dout_e, job.kind, rows, job.e, job.e_padded, one, dout, job.e_padded,
                     unit, unit)
        convert_rows(job.out + b * job.out_b + h * job.out_h + t * TILE * job.out_n, job.out_n,
                     job.out_e, job.kind, rows, job.e, job.e_padded, one, out, job.e_padded,
                     unit, unit)
        row_dots(dout, out, job.e_padded, rows, job.e_padded, products, unit)
        for r in range(rows):
            place = (head * job.n + t * TILE + r) * size
            value = load(products + r * size, unit)
            if job.dlse:
                value -= load(job.dlse + place, unit)
            seen = load(job.lse + place, unit) != -math.inf
            store(job.delta + place, value if seen else unit - unit)
        task = fetch_add(queue, STEP)


@part
def prepare_tile(job, b, h, t, space, first, unit, operand):
    """Pack a block of queries; rows that see no key get a shift that makes their weights 0.

    Packed tiles lie in `space`, the one with number `first` at its beginning.
    """
    tile = (b * job.heads + h) * job.row_tiles + t - first
    q = space + tile * TILE * job.d_padded * job.operand
    dout = space + tile * TILE * job.e_padded * job.operand
    pairs = job.fold > 1
    note = pack_tile(job.q, b, h, t, job.q.rows + q, NOWHERE,
                     job.q.pairs + q if pairs else NOWHERE, unit, operand)
    store(space + job.q.notes + tile, np.uint8(note))
    note = pack_tile(job.dout, b, h, t, job.dout.rows + dout, NOWHERE,
                     job.dout.pairs + dout if pairs else NOWHERE, unit, operand)
    store(space + job.dout.notes + tile, np.uint8(note))
    sums = space + job.dq_sums + tile * TILE * job.d_padded * job.size
    numbers(sums, TILE * job.d_padded, unit)[:] = 0
    row = space + tile * TILE * job.size
    shifts, means = numbers(job.shifts + row, TILE, unit), numbers(job.means + row, TILE, unit)
    rows = min(np.int64(load(job.q.lengths + 4 * b, np.int32(0))), job.n) - t * TILE
    for r in range(TILE):
        shifts[r], means[r] = math.inf, 0
        token = row_token(job.q, b, h, t * TILE + r, unit) if r < rows else NO_TOKEN
        if token >= 0:
            place = lse_place(job.q, b, h, token, unit)
            shifts[r], means[r] = load(place, unit), load(job.delta + place - job.q.lse, unit)


@part
def finish_tile(job, b, h, t, space, first, scratch, unit):
    """Write a block's dq, and the sum of dscore * (q.k) = q.dq before dq is scaled."""
    size, one = job.size, rounded(1.0, unit)
    scale = load(job.q.scale + h * size, unit)
    tile = (b * job.heads + h) * job.row_tiles + t
    rows = min(TILE, job.n - t * TILE)
    live = min(rows, np.int64(load(job.q.lengths + 4 * b, np.int32(0))) - t * TILE)
    sums = space + job.dq_sums + (tile - first) * TILE * job.d_padded * size
    q = scratch + job.back.dk
    products, factors = scratch + job.back.row, scratch + job.back.kept
    dscale = 0.0
    expect_result(job.dq, job.q, b, h, t * TILE, rows, job.d)
    if live > 0:
        convert_strip(job.q, b, h, t, 0, job.d, job.d_padded, one, q, job.d_padded, unit, unit)
        row_dots(sums, q, job.d_padded, live, job.d_padded, products, unit)
    for r in range(rows):
        alive = r < live and row_token(job.q, b, h, t * TILE + r, unit) >= 0
        if alive:
            product = load(products + r * size, unit)
            # a row that sees no key may hold anything, and its lse may be a sink
            if product - product == 0 or any_number(sums + r * job.d_padded * size, job.d, unit):
                dscale += np.float64(product)
        store(factors + r * size, scale if alive else unit - unit)
    put_back(job.dq, job.q, b, h, t * TILE, rows, sums, job.d_padded, job.d, factors,
             NOWHERE, unit)
    store(job.dscale + tile * 8, dscale)


@part
def any_number(place, count, unit):
    """Return whether any of `count` numbers is not 0."""
    found = False
    for x in numbers(place, count, unit):
        found |= x != 0
    return found


@part
def column(job, b, g, t, chunk, rows_first, rows_last, copy, task, space, first, scratch, unit,
           operand):
    """Let a tile of keys meet the query tiles `rows_first` to `rows_last`."""
    size, each, shared = job.size, job.operand, job.heads // job.groups
    k_rows, k_columns = scratch + job.back.k_rows, scratch + job.back.k_columns
    k_pairs = scratch + job.back.k_pairs if job.fold > 1 else k_rows
    v_columns, names = scratch + job.back.v_columns, scratch + job.back.names
    dk, dv = scratch + job.back.dk, scratch + job.back.dv
    weights, dscores = scratch + job.back.weights, scratch + job.back.dscores
    words, turned = scratch + job.back.words, scratch + job.back.operand
    queries = np.int64(load(job.q.lengths + 4 * b, np.int32(0)))
    count = min(TILE, np.int64(load(job.k.lengths + 4 * b, np.int32(0))) - t * TILE)
    limit = min(rows_last, -(-queries // TILE)) if count > 0 else np.int64(0)
    numbers(dk, TILE * job.d_padded, unit)[:] = 0
    numbers(dv, TILE * job.e_padded, unit)[:] = 0
    k_at = job.k.at + b * job.k.b + g * job.k.h + t * TILE * job.k.n
    strange_k, packed = False, False
    for h in range(g * shared, (g + 1) * shared):
        head = b * job.heads + h
        run, stop = runs_of(job.columns, load(job.layout + 4 * head, np.int32(0)), t)
        step = np.int64(0)
        while True:
            run, step, tile, tiles = next_tiles(job.columns, run, step, stop, limit, STEP, names)
            if tiles == 0:
                break
            if tile < rows_first:
                continue
            if not packed:
                strange_k = pack_tile(job.k, b, g, t, k_rows, k_columns,
                                      k_pairs if job.fold > 1 else NOWHERE, unit, operand)
                pack_tile(job.v, b, g, t, NOWHERE, v_columns, NOWHERE, unit, operand)
                expect_result(job.dk, job.k, b, g, t * TILE, count, job.d)
                expect_result(job.dv, job.v, b, g, t * TILE, count, job.e)
                packed = True
            rows = min(TILE, queries - tile * TILE)
            place = head * job.row_tiles + tile - first
            at_q = space + place * TILE * job.d_padded * each
            at_dout = space + place * TILE * job.e_padded * each
            q, dout = job.q.rows + at_q, job.dout.rows + at_dout
            q_pairs = job.q.pairs + at_q if job.fold > 1 else q
            dout_pairs = job.dout.pairs + at_dout if job.fold > 1 else dout
            # what lies beyond the last query or key are zeros that pairs of operands may need
            depth, met = (TILE, TILE) if job.fold > 1 else (rows, count)
            name = load(names, np.int64(0))
            masked = name >= 0 or count < TILE or job.bias.at != 0 or job.gate.at != 0
            if masked:
                for r in range(depth):
                    store(words + WORD * r,
                          allowed(job.bits, name, r, count) if r < rows else NONE)
            strips = name >= 0 and job.fold == 1
            if job.short:
                # what the forward did, to the bit
                dots(rows, count, job.d, q, job.d_padded, k_at, job.k.n, job.k.kind, weights, TILE,
                     unit)
            elif strips:
                multiply_seen(job, rows, job.d_depth, q, job.d_padded, k_columns, words, WORD,
                              weights, TILE, unit, operand)
            else:
                multiply(depth, TILE, job.d_depth, q, job.d_padded, 1, k_columns, TILE * job.fold,
                         weights, TILE, 0, unit, operand)
            if strips:
                multiply_seen(job, rows, job.e_depth, dout, job.e_padded, v_columns, words, WORD,
                              dscores, TILE, unit, operand)
            else:
                multiply(depth, TILE, job.e_depth, dout, job.e_padded, 1, v_columns,
                         TILE * job.fold, dscores, TILE, 0, unit, operand)
            row = space + place * TILE * size
            gradient_tile(job, b, h, tile, t, row, rows, depth, count, masked, chunk, copy, task,
                          scratch, unit)
            # dv += p^T dout
            exact = masked and load(space + job.dout.notes + place, np.uint8(0)) != 0
            add_weighted(job, rows, depth, met, weights, words, strips, exact, dout_pairs, job.e,
                         job.e_padded, dv, turned, unit, operand)
            # dk += dscore^T q
            exact = masked and load(space + job.q.notes + place, np.uint8(0)) != 0
            add_weighted(job, rows, depth, met, dscores, words, strips, exact, q_pairs, job.d,
                         job.d_padded, dk, turned, unit, operand)
            # dq += dscore k
            dq = space + job.dq_sums + place * TILE * job.d_padded * size
            if masked and strange_k:
                exact_product(job, rows, job.d, dscores, TILE, words, 8, STRAIGHT, k_pairs, dq,
                              job.d_padded, unit, operand)
            elif strips:
                add_seen(job, rows, job.d_padded, dscores, TILE, words, WORD, k_pairs, dq, unit,
                         operand)
            else:
                if job.fold > 1:
                    for r in range(depth):
                        row = dscores + r * TILE * size
                        round_row(row, TILE, row)
                multiply(rows, job.d_padded, met, dscores, TILE * job.fold, 1, k_pairs,
                         job.d_padded * job.fold, dq, job.d_padded, 1, unit, operand)
    write_tile(job, job.k, b, g, t, dk, job.d, job.d_padded, job.dk_sums, job.dk, unit)
    write_tile(job, job.v, b, g, t, dv, job.e, job.e_padded, job.dv_sums, job.dv, unit)


@part
def add_weighted(job, rows, depth, met, tile, words, strips, exact, source, width, padded, target,
                 turned, unit, operand):
    """Add tile^T @ source to target as `add_transposed` does, or by the words of the `rows`.

    That is done strip by strip, or pair by pair if it must be exact.
    """
    if exact:
        exact_product(job, rows, width, tile, TILE, words, 8, TRANSPOSED, source, target, padded,
                      unit, operand)
    elif strips:
        add_seen_transposed(job, rows, padded, tile, words, source, target, unit, operand)
    else:
        add_transposed(job, depth, met, tile, source, padded, target, turned, unit, operand)


@part
def add_transposed(job, depth, met, tile, source, padded, target, turned, unit, operand):
    """Add tile^T @ source to target, for `depth` rows and the first `met` columns of the tile.

    `source` is packed as a product over its rows takes it, and `turned` is where bfloat16 has room
    for the transpose.
    """
    if job.fold > 1:
        pair_rounded(tile, TILE, depth, TILE, turned, TILE)
        multiply(TILE, padded, depth, turned, TILE, 1, source, padded * job.fold, target, padded, 1,
                 unit, operand)
    else:
        multiply(met, padded, depth, tile, 1, TILE, source, padded, target, padded, 1, unit,
                 operand)


@part
def write_tile(job, pack, b, g, t, tile, width, padded, sums, result, unit):
    """Write a tile of dk or dv, or until the last phase add it to what earlier phases left."""
    keys, in_place = min(TILE, job.m - t * TILE), sums == result.at
    first = (b * job.groups + g) * job.m + t * TILE
    if job.chunks > 1:
        for r in range(keys):
            new = numbers(tile + r * padded * job.size, width, unit)
            kept = numbers(sums + (first + r) * width * job.size, width, unit)
            if job.phase > 0 or (in_place and result.onto):
                for x in range(width):
                    new[x] += kept[x]
            for x in range(width):
                kept[x] = new[x]
    if job.phase == job.chunks - 1 and not in_place:
        put_back(result, pack, b, g, t * TILE, keys, tile, padded, width, NOWHERE, NOWHERE, unit)


@part
def gradient_tile(job, b, h, row_tile, key_tile, at, rows, depth, keys, masked, chunk, copy, task,
                  scratch, unit):
    """Turn products into a tile's weights, as they meet v, and the gradients of its products q.k.

    They lie in scratch as `weights` and `dscores`, and as `words` the rows' words, which count if
    some pairs may be `masked`. The gradients of the terms are added to theirs. What belongs to rows
    lies at `at`.
    """
    size = job.size
    i0, j0 = row_tile * TILE, key_tile * TILE
    weights, dscores = scratch + job.back.weights, scratch + job.back.dscores
    words = scratch + job.back.words
    buffer = numbers(scratch + job.back.row, TILE, unit)
    if job.bias.at or job.offsets:
        for r in range(rows if job.softcap == 0 else 0):
            add_terms(job, b, h, i0 + r, j0, keys, weights + r * TILE * size, words + 8 * r, buffer,
                      unit)
    if job.softcap > 0 or job.gate.at or job.threshold:
        change_rows(job, b, h, i0, j0, rows, depth, keys, masked, at, scratch, unit)
    else:
        differentiate(weights, dscores, TILE, depth, words if masked else NOWHERE,
                      job.shifts + at, job.means + at, unit)
    add_gradient(job, job.dbias, b, h, i0, j0, rows, keys, chunk, copy, dscores, buffer, unit)
    if job.gate.at:
        dgates = scratch + job.back.dgates
        add_gradient(job, job.dgate, b, h, i0, j0, rows, keys, chunk, copy, dgates, buffer, unit)
        if job.dgate_table.at:
            add_to_table(job, job.dgate_table, job.gate_width, b, h, i0, j0, rows, keys, dgates,
                         task, unit)
    if job.doffsets.at:
        add_to_table(job, job.doffsets, job.offsets_width, b, h, i0, j0, rows, keys, dscores, task,
                     unit)
    if job.softcap > 0:
        for r in range(rows):
            row = r * TILE * size
            ds = numbers(dscores + row, TILE, unit)
            slope = numbers(scratch + job.back.slopes + row, TILE, unit)
            for x in range(TILE):
                ds[x] *= slope[x]
            if masked:
                select(dscores + row, load(words + 8 * r, ONE), 0.0, unit)


@part
def change_rows(job, b, h, i0, j0, rows, depth, keys, masked, at, scratch, unit):
    """Do what `differentiate` does where there is a softcap, a gate or dropout."""
    size = job.size
    weights, dscores = scratch + job.back.weights, scratch + job.back.dscores
    words = scratch + job.back.words
    buffer = numbers(scratch + job.back.row, TILE, unit)
    kept = numbers(scratch + job.back.kept, TILE, unit)
    if job.softcap > 0:
        for r in range(rows):
            row = weights + r * TILE * size
            cap_scores(job, row, TILE, unit)
            p = numbers(row, TILE, unit)
            slope = numbers(scratch + job.back.slopes + r * TILE * size, TILE, unit)
            for x in range(TILE):
                tanh = p[x] / job.softcap
                slope[x] = 1 - tanh * tanh
            if job.bias.at or job.offsets:
                add_terms(job, b, h, i0 + r, j0, keys, row, words + 8 * r, buffer, unit)
    exp_rows(weights, TILE, depth, job.shifts + at, unit)
    for r in range(depth):
        i, word = i0 + r, words + 8 * r
        row = r * TILE * size
        mean = load(job.means + at + r * size, unit)
        p, ds = numbers(weights + row, TILE, unit), numbers(dscores + row, TILE, unit)
        if job.threshold and r < rows:
            dropout_row(job, b, h, i, j0, keys, kept)
            for x in range(keys):
                ds[x] *= kept[x]
        for x in range(TILE):
            ds[x] -= mean
        if job.gate.at and r < rows:
            dgate_at = scratch + job.back.dgates + row
            dgate = numbers(dgate_at, TILE, unit)
            gate_row(job, b, h, i, j0, keys, buffer)
            for x in range(keys):
                dgate[x] = p[x] * ds[x]
                p[x] *= buffer[x]
            if job.ramp > 0:
                # forward: gate = clip((ramp + span - distance) / ramp, 0, 1)
                for x in range(keys):
                    dgate[x] = dgate[x] / job.ramp if 0 < buffer[x] < 1 else 0.0
            # a row without a finite score adds nothing, whatever it meets
            alive = load(job.shifts + at + r * size, unit) != math.inf
            select(dgate_at, load(word, ONE) if alive else NONE, 0.0, unit)
            # a closed gate masks for all but itself: its p may be 0 * inf
            clear(word, buffer, keys, 0.0)
        for x in range(TILE):
            ds[x] *= p[x]
        if job.threshold and r < rows:
            for x in range(keys):
                p[x] *= kept[x]
        if masked:
            select(weights + row, load(word, ONE), 0.0, unit)
            select(dscores + row, load(word, ONE), 0.0, unit)


@part
def add_gradient(job, gradient, b, h, i0, j0, rows, keys, chunk, copy, tile, buffer, unit):
    """Add a tile to a term's gradient, summed over the axes that the term lacks."""
    size = job.size
    if gradient.total:
        total = 0.0
        for r in range(rows):
            row = numbers(tile + r * TILE * size, TILE, unit)
            for x in range(keys):
                total += row[x]
        place = gradient.total + ((b * job.heads + h) * job.chunks + chunk) * 8
        store(place, load(place, 0.0) + total)
    if gradient.chunk:
        add_blocks(job, gradient, b, h, i0, j0, rows, keys, chunk, copy, tile, unit)
    elif gradient.at:
        corner = (gradient.at + copy * gradient.copy
                  + load(gradient.item + 4 * b, np.int32(0)) * gradient.b
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
def add_blocks(job, gradient, b, h, i0, j0, rows, keys, chunk, copy, tile, unit):
    """Add a tile to the gradient of a gate in blocks, which may reach across tiles and chunks."""
    block = job.gate_block
    corner = (gradient.at + copy * gradient.copy + chunk * gradient.chunk
              + load(gradient.item + 4 * b, np.int32(0)) * gradient.b + h * gradient.h)
    for r in range(rows):
        row = numbers(tile + r * TILE * job.size, TILE, unit)
        line, x = corner + (i0 + r) // block * gradient.n, NOTHING
        while x < keys:
            column = (j0 + x) // block
            stop, total = min(keys, (column + 1) * block - j0), 0.0
            while x < stop:
                total += row[x]
                x += 1
            place = line + column * gradient.m
            store(place, load(place, 0.0) + total)


@part
def add_to_table(job, gradient, width, b, h, i0, j0, rows, keys, tile, task, unit):
    """Add a tile to a table's gradient, by distance."""
    size = job.size
    sums = numbers(gradient.at + task * gradient.unit + h % gradient.rows * gradient.h, width, 0.0)
    for r in range(rows):
        row = numbers(tile + r * TILE * size, TILE, unit)
        first = query_position(job, b, i0 + r) + job.offset_origin
        for x in range(keys):
            column = key_position(job, b, j0 + x) - first
            if 0 <= column < width:
                sums[column] += row[x]
