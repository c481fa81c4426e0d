"""Which key blocks are the most important to a group's queries, on NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import threads
from .compile import native
from .host import vector_bytes
from .job import DEPTH_OF_PAIRS, HELPER_FLOPS, SOURCE_CODES, TILE, kind_of, sections
from .memory import address, aligned
from .records import PACK

SECTIONS = "queries scores totals shares row lse best place"

IMPORTANCE = np.dtype([
    ("q", PACK), ("k", PACK),
    *((name, "i8") for name in (
        "size operand fold heads groups n d_depth d_padded row_tiles key_tiles "
        # float lse (batch, heads, n); int32 (batch,) position of query 0, and tokens not padding
        "lse offset tokens "
        "out "                      # int32 (batch, groups, n, count)
        # of blocks that are summed up and blocks that are selected, in tokens
        "block stride select "
        "count initial local causal "
        "width "                    # columns of `shares`, whole vectors
        "across "                   # numbers in a row of importances
        ).split()),
    ("ahead", [(name, "i8") for name in SECTIONS.split()]),
])


def refuses(problem: Any) -> str | None:
    """Say why `problem` cannot run here; there is no such reason today."""
    return None


def forward(problem: Any) -> np.ndarray:
    """Return numbers of blocks (B, G, N, count), int32, ascending, then -1."""
    p = problem
    kind, dtype, operand = kind_of(p.q.dtype)
    batch, heads, n, d = p.q.shape
    groups, m = p.k.shape[1:3]
    fold, lanes = 2 if operand.itemsize == 2 else 1, vector_bytes() // dtype.itemsize
    step = lanes if fold == 1 else DEPTH_OF_PAIRS
    d_padded = -(-d // step) * step
    d_depth = d if fold == 1 else d_padded
    row_tiles, key_tiles = -(-n // TILE), -(-m // TILE)
    found = np.empty((batch, groups, n, p.count), np.int32)
    blocks = -(-p.tokens // p.select_block)
    width = _whole(((TILE - 1) * p.stride + p.block_size - 1) // p.select_block + 2, lanes)
    across = _whole(blocks, lanes) + width
    q, k = (x if x.flags.aligned and x.dtype in SOURCE_CODES else
            np.require(x, x.dtype.newbyteorder("="), ["ALIGNED"]) for x in (p.q, p.k))
    scale = np.full(heads, p.scale, dtype)
    lse = np.ascontiguousarray(p.lse, dtype)
    ints = [np.ascontiguousarray(x, np.int32) for x in (p.offset, p.q_lengths, p.kv_lengths,
                                                        p.complete)]
    offset, q_lengths, kv_lengths, complete = map(address, ints)
    columns = aligned((batch * groups * key_tiles * TILE * d_depth,), operand)
    notes = aligned((batch * groups * key_tiles,), np.uint8)
    shared = heads // max(1, groups)
    starts, scratch = sections((
        shared * TILE * d_padded * operand.itemsize, TILE * TILE * dtype.itemsize,
        TILE * TILE * dtype.itemsize, TILE * width * dtype.itemsize,
        TILE * across * dtype.itemsize, shared * TILE * dtype.itemsize,
        p.count * dtype.itemsize, 8 * p.count))
    record = np.array((
        (heads, n, row_tiles, d, d_padded, address(q), *q.strides, SOURCE_CODES[q.dtype],
         q_lengths, address(scale), 0, 1, n, 0, 0, 0, 0, 0, 0, 0),
        (groups, m, key_tiles, d, d_padded, address(k), *k.strides, SOURCE_CODES[k.dtype],
         complete, 0, 0, 1, m, 0, 0, 0, 0, address(columns), 0, address(notes)),
        dtype.itemsize, operand.itemsize, fold, heads, groups, n, d_depth, d_padded, row_tiles,
        key_tiles, address(lse), offset, kv_lengths, address(found), p.block_size, p.stride,
        p.select_block, p.count, p.num_initial, p.num_local, p.causal, width, across, starts),
        IMPORTANCE)
    place = address(record)
    packed = batch * groups * key_tiles
    threads.run(native("packing.pack_tiles", kind), place + IMPORTANCE.fields["k"][1], packed, 0,
                int(64.0 * packed * TILE * d / HELPER_FLOPS))
    products = 2.0 * batch * heads * n * m * d / (2 if p.causal else 1)
    threads.run(native("importance.select", kind), place, batch * groups * row_tiles, scratch,
                int(products / HELPER_FLOPS))
    return found


def _whole(count: int, lanes: int) -> int:
    return -(-count // lanes) * lanes
