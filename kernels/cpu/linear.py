"""Linear attention on NumPy arrays: forward and backward.

Sequences are cut into segments where there are few key/value heads, so that all threads have work.
A segment's state is then computed from its own keys first, and those of all before it are added.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import threads
from .compile import native
from .host import vector_bytes
from .job import HELPER_FLOPS, SOURCE_CODES, TILE, sections
from .memory import address, aligned
from .records import LINEAR

KINDS = ("identity", "elu1", "relu", "exp")
"""As jit/vector/features.py numbers them."""

UNITS = 32
"""Units of work that are wanted where there are fewer than `ENOUGH` key/value heads."""

ENOUGH = 8

SHORTEST = 16
"""Steps of a segment, at least."""


def refuses(problem: Any) -> str | None:
    """Say why `problem` cannot run here, or None."""
    p = problem
    if p.order == "qk":
        longest = max(p.q_lengths.max(initial=0), p.kv_lengths.max(initial=0))
        return None if longest <= TILE else (
            f"all of {longest} tokens at once, as order 'qk' wants; it takes {TILE}")
    return None if p.chunk <= TILE else f"chunks of {p.chunk} tokens; it takes up to {TILE}"


def forward(problem: Any) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray | None]:
    """Return out (B, H, N, E), denominators (B, H, N), the state, and its log-scale (B, G)."""
    p, job = problem, Job(problem)
    (batch, heads, n, _), (groups, _, e) = p.q.shape, p.v.shape[1:]
    out = np.zeros((batch, heads, n, e), p.q.dtype.newbyteorder("="))
    den = np.zeros((batch, heads, n), job.dtype) if p.normalize else None
    job.describe("out", out)
    if den is not None:
        job.put("den", job.hold(den))
    job.make_states()
    job.run("linear.forward", 1)
    state = job.state[:, :, -1, :, :e + p.normalize]
    if p.feature_map.kind != "exp":
        return out, den, state, None
    last = np.take_along_axis(job.tops, job.counts[:, None, None], axis=2)[:, :, 0]
    return out, den, state, np.broadcast_to(last, (batch, groups))


def backward(problem: Any, dout: np.ndarray, out: np.ndarray, den: np.ndarray | None,
             dstate: np.ndarray | None) -> dict[str, np.ndarray]:
    """Return the gradients of q, k, v and of the state before the first token."""
    p, job = problem, Job(problem)
    job.describe("dout", dout)
    job.describe("out", out)
    if den is not None:
        job.put("den", job.hold(np.ascontiguousarray(den, job.dtype)))
    found = {name: np.zeros(x.shape, x.dtype.newbyteorder("="))
             for name, x in (("q", p.q), ("k", p.k), ("v", p.v))}
    for name, x in found.items():
        job.describe(f"d{name}", x)
    job.make_states()
    job.run("linear_backward.by_query", 2)
    width = p.v.shape[3] + p.normalize
    later = job.states("later", dstate)
    if job.segments > 1:
        job.run("linear_backward.later_sums", 1)
        job.join_later(later)
    job.run("linear_backward.by_key", 2)
    return {**found, "state": later[:, :, 0, :, :width]}


class Job:
    """One call: a record of addresses, and what keeps them valid."""

    def __init__(self, problem: Any) -> None:
        p, made = problem, problem.feature_map
        self.problem = p
        self.dtype = np.dtype(np.float64 if p.q.dtype == np.float64 else np.float32)
        (batch, heads, n, d), (groups, m, e) = p.q.shape, p.v.shape[1:]
        f, width = made.width(d), e + p.normalize
        self.alive: list[Any] = []
        self.record = np.zeros((), LINEAR)
        size, lanes = self.dtype.itemsize, vector_bytes() // self.dtype.itemsize
        d_padded, e_padded, w_padded = (-(-x // lanes) * lanes for x in (d, e, width))
        direct = p.order == "qk"
        chunk = TILE if direct else p.chunk
        n_each, m_each, offset = (np.ascontiguousarray(x, np.int64) for x in (
            p.q_lengths, p.kv_lengths, p.offset))
        if direct:
            counts = np.minimum(n_each + m_each, 1)
        elif p.causal:
            start = np.minimum(0, offset) // chunk * chunk
            counts = -(-(np.maximum(m_each, n_each + offset) - start) // chunk)
        else:
            counts = -(-n_each // chunk) - (-m_each // chunk)
        self.counts, most = counts, int(counts.max(initial=0))
        pairs = batch * groups
        self.segments = 1
        if 0 < pairs < ENOUGH:
            self.segments = max(1, min(-(-UNITS // pairs), most // SHORTEST))
        self.units = pairs * self.segments
        self.flops = 2.0 * f * (e + TILE) * (batch * heads * n + pairs * m)
        projection = 0
        if made.projection is not None:
            self.flops += 2.0 * f * d * (batch * heads * n + pairs * m)
            x = np.zeros((f, d_padded), self.dtype)
            x[:, :d] = made.projection
            projection = self.hold(x)
        self.tops = np.zeros((batch, groups, most + 1), self.dtype)
        if made.kind == "exp":
            self.tops[...] = -np.inf
            if p.log_scale is not None:
                self.tops[:, :, 0] = p.log_scale
        self.put("size", size, lanes, heads, groups, n, d, e, f, width, d_padded, e_padded,
                 w_padded, chunk, KINDS.index(made.kind), p.causal, p.normalize, direct, projection,
                 self.segments, *map(self.hold, (n_each, m_each, offset, counts)))
        self.put("tops", self.hold(self.tops), most + 1, p.state is not None)
        for name, x in (("q", p.q), ("k", p.k), ("v", p.v)):
            self.describe(name, x)
        for name, value in (("scale", made.scale), ("epsilon", made.epsilon),
                            ("added", p.epsilon), ("least", p.least)):
            self.record[name] = value
        self.shape = (batch, groups, self.segments, f, w_padded)
        tile = TILE * size
        starts, self.scratch = sections((
            tile * d_padded, tile * d, tile * f, tile * f, tile * f, tile * e_padded, tile * width,
            tile * w_padded, tile * max(width, d_padded), tile * w_padded, tile * TILE,
            tile * TILE, tile * max(TILE, e_padded), f * w_padded * size, f * size,
            max(f, TILE) * size, tile, tile, tile, tile, tile, tile))
        self.put("at_x", *starts, self.hold(np.ones(TILE, self.dtype)))

    def put(self, field: str, *values: int) -> None:
        """Write integers from a field on."""
        first = LINEAR.fields[field][1] // 8
        self.record.reshape(1).view(np.int64)[first:first + len(values)] = values

    def hold(self, x: np.ndarray) -> int:
        """Keep `x` for as long as the job lives; return its address."""
        self.alive.append(x)
        return address(x)

    def describe(self, name: str, x: np.ndarray) -> None:
        """Make an array known under `name`."""
        if not x.flags.aligned or x.dtype not in SOURCE_CODES:
            x = np.require(x, x.dtype.newbyteorder("="), ["ALIGNED"])
        self.put(name, self.hold(x), *x.strides, SOURCE_CODES[x.dtype])

    def states(self, name: str, given: np.ndarray | None) -> np.ndarray:
        """Make room for the states of all segments, with what is given in the outermost."""
        x = aligned(self.shape, self.dtype)
        x.fill(0)
        if given is not None:
            x[:, :, 0 if name == "state" else -1, :, :given.shape[-1]] = given
        self.put(name, self.hold(x))
        return x

    def make_states(self) -> None:
        """Compute the state before each segment."""
        self.state = self.states("state", self.problem.state)
        if self.segments == 1:
            return
        self.run("linear.sums", 1)
        for segment, (first, last) in enumerate(self.bounds()[:-1]):
            own, before, after = self.state[:, :, segment + 1], *(
                np.take_along_axis(self.tops, x[:, None, None], axis=2) for x in (first, last))
            if self.stable:
                # a segment without steps has none
                after = np.where((first < last)[:, None, None], after, -np.inf)
            new = np.maximum(before, after)
            own *= self.share(after, new)
            own += self.state[:, :, segment] * self.share(before, new)
            np.put_along_axis(self.tops, last[:, None, None], new, axis=2)

    @property
    def stable(self) -> bool:
        """Whether features have stabilisers."""
        return bool(self.problem.feature_map.kind == "exp")

    def share(self, top: np.ndarray, new: np.ndarray) -> np.ndarray:
        """Return what a state with stabiliser `top` is multiplied by for another, (B, G, 1, 1)."""
        with np.errstate(all="ignore"):
            return np.exp(top - np.where(new == -np.inf, 0, new))[..., None]

    def bounds(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return for each segment the first step and that behind it, int64 (B,) each."""
        each = -(-self.counts // self.segments)
        return [(np.minimum(s * each, self.counts), np.minimum((s + 1) * each, self.counts))
                for s in range(self.segments)]

    def join_later(self, later: np.ndarray) -> None:
        """Add to what is behind each segment what is behind the next."""
        for segment in range(self.segments - 1, 0, -1):
            first, last = self.bounds()[segment]
            before, after = (np.take_along_axis(self.tops, x[:, None, None], axis=2)
                             for x in (first, last))
            later[:, :, segment - 1] += later[:, :, segment] * self.share(before, after)

    def run(self, kernel: str, passes: int) -> None:
        """Run a kernel over its units of work."""
        kind = "float64" if self.dtype == np.float64 else "float32"
        threads.run(native(kernel, kind), address(self.record), self.units, self.scratch,
                    int(passes * self.flops / HELPER_FLOPS))
