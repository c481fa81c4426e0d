"""Softmax over listed blocks of keys: every token of every group of heads has its own list.

A tile has as many rows whatever the number of heads: tokens that list the same block are gathered.
The R heads of a token in a group are R rows; the rows of a chunk of tokens lie together, token by
token, and each block of keys meets those that list it, up to 64 rows at a time:

    token 3  [r0 r1]                        block 5 is listed by tokens 3, 4, 9:
    token 4  [r0 r1]    gathered tile       rows 3.0 3.1 4.0 4.1 9.0 9.1, scores of 6 x 64,
    ...                                     then what is summed goes back to these rows
    token 9  [r0 r1]

Forward: a unit of work is a chunk of tokens, which owns its rows' `acc`, `sums` and `tops` (see
forward.py). Rows of tokens that follow one another need no gathering and stay where they are.

Backward: a tile of keys owns its dk and dv, a row its dq; so key blocks and tokens are cut into
chunks that meet a diagonal at a time, as in backward.py. To bound the memory that packed rows take,
this is done for a range of tokens after another, a `round`.
"""

from __future__ import annotations

import math

import numpy as np

from ..compile import kernel, part
from .access import fetch_add, job_at, load, numbers, prefetch, rounded, store
from .backward import add_transposed
from .masking import NONE, ONE, STRAIGHT, TRANSPOSED, allowed, exact_product
from .packing import LINE, NOWHERE, TILE, lse_place, pack_tile, size_of
from .terms import cap_scores
from .vector import (
    convert_rows,
    differentiate,
    enter_tiles,
    lane_sums,
    leave_tiles,
    multiply,
    pair_rows,
    round_row,
    scale_rows,
    select,
    weigh,
    write_rows,
)

STEP, NOTHING = np.int64(1), np.int64(0)
PAIRED, SIDE = np.int64(32), np.int64(16)
"""What a product of bfloat16 takes as its depth comes in multiples of the first, and the rows that
it writes may be rounded up to the second."""
DIRECT = np.int64(9)
"""From so many heads on, the rows of a token alone are enough for a product over what is theirs."""
NO_NAME = np.int64(-1)


@part
def lower_bound(tokens, low, high, token):
    """Return the first entry from `low` on, below `high`, whose token is not below `token`."""
    while low < high:
        middle = (low + high) // 2
        if np.int64(load(tokens + 4 * middle, np.int32(0))) < token:
            low = middle + 1
        else:
            high = middle
    return low


@part
def who_lists(lists, line, block, first, last):
    """Return the entries of a block whose tokens lie between `first` and `last`."""
    place = lists.start + 8 * (line * (lists.blocks + 1) + block)
    low, high = load(place, np.int64(0)), load(place + 8, np.int64(0))
    low = lower_bound(lists.token, low, high, first)
    return low, lower_bound(lists.token, low, high, last)


@part
def keys_of(job, b, block, tile):
    """Return the first key of a tile and how many keys it has, 0 or less beyond the length."""
    lists = job.lists
    inside = (tile - block * lists.parts) * lists.width
    first = block * lists.block_size + inside
    return first, min(lists.width, lists.block_size - inside,
                      np.int64(load(lists.lengths + 4 * b, np.int32(0))) - first)


@part
def token_of(lists, entry):
    """Return the token of an entry."""
    return np.int64(load(lists.token + 4 * entry, np.int32(0)))


@part
def run_length(lists, entry, end, most):
    """Return how many tokens, one at least, follow one another from an entry on."""
    first, count = token_of(lists, entry), STEP
    while count < most and entry + count < end and token_of(lists, entry + count) == first + count:
        count += 1
    return count


@part
def next_rows(lists, shared, entry, head, rows, base, places):
    """Write the numbers of `rows` rows from a head of an entry on; return where the next one is.

    Row `head` of token `base + i` has number ``i * shared + head``. The last thing returned is
    whether the numbers follow one another.
    """
    start = (token_of(lists, entry) - base) * shared + head
    r, row, together = NOTHING, start, True
    while r < rows:
        row = (token_of(lists, entry) - base) * shared + head
        together = together and row == start + r
        many = min(shared - head, rows - r)
        for x in range(many):
            store(places + 8 * (r + x), row + x)
        r, head = r + many, head + many
        if head == shared:
            entry, head = entry + 1, NOTHING
    return entry, head, together


@part
def expect(target, places, rows, nbytes):
    """Have rows of `nbytes` that lie apart brought near, while something else is computed."""
    for r in range(rows):
        row = target + load(places + 8 * r, np.int64(0)) * nbytes
        for line in range(row, row + nbytes, LINE):
            prefetch(line)


@part
def gather(source, places, rows, width, target, like):
    """Copy rows of `width` numbers that lie apart."""
    size = size_of(like)
    for r in range(rows):
        into = numbers(target + r * width * size, width, like)
        row = numbers(source + load(places + 8 * r, np.int64(0)) * width * size, width, like)
        for x in range(width):
            into[x] = row[x]


@part
def limits(job, b, first_key, keys, places, rows, shared, base, words):
    """Write which keys each row may see, as words; return whether any is hidden."""
    offset = np.int64(load(job.lists.offset + 4 * b, np.int32(0))) + base
    hidden = keys < TILE
    if job.lists.causal:
        lowest = load(places, np.int64(0)) // shared + offset
        hidden = hidden or lowest < first_key + keys - 1
    if hidden:
        for r in range(rows):
            seen = keys
            if job.lists.causal:
                position = load(places + 8 * r, np.int64(0)) // shared + offset
                seen = max(NOTHING, min(keys, position + 1 - first_key))
            store(words + 8 * r, allowed(NOWHERE, NO_NAME, NOTHING, seen))
    return hidden


@kernel
def forward(place, queue, units, scratch, unit, operand):
    """Compute out and lse; a unit is a chunk of tokens of a group."""
    job = job_at(place)
    chunks = -(-job.n // job.lists.chunk)
    enter_tiles(unit, operand)
    task = fetch_add(queue, STEP)
    while task < units:
        line, chunk = divmod(task, chunks)
        first = chunk * job.lists.chunk
        attend(job, line, first, min(first + job.lists.chunk, job.n), scratch, unit, operand)
        task = fetch_add(queue, STEP)
    leave_tiles(unit, operand)


@part
def attend(job, line, first, last, scratch, unit, operand):
    """Compute out and lse of a chunk of tokens."""
    size, each, near = job.size, job.operand, job.near
    shared, lists = job.heads // job.groups, job.lists
    b, g = divmod(line, job.groups)
    q_all, acc_all = scratch + near.q, scratch + near.acc
    sums_all, tops_all = scratch + near.sums, scratch + near.tops
    count = last - first
    live = min(count, np.int64(load(job.q.lengths + 4 * b, np.int32(0))) - first)
    for r in range(shared if live > 0 else 0):
        h = g * shared + r
        convert_rows(job.q.at + b * job.q.b + h * job.q.h + first * job.q.n, job.q.n,
                     job.q.d, job.q.kind, live, job.d, job.d_padded,
                     load(job.q.scale + h * size, unit), q_all + r * job.d_padded * each,
                     shared * job.d_padded, unit, operand)
    numbers(acc_all, count * shared * job.e_padded, unit)[:] = 0
    numbers(sums_all, count * shared * job.lanes, unit)[:] = 0
    numbers(tops_all, count * shared, unit)[:] = -math.inf
    for block in range(lists.blocks if live > 0 else 0):
        low, high = who_lists(lists, line, block, first, last)
        for tile in range(block * lists.parts, (block + 1) * lists.parts if low < high else 0):
            first_key, keys = keys_of(job, b, block, tile)
            if keys > 0:
                meet(job, b, line * job.key_tiles + tile, first_key, keys, low, high, shared, first,
                     scratch, unit, operand)
    for r in range(shared):
        finish_head(job, b, g * shared + r, r, shared, first, count, scratch, unit)


@part
def meet(job, b, tile, first_key, keys, low, high, shared, base, scratch, unit, operand):
    """Let a tile of keys meet the rows of the entries `low` to `high` of a chunk."""
    size, each, near = job.size, job.operand, job.near
    places, scores, words = scratch + near.places, scratch + near.scores, scratch + near.words
    decays, product = scratch + near.decays, scratch + near.product
    k = job.k.columns + tile * TILE * job.d_depth * each
    v = (job.v.pairs if job.fold > 1 else job.v.rows) + tile * TILE * job.e_padded * each
    wide = min(TILE, -(-keys // job.lanes) * job.lanes)
    strange = load(job.v.notes + tile, np.uint8(0)) != 0
    direct = shared >= DIRECT and (job.fold == 1 or shared % SIDE == 0)
    left, entry, head = (high - low) * shared, low, NOTHING
    while left > 0:
        rows = min(left, TILE)
        if direct and shared >= TILE:
            rows = min(rows, shared - head)
        elif direct:
            rows = run_length(job.lists, entry, high, TILE // shared) * shared
        left -= rows
        entry, head, together = next_rows(job.lists, shared, entry, head, rows, base, places)
        together = together and (job.fold == 1 or rows % SIDE == 0)
        row = load(places, np.int64(0))
        q, acc = scratch + near.q + row * job.d_padded * each, scratch + near.acc
        tops, sums = scratch + near.tops + row * size, scratch + near.sums + row * job.lanes * size
        if together:
            acc += row * job.e_padded * size
        else:
            q, tops, sums = scratch + near.rows, scratch + near.row_tops, scratch + near.row_sums
            gather(scratch + near.q, places, rows, job.d_padded, q, operand)
            gather(scratch + near.tops, places, rows, STEP, tops, unit)
            gather(scratch + near.sums, places, rows, job.lanes, sums, unit)
            expect(acc, places, rows, job.e_padded * size)
        masked = limits(job, b, first_key, keys, places, rows, shared, base, words)
        multiply(rows, wide, job.d_depth, q, job.d_padded, 1, k, TILE * job.fold, scores, TILE, 0,
                 unit, operand)
        cap_scores(job, scores, rows * TILE, unit)
        grew = weigh(scores, TILE, rows, STEP, words if masked else NOWHERE, STEP, NOWHERE, tops,
                     sums, decays, unit)
        target = acc if together else product
        if together and grew:
            scale_rows(acc, job.e_padded, rows, job.e_padded, decays, unit)
        if strange and masked:
            if not together:
                numbers(product, rows * job.e_padded, unit)[:] = 0
            exact_product(job, rows, job.e, scores, TILE, words, 8, STRAIGHT, v, target,
                          job.e_padded, unit, operand)
        else:
            if job.fold > 1:
                for r in range(rows):
                    row = scores + r * TILE * size
                    round_row(row, TILE, row)
            depth = TILE if job.fold > 1 else keys
            multiply(rows, job.e_padded, depth, scores, TILE * job.fold, 1, v,
                     job.e_padded * job.fold, target, job.e_padded, np.int64(together), unit,
                     operand)
        if not together:
            put_sums(job, rows, places, scratch, unit)


@part
def put_sums(job, rows, places, scratch, unit):
    """Bring what is summed of rows that lie apart up to date."""
    size, near = job.size, job.near
    for r in range(rows):
        row = load(places + 8 * r, np.int64(0))
        store(scratch + near.tops + row * size, load(scratch + near.row_tops + r * size, unit))
        kept = numbers(scratch + near.sums + row * job.lanes * size, job.lanes, unit)
        new = numbers(scratch + near.row_sums + r * job.lanes * size, job.lanes, unit)
        for x in range(job.lanes):
            kept[x] = new[x]
        decay = load(scratch + near.decays + r * size, unit)
        acc = numbers(scratch + near.acc + row * job.e_padded * size, job.e_padded, unit)
        new = numbers(scratch + near.product + r * job.e_padded * size, job.e_padded, unit)
        for x in range(job.e_padded):
            acc[x] = acc[x] * decay + new[x]


@part
def finish_head(job, b, h, r, shared, first, count, scratch, unit):
    """Divide the rows of a head by their sums, write its out and lse."""
    size, near = job.size, job.near
    sums, totals = scratch + near.row_sums, scratch + near.decays
    shares = numbers(scratch + near.shares, TILE, unit)
    for start in range(0, count, TILE):
        rows = min(TILE, count - start)
        for x in range(rows):
            row = (start + x) * shared + r
            kept = numbers(scratch + near.sums + row * job.lanes * size, job.lanes, unit)
            own = numbers(sums + x * job.lanes * size, job.lanes, unit)
            for lane in range(job.lanes):
                own[lane] = kept[lane]
        lane_sums(sums, rows, totals, unit)
        for x in range(rows):
            row = (start + x) * shared + r
            total = load(totals + x * size, unit)
            lse = -math.inf
            shares[x] = 0
            if total != 0:
                lse = load(scratch + near.tops + row * size, unit) + math.log(np.float64(total))
                shares[x] = 1 / total
            else:
                # a row of no finite score may have met a value that is not finite
                numbers(scratch + near.acc + row * job.e_padded * size, job.e_padded, unit)[:] = 0
            store(job.lse + b * job.lse_b + h * job.lse_h + (first + start + x) * size,
                  rounded(lse, unit))
        write_rows(scratch + near.acc + (start * shared + r) * job.e_padded * size,
                   shared * job.e_padded, rows, job.e, scratch + near.shares,
                   job.out.at + b * job.out.b + h * job.out.h + (first + start) * job.out.n,
                   job.out.n, job.out.kind, unit)


@kernel
def prepare(place, queue, units, scratch, unit, operand):
    """Pack rows of a round with what belongs to them, and clear their dq; a unit is TILE tokens."""
    job = job_at(place)
    shared, held = job.heads // job.groups, job.lists.last - job.lists.first
    tiles = -(-held // TILE)
    task = fetch_add(queue, STEP)
    while task < units:
        line, t = divmod(task, tiles)
        b, g = divmod(line, job.groups)
        prepare_tokens(job, b, g, line * held + t * TILE, job.lists.first + t * TILE,
                       min(TILE, held - t * TILE), shared, task, unit, operand)
        task = fetch_add(queue, STEP)


@part
def prepare_tokens(job, b, g, at, first, count, shared, note, unit, operand):
    """Pack the rows of `count` tokens from `first` on as the rows of place `at` on."""
    size, each = job.size, job.operand
    strange_q, strange_dout = False, False
    for r in range(shared):
        h, row = g * shared + r, at * shared + r
        q, dout = job.q.rows + row * job.d_padded * each, job.dout.rows + row * job.e_padded * each
        strange_q |= convert_rows(
            job.q.at + b * job.q.b + h * job.q.h + first * job.q.n, job.q.n, job.q.d,
            job.q.kind, count, job.d, job.d_padded, load(job.q.scale + h * size, unit), q,
            shared * job.d_padded, unit, operand) != 0
        strange_dout |= convert_rows(
            job.dout.at + b * job.dout.b + h * job.dout.h + first * job.dout.n, job.dout.n,
            job.dout.d, job.dout.kind, count, job.e, job.e_padded, rounded(1.0, unit), dout,
            shared * job.e_padded, unit, operand) != 0
        for x in range(count):
            lse_at = lse_place(job.q, b, h, first + x, unit)
            shift = load(lse_at, unit)
            mean = load(job.delta + lse_at - job.q.lse, unit)
            if shift == -math.inf:
                # nothing that such a row holds may be read
                shift, mean = -shift, unit - unit
                numbers(q + x * shared * job.d_padded * each, job.d_padded, operand)[:] = 0
                numbers(dout + x * shared * job.e_padded * each, job.e_padded, operand)[:] = 0
            store(job.shifts + (row + x * shared) * size, shift)
            store(job.means + (row + x * shared) * size, mean)
    numbers(job.dq_sums + at * shared * job.d_padded * size, count * shared * job.d_padded,
            unit)[:] = 0
    store(job.q.notes + note, np.uint8(strange_q))
    store(job.dout.notes + note, np.uint8(strange_dout))


@kernel
def backward(place, queue, units, scratch, unit, operand):
    """Do a phase of a round; a unit is a chunk of key blocks of a group."""
    job = job_at(place)
    held = job.lists.last - job.lists.first
    enter_tiles(unit, operand)
    task = fetch_add(queue, STEP)
    while task < units:
        line, chunk = divmod(task, job.chunks)
        other = (chunk + job.phase) % job.chunks
        first = job.lists.first + other * held // job.chunks
        last = job.lists.first + (other + 1) * held // job.chunks
        for block in range(chunk * job.lists.blocks // job.chunks,
                           (chunk + 1) * job.lists.blocks // job.chunks):
            low, high = who_lists(job.lists, line, block, first, last)
            for tile in range(block * job.lists.parts,
                              (block + 1) * job.lists.parts if low < high else 0):
                column(job, line, block, tile, low, high, scratch, unit, operand)
        task = fetch_add(queue, STEP)
    leave_tiles(unit, operand)


@part
def column(job, line, block, tile, low, high, scratch, unit, operand):
    """Let a tile of keys meet the rows of the entries `low` to `high`."""
    size, each, far, lists = job.size, job.operand, job.far, job.lists
    shared, held = job.heads // job.groups, lists.last - lists.first
    b, g = divmod(line, job.groups)
    first_key, keys = keys_of(job, b, block, tile)
    if keys <= 0:
        return
    k_rows, k_columns = scratch + far.k_rows, scratch + far.k_columns
    k_pairs = scratch + far.k_pairs if job.fold > 1 else k_rows
    v_columns, words = scratch + far.v_columns, scratch + far.words
    weights, dscores = scratch + far.weights, scratch + far.dscores
    strange_k = pack_tile(job.k, b, g, tile, k_rows, k_columns,
                          k_pairs if job.fold > 1 else NOWHERE, unit, operand)
    pack_tile(job.v, b, g, tile, NOWHERE, v_columns, NOWHERE, unit, operand)
    dk = job.dk_sums + (line * job.key_tiles + tile) * TILE * job.d_padded * size
    dv = job.dv_sums + (line * job.key_tiles + tile) * TILE * job.e_padded * size
    wide = min(TILE, -(-keys // job.lanes) * job.lanes)
    met = TILE if job.fold > 1 else keys
    left, entry, head = (high - low) * shared, low, NOTHING
    while left > 0:
        rows = min(left, TILE)
        left -= rows
        depth = rows if job.fold == 1 else -(-rows // PAIRED) * PAIRED
        places = scratch + far.places
        entry, head, together = next_rows(lists, shared, entry, head, rows, lists.first, places)
        masked = limits(job, b, first_key, keys, places, rows, shared, lists.first, words)
        for r in range(rows, depth if masked else rows):
            store(words + 8 * r, NONE)
        strange_q, strange_dout = False, False
        if masked:
            for r in range(rows):
                note = (line * -(-held // TILE)
                        + load(places + 8 * r, np.int64(0)) // shared // TILE)
                strange_q |= load(job.q.notes + note, np.uint8(0)) != 0
                strange_dout |= load(job.dout.notes + note, np.uint8(0)) != 0
        row = line * held * shared
        q, dout = job.q.rows + row * job.d_padded * each, job.dout.rows + row * job.e_padded * each
        shifts, means = job.shifts + row * size, job.means + row * size
        dq_all = job.dq_sums + row * job.d_padded * size
        together = together and rows == depth
        own = load(places, np.int64(0))
        if together:
            q, dout = q + own * job.d_padded * each, dout + own * job.e_padded * each
            shifts, means = shifts + own * size, means + own * size
            dq = dq_all + own * job.d_padded * size
        else:
            gather(q, places, rows, job.d_padded, scratch + far.q, operand)
            gather(dout, places, rows, job.e_padded, scratch + far.dout, operand)
            gather(shifts, places, rows, STEP, scratch + far.shifts, unit)
            gather(means, places, rows, STEP, scratch + far.means, unit)
            expect(dq_all, places, rows, job.d_padded * size)
            q, dout = scratch + far.q, scratch + far.dout
            shifts, means = scratch + far.shifts, scratch + far.means
            dq = scratch + far.product
            if rows < depth:
                pad_rows(job, rows, depth, q, dout, shifts, means, unit, operand)
        direct = (not together and shared >= DIRECT and not (masked and strange_k)
                  and (job.fold == 1 or shared % SIDE == 0))
        q_pairs, dout_pairs = q, dout
        if job.fold > 1:
            q_pairs, dout_pairs = scratch + far.q_pairs, scratch + far.dout_pairs
            pair_up(q, depth, job.d_padded, each, q_pairs)
            pair_up(dout, depth, job.e_padded, each, dout_pairs)
        multiply(depth, wide, job.d_depth, q, job.d_padded, 1, k_columns, TILE * job.fold, weights,
                 TILE, 0, unit, operand)
        multiply(depth, wide, job.e_depth, dout, job.e_padded, 1, v_columns, TILE * job.fold,
                 dscores, TILE, 0, unit, operand)
        turn(job, depth, masked, shifts, means, scratch, unit)
        if strange_dout:
            exact_product(job, rows, job.e, weights, TILE, words, 8, TRANSPOSED, dout_pairs, dv,
                          job.e_padded, unit, operand)
        else:
            # dv += p^T dout
            add_transposed(job, depth, met, weights, dout_pairs, job.e_padded, dv,
                           scratch + far.operand, unit, operand)
        if strange_q:
            exact_product(job, rows, job.d, dscores, TILE, words, 8, TRANSPOSED, q_pairs, dk,
                          job.d_padded, unit, operand)
        else:
            # dk += dscore^T q
            add_transposed(job, depth, met, dscores, q_pairs, job.d_padded, dk,
                           scratch + far.operand, unit, operand)
        if masked and strange_k:
            if not together:
                numbers(dq, rows * job.d_padded, unit)[:] = 0
            exact_product(job, rows, job.d, dscores, TILE, words, 8, STRAIGHT, k_pairs, dq,
                          job.d_padded, unit, operand)
        else:
            # dq += dscore k
            if job.fold > 1:
                for r in range(depth):
                    row = dscores + r * TILE * size
                    round_row(row, TILE, row)
            if direct:
                add_by_runs(job, rows, met, dscores, k_pairs, dq_all, places, unit, operand)
            else:
                multiply(rows, job.d_padded, met, dscores, TILE * job.fold, 1, k_pairs,
                         job.d_padded * job.fold, dq, job.d_padded, np.int64(together), unit,
                         operand)
        if not together and not direct:
            for r in range(rows):
                place = dq_all + load(places + 8 * r, np.int64(0)) * job.d_padded * size
                kept = numbers(place, job.d_padded, unit)
                new = numbers(dq + r * job.d_padded * size, job.d_padded, unit)
                for x in range(job.d_padded):
                    kept[x] += new[x]


@part
def pair_up(x, rows, width, each, pairs):
    """Lay rows, an even number of them, two by two."""
    for r in range(0, rows, 2):
        place = r * width * each
        pair_rows(x + place, x + place + width * each, width, pairs + place)


@part
def add_by_runs(job, rows, met, dscores, k, dq_all, places, unit, operand):
    """Add dscores @ k to rows of dq, those that follow one another at a time."""
    start = NOTHING
    while start < rows:
        row, stop = load(places + 8 * start, np.int64(0)), start + 1
        while stop < rows and load(places + 8 * stop, np.int64(0)) == row + stop - start:
            stop += 1
        multiply(stop - start, job.d_padded, met, dscores + start * TILE * job.size,
                 TILE * job.fold, 1, k, job.d_padded * job.fold,
                 dq_all + row * job.d_padded * job.size, job.d_padded, 1, unit, operand)
        start = stop


@part
def pad_rows(job, rows, depth, q, dout, shifts, means, unit, operand):
    """Fill a gathered tile with rows whose weights are 0."""
    numbers(q + rows * job.d_padded * job.operand, (depth - rows) * job.d_padded, operand)[:] = 0
    numbers(dout + rows * job.e_padded * job.operand, (depth - rows) * job.e_padded, operand)[:] = 0
    numbers(shifts + rows * job.size, depth - rows, unit)[:] = math.inf
    numbers(means + rows * job.size, depth - rows, unit)[:] = 0


@part
def turn(job, depth, masked, shifts, means, scratch, unit):
    """Turn products into weights, and those with v into the gradients of the products q.k."""
    weights, dscores = scratch + job.far.weights, scratch + job.far.dscores
    words = scratch + job.far.words if masked else NOWHERE
    count = depth * TILE
    slopes = numbers(scratch + job.far.slopes, count if job.softcap > 0 else 0, unit)
    if job.softcap > 0:
        cap_scores(job, weights, count, unit)
        capped = numbers(weights, count, unit)
        for x in range(count):
            tanh = capped[x] / job.softcap
            slopes[x] = 1 - tanh * tanh
    differentiate(weights, dscores, TILE, depth, words, shifts, means, unit)
    if job.softcap > 0:
        ds = numbers(dscores, count, unit)
        for x in range(count):
            ds[x] *= slopes[x]
        for r in range(depth if masked else 0):
            select(dscores + r * TILE * job.size, load(words + 8 * r, ONE), 0.0, unit)


@kernel
def finish(place, queue, units, scratch, unit, operand):
    """Write the dq of a round; a unit is TILE tokens."""
    job = job_at(place)
    size, shared, held = job.size, job.heads // job.groups, job.lists.last - job.lists.first
    tiles = -(-held // TILE)
    factors = numbers(scratch, TILE, unit)
    task = fetch_add(queue, STEP)
    while task < units:
        line, t = divmod(task, tiles)
        b, g = divmod(line, job.groups)
        for r in range(shared):
            h = g * shared + r
            factors[:] = load(job.q.scale + h * size, unit)
            write_rows(job.dq_sums + ((line * held + t * TILE) * shared + r) * job.d_padded * size,
                       shared * job.d_padded, min(TILE, held - t * TILE), job.d, scratch,
                       job.dq.at + b * job.dq.b + h * job.dq.h
                       + (job.lists.first + t * TILE) * job.dq.n, job.dq.n, job.dq.kind, unit)
        task = fetch_add(queue, STEP)
