"""Additive attention on NumPy arrays: forward and backward."""

from __future__ import annotations

from typing import Any

import numpy as np

from .job import TILE, Geometry, Operands, geometry, sections
from .memory import address
from .ownership import UNITS
from .softmax import delta

__all__ = ["backward", "delta", "forward", "refuses"]

TANH_FLOPS = 20.0
"""How many operations of a product a tanh takes as long as."""


def refuses(problem: Any) -> str | None:
    """Say why `problem` cannot run here; there is no such reason today."""
    return None


def forward(problem: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return out (B, H, N, E) in the dtype of v, and lse (B, H, N)."""
    p, (job, g, flops) = problem, _describe(problem)
    out = np.empty((*p.q.shape[:3], g.e), p.v.dtype.newbyteorder("="))
    lse = np.empty(p.q.shape[:3], g.dtype)
    job.describe_result("out", out, onto=False)
    job.put("lse", address(lse), *lse.strides[:2])
    size = g.dtype.itemsize
    starts, scratch = sections((
        TILE * g.d_padded * size, TILE * g.e_padded * size, TILE * TILE * size, 0, 0, 8 * TILE, 8,
        TILE * size, TILE * g.lanes * size, TILE * size, TILE * g.d * size,
        TILE * g.e_padded * size, 0))
    job.put("ahead", *starts)
    job.run("additive.forward", g.batch * g.heads * g.row_tiles, scratch, flops)
    return out, lse


def backward(problem: Any, dout: np.ndarray, lse: np.ndarray,
             delta: np.ndarray) -> dict[str, np.ndarray]:
    """Return the gradients of q, k, v and w, in acc."""
    p, (job, g, flops) = problem, _describe(problem)
    lse_at = job.hold(lse)
    job.describe("q", p.q, job.q_index, job.q_lengths, job.scale, lse_at)
    job.describe("dout", dout, job.q_index, job.q_lengths, 0, lse_at)
    job.put("delta", job.hold(delta))
    found = {name: np.zeros(x.shape, g.dtype) for name, x in (("q", p.q), ("k", p.k), ("v", p.v))}
    for name, x in zip(("dq", "dk", "dv"), found.values(), strict=True):
        job.describe_result(name, x, onto=True)

    pairs = g.batch * g.groups
    chunks = max(1, min(-(-UNITS // max(1, pairs)), g.row_tiles, g.key_tiles))
    shared = g.heads // max(1, g.groups)
    dw = np.zeros((g.batch, g.groups, chunks, shared, g.d))
    job.put("additive.dw", job.hold(dw, np.float64), dw.strides[2])
    size = g.dtype.itemsize
    square, a, v, keys = (width * TILE * size for width in (TILE, g.d_padded, g.e_padded, g.d))
    starts, scratch = sections((
        a, v, keys, v, square, square, keys, keys, a, v, g.d * g.lanes * size, g.d * size,
        8 * TILE, 8, TILE * size, TILE * size))
    job.put("additive.q", *starts)
    job.put("chunks", chunks)
    for phase in range(chunks):
        job.put("phase", phase)
        job.run("additive.backward", pairs * chunks, scratch, 2 * flops)
    found["w"] = dw.sum((0, 2)).reshape(g.heads, g.d).astype(g.dtype)
    return found


def _describe(p: Any) -> tuple[Operands, Geometry, float]:
    """Make the record of a call; also return how much it has to compute."""
    g = geometry(len(p.q), p.q.shape[1:], p.v.shape[1:], p.q.dtype.newbyteorder("="))
    ones = np.ones(g.heads, g.dtype)
    job = Operands(g, g.record, p.q, p.k, p.v, ones, p.q_lengths, p.kv_lengths)
    tiles = job.put_mask(p.blocks, p.layout)
    job.put("additive.w", job.hold(p.w), g.d * g.dtype.itemsize)
    return job, g, tiles * TILE * TILE * (TANH_FLOPS * g.d + 2.0 * g.e)
