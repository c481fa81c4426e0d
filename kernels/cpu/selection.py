"""Which keys score highest, on NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from .job import TILE, Job, geometry, sections
from .softmax import pack_all

ROOM = 4
"""Times as many scores as are wanted are held before the lowest are dropped."""


def refuses(problem: Any) -> str | None:
    """Say why `problem` cannot run here; there is no such reason today."""
    return None


def forward(problem: Any, top: int, floor: float) -> np.ndarray:
    """Return numbers of keys (B, H, N, min(top, M)), int32, ascending, then -1."""
    p = problem
    # the scores are float32 at least: they are to be compared
    dtype = np.dtype(np.float64 if p.q.dtype.itemsize == 8 else np.float32)
    g = geometry(len(p.q), p.q.shape[1:], p.k.shape[1:], dtype)
    count = min(top, g.m)
    found = np.full((g.batch, g.heads, g.n, count), -1, np.int32)
    if not found.size:
        return found
    room = -(-(count * ROOM) // TILE) * TILE
    size = dtype.itemsize
    job = Job(p, g, g.record)
    starts, scratch = sections((TILE * g.d_padded * size, TILE * TILE * size, 8, TILE * size,
                                8 * TILE, TILE * room * size, 4 * TILE * room, 8))
    job.alive.append(found)
    job.put("choice", count, room, count, found.ctypes.data, *starts)
    job.put_float("floor", floor)
    pack_all(job, "k", g.batch * g.groups * g.key_tiles, g.d_depth, size, "columns")
    job.run("selection.choose", g.batch * g.heads * g.row_tiles, scratch, job.flops / 2)
    return found
