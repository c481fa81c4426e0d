"""Softmax over listed blocks of keys on NumPy arrays: forward and backward.

A block's keys become one or more tiles of at most 64 keys. Where a block is no multiple of 64, keys
and values are spread first, so that each tile begins where a tile of 64 does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .job import TILE, Geometry, Operands, geometry, sections
from .memory import address
from .ownership import UNITS
from .softmax import delta, pack_all

__all__ = ["backward", "delta", "forward", "refuses"]

LEAST_BLOCK = 8
"""Smaller blocks would fill tiles with little else than padding."""

ROWS = 192
"""Rows that are to meet a block of keys at a time, on average."""

CHUNK_ROWS = (256, 2**15)
"""Rows of a chunk of a forward, at least and at most."""

ROUND_BYTES = 2**26, 2**27
"""What is packed of a round of a backward; the most only if few rows met a block otherwise."""


def refuses(problem: Any) -> str | None:
    """Say why `problem` cannot run here."""
    if problem.block_size < LEAST_BLOCK:
        return f"blocks must have at least {LEAST_BLOCK} keys"
    return None


class Tiles(NamedTuple):
    """How blocks of keys lie in tiles: `parts` tiles each, of `width` keys or fewer."""

    parts: int
    width: int
    slots: np.ndarray | None
    """Where each key goes; None if all stay."""
    count: int
    """Slots in all."""


def tiles_of(block_size: int, m: int) -> Tiles:
    """Divide blocks into tiles."""
    parts = -(-block_size // TILE)
    width = -(-block_size // parts)
    if block_size % TILE == 0:
        return Tiles(parts, width, None, m)
    block, inside = np.divmod(np.arange(m), block_size)
    slots = (block * parts + inside // width) * TILE + inside % width
    return Tiles(parts, width, slots, -(-m // block_size) * parts * TILE)


def spread(x: np.ndarray, tiles: Tiles) -> np.ndarray:
    """Put keys where tiles begin."""
    if tiles.slots is None:
        return x
    wide = np.zeros((*x.shape[:2], tiles.count, x.shape[3]), x.dtype)
    wide[:, :, tiles.slots] = x
    return wide


def describe(p: Any) -> tuple[Operands, Geometry, Tiles]:
    """Make the record of a call."""
    tiles = tiles_of(p.block_size, p.k.shape[2])
    k, v = spread(p.k, tiles), spread(p.v, tiles)
    g = geometry(len(p.q), p.q.shape[1:], v.shape[1:], p.q.dtype.newbyteorder("="))
    # lengths count slots where these are rows; tiles are clipped to lengths of keys
    job = Operands(g, g.record, p.q, k, v, p.scale, p.q_lengths, p.kv_lengths)
    if tiles.slots is not None:
        ends = np.append(tiles.slots, tiles.count).astype(np.int32)
        job.put("k.lengths", job.hold(ends[p.kv_lengths], np.int32))
        job.put("v.lengths", job.hold(ends[p.kv_lengths], np.int32))
    lists = p.lists
    job.put("lists.start", job.hold(lists.start, np.int64), job.hold(lists.token, np.int32),
            lists.start.shape[1] - 1, p.block_size, tiles.parts, tiles.width,
            job.hold(p.kv_lengths, np.int32), job.hold(p.offset, np.int32), p.causal)
    if p.softcap is not None:
        job.put_float("softcap", p.softcap)
    return job, g, tiles


def flops(p: Any, g: Geometry) -> float:
    """Operations of a forward."""
    return 2.0 * len(p.lists.token) * p.block_size * g.heads / max(1, g.groups) * (g.d + g.e)


def meeting(p: Any, g: Geometry) -> int:
    """Return how many tokens a chunk must have for ROWS of them to meet a block, on average."""
    shared, lines = g.heads // max(1, g.groups), max(1, g.batch * g.groups)
    blocks = p.lists.start.shape[1] - 1
    return -(-ROWS * blocks * lines * g.n // max(1, len(p.lists.token) * shared))


def forward(p: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return out (B, H, N, E) in the dtype of q, and lse (B, H, N)."""
    job, g, _ = describe(p)
    shared, lines = g.heads // max(1, g.groups), g.batch * g.groups
    out = np.empty((*p.q.shape[:3], g.e), p.q.dtype.newbyteorder("="))
    lse = np.empty(out.shape[:3], g.dtype)
    job.describe_result("out", out, False)
    job.put("lse", address(lse), *lse.strides[:2])
    least, most = (-(-rows // max(1, shared)) for rows in CHUNK_ROWS)
    # many cores are to have something to do, too
    chunk = max(least, min(meeting(p, g), most, -(-g.n * lines // UNITS)))
    chunk = min(chunk, max(1, g.n))
    starts, scratch = forward_scratch(g, chunk * shared)
    job.put("lists.chunk", chunk)
    job.put("near", *starts)
    tiles, each = lines * g.key_tiles, g.operand.itemsize
    pack_all(job, "k", tiles, g.d_depth, each, "columns")
    pack_all(job, "v", tiles, g.e_padded, each, "pairs" if g.fold > 1 else "rows")
    job.run("selected.forward", lines * -(-g.n // chunk), scratch, flops(p, g))
    return out, lse


def forward_scratch(g: Geometry, rows: int) -> tuple[tuple[int, ...], int]:
    """Lay out what a thread needs for a forward: where each section starts, and all bytes."""
    size, each = g.dtype.itemsize, g.operand.itemsize
    # products may read and write whole tiles of rows
    more = rows + TILE
    return sections((
        more * g.d_padded * each, more * g.e_padded * size, rows * g.lanes * size, rows * size,
        8 * TILE, TILE * g.d_padded * each, TILE * g.lanes * size, TILE * size,
        TILE * g.e_padded * size, TILE * TILE * size, 8 * TILE, TILE * size, TILE * size))


def backward(p: Any, dout: np.ndarray, lse: np.ndarray, delta: np.ndarray,
             ) -> dict[str, np.ndarray]:
    """Return the gradients of q, k and v; lse and delta are (B, H, N)."""
    job, g, tiles = describe(p)
    shared, lines = g.heads // max(1, g.groups), g.batch * g.groups
    lse_at = job.hold(lse)
    job.describe("q", p.q, job.q_index, job.q_lengths, job.scale, lse_at)
    job.describe("dout", dout, job.q_index, job.q_lengths, 0, lse_at)
    dq = np.empty(p.q.shape, p.q.dtype.newbyteorder("="))
    job.describe_result("dq", dq, False)
    slots = g.key_tiles * TILE
    dk = np.zeros((g.batch, g.groups, slots, g.d_padded), g.dtype)
    dv = np.zeros((g.batch, g.groups, slots, g.e_padded), g.dtype)
    job.put("delta", job.hold(delta))
    job.put("dk_sums", address(dk), address(dv))

    each, size = g.operand.itemsize, g.dtype.itemsize
    of_token = shared * lines * (
        (g.d_padded + g.e_padded) * each + (g.d_padded + 2) * size)
    blocks = p.lists.start.shape[1] - 1
    chunks = max(1, min(-(-UNITS // max(1, lines)), blocks // 4, g.n // TILE))
    few, many = (nbytes // max(1, of_token) // TILE * TILE for nbytes in ROUND_BYTES)
    held = max(TILE, min(max(few, meeting(p, g) * chunks), many, g.n))
    rows, notes = lines * held * shared, lines * -(-held // TILE)
    at = job.workspace(q=(rows + TILE) * g.d_padded * each, dout=(rows + TILE) * g.e_padded * each,
                       shifts=rows * size, means=rows * size, dq=rows * g.d_padded * size,
                       q_notes=notes, dout_notes=notes)
    for name in ("q", "dout"):
        job.put(f"{name}.rows", at[name], 0, 0, at[f"{name}_notes"])
    job.put("shifts", at["shifts"], at["means"], at["dq"])
    starts, scratch = backward_scratch(g)
    job.put("far", *starts)
    job.put("chunks", chunks)
    for first in range(0, g.n, held):
        last = min(first + held, g.n)
        job.put("lists.first", first, last)
        share = flops(p, g) * (last - first) / g.n
        units = lines * -(-(last - first) // TILE)
        job.run("selected.prepare", units, flops=share)
        for phase in range(chunks):
            job.put("phase", phase)
            job.run("selected.backward", lines * chunks, scratch, share / chunks)
        job.run("selected.finish", units, TILE * size, share)
    own = slice(p.k.shape[2]) if tiles.slots is None else tiles.slots
    return {"q": dq, "k": dk[:, :, own, :g.d], "v": dv[:, :, own, :g.e]}


def backward_scratch(g: Geometry) -> tuple[tuple[int, ...], int]:
    """Lay out what a thread needs for a backward: where each section starts, and all bytes."""
    size, each, pairs = g.dtype.itemsize, g.operand.itemsize, g.fold > 1
    keys, values, square = TILE * g.d_padded, TILE * g.e_padded, TILE * TILE * size
    return sections((
        keys * each, keys * each, keys * each * pairs, values * each, 8 * TILE, keys * each,
        values * each, keys * each * pairs, values * each * pairs, TILE * size, TILE * size,
        square, square, square, keys * size, TILE * TILE * each * pairs, 8 * TILE))
