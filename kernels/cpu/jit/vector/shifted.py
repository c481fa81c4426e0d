"""Products of rows with the rows that follow them: the inner loop of a convolution by channels."""

from __future__ import annotations

from typing import Any

from numba.core import cgutils

from ...host import registers
from .emit import I64, Vectors


def correlate(v: Vectors, count: Any, taps: Any, width: Any, a: Any, a_row: Any, b: Any,
              b_row: Any, c: Any, c_row: Any, accumulate: Any) -> None:
    """C[u, :] (+)= sum_s A[s, :] B[s + u, :], number by number; the width is whole vectors.

    A tap is read once for as many rows of C as there are registers for.
    """
    build = v.builder
    add_to_c = build.icmp_signed("!=", accumulate, I64(0))
    heights = (16, 4, 1) if registers(v.nbytes) == 32 else (8, 4, 1)
    with cgutils.for_range(build, build.udiv(width, I64(v.lanes))) as loop:
        column = build.mul(loop.index, I64(v.lanes))
        for height, u in v.blocks(count, heights):
            sums = [v.variable(v.const(0.0)) for _ in range(height)]
            first = build.add(build.mul(u, b_row), column)
            starts = [build.add(first, build.mul(I64(r), b_row)) for r in range(height)]
            with cgutils.for_range(build, taps) as tap:
                x = v.load(a, build.add(build.mul(tap.index, a_row), column))
                behind = build.mul(tap.index, b_row)
                for start, total in zip(starts, sums, strict=True):
                    y = v.load(b, build.add(start, behind))
                    build.store(v.fma(x, y, build.load(total, typ=v.type)), total)
            for r, total in enumerate(sums):
                at = build.add(build.mul(build.add(u, I64(r)), c_row), column)
                with build.if_then(add_to_c):
                    build.store(build.fadd(v.load(c, at), build.load(total, typ=v.type)), total)
                v.store(build.load(total, typ=v.type), c, at)
    build.ret_void()
