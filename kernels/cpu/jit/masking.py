"""Which pairs of a tile are allowed, as one 64-bit word per query row, and products that obey it.

Key `j` of the tile is bit `j`. Full tiles that no length clips need no words. In all others the
weights of masked pairs are exact zeros, which a product may use as long as what they meet is
finite; for tiles that noted something else there is `exact_product`.
"""

from __future__ import annotations

import numpy as np

from ..compile import part
from .access import load, store, widened

NONE, ONE = np.uint64(0), np.uint64(1)
ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
FULL = np.int64(-1)
STRAIGHT, TRANSPOSED = np.bool_(False), np.bool_(True)


@part
def runs_of(runs, layout, t):
    """Return where the runs of row `t` of tiles start and stop in a layout."""
    place = runs.start + (layout * (runs.tiles + 1) + t) * 8
    return load(place, np.int64(0)), load(place + 8, np.int64(0))


@part
def bit_tile(runs, run, step):
    """Return the number of the bit tile of a run's tile `step`, FULL where the run is full."""
    named = np.int64(load(runs.tile + 4 * run, np.int32(0)))
    return np.int64(load(runs.names + 4 * (named + step), np.int32(0))) if named >= 0 else FULL


@part
def next_tiles(runs, run, step, stop, limit, most, names):
    """Walk on to the next tiles that lie side by side, `most` of them at most, below `limit`.

    `run` and `step` say where the walk is, `stop` where the row's runs end. Writes the tiles' names
    (int64) and returns the new place, the first tile and how many.
    """
    tile, tiles = np.int64(0), np.int64(0)
    while run < stop and tiles < most:
        first = np.int64(load(runs.first + 4 * run, np.int32(0)))
        count = min(np.int64(load(runs.count + 4 * run, np.int32(0))), limit - first)
        if step >= count:
            run, step = run + 1, np.int64(0)
            continue
        if tiles == 0:
            tile = first + step
        elif first + step != tile + tiles:
            break
        while step < count and tiles < most:
            store(names + 8 * tiles, bit_tile(runs, run, step))
            step, tiles = step + 1, tiles + 1
    return run, step, tile, tiles


@part
def any_named(names, tiles):
    """Return whether any of the tiles is partial."""
    for u in range(tiles):
        if load(names + 8 * u, np.int64(0)) >= 0:
            return True
    return False


@part
def allowed(bits, name, row, keys):
    """Return the word of a row: of bit tile `name`, clipped to the first `keys` keys."""
    word = load(bits + (name * 64 + row) * 8, ONE) if name >= 0 else ALL
    return word if keys >= 64 else word & ((ONE << np.uint64(keys)) - ONE)


@part
def exact_product(job, rows, width, weights, weights_row, words, words_row, transposed, source,
                  target, padded, unit, operand):
    """Add weights @ source to target (transposed: weights^T @ source), allowed pairs alone.

    `source` is packed as a product over its rows takes it.
    """
    for i in range(rows):
        word = load(words + i * words_row, ONE)
        for j in range(64):
            if (word >> np.uint64(j)) & ONE:
                weight = load(weights + (i * weights_row + j) * job.size, unit)
                read, write = (i, j) if transposed else (j, i)
                for x in range(width):
                    at = (read // job.fold * padded + x) * job.fold + read % job.fold
                    place = target + (write * padded + x) * job.size
                    product = weight * widened(source + at * job.operand, unit, operand)
                    store(place, load(place, unit) + product)
