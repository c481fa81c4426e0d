"""Products of a tile's rows and keys that leave out what nobody sees, strip by strip.

Of a tile at the edge of what is allowed about half the pairs are masked, and they lie together:

    keys ->  ####............     A strip of 16 rows (or of 16 keys, where the product is over rows)
    rows     ######..........     meets the keys from the first to the last that one of its rows
             ########........     sees, in whole vectors.

What is left out is not written. Operands are not bfloat16, whose products have another shape.
"""

from __future__ import annotations

import numpy as np

from ..compile import part
from .access import load
from .masking import NONE, ONE
from .packing import TILE
from .vector import multiply

STRIP, WORD = np.int64(16), np.int64(8)


@part
def multiply_seen(job, rows, depth, a, a_row, columns, words, step, target, target_row, unit,
                  operand):
    """Write the products of rows with the keys, which are `columns`, that they see.

    The words of rows are `step` bytes apart.
    """
    for strip in range(-(-rows // STRIP)):
        r = strip * STRIP
        some = min(STRIP, rows - r)
        first, count = keys_seen(words + r * step, step, some, job.lanes)
        if count:
            multiply(some, count, depth, a + r * a_row * job.size, a_row, 1,
                     columns + first * job.size, TILE,
                     target + (r * target_row + first) * job.size, target_row, 0, unit, operand)


@part
def add_seen(job, rows, width, weights, weights_row, words, step, source, target, unit, operand):
    """Add weights @ source to target, both `width` wide, where weights of masked pairs are 0."""
    for strip in range(-(-rows // STRIP)):
        r = strip * STRIP
        some = min(STRIP, rows - r)
        first, count = keys_seen(words + r * step, step, some, job.lanes)
        if count:
            multiply(some, width, count, weights + (r * weights_row + first) * job.size,
                     weights_row, 1, source + first * width * job.size, width,
                     target + r * width * job.size, width, 1, unit, operand)


@part
def add_seen_transposed(job, rows, width, weights, words, source, target, unit, operand):
    """Add weights^T @ source to target, for weights and words that lie row by row."""
    for strip in range(TILE // STRIP):
        key = strip * STRIP
        first, count = rows_that_see(words, rows, key)
        if count:
            multiply(STRIP, width, count, weights + (first * TILE + key) * job.size, 1, TILE,
                     source + first * width * job.size, width, target + key * width * job.size,
                     width, 1, unit, operand)


@part
def keys_seen(words, step, rows, lanes):
    """Return the first key that some row sees, and how many to the last, in whole vectors."""
    seen = NONE
    for r in range(rows):
        seen |= load(words + r * step, ONE)
    first, stop = TILE, np.int64(0)
    vector = (ONE << np.uint64(lanes)) - ONE
    for u in range(TILE // lanes):
        key = u * lanes
        if seen >> np.uint64(key) & vector:
            first, stop = min(first, key), key + lanes
    return first, max(stop - first, np.int64(0))


@part
def rows_that_see(words, rows, key):
    """Return the first row that sees some of STRIP keys from `key` on, and how many to the last."""
    first, stop = rows, np.int64(0)
    keys = ((ONE << np.uint64(STRIP)) - ONE) << np.uint64(key)
    for r in range(rows):
        if load(words + r * WORD, ONE) & keys:
            first, stop = min(first, r), r + 1
    return first, max(stop - first, np.int64(0))
