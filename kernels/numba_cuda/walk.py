"""What a block of threads does, and which tiles it visits: those that a BlockMask lists."""

from __future__ import annotations

from .compile import cuda, device
from .pairs import NOWHERE


@device
def own_queries(p, width, rows, columns):
    """Return which part of a result (B, H, N, width) the block owns.

    That is the first query, the first column, the batch item and the head.
    """
    heads, n = p.q.shape[1], p.q.shape[2]
    tiles = (n + rows - 1) // rows
    slices = (width + columns - 1) // columns
    # the last tiles first: under a causal mask they take longest
    unit = cuda.gridDim.x - 1 - cuda.blockIdx.x
    head = unit // (tiles * slices)
    return unit % tiles * rows, unit // tiles % slices * columns, head // heads, head % heads


@device
def runs(lists, layout, line, live):
    """Return the first run of tiles of a line, and where they end; none unless it is `live`."""
    first = lists.start[layout, line]
    return first, lists.start[layout, line + 1] if live else first


@device
def name_of_tile(lists, run, tile):
    """Return the name of a tile of a run; -1 if all its pairs are allowed."""
    names = lists.tile[run]
    return -1 if names < 0 else lists.names[names + tile]


@device
def name_at(lists, layout, line, tile):
    """Return the name of the tile at a place; NOWHERE if it is not visited."""
    name = NOWHERE
    first, last = runs(lists, layout, line, True)
    for run in range(first, last):
        step = tile - lists.first[run]
        if 0 <= step and step < lists.length[run]:
            name = name_of_tile(lists, run, step)
    return name
