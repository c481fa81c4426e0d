"""Additive attention on CuPy arrays, by CUDA C++ kernels.

Exponentials are made once for each token and feature (additive_prepare.cu); a pair then needs half
a reciprocal for a feature's tanh (additive.cuh). The backward computes tanhs twice for the scores
and twice for the gradients, once in the kernel that owns queries and once in that which owns keys:
the price of no atomics. float64 calls tanh.

Beside results, a call takes the exponentials: as much memory as q and k, with features rounded up
to FEATURES and tokens to TILE; in a backward twice that, and for the gradient of w a number for
each feature of every 16 queries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from pyattn.arrays import Array, dtype_name

from . import device as devices
from .device import Kernel
from .layout import (
    ELEMENTS,
    LISTS,
    OPERAND,
    TILE,
    Keeper,
    as_sums,
    fields,
    lists,
    operand,
    readable,
    roomy,
    struct,
    sum_type,
)
from .softmax import contiguous, delta
from .tilings import SHARED, item_bytes

__all__ = ["backward", "configurations", "delta", "forward", "refuses"]

FEATURES = 32
"""How many features the kernels take at a time."""

THREADS = 128
WARPS = THREADS // 32

CHUNKS = (32, 64, 128)
"""Columns of v that kernels are built for; wider ones take several rounds."""

BLOCKS = {"additive_forward": {2: (4, 4, 2), 4: (3, 2, 2), 8: (2, 2, 1)},
          "additive_backward_queries": {2: (3, 3, 3), 4: (2, 2, 2), 8: (2, 2, 1)},
          "additive_backward_keys": {2: (3, 2, 2), 4: (2, 2, 2), 8: (1, 1, 1)}}
"""How many blocks shall be on a multiprocessor, by bytes of a number of v and by chunk: as many as
their registers allow."""

FEATURE = struct(*fields("u8", "at"), *fields("i8", "b h n"),
                 *fields("u8", "powers rises wild large"), *fields("i4", "heads tiles"))
PROBLEM = struct(("q", FEATURE), ("k", FEATURE), ("v", OPERAND), ("lists", LISTS),
                 *fields("u8", "w q_lengths kv_lengths"),
                 *fields("i4", "batch heads groups n m a e"))


def refuses(problem: Any) -> str | None:
    """Why `problem` cannot run here, or None: any widths, as they are taken in rounds."""
    reason = devices.missing(problem.v)
    if reason is not None or 0 in problem.q.shape[:3]:
        return reason
    device, name = devices.of(problem.v), dtype_name(problem.v)
    if not all(chunk_of(name, file, 1, device.shared_memory) for file in BLOCKS):
        return (f"a block of {name} does not fit the {device.shared_memory} bytes of shared memory "
                f"that {device.name} has")
    return None


def shared_bytes(name: str, file: str, e: int) -> int:
    """Return the bytes of shared memory that a kernel needs."""
    wide = name == "float64"
    planes = 4 * FEATURES * (TILE + 4) * 4
    tile = TILE * -(-e * item_bytes(name) // 128) * 128
    if file == "additive_forward":
        return planes + tile + 8 * TILE
    # gradients of scores, and of each row lse and delta
    return planes + TILE * (TILE + 8 + 2) * (8 if wide else 4) + 2 * tile + 8 * TILE


def chunk_of(name: str, file: str, e: int, shared: int) -> int:
    """Return how many columns of v a kernel takes at a time, for `e` in all; 0 if none fit."""
    # sums of more doubles do not fit the registers
    most = {2: 128, 4: 32 if file == "additive_backward_keys" else 128,
            8: 64 if file == "additive_forward" else 32}[item_bytes(name)]
    fitting = [x for x in CHUNKS if x <= most and shared_bytes(name, file, x) <= shared]
    return next((x for x in fitting if x >= e), max(fitting, default=0))


def kernel(name: str, file: str, e: int) -> Kernel:
    """Return a kernel of `file`, which has one function of the same name."""
    blocks = BLOCKS[file][item_bytes(name)][CHUNKS.index(e)]
    macros = {"ELEMENT": ELEMENTS[name], "E": e, "THREADS": THREADS, "BLOCKS": blocks}
    return Kernel(f"{file}.cu", file, tuple(macros.items()), THREADS)


PREPARE = Kernel("additive_prepare.cu", "additive_prepare",
                 (("ELEMENT", ELEMENTS["float32"]), ("THREADS", THREADS)), THREADS)
PREPARE_SHARED = 2 * FEATURES * (TILE + 1) * 4 + WARPS * 8


class Call(Keeper):
    """A problem as launches need it: device, dtype, and arrays that kernels can read."""

    def __init__(self, p: Any, *, backward: bool = False) -> None:
        super().__init__(devices.of(p.v))
        self.p, self.name = p, dtype_name(p.v)
        self.sums = sum_type(self.name)
        self.batch, self.heads, self.n, self.a = p.q.shape
        _, self.groups, self.m, self.e = p.v.shape
        self.chunks = -(-self.a // FEATURES)
        self.v = readable(self.device, p.v)
        # what is beyond the features adds nothing
        self.w = self.device.zeros((self.heads, self.chunks * FEATURES), np.dtype(self.sums))
        self.w[:, :self.a] = p.w
        self.q = self.features(p.q, p.q_lengths, backward)
        self.k = self.features(p.k, p.kv_lengths, backward)

    def features(self, x: Array, lengths: np.ndarray, rises: bool) -> np.ndarray:
        """Return the struct Features of q or k; launch what prepares it."""
        # it is read number by number, but a token's must lie side by side
        x = x if x.shape[3] == 1 or x.strides[3] == x.itemsize else x.copy()
        device, record = self.device, np.zeros((), FEATURE)
        tiles = -(-x.shape[2] // TILE)
        record["at"] = self.address(x)
        for axis, stride in zip("bhn", x.strides[:3], strict=True):
            record[axis] = stride // x.itemsize
        record["heads"], record["tiles"] = x.shape[1], tiles
        if self.sums == "f8":
            return record
        blocks = (*x.shape[:2], tiles, self.chunks)
        planes = {name: device.empty((*blocks, FEATURES, TILE), np.float32)
                  for name in ("powers", "rises")[:1 + rises]}
        planes |= {name: device.empty(blocks, np.uint32) for name in ("wild", "large")}
        for name, plane in planes.items():
            record[name] = self.address(plane)
        arguments = np.zeros((), struct(
            ("x", FEATURE), *fields("u8", "powers rises wild large lengths"),
            *fields("i4", "a chunks")))
        arguments["x"] = record
        for name in planes:
            arguments[name] = record[name]
        arguments["lengths"] = self.constant(lengths)
        arguments["a"], arguments["chunks"] = self.a, self.chunks
        device.launch(PREPARE, math.prod(blocks), arguments, PREPARE_SHARED)
        return record

    def problem(self, *, transposed: bool = False) -> np.ndarray:
        """Return the problem's struct."""
        p, record = self.p, np.zeros((), PROBLEM)
        record["q"], record["k"] = self.q, self.k
        record["v"] = operand(self.device, self.v)
        record["lists"] = lists(self, p.blocks, p.layout, 1, transposed)
        record["w"] = self.address(self.w)
        record["q_lengths"] = self.constant(p.q_lengths)
        record["kv_lengths"] = self.constant(p.kv_lengths)
        for name in ("batch", "heads", "groups", "n", "m", "a", "e"):
            record[name] = getattr(self, name)
        return record

    def launch(self, file: str, blocks: int, arguments: np.ndarray, e: int) -> None:
        """Launch a kernel that takes `e` columns of v at a time."""
        self.device.launch(kernel(self.name, file, e), blocks, arguments,
                           shared_bytes(self.name, file, e))

    def chunk(self, file: str) -> int:
        """Return how many columns of v a kernel takes at a time."""
        width = CHUNKS[0] if self.device.generic else self.e
        return chunk_of(self.name, file, width, self.device.shared_memory)


def forward(problem: Any) -> tuple[Array, Array]:
    """Return out (B, H, N, E) in the dtype of v, and lse (B, H, N)."""
    p, device = problem, devices.of(problem.v)
    rows = p.q.shape[:3]
    out = roomy(device, (*rows, p.v.shape[3]), p.v.dtype)
    lse = device.empty(rows, np.dtype(sum_type(dtype_name(p.v))))
    if 0 in rows:
        return out, lse
    call = Call(p)
    chunk = call.chunk("additive_forward")
    arguments = np.zeros((), struct(("problem", PROBLEM), ("out", OPERAND), *fields("u8", "lse")))
    arguments["problem"] = call.problem()
    arguments["lse"] = device.address(lse)
    for first in range(0, call.e, chunk):
        own = slice(first, min(first + chunk, call.e))
        arguments["problem"]["v"] = operand(device, call.v[..., own])
        arguments["problem"]["e"] = own.stop - own.start
        arguments["out"] = operand(device, out[..., own])
        call.launch("additive_forward", math.prod(rows[:2]) * int(call.q["tiles"]), arguments,
                    chunk)
    return out, lse


def backward(problem: Any, dout: Array, lse: Array, delta: Array) -> dict[str, Array]:
    """Return the gradients of q, k, v and w, in acc."""
    p, device, name = problem, devices.of(problem.v), dtype_name(problem.v)
    acc = np.dtype(sum_type(name))
    found = {of: device.zeros(getattr(p, of).shape, acc) for of in ("q", "k", "w")}
    found["v"] = roomy(device, p.v.shape, acc)
    if 0 in p.q.shape[:3] or p.k.shape[2] == 0:
        found["v"][...] = 0
        return found
    call = Call(p, backward=True)
    dout = readable(device, dout)
    lse, delta = (contiguous(as_sums(x, name)) for x in (lse, delta))
    launch_keys(call, found["k"], found["v"], dout, lse, delta)
    return found | {"w": launch_queries(call, found["q"], dout, lse, delta)}


def launch_queries(call: Call, dq: Array, dout: Array, lse: Array, delta: Array) -> Array:
    """Compute the gradient of q; return that of w."""
    device, tiles = call.device, int(call.q["tiles"])
    chunk = call.chunk("additive_backward_queries")
    dw = device.zeros((call.batch, call.heads, tiles * WARPS, call.a), dq.dtype)
    arguments = np.zeros((), struct(("problem", PROBLEM), ("dout", OPERAND),
                                    *fields("u8", "lse delta dq dw")))
    arguments["problem"] = call.problem()
    arguments["dout"] = operand(device, dout)
    for name, x in (("lse", lse), ("delta", delta), ("dq", dq), ("dw", dw)):
        arguments[name] = device.address(x)
    call.launch("additive_backward_queries", call.batch * call.heads * tiles, arguments, chunk)
    return dw.astype(np.float64).sum((0, 2)).astype(dq.dtype)


def launch_keys(call: Call, dk: Array, dv: Array, dout: Array, lse: Array, delta: Array) -> None:
    """Compute the gradients of k and v."""
    device = call.device
    chunk = call.chunk("additive_backward_keys")
    arguments = np.zeros((), struct(
        ("problem", PROBLEM), ("dout", OPERAND), *fields("u8", "lse delta dk dv"),
        *fields("i4", "dv_width dv_from")))
    arguments["problem"] = call.problem(transposed=True)
    arguments["dout"] = operand(device, dout)
    for name, x in (("lse", lse), ("delta", delta), ("dv", dv)):
        arguments[name] = device.address(x)
    arguments["dv_width"] = dv.strides[2] // dv.itemsize
    for first in range(0, call.e, chunk):
        arguments["dk"] = 0 if first else device.address(dk)
        arguments["dv_from"] = first
        call.launch("additive_backward_keys", call.batch * call.groups * int(call.k["tiles"]),
                    arguments, chunk)


def configurations() -> Iterator[tuple[Kernel, tuple[str, ...], str | tuple[str, ...]]]:
    """Yield kernels to be compiled and read: (kernel, architectures, instructions it must have)."""
    yield PREPARE, ("sm_80",), "MUFU"
    for name, architecture, widths in (
            ("bfloat16", "sm_90", CHUNKS), ("float16", "sm_80", (64,)),
            ("float32", "sm_90", (32, 128)), ("float64", "sm_80", (32,))):
        expected = ("DMMA",) if name == "float64" else ("HMMA", "MUFU")
        for file in BLOCKS:
            for e in sorted({chunk_of(name, file, e, SHARED[architecture]) for e in widths}):
                yield kernel(name, file, e), (architecture,), expected
