"""Attention to listed blocks of keys on CuPy arrays, by CUDA C++ kernels.

Rows of a block of threads are the heads of a group: of one token, or of as many neighbouring tokens
as fill 16 rows, which then walk what any of them lists (`Bundles`). The backward walks the lists
for dq, and their transpose, made on the host, for dk and dv (`Pieces`). What is sparse costs
memory only in proportion to the lists, and no launch adds atomically.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from pyattn.arrays import Array, dtype_name

from . import device as devices
from .device import Kernel
from .layout import (
    ELEMENTS,
    OPERAND,
    Keeper,
    as_sums,
    copied,
    fields,
    operand,
    readable,
    roomy,
    struct,
    sum_type,
)
from .softmax import contiguous, delta
from .tilings import (
    ROOM_OF_QUERIES,
    SHARED,
    WIDTHS,
    chunk_of_values,
    column_chunk,
    item_bytes,
    launches_of_keys,
    rounded,
)

__all__ = ["backward", "configurations", "delta", "forward", "refuses"]

SLICE = 16
"""Rows of a warp."""

PIECE_COLUMNS = 1024
"""Rows of q, at least, that a piece of those that list a block of keys has, if they are divided.

One after the other, many more would cost fp32 sums digits.
"""

PIECES = 8
"""Pieces for each multiprocessor that are wanted, if the lists are long."""

JOIN_THREADS = 256


class Tiling(NamedTuple):
    """How a kernel divides its work; see selected.cuh for what the numbers are."""

    row_warps: int
    column_warps: int
    load: int
    step: int
    blocks: int

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return SLICE * self.row_warps

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return self.row_warps * self.column_warps


def tilings(rows: int, step: int, warps: int) -> Iterator[Tiling]:
    """Yield tilings for blocks with `rows` to do, the best first.

    `step` is the most columns of a step, `warps` how many a multiprocessor should hold.
    """
    wanted = next(x for x in (1, 2, 4) if x == 4 or SLICE * x >= rows)
    for row_warps, together in ((wanted, 4), (min(wanted, 2), 2), (1, 1)):
        column_warps = together // row_warps
        for load in (64, 32, 16):
            if SLICE * column_warps <= load <= 32 * together:
                yield Tiling(row_warps, column_warps, load, min(step, load // column_warps),
                             warps // together)


@functools.lru_cache(maxsize=256)
def forward_tiling(name: str, rows: int, d: int, e: int, shared: int) -> Tiling | None:
    """Return how the forward divides its work: the first tiling whose tiles fit shared memory."""
    wide = max(d, e)
    half = item_bytes(name) == 2
    step = (64 if wide <= 128 else 32) if half else 32 if name == "float32" else 16
    warps = 12 if half and wide <= 128 and rows <= SLICE else 8
    return next((x for x in tilings(rows, step, warps)
                 if queries_shared(name, x, d, e, False) <= shared), None)


@functools.lru_cache(maxsize=256)
def backward_tiling(name: str, rows: int, d: int, e: int, columns: int, shared: int,
                    of_keys: bool) -> Tiling | None:
    """Return how a backward kernel divides its work, if it sums so many columns."""
    step = 16
    if item_bytes(name) == 2 and columns <= 192:
        step = 32 if columns > 128 else 64
    needed = keys_shared if of_keys else functools.partial(queries_shared, backward=True)
    return next((x for x in tilings(rows, step, 8) if needed(name, x, d, e) <= shared), None)


def panels(name: str, d: int, e: int) -> tuple[int, int]:
    """Return the bytes of a row of tiles."""
    of_d, of_e = (-(-width * item_bytes(name) // 128) * 128 for width in (d, e))
    return of_d, of_e


def queries_shared(name: str, x: Tiling, d: int, e: int, backward: bool) -> int:
    """Return the bytes of shared memory that the kernels that own queries need."""
    of_d, of_e = panels(name, d, e)
    own = x.rows * (of_d + of_e if backward else of_d)
    return own + 2 * x.load * (of_d + of_e) + 3 * x.load * 8 + x.warps * SLICE * 16


def keys_shared(name: str, x: Tiling, d: int, e: int) -> int:
    """Return the bytes of shared memory that the kernel that owns keys needs."""
    of_rows = 2 * 2 * x.load * (8 if name == "float64" else 4)
    return ((x.rows + 2 * x.load) * sum(panels(name, d, e)) + of_rows + 3 * x.load * 16
            + x.warps * SLICE * 8)


def refuses(problem: Any) -> str | None:
    """Why `problem` cannot run here, or None."""
    p = problem
    reason = devices.missing(p.q)
    if reason is not None:
        return reason
    if 0 in p.q.shape[:3]:
        return None
    device, name = devices.of(p.q), dtype_name(p.q)
    d, e = p.q.shape[3], p.v.shape[3]
    if max(d, e) > WIDTHS[-1]:
        return f"widths must be at most {WIDTHS[-1]}; q and k have {d}, v has {e}"
    # rows of one warp take the least
    if (forward_tiling(name, 1, rounded(d), chunk_of_values(name, e), device.shared_memory) is None
            or any(backward_tiling(name, 1, rounded(d), rounded(e), 1, device.shared_memory,
                                   of_keys) is None for of_keys in (False, True))):
        return (f"a block of {name} with widths {d} and {e} does not fit the "
                f"{device.shared_memory} bytes of shared memory that {device.name} has")
    return None


def kernel(name: str, file: str, tiling: Tiling, d: int, e: int, softcap: bool,
           **more: int) -> Kernel:
    """Return a kernel of `file`, which has one function of the same name."""
    threads = 32 * tiling.warps
    macros = {"ELEMENT": ELEMENTS[name], "D": d, "E": e, "SOFTCAP": int(softcap),
              "ROW_WARPS": tiling.row_warps, "COLUMN_WARPS": tiling.column_warps,
              "LOAD": tiling.load, "STEP": tiling.step, "BLOCKS": tiling.blocks,
              "THREADS": threads, **more}
    return Kernel(f"{file}.cu", file, tuple(macros.items()), threads)


@functools.cache
def problem_struct(sums: str) -> np.dtype:
    """Return the struct Problem of selected.cuh."""
    return struct(("q", OPERAND), ("k", OPERAND), ("v", OPERAND),
                  *fields("u8", "scale q_lengths kv_lengths offsets"), ("softcap", sums),
                  *fields("i4", "batch heads groups n m d e block_size causal"))


BUNDLES = struct(*fields("u8", "start block who"), *fields("i4", "count tokens slices"))
PIECE = struct(*fields("i4", "line block"), *fields("i8", "first last"),
               *fields("i4", "part unused"))


class Bundles(NamedTuple):
    """What neighbouring tokens list together; see selected_bundle.cuh."""

    start: np.ndarray
    """int64 (lines, bundles + 1)."""
    block: np.ndarray
    """int32 (entries,): ascending in a bundle."""
    who: np.ndarray
    """uint32 (entries,): bit i for token i of the bundle."""


def bundles(blocks: np.ndarray, tokens: int) -> Bundles:
    """Join the lists (B, G, N, count) of `tokens` tokens each, 16 at most."""
    b, g, n, count = blocks.shape
    lines, number = b * g, -(-n // tokens)
    listed = np.full((lines, number * tokens, count), -1, np.int64)
    listed[:, :n] = blocks.reshape(lines, n, count)
    token = np.arange(number * tokens)[:, None] % tokens
    # block and token in one number: they sort by block
    codes = np.where(listed < 0, -1, listed * SLICE + token)
    codes = codes.reshape(lines, number, tokens * count)
    if tokens > 1:
        codes.sort(axis=-1)
    block = codes // SLICE
    kept = block >= 0
    first = kept.copy()
    first[..., 1:] &= block[..., 1:] != block[..., :-1]
    start = np.zeros((lines, number + 1), np.int64)
    sizes = first.sum(axis=-1)
    start[:, 1:] = sizes.cumsum().reshape(sizes.shape)
    start[1:, 0] = start[:-1, -1]
    bits = np.uint32(1) << (codes[kept] % SLICE).astype(np.uint32)
    begins = np.flatnonzero(first[kept])
    who = np.bitwise_or.reduceat(bits, begins) if len(begins) else bits
    return Bundles(start, block[first].astype(np.int32), who)


class Pieces(NamedTuple):
    """The tokens that list each block of keys, cut into pieces."""

    pieces: np.ndarray
    """PIECE (pieces,)."""
    divided: np.ndarray
    """int32 (blocks, 4): of blocks with several pieces, line, block, and from which to which of
    the sums of their own these have but for the first."""

    @property
    def parts(self) -> int:
        """How many pieces have sums of their own."""
        return int(self.divided[-1, 3]) if len(self.divided) else 0


def pieces(start: np.ndarray, most: int) -> Pieces:
    """Cut what `Lists.start` tells into pieces of at most `most` tokens."""
    lines, total = start.shape[0], start.shape[1] - 1
    begin, end = start[:, :-1].reshape(-1), start[:, 1:].reshape(-1)
    number = np.maximum(1, -(-(end - begin) // most))
    owner = np.repeat(np.arange(lines * total), number)
    order = np.arange(len(owner)) - np.repeat(number.cumsum() - number, number)
    found = np.zeros(len(owner), PIECE)
    found["line"], found["block"] = np.divmod(owner, max(1, total))
    found["first"] = begin[owner] + order * most
    found["last"] = np.minimum(found["first"] + most, end[owner])
    found["part"] = np.where(order == 0, -1, np.cumsum(order > 0) - 1)
    several = np.flatnonzero(number > 1)
    last = np.cumsum(number - 1)[several]
    divided = np.stack([several // max(1, total), several % max(1, total),
                        last - (number - 1)[several], last], axis=-1)
    return Pieces(found, divided.astype(np.int32))


class Call(Keeper):
    """A problem as launches need it: device, dtype, and arrays that kernels can read."""

    def __init__(self, p: Any) -> None:
        super().__init__(devices.of(p.q))
        self.p, self.name = p, dtype_name(p.q)
        self.sums = sum_type(self.name)
        self.batch, self.heads, self.n, self.d = p.q.shape
        _, self.groups, self.m, self.e = p.v.shape
        self.shared = self.heads // max(1, self.groups)
        self.q, self.k, self.v = (readable(self.device, x) for x in (p.q, p.k, p.v))
        self.softcap = self.device.generic or p.softcap is not None

    @functools.cached_property
    def problem(self) -> np.ndarray:
        """The problem's struct."""
        p, record = self.p, np.zeros((), problem_struct(self.sums))
        for name, x in (("q", self.q), ("k", self.k), ("v", self.v)):
            record[name] = operand(self.device, x)
        record["scale"] = self.address(as_sums(p.scale, self.name).copy())
        record["q_lengths"] = self.constant(p.q_lengths)
        record["kv_lengths"] = self.constant(p.kv_lengths)
        record["offsets"] = self.constant(p.offset)
        record["softcap"] = p.softcap or 0.0
        for name in ("batch", "heads", "groups", "n", "m", "d", "e"):
            record[name] = getattr(self, name)
        record["block_size"], record["causal"] = p.block_size, p.causal
        return record

    def host(self, x: np.ndarray) -> int:
        """Return where a copy of a host array is, as it is; 0 for one that is empty."""
        return self.address(copied(self.device, x)) if x.size else 0

    def bundles(self, rows: int) -> tuple[np.ndarray, int]:
        """Return the struct Bundles for blocks of `rows`, and how many blocks that makes."""
        tokens = max(1, min(SLICE, rows) // self.shared)
        slices = -(-self.shared // rows)
        found = bundles(self.p.lists.blocks, tokens)
        record = np.zeros((), BUNDLES)
        for name in ("start", "block", "who"):
            record[name] = self.host(getattr(found, name))
        count = found.start.shape[1] - 1
        record["count"], record["tokens"], record["slices"] = count, tokens, slices
        return record, self.batch * self.groups * count * slices


def forward(problem: Any) -> tuple[Array, Array]:
    """Return out (B, H, N, E) in the dtype of q, and lse (B, H, N)."""
    p, call = problem, Call(problem)
    device = call.device
    out = roomy(device, (call.batch, call.heads, call.n, call.e), p.q.dtype)
    lse = device.empty(out.shape[:3], np.dtype(call.sums))
    if 0 in out.shape[:3]:
        return out, lse
    d, chunk = rounded(call.d), chunk_of_values(call.name, call.e)
    tiling = forward_tiling(call.name, call.shared, d, chunk, device.shared_memory)
    assert tiling is not None
    arguments = np.zeros((), struct(
        ("problem", problem_struct(call.sums)), ("bundles", BUNDLES), ("out", OPERAND),
        *fields("u8", "lse")))
    arguments["bundles"], blocks = call.bundles(tiling.rows)
    arguments["lse"] = device.address(lse)
    arguments["problem"] = call.problem
    for first in range(0, call.e, chunk):
        own = slice(first, min(first + chunk, call.e))
        arguments["problem"]["v"] = operand(device, call.v[..., own])
        arguments["problem"]["e"] = own.stop - own.start
        arguments["out"] = operand(device, out[..., own])
        device.launch(kernel(call.name, "selected_forward", tiling, d, chunk, call.softcap), blocks,
                      arguments, queries_shared(call.name, tiling, d, chunk, False))
    return out, lse


def backward(problem: Any, dout: Array, lse: Array, delta: Array) -> dict[str, Array]:
    """Return the gradients of q, in its dtype, and of k and v, in acc."""
    p, call = problem, Call(problem)
    device, acc = call.device, np.dtype(call.sums)
    dq = roomy(device, p.q.shape, p.q.dtype)
    dk, dv = (roomy(device, x.shape, acc) for x in (p.k, p.v))
    if 0 in p.q.shape[:3]:
        for x in (dq, dk, dv):
            x[...] = 0
        return {"q": dq, "k": dk, "v": dv}
    dout = readable(device, dout)
    lse, delta = (contiguous(as_sums(x, call.name)) for x in (lse, delta))
    launch_queries(call, dq, dout, lse, delta)
    launch_keys(call, dk, dv, dout, lse, delta)
    return {"q": dq, "k": dk, "v": dv}


def launch_queries(call: Call, dq: Array, dout: Array, lse: Array, delta: Array) -> None:
    """Compute the gradient of q."""
    device, d, e = call.device, rounded(call.d), rounded(call.e)
    chunk = column_chunk(call.name, call.d, 0, ROOM_OF_QUERIES)
    tiling = backward_tiling(call.name, call.shared, d, e, chunk, device.shared_memory, False)
    assert tiling is not None
    arguments = np.zeros((), struct(
        ("problem", problem_struct(call.sums)), ("bundles", BUNDLES), ("dout", OPERAND),
        ("dq", OPERAND), *fields("u8", "lse delta"), *fields("i4", "dq_from")))
    arguments["problem"] = call.problem
    arguments["bundles"], blocks = call.bundles(tiling.rows)
    arguments["dout"], arguments["dq"] = operand(device, dout), operand(device, dq)
    arguments["lse"], arguments["delta"] = device.address(lse), device.address(delta)
    for first in range(0, call.d, chunk):
        arguments["dq_from"] = first
        device.launch(kernel(call.name, "selected_backward_queries", tiling, d, e, call.softcap,
                             DQ=chunk),
                      blocks, arguments, queries_shared(call.name, tiling, d, e, True))


def launch_keys(call: Call, dk: Array, dv: Array, dout: Array, lse: Array, delta: Array) -> None:
    """Compute the gradients of k and v."""
    device, d, e, p = call.device, rounded(call.d), rounded(call.e), call.p
    found = pieces(p.lists.start, piece_tokens(call))
    acc = np.dtype(call.sums)
    arguments = np.zeros((), struct(
        ("problem", problem_struct(call.sums)), *fields("u8", "tokens pieces"), ("dout", OPERAND),
        *fields("u8", "lse delta dk dv dk_parts dv_parts"),
        *fields("i4", "dk_width dv_width dk_from dv_from tiles")))
    arguments["problem"] = call.problem
    arguments["tokens"], arguments["pieces"] = call.host(p.lists.token), call.host(found.pieces)
    arguments["dout"] = operand(device, dout)
    arguments["lse"], arguments["delta"] = device.address(lse), device.address(delta)
    parts = {}
    for name, x in (("dk", dk), ("dv", dv)):
        width = x.strides[2] // x.itemsize
        parts[name] = device.empty((found.parts, p.block_size, width), acc)
        arguments[name], arguments[f"{name}_width"] = device.address(x), width
        arguments[f"{name}_parts"] = device.address(parts[name]) if found.parts else 0
    for dk_columns, dv_columns, dk_from, dv_from in launches_of_keys(call.name, call.d, call.e, 0):
        tiling = backward_tiling(call.name, p.block_size, d, e, dk_columns + dv_columns,
                                 device.shared_memory, True)
        assert tiling is not None
        tiles = -(-p.block_size // tiling.rows)
        arguments["dk_from"], arguments["dv_from"], arguments["tiles"] = dk_from, dv_from, tiles
        device.launch(kernel(call.name, "selected_backward_keys", tiling, d, e, call.softcap,
                             DK=dk_columns, DV=dv_columns),
                      len(found.pieces) * tiles, arguments, keys_shared(call.name, tiling, d, e))
    for name, x in (("dk", dk), ("dv", dv)):
        join(call, x, parts[name], found)


def piece_tokens(call: Call) -> int:
    """Return how many tokens a piece may have: it depends on the lists and on the device."""
    entries = len(call.p.lists.token)
    return max(1, PIECE_COLUMNS // call.shared,
               -(-entries // (PIECES * call.device.multiprocessors)))


def join(call: Call, x: Array, parts: Array, found: Pieces) -> None:
    """Add to a gradient what pieces summed on their own."""
    p, width = call.p, parts.shape[2]
    arguments = np.zeros((), struct(*fields("u8", "blocks results parts"),
                                    *fields("i4", "block_size m width chunks")))
    arguments["blocks"] = call.host(found.divided)
    arguments["results"], arguments["parts"] = call.device.address(x), call.device.address(parts)
    arguments["block_size"], arguments["m"], arguments["width"] = p.block_size, call.m, width
    arguments["chunks"] = chunks = -(-p.block_size * width // JOIN_THREADS)
    call.device.launch(join_kernel(call.name), len(found.divided) * chunks, arguments, 0)


def join_kernel(name: str) -> Kernel:
    """Return the kernel that joins pieces: it knows sums only."""
    return Kernel("selected_join.cu", "selected_join",
                  (("DOUBLE", int(name == "float64")), ("THREADS", JOIN_THREADS)), JOIN_THREADS)


def configurations() -> Iterator[tuple[Kernel, tuple[str, ...], str]]:
    """Yield kernels to be compiled and read: (kernel, architectures, an instruction it must have).

    For rows of one warp and of four, at the widths that tilings differ for.
    """
    for name, width, rows, architecture, softcap in (
            ("bfloat16", 64, 16, "sm_90", False), ("bfloat16", 64, 64, "sm_90", True),
            ("bfloat16", 128, 16, "sm_90", True), ("bfloat16", 128, 64, "sm_90", False),
            ("bfloat16", 192, 16, "sm_90", False), ("bfloat16", 192, 64, "sm_90", True),
            ("bfloat16", 256, 64, "sm_90", False), ("bfloat16", 128, 16, "sm_80", False),
            ("float16", 128, 32, "sm_80", True), ("float32", 64, 16, "sm_90", True),
            ("float32", 128, 64, "sm_80", False), ("float64", 64, 64, "sm_90", True),
            ("float64", 128, 16, "sm_80", False)):
        for found in kernels(name, rows, width, min(width, 128), SHARED[architecture], softcap):
            yield found, (architecture,), "DMMA" if name == "float64" else "HMMA"
    for name in ("float32", "float64"):
        yield join_kernel(name), tuple(SHARED), "DADD" if name == "float64" else "FADD"


def kernels(name: str, rows: int, d: int, e: int, shared: int, softcap: bool) -> Iterator[Kernel]:
    """Yield the kernels of forward and backward for heads of a group, or keys of a block."""
    d, e, values = rounded(d), rounded(e), chunk_of_values(name, e)
    tiling = forward_tiling(name, rows, d, values, shared)
    if tiling is not None:
        yield kernel(name, "selected_forward", tiling, d, values, softcap)
    chunk = column_chunk(name, d, 0, ROOM_OF_QUERIES)
    tiling = backward_tiling(name, rows, d, e, chunk, shared, False)
    if tiling is not None:
        yield kernel(name, "selected_backward_queries", tiling, d, e, softcap, DQ=chunk)
    for dk, dv, dk_from, dv_from in launches_of_keys(name, d, e, 0):
        tiling = backward_tiling(name, rows, d, e, dk + dv, shared, True)
        if tiling is not None and dk_from == dv_from == 0:
            yield kernel(name, "selected_backward_keys", tiling, d, e, softcap, DK=dk, DV=dv)
