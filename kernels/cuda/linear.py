"""Linear attention on CuPy arrays, by CUDA C++ kernels.

Sequences are read in spans of steps of up to 64 tokens, whatever `order` and `chunk` of the
problem say. There are as many spans as it takes to occupy the GPU: one where there are many
key/value heads, many for a long sequence of one head. With one, a block carries the state along
all steps. With more, there are three phases:

    sums    of each span, its keys' part of the state
    scan    the state before each span, in place of these; and the one behind the last
    walk    the outputs of each span, from the state before it

likewise the backward, for dq as above, for dk and dv with the gradients of states from the last
span to the first. A state takes F (E + 1) numbers, and there are no more of them than blocks that
the GPU runs at a time, and no more than one for each SHORTEST steps of a key/value head; nothing
else grows with the tokens but a few numbers for each. No launch adds atomically.

A block has room for states of up to WIDTHS[-1] features and columns of values, less for some dtypes
and maps. What is wider is done in parts, one set of launches after another: all that is computed is
a sum over features, over columns, or over both. What the parts before have found is kept in sums as
large as the result. Stabilisers need all features, so another kernel finds them first.
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
    roomy_width,
    struct,
    sum_type,
)

KINDS = ("identity", "elu1", "relu", "exp")
"""As linear.cuh numbers them."""

WIDTHS = (32, 64, 128)
"""What the features and columns of a part are rounded up to, both to the wider one's."""

OUT, DQ, DV, DK = range(4)
"""Passes, as linear.cu numbers them."""

SHORTEST = 4
"""Steps of a span, at least."""

PARTS = 64
"""At most: each has launches of its own, and reads the tokens again."""

SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
"""Bytes of shared memory that a block may have, by architecture."""

RESERVED = 1024
"""Bytes that a block takes beyond its own; a multiprocessor has as many more than a block."""


class Tiling(NamedTuple):
    """How a kernel divides its work."""

    width: int
    tokens: int
    """Of a step."""
    warps: int
    blocks: int
    """That a multiprocessor runs at a time."""


TOKENS = {"bfloat16": (64, 64, 64), "float16": (64, 32, 32), "float32": (64, 32, 32),
          "float64": (64, 32, 16)}
"""Tokens of a step by dtype, for each of WIDTHS."""


def tilings(name: str, depth: int, memory: int) -> list[Tiling]:
    """Return the tilings for a dtype that fit in `memory` bytes, narrow ones first.

    `depth` is the width of tokens that are projected, or 0. Where steps of as many tokens do not
    fit, be it the registers, they have half of them.
    """
    found = []
    for width, most in zip(WIDTHS, TOKENS[name], strict=False):
        panel, warps = 128 // stored_bytes(name), 8 if width == 128 else 4
        for tokens in (most, most // 2):
            x = Tiling(width, tokens, warps, 1)
            parts = warps * 16 // tokens
            whole = parts == 1 or width // parts % panel == 0       # see RESULT in linear.cuh
            spills = name == "float64" and depth > width and tokens * width > 1024
            needed = shared_bytes(name, x, depth > 0)
            if whole and not spills and needed <= memory:
                found.append(x._replace(blocks=min(at_once(name, width, depth > 0),
                                                   (memory + RESERVED) // (needed + RESERVED))))
                break
    return found


def at_once(name: str, width: int, projected: bool) -> int:
    """Return for how many blocks a multiprocessor has registers."""
    if width == 128:
        return 1
    return 3 if name in ("float16", "bfloat16") and not projected else 2


def tiling(name: str, d: int, f: int, e: int, projected: bool, memory: int) -> Tiling | None:
    """Return the tiling for features and values so wide; None if there is none that fits.

    That is the narrowest that holds all, or else the narrower of features and values, and all of
    the tokens that are projected; or else as much of it as there can be.
    """
    depth = d * projected
    found = tilings(name, depth, memory)
    for wanted in (max(d, f, e), max(min(f, e), depth)):
        for x in found:
            if x.width >= wanted:
                return x
    return found[-1] if found else None


class Part(NamedTuple):
    """What a set of launches does."""

    f: int
    """Its first feature."""
    features: int
    e: int
    """Its first column of the values."""
    columns: int


def parts(f: int, e: int, width: int) -> list[Part]:
    """Return the parts of features and values so wide; for some columns all features in turn."""
    return [Part(first, min(width, f - first), column, min(width, e - column))
            for column in range(0, max(e, 1), width) for first in range(0, max(f, 1), width)]


def shared_bytes(name: str, x: Tiling, projected: bool) -> int:
    """Return the bytes of shared memory that a block needs; see Block in linear.cuh."""
    raw = np.dtype(np.float16).itemsize if name in ("float16", "bfloat16") else sum_bytes(name)
    row = max(128, x.width * stored_bytes(name))
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


def stored_bytes(name: str) -> int:
    """Return the bytes of a number in a tile, for q of dtype `name`."""
    return 2 if name == "bfloat16" else sum_bytes(name)


def refuses(problem: Any) -> str | None:
    """Why `problem` cannot run here, or None."""
    p = problem
    reason = devices.missing(p.q)
    if reason is not None:
        return reason
    made, e = p.feature_map, p.v.shape[3]
    d, f = p.q.shape[3], made.width(p.q.shape[3])
    device, name = devices.of(p.q), dtype_name(p.q)
    x = tiling(name, d, f, e, is_projected(made), device.shared_memory)
    if x is None:
        return (f"a block of {name} does not fit the {device.shared_memory} bytes of shared memory "
                f"that {device.name} has")
    count = len(parts(f, e, x.width))
    if count > PARTS:
        return (f"{f} features and values {e} wide take {count} parts, {x.width} of each to a "
                f"part; {PARTS} are allowed")
    return None


def kernel(name: str, x: Tiling, file: str = "linear", **more: int | str) -> Kernel:
    """Return a kernel of `file`, which has one function of the same name."""
    macros = {"ELEMENT": ELEMENTS["float32" if name == "float16" else name],
              "HALF": int(name == "float16"), "SIDE": x.width, "TOKENS": x.tokens,
              "BLOCKS": 1 if "GENERIC" in more else x.blocks, "THREADS": 32 * x.warps, **more}
    return Kernel(f"{file}.cu", file, tuple(macros.items()), int(macros["THREADS"]))


def walk_kernel(name: str, x: Tiling, chosen: dict[str, int], generic: bool) -> Kernel:
    """Return the kernel of a pass; on a `generic` device one that decides when it runs."""
    if generic:
        return kernel(name, x, GENERIC=1)
    return kernel(name, x, **{field.upper(): value for field, value in chosen.items()})


def tops_kernel(name: str, x: Tiling, deep: bool, generic: bool) -> Kernel:
    """Return the kernel of stabilisers."""
    if generic:
        return kernel(name, x, "linear_tops", GENERIC=1)
    return kernel(name, x, "linear_tops", PASS=OUT, READS=0, CAUSAL=0, KIND=KINDS.index("exp"),
                  PROJECTED=1, DEEP=int(deep))


def configurations() -> Iterator[tuple[Kernel, tuple[str, ...], str | None]]:
    """Yield kernels to be compiled and read: (kernel, architectures, an instruction it must have).

    Of each dtype those that need most registers: wide ones, and passes under a causal mask.
    """
    for name in ELEMENTS:
        product = "DMMA" if name == "float64" else "HMMA"
        chosen = {"reads": 1, "causal": 1, "kind": KINDS.index("elu1"), "projected": 0, "deep": 0}
        stable = {**chosen, "kind": KINDS.index("exp"), "projected": 1}
        passes = [{**chosen, "pass": number} for number in (OUT, DQ, DV, DK)]
        passes += [{**chosen, "pass": DK, "reads": 0}, {**chosen, "pass": DK, "causal": 0}]
        passes += [{**stable, "pass": number} for number in (DQ, DK)]
        passes += [{**stable, "pass": DK, "deep": 1}]
        for width in WIDTHS[1:]:
            for choice in passes:
                depth = width + choice["deep"]
                fitting = {known: x for known, memory in SHARED.items()
                           for x in tilings(name, choice["projected"] * depth, memory)
                           if x.width == width}
                if name != "bfloat16":
                    fitting = dict(list(fitting.items())[-1:])  # one architecture tells enough
                for x in dict.fromkeys(fitting.values()):
                    yield (walk_kernel(name, x, choice, False),
                           tuple(known for known in fitting if fitting[known] == x), product)
        x = tilings(name, 1, SHARED["sm_80"])[-1]
        for deep in (False, True):
            yield tops_kernel(name, x, deep, False), tuple(SHARED), product
        for file in ("linear_scan", "linear_pull", "linear_running"):
            yield kernel(name, x, file, GENERIC=1), tuple(SHARED), None


STATES = struct(*fields("u8", "at"), *fields("i8", "pair span"), *fields("i4", "row last last_row"))


@functools.cache
def walk_struct(sums: str) -> np.dtype:
    """Return LinearArguments of linear.cuh."""
    return struct(
        *((name, OPERAND) for name in ("x", "y", "z", "out", "tokens")),
        *fields("u8", "partial den den_before inverse pull"), ("before", STATES), ("after", STATES),
        *fields("u8", "projection tops running query_most key_most q_lengths kv_lengths offset"),
        *fields("i4", "batch heads groups n m d f e each chunks depth pass reads causal kind"),
        *fields("i4", "projected normalize vector first final"),
        *fields(sums, "scale epsilon added least"))


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
        self.projected = is_projected(p.feature_map)
        found = tiling(self.name, self.d, self.f, self.e, self.projected,
                       self.device.shared_memory)
        assert found is not None                                # see refuses
        self.tiling = found
        self.deep = self.projected and self.d > found.width
        self.parts = parts(self.f, self.e, found.width)
        self.q, self.k, self.v = (readable(self.device, x) for x in (p.q, p.k, p.v))
        self.generic = bool(getattr(self.device, "generic", False))
        self._sums = dict[int, Array]()

    def state(self) -> Array:
        """Return an empty state, (B, G, F, W)."""
        return self.device.empty((self.batch, self.groups, self.f, self.e + self.p.normalize),
                                 self.acc)

    def one_span(self, x: Array | None, part: Part) -> tuple[int, ...]:
        """Return the STATES of a part of an array (B, G, F, W), or of None."""
        if x is None or not math.prod(x.shape):
            return (0,) * 6
        x = x if x.flags.c_contiguous else x.copy()
        width = x.shape[3]
        first = part.f * width + part.e
        return (self.address(x) + first * x.itemsize, self.f * width, 0, width, width - 1 - part.e,
                width)

    def spans(self, count: int, part: Part) -> tuple[int, ...]:
        """Return the STATES of a part for each of `count` spans; what lies there is lost."""
        if count not in self._sums:
            most = self.parts[0]                # none has more than the first
            self._sums[count] = self.device.empty(
                (self.pairs * count, most.features * (most.columns + 1)), self.acc)
        numbers = part.features * part.columns
        total = numbers + part.features
        return self.address(self._sums[count]), count * total, total, part.columns, numbers, 1

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
        wanted = self.tiling.blocks * self.device.multiprocessors // self.pairs
        each = max(1, -(-steps // max(1, min(wanted, steps // SHORTEST))))
        return max(1, -(-steps // each)), each

    @functools.cached_property
    def common(self) -> np.ndarray:
        """What all passes are told."""
        p, made, record = self.p, self.p.feature_map, np.zeros((), walk_struct(self.acc.str[1:]))
        for name in ("q_lengths", "kv_lengths", "offset"):
            record[name] = self.constant(getattr(p, name))
        for name in ("batch", "heads", "groups", "n", "m", "d", "f", "e", "projected"):
            record[name] = getattr(self, name)
        record["causal"], record["kind"] = p.causal, KINDS.index(made.kind)
        record["normalize"] = p.normalize
        record["scale"], record["epsilon"], record["added"] = made.scale, made.epsilon, p.epsilon
        record["least"] = p.least
        if self.projected:
            projection = self.projection()
            record["projection"], record["depth"] = self.address(projection), projection.shape[1]
        if made.kind == "exp":
            self.stabilise(record)
        return record

    def projection(self) -> Array:
        """Return the projection as tiles of products take it, with zeros beyond it."""
        made, side = self.p.feature_map, self.tiling.width
        dtype = self.acc if self.name == "float16" else self.p.q.dtype
        shape = tuple(-(-size // side) * side for size in (self.f, self.d))
        if made.projection is None:
            return self.device.constant(np.eye(*shape, dtype=dtype))
        x = self.device.zeros(shape, dtype)
        x[:self.f, :self.d] = made.projection.astype(dtype)
        return x

    def stabilise(self, record: np.ndarray) -> None:
        """Work out the stabilisers of keys, and the largest before each step."""
        empty, chunks = self.device.empty, -(-self.m // self.tiling.tokens)
        self.running = self.device.full((self.pairs, chunks + 1), -math.inf, self.acc)
        if self.p.log_scale is not None:
            self.running[:, 0] = self.p.log_scale.reshape(self.pairs)
        if self.f > self.tiling.width:
            for name, x in (("query_most", self.q), ("key_most", self.k)):
                record[name] = self.address(empty(x.shape[:3], self.acc))
            queries = record.copy()
            queries["x"], queries["key_most"] = self.place(self.q), record["query_most"]
            queries["groups"], queries["m"] = self.heads, self.n
            queries["kv_lengths"] = record["q_lengths"]
            self.tops(queries)
        record["tops"] = self.address(empty((self.pairs, max(1, self.m)), self.acc))
        record["running"], record["chunks"] = self.address(self.running), chunks
        record["x"] = self.place(self.k)
        self.tops(record)
        row = np.zeros((), RUNNING)
        row["running"], row["rows"] = self.address(self.running), self.pairs
        row["columns"] = chunks + 1
        self.launch("linear_running", 32 * self.pairs, 1, row)

    def tops(self, record: np.ndarray) -> None:
        """Launch linear_tops for all tokens of x."""
        grid = self.batch * int(record["groups"]), -(-int(record["m"]) // self.tiling.tokens), 1
        self.device.launch(tops_kernel(self.name, self.tiling, self.deep, self.generic), grid,
                           record, self.shared)

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

    def run(self, pass_: int, read: bool, part: Part, spans: tuple[int, int],
            before: tuple[int, ...], after: tuple[int, ...], **given: Any) -> None:
        """Launch a pass over the spans of all pairs."""
        record = self.record(pass_, part, spans)
        record["reads"], record["before"], record["after"] = read, before, after
        for name, value in given.items():
            record[name] = value
        chosen = {name: int(record[name])
                  for name in ("pass", "reads", "causal", "kind", "projected")}
        chosen["deep"] = int(self.deep)
        self.device.launch(walk_kernel(self.name, self.tiling, chosen, self.generic),
                           (self.pairs, spans[0], 1), record, self.shared)

    def record(self, pass_: int, part: Part, spans: tuple[int, int]) -> np.ndarray:
        """Return what launches for a part are told."""
        record = self.common.copy()
        record["pass"], record["each"] = pass_, spans[1]
        record["f"], record["e"] = part.features, part.columns
        record["vector"] = self.p.normalize and part.e == 0
        if self.projected:
            numbers = part.f * int(record["depth"])
            record["projection"] += np.uint64(numbers * stored_bytes(self.name))
        else:
            record["d"] = part.features
        return record

    def tokens(self, x: Array, part: Part) -> tuple[int, ...]:
        """Return the OPERAND of queries or keys, or of their gradients, for a part."""
        return self.place(x, 0 if self.projected else part.f)

    def values(self, x: Array, part: Part) -> tuple[int, ...]:
        """Return the OPERAND of what is as wide as values, for a part."""
        return self.place(x, part.e)

    def states_before(self, pass_: int, part: Part, given: Array | None, after: Array | None,
                      **operands: Any) -> tuple[tuple[int, int], tuple[int, ...], tuple[int, ...]]:
        """Return the spans of a walk, the states before them, and where it leaves the last.

        The sums of `pass_`, OUT or DK, are done where the walk cannot carry the state itself.
        """
        spans = self.divide(self.steps(pass_, False))
        first, last = self.one_span(given, part), self.one_span(after, part)
        if spans[0] == 1 and self.p.causal:
            return spans, first, last
        if after is None and not self.p.causal:
            last = self.spans(1, part)
        if spans[0] == 1:
            self.run(pass_, False, part, spans, first, last, **operands)
        else:
            states = self.spans(spans[0], part)
            self.run(pass_, False, part, spans, (0,) * 6, states, **operands)
            self.scan(pass_, part, states, spans, first, last)
            if self.p.causal:
                return spans, states, (0,) * 6
        # all rows see all columns
        return self.divide(self.steps(pass_, True)), last, (0,) * 6

    def scan(self, pass_: int, part: Part, states: tuple[int, ...], spans: tuple[int, int],
             given: tuple[int, ...], after: tuple[int, ...]) -> None:
        """Turn the sums of spans into the states before them."""
        record = np.zeros((), scan_struct(self.acc.str[1:]))
        record["walk"] = self.record(pass_, part, spans)
        record["given"], record["after"], record["states"] = given, after, states
        record["spans"] = spans[0]
        numbers = part.features * (part.columns + int(record["walk"]["vector"]))
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

    def place(self, x: Array, column: int = 0) -> tuple[int, ...]:
        """Return the OPERAND of an array, which is kept, from a column on."""
        self.address(x)
        at, *strides = operand(self.device, x)
        return (at + column * x.itemsize, *strides)


class Result:
    """An array for what a pass finds, as wide as values or as tokens."""

    def __init__(self, call: Call, x: Array, width: int, lengths: np.ndarray,
                 values: bool) -> None:
        self.call, self.values = call, values
        self.array = self.partial = call.made(x, width, lengths)
        # where it is a sum over features, and over columns, the first ones of the last part; or 0
        last = call.parts[-1]
        self.last = (last.f if values or call.projected else 0, 0 if values else last.e)
        if any(self.last) and self.array.dtype != call.acc:
            row = roomy_width(width, self.array.dtype)
            self.partial = call.device.empty((*x.shape[:3], row), call.acc)

    def of(self, part: Part) -> dict[str, Any]:
        """Return what the launch for a part is told."""
        place = self.call.values if self.values else self.call.tokens
        own = tuple(number if last else 0 for number, last in zip((part.f, part.e), self.last,
                                                                  strict=True))
        return {"out": place(self.array, part), "partial": place(self.partial, part)[0],
                "first": not any(own), "final": own == self.last}


def forward(problem: Any) -> tuple[Array, Array | None, Array, Array | None]:
    """Return out (B, H, N, E), denominators (B, H, N), the state, and its log-scale (B, G)."""
    p, call = problem, Call(problem)
    out = Result(call, call.q, call.e, p.q_lengths, values=True)
    den = call.device.zeros(out.array.shape[:3], call.acc) if p.normalize else None
    after = call.state()
    if not call.pairs:
        stable = p.feature_map.kind == "exp"
        top = call.device.empty(after.shape[:2], call.acc) if stable else None
        return out.array, den, after, top
    spare = None
    if den is not None and call.parts[-1].f:
        spare = call.device.empty(den.shape, call.acc)
    for part in call.parts:
        columns = {"y": call.tokens(call.k, part), "z": call.values(call.v, part)}
        spans, before, last = call.states_before(OUT, part, p.state, after, **columns)
        call.run(OUT, True, part, spans, before, last, x=call.tokens(call.q, part), **columns,
                 **out.of(part), **denominators(call, part, den, spare))
    top = None
    if p.feature_map.kind == "exp":
        top = call.running[:, -1].reshape(after.shape[:2])
    return out.array, den, after, top


def denominators(call: Call, part: Part, den: Array | None, spare: Array | None) -> dict[str, int]:
    """Return where a part finds denominators and leaves them: the last of the features in `den`."""
    if den is None:
        return {}
    if part.e:
        return {"den_before": call.address(den)}
    if (call.parts[-1].f - part.f) // call.tiling.width % 2:
        den, spare = spare, den
    return {"den": call.address(den), "den_before": call.address(spare) if part.f else 0}


def backward(problem: Any, dout: Array, out: Array, den: Array | None,
             dstate: Array | None) -> dict[str, Array]:
    """Return the gradients of q, k, v and of the state before the first token."""
    p, call = problem, Call(problem)
    dq = Result(call, call.q, call.d, p.q_lengths, values=False)
    dk = Result(call, call.k, call.d, p.kv_lengths, values=False)
    dv = Result(call, call.v, call.e, p.kv_lengths, values=True)
    first = call.state()
    found = {"q": dq.array, "k": dk.array, "v": dv.array, "state": first}
    if not call.pairs:
        return found
    dout, out = (readable(call.device, x) for x in (dout, out))
    pulls = rows_of(call, dout, out, den) if den is not None else {}
    for part in call.parts:
        q, k = (call.tokens(x, part) for x in (call.q, call.k))
        v, g = (call.values(x, part) for x in (call.v, dout))
        spans, before, _ = call.states_before(OUT, part, p.state, None, y=k, z=v)
        call.run(DQ, True, part, spans, before, (0,) * 6, x=g, y=v, z=k, tokens=q, **dq.of(part),
                 **pulls)
        columns = {"y": g, "z": q, **pulls}
        spans, before, last = call.states_before(DK, part, dstate, first, **columns)
        call.run(DK, True, part, spans, before, last, x=v, **columns, tokens=k, **dk.of(part))
        call.run(DV, True, part, spans, before, (0,) * 6, x=k, y=q, z=g, **dv.of(part), **pulls)
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
    call.launch("linear_pull", 8 * rows, 1, record)
    return addresses
