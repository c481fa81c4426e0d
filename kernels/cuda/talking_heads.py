"""Talking-heads attention on CuPy arrays, by CUDA C++ kernels.

Blocks of threads own some tokens of a batch item with all heads, as heads are mixed pair by pair
(talking_heads.cuh). The softmax must be whole before its weights are mixed: the forward walks the
tiles for the log-sum-exps, then for the output, and the backward for delta, then for the gradients
of q, of k and v, and of the matrices, each from scores that are computed again. No launch adds
atomically; what a call needs beside its operands are numbers for each query and head.
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
    LISTS,
    OPERAND,
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
from .softmax import contiguous
from .tilings import SHARED, item_bytes

__all__ = ["backward", "configurations", "forward", "refuses"]

STEP = 16
"""Tokens that a block meets at a time."""

PANEL_BYTES = 128
"""What a warp copies of a row at a time."""

MOST_HEADS = 32

MOST_HEADS_OF_SOFTMAX = {"float64": 16}
"""Where the registers of a thread do not take `MOST_HEADS`."""

REGISTERS = 128
"""What sums may take of a thread's registers."""

MOST_HEADS_OF_TWO_PAIRS = {"lse": 32, "forward": 16, "delta": 24, "backward_queries": 16,
                           "backward_keys": 8, "backward_weights": 16}
"""Heads of the softmax up to which a thread's registers take two pairs at a time, beside all sums.

These are the kernels that walk the tiles, as their files are called but for "talking_heads_".
"""

JOIN_THREADS = 256


class Tiling(NamedTuple):
    """How a kernel divides its work; see talking_heads.cuh for what the numbers are."""

    slices: int
    warps: int
    resident: bool

    @property
    def rows(self) -> int:
        """Tokens that a block owns."""
        return 16 * self.slices

    @property
    def pairs(self) -> int:
        """Pairs of a thread."""
        return self.rows * STEP // (32 * self.warps)


class Sizes(NamedTuple):
    """What shared memory and registers depend on."""

    name: str
    heads_in: int
    heads: int
    heads_out: int
    k_groups: int
    v_groups: int
    d: int
    e: int
    generic: bool = False
    """Whether few kernels are to be built."""

    @property
    def padded(self) -> int:
        """Heads of the softmax that kernels are built for."""
        known = (8, 16, 32) if self.generic else (4, 8, 12, 16, 24, 32)
        return next(x for x in known if x >= self.heads)

    @property
    def sum_bytes(self) -> int:
        """Bytes of a sum."""
        return 8 if self.name == "float64" else 4

    def parts(self, width: int) -> int:
        """Return how many times a warp copies, for a row of `width` numbers."""
        return -(-width * item_bytes(self.name) // PANEL_BYTES)


def shared_bytes(kind: str, x: Tiling, s: Sizes) -> int:
    """Return the bytes of shared memory that a kernel needs, as its source lays them out."""
    both = kind not in ("lse", "forward")
    strip = x.rows * STEP * s.sum_bytes + 64
    strips = {"lse": s.heads_in, "forward": max(s.heads_in, s.heads_out),
              "backward_weights": s.heads_in + s.heads_out + min(16, s.padded)}.get(
                  kind, s.heads_in + s.heads_out)
    mixes = s.heads_in + (s.heads_out if kind != "lse" else 0)
    row = s.padded * x.rows * s.sum_bytes
    of_rows = {"lse": 4 * row, "forward": row, "delta": 3 * row,
               "backward_keys": 4 * s.padded * STEP * s.sum_bytes}.get(kind, 2 * row)
    slot, kept = STEP * PANEL_BYTES, 0
    if x.resident:
        of_keys = kind == "backward_keys"
        kept = (s.k_groups if of_keys else s.heads_in) * s.parts(s.d)
        if both:
            kept += (s.v_groups if of_keys else s.heads_out) * s.parts(s.e)
        kept *= x.rows * PANEL_BYTES
    else:
        slot += x.rows * PANEL_BYTES
    return (kept + 2 * x.warps * slot + strips * strip + mixes * s.padded * s.sum_bytes + of_rows
            + 8 * x.rows)


@functools.lru_cache(maxsize=256)
def tiling(kind: str, s: Sizes, shared: int, few: bool) -> Tiling | None:
    """Return how a kernel divides its work; `few`: blocks of 32 rows would not fill the device.

    Tokens that stay in shared memory are worth more than blocks of many rows. Few warps are for
    devices with little shared memory.
    """
    large = not few and s.padded <= MOST_HEADS_OF_TWO_PAIRS[kind]
    if s.name == "float64" or (s.name == "float32" and kind == "backward_keys"):
        large = False       # their fragments take more registers
    choices = [Tiling(slices, 8, resident) for resident in (True, False)
               for slices in ((2, 1) if large else (1,))]
    if s.name != "float64" and s.padded <= 16:
        choices.append(Tiling(1, 4, False))
    return next((x for x in choices if shared_bytes(kind, x, s) <= shared), None)


def units(kind: str, s: Sizes) -> int:
    """Return how many parts of a kernel's sums there are, a panel wide each."""
    return {"forward": s.heads_out * s.parts(s.e), "backward_queries": s.heads_in * s.parts(s.d),
            "backward_keys": s.k_groups * s.parts(s.d) + s.v_groups * s.parts(s.e)}.get(kind, 0)


def units_of_warp(kind: str, x: Tiling, s: Sizes) -> int:
    """Return how many parts a warp sums: as many as there are, or as registers have room for."""
    if s.generic:
        return 2
    needed = -(-units(kind, s) // x.warps)
    each = x.slices * (32 if item_bytes(s.name) == 2 else 16)
    room = REGISTERS
    # a backward has weights and their gradients beside the sums
    if kind != "forward" and (s.padded > 16 or (s.name == "float32" and x.slices == 2) or (
            x.pairs == 2 and s.padded > MOST_HEADS_OF_TWO_PAIRS[kind])):
        room //= 2
    return next(count for count in (4, 2, 1) if count == 1 or (
        count * each <= room and count < 2 * needed))


def kernel(kind: str, x: Tiling, s: Sizes) -> Kernel:
    """Return the kernel of a kind."""
    macros = {"ELEMENT": ELEMENTS[s.name], "HEADS": s.padded, "SLICES": x.slices,
              "THREADS": 32 * x.warps, "UNITS": units_of_warp(kind, x, s)}
    if kind == "backward_weights":
        macros["ROW_TILES"] = -(-max(s.heads_in, s.heads_out) // 16)
    name = f"talking_heads_{kind}"
    return Kernel(f"{name}.cu", name, tuple(macros.items()), 32 * x.warps)


def join_kernel(name: str) -> Kernel:
    """Return the kernel that adds up gradients of matrices: it knows sums only."""
    return Kernel("talking_heads_join.cu", "talking_heads_join",
                  (("DOUBLE", int(name == "float64")), ("THREADS", JOIN_THREADS)), JOIN_THREADS)


def sizes(p: Any, generic: bool) -> Sizes:
    """Return the sizes of a problem."""
    return Sizes(dtype_name(p.q), *p.w_pre.shape, p.w_post.shape[1], p.k.shape[1], p.v.shape[1],
                 p.q.shape[3], p.v.shape[3], generic)


def refuses(problem: Any) -> str | None:
    """Why `problem` cannot run here, or None."""
    p = problem
    reason = devices.missing(p.q)
    if reason is not None:
        return reason
    if 0 in p.q.shape[:3]:
        return None
    device = devices.of(p.q)
    s = sizes(p, device.generic)
    most = MOST_HEADS_OF_SOFTMAX.get(s.name, MOST_HEADS)
    if s.heads > most:
        return f"heads of the softmax of {s.name} must be at most {most}; there are {s.heads}"
    if max(s.heads_in, s.heads_out) > MOST_HEADS:
        return (f"heads must be at most {MOST_HEADS}; q has {s.heads_in}, the output "
                f"{s.heads_out}")
    if any(tiling(kind, s, device.shared_memory, True) is None for kind in MOST_HEADS_OF_TWO_PAIRS):
        return (f"{s.heads_in}, {s.heads} and {s.heads_out} heads of {s.name} do not fit the "
                f"{device.shared_memory} bytes of shared memory that {device.name} has")
    return None


@functools.cache
def problem_struct(sums: str) -> np.dtype:
    """Return the struct Problem of talking_heads.cuh."""
    return struct(("q", OPERAND), ("k", OPERAND), ("v", OPERAND), ("lists", LISTS),
                  *fields("u8", "w_pre w_post b_post q_lengths kv_lengths"), ("scale", sums),
                  *fields("i4", "batch heads_in heads heads_out k_groups v_groups n m d e"),
                  *fields("i4", "resident"))


class Call(Keeper):
    """A problem as launches need it: device, sizes, and arrays that kernels can read."""

    def __init__(self, p: Any) -> None:
        super().__init__(devices.of(p.q))
        self.p, self.sizes = p, sizes(p, self.device.generic)
        self.sums = sum_type(self.sizes.name)
        self.batch, _, self.n, _ = p.q.shape
        self.m = p.k.shape[2]
        self.q, self.k, self.v = (readable(self.device, x) for x in (p.q, p.k, p.v))
        self.empty = 0 in (self.batch, self.n)

    def matrix(self, w: Array) -> int:
        """Return where a copy (heads, heads of the softmax) is, zeros up to the padded heads."""
        padded = self.device.zeros((w.shape[0], self.sizes.padded), np.dtype(self.sums))
        padded[:, :w.shape[1]] = w
        return self.address(padded)

    @functools.cached_property
    def problem(self) -> np.ndarray:
        """The problem's struct, but for its lists."""
        p, s, record = self.p, self.sizes, np.zeros((), problem_struct(self.sums))
        for name, x in (("q", self.q), ("k", self.k), ("v", self.v)):
            record[name] = operand(self.device, x)
        record["w_pre"] = self.matrix(as_sums(p.w_pre, s.name))
        record["w_post"] = self.matrix(as_sums(p.w_post, s.name).T)
        if p.b_post is not None:
            record["b_post"] = self.address(contiguous(as_sums(p.b_post, s.name)))
        record["q_lengths"] = self.constant(p.q_lengths)
        record["kv_lengths"] = self.constant(p.kv_lengths)
        record["scale"] = p.scale
        record["batch"], record["n"], record["m"] = self.batch, self.n, self.m
        for name in ("heads_in", "heads", "heads_out", "k_groups", "v_groups", "d", "e"):
            record[name] = getattr(s, name)
        return record

    def launch(self, kind: str, pointers: dict[str, int], operands: dict[str, Array],
               parts: int = 0) -> None:
        """Launch a kernel: its struct has the problem, operands, pointers, and perhaps a number.

        That is `parts`, or how many blocks share the columns of what they sum.
        """
        device, s, of_keys = self.device, self.sizes, kind == "backward_keys"
        x = self.tiling(kind)
        chunks = -(-units(kind, s) // (x.warps * units_of_warp(kind, x, s)))
        number = parts or chunks
        arguments = np.zeros((), struct(
            ("problem", problem_struct(self.sums)), *((name, OPERAND) for name in operands),
            *fields("u8", " ".join(pointers)), *fields("i4", "number" if number else "")))
        arguments["problem"] = self.problem
        arguments["problem"]["lists"] = lists(self, self.p.blocks, self.p.layout, 1, of_keys)
        arguments["problem"]["resident"] = x.resident
        for name, array in operands.items():
            arguments[name] = operand(device, array)
        for name, address in pointers.items():
            arguments[name] = address
        if number:
            arguments["number"] = number
        blocks = self.batch * -(-(self.m if of_keys else self.n) // x.rows) * max(1, chunks)
        device.launch(kernel(kind, x, s), blocks, arguments, shared_bytes(kind, x, s))

    def tiling(self, kind: str) -> Tiling:
        """Return how a kernel divides its work."""
        tokens = self.m if kind == "backward_keys" else self.n
        few = self.device.generic or self.batch * -(-tokens // 32) < self.device.multiprocessors
        found = tiling(kind, self.sizes, self.device.shared_memory, few)
        assert found is not None
        return found


def forward(problem: Any) -> tuple[Array, Array]:
    """Return out (B, Hv, N, E) in the dtype of q, and lse (B, H, N)."""
    p, call = problem, Call(problem)
    device, s = call.device, call.sizes
    out = roomy(device, (call.batch, s.heads_out, call.n, s.e), p.q.dtype)
    lse = device.empty((call.batch, s.heads, call.n), np.dtype(call.sums))
    if not call.empty:
        at = {"lse": device.address(lse)}
        call.launch("lse", at, {})
        call.launch("forward", at, {"out": out})
    return out, lse


def backward(problem: Any, dout: Array, lse: Array) -> dict[str, Array]:
    """Return the gradients by argument, in acc; that of b_post always."""
    p, call = problem, Call(problem)
    device, s, acc = call.device, call.sizes, np.dtype(call.sums)
    found = {name: roomy(device, getattr(p, name).shape, acc) for name in ("q", "k", "v")}
    if call.empty:
        for x in found.values():
            x[...] = 0
        return found | {"w_pre": device.zeros(p.w_pre.shape, acc),
                        "w_post": device.zeros(p.w_post.shape, acc),
                        "b_post": device.zeros((s.heads_out,), acc)}
    dout, lse = readable(device, dout), contiguous(as_sums(lse, s.name))
    delta = device.empty(lse.shape, acc)
    at = {"lse": device.address(lse), "delta": device.address(delta)}
    call.launch("delta", at, {"dout": dout})
    call.launch("backward_queries", at, {"dout": dout, "dq": found["q"]})
    call.launch("backward_keys", at, {"dout": dout, "dk": found["k"], "dv": found["v"]})
    return found | gradients_of_matrices(call, at, dout)


def gradients_of_matrices(call: Call, at: dict[str, int], dout: Array) -> dict[str, Array]:
    """Return the gradients of w_pre, w_post and b_post: each block's, then their sums."""
    device, s, acc = call.device, call.sizes, np.dtype(call.sums)
    of_pre, of_post = s.heads_in * s.padded, s.heads_out * s.padded
    numbers = of_pre + of_post + s.heads_out
    blocks = call.batch * -(-call.n // call.tiling("backward_weights").rows)
    parts, sums = device.empty((blocks, numbers), acc), device.empty((numbers,), acc)
    at = at | {"parts": device.address(parts)}
    call.launch("backward_weights", at, {"dout": dout}, numbers)
    arguments = np.zeros((), struct(*fields("u8", "parts results"),
                                    *fields("i4", "blocks numbers")))
    arguments["parts"], arguments["results"] = device.address(parts), device.address(sums)
    arguments["blocks"], arguments["numbers"] = blocks, numbers
    device.launch(join_kernel(s.name), -(-numbers // 32), arguments, 8 * JOIN_THREADS)
    w_pre = sums[:of_pre].reshape(s.heads_in, s.padded)
    w_post = sums[of_pre:of_pre + of_post].reshape(s.heads_out, s.padded)
    return {"w_pre": w_pre[:, :s.heads], "w_post": w_post[:, :s.heads].T,
            "b_post": sums[of_pre + of_post:]}


def configurations() -> Iterator[tuple[Kernel, tuple[str, ...], str]]:
    """Yield kernels to be compiled and read: (kernel, architectures, an instruction it must have).

    Each with as many heads of the softmax as its tilings take, and what has most sums.
    """
    little = 99 * 1024
    much, more = SHARED["sm_80"], SHARED["sm_90"]
    for name, heads, width, few, shared, kinds in (
            ("bfloat16", 8, 64, False, more, ("backward_keys",)),
            ("bfloat16", 16, 64, False, more, MOST_HEADS_OF_TWO_PAIRS),
            ("bfloat16", 24, 64, False, more, ("forward",)),
            ("bfloat16", 32, 128, True, much, MOST_HEADS_OF_TWO_PAIRS),
            ("bfloat16", 16, 128, True, little, ("backward_queries", "backward_keys")),
            ("float16", 4, 64, True, much, ("forward", "backward_keys", "backward_weights")),
            ("float32", 8, 64, False, more, ("backward_queries", "backward_keys")),
            ("float32", 16, 64, False, more, ("forward",)),
            ("float32", 32, 128, True, much, MOST_HEADS_OF_TWO_PAIRS),
            ("float64", 16, 64, True, more, MOST_HEADS_OF_TWO_PAIRS)):
        s = Sizes(name, heads, heads, heads, heads, heads, width, width)
        for kind in kinds:
            x = tiling(kind, s, shared, few)
            assert x is not None
            yield (kernel(kind, x, s), ("sm_90" if shared == more else "sm_80",),
                   "DMMA" if name == "float64" else "HMMA")
    for name in ("float32", "float64"):
        yield join_kernel(name), tuple(SHARED), "DADD"
