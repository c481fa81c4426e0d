"""Convolution over tokens on NumPy arrays: forward and backward."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import threads
from .compile import native
from .host import vector_bytes
from .job import HELPER_FLOPS, SOURCE_CODES, TILE, sections
from .memory import address, aligned
from .records import CONSTANT, CONVOLUTION

ROWS = 4
"""Positions whose kernels are multiplied together, as one band."""

CHUNK = 128
"""Tokens of a unit of work of the backward, which reads the taps on either side as well; at most
as many taps there are more tokens."""

BLOCK = 64
"""Channels of a unit of work where kernels are constant."""

PARTS = 16
"""Into how many parts, at most, the tokens are divided for the gradient of a constant kernel."""


def refuses(problem: Any) -> str | None:
    """Say why `problem` cannot run here; there is no such reason today."""
    return None


def forward(problem: Any) -> np.ndarray:
    """Return out (B, N, C) in the dtype of x."""
    job = PositionJob(problem, TILE)
    out = np.empty(problem.x.shape, job.writable(problem.x.dtype))
    job.describe("out", out)
    job.run("convolution.forward")
    return out


def backward(problem: Any, dout: np.ndarray) -> dict[str, np.ndarray]:
    """Return the gradients of x, logits and, where given, span (B, N, H)."""
    p = problem
    taps = p.logits.shape[3]
    job = PositionJob(p, max(CHUNK, -(-taps // CHUNK) * CHUNK), backward=True)
    found = {"x": np.empty(p.x.shape, job.writable(p.x.dtype)),
             "logits": np.empty(p.logits.shape, job.writable(p.logits.dtype))}
    job.describe("dout", dout)
    job.describe("dx", found["x"])
    job.describe("dlogits", found["logits"])
    if p.span is not None:
        found["span"] = np.empty(p.span.shape, job.dtype)
        job.put("dspan", address(found["span"]))
    job.run("convolution.backward")
    return found


def constant(problem: Any) -> np.ndarray:
    """Return out (B, N, C) in the dtype of x."""
    return _constant(problem.x, problem.w, problem.pad, problem.lengths)


def constant_backward(problem: Any, dout: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the gradients of x and w, the latter in acc."""
    p = problem
    taps = len(p.w)
    # forward: out[t] = sum_k w[k] x[t + k - pad], so dx[j] = sum_k w[k] dout[j - k + pad]
    dx = _constant(dout, p.w[::-1], taps - 1 - p.pad, p.lengths)
    job = ConstantJob(p.x, p.w, p.pad, p.lengths)
    job.describe("dout", dout)
    batch, _, c = p.x.shape
    chunks = batch * job.chunks
    each = max(1, -(-chunks // PARTS))
    parts = max(1, -(-chunks // each))
    dw = np.zeros((parts, taps, job.columns), job.dtype)
    job.put("dw", address(dw))
    job.put("parts", parts, each)
    job.run("convolution.constant_gradient", parts * job.blocks)
    return dx, dw.sum(axis=0)[:, :c]


def _constant(x: np.ndarray, w: np.ndarray, pad: int, lengths: np.ndarray) -> np.ndarray:
    job = ConstantJob(x, w, pad, lengths)
    out = np.empty(x.shape, job.writable(x.dtype))
    job.describe("out", out)
    job.run("convolution.constant", len(x) * job.chunks * job.blocks)
    return out


class Job:
    """One call: a record of addresses, and what keeps them valid."""

    def __init__(self, kind: np.dtype, x: np.ndarray, lengths: np.ndarray) -> None:
        self.dtype = np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
        self.record, self.kind = np.zeros((), kind), kind
        self.alive: list[Any] = []
        self.put("lengths", self.hold(np.ascontiguousarray(lengths, np.int32)))
        self.scratch, self.flops = 0, 0.0

    @property
    def lanes(self) -> int:
        """Numbers in a vector."""
        return vector_bytes() // self.dtype.itemsize

    def writable(self, dtype: np.dtype) -> np.dtype:
        """Return `dtype` if kernels can read and write it: both or neither are float64; or acc."""
        fits = (dtype.itemsize == 8) == (self.dtype.itemsize == 8)
        return dtype.newbyteorder("=") if fits else self.dtype

    def put(self, field: str, *values: int) -> None:
        """Write integers from a field on."""
        first = self.kind.fields[field][1] // 8
        self.record.reshape(1).view(np.int64)[first:first + len(values)] = values

    def hold(self, x: np.ndarray) -> int:
        """Keep `x` for as long as the job lives; return its address."""
        self.alive.append(x)
        return address(x)

    def describe(self, name: str, x: np.ndarray) -> None:
        """Make an array (B, N, width) or (B, N, H, width) known; a copy if rows have gaps."""
        if not x.flags.aligned or x.dtype != self.writable(x.dtype):
            x = np.require(x, self.writable(x.dtype), ["ALIGNED"])
        if x.strides[-1] != x.itemsize and x.shape[-1] > 1:
            x = np.ascontiguousarray(x)
        of_head = x.strides[2] if x.ndim == 4 else 0
        self.put(name, self.hold(x), x.strides[0], of_head, x.strides[1], SOURCE_CODES[x.dtype])

    def lay_out(self, first: str, *sizes: int) -> None:
        """Divide the scratch memory, from field `first` on."""
        starts, self.scratch = sections(sizes)
        self.put(first, *starts)

    def run(self, kernel: str, units: int) -> None:
        """Run a kernel over its units of work."""
        kind = "float64" if self.dtype == np.float64 else "float32"
        threads.run(native(kernel, kind), address(self.record), units, self.scratch,
                    int(self.flops / HELPER_FLOPS))


class PositionJob(Job):
    """Kernels for each position."""

    def __init__(self, problem: Any, chunk: int, *, backward: bool = False) -> None:
        p = problem
        super().__init__(CONVOLUTION, p.x, p.lengths)
        (batch, n, c), (heads, taps) = p.x.shape, p.logits.shape[2:]
        size, lanes = self.dtype.itemsize, self.lanes
        width = c // heads
        padded = -(-width // lanes) * lanes
        chunk = min(chunk, -(-n // ROWS) * ROWS)
        self.units = batch * heads * -(-n // max(1, chunk))
        self.flops = 2.0 * batch * n * c * taps * (4 if backward else 1)
        tiles = -(-taps // TILE)
        columns = -(-(taps + ROWS - 1) // lanes) * lanes
        # beyond a row's taps there are zeros for the corners of a band, before the first row too
        pitch, front = max(TILE * tiles, columns) + 16, 16
        x_row = -(-(chunk + taps + columns) // lanes) * lanes
        self.put("size", size, lanes, batch, n, heads, taps, c, width, padded, p.pad, chunk,
                 -(-n // max(1, chunk)))
        self.put("renorm", int(p.renorm), pitch, front, tiles, columns, x_row)
        self.describe("x", p.x)
        self.describe("logits", p.logits)
        if p.span is not None:
            span = np.asarray(p.span, self.dtype)
            self.put("span", self.hold(span), *span.strides)
        self.record["ramp"], self.record["keep"] = p.ramp, 1 / (1 - p.dropout)
        if p.dropout:
            self.put("dropout", 1, int(p.dropout * 2**32), p.dropout_seed % 2**32,
                     p.dropout_seed >> 32)
        weights = (front + TILE * pitch) * size
        rows = chunk + taps + ROWS
        sizes = (weights, 8 * TILE * tiles, weights * (p.span is not None), TILE * size,
                 TILE * lanes * size, TILE * size, TILE * size, rows * padded * size,
                 chunk * padded * size, (taps + ROWS) * padded * size)
        if backward:
            sizes += (weights * bool(p.dropout), weights * bool(p.dropout), weights,
                      padded * x_row * size, (TILE + ROWS) * padded * size)
        self.lay_out("at_weights", *sizes)

    def run(self, kernel: str, units: int | None = None) -> None:
        """Run a kernel over all chunks of all heads."""
        super().run(kernel, self.units if units is None else units)


class ConstantJob(Job):
    """Kernels for each channel."""

    def __init__(self, x: np.ndarray, w: np.ndarray, pad: int, lengths: np.ndarray) -> None:
        super().__init__(CONSTANT, x, lengths)
        (batch, n, c), taps = x.shape, len(w)
        lanes, size = self.lanes, self.dtype.itemsize
        self.columns = -(-c // lanes) * lanes
        block, chunk = min(BLOCK, self.columns), TILE
        self.blocks, self.chunks = -(-c // max(1, block)), -(-n // chunk)
        wide = aligned((taps, self.columns), self.dtype)
        wide[:, :c], wide[:, c:] = w, 0
        self.flops = 2.0 * batch * n * c * taps
        self.put("size", size, lanes, batch, n, taps, c, block, self.blocks, pad, chunk,
                 self.chunks)
        self.put("w", self.hold(wide), self.columns)
        self.describe("x", x)
        rows = chunk * block * size
        self.lay_out("at_x", (chunk + taps) * block * size, rows, taps * block * size)
