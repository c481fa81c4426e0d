"""What is added to the products q.k before the exponential, and what multiplies the weights.

All of it works on one row of scores within one tile or a few tiles side by side. A pair that a bias
of -inf masks loses its bit in the row's words, one 64-bit word per tile, and so does one with a
gate of 0, except where the gate's own gradient is computed.
"""

from __future__ import annotations

import math

import numpy as np

from ..compile import part
from .access import load, numbers, store
from .philox import philox
from .vector import soft_cap

ONE = np.uint64(1)


@part
def term_row(term, size, b, h, i, j, count, into):
    """Copy `count` numbers of row `i` of a broadcast term, from key `j` on."""
    at = (term.at + load(term.item + 4 * b, np.int32(0)) * term.b + h * term.h + i * term.n
          + j * term.m)
    if term.m == size:
        row = numbers(at, count, into[0])
        for x in range(count):
            into[x] = row[x]
    else:
        for x in range(count):
            into[x] = load(at + x * term.m, into[0])


@part
def gate_row(job, b, h, i, j, count, into):
    """Fill `into` with `count` gates of row `i`, from key `j` on."""
    term = job.gate
    row = term.at + load(term.item + 4 * b, np.int32(0)) * term.b + h * term.h
    if job.gate_width:
        first = query_position(job, b, i) + job.offset_origin
        for x in range(count):
            column = key_position(job, b, j + x) - first
            # masked pairs may lie outside the table
            inside = 0 <= column < job.gate_width
            into[x] = load(row + column * job.size, into[0]) if inside else 0.0
    elif job.ramp > 0:
        reach = load(row + i * term.n, 0.0) + job.ramp + np.float64(
            job.gate_shift - query_position(job, b, i))
        for x in range(count):
            into[x] = min(max((reach + key_position(job, b, j + x)) / job.ramp, 0.0), 1.0)
    elif job.gate_block > 1:
        row += i // job.gate_block * term.n
        x = 0
        while x < count:
            column = (j + x) // job.gate_block
            stop = min(count, (column + 1) * job.gate_block - j)
            into[x:stop] = load(row + column * term.m, into[0])
            x = stop
    else:
        term_row(term, job.size, b, h, i, j, count, into)


@part
def cap_scores(job, scores, width, unit):
    """Cap a row; its derivative is 1 - (capped / softcap)^2."""
    if job.softcap > 0:
        soft_cap(scores, width, job.softcap, unit)


@part
def add_terms(job, b, h, i, j, count, scores, words, buffer, unit):
    """Add bias and offsets to the scores of row `i`; clear the words' bits where bias is -inf."""
    row = numbers(scores, count, unit)
    if job.bias.at:
        term_row(job.bias, job.size, b, h, i, j, count, buffer)
        hidden = False
        for x in range(count):
            row[x] += buffer[x]
            hidden |= buffer[x] == -math.inf
        if hidden:
            clear(words, buffer, count, -math.inf)
    if job.offsets:
        table = job.offsets + h * job.offsets_h
        first = query_position(job, b, i) + job.offset_origin
        for x in range(count):
            column = key_position(job, b, j + x) - first
            # masked pairs may lie outside the table
            if 0 <= column < job.offsets_width:
                row[x] += load(table + column * job.size, unit)


@part
def clear(words, values, count, hidden):
    """Clear the bits of `words` where `values` equals `hidden`."""
    for x in range(count):
        if values[x] == hidden:
            word = words + 8 * (x // 64)
            store(word, load(word, ONE) & ~(ONE << np.uint64(x % 64)))


@part
def query_position(job, b, i):
    """Return where query `i` stands."""
    return np.int64(load(job.q_positions + b * job.q_positions_b + 4 * i, np.int32(0)))


@part
def key_position(job, b, j):
    """Return where key `j` stands."""
    return np.int64(load(job.k_positions + b * job.k_positions_b + 4 * j, np.int32(0)))


@part
def dropout_row(job, b, h, i, j, count, kept):
    """Fill `kept` with 1 / (1 - dropout) where the weight (i, j + x) stays, and 0 where not."""
    low = np.uint64(0xFFFFFFFF)
    query = np.uint64(query_position(job, b, i)) & low
    stream = np.uint64(load(job.streams + b * job.streams_b + 4 * i, np.int32(0))) & low
    group = low + ONE
    words = (low, low, low, low)
    for x in range(count):
        key = np.uint64(key_position(job, b, j + x)) & low
        if key >> np.uint64(2) != group:
            group = key >> np.uint64(2)
            words = philox(group, query, np.uint64(h), stream, job.seed_low, job.seed_high)
        kept[x] = job.keep if words[key & np.uint64(3)] >= job.threshold else 0.0
