"""Talking-heads attention on NumPy arrays: forward and backward."""

from __future__ import annotations

from typing import Any

import numpy as np

from .job import TILE, Operands, geometry, sections
from .memory import address
from .ownership import UNITS

LEAST_ROWS = 8

STRIP_BYTES = 2**15
"""What a block's scores of one kind take, if it can be: there are five kinds."""

KEPT_BYTES = 2**21
"""What the weights of a block of queries may take, for all their keys, to be kept in scratch."""


def refuses(problem: Any) -> str | None:
    """Say why `problem` cannot run here; there is no such reason today."""
    return None


def forward(problem: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return out (B, Hv, N, E) in the dtype of v, and lse (B, H, N)."""
    job, call = _describe(problem)
    g, heads, n = call.g, call.heads, problem.q.shape[2]
    out = np.empty((g.batch, call.heads_out, n, g.e), problem.v.dtype.newbyteorder("="))
    lse = np.empty((g.batch, heads, n), g.dtype)
    job.describe_result("out", out, onto=False)
    job.put("lse", address(lse))
    call.pack(job, q="rows", k="columns", v="rows")
    size, rows, strip = g.dtype.itemsize, call.rows, call.rows * TILE * g.dtype.itemsize
    slots = g.key_tiles if g.key_tiles * heads * strip <= KEPT_BYTES else 0
    each = -(-heads * rows // TILE) * TILE * size
    starts, scratch = sections((
        call.heads_in * strip, max(1, slots) * heads * strip, 0, call.heads_out * strip, 0,
        call.heads_out * rows * g.e_padded * size, 0, 0, 8 * rows, 8, (slots + 1) * each,
        heads * rows * g.lanes * size, each, each, each))
    job.put("talking.slots", slots)
    job.put("talking.products", *starts)
    job.run("talking_heads.forward", g.batch * g.row_tiles * (TILE // rows), scratch, call.flops)
    return out, lse


def backward(problem: Any, dout: np.ndarray, lse: np.ndarray) -> dict[str, np.ndarray]:
    """Return the gradients by argument, in acc; that of b_post always."""
    p, (job, call) = problem, _describe(problem)
    g, heads, n = call.g, call.heads, p.q.shape[2]
    size, rows, strip = g.dtype.itemsize, call.rows, call.rows * TILE * g.dtype.itemsize
    job.describe("dout", dout, job.q_index, job.q_lengths)
    job.put("lse", job.hold(lse))
    call.pack(job, q="rows", dout="rows", k="both", v="columns")
    delta = np.empty(lse.shape, g.dtype)
    dq = np.zeros((g.batch, call.heads_in, g.row_tiles * TILE, g.d_padded), g.dtype)
    job.put("talking.delta", job.hold(delta), job.hold(dq))
    found = {"k": np.zeros(p.k.shape, g.dtype), "v": np.zeros(p.v.shape, g.dtype)}
    job.describe_result("dk", found["k"], onto=True)
    job.describe_result("dv", found["v"], onto=True)
    chunks = max(1, min(-(-UNITS // max(1, g.batch)), g.row_tiles, g.key_tiles))
    post, pre = (heads + 1) * call.heads_out, call.heads_in * heads
    dw = np.zeros((g.batch * chunks, post + pre))
    job.put("talking.dw", job.hold(dw, np.float64), dw.strides[0])
    most = max(call.heads_in, heads + 1) * -(-max(call.heads_out, heads) // g.lanes) * g.lanes
    each = -(-heads * rows // TILE) * TILE * size
    starts, scratch = sections((
        call.heads_in * strip, (heads + 1) * strip, heads * strip, call.heads_out * strip,
        call.heads_out * strip, 0, p.k.shape[1] * TILE * g.d_padded * size,
        p.v.shape[1] * TILE * g.e_padded * size, 8 * rows, 8, each, 0, each, 0,
        max(most, TILE) * size))
    job.put("talking.products", *starts)
    job.put("chunks", chunks)
    job.run("talking_heads.means", g.batch * g.row_tiles * (TILE // rows), scratch, call.flops)
    for phase in range(chunks):
        job.put("phase", phase)
        job.run("talking_heads.backward", g.batch * chunks, scratch, 3 * call.flops)
    sums = dw.sum(0).astype(g.dtype)
    found["q"] = dq[:, :, :n, :g.d] * g.dtype.type(p.scale)
    found["w_post"] = sums[:post].reshape(heads + 1, call.heads_out)[:-1]
    found["b_post"] = sums[:post].reshape(heads + 1, call.heads_out)[-1]
    found["w_pre"] = sums[post:].reshape(call.heads_in, heads)
    return found


class Call:
    """What follows from the shapes of a call."""

    def __init__(self, p: Any) -> None:
        dtype = np.dtype(np.float64 if p.v.dtype == np.float64 else np.float32)
        self.g = g = geometry(len(p.q), p.q.shape[1:], p.v.shape[1:], dtype)
        self.heads_in, self.heads = p.w_pre.shape
        self.heads_out = p.w_post.shape[1]
        self.sources = {"q": (self.heads_in, g.n, g.row_tiles, g.d, g.d_padded),
                        "k": (p.k.shape[1], g.m, g.key_tiles, g.d, g.d_padded),
                        "v": (p.v.shape[1], g.m, g.key_tiles, g.e, g.e_padded),
                        "dout": (self.heads_out, g.n, g.row_tiles, g.e, g.e_padded)}
        most = max(self.heads_in, self.heads, self.heads_out)
        self.rows = TILE
        while self.rows > LEAST_ROWS and most * self.rows * TILE * dtype.itemsize > STRIP_BYTES:
            self.rows //= 2
        self.flops = 0.0

    def pack(self, job: Operands, **layouts: str) -> None:
        """Pack whole arrays, in parallel, as rows, columns or both."""
        g = self.g
        for name, layout in layouts.items():
            heads, _, tiles, width, padded = self.sources[name]
            count = g.batch * heads * tiles
            each = count * TILE * g.dtype.itemsize
            at = job.workspace(rows=each * padded * (layout != "columns"),
                               columns=each * width * (layout != "rows"), notes=count)
            job.put(f"{name}.rows", at["rows"], at["columns"], 0, at["notes"])
            job.run("packing.pack_tiles", count, flops=64.0 * count * TILE * width, at=name)


def _describe(p: Any) -> tuple[Operands, Call]:
    """Make the record of a call."""
    call = Call(p)
    g = call.g
    record = g.with_fields(call.sources)
    job = Operands(g, record, p.q, p.k, p.v, np.full(call.heads_in, p.scale, g.dtype), p.q_lengths,
                   p.kv_lengths)
    tiles = job.put_mask(p.blocks, p.layout)
    call.flops = 2.0 * TILE * TILE * tiles * (call.heads_in * g.d + call.heads_out * g.e)
    job.put("talking.heads", call.heads, call.rows, call.rows * TILE)
    job.put("talking.w_pre", job.hold(p.w_pre), job.hold(p.w_post),
            0 if p.b_post is None else job.hold(p.b_post))
    return job, call
