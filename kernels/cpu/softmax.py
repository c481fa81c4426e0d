"""Tiled softmax attention on NumPy arrays: forward, backward, weights.

A bias of -inf and a gate of exactly 0 mask a pair, as the BlockMask and the lengths do: what lies
behind it is never looked at, with one exception. The gradient of a closed gate is what opening it
would change, so it does meet the values behind.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .jit import backward as back
from .jit import forward as ahead
from .job import Job
from .memory import address
from .ownership import TableGradient, TermGradient


def refuses(problem: Any) -> str | None:
    """Say why `problem` cannot run here; there is no such reason today."""
    return None


def forward(problem: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return out (B, H, N, E) and lse (B, H, N) in the accumulation dtype."""
    job = Job(problem)
    batch, heads, n, _ = problem.q.shape
    out = np.empty((batch, heads, n, problem.v.shape[3]), job.dtype)
    lse = np.empty((batch, heads, n), job.dtype)
    job["out"], job["lse"] = address(out), address(lse)
    job.pack("k", columns=True)
    job.pack("v", rows=True)
    job.run(ahead.forward, batch * heads * job["row_tiles"], ahead.scratch_bytes)
    return out, lse


def backward(problem: Any, dout: np.ndarray, lse: np.ndarray, delta: np.ndarray,
             ) -> dict[str, np.ndarray]:
    """Return the gradients by argument; lse and delta (B, H, N) are those of the merged result."""
    p, job = problem, Job(problem, lse)
    batch, heads, n, d = p.q.shape
    _, groups, m, e = p.v.shape
    row_tiles, key_tiles = int(job["row_tiles"]), int(job["key_tiles"])
    dq = np.empty((batch, heads, n, d), job.dtype)
    dk = np.empty((batch, groups, m, d), job.dtype)
    dv = np.empty((batch, groups, m, e), job.dtype)
    dscale = np.empty((batch, heads, row_tiles))
    job["dq"], job["dk"], job["dv"], job["dscale"] = map(address, (dq, dk, dv, dscale))
    job.describe("dout", dout, p.q_lengths, lse=lse)
    job["lse"], job["delta"] = job["q"]["lse"], job.hold("delta", delta, job.dtype)
    terms = {name: TermGradient(term, batch, heads, row_tiles, job.dtype)
             for name, term in (("bias", p.bias), ("gate", p.gate)) if term is not None}

    job.pack("k", rows=True, columns=True)
    job.pack("v", columns=True)
    labels = [] if p.offsets is None else [TableGradient.labels(len(p.offsets), batch, heads)]
    members, start = job.own("rows", terms, labels, batch, heads)
    job["slices"] = row_tiles
    if p.offsets is not None:
        table = TableGradient(p.offsets.shape, heads, members, start, row_tiles)
        job["slices"], job["doffsets"] = table.slices, address(table.copies)
        job["doffsets_unit"], job["doffsets_h"] = table.strides
    job.run(back.rows_pass, (len(start) - 1) * job["slices"], back.scratch_bytes)

    job.unpack("k", "v")
    job.pack("q", rows=True)
    job.pack("dout", rows=True)
    _, start = job.own("columns", terms, [], batch, groups)
    job.run(back.columns_pass, (len(start) - 1) * key_tiles, back.scratch_bytes)

    gradients = {"q": dq, "k": dk, "v": dv, "scale": dscale.sum((0, 2)).astype(job.dtype)}
    gradients |= {name: term.result(job.dtype) for name, term in terms.items()}
    if p.offsets is not None:
        gradients["offsets"] = table.result(job.dtype)
    return gradients


def weights(problem: Any, lse: np.ndarray) -> np.ndarray:
    """Return the probabilities (B, H, N, M), before dropout."""
    from pyattn.kernels.array_api import softmax

    return softmax.weights(problem, lse)
