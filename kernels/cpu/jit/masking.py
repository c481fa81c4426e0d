"""Which pairs of a tile are allowed, as one 64-bit word per query row, and products that obey it.

Key `j` of the tile is bit `j`. Full tiles that no length clips need no words. In all others the
weights of masked pairs are exact zeros, which a product may use as long as what they meet is
finite; for tiles that noted something else there is `exact_product`.
"""

from __future__ import annotations

import numpy as np

from ..compile import part
from .access import load, store

ONE = np.uint64(1)
ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
STRAIGHT, TRANSPOSED = np.bool_(False), np.bool_(True)


@part
def runs_of(runs, layout, t):
    """Return where the runs of row `t` of tiles start and stop in a layout."""
    place = runs.start + (layout * (runs.tiles + 1) + t) * 8
    return load(place, np.int64(0)), load(place + 8, np.int64(0))


@part
def bit_tile(runs, run, step):
    """Return the number of the bit tile of a run's tile `step`, -1 where the run is full."""
    named = np.int64(load(runs.tile + 4 * run, np.int32(0)))
    return np.int64(load(runs.names + 4 * (named + step), np.int32(0))) if named >= 0 else named


@part
def allowed(bits, name, row, keys):
    """Return the word of a row: of bit tile `name` (-1: full), clipped to the first `keys` keys."""
    word = load(bits + (name * 64 + row) * 8, ONE) if name >= 0 else ALL
    return word if keys >= 64 else word & ((ONE << np.uint64(keys)) - ONE)


@part
def exact_product(rows, width, size, weights, row_bytes, words, words_row, transposed,
                  source, target, padded, unit):
    """Add weights @ source to target (transposed: weights^T @ source), allowed pairs alone."""
    for i in range(rows):
        word = load(words + i * words_row, ONE)
        for j in range(64):
            if (word >> np.uint64(j)) & ONE:
                weight = load(weights + i * row_bytes + j * size, unit)
                read, write = (i, j) if transposed else (j, i)
                for x in range(width):
                    place = target + (write * padded + x) * size
                    product = weight * load(source + (read * padded + x) * size, unit)
                    store(place, load(place, unit) + product)
