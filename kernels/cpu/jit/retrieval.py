"""Retrieval: for each query the best nodes of an index, then the best tokens of their lists.

A unit of work is 64 queries of a head. Nodes that all of them may look at are the rows of a product
whose columns are the queries: where no lane of a row beats what its query holds, which soon is so
for nearly all, the row is done. What only one query looks at, the children of its nodes and the
tokens of its lists, lies side by side in memory, and is scored for it alone.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..compile import kernel, part
from ..host import vector_bytes
from ..retrieval import LINE as LINE_NODES
from ..retrieval import RECORD
from .access import fetch_add, load, numbers, record_at, rounded, store
from .packing import TILE
from .vector import dots, gemm, transpose
from .vector.emit import I64, Vectors, typed

STEP, ZERO, NOBODY, NONE = np.int64(1), np.int64(0), np.int64(-1), np.int32(-1)
LINE, SIX, LOW = np.int64(LINE_NODES), np.int64(6), np.int64(63)

job_at = record_at(RECORD)


def _above(v: Vectors, scores: Any, floor: Any) -> None:
    """Return a word that says which of 64 scores exceed their floors."""
    build = v.builder
    word = I64(0)
    for first in range(0, 64, v.lanes):
        more = build.fcmp_ordered(">", v.load(scores, I64(first)), v.load(floor, I64(first)))
        bits = build.zext(build.bitcast(more, ir.IntType(v.lanes)), I64)
        word = build.or_(word, build.shl(bits, I64(first)))
    build.ret(word)


@intrinsic
def above(context, scores, floor, unit):
    """Emit `_above` for the host."""
    return typed(_above, vector_bytes(), "i", "ii", unit)


def _count_above(v: Vectors, scores: Any, words: Any, value: Any) -> None:
    """Return how many of `words` times 64 scores exceed a value."""
    build = v.builder
    floor, total = v.splat(value), v.variable(I64(0))
    mask = ir.IntType(v.lanes)
    with cgutils.for_range(build, words) as loop:
        for first in range(0, 64, v.lanes):
            place = build.add(build.mul(loop.index, I64(64)), I64(first))
            more = build.bitcast(build.fcmp_ordered(">", v.load(scores, place), floor), mask)
            some = build.ctpop(build.zext(more, I64))
            build.store(build.add(build.load(total, typ=I64), some), total)
    build.ret(build.load(total, typ=I64))


@intrinsic
def count_above(context, scores, words, value, unit):
    """Emit `_count_above` for the host."""
    return typed(_count_above, vector_bytes(), "i", "iif", unit)


@intrinsic
def lowest_bit(context, word):
    """Return the number of the lowest bit that is set in a word that is not 0."""
    def count(context, builder, signature, values):
        return builder.cttz(values[0], ir.IntType(1)(1))

    return word(word), count


@intrinsic
def kind_of(context, unit):
    """Return the code that micro-kernels know the dtype of `unit` by."""
    def give(context, builder, signature, values):
        return ir.IntType(64)(0 if unit == types.float64 else 1)

    return types.int64(unit), give


@kernel
def search(place, queue, units, scratch, unit, operand):
    """Find the best nodes of one level."""
    job = job_at(place)
    task = fetch_add(queue, STEP)
    while task < units:
        head, block = divmod(task, job.blocks)
        first = block * TILE
        search_block(job, head, first, min(TILE, job.n - first), scratch, unit)
        task = fetch_add(queue, STEP)


@part
def search_block(job, head, first, count, scratch, unit):
    """Find them for up to 64 queries."""
    size, d, keep = job.size, job.d, job.keep
    scores, row = scratch + job.scores, scratch + job.row
    floor = numbers(scratch + job.floor, TILE, unit)
    numbers(scratch + job.tops, TILE * keep, unit)[:] = -math.inf
    numbers(scratch + job.names, TILE * keep, NONE)[:] = NONE
    floor[:] = math.inf
    floor[:count] = -math.inf
    q = job.queries + (head * job.n + first) * d * size
    ranges = 4 * (head * job.n + first)
    begins, ends = numbers(job.first + ranges, count, NONE), numbers(job.stop + ranges, count, NONE)
    begin, end = np.int64(begins[0]), np.int64(ends[0])
    for r in range(count):
        if begins[r] < ends[r]:
            if begin >= end:
                begin, end = np.int64(begins[r]), np.int64(ends[r])
            begin, end = min(begin, np.int64(begins[r])), max(end, np.int64(ends[r]))
            scored = job.scored + ranges + 4 * r
            store(scored, np.int32(load(scored, NONE) + ends[r] - begins[r]))
    columns = -(-count // job.lanes) * job.lanes
    if begin < end:
        transpose(q, d, scratch, TILE, count, d, unit)
        numbers(scores, TILE * TILE, unit)[:] = -math.inf
    for node in range(begin, end, TILE):
        some = min(TILE, end - node)
        gemm(some, columns, d, job.rows + (head * job.nodes + node) * d * size, d, STEP, scratch,
             TILE, scores, TILE, ZERO, unit)
        for x in range(some):
            word = above(scores + x * TILE * size, scratch + job.floor, unit)
            if word == 0 or load(job.counts + 8 * (head * job.nodes + node + x), ZERO) == 0:
                continue
            while word != 0:
                r = lowest_bit(word)
                word &= word - STEP
                if begins[r] <= node + x and node + x < ends[r]:
                    insert(job, r, load(scores + (x * TILE + r) * size, unit), np.int32(node + x),
                           scratch, unit)
    if job.children:
        for r in range(count):
            search_children(job, head, first, r, q + r * d * size, row, scratch, unit)
    for r in range(count):
        kept = job.kept + 4 * (head * job.n + first + r) * keep
        names = numbers(scratch + job.names + 4 * r * keep, keep, NONE)
        for x in range(keep):
            store(kept + 4 * x, names[x])


@part
def search_children(job, head, first, r, q, row, scratch, unit):
    """Look at the children of the nodes that a query has kept on the level above."""
    size, d = job.size, job.d
    at = head * job.n + first + r
    seen = load(job.scored + 4 * at, NONE)
    for x in range(job.keep):
        parent = np.int64(load(job.above + 4 * (at * job.keep + x), NONE))
        if parent < 0:
            break
        begin = load(job.child_start + 8 * (head * job.children_of + parent), ZERO)
        end = load(job.child_start + 8 * (head * job.children_of + parent + STEP), ZERO)
        seen += np.int32(end - begin)
        for place in range(begin, end, LINE):
            some = min(LINE, end - place)
            dots(STEP, some, d, q, d, job.child_rows + place * d * size, d * size, kind_of(unit),
                 row, LINE, unit)
            for y in range(some):
                node = load(job.child_order + 4 * (place + y), NONE)
                insert(job, r, load(row + y * size, unit), node, scratch, unit)
    store(job.scored + 4 * at, np.int32(seen))


@part
def insert(job, r, score, node, scratch, unit):
    """Keep a node if it is among the best of a query; of equals the lower number."""
    keep = job.keep
    tops = numbers(scratch + job.tops + r * keep * job.size, keep, unit)
    names = numbers(scratch + job.names + 4 * r * keep, keep, NONE)
    x = keep - STEP
    if not (score > tops[x] or (score == tops[x] and node < names[x])):
        return
    while x > 0 and (score > tops[x - STEP]
                     or (score == tops[x - STEP] and node < names[x - STEP])):
        tops[x], names[x] = tops[x - STEP], names[x - STEP]
        x -= STEP
    tops[x], names[x] = score, node
    store(scratch + job.floor + r * job.size, tops[keep - STEP])


@kernel
def pick(place, queue, units, scratch, unit, operand):
    """Choose the best tokens of each query's lists."""
    job = job_at(place)
    numbers(scratch + job.seen, (job.tokens + LOW) >> SIX, ZERO)[:] = 0
    task = fetch_add(queue, STEP)
    while task < units:
        head, block = divmod(task, job.blocks)
        for i in range(block * TILE, min(block * TILE + TILE, job.n)):
            pick_one(job, head, i, scratch, unit)
        task = fetch_add(queue, STEP)


@part
def pick_one(job, head, i, scratch, unit):
    """Choose them for one query."""
    number = job.number
    scores = numbers(scratch + job.scores, job.most, unit)
    ids = numbers(scratch + job.ids, job.most, NONE)
    taken = numbers(scratch + job.names, number, NONE)
    seen = scratch + job.seen
    q = job.queries + (head * job.n + i) * job.d * job.size
    count = score_runs(job, head, i, q, scratch, scores, ids, unit)
    if job.exact:
        found = pick_distinct(job, count, scores, ids, taken, scratch, unit)
    else:
        found = min(count, number)
        if count > number:
            take_largest(job, count, scores, ids, taken, scratch, unit)
        else:
            for x in range(count):
                taken[x] = ids[x]
    in_order(seen, taken, found)
    out = job.indices + 4 * (head * job.n + i) * number
    for x in range(number):
        store(out + 4 * x, taken[x] if x < found else NONE)


@part
def score_runs(job, head, i, q, scratch, scores, ids, unit):
    """Score the tokens of all lists that reach the threshold, each once; return how many."""
    size, d, kind, seen = job.size, job.d, kind_of(unit), scratch + job.seen
    places = numbers(scratch + job.places, job.most, NONE)
    count = ZERO
    for run in range(job.run_count):
        at = job.runs + 16 * ((head * job.n + i) * job.run_count + run)
        begin, end = load(at, ZERO), load(at + 8, ZERO)
        if begin >= end:
            continue
        if not job.gather:
            # whole vectors of products, if there are rows enough
            some = -(-(end - begin) // job.lanes) * job.lanes
            some = some if begin + some <= job.row_count else end - begin
            dots(STEP, some, d, q, d, job.rows + begin * d * size, d * size, kind,
                 scratch + job.scores + count * size, job.most, unit)
        first = count
        for x in range(end - begin):
            token = load(job.order + 4 * (begin + x), NONE)
            place = np.int64(token) if job.gather else begin + x
            if job.gather:
                if bit_of(seen, token - head * job.tokens):
                    continue
                dots(STEP, STEP, d, q, d, job.rows + place * d * size, d * size, kind,
                     scratch + job.scores + count * size, STEP, unit)
            else:
                scores[count] = scores[first + x]
            if scores[count] >= job.threshold:
                ids[count] = np.int32(token - head * job.tokens)
                places[count] = np.int32(place)
                if job.gather:
                    set_bit(seen, ids[count])
                count += STEP
    if job.gather:
        for x in range(count):
            store(seen + 8 * (np.int64(ids[x]) >> SIX), ZERO)
    return count


@part
def take_largest(job, count, scores, ids, taken, scratch, unit):
    """Take the `number` largest of more scores, of equals the first tokens.

    Bisection finds a value that as many exceed, or two neighbouring ones between which the count
    jumps past that: then those equal to the higher one fill up. Scores lie in -2 to 2.
    """
    number, at = job.number, scratch + job.scores
    words = -(-count // TILE)
    for x in range(count, words * TILE):
        scores[x] = -3
    low, high = rounded(-2.0, unit), rounded(2.0, unit)
    more = ZERO
    while more != number:
        middle = rounded((np.float64(low) + np.float64(high)) / 2, unit)
        if middle == low or middle == high:
            break
        more = count_above(at, words, middle, unit)
        if more >= number:
            low = middle
        else:
            high = middle
    floor = low if more == number else high
    found = ZERO
    for x in range(count):
        if scores[x] > floor:
            taken[found] = ids[x]
            found += STEP
    while found < number:
        best = NOBODY
        for x in range(count):
            if scores[x] == high and (best < 0 or ids[x] < ids[best]):
                best = np.int64(x)
        taken[found] = ids[best]
        scores[best] = -3
        found += STEP


@part
def pick_distinct(job, count, scores, ids, taken, scratch, unit):
    """Take tokens from the best on, without those that are like one taken; return how many."""
    places = numbers(scratch + job.places, job.most, NONE)
    found = ZERO
    for x in range(count // 2 - STEP, -STEP, -STEP):
        sift(scores, ids, places, x, count)
    while count > 0 and found < job.number:
        token, place = ids[0], np.int64(places[0])
        count -= STEP
        scores[0], ids[0], places[0] = scores[count], ids[count], places[count]
        sift(scores, ids, places, ZERO, count)
        if not is_repeated(job, place, found, scratch, unit):
            taken[found] = token
            found += STEP
    return found


@part
def is_repeated(job, place, found, scratch, unit):
    """Return whether a token is like one of those chosen; if not, note it among them."""
    size, d = job.size, job.d
    row, chosen, products = job.rows + place * d * size, scratch + job.chosen, scratch + job.row
    if found > 0:
        dots(STEP, found, d, row, d, chosen, d * size, kind_of(unit), products, job.number, unit)
        for x in range(found):
            if load(products + x * size, unit) > job.duplicate:
                return True
    own, kept = numbers(row, d, unit), numbers(chosen + found * d * size, d, unit)
    for c in range(d):
        kept[c] = own[c]
    return False


@part
def sift(scores, ids, places, x, count):
    """Let the entry at x of a heap sink below those that are better: higher, or equal and first."""
    score, name, place = scores[x], ids[x], places[x]
    child = 2 * x + STEP
    while child < count:
        other = child + STEP
        if other < count and (scores[other] > scores[child] or (
                scores[other] == scores[child] and ids[other] < ids[child])):
            child = other
        if not (scores[child] > score or (scores[child] == score and ids[child] < name)):
            break
        scores[x], ids[x], places[x] = scores[child], ids[child], places[child]
        x = child
        child = 2 * x + STEP
    scores[x], ids[x], places[x] = score, name, place


@part
def bit_of(words, token):
    """Return whether a bit is set."""
    return (load(words + 8 * (np.int64(token) >> SIX), ZERO) >> (np.int64(token) & LOW)) & STEP


@part
def set_bit(words, token):
    """Set a bit."""
    place = words + 8 * (np.int64(token) >> SIX)
    store(place, load(place, ZERO) | (STEP << (np.int64(token) & LOW)))


@part
def in_order(words, x, count):
    """Sort distinct numbers of tokens by setting bits, which all are clear before and after."""
    if count == 0:
        return
    low, high = np.int64(x[0]), np.int64(x[0])
    for i in range(count):
        low, high = min(low, np.int64(x[i])), max(high, np.int64(x[i]))
        set_bit(words, x[i])
    place = ZERO
    for w in range(low >> SIX, (high >> SIX) + STEP):
        word = load(words + 8 * w, ZERO)
        if word != 0:
            store(words + 8 * w, ZERO)
        while word != 0:
            x[place] = np.int32((w << SIX) + lowest_bit(word))
            word &= word - STEP
            place += STEP
