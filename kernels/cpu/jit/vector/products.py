"""Matrix products of blocks held in registers.

Operands of the bfloat16 kind are read as 32-bit words of two numbers: A's neighbours of a row, and
B's pairs of rows, interleaved. Such a product has half the depth, in words.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from ...host import registers
from . import tiles
from .emit import I64, Vectors
from .layout import SIZES, each_kind, load_as

CHUNK = I64(64)


def gemm(v: Vectors, rows: Any, columns: Any, depth: Any, a: Any, a_row: Any, a_depth: Any,
         b: Any, b_row: Any, c: Any, c_row: Any, accumulate: Any) -> None:
    """C[r, :] (+)= sum_k A[r, k] B[k, :], any strides of A."""
    _in_registers(v, lambda x: x, v.fma, rows, columns, depth, a, a_row, a_depth, b, b_row, c,
                  c_row, accumulate)
    v.builder.ret_void()


def multiply(v: Vectors, rows: Any, columns: Any, depth: Any, a: Any, a_row: Any, a_depth: Any,
             b: Any, b_row: Any, c: Any, c_row: Any, accumulate: Any) -> None:
    """`gemm` of operands of either kind; A's rows are contiguous if they are bfloat16."""
    if not v.bf16:
        gemm(v, rows, columns, depth, a, a_row, a_depth, b, b_row, c, c_row, accumulate)
        return
    build = v.builder
    if v.dot in ("amx", "emulated"):
        tiles.product(v, rows, columns, depth, a, a_row, b, b_row, c, c_row, accumulate)
    else:
        depth, a_row, b_row = (build.lshr(x, I64(1)) for x in (depth, a_row, b_row))
        split, dot = (_as_words, _dot) if v.dot == "avx512bf16" else (_widened, _dot_widened)
        _in_registers(v, lambda x: split(v, x), lambda *xyz: dot(v, *xyz), rows, columns, depth,
                      a, a_row, I64(1), b, b_row, c, c_row, accumulate)
    build.ret_void()


def _in_registers(v: Vectors, split: Callable[[Any], Any], dot: Callable[[Any, Any, Any], Any],
                  rows: Any, columns: Any, depth: Any, a: Any, a_row: Any, a_depth: Any,
                  b: Any, b_row: Any, c: Any, c_row: Any, accumulate: Any) -> None:
    """Emit a product whose `dot` of two numbers, as `split` leaves them, joins a sum."""
    wide = registers(v.nbytes) == 32
    build = v.builder
    add_to_c = build.icmp_signed("!=", accumulate, I64(0))
    vectors = build.udiv(columns, I64(v.lanes))
    for width, first in v.blocks(vectors, (4, 2, 1) if wide else (2, 1)):
        j = build.mul(first, I64(v.lanes))
        for height, i in v.blocks(rows, (6, 4, 2, 1)):
            a_rows = [build.mul(build.add(i, I64(r)), a_row) for r in range(height)]
            sums = [[v.variable(v.const(0.0)) for _ in range(width)] for _ in range(height)]
            with cgutils.for_range(build, depth) as loop:
                b_start = build.add(build.mul(loop.index, b_row), j)
                b_k = [split(v.load(b, build.add(b_start, I64(u * v.lanes))))
                       for u in range(width)]
                a_k = build.mul(loop.index, a_depth)
                for a_start, row in zip(a_rows, sums, strict=True):
                    x = split(v.splat(v.load_number(a, build.add(a_start, a_k))))
                    for y, total in zip(b_k, row, strict=True):
                        build.store(dot(x, y, build.load(total, typ=v.type)), total)
            for r, row in enumerate(sums):
                start = build.add(build.mul(build.add(i, I64(r)), c_row), j)
                for u, total in enumerate(row):
                    at = build.add(start, I64(u * v.lanes))
                    # C joins last: its error does not grow with every product
                    with build.if_then(add_to_c):
                        build.store(build.fadd(v.load(c, at), build.load(total, typ=v.type)), total)
                    v.store(build.load(total, typ=v.type), c, at)


def _as_words(v: Vectors, x: Any) -> Any:
    return v.bits(x)


def _dot(v: Vectors, x: Any, y: Any, total: Any) -> Any:
    """Add the products of both bfloat16 in each word, by the instruction for it."""
    function = cgutils.get_or_insert_function(
        v.builder.module, ir.FunctionType(v.type, [v.type, v.integers, v.integers]),
        "llvm.x86.avx512bf16.dpbf16ps.512")
    return v.builder.call(function, [total, x, y])


def _widened(v: Vectors, x: Any) -> Any:
    """Return the upper and the lower bfloat16 of each word as float32."""
    build, bits = v.builder, v.bits(x)
    return (v.floats(build.and_(bits, v.whole(0xFFFF0000))),
            v.floats(build.shl(bits, v.whole(16))))


def _dot_widened(v: Vectors, x: Any, y: Any, total: Any) -> Any:
    for left, right in zip(x, y, strict=True):
        total = v.fma(left, right, total)
    return total


def dots(v: Vectors, rows: Any, columns: Any, depth: Any, a: Any, a_row: Any, b: Any,
         b_row: Any, kind: Any, c: Any, c_row: Any) -> None:
    """C[r, j] = sum_d A[r, d] B[j, d] for few rows r; B is read once, where it lies.

    `b_row` is bytes, and `kind` the dtype of B.
    """
    build = v.builder
    for code in each_kind(v, kind):
        # a block of B stays in the cache while all rows meet it, and the next one is fetched
        for block, j in v.blocks(columns, (v.lanes, 1)):
            ahead = build.mul(b_row, I64(block))
            for height, i in v.blocks(rows, tuple({min(n, block): 0 for n in (8, 4, 1)})):
                a_rows = [build.mul(build.add(i, I64(r)), a_row) for r in range(height)]
                # as many sums as a vector has lanes, of some rows of A and some of B
                width = block // height
                with cgutils.for_range(build, I64(height if block > 1 else 1)) as part:
                    first = build.add(j, build.mul(part.index, I64(width)))
                    b_rows = [build.add(b, build.mul(build.add(first, I64(u)), b_row))
                              for u in range(width)]
                    soon = [build.add(row, ahead) for row in b_rows]
                    sums = lane_products(v, code, depth, a, a_rows, b_rows, soon)
                    at = build.add(build.mul(i, c_row), first)
                    if block == 1:
                        build.store(v.reduce("fadd", [v.scalar(0.0)], sums[0]), v.place(c, at))
                        continue
                    totals = sum_each(v, sums)
                    for r in range(height):
                        lanes = ir.Constant(ir.VectorType(ir.IntType(32), width),
                                            list(range(r * width, (r + 1) * width)))
                        place = v.where(c, build.add(at, build.mul(c_row, I64(r))),
                                        ir.VectorType(v.scalar, width))
                        build.store(build.shuffle_vector(totals, totals, lanes), place,
                                    align=v.size)
    build.ret_void()


def lane_products(v: Vectors, code: int, depth: Any, a: Any, a_rows: list[Any],
                  b_rows: list[Any], soon: list[Any]) -> list[Any]:
    """Return, for each row of A and each of B, a vector whose lanes add up to their product.

    The rows at the addresses `soon` are fetched meanwhile.
    """
    build = v.builder
    whole = build.and_(depth, I64(-v.lanes))
    rest = build.sub(depth, whole)
    sums = [v.variable(v.const(0.0)) for _ in a_rows for _ in b_rows]

    def add(d: Any, mask: Any = None) -> None:
        at = build.mul(d, I64(SIZES[code]))
        x = [v.load(a, build.add(row, d)) if mask is None else
             v.load_masked(v.where(a, build.add(row, d), v.type), v.type, v.size, mask)
             for row in a_rows]
        y = [load_as(v, code, build.add(row, at), mask) for row in b_rows]
        for (left, right), slot in zip(itertools.product(x, y), sums, strict=True):
            build.store(v.fma(left, right, build.load(slot, typ=v.type)), slot)
        for row in soon:
            prefetch(v, build.add(row, at))

    with cgutils.for_range(build, build.udiv(whole, I64(v.lanes))) as loop:
        add(build.mul(loop.index, I64(v.lanes)))
    with build.if_then(build.icmp_signed("!=", rest, I64(0))):
        add(whole, v.first(rest))
    return [build.load(slot, typ=v.type) for slot in sums]


def prefetch(v: Vectors, address: Any) -> None:
    """Ask for what lies at an address, which need not exist, to be brought near."""
    build, number = v.builder, ir.IntType(32)
    pointer = build.inttoptr(address, ir.IntType(8).as_pointer())
    function = cgutils.get_or_insert_function(
        build.module, ir.FunctionType(ir.VoidType(), [pointer.type] + [number] * 3),
        "llvm.prefetch.p0")
    read, keep, data = number(0), number(3), number(1)
    build.call(function, [pointer, read, keep, data])


def sum_each(v: Vectors, sums: list[Any]) -> Any:
    """Return the sum of the lanes of vector u in lane u, for as many vectors as there are lanes.

    Vectors i and i + n/2 become one: its halves are what either leaves when its own are added.
    """
    build, n = v.builder, v.lanes
    apart = n // 2
    while apart:
        low = [lane if not lane & apart else n + lane - apart for lane in range(n)]
        kind = ir.VectorType(ir.IntType(32), n)
        masks = [ir.Constant(kind, low), ir.Constant(kind, [lane + apart for lane in low])]
        sums = [build.fadd(*(build.shuffle_vector(x, y, mask) for mask in masks))
                for x, y in zip(sums[:apart], sums[apart:], strict=True)]
        apart //= 2
    return sums[0]


def accumulate_rows(v: Vectors, rows: Any, count: Any, width: Any, p: Any, p_row: Any,
                    values: Any, values_row: Any, kind: Any, acc: Any, acc_row: Any) -> None:
    """acc[r, :width] += sum_j p[r, j] values[j, :width] for few rows r, values where they lie.

    `values_row` is bytes, and `kind` the dtype of the values.
    """
    build = v.builder
    rest = build.and_(width, I64(v.lanes - 1))
    vectors = build.udiv(width, I64(v.lanes))
    mask = v.first(rest)
    for code in each_kind(v, kind):
        # what more than four rows read again is in the cache by then
        with cgutils.for_range(build, build.udiv(build.add(count, I64(63)), CHUNK)) as chunk:
            first = build.mul(chunk.index, CHUNK)
            left = build.sub(count, first)
            steps = build.select(build.icmp_signed("<", left, CHUNK), left, CHUNK)
            at = build.add(values, build.mul(first, values_row))
            weights = build.add(p, build.mul(first, I64(v.size)))
            arguments = code, rows, steps, weights, p_row, at, values_row, acc, acc_row
            for across, vector in v.blocks(vectors, (4, 1)):
                _add_rows(v, *arguments, build.mul(vector, I64(v.lanes)), across)
            with build.if_then(build.icmp_signed("!=", rest, I64(0))):
                _add_rows(v, *arguments, build.mul(vectors, I64(v.lanes)), 1, mask)
    build.ret_void()


def _add_rows(v: Vectors, code: int, rows: Any, steps: Any, p: Any, p_row: Any, values: Any,
              values_row: Any, acc: Any, acc_row: Any, x: Any, across: int,
              mask: Any = None) -> None:
    """Emit `accumulate_rows` for `across` vectors from column `x`, or the masked lanes of one."""
    build = v.builder
    columns = [build.add(x, I64(u * v.lanes)) for u in range(across)]
    for height, i in v.blocks(rows, (4, 1)):
        sums = [[v.variable(v.const(0.0)) for _ in range(across)] for _ in range(height)]
        starts = [build.mul(build.add(i, I64(r)), p_row) for r in range(height)]
        with cgutils.for_range(build, steps) as loop:
            row = build.add(values, build.mul(loop.index, values_row))
            y = [load_as(v, code, build.add(row, build.mul(column, I64(SIZES[code]))), mask)
                 for column in columns]
            soon = build.add(row, build.mul(values_row, I64(16)))
            for column in columns:
                prefetch(v, build.add(soon, build.mul(column, I64(SIZES[code]))))
            for start, totals in zip(starts, sums, strict=True):
                weight = v.splat(v.load_number(p, build.add(start, loop.index)))
                for u, total in enumerate(totals):
                    build.store(v.fma(weight, y[u], build.load(total, typ=v.type)), total)
        for r, totals in enumerate(sums):
            start = build.mul(build.add(i, I64(r)), acc_row)
            for column, slot in zip(columns, totals, strict=True):
                at, total = build.add(start, column), build.load(slot, typ=v.type)
                if mask is None:
                    v.store(build.fadd(v.load(acc, at), total), acc, at)
                else:
                    old = v.load_masked(v.where(acc, at, v.type), v.type, v.size, mask)
                    v.store_masked(build.fadd(old, total), acc, at, mask)
