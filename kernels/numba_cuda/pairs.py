"""What happens to the score of one pair, forward and backward.

    scores = scale * q.k -> softcap -> + bias + offsets -> x gate, mask -> softmax

`p` are the `launch.Inputs`; b is a batch item, h a query head, i a query and j a key. Which terms
there are is the same for all threads, so that these branches cost little. Numbers are of the
accumulator's type, that of ``p.scale``, which literals must be cast to.
"""

from __future__ import annotations

import math

import numpy as np

from .compile import device, exp, tanh
from .philox import philox

NO_GATE, BY_STRIDES, IN_BLOCKS, RAMP, BY_OFFSET = range(5)

NOWHERE = -2
"""Instead of the name of a tile that is not visited; a full one has -1."""


@device
def within(p, name, i, queries, j, keys):
    """Return whether lengths and mask allow a pair; `name` is that of its tile's bits."""
    if i >= queries or j >= keys:
        return False
    return name < 0 or (p.bits[name, i & 63, (j & 63) >> 3] >> (j & 7)) & 1 != 0


@device
def row_of(x, b):
    """Return which row of an array with one row for each batch item, or one for all, is b's."""
    return min(b, x.shape[0] - 1)


@device
def distance(p, b, i, j):
    """Return key position - query position."""
    return (p.k_positions[row_of(p.k_positions, b), j]
            - p.q_positions[row_of(p.q_positions, b), i])


@device
def column_of(p, b, i, j, width):
    """Return which column of a table by offset a pair reads."""
    # pairs that no mask allows may lie beyond the table
    return min(max(distance(p, b, i, j) - p.origin, 0), width - 1)


@device
def gate_of(p, b, h, i, j):
    """Return what multiplies the weight of a pair."""
    number = p.scale.dtype.type
    item = p.gate_item[b]
    if p.gate_form == BY_OFFSET:
        return number(p.gate[item, h, 0, column_of(p, b, i, j, p.gate.shape[3])])
    if p.gate_form == RAMP:
        span = number(p.gate[item, h, i, 0])
        reach = span + p.ramp + number(distance(p, b, i, j) + p.shift)
        return min(max(reach / p.ramp, number(0)), number(1))
    if p.gate_form == IN_BLOCKS:
        return number(p.gate[item, h, i // p.gate_block, j // p.gate_block])
    return number(p.gate[item, h, i, j])


@device
def score(p, b, h, i, j, raw):
    """Return whether the bias lets a pair be seen, its score, its slope and its gate.

    `raw` is q.k; the slope is that of the softcap.
    """
    number = p.scale.dtype.type
    seen, value, slope, gate = True, raw * p.scale[h], number(1), number(1)
    if p.softcap > 0:
        bent = tanh(value / p.softcap)
        value = p.softcap * bent
        slope = number(1) - bent * bent
    if p.has_bias:
        bias = number(p.bias[p.bias_item[b], h, i, j])
        seen = bias != -math.inf
        value += bias
    if p.has_offsets:
        value += number(p.offsets[h, column_of(p, b, i, j, p.offsets.shape[1])])
    if p.gate_form != NO_GATE:
        gate = gate_of(p, b, h, i, j)
    return seen, value, slope, gate


@device
def dropout_factor(p, b, h, i, j):
    """Return 1 / (1 - dropout) where a weight stays, else 0."""
    number = p.scale.dtype.type
    key = p.k_positions[row_of(p.k_positions, b), j]
    query = p.q_positions[row_of(p.q_positions, b), i]
    stream = p.streams[row_of(p.streams, b), i]
    # positions may be negative; a counter has their low 32 bits
    words = philox(np.uint64((key & 0xFFFFFFFF) >> 2), np.uint64(query & 0xFFFFFFFF), np.uint64(h),
                   np.uint64(stream & 0xFFFFFFFF), np.uint64(p.seed_low), np.uint64(p.seed_high))
    lane = key & 3
    word = words[0]
    if lane == 1:
        word = words[1]
    elif lane == 2:
        word = words[2]
    elif lane == 3:
        word = words[3]
    return p.keep if word >= np.uint64(p.threshold) else number(0)


@device
def pair_gradient(p, b, h, i, j, raw, dp, lse, delta):
    """Undo the softmax for a pair that `within` allows, in a row that sees a key.

    `dp` is dout.v. Returns whether the pair was met, its weight on v, and the gradients of its
    score, of its gate (in a ramp: of the span) and of scale * q.k. A closed gate hides a pair, but
    has a gradient: what opening it would change.
    """
    number = p.scale.dtype.type
    zero = number(0)
    seen, value, slope, gate = score(p, b, h, i, j, raw)
    if not seen:
        return False, zero, zero, zero, zero
    # forward: out = (p * factor) v
    factor = number(1)
    if p.dropping:
        factor = dropout_factor(p, b, h, i, j)
    pulled = dp * factor - delta
    # forward: p = gate exp(s - lse)
    share = exp(value - lse)
    dgate = share * pulled
    if p.gate_form == RAMP:
        dgate = dgate / p.ramp if gate > 0 and gate < 1 else zero
    if gate == 0:
        return False, zero, zero, dgate, zero
    weight = gate * share
    ds = weight * pulled
    # forward: s = softcap tanh(scale q.k / softcap) + bias
    return True, weight * factor, ds, dgate, ds * slope
