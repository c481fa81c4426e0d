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
from typing import Any, NamedTuple, TypeVar

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
    copied,
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

Made = TypeVar("Made")

THREADS = 128
WARPS = THREADS // 32

WIDEST = 512
"""The most columns that the lanes of a warp hold in registers."""

HELD_BYTES = 256
"""How much a lane may hold of rows of heads that it does together; of one head it may be more.

The backward needs more beside them, and takes three quarters of it.
"""

READ_CHUNKS = 8
"""How many chunks of listed rows a lane asks for at a time, if a key's are not more already."""

PIECE_EDGES = 256
"""Entries of a list, at least, that a piece has, but for the last piece of a list."""

PIECES = 64
"""Pieces for each multiprocessor that are wanted, if all lists are long."""


class Tiling(NamedTuple):
    """How a warp divides its work, see edges.cuh, and how many blocks a multiprocessor holds."""

    lanes: int
    d_chunks: int
    e_chunks: int
    heads: int
    at_once: int
    blocks: int


@functools.lru_cache(maxsize=256)
def tiling(name: str, d: int, e: int, heads: int, backward: bool, generic: bool = False) -> Tiling:
    """Return how warps do rows of widths `d` and `e` for up to `heads` heads that share a list."""
    of_d, of_e = (-(-width * item_bytes(name) // CHUNK_BYTES) for width in (d, e))
    lanes = 8 if generic else min(32, power_of_two(max(of_d, of_e)))
    of_d, of_e = -(-of_d // lanes), -(-of_e // lanes)
    if generic:
        of_d = of_e = max(of_d, of_e, 2)
    # rows of q and out; of q, dq and dout
    sums = (2 * of_d if backward else of_d) + of_e
    held = sums * CHUNK_BYTES // item_bytes(name) * np.dtype(sum_type(name)).itemsize
    less = HELD_BYTES * 3 // 4
    room = less if backward else HELD_BYTES
    together = max(x for x in (1, 2, 4) if x == 1 or x * held <= room)
    together = together if generic else min(together, power_of_two(heads))
    at_once = min(4, READ_CHUNKS // (of_d + of_e), 2 * HELD_BYTES // (together * held))
    # so many that no register is spilled; fp64 takes more of them for its functions
    wide = together * held > (less // 2 if name == "float64" else less)
    blocks = 2 if wide else 3 if together > 1 else 4
    return Tiling(lanes, of_d, of_e, together, max(1, at_once), blocks)


def power_of_two(x: int) -> int:
    """Return the least power of two that is not below `x`."""
    return 1 << max(0, x - 1).bit_length()


def kernel(name: str, file: str, tiling: Tiling, **more: int) -> Kernel:
    """Return a kernel of `file`, which has one function of the same name."""
    macros = {"ELEMENT": ELEMENTS[name], "LANES": tiling.lanes, "D_CHUNKS": tiling.d_chunks,
              "E_CHUNKS": tiling.e_chunks, "AT_ONCE": tiling.at_once, "BLOCKS": tiling.blocks,
              "THREADS": THREADS, **more}
    return Kernel(f"{file}.cu", file, tuple(macros.items()), THREADS)


def queries_kernel(name: str, file: str, tiling: Tiling, softcap: bool, bias: bool) -> Kernel:
    """Return a kernel whose warps do queries."""
    return kernel(name, file, tiling, HEADS=tiling.heads, SOFTCAP=int(softcap), BIAS=int(bias))


def keys_kernel(name: str, tiling: Tiling) -> Kernel:
    """Return the kernel whose warps do keys, one head after the other."""
    return kernel(name, "edges_backward_keys", tiling, HEADS=1, SOFTCAP=0, BIAS=0)


def join_kernel(name: str) -> Kernel:
    """Return the kernel that joins pieces."""
    return Kernel("edges_join.cu", "edges_join",
                  (("ELEMENT", ELEMENTS[name]), ("THREADS", THREADS)), THREADS)


def refuses(problem: Any) -> str | None:
    """Why `problem` cannot run here, or None."""
    p = problem
    reason = devices.missing(p.v)
    d, e = 0 if p.q is None else p.q.shape[3], p.v.shape[3]
    if reason is None and max(d, e) > WIDEST:
        reason = f"widths must be at most {WIDEST}; q and k have {d}, v has {e}"
    return reason


# what is made of the lists on the host

RUN = struct(*fields("i4", "item group head count list"))
PIECE = struct(*fields("i4", "row member skipped count"))
DIVIDED = struct(*fields("i4", "row first last"))
PIECES_STRUCT = struct(*fields("u8", "pieces start part_at"), *fields("i4", "most slots"))


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
    """Cut the rows with more than `most` entries into pieces of as many, but for the last.

    `start` (lists, rows + 1) tells where the entries of a row begin in each list, and `members`
    (lines, members) which lists a line has: their entries follow one another.
    """
    counts = np.moveaxis(np.diff(start, axis=1)[members], 1, 2)
    line, row = np.nonzero(counts.sum(axis=-1) > most)
    ends = counts[line, row].cumsum(axis=-1)                    # (divided rows, members)
    total = ends[:, -1] if ends.shape[1] else np.zeros(0, np.int64)
    number = -(-total // most)
    last = number.cumsum()
    owner = np.repeat(np.arange(len(row)), number)
    at = (np.arange(len(owner)) - (last - number)[owner]) * most
    found = np.zeros(len(owner), PIECE)
    found["row"] = row[owner]
    found["member"] = (ends[owner] <= at[:, None]).sum(axis=-1)
    before = np.concatenate([np.zeros((len(row), 1), np.int64), ends], axis=-1)
    found["skipped"] = at - before[owner, found["member"]]
    found["count"] = np.minimum(most, total[owner] - at)
    lines = np.arange(len(members) + 1)
    piece_start, divided_start = (np.searchsorted(x, lines) for x in (line[owner], line))
    divided = np.zeros(len(row), DIVIDED)
    divided["row"], divided["last"] = row, last - piece_start[line]
    divided["first"] = divided["last"] - number
    return Pieces(found, piece_start.astype(np.int64), divided, divided_start.astype(np.int64),
                  most)


def piece_edges(edges: Any, device: Device) -> int:
    """Return how many entries a piece may have: it depends on the lists and on the device."""
    return max(PIECE_EDGES, -(-edges.pairs // (PIECES * device.multiprocessors)))


def kept_at(edges: Any) -> np.ndarray:
    """Return where each head's edges begin among those of all heads, int64 (B * H,)."""
    counts = (edges.start[:, -1] - edges.start[:, 0])[edges.owner].reshape(-1)
    return counts.cumsum(dtype=np.int64) - counts


# the same on the device, where it stays as long as the lists live

@dataclasses.dataclass(frozen=True)
class Lines:
    """Lists as warps walk them: copies of host arrays by name, and what is cut into pieces."""

    arrays: dict[str, Array]
    pieces: Pieces
    parts: int
    """Pieces of all heads, or groups, together."""


@dataclasses.dataclass(frozen=True)
class Runs:
    """Heads that share a list and a key/value head."""

    array: Array
    """RUN (count,), as bytes."""
    count: int
    longest: int
    """How many heads a run has, at most."""


_known: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def once(make: Callable[..., Made], device: Device, edges: Any, *options: int) -> Made:
    """Return ``make(device, edges, *options)``, made once for a device, its stream and `edges`."""
    known = _known.setdefault(edges, {})
    key = (make, device, device.stream, *options)
    if key not in known:
        known[key] = make(device, edges, *options)
    return known[key]


def lines_of(device: Device, start: np.ndarray, members: np.ndarray, line: np.ndarray, most: int,
             kept_at: np.ndarray, **more: np.ndarray) -> Lines:
    """Return lists of which `line` tells, of each head or group, which of them it walks.

    `more` are arrays of int32.
    """
    found = pieces(start, members, most)
    number = np.diff(found.start)[line.reshape(-1)]
    offsets = {"start": start, "piece_start": found.start, "divided_start": found.divided_start,
               "part_at": number.cumsum() - number, "kept_at": kept_at}
    records = {"pieces": found.pieces, "divided": found.divided}
    arrays = {name: copied(device, x, dtype)
              for named, dtype in ((offsets, np.int64), ({**more, "line": line}, np.int32),
                                   (records, None))
              for name, x in named.items()}
    return Lines(arrays, found, int(number.sum()))


def lines_of_queries(device: Device, edges: Any, most: int) -> Lines:
    """Return what kernels that own queries walk: one list for each head."""
    each = np.arange(len(edges.start))[:, None]
    return lines_of(device, edges.start, each, edges.owner, most, kept_at(edges), key=edges.key)


def lines_of_keys(device: Device, edges: Any, most: int, groups: int) -> Lines:
    """Return what the kernel that owns keys walks: the lists of all heads of a group."""
    by_key, own = edges.by_key, edges.owner.reshape(len(edges.owner) * groups, -1)
    members, line = np.unique(own, axis=0, return_inverse=True)
    return lines_of(device, by_key.start, members, line, most, kept_at(edges),
                    query=by_key.query, edge=by_key.edge, list=edges.owner)


def runs_of(device: Device, edges: Any, groups: int, most: int) -> Runs:
    """Return the runs of at most `most` heads."""
    runs = edges.runs(groups, most)
    record = np.zeros(len(runs), RUN)
    for name, column in zip(RUN.names or (), runs.T, strict=True):
        record[name] = column
    return Runs(copied(device, record), len(runs), int(record["count"].max(initial=1)))


# launches

class Call(Keeper):
    """A problem as launches need it: device, dtype, and arrays that kernels can read."""

    def __init__(self, p: Any, backward: bool) -> None:
        super().__init__(devices.of(p.v))
        self.p, self.name, self.backward = p, dtype_name(p.v), backward
        self.sums = sum_type(self.name)
        self.batch, self.heads = p.edges.owner.shape
        self.n = p.edges.start.shape[1] - 1
        _, self.groups, self.m, self.e = p.v.shape
        self.d = 0 if p.q is None else p.q.shape[3]
        self.q, self.k, self.v = (None if x is None else readable(self.device, x)
                                  for x in (p.q, p.k, p.v))
        self.terms = [self.device.generic or x is not None for x in (p.softcap, p.bias)]
        self.most = piece_edges(p.edges, self.device)
        self.lines = once(lines_of_queries, self.device, p.edges, self.most)
        self.runs = once(runs_of, self.device, p.edges, self.groups,
                         self.tiling(self.heads // max(1, self.groups)).heads)

    def tiling(self, heads: int) -> Tiling:
        """Return how a warp does up to `heads` heads that share a list."""
        return tiling(self.name, self.d, self.e, heads, self.backward, self.device.generic)

    def empty(self, *shape: int) -> Array:
        """Return an array of sums."""
        return self.device.empty(shape, np.dtype(self.sums))

    def parts(self, lines: Lines, width: int) -> Array:
        """Return room for what pieces find, (parts, width)."""
        return self.empty(lines.parts, roomy_width(width, self.p.v.dtype))

    def fill(self, arguments: np.ndarray, **arrays: Array | None) -> None:
        """Write into a struct where arrays are, as its fields are: 0 where there is nothing."""
        for name, x in arrays.items():
            there = x is not None and math.prod(x.shape) > 0
            if arguments.dtype[name] == OPERAND:
                arguments[name] = operand(self.device, x) if there else (0, 0, 0, 0)
            else:
                arguments[name] = self.address(x) if there else 0

    def pieces(self, lines: Lines) -> np.ndarray:
        """Return the struct Pieces."""
        record = np.zeros((), PIECES_STRUCT)
        self.fill(record, pieces=lines.arrays["pieces"], start=lines.arrays["piece_start"],
                  part_at=lines.arrays["part_at"])
        record["most"], record["slots"] = lines.pieces.most, lines.pieces.slots
        return record

    @property
    def problem(self) -> np.ndarray:
        """The problem's struct."""
        p, record = self.p, np.zeros((), problem_struct(self.sums))
        bias = None if p.bias is None else contiguous(as_sums(p.bias, self.name))
        self.fill(record, q=self.q, k=self.k, v=self.v, bias=bias, runs=self.runs.array,
                  **{name: self.lines.arrays[name] for name in ("start", "key")})
        if bias is not None:
            record["bias_b"], record["bias_h"] = steps(bias)
        record["pieces"] = self.pieces(self.lines)
        record["scale"], record["softcap"] = p.scale, p.softcap or 0.0
        for name in ("heads", "n", "d", "e"):
            record[name] = getattr(self, name)
        record["blocks"] = self.blocks
        return record

    @property
    def blocks(self) -> int:
        """Blocks of threads that do the queries of a run."""
        return -(-(self.n + self.lines.pieces.slots) // WARPS)

    def launch_queries(self, file: str, arguments: np.ndarray) -> None:
        """Launch a kernel that owns queries; this fills in the problem."""
        arguments["problem"] = self.problem
        found = queries_kernel(self.name, file, self.tiling(self.runs.longest), *self.terms)
        self.device.launch(found, self.runs.count * self.blocks, arguments, 0)

    def join(self, lines: Lines, result: Array | None, parts: Array, part_lse: Array | None = None,
             lse: Array | None = None) -> None:
        """Put together what pieces found, for the rows of `result` (B, heads, n, width)."""
        if result is None or not lines.parts:
            return
        arguments = np.zeros((), struct(
            *fields("u8", "divided start line part_at parts part_lse"), ("result", OPERAND),
            *fields("u8", "lse"), *fields("i4", "heads n width columns most")))
        self.fill(arguments, divided=lines.arrays["divided"], start=lines.arrays["divided_start"],
                  line=lines.arrays["line"], part_at=lines.arrays["part_at"], parts=parts,
                  part_lse=part_lse, result=result, lse=lse)
        batch, heads, arguments["n"], arguments["columns"] = result.shape
        arguments["heads"], arguments["width"] = heads, parts.shape[1]
        arguments["most"] = most = int(np.diff(lines.pieces.divided_start).max())
        self.device.launch(join_kernel(self.name), batch * heads * most, arguments, 0)


@functools.cache
def problem_struct(sums: str) -> np.dtype:
    """Return the struct Problem of edges.cuh."""
    return struct(("q", OPERAND), ("k", OPERAND), ("v", OPERAND),
                  *fields("u8", "start key runs bias"), *fields("i8", "bias_b bias_h"),
                  ("pieces", PIECES_STRUCT), *fields(sums, "scale softcap"),
                  *fields("i4", "heads n d e blocks"))


def steps(x: Array) -> tuple[int, int]:
    """Return how far apart items and heads of (b, h, edges) are: those that are shared, not."""
    return (0 if x.shape[0] == 1 else x.shape[1] * x.shape[2],
            0 if x.shape[1] == 1 else x.shape[2])


def forward(problem: Any) -> tuple[Array, Array]:
    """Return out (B, H, N, E) in the dtype of v, and lse (B, H, N)."""
    call = Call(problem, backward=False)
    out = roomy(call.device, (call.batch, call.heads, call.n, call.e), problem.v.dtype)
    lse = call.empty(*out.shape[:3])
    if 0 in lse.shape:
        return out, lse
    parts, part_lse = call.parts(call.lines, call.e), call.empty(call.lines.parts)
    arguments = np.zeros((), struct(
        ("problem", problem_struct(call.sums)), ("out", OPERAND),
        *fields("u8", "lse parts part_lse"), *fields("i4", "width")))
    call.fill(arguments, out=out, lse=lse, parts=parts, part_lse=part_lse)
    arguments["width"] = parts.shape[1]
    call.launch_queries("edges_forward", arguments)
    call.join(call.lines, out, parts, part_lse, lse)
    return out, lse


def backward(problem: Any, dout: Array, out: Array, lse: Array,
             dlse: Array | None) -> dict[str, Array]:
    """Return the gradients by argument; that of the bias is (copies, H, edges)."""
    p, call = problem, Call(problem, backward=True)
    device = call.device
    found = {name: roomy(device, x.shape, p.v.dtype)
             for name, x in (("q", p.q), ("k", p.k), ("v", p.v)) if x is not None}
    if p.bias is not None:
        # edges of lists that a head does not read have no gradient
        found["bias"] = device.zeros((p.copies, call.heads, len(p.edges.key)), np.dtype(call.sums))
    if 0 in lse.shape:
        for x in found.values():
            x[...] = 0
        return found
    dout, out = readable(device, dout), readable(device, out)
    lse, dlse = (None if x is None else contiguous(as_sums(x, call.name)) for x in (lse, dlse))
    of_edges = call.empty(p.edges.pairs, 2)
    launch_queries(call, found, dout, out, lse, dlse, of_edges)
    if call.m:
        launch_keys(call, found, dout, of_edges)
    return found


def launch_queries(call: Call, found: dict[str, Array], dout: Array, out: Array, lse: Array,
                   dlse: Array | None, of_edges: Array) -> None:
    """Compute the gradients of q and of the bias, and what the keys' gradients are sums of."""
    dq, dbias = found.get("q"), found.get("bias")
    parts = call.parts(call.lines, call.d)
    arguments = np.zeros((), struct(
        ("problem", problem_struct(call.sums)), ("dout", OPERAND), ("out", OPERAND),
        ("dq", OPERAND), *fields("u8", "lse dlse dbias"), *fields("i8", "dbias_b dbias_h"),
        *fields("u8", "kept kept_at parts"), *fields("i4", "width")))
    call.fill(arguments, dout=dout, out=out, dq=dq, lse=lse, dlse=dlse, dbias=dbias, kept=of_edges,
              kept_at=call.lines.arrays["kept_at"], parts=parts)
    if dbias is not None:
        arguments["dbias_b"], arguments["dbias_h"] = steps(dbias)
    arguments["width"] = parts.shape[1]
    call.launch_queries("edges_backward_queries", arguments)
    call.join(call.lines, dq, parts)


def launch_keys(call: Call, found: dict[str, Array], dout: Array, of_edges: Array) -> None:
    """Compute the gradients of k and v."""
    dk, dv = found.get("k"), found["v"]
    lines = once(lines_of_keys, call.device, call.p.edges, call.most, call.groups)
    dk_parts, dv_parts = (call.parts(lines, width) for width in (call.d, call.e))
    arguments = np.zeros((), struct(
        ("q", OPERAND), ("dout", OPERAND), ("dk", OPERAND), ("dv", OPERAND),
        *fields("u8", "start query edge list line kept kept_at"), ("pieces", PIECES_STRUCT),
        *fields("u8", "dk_parts dv_parts"), *fields(call.sums, "scale"),
        *fields("i4", "dk_width dv_width heads groups m d e blocks")))
    call.fill(arguments, q=call.q, dout=dout, dk=dk, dv=dv, kept=of_edges, dk_parts=dk_parts,
              dv_parts=dv_parts, **{name: lines.arrays[name] for name in (
                  "start", "query", "edge", "list", "line", "kept_at")})
    arguments["pieces"], arguments["scale"] = call.pieces(lines), call.p.scale
    arguments["dk_width"], arguments["dv_width"] = dk_parts.shape[1], dv_parts.shape[1]
    for name in ("heads", "groups", "m", "d", "e"):
        arguments[name] = getattr(call, name)
    arguments["blocks"] = blocks = -(-(call.m + lines.pieces.slots) // WARPS)
    call.device.launch(keys_kernel(call.name, call.tiling(1)),
                       call.batch * call.groups * blocks, arguments, 0)
    call.join(lines, dk, dk_parts)
    call.join(lines, dv, dv_parts)


def configurations() -> Iterator[tuple[Kernel, tuple[str, ...], str]]:
    """Yield kernels to be compiled and read: (kernel, architectures, an instruction it must have).

    For the widths at which lanes hold most, and for scores that are the bias alone.
    """
    for name, d, e, heads, architecture, softcap, bias in (
            ("bfloat16", 64, 64, 4, "sm_90", False, False),
            ("bfloat16", 128, 128, 1, "sm_80", True, True),
            ("bfloat16", 512, 512, 1, "sm_90", True, True),
            ("float16", 0, 8, 1, "sm_80", False, True),
            ("float32", 64, 64, 4, "sm_80", True, True),
            ("float32", 512, 512, 2, "sm_90", True, False),
            ("float64", 64, 64, 2, "sm_90", False, True),
            ("float64", 512, 512, 1, "sm_80", True, True)):
        fused = "DFMA" if name == "float64" else "FFMA"
        for file, backward in (("edges_forward", False), ("edges_backward_queries", True)):
            found = tiling(name, d, e, heads, backward)
            yield queries_kernel(name, file, found, softcap, bias), (architecture,), fused
        yield keys_kernel(name, tiling(name, d, e, 1, True)), (architecture,), fused
        yield join_kernel(name), (architecture,), fused
