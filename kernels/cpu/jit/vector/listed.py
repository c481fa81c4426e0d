"""Products with rows of a matrix that a list names, read where they lie.

The lists are int32 and can be read for a vector's worth of numbers, and for AHEAD, beyond their
end: what stands there is fetched ahead of its use, as it is mostly what the next product needs.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from .emit import I64, Vectors
from .layout import SIZES, each_kind, load_as
from .products import lane_products, prefetch, sum_each

I32 = ir.IntType(32)
AHEAD = 16
"""How many rows of values are fetched before their turn."""


def _listed(v: Vectors, base: Any, row: Any, index: Any, place: Any) -> Any:
    """Return the address of row index[place]."""
    build = v.builder
    pointer = build.inttoptr(index, I32.as_pointer())
    number = build.load(build.gep(pointer, [place], source_etype=I32), typ=I32, align=4)
    return build.add(base, build.mul(build.sext(number, I64), row))


def dots_listed(v: Vectors, rows: Any, columns: Any, depth: Any, a: Any, a_row: Any, b: Any,
                b_row: Any, index: Any, kind: Any, c: Any, c_row: Any) -> None:
    """C[r, j] = sum_d A[r, d] B[index[j], d] for few rows r.

    `b_row` is bytes, and `kind` the dtype of B. Whole vectors of C are written: behind the last
    column is the last one again.
    """
    build = v.builder
    lanes = I64(v.lanes)
    last = build.sub(columns, I64(1))
    count = build.udiv(build.add(columns, I64(v.lanes - 1)), lanes)
    for code in each_kind(v, kind):
        with cgutils.for_range(build, count) as block:
            j = build.mul(block.index, lanes)
            for height, i in v.blocks(rows, tuple({min(n, v.lanes): 0 for n in (8, 4, 1)})):
                a_rows = [build.mul(build.add(i, I64(r)), a_row) for r in range(height)]
                # as many sums as a vector has lanes, of some rows of A and some of B
                width = v.lanes // height
                with cgutils.for_range(build, I64(height)) as part:
                    first = build.add(j, build.mul(part.index, I64(width)))
                    places = [build.add(first, I64(u)) for u in range(width)]
                    b_rows, soon = [], []
                    for place in places:
                        inside = build.icmp_signed("<", place, last)
                        near = build.select(inside, place, last)
                        b_rows.append(_listed(v, b, b_row, index, near))
                        soon.append(_listed(v, b, b_row, index, build.add(place, lanes)))
                    totals = sum_each(v, lane_products(v, code, depth, a, a_rows, b_rows, soon))
                    at = build.add(build.mul(i, c_row), first)
                    for r in range(height):
                        picked = ir.Constant(ir.VectorType(I32, width),
                                             list(range(r * width, (r + 1) * width)))
                        place = v.where(c, build.add(at, build.mul(c_row, I64(r))),
                                        ir.VectorType(v.scalar, width))
                        build.store(build.shuffle_vector(totals, totals, picked), place,
                                    align=v.size)
    build.ret_void()


def accumulate_listed(v: Vectors, rows: Any, count: Any, width: Any, p: Any, p_row: Any,
                      values: Any, values_row: Any, index: Any, kind: Any, acc: Any,
                      acc_row: Any) -> None:
    """acc[r, :width] += sum_j p[r, j] values[index[j], :width] for few rows r.

    `values_row` is bytes, and `kind` the dtype of the values. The count is small: rows beyond four
    read the values again.
    """
    build = v.builder
    rest = build.and_(width, I64(v.lanes - 1))
    vectors = build.udiv(width, I64(v.lanes))
    mask = v.first(rest)
    for code in each_kind(v, kind):
        arguments = code, rows, count, p, p_row, values, values_row, index, acc, acc_row
        for across, vector in v.blocks(vectors, (4, 1)):
            _add_listed(v, *arguments, build.mul(vector, I64(v.lanes)), across)
        with build.if_then(build.icmp_signed("!=", rest, I64(0))):
            _add_listed(v, *arguments, build.mul(vectors, I64(v.lanes)), 1, mask)
    build.ret_void()


def _add_listed(v: Vectors, code: int, rows: Any, count: Any, p: Any, p_row: Any, values: Any,
                values_row: Any, index: Any, acc: Any, acc_row: Any, x: Any, across: int,
                mask: Any = None) -> None:
    """Emit `accumulate_listed` for `across` vectors from column `x`, or masked lanes of one."""
    build = v.builder
    columns = [build.add(x, I64(u * v.lanes)) for u in range(across)]
    places = [build.mul(column, I64(SIZES[code])) for column in columns]
    for height, i in v.blocks(rows, (4, 1)):
        sums = [[v.variable(v.const(0.0)) for _ in range(across)] for _ in range(height)]
        starts = [build.mul(build.add(i, I64(r)), p_row) for r in range(height)]
        with cgutils.for_range(build, count) as loop:
            row = _listed(v, values, values_row, index, loop.index)
            y = [load_as(v, code, build.add(row, place), mask) for place in places]
            soon = _listed(v, values, values_row, index, build.add(loop.index, I64(AHEAD)))
            for place in places:
                prefetch(v, build.add(soon, place))
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
