"""Convolution over tokens, a head's channels or a block of channels at a time.

Kernels for each position: the weights of 64 positions lie in rows, with zeros behind. Seen with a
row one number shorter than it is, they are a band,

    p00 p01 p02  0   0          the weights of the tokens t - pad, ... that some positions share,
     0  p10 p11 p12  0
     0   0  p20 p21 p22

and a few rows of it make a small product with the tokens' rows; seen the other way, down the taps,
its transpose, for the gradient of x. Nothing is copied to make it. The corners must not multiply
what is not finite; where there is such a number, rows are multiplied one by one.

A unit of work owns some tokens of the output, or of the gradients, of one head. In the backward it
works out the weights of all positions that its tokens are taps of, those of other units again, and
sums in the order of positions; so nothing depends on who does it.
"""

from __future__ import annotations

import math

import numpy as np

from ..compile import kernel, part
from ..records import CONSTANT, CONVOLUTION
from .access import fetch_add, load, numbers, record_at, store
from .packing import NOWHERE, TILE
from .philox import philox
from .vector import (
    convert_rows,
    correlate,
    gemm,
    lane_sums,
    scale_rows,
    transpose,
    weigh,
    write_rows,
)

STEP, ZERO, ROWS = np.int64(1), np.int64(0), np.int64(4)
ONE, LOW = np.uint64(1), np.uint64(0xFFFFFFFF)
NONE = np.int32(0)

job_at, constant_at = record_at(CONVOLUTION), record_at(CONSTANT)


@kernel
def forward(place, queue, units, scratch, unit, operand):
    """Compute out."""
    job = job_at(place)
    task = fetch_add(queue, STEP)
    while task < units:
        rest, h = divmod(task, job.heads)
        b, chunk = divmod(rest, job.chunks)
        convolve(job, b, h, chunk * job.chunk, scratch, unit)
        task = fetch_add(queue, STEP)


@part
def convolve(job, b, h, first, scratch, unit):
    """Do up to 64 positions of a head."""
    size, width, out = job.size, job.padded, scratch + job.at_out
    length = np.int64(load(job.lengths + 4 * b, NONE))
    rows = max(min(job.chunk, length - first), ZERO)
    filled = min(job.chunk, job.n - first)
    if rows < filled:
        numbers(out, filled * width, unit)[:] = 0
    if rows > 0:
        weights = scratch + job.at_weights + job.front * size
        strange = read_tokens(job, job.x, b, h, first - job.pad, rows + job.taps + ROWS, length,
                              scratch + job.at_x, unit)
        weigh_rows(job, b, h, first, rows, length, scratch, unit)
        if job.dropout:
            drop(job, b, h, first, rows, weights, weights, unit)
        for r in range(0, rows, ROWS):
            some = min(ROWS, rows - r)
            x = scratch + job.at_x + r * width * size
            if strange:
                for i in range(some):
                    multiply_row(job, job.taps, weights + (r + i) * job.pitch * size, STEP,
                                 x + i * width * size, scratch + job.at_apart,
                                 out + (r + i) * width * size, ZERO, unit)
            else:
                gemm(some, width, job.taps + some - STEP, weights + r * job.pitch * size,
                     job.pitch - STEP, STEP, x, width, out + r * width * size, width, ZERO, unit)
    write_tokens(job, job.out, b, h, first, filled, out, unit)


@part
def multiply_row(job, count, weights, step, x, apart, total, accumulate, unit):
    """Total[:] (+)= sum of weight times row of x, in which a weight of 0 has a row of zeros.

    The sum is that of a band to the last bit: there, too, corners add 0.
    """
    size, width = job.size, job.padded
    for s in range(count):
        row = numbers(x + s * width * size, width, unit)
        copy = numbers(apart + s * width * size, width, unit)
        kept = load(weights + s * step * size, unit) != 0
        for c in range(width):
            copy[c] = row[c] if kept else unit - unit
    gemm(STEP, width, count, weights, ZERO, step, apart, width, total, width, accumulate, unit)


@part
def read_tokens(job, source, b, h, first, rows, length, target, unit):
    """Read a head's channels of tokens from `first` on; tell whether any is not finite.

    What lies before the first token or from the length on is zeros.
    """
    size, width = job.size, job.padded
    begin = min(max(ZERO, -first), rows)
    end = max(min(rows, length - first), begin)
    numbers(target, begin * width, unit)[:] = 0
    numbers(target + end * width * size, (rows - end) * width, unit)[:] = 0
    step = size if source.kind < 2 else size // 2
    at = source.at + b * source.b + (first + begin) * source.n + h * job.width * step
    return convert_rows(at, source.n, step, source.kind, end - begin, job.width, width, unit,
                        target + begin * width * size, width, unit, unit)


@part
def write_tokens(job, target, b, h, first, rows, source, unit):
    """Write a head's channels of tokens from `first` on."""
    step = job.size if target.kind < 2 else job.size // 2
    at = target.at + b * target.b + first * target.n + h * job.width * step
    write_rows(source, job.padded, rows, job.width, NOWHERE, at, target.n, target.kind, unit)


@part
def weigh_rows(job, b, h, first, rows, length, scratch, unit):
    """Make the weights, before dropout, of some positions, zeros behind them and gates beside."""
    size, pitch, taps = job.size, job.pitch, job.taps
    weights = scratch + job.at_weights + job.front * size
    words, gates = scratch + job.at_words, NOWHERE
    tops, sums = scratch + job.at_tops, scratch + job.at_sums
    shares = scratch + job.at_shares
    behind = TILE * job.tiles
    numbers(weights - job.front * size, job.front, unit)[:] = 0
    for r in range(rows):
        numbers(weights + (r * pitch + behind) * size, pitch - behind, unit)[:] = 0
    source = job.logits
    convert_rows(source.at + b * source.b + first * source.n + h * source.h, source.n,
                 size if source.kind < 2 else size // 2, source.kind, rows, taps, behind, unit,
                 weights, pitch, unit, unit)
    for r in range(rows):
        begin, end = ZERO, taps
        if job.renorm:
            begin = max(begin, job.pad - first - r)
            end = min(end, length + job.pad - first - r)
        for tile in range(job.tiles):
            store(words + 8 * (r * job.tiles + tile), bits(end - tile * TILE)
                  & ~bits(begin - tile * TILE))
    if job.span:
        gates = scratch + job.at_gates + job.front * size
        for r in range(rows):
            gate_row(job, b, h, first + r, gates + r * pitch * size,
                     words + 8 * r * job.tiles, unit)
    numbers(tops, rows, unit)[:] = -math.inf
    numbers(sums, rows * job.lanes, unit)[:] = 0
    weigh(weights, pitch, rows, job.tiles, words, job.tiles, gates, tops, sums,
          scratch + job.at_decays, unit)
    lane_sums(sums, rows, shares, unit)
    for r in range(rows):
        total = load(shares + r * size, unit)
        # no tap that counts
        store(shares + r * size, unit - unit if total == 0 else unit / total)
    scale_rows(weights, pitch, rows, -(-taps // job.lanes) * job.lanes, shares, unit)


@part
def bits(count):
    """Return a word with the first `count` bits set, none for less than 0, all from 64 on."""
    if count >= TILE:
        return LOW | (LOW << np.uint64(32))
    return (ONE << np.uint64(max(count, ZERO))) - ONE


@part
def gate_row(job, b, h, t, gates, words, unit):
    """Fill in the gate of each tap, and clear the bits of taps that it closes."""
    ramp = job.ramp
    span = np.float64(load(job.span + b * job.span_b + t * job.span_n + h * job.span_h, unit))
    row = numbers(gates, TILE * job.tiles, unit)
    for k in range(TILE * job.tiles):
        gate = (ramp + span - abs(k - job.pad)) / ramp
        gate = min(max(gate, 0.0), 1.0)
        row[k] = gate
        if gate == 0.0 and k < job.taps:
            word = words + 8 * (k // TILE)
            store(word, load(word, ONE) & ~(ONE << np.uint64(k % TILE)))


@part
def drop(job, b, h, first, rows, weights, target, unit):
    """Write weights times 1 / (1 - dropout), or 0 where the generator says so."""
    for r in range(rows):
        row = numbers(weights + r * job.pitch * job.size, job.taps, unit)
        to = numbers(target + r * job.pitch * job.size, job.taps, unit)
        words = (LOW, LOW, LOW, LOW)
        for k in range(job.taps):
            if k % 4 == 0:
                words = philox(np.uint64(k // 4), np.uint64(first + r), np.uint64(h),
                               np.uint64(b), np.uint64(job.seed_low), np.uint64(job.seed_high))
            stays = words[np.uint64(k) & np.uint64(3)] >= np.uint64(job.threshold)
            to[k] = row[k] * job.keep if stays else 0.0


@kernel
def backward(place, queue, units, scratch, unit, operand):
    """Compute the gradients of x, of the logits and of the span."""
    job = job_at(place)
    task = fetch_add(queue, STEP)
    while task < units:
        rest, h = divmod(task, job.heads)
        b, chunk = divmod(rest, job.chunks)
        differentiate(job, b, h, chunk * job.chunk, scratch, unit)
        task = fetch_add(queue, STEP)


@part
def differentiate(job, b, h, first, scratch, unit):
    """Do the tokens of a chunk: as positions, and as taps of positions around."""
    width, dx = job.padded, scratch + job.at_out
    length = np.int64(load(job.lengths + 4 * b, NONE))
    last = min(first + job.chunk, job.n)
    end = max(min(last, length), first)
    numbers(dx, (last - first) * width, unit)[:] = 0
    if end < last:
        clear_logits(job, b, h, end, last, unit)
    if end > first:
        x = scratch + job.at_x
        rows = end - first + job.taps
        read_tokens(job, job.x, b, h, first - job.pad, rows, length, x, unit)
        turned = scratch + job.at_turned
        numbers(turned, width * job.x_row, unit)[:] = 0
        transpose(x, width, turned, job.x_row, rows, width, unit)
        t = max(ZERO, first + job.pad - (job.taps - STEP))
        stop = min(length, end + job.pad)
        while t < stop:
            # positions of the chunk itself apart from those around
            border = first if t < first else end if t < end else stop
            count = min(min(border, stop) - t, TILE)
            differentiate_rows(job, b, h, t, count, first, end, length, first <= t < end, scratch,
                               unit)
            t += count
    write_tokens(job, job.dx, b, h, first, last - first, dx, unit)


@part
def clear_logits(job, b, h, first, last, unit):
    """Give logits of padding no gradient."""
    target = job.dlogits
    nbytes = job.taps * (job.size if target.kind < 2 else job.size // 2)
    for t in range(first, last):
        at = target.at + b * target.b + t * target.n + h * target.h
        for byte in range(nbytes):
            store(at + byte, np.uint8(0))
        if job.span:
            store(job.dspan + ((b * job.n + t) * job.heads + h) * job.size, unit - unit)


@part
def differentiate_rows(job, b, h, t, count, first, end, length, own, scratch, unit):
    """Do up to 64 positions from `t` on."""
    size, width, pitch, taps = job.size, job.padded, job.pitch, job.taps
    weights = scratch + job.at_weights + job.front * size
    used, dout = weights, scratch + job.at_dout
    weigh_rows(job, b, h, t, count, length, scratch, unit)
    if job.dropout:
        used = scratch + job.at_used + job.front * size
        numbers(used - job.front * size, job.front + count * pitch, unit)[:] = 0
        drop(job, b, h, t, count, weights, used, unit)
    wild = read_tokens(job, job.dout, b, h, t, count, length, dout, unit)
    if own:
        dweights = scratch + job.at_dweights + job.front * size
        # forward: out[t] = sum_k weight[t, k] x[t + k - pad]; a band again, of which only the
        # weights' places are looked at
        for r in range(0, count, ROWS):
            some = min(ROWS, count - r)
            gemm(some, job.columns, job.width, dout + r * width * size, width, STEP,
                 scratch + job.at_turned + (t - first + r) * size, job.x_row,
                 dweights + r * pitch * size, pitch - STEP, ZERO, unit)
        differentiate_logits(job, b, h, t, count, scratch, unit)
    # forward: out[t] = sum_k weight[t, k] x[t + k - pad]; tokens j = t + k - pad of the chunk
    for j in range(first, end, ROWS):
        some = min(ROWS, end - j)
        begin = max(t, j + job.pad - (taps - STEP))
        stop = min(t + count, j + some + job.pad)
        if begin >= stop:
            continue
        total = scratch + job.at_out + (j - first) * width * size
        row, tap = begin - t, j - begin + job.pad
        if wild:
            for i in range(some):
                multiply_row(job, stop - begin, used + (row * pitch + tap + i) * size,
                             pitch - STEP, dout + row * width * size, scratch + job.at_apart,
                             total + i * width * size, STEP, unit)
        else:
            gemm(some, width, stop - begin, used + (row * pitch + tap) * size, STEP, pitch - STEP,
                 dout + row * width * size, width, total, width, STEP, unit)


@part
def differentiate_logits(job, b, h, t, count, scratch, unit):
    """Turn gradients of weights into those of logits, and of the span."""
    size, pitch, taps = job.size, job.pitch, job.taps
    weights = scratch + job.at_weights + job.front * size
    dweights = scratch + job.at_dweights + job.front * size
    kept = scratch + job.at_kept
    for r in range(count):
        p = numbers(weights + r * pitch * size, taps, unit)
        dp = numbers(dweights + r * pitch * size, taps, unit)
        if job.dropout:
            # forward: used = weight * factor
            factors = numbers(kept, taps, unit)
            factors[:] = 1
            drop(job, b, h, t + r, STEP, kept, kept, unit)
            for k in range(taps):
                dp[k] *= factors[k]
        delta = unit - unit
        for k in range(taps):
            delta += p[k] * dp[k] if p[k] != 0 else unit - unit
        # forward: weight = gate e^logits / sum of these
        for k in range(taps):
            dp[k] = p[k] * (dp[k] - delta) if p[k] != 0 else unit - unit
        if job.span:
            gates = numbers(scratch + job.at_gates + (job.front + r * pitch) * size, taps, unit)
            # forward: gate = clip((ramp + span - distance) / ramp, 0, 1)
            total = 0.0
            for k in range(taps):
                if 0 < gates[k] < 1:
                    total += dp[k] / gates[k]
            numbers(job.dspan + ((b * job.n + t + r) * job.heads + h) * size, STEP,
                    unit)[0] = total / job.ramp
    target = job.dlogits
    write_rows(dweights, pitch, count, taps, NOWHERE,
               target.at + b * target.b + t * target.n + h * target.h, target.n, target.kind, unit)


@kernel
def constant(place, queue, units, scratch, unit, operand):
    """Convolve blocks of channels of 64 tokens with their kernels."""
    job = constant_at(place)
    size, block = job.size, job.block
    task = fetch_add(queue, STEP)
    while task < units:
        rest, column = divmod(task, job.blocks)
        b, chunk = divmod(rest, job.chunks)
        first, column = chunk * job.chunk, column * block
        length = np.int64(load(job.lengths + 4 * b, NONE))
        filled = min(job.chunk, job.n - first)
        rows = max(min(filled, length - first), ZERO)
        out = scratch + job.at_out
        numbers(out + rows * block * size, (filled - rows) * block, unit)[:] = 0
        if rows > 0:
            read_block(job, job.x, b, column, first - job.pad, rows + job.taps - STEP, length,
                       scratch + job.at_x, unit)
            correlate(rows, job.taps, padded_block(job, column), job.w + column * size, job.w_row,
                      scratch + job.at_x, block, out, block, ZERO, unit)
        target = job.out
        step = size if target.kind < 2 else size // 2
        write_rows(out, block, filled, min(block, job.channels - column), NOWHERE,
                   target.at + b * target.b + first * target.n + column * step, target.n,
                   target.kind, unit)
        task = fetch_add(queue, STEP)


@part
def padded_block(job, column):
    """Return the width of the block of channels from `column` on, in whole vectors."""
    return -(-min(job.block, job.channels - column) // job.lanes) * job.lanes


@part
def read_block(job, source, b, column, first, rows, length, target, unit):
    """Read some channels of tokens from `first` on, zeros where there are none."""
    size, block = job.size, job.block
    begin = min(max(ZERO, -first), rows)
    end = max(min(rows, length - first), begin)
    numbers(target, begin * block, unit)[:] = 0
    numbers(target + end * block * size, (rows - end) * block, unit)[:] = 0
    step = size if source.kind < 2 else size // 2
    convert_rows(source.at + b * source.b + (first + begin) * source.n + column * step, source.n,
                 step, source.kind, end - begin, min(block, job.channels - column),
                 padded_block(job, column), unit, target + begin * block * size, block, unit, unit)


@kernel
def constant_gradient(place, queue, units, scratch, unit, operand):
    """Sum the gradient of the kernels of a block of channels over one part of the tokens."""
    job = constant_at(place)
    size, block = job.size, job.block
    task = fetch_add(queue, STEP)
    while task < units:
        portion, column = divmod(task, job.blocks)
        column *= block
        width = padded_block(job, column)
        dw = job.dw + (portion * job.taps * job.w_row + column) * size
        stop = min((portion + STEP) * job.part_chunks, job.batch * job.chunks)
        for number in range(portion * job.part_chunks, stop):
            b, chunk = divmod(number, job.chunks)
            first = chunk * job.chunk
            length = np.int64(load(job.lengths + 4 * b, NONE))
            rows = min(job.chunk, length - first)
            if rows <= 0:
                continue
            read_block(job, job.x, b, column, first - job.pad, rows + job.taps - STEP, length,
                       scratch + job.at_x, unit)
            read_block(job, job.dout, b, column, first, rows, length, scratch + job.at_out, unit)
            # forward: out[t] = sum_k w[k] x[t + k - pad]
            correlate(job.taps, rows, width, scratch + job.at_out, block, scratch + job.at_x,
                      block, dw, job.w_row, STEP, unit)
        task = fetch_add(queue, STEP)
