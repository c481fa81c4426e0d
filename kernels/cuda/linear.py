"""Linear attention on CuPy arrays, by CUDA C++ kernels.

Sequences are read in spans of steps of up to 64 tokens, whatever `order` and `chunk` of the
problem say. There are as many spans as it takes to occupy the GPU: one where there are many
key/value heads, many for a long sequence of one head. With one, a block carries the state along
all steps. With more, there are three phases:

    sums    of each span, its keys' part of the state
    scan    the state before each span, in place of these; and the one behind the last
    walk    the outputs of each span, from the state before it

likewise the backward, for dq as above, for dk and dv with the gradients of states from the last
span to the first. A state takes F (E + 1) numbers, and there are no more of them than OCCUPIED
blocks for each multiprocessor, and no more than one for each SHORTEST steps of a key/value head;
nothing else grows with the tokens but a few numbers for each. No launch adds atomically.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from pyattn.arrays import Array, dtype_name, namespace

from . import device as devices
from .device import Kernel
from .layout import (
    ELEMENTS,
    OPERAND,
    Keeper,
    fields,
    operand,
    readable,
    roomy,
    struct,
    sum_type,
)

KINDS = ("identity", "elu1", "relu", "exp")
"""As linear.cuh numbers them."""

WIDTHS = (32, 64, 128)
"""What features and values are rounded up to, both to the wider one's."""

OUT, DQ, DV, DK = range(4)
"""Passes, as linear.cu numbers them."""

OCCUPIED = 2
"""Blocks for each multiprocessor that spans are made for."""

SHORTEST = 4
"""Steps of a span, at least."""

SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
"""Bytes of shared memory that a block may have, by architecture."""


class Tiling(NamedTuple):
    """How a kernel divides its work."""

    width: int
    tokens: int
    """Of a step."""
    warps: int
    blocks: int
    """That a multiprocessor should hold."""


TOKENS = {"bfloat16": (64, 64, 64), "float16": (64, 32, 32), "float32": (64, 32, 32),
          "float64": (64, 32, 16)}
"""Tokens of a step by dtype, for each of WIDTHS."""


def tiling(name: str, widest: int) -> Tiling:
    """Return the tiling for a dtype, and features and values of at most `widest`."""
    number = next(i for i, width in enumerate(WIDTHS) if width >= widest)
    return Tiling(WIDTHS[number], TOKENS[name][number], 8 if WIDTHS[number] == 128 else 4,
                  2 if WIDTHS[number] <= 64 else 1)


def shared_bytes(name: str, x: Tiling, projected: bool) -> int:
    """Return the bytes of shared memory that a block needs; see Block in linear.cuh."""
    raw = np.dtype(np.float16).itemsize if name in ("float16", "bfloat16") else sum_bytes(name)
    row = max(128, x.width * (raw if name == "bfloat16" else sum_bytes(name)))
    tiles = 3 * x.tokens * (row + x.width * raw) + x.width * row
    total = tiles + (x.width + 2 * x.tokens) * sum_bytes(name) + x.warps * 16 * 8
    if projected:
        parts = x.warps * 16 // x.tokens
        total += x.width * (row + x.tokens * raw) + (4 + 2 * parts) * x.tokens * sum_bytes(name)
    return total


def is_projected(made: Any) -> bool:
    """Whether features are products with a projection; those of kind "exp" in any case."""
    return made.kind == "exp" or made.projection is not None


def sum_bytes(name: str) -> int:
    """Return the bytes of a sum for q of dtype `name`."""
    return np.dtype(sum_type(name)).itemsize


def refuses(problem: Any) -> str | None:
    """Why `problem` cannot run here, or None."""
    p = problem
    reason = devices.missing(p.q)
    if reason is not None:
        return reason
    made, e = p.feature_map, p.v.shape[3]
    d, f = p.q.shape[3], made.width(p.q.shape[3])
    if max(d, f, e) > WIDTHS[-1]:
        return (f"tokens, features and values must be at most {WIDTHS[-1]} wide; q and k have {d}, "
                f"their features {f}, v has {e}")
    device, name = devices.of(p.q), dtype_name(p.q)
    if shared_bytes(name, tiling(name, max(d, f, e)), is_projected(made)) > device.shared_memory:
        features = f"{f} {'projected ' * is_projected(made)}features"
        return (f"a block of {name} with {features}, and values {e} wide, does not fit the "
                f"{device.shared_memory} bytes of shared memory that {device.name} has")
    return None


def kernel(name: str, x: Tiling, file: str = "linear", **more: int | str) -> Kernel:
    """Return a kernel of `file`, which has one function of the same name."""
    macros = {"ELEMENT": ELEMENTS["float32" if name == "float16" else name],
              "HALF": int(name == "float16"), "SIDE": x.width, "TOKENS": x.tokens,
              "BLOCKS": x.blocks, "THREADS": 32 * x.warps, **more}
    return Kernel(f"{file}.cu", file, tuple(macros.items()), int(macros["THREADS"]))


def walk_kernel(name: str, x: Tiling, chosen: dict[str, int], generic: bool) -> Kernel:
    """Return the kernel of a pass; on a `generic` device one that decides when it runs."""
    if generic:
        return kernel(name, x, GENERIC=1)
    return kernel(name, x, **{field.upper(): value for field, value in chosen.items()})


def tops_kernel(name: str, x: Tiling, generic: bool) -> Kernel:
    """Return the kernel of stabilisers."""
    if generic:
        return kernel(name, x, "linear_tops", GENERIC=1)
    return kernel(name, x, "linear_tops", PASS=OUT, READS=0, CAUSAL=0, KIND=KINDS.index("exp"),
                  PROJECTED=1)


def configurations() -> Iterator[tuple[Kernel, tuple[str, ...], str | None]]:
    """Yield kernels to be compiled and read: (kernel, architectures, an instruction it must have).

    Of each dtype those that need most registers: wide ones, and passes under a causal mask.
    """
    for name in ELEMENTS:
        product = "DMMA" if name == "float64" else "HMMA"
        for width in WIDTHS[1:]:
            x = tiling(name, width)
            chosen = {"reads": 1, "causal": 1, "kind": KINDS.index("elu1"), "projected": 0}
            stable = {**chosen, "kind": KINDS.index("exp"), "projected": 1}
            passes = [{**chosen, "pass": number} for number in (OUT, DQ, DV, DK)]
            passes += [{**chosen, "pass": DK, "reads": 0}, {**chosen, "pass": DK, "causal": 0},
                       *({**stable, "pass": number} for number in (OUT, DQ, DK))]
            for choice in passes:
                needed = shared_bytes(name, x, bool(choice["projected"]))
                fitting = tuple(known for known in SHARED if needed <= SHARED[known])
                if name != "bfloat16":
                    fitting = fitting[-1:]      # one architecture tells enough of these
                yield walk_kernel(name, x, choice, False), fitting, product
        x = tiling(name, WIDTHS[1])
        yield tops_kernel(name, x, False), tuple(SHARED), product
        for file in ("linear_scan", "linear_pull", "linear_running"):
            yield kernel(name, x, file, GENERIC=1), tuple(SHARED), None


STATES = struct(*fields("u8", "at"), *fields("i8", "pair span"), *fields("i4", "row last last_row"))


@functools.cache
def walk_struct(sums: str) -> np.dtype:
    """Return LinearArguments of linear.cu."""
    return struct(
        *((name, OPERAND) for name in ("x", "y", "z", "out", "tokens")),
        *fields("u8", "den inverse pull"), ("before", STATES), ("after", STATES),
        *fields("u8", "projection tops running q_lengths kv_lengths offset"),
        *fields("i4", "batch heads groups n m d f e each chunks pass reads causal kind projected"),
        *fields("i4", "normalize"), *fields(sums, "scale epsilon added least"))


@functools.cache
def scan_struct(sums: str) -> np.dtype:
    """Return ScanArguments of linear_scan.cu."""
    return struct(("walk", walk_struct(sums)), ("given", STATES), ("after", STATES),
                  ("states", STATES), *fields("i4", "spans"))


RUNNING = struct(*fields("u8", "running"), *fields("i4", "rows columns"))
PULL = struct(("dout", OPERAND), ("out", OPERAND), *fields("u8", "den inverse pull q_lengths"),
              *fields("i4", "batch heads n e"))


class Call(Keeper):
    """A problem as launches need it."""

    def __init__(self, p: Any) -> None:
        super().__init__(devices.of(p.q))
        self.p, self.name = p, dtype_name(p.q)
        self.acc = np.dtype(sum_type(self.name))
        self.batch, self.heads, self.n, self.d = p.q.shape
        self.f = p.feature_map.width(self.d)
        _, self.groups, self.m, self.e = p.v.shape
        self.pairs = self.batch * self.groups
        self.tiling = tiling(self.name, max(self.d, self.f, self.e))
        self.q, self.k, self.v = (readable(self.device, x) for x in (p.q, p.k, p.v))
        self.generic = bool(getattr(self.device, "generic", False))

    def state(self) -> Array:
        """Return an empty state, (B, G, F, W)."""
        return self.device.empty((self.batch, self.groups, self.f, self.e + self.p.normalize),
                                 self.acc)

    def one_span(self, x: Array | None) -> tuple[int, ...]:
        """Return the STATES of an array (B, G, F, W), or of None."""
        if x is None or not math.prod(x.shape):
            return (0,) * 6
        x = x if x.flags.c_contiguous else x.copy()
        width = x.shape[3]
        return self.address(x), self.f * width, 0, width, self.e, width

    def spans(self, x: Array) -> tuple[int, ...]:
        """Return the STATES of an array (B G, spans, F E + F)."""
        return (self.address(x), x.shape[1] * x.shape[2], x.shape[2], self.e, self.f * self.e, 1)

    def steps(self, pass_: int, read: bool) -> int:
        """Return how many steps the longest item has; see Sequence in linear.cu."""
        p, tokens = self.p, self.tiling.tokens
        n, m, offset = (np.asarray(x, np.int64) for x in (p.q_lengths, p.kv_lengths, p.offset))
        first = 0
        end = n if (pass_ <= DQ) == read else m
        if p.causal:
            first, end = np.minimum(0, offset) // tokens * tokens, np.maximum(m, n + offset)
        return int((-(-(end - first) // tokens)).max(initial=0))

    def divide(self, steps: int) -> tuple[int, int]:
        """Return how many spans there are, and the steps of each."""
        wanted = -(-OCCUPIED * self.device.multiprocessors // self.pairs)
        each = max(1, -(-steps // max(1, min(wanted, steps // SHORTEST))))
        return max(1, -(-steps // each)), each

    @functools.cached_property
    def common(self) -> np.ndarray:
        """What all passes are told."""
        p, made, record = self.p, self.p.feature_map, np.zeros((), walk_struct(self.acc.str[1:]))
        for name in ("q_lengths", "kv_lengths", "offset"):
            record[name] = self.constant(getattr(p, name))
        for name in ("batch", "heads", "groups", "n", "m", "d", "f", "e"):
            record[name] = getattr(self, name)
        record["causal"], record["kind"] = p.causal, KINDS.index(made.kind)
        record["normalize"] = p.normalize
        record["scale"], record["epsilon"], record["added"] = made.scale, made.epsilon, p.epsilon
        record["least"] = p.least
        if is_projected(made):
            record["projected"], record["projection"] = True, self.address(self.projection())
        if made.kind == "exp":
            self.stabilise(record)
        return record

    def projection(self) -> Array:
        """Return the projection as a tile of products takes it."""
        made, width = self.p.feature_map, self.tiling.width
        dtype = self.acc if self.name == "float16" else self.p.q.dtype
        if made.projection is None:
            return self.device.constant(np.eye(width, dtype=dtype))
        x = self.device.zeros((width, width), dtype)
        x[:self.f, :self.d] = made.projection.astype(dtype)
        return x

    def stabilise(self, record: np.ndarray) -> None:
        """Work out the stabilisers of keys, and the largest before each step."""
        chunks = -(-self.m // self.tiling.tokens)
        self.running = self.device.full((self.pairs, chunks + 1), -math.inf, self.acc)
        if self.p.log_scale is not None:
            self.running[:, 0] = self.p.log_scale.reshape(self.pairs)
        record["tops"] = self.address(self.device.empty((self.pairs, max(1, self.m)), self.acc))
        record["running"], record["chunks"] = self.address(self.running), chunks
        record["x"] = self.place(self.k)
        self.device.launch(tops_kernel(self.name, self.tiling, self.generic),
                           (self.pairs, chunks, 1), record, self.shared)
        row = np.zeros((), RUNNING)
        row["running"], row["rows"] = self.address(self.running), self.pairs
        row["columns"] = chunks + 1
        self.launch("linear_running", 32 * self.pairs, 1, row)

    def kept(self) -> Array:
        """Return what the first state is multiplied by on its way to the last, (B, G)."""
        xp = namespace(self.running)
        before, after = self.running[:, 0], self.running[:, -1]
        after = xp.where(after == -math.inf, xp.zeros_like(after), after)
        return xp.exp(before - after).reshape(self.batch, self.groups)

    @functools.cached_property
    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        return shared_bytes(self.name, self.tiling, is_projected(self.p.feature_map))

    def run(self, pass_: int, read: bool, spans: tuple[int, int], before: tuple[int, ...],
            after: tuple[int, ...], **given: Any) -> None:
        """Launch a pass over the spans of all pairs."""
        record = self.common.copy()
        record["pass"], record["reads"], record["each"] = pass_, read, spans[1]
        record["before"], record["after"] = before, after
        for name, value in given.items():
            record[name] = value
        chosen = {name: int(record[name])
                  for name in ("pass", "reads", "causal", "kind", "projected")}
        self.device.launch(walk_kernel(self.name, self.tiling, chosen, self.generic),
                           (self.pairs, spans[0], 1), record, self.shared)

    def states_before(self, pass_: int, given: Array | None, after: Array | None,
                      **operands: Any) -> tuple[tuple[int, int], tuple[int, ...], tuple[int, ...]]:
        """Return the spans of a walk, the states before them, and where it leaves the last.

        The sums of `pass_`, OUT or DK, are done where the walk cannot carry the state itself.
        """
        steps = self.steps(pass_, False)
        spans = self.divide(steps)
        last = self.one_span(after)
        if spans[0] == 1 and self.p.causal:
            return spans, self.one_span(given), last
        if spans[0] == 1:
            if after is None:
                after = self.state()
                last = self.one_span(after)
            self.run(pass_, False, spans, self.one_span(given), last, **operands)
        else:
            sums = self.device.empty((self.pairs, spans[0], self.f * (self.e + 1)), self.acc)
            states = self.spans(sums)
            self.run(pass_, False, spans, (0,) * 6, states, **operands)
            if after is None and not self.p.causal:
                after = self.state()
                last = self.one_span(after)
            self.scan(pass_, states, spans, given, last)
            if self.p.causal:
                return spans, states, (0,) * 6
        # all rows see all columns
        return self.divide(self.steps(pass_, True)), last, (0,) * 6

    def scan(self, pass_: int, states: tuple[int, ...], spans: tuple[int, int],
             given: Array | None, after: tuple[int, ...]) -> None:
        """Turn the sums of spans into the states before them."""
        record = np.zeros((), scan_struct(self.acc.str[1:]))
        record["walk"] = self.common
        record["walk"]["pass"], record["walk"]["each"] = pass_, spans[1]
        record["given"], record["after"], record["states"] = self.one_span(given), after, states
        record["spans"] = spans[0]
        numbers = self.f * (self.e + self.p.normalize)
        self.launch("linear_scan", numbers, self.pairs, record)

    def launch(self, file: str, threads: int, pairs: int, record: np.ndarray) -> None:
        """Launch a kernel that has no tiles, of so many threads for each of `pairs`."""
        found = kernel(self.name, self.tiling, file, GENERIC=1)
        self.device.launch(found, (-(-threads // found.threads), pairs, 1), record, 0)

    def made(self, x: Array, width: int, lengths: np.ndarray) -> Array:
        """Return an array for a result of the tokens of `x`: zeros where there is padding."""
        found = roomy(self.device, (*x.shape[:3], width), x.dtype)
        if (lengths < x.shape[2]).any():
            found[...] = 0
        return found

    def place(self, x: Array) -> tuple[int, ...]:
        """Return the OPERAND of an array, which is kept."""
        self.address(x)
        return operand(self.device, x)


def forward(problem: Any) -> tuple[Array, Array | None, Array, Array | None]:
    """Return out (B, H, N, E), denominators (B, H, N), the state, and its log-scale (B, G)."""
    p, call = problem, Call(problem)
    out = call.made(call.q, call.e, p.q_lengths)
    den = call.device.zeros(out.shape[:3], call.acc) if p.normalize else None
    after = call.state()
    if not call.pairs:
        stable = p.feature_map.kind == "exp"
        return out, den, after, call.device.empty(after.shape[:2], call.acc) if stable else None
    q, k, v = (call.place(x) for x in (call.q, call.k, call.v))
    columns = {"y": k, "z": v}
    spans, before, last = call.states_before(OUT, p.state, after, **columns)
    call.run(OUT, True, spans, before, last, x=q, **columns, out=call.place(out),
             den=call.address(den))
    top = None
    if p.feature_map.kind == "exp":
        top = call.running[:, -1].reshape(after.shape[:2])
    return out, den, after, top


def backward(problem: Any, dout: Array, out: Array, den: Array | None,
             dstate: Array | None) -> dict[str, Array]:
    """Return the gradients of q, k, v and of the state before the first token."""
    p, call = problem, Call(problem)
    dq = call.made(call.q, call.d, p.q_lengths)
    dk, dv = (call.made(x, x.shape[3], p.kv_lengths) for x in (call.k, call.v))
    first = call.state()
    found = {"q": dq, "k": dk, "v": dv, "state": first}
    if not call.pairs:
        return found
    dout, out = (readable(call.device, x) for x in (dout, out))
    q, k, v, g = (call.place(x) for x in (call.q, call.k, call.v, dout))
    pulls = rows_of(call, dout, out, den) if den is not None else {}

    spans, before, _ = call.states_before(OUT, p.state, None, y=k, z=v)
    call.run(DQ, True, spans, before, (0,) * 6, x=g, y=v, z=k, tokens=q, out=call.place(dq),
             **pulls)
    columns = {"y": g, "z": q, **pulls}
    spans, before, last = call.states_before(DK, dstate, first, **columns)
    call.run(DK, True, spans, before, last, x=v, **columns, tokens=k, out=call.place(dk))
    call.run(DV, True, spans, before, (0,) * 6, x=k, y=q, z=g, out=call.place(dv), **pulls)
    if p.feature_map.kind == "exp" and not p.causal:
        # what the walks were given is that behind all keys
        found["state"] = first * call.kept()[:, :, None, None]
    return found


def rows_of(call: Call, dout: Array, out: Array, den: Array) -> dict[str, int]:
    """Return where 1 / denominator and the gradients of the denominators are, (B, H, N)."""
    device, rows = call.device, math.prod(den.shape)
    found = {name: device.empty(den.shape, call.acc) for name in ("inverse", "pull")}
    addresses = {name: call.address(x) for name, x in found.items()}
    record = np.zeros((), PULL)
    record["dout"], record["out"] = call.place(dout), call.place(out)
    record["den"] = call.address(den if den.flags.c_contiguous else den.copy())
    record["q_lengths"] = call.constant(call.p.q_lengths)
    for name, value in (*addresses.items(), ("batch", call.batch), ("heads", call.heads),
                        ("n", call.n), ("e", call.e)):
        record[name] = value
    call.launch("linear_pull", 32 * rows, 1, record)
    return addresses
