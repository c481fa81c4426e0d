"""From a Problem to the record that kernels read, and the arrays that live as long as it does."""

from __future__ import annotations

import dataclasses
import functools
import struct
import weakref
from typing import Any

import ml_dtypes  # noqa: F401, gives NumPy the name bfloat16
import numpy as np

from . import threads
from .compile import native
from .host import dot_product, vector_bytes
from .memory import CACHE_LINE, address, address_of_buffer, aligned
from .records import JOB, LISTS, PACK, SOURCES, TARGET

TILE = 64

SOURCE_CODES = {np.dtype(name): code for code, name in enumerate(SOURCES)}

HELPER_FLOPS = 2**23
"""Another thread joins for so many operations: some 40 microseconds."""

DEPTH_OF_PAIRS = 32
"""What widths are padded to where operands lie in pairs: the depth of a matrix tile."""

OFFSETS: dict[str, int] = {name: JOB.fields[name][1] for name in JOB.names}
OFFSETS |= {f"{name}.{part}": OFFSETS[name] + PACK.fields[part][1]
            for name in ("q", "k", "v", "dout") for part in PACK.names}
OFFSETS |= {f"{name}.{part}": OFFSETS[name] + TARGET.fields[part][1]
            for name in ("out", "dq", "dk", "dv") for part in TARGET.names}
OFFSETS |= {f"lists.{part}": OFFSETS["lists"] + LISTS.fields[part][1] for part in LISTS.names}

_masks: weakref.WeakKeyDictionary[Any, tuple[bytes, list[np.ndarray], float]] = (
    weakref.WeakKeyDictionary())


@dataclasses.dataclass(frozen=True, eq=False)
class Geometry:
    """What follows from the shapes and the dtype alone."""

    kind: str
    dtype: np.dtype
    operand: np.dtype
    fold: int
    lanes: int
    batch: int
    heads: int
    groups: int
    n: int
    m: int
    d: int
    e: int
    d_padded: int
    e_padded: int
    d_depth: int
    e_depth: int
    row_tiles: int
    key_tiles: int
    record: bytes
    """A job's memory with all of this filled in."""

    def with_fields(self, fields: dict[str, tuple[int, ...]]) -> bytes:
        """Return the record with more fields, the same for many calls, filled in."""
        memory = bytearray(self.record)
        for field, values in fields.items():
            put(memory, field, *values)
        return bytes(memory)


@functools.lru_cache(maxsize=1024)
def geometry(batch: int, q: tuple[int, ...], v: tuple[int, ...], given: np.dtype) -> Geometry:
    """Work out the geometry for B items with q (H, N, D) and v (G, M, E)."""
    kind, dtype, operand = kind_of(given)
    heads, n, d = q
    groups, m, e = v
    fold, lanes = 2 if operand.itemsize == 2 else 1, vector_bytes() // dtype.itemsize
    step = lanes if fold == 1 else DEPTH_OF_PAIRS
    d_padded, e_padded = -(-d // step) * step, -(-e // step) * step
    d_depth, e_depth = (d, e) if fold == 1 else (d_padded, e_padded)
    row_tiles, key_tiles = -(-n // TILE), -(-m // TILE)
    memory = bytearray(JOB.itemsize)
    put(memory, "size", dtype.itemsize, operand.itemsize, fold, lanes, heads, groups, n, m, d, e,
        d_padded, e_padded, d_depth, e_depth, row_tiles, key_tiles)
    for name, shape in {"q": (heads, n, row_tiles, d, d_padded),
                        "k": (groups, m, key_tiles, d, d_padded),
                        "v": (groups, m, key_tiles, e, e_padded),
                        "dout": (heads, n, row_tiles, e, e_padded)}.items():
        put(memory, name, *shape)
    return Geometry(kind, dtype, operand, fold, lanes, batch, heads, groups, n, m, d, e, d_padded,
                    e_padded, d_depth, e_depth, row_tiles, key_tiles, bytes(memory))


class Operands:
    """One call: a record of addresses of q, k and v, and what keeps them valid."""

    def __init__(self, g: Geometry, record: bytes, q: np.ndarray, k: np.ndarray, v: np.ndarray,
                 scale: np.ndarray, q_lengths: np.ndarray, kv_lengths: np.ndarray,
                 q_index: np.ndarray | None = None, k_index: np.ndarray | None = None) -> None:
        self.dtype, self.kind, self.batch = g.dtype, g.kind, g.batch
        self.alive: list[Any] = []
        self.memory = bytearray(record)
        self.place = address_of_buffer(self.memory)
        self.scale = self.hold(scale)
        self.q_lengths = self.hold(q_lengths, np.int32)
        lengths = self.hold(kv_lengths, np.int32)
        self.q_index = self.list_tokens(q_index, g.n)
        self.k_index = self.list_tokens(k_index, g.m)
        self.describe("q", q, self.q_index, self.q_lengths, self.scale)
        self.describe("k", k, self.k_index, lengths)
        self.describe("v", v, self.k_index, lengths)

    def put(self, field: str, *values: int) -> None:
        """Write integers from a field on."""
        put(self.memory, field, *values)

    def put_float(self, field: str, value: float) -> None:
        """Write a floating-point field."""
        struct.pack_into("=d", self.memory, OFFSETS[field], value)

    def hold(self, x: np.ndarray, dtype: Any = None) -> int:
        """Keep `x`, contiguous, for as long as the job lives; return its address."""
        dtype = self.dtype if dtype is None else dtype
        if x.dtype != dtype or not x.flags.c_contiguous:
            x = np.ascontiguousarray(x, dtype)
        self.alive.append(x)
        return address(x)

    def empty(self, *shape: int, dtype: Any = None) -> int:
        """Make room that lives as long as the job; return its address."""
        x = aligned(shape, self.dtype if dtype is None else dtype)
        self.alive.append(x)
        return address(x)

    def describe(self, name: str, x: np.ndarray, index: tuple[int, int, int], lengths: int,
                 scale: int = 0, lse: int = 0) -> None:
        """Make `x` known to `pack_tile` under `name`."""
        if not x.flags.aligned or x.dtype not in SOURCE_CODES:
            x = np.require(x, x.dtype.newbyteorder("="), ["ALIGNED"])
        self.alive.append(x)
        self.put(f"{name}.at", address(x), *x.strides, SOURCE_CODES[x.dtype], lengths, scale, lse,
                 self.batch // max(1, len(x)), x.shape[2], *index)

    def list_tokens(self, index: np.ndarray | None, length: int) -> tuple[int, int, int]:
        """Return what a source says of the index of its tokens."""
        if index is None:
            return 0, 0, 0
        place = self.hold(index, np.int32)
        batch, heads, _ = index.shape
        return place, 4 * length * heads * (batch > 1), 4 * length * (heads > 1)

    def describe_result(self, name: str, x: np.ndarray, onto: bool) -> None:
        """Make known under `name` where a result goes, and whether it is added to what is there."""
        self.alive.append(x)
        self.put(f"{name}.at", address(x), *x.strides[:3], SOURCE_CODES[x.dtype], x.itemsize, onto)

    def workspace(self, **sizes: int) -> dict[str, int]:
        """Make room for several arrays of so many bytes; return their addresses, 0 for none."""
        starts, total = sections(tuple(sizes.values()))
        base = self.empty(total, dtype=np.uint8)
        return {name: base + start if sizes[name] else 0
                for name, start in zip(sizes, starts, strict=True)}

    def run(self, kernel: str, units: int, scratch_bytes: int = 0, flops: float = 0.0,
            at: str = "size") -> None:
        """Run a kernel over its units of work."""
        threads.run(native(kernel, self.kind), self.place + OFFSETS[at], units,
                    scratch_bytes, int(flops / HELPER_FLOPS))


class Job(Operands):
    """A call of the softmax engine, with its mask and terms."""

    def __init__(self, problem: Any, g: Geometry, record: bytes) -> None:
        p = problem
        super().__init__(g, record, p.q, p.k, p.v, p.scale, p.q_lengths, p.kv_lengths, p.q_index,
                         p.k_index)
        mask, held, tiles = mask_record(p.blocks)
        self.alive.append(held)
        self.memory[OFFSETS["bits"]:OFFSETS["bits"] + len(mask)] = mask
        self.put("layout", self.hold(p.layout, np.int32))
        self.flops = 2.0 * TILE * TILE * tiles * g.batch * g.heads * (g.d + g.e)
        if p.bias is not None or p.gate is not None or p.offsets is not None:
            self.describe_terms(p)
        if p.sinks is not None:
            self.put("sinks", self.hold(p.sinks))
        if p.softcap is not None:
            self.put_float("softcap", p.softcap)
        if p.dropout:
            self.put_float("keep", 1 / (1 - p.dropout))
            self.put("threshold", int(p.dropout * 2**32), p.dropout_seed % 2**32,
                     p.dropout_seed >> 32)
        if p.q_positions is not None:
            for name in ("q_positions", "k_positions", "streams"):
                x = getattr(p, name)
                if x is not None:
                    self.put(name, self.hold(x, np.int32), 4 * x.shape[1] if len(x) > 1 else 0)

    def describe_terms(self, p: Any) -> None:
        """Make bias, gate and offsets known."""
        form = p.gate_form
        for name, term, dtype in (("bias", p.bias, self.dtype),
                                  ("gate", p.gate, np.float64 if form.ramp else self.dtype)):
            if term is not None:
                x = np.require(term.array, dtype, ["ALIGNED"])
                self.alive.append(x)
                strides = (0 if size == 1 else step
                           for size, step in zip(x.shape, x.strides, strict=True))
                self.put(name, address(x), self.hold(term.item, np.int32), *strides)
        if p.gate is not None:
            self.put("gate_block", form.block, p.gate.array.shape[3] if form.by_offset else 0,
                     form.shift)
            self.put_float("ramp", form.ramp)
            self.put("offset_origin", p.offset_origin)
        if p.offsets is not None:
            rows, width = p.offsets.shape
            self.put("offsets", self.hold(p.offsets), width * self.dtype.itemsize * (rows > 1),
                     width, p.offset_origin)


def put(memory: bytearray, field: str, *values: int) -> None:
    """Write integers into a job's memory, from a field on."""
    struct.pack_into(f"={len(values)}q", memory, OFFSETS[field], *values)


@functools.cache
def kind_of(dtype: np.dtype) -> tuple[str, np.dtype, np.dtype]:
    """Return which kind of kernel takes arrays of `dtype`, what it computes with, its operands."""
    if dtype.name == "float64":
        return "float64", np.dtype(np.float64), np.dtype(np.float64)
    if dtype.name == "bfloat16" and dot_product():
        return "bfloat16", np.dtype(np.float32), np.dtype(np.uint16)
    return "float32", np.dtype(np.float32), np.dtype(np.float32)


def mask_record(blocks: Any) -> tuple[bytes, list[np.ndarray], float]:
    """Return what the record says of a BlockMask, what to keep alive, tiles to a layout's row."""
    found = _masks.get(blocks)
    if found is None:
        held = [np.ascontiguousarray(blocks.bits, np.uint64)]
        fields = [address(held[0])]
        for runs in (blocks.rows, blocks.columns):
            arrays = [np.ascontiguousarray(runs.start, np.int64),
                      *(np.ascontiguousarray(getattr(runs, part), np.int32)
                        for part in ("first", "count", "tile", "names"))]
            held += arrays
            fields += [*map(address, arrays), runs.start.shape[1] - 1]
        layouts = max(1, blocks.rows.start.shape[0])
        found = (struct.pack(f"={len(fields)}q", *fields), held,
                 float(blocks.rows.count.sum(dtype=np.int64)) / layouts)
        _masks[blocks] = found
    return found


def geometry_of(p: Any) -> Geometry:
    """Return the geometry of a problem."""
    dtype, (heads, n, d), (groups, m, e) = p.q.dtype, p.q.shape[1:], p.v.shape[1:]
    n = n if p.q_index is None else p.q_index.shape[2]
    m = m if p.k_index is None else p.k_index.shape[2]
    return geometry(len(p.q_lengths), (heads, n, d), (groups, m, e),
                    dtype if dtype in SOURCE_CODES else dtype.newbyteorder("="))


def forward_scratch(g: Geometry, chunk: int, *, gated: bool, per_group: bool = False,
                    part: int = 0) -> tuple[tuple[int, ...], int]:
    """Lay out what a thread needs for a forward: where each section starts, and all bytes."""
    size, each, wide = g.dtype.itemsize, g.operand.itemsize, TILE * chunk
    keys = g.key_tiles * TILE * each if per_group else 0
    return sections((
        TILE * g.d_padded * size, TILE * g.e_padded * size, TILE * wide * size,
        TILE * wide * size if gated else 0, wide * size, 8 * TILE * chunk, 8 * chunk, TILE * size,
        TILE * g.lanes * size, TILE * size, keys * g.d_depth, keys * g.e_padded, part))


def backward_scratch(g: Geometry, packed: int) -> tuple[tuple[int, ...], int]:
    """Lay out what a thread needs for a backward: where each section starts, and all bytes."""
    size, each = g.dtype.itemsize, g.operand.itemsize
    square, pairs = TILE * TILE * size, g.fold > 1
    keys = TILE * g.d_padded
    return sections((
        keys * each, keys * each, keys * each * pairs, TILE * g.e_padded * each, keys * size,
        TILE * g.e_padded * size, square, square, square, square, TILE * TILE * each * pairs,
        8 * TILE, 8, TILE * size, TILE * size, packed))


@functools.lru_cache(maxsize=256)
def sections(sizes: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Lay out sections of memory one after another, each from a cache line on."""
    starts, total = [], 0
    for size in sizes:
        starts.append(total)
        total += -(-size // CACHE_LINE) * CACHE_LINE
    return tuple(starts), total
