"""Softmax over listed keys on NumPy arrays: forward and backward."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import threads
from .compile import native
from .host import vector_bytes
from .job import HELPER_FLOPS, SOURCE_CODES, TILE, sections
from .memory import address, aligned
from .records import EDGES

ROWS = 64
"""Queries, or keys, that a unit of work does."""

SHARED = 32
"""Heads of a tile, at most: their scores stay in the nearest cache."""

LISTED_BEHIND = 64
"""How far a kernel looks ahead in a list."""


def refuses(problem: Any) -> str | None:
    """Say why `problem` cannot run here; there is no such reason today."""
    return None


def forward(problem: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return out (B, H, N, E) in the dtype of v, and lse (B, H, N)."""
    job = Job(problem)
    batch, heads, n, e = job.shape
    out = np.empty((batch, heads, n, e), problem.v.dtype.newbyteorder("="))
    lse = np.empty((batch, heads, n), job.dtype)
    job.describe("out", out)
    job.record["lse"] = address(lse)
    job.run("edges.forward", len(job.runs) * job.chunks, 2.0 * job.pairs * job.width)
    return out, lse


def backward(problem: Any, dout: np.ndarray, out: np.ndarray, lse: np.ndarray,
             dlse: np.ndarray | None) -> dict[str, np.ndarray]:
    """Return the gradients by argument; that of the bias is (copies, H, edges)."""
    p, job = problem, Job(problem)
    native_dtype = p.v.dtype.newbyteorder("=")
    job.describe("dout", dout)
    job.describe("out", out)
    for name, x in (("lse", lse), ("dlse", dlse)):
        if x is not None:
            job.record[name] = job.hold(np.ascontiguousarray(x, job.dtype))
    found = {name: np.empty(x.shape, native_dtype)
             for name, x in (("q", p.q), ("k", p.k), ("v", p.v)) if x is not None}
    for name, x in found.items():
        job.describe(f"d{name}", x)
    batch, heads = p.edges.owner.shape
    if p.bias is not None:
        total = len(p.edges.key)
        found["bias"] = x = np.zeros((p.copies, heads, total), job.dtype)
        job.put("dbias", address(x), x.strides[0] * (p.copies > 1), x.strides[1])
    by_key = p.edges.by_key
    counts = p.edges.start[job.runs[:, 4], -1] - p.edges.start[job.runs[:, 4], 0]
    sizes = 2 * job.runs[:, 3] * counts
    kept_at = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    groups = p.v.shape[1]
    pair_runs = np.searchsorted(job.runs[:, 0] * groups + job.runs[:, 1],
                                np.arange(batch * groups + 1)).astype(np.int64)
    kept = aligned((int(kept_at[-1]),), job.dtype)
    job.put("kept", job.hold(kept), job.hold(kept_at), job.hold(pair_runs),
            job.hold(by_key.start), job.hold(_readable_beyond(by_key.query)),
            job.hold(by_key.edge))
    job.run("edges.by_query", len(job.runs) * job.chunks, 4.0 * job.pairs * job.width)
    job.run("edges.by_key", batch * groups * -(-p.v.shape[2] // ROWS),
            2.0 * job.pairs * job.width)
    return found


class Job:
    """One call: a record of addresses, and what keeps them valid."""

    def __init__(self, problem: Any) -> None:
        p, edges = problem, problem.edges
        self.dtype = np.dtype(np.float64 if p.v.dtype == np.float64 else np.float32)
        batch, heads = edges.owner.shape
        n, (groups, m, e) = edges.start.shape[1] - 1, p.v.shape[1:]
        d = 0 if p.q is None else p.q.shape[3]
        self.shape, self.width, self.pairs = (batch, heads, n, e), d + e, edges.pairs
        self.runs = edges.runs(groups, SHARED)
        self.chunks = -(-n // ROWS)
        self.alive: list[Any] = []
        self.record = np.zeros((), EDGES)
        size, lanes = self.dtype.itemsize, vector_bytes() // self.dtype.itemsize
        d_padded, e_padded = (-(-width // lanes) * lanes for width in (d, e))
        self.put("size", size, lanes, heads, groups, n, m, d, e, d_padded, e_padded,
                 self.hold(self.runs), self.chunks, ROWS, self.hold(edges.start),
                 self.hold(_readable_beyond(edges.key)))
        self.describe("v", p.v)
        # without q and k there are products of width 0
        self.describe("q", p.v[..., :0] if p.q is None else p.q)
        self.describe("k", p.v[..., :0] if p.k is None else p.k)
        self.record["scale"] = p.scale
        self.record["softcap"] = p.softcap or 0.0
        if p.bias is not None:
            bias = np.ascontiguousarray(p.bias, self.dtype)
            self.put("bias", self.hold(bias), *(0 if length == 1 else step for length, step
                                                in zip(bias.shape[:2], bias.strides, strict=False)))
        shared = int(self.runs[:, 3].max(initial=0))
        tile = shared * TILE * size
        starts, scratch = sections((
            shared * d_padded * size, shared * e_padded * size,
            shared * max(d_padded, e_padded) * size, tile, tile, tile * (p.softcap is not None),
            8 * shared, 4 * (TILE + LISTED_BEHIND), shared * size, shared * lanes * size,
            shared * size, max(shared, ROWS) * size, ROWS * d_padded * size,
            ROWS * e_padded * size))
        self.scratch = scratch
        self.put("at_q", *starts)

    def put(self, field: str, *values: int) -> None:
        """Write integers from a field on."""
        first = EDGES.fields[field][1] // 8
        self.record.reshape(1).view(np.int64)[first:first + len(values)] = values

    def hold(self, x: np.ndarray) -> int:
        """Keep `x` for as long as the job lives; return its address."""
        self.alive.append(x)
        return address(x)

    def describe(self, name: str, x: np.ndarray) -> None:
        """Make an array of contiguous rows known under `name`; a copy, if it has none."""
        if not x.flags.aligned or x.dtype not in SOURCE_CODES:
            x = np.require(x, x.dtype.newbyteorder("="), ["ALIGNED"])
        if x.strides[3] != x.itemsize and x.shape[3] > 1:
            x = np.ascontiguousarray(x)
        self.put(name, self.hold(x), *x.strides[:3], SOURCE_CODES[x.dtype])

    def run(self, kernel: str, units: int, flops: float) -> None:
        """Run a kernel over its units of work."""
        kind = "float64" if self.dtype == np.float64 else "float32"
        threads.run(native(kernel, kind), address(self.record), units, self.scratch,
                    int(flops / HELPER_FLOPS))


def _readable_beyond(index: np.ndarray) -> np.ndarray:
    """Return an int32 list that can be read beyond its end."""
    return np.concatenate([index, np.zeros(LISTED_BEHIND, np.int32)], dtype=np.int32)
