"""Attention over listed keys on CuPy arrays, by CUDA C++ kernels.

A warp does a query: the lists are read where they lie, each listed row once for as many heads as
share it. The backward goes over the queries once, for the gradients of q and of the bias, and keeps
two numbers of each edge and head; then over the keys, with the lists turned round, for those of k
and v. Lists so long that a warp would take too long are cut into pieces; what these find is joined
in their order, so that no launch adds atomically.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from pyattn.arrays import Array, dtype_name

from . import device as devices
from .device import Device, Kernel
from .layout import (
    CHUNK_BYTES,
    ELEMENTS,
    OPERAND,
    Keeper,
    as_sums,
    fields,
    operand,
    readable,
    roomy,
    roomy_width,
    struct,
    sum_type,
)
from .softmax import contiguous
from .tilings import item_bytes

THREADS = 128
WARPS = THREADS // 32

WIDEST = 512
"""The most columns that the lanes of a warp hold in registers."""

HELD_BYTES = 256
"""What a lane may hold of rows of heads that it does together; that of one head may be more."""

READ_BYTES = 128
"""How much a lane asks for at a time, if the rows are not wider."""

PIECE_EDGES = 256
"""Entries of a list, at least, that a piece has, but for the last piece of a list."""

PIECES = 64
"""Pieces for each multiprocessor that are wanted, if all lists are long."""


class Tiling(NamedTuple):
    """How a warp divides its work; see edges.cuh for what the numbers are."""

    lanes: int
    d_chunks: int
    e_chunks: int
    heads: int
    at_once: int


@functools.lru_cache(maxsize=256)
def tiling(name: str, d: int, e: int, heads: int, generic: bool = False) -> Tiling:
    """Return how warps do rows of widths `d` and `e` for up to `heads` heads that share a list."""
    of_d, of_e = (-(-width * item_bytes(name) // CHUNK_BYTES) for width in (d, e))
    lanes = 8 if generic else min(32, power_of_two(max(of_d, of_e)))
    of_d, of_e = -(-of_d // lanes), max(1, -(-of_e // lanes))
    if generic:
        of_d = of_e = max(of_d, of_e)
    held = (of_d + of_e) * CHUNK_BYTES // item_bytes(name) * (8 if name == "float64" else 4)
    together = max(x for x in (1, 2, 4) if x == 1 or x * held <= HELD_BYTES)
    at_once = max(1, min(4, READ_BYTES // (CHUNK_BYTES * (of_d + of_e))))
    return Tiling(lanes, of_d, of_e, together if generic else min(together, power_of_two(heads)),
                  at_once)


def power_of_two(x: int) -> int:
    """Return the least power of two that is not below `x`."""
    return 1 << max(0, x - 1).bit_length()


def kernel(name: str, file: str, tiling: Tiling, **more: int) -> Kernel:
    """Return a kernel of `file`, which has one function of the same name."""
    macros = {"ELEMENT": ELEMENTS[name], "LANES": tiling.lanes, "D_CHUNKS": tiling.d_chunks,
              "E_CHUNKS": tiling.e_chunks, "AT_ONCE": tiling.at_once, "THREADS": THREADS, **more}
    return Kernel(f"{file}.cu", file, tuple(macros.items()), THREADS)


def queries_kernel(name: str, file: str, tiling: Tiling, softcap: bool) -> Kernel:
    """Return a kernel whose warps do queries."""
    return kernel(name, file, tiling, HEADS=tiling.heads, SOFTCAP=int(softcap))


def keys_kernel(name: str, tiling: Tiling) -> Kernel:
    """Return the kernel whose warps do keys, one head after the other."""
    return kernel(name, "edges_backward_keys", tiling, HEADS=1, SOFTCAP=0)


def join_kernel(name: str) -> Kernel:
    """Return the kernel that joins pieces."""
    return Kernel("edges_join.cu", "edges_join",
                  (("ELEMENT", ELEMENTS[name]), ("THREADS", THREADS)), THREADS)


def refuses(problem: Any) -> str | None:
    """Why `problem` cannot run here, or None."""
    p = problem
    d, e = 0 if p.q is None else p.q.shape[3], p.v.shape[3]
    if max(d, e) > WIDEST:
        return f"widths must be at most {WIDEST}; q and k have {d}, v has {e}"
    return devices.missing(p.v)


# what is made of the lists on the host

RUN = struct(*fields("i4", "item group head count list"))
PIECE = struct(*fields("i8", "first last"), *fields("i4", "row member"))
DIVIDED = struct(*fields("i4", "row first last"))
PIECES_STRUCT = struct(*fields("u8", "pieces start"), *fields("i8", "most"),
                       *fields("i4", "slots"))


class Pieces(NamedTuple):
    """Rows with long lists, in pieces. A line is those lists, its members, that a warp walks."""

    pieces: np.ndarray
    """PIECE (pieces,), line by line."""
    start: np.ndarray
    """int64 (lines + 1,): offsets into `pieces`."""
    divided: np.ndarray
    """DIVIDED (rows,): which pieces such a row has, counted in its line."""
    divided_start: np.ndarray
    """int64 (lines + 1,): offsets into `divided`."""
    most: int
    """How many entries a row may have that is not divided."""

    @property
    def slots(self) -> int:
        """How many pieces a line has at most."""
        return int(np.diff(self.start).max(initial=0))


def pieces(start: np.ndarray, members: np.ndarray, most: int) -> Pieces:
    """Cut the rows with more than `most` entries into pieces of at most as many.

    `start` (lists, rows + 1) tells where the entries of a row begin in each list, and `members`
    (lines, members) which lists a line has. A piece has entries of one list.
    """
    begin, end = (np.moveaxis(x[members], 1, 2) for x in (start[:, :-1], start[:, 1:]))
    line, row = np.nonzero((end - begin).sum(axis=-1) > most)
    begin, end = begin[line, row], end[line, row]               # (divided rows, members)
    number = -(-(end - begin) // most)
    owner, member = np.divmod(np.repeat(np.arange(number.size), number.reshape(-1)),
                              max(1, members.shape[1]))
    ends = number.reshape(-1).cumsum()
    order = np.arange(len(owner)) - np.repeat(ends - number.reshape(-1), number.reshape(-1))
    found = np.zeros(len(owner), PIECE)
    found["row"], found["member"] = row[owner], member
    found["first"] = begin[owner, member] + order * most
    found["last"] = np.minimum(found["first"] + most, end[owner, member])
    lines = np.arange(len(members) + 1)
    piece_start, divided_start = (np.searchsorted(x, lines) for x in (line[owner], line))
    divided = np.zeros(len(row), DIVIDED)
    divided["row"] = row
    divided["last"] = number.sum(axis=-1).cumsum() - piece_start[line]
    divided["first"] = divided["last"] - number.sum(axis=-1)
    return Pieces(found, piece_start.astype(np.int64), divided, divided_start.astype(np.int64),
                  most)


def piece_edges(edges: Any, device: Device) -> int:
    """Return how many entries a piece may have: it depends on the lists and on the device."""
    return max(PIECE_EDGES, -(-edges.pairs // (PIECES * device.multiprocessors)))


def list_ends(edges: Any) -> np.ndarray:
    """Return where the edges of each head's list begin among those of all heads, and the end."""
    counts = edges.start[:, -1] - edges.start[:, 0]
    return np.append(0, counts[edges.owner].reshape(-1).cumsum()).astype(np.int64)


# the same on the device, where it stays as long as the lists live

@dataclasses.dataclass(frozen=True)
class Table:
    """Copies of host arrays by name, and what launches ask about them."""

    arrays: dict[str, Array]
    pieces: Pieces
    runs: int = 0


_tables: weakref.WeakKeyDictionary[Any, dict[Any, Table]] = weakref.WeakKeyDictionary()


def table(device: Device, edges: Any, make: Callable[..., Table], *options: int) -> Table:
    """Return ``make(device, edges, *options)``, once for each lists, device and stream."""
    known = _tables.setdefault(edges, {})
    key = (device, device.stream, make, *options, piece_edges(edges, device))
    if key not in known:
        known[key] = make(device, edges, *options)
    return known[key]


def copies(device: Device, found: Pieces, **more: np.ndarray) -> dict[str, Array]:
    """Return copies of arrays by name, those of pieces among them."""
    every = {**more, "pieces": found.pieces, "piece_start": found.start, "divided": found.divided,
             "divided_start": found.divided_start}
    return {name: device.constant(np.ascontiguousarray(x)) for name, x in every.items()}


def queries_table(device: Device, edges: Any, groups: int, heads: int) -> Table:
    """Return what kernels that own queries read, for runs of up to `heads` heads."""
    lists = np.arange(len(edges.start))[:, None]
    found = pieces(edges.start, lists, piece_edges(edges, device))
    runs = edges.runs(groups, heads)
    record = np.zeros(len(runs), RUN)
    for name, column in zip(RUN.names or (), runs.T, strict=True):
        record[name] = column
    return Table(copies(device, found, start=edges.start, key=edges.key, runs=record,
                        list=edges.owner, kept_at=list_ends(edges)), found, len(runs))


def keys_table(device: Device, edges: Any, groups: int) -> Table:
    """Return what the kernel that owns keys reads."""
    by_key = edges.by_key
    own = edges.owner.reshape(edges.owner.shape[0] * groups, -1)
    members, line = np.unique(own, axis=0, return_inverse=True)
    found = pieces(by_key.start, members, piece_edges(edges, device))
    return Table(copies(device, found, start=by_key.start, query=by_key.query, edge=by_key.edge,
                        list=edges.owner, line=line.reshape(-1).astype(np.int32),
                        kept_at=list_ends(edges)), found)


# launches

class Call(Keeper):
    """A problem as launches need it: device, dtype, and arrays that kernels can read."""

    def __init__(self, p: Any) -> None:
        super().__init__(devices.of(p.v))
        self.p, self.name = p, dtype_name(p.v)
        self.sums = sum_type(self.name)
        self.batch, self.heads = p.edges.owner.shape
        self.n = p.edges.start.shape[1] - 1
        _, self.groups, self.m, self.e = p.v.shape
        self.d = 0 if p.q is None else p.q.shape[3]
        self.q, self.k, self.v = (None if x is None else readable(self.device, x)
                                  for x in (p.q, p.k, p.v))
        shared = max(1, self.heads // max(1, self.groups))
        generic = self.device.generic
        self.softcap = generic or p.softcap is not None
        most = tiling(self.name, self.d, self.e, shared, generic).heads
        longest = int(p.edges.runs(self.groups, most)[:, 3].max(initial=1))
        self.tiling = tiling(self.name, self.d, self.e, longest, generic)

    @property
    def acc(self) -> np.dtype:
        """The dtype of sums."""
        return np.dtype(self.sums)

    def operand(self, x: Array | None) -> tuple[int, int, int, int]:
        """Return the OPERAND of an array; that of None is 0."""
        return (0, 0, 0, 0) if x is None else operand(self.device, x)

    def held(self, x: Array) -> int:
        """Return where an array is, or 0 if it has no elements."""
        return self.address(x) if math.prod(x.shape) else 0

    def pieces(self, of: Table) -> tuple[int, int, int, int]:
        """Return the struct Pieces."""
        return (self.held(of.arrays["pieces"]), self.held(of.arrays["piece_start"]),
                of.pieces.most, of.pieces.slots)

    @functools.cached_property
    def queries(self) -> Table:
        """The lists as kernels that own queries read them."""
        return table(self.device, self.p.edges, queries_table, self.groups, self.tiling.heads)

    @functools.cached_property
    def blocks(self) -> int:
        """Blocks of threads that do the queries of a run."""
        return -(-(self.n + self.queries.pieces.slots) // WARPS)

    @functools.cached_property
    def problem(self) -> np.ndarray:
        """The problem's struct."""
        p, record = self.p, np.zeros((), problem_struct(self.sums))
        for name, x in (("q", self.q), ("k", self.k), ("v", self.v)):
            record[name] = self.operand(x)
        for name in ("start", "key", "runs"):
            record[name] = self.held(self.queries.arrays[name])
        if p.bias is not None and math.prod(p.bias.shape):
            bias = contiguous(as_sums(p.bias, self.name))
            record["bias"] = self.address(bias)
            record["bias_b"], record["bias_h"] = (
                0 if size == 1 else stride // bias.itemsize
                for size, stride in zip(bias.shape[:2], bias.strides[:2], strict=True))
        record["pieces"] = self.pieces(self.queries)
        record["scale"], record["softcap"] = p.scale, p.softcap or 0.0
        for name in ("heads", "n", "d", "e", "blocks"):
            record[name] = getattr(self, name)
        return record

    def parts(self, rows: int, slots: int, width: int) -> Array:
        """Return room for what the pieces of `rows` lines find."""
        return self.device.empty((rows, slots, roomy_width(width, self.p.v.dtype)), self.acc)

    def join(self, of: Table, line: str, result: Array, parts: Array, part_lse: Array | None = None,
             lse: Array | None = None) -> None:
        """Put together what pieces found, for the rows of `result` (B, heads, n, width)."""
        most = int(np.diff(of.pieces.divided_start).max(initial=0))
        if not most:
            return
        arguments = np.zeros((), struct(
            *fields("u8", "divided start line parts part_lse"), ("result", OPERAND),
            *fields("u8", "lse"), *fields("i4", "heads n slots width columns most")))
        for name, x in (("divided", of.arrays["divided"]), ("start", of.arrays["divided_start"]),
                        ("line", of.arrays[line]), ("parts", parts), ("part_lse", part_lse),
                        ("lse", lse)):
            arguments[name] = 0 if x is None else self.held(x)
        arguments["result"] = self.operand(result)
        _, arguments["heads"], arguments["n"], arguments["columns"] = result.shape
        arguments["slots"], arguments["width"] = parts.shape[1:]
        arguments["most"] = most
        self.device.launch(join_kernel(self.name), len(parts) * most, arguments, 0)


@functools.cache
def problem_struct(sums: str) -> np.dtype:
    """Return the struct Problem of edges.cuh."""
    return struct(("q", OPERAND), ("k", OPERAND), ("v", OPERAND),
                  *fields("u8", "start key runs bias"), *fields("i8", "bias_b bias_h"),
                  ("pieces", PIECES_STRUCT),
                  *fields(sums, "scale softcap"), *fields("i4", "heads n d e blocks"))


def forward(problem: Any) -> tuple[Array, Array]:
    """Return out (B, H, N, E) in the dtype of v, and lse (B, H, N)."""
    p, call = problem, Call(problem)
    device = call.device
    out = roomy(device, (call.batch, call.heads, call.n, call.e), p.v.dtype)
    lse = device.empty(out.shape[:3], call.acc)
    if 0 in lse.shape:
        return out, lse
    of, lines = call.queries, call.batch * call.heads
    parts = call.parts(lines, of.pieces.slots, call.e)
    part_lse = device.empty(parts.shape[:2], call.acc)
    arguments = np.zeros((), struct(
        ("problem", problem_struct(call.sums)), ("out", OPERAND),
        *fields("u8", "lse parts part_lse"), *fields("i4", "width")))
    arguments["problem"], arguments["out"] = call.problem, call.operand(out)
    for name, x in (("lse", lse), ("parts", parts), ("part_lse", part_lse)):
        arguments[name] = call.held(x)
    arguments["width"] = parts.shape[2]
    device.launch(queries_kernel(call.name, "edges_forward", call.tiling, call.softcap),
                  of.runs * call.blocks, arguments, 0)
    call.join(of, "list", out, parts, part_lse, lse)
    return out, lse


def backward(problem: Any, dout: Array, out: Array, lse: Array,
             dlse: Array | None) -> dict[str, Array]:
    """Return the gradients by argument; that of the bias is (copies, H, edges)."""
    p, call = problem, Call(problem)
    device = call.device
    found = {name: roomy(device, x.shape, p.v.dtype)
             for name, x in (("q", p.q), ("k", p.k), ("v", p.v)) if x is not None}
    if p.bias is not None:
        # edges of lists that a head does not read have no gradient
        found["bias"] = device.zeros((p.copies, call.heads, len(p.edges.key)), call.acc)
    if 0 in lse.shape:
        for x in found.values():
            x[...] = 0
        return found
    dout, out = readable(device, dout), readable(device, out)
    lse, dlse = (None if x is None else contiguous(as_sums(x, call.name)) for x in (lse, dlse))
    kept = device.empty((p.edges.pairs, 2), call.acc)
    launch_queries(call, found, dout, out, lse, dlse, kept)
    if call.m:
        launch_keys(call, found, dout, kept)
    return found


def launch_queries(call: Call, found: dict[str, Array], dout: Array, out: Array, lse: Array,
                   dlse: Array | None, kept: Array) -> None:
    """Compute the gradients of q and of the bias, and what is kept of the edges."""
    p, of, dq, dbias = call.p, call.queries, found.get("q"), found.get("bias")
    parts = call.parts(call.batch * call.heads, of.pieces.slots, call.d)
    arguments = np.zeros((), struct(
        ("problem", problem_struct(call.sums)), ("dout", OPERAND), ("out", OPERAND),
        ("dq", OPERAND), *fields("u8", "lse dlse dbias"), *fields("i8", "dbias_b dbias_h"),
        *fields("u8", "kept kept_at parts"), *fields("i4", "width")))
    arguments["problem"] = call.problem
    for name, x in (("dout", dout), ("out", out), ("dq", dq)):
        arguments[name] = call.operand(x)
    for name, x in (("lse", lse), ("dlse", dlse), ("dbias", dbias), ("kept", kept),
                    ("kept_at", of.arrays["kept_at"]), ("parts", parts)):
        arguments[name] = 0 if x is None else call.held(x)
    if dbias is not None:
        arguments["dbias_h"] = dbias.shape[2]
        arguments["dbias_b"] = dbias.shape[1] * dbias.shape[2] if p.copies > 1 else 0
    arguments["width"] = parts.shape[2]
    call.device.launch(
        queries_kernel(call.name, "edges_backward_queries", call.tiling, call.softcap),
        of.runs * call.blocks, arguments, 0)
    if dq is not None:
        call.join(of, "list", dq, parts)


def launch_keys(call: Call, found: dict[str, Array], dout: Array, kept: Array) -> None:
    """Compute the gradients of k and v."""
    device, dk, dv = call.device, found.get("k"), found["v"]
    pairs = call.batch * call.groups
    of = table(device, call.p.edges, keys_table, call.groups)
    slots = of.pieces.slots
    dk_parts, dv_parts = (call.parts(pairs, slots, width) for width in (call.d, call.e))
    arguments = np.zeros((), struct(
        ("q", OPERAND), ("dout", OPERAND), ("dk", OPERAND), ("dv", OPERAND),
        *fields("u8", "start query edge list line kept kept_at"), ("pieces", PIECES_STRUCT),
        *fields("u8", "dk_parts dv_parts"), *fields(call.sums, "scale"),
        *fields("i4", "dk_width dv_width heads groups m d e blocks")))
    for name, x in (("q", call.q), ("dout", dout), ("dk", dk), ("dv", dv)):
        arguments[name] = call.operand(x)
    for name in ("start", "query", "edge", "list", "line", "kept_at"):
        arguments[name] = call.held(of.arrays[name])
    for name, x in (("kept", kept), ("dk_parts", dk_parts), ("dv_parts", dv_parts)):
        arguments[name] = call.held(x)
    arguments["pieces"], arguments["scale"] = call.pieces(of), call.p.scale
    arguments["dk_width"], arguments["dv_width"] = dk_parts.shape[2], dv_parts.shape[2]
    for name in ("heads", "groups", "m", "d", "e"):
        arguments[name] = getattr(call, name)
    arguments["blocks"] = blocks = -(-(call.m + slots) // WARPS)
    device.launch(keys_kernel(call.name, call.tiling), pairs * blocks, arguments, 0)
    for x, parts in ((dk, dk_parts), (dv, dv_parts)):
        if x is not None:
            call.join(of, "line", x, parts)


def configurations() -> Iterator[tuple[Kernel, tuple[str, ...], str]]:
    """Yield kernels to be compiled and read: (kernel, architectures, an instruction it must have).

    For the widths at which lanes hold most, and for scores that are the bias alone.
    """
    for name, d, e, heads, architecture, softcap in (
            ("bfloat16", 64, 64, 4, "sm_90", False), ("bfloat16", 64, 64, 1, "sm_80", False),
            ("bfloat16", 256, 256, 4, "sm_90", True), ("bfloat16", 512, 512, 1, "sm_90", True),
            ("bfloat16", 0, 8, 1, "sm_90", False), ("float16", 128, 128, 2, "sm_80", True),
            ("float32", 64, 64, 4, "sm_80", False), ("float32", 256, 256, 4, "sm_90", True),
            ("float32", 512, 512, 2, "sm_90", True), ("float32", 0, 64, 1, "sm_90", False),
            ("float64", 64, 64, 4, "sm_90", True), ("float64", 256, 256, 2, "sm_80", False),
            ("float64", 512, 512, 1, "sm_90", True)):
        found, fused = tiling(name, d, e, heads), "DFMA" if name == "float64" else "FFMA"
        for file in ("edges_forward", "edges_backward_queries"):
            yield queries_kernel(name, file, found, softcap), (architecture,), fused
        yield keys_kernel(name, found), (architecture,), fused
    for name in ELEMENTS:
        yield join_kernel(name), ("sm_80",), "DFMA" if name == "float64" else "FFMA"
