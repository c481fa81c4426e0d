"""Matrix products of blocks held in registers."""

from __future__ import annotations

from typing import Any

from numba.core import cgutils

from .emit import I64, Vectors, registers


def gemm(v: Vectors, rows: Any, columns: Any, depth: Any, a: Any, a_row: Any, a_depth: Any,
         b: Any, b_row: Any, c: Any, c_row: Any, accumulate: Any) -> None:
    """C[r, :] (+)= sum_k A[r, k] B[k, :], any strides of A."""
    wide = registers(v.lanes * v.size) == 32
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
                b_k = [v.load(b, build.add(b_start, I64(u * v.lanes))) for u in range(width)]
                a_k = build.mul(loop.index, a_depth)
                for a_start, row in zip(a_rows, sums, strict=True):
                    x = v.splat(v.load_number(a, build.add(a_start, a_k)))
                    for y, total in zip(b_k, row, strict=True):
                        build.store(v.fma(x, y, build.load(total, typ=v.type)), total)
            for r, row in enumerate(sums):
                start = build.add(build.mul(build.add(i, I64(r)), c_row), j)
                for u, total in enumerate(row):
                    at = build.add(start, I64(u * v.lanes))
                    # C joins last: its error does not grow with every product
                    with build.if_then(add_to_c):
                        build.store(build.fadd(v.load(c, at), build.load(total, typ=v.type)), total)
                    v.store(build.load(total, typ=v.type), c, at)
    build.ret_void()
