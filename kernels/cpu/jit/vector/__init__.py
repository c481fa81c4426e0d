"""Micro-kernels in LLVM vector IR: the inner loops of attention, for the host's vector width.

One generator emits them for float32 and float64 and for any number of lanes; nothing is written per
instruction set. A micro-kernel is a Numba intrinsic that takes addresses (int64), counts and
strides in numbers, not bytes. Its last argument, `unit`, is any number of the dtype to compute in.

    gemm        C[r, :] (+)= sum_k A[r, k] B[k, :], any strides of A, blocks held in registers
    row_max     the largest number of a row, NaN passed over
    exp_sum     p = exp(s - shift) in place, and the sum
    soft_cap    s = cap * tanh(s / cap) in place
    select      `fill` where a bit of a 64-bit word is clear

Rows that `row_max`, `exp_sum` and `soft_cap` take are multiples of 64 numbers long.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

from numba.extending import intrinsic

from . import products, rows
from .emit import typed, vector_bytes


@functools.cache
def micro_kernels(nbytes: int) -> SimpleNamespace:
    """Make the micro-kernels for vectors of `nbytes`."""

    @intrinsic
    def gemm(context, rows, columns, depth, a, a_row, a_depth, b, b_row, c, c_row, accumulate,
             unit):
        return typed(products.gemm, nbytes, "-", "iiiiiiiiiii", unit)

    @intrinsic
    def row_max(context, row, count, start, unit):
        return typed(rows.row_max, nbytes, "f", "iif", unit)

    @intrinsic
    def exp_sum(context, row, count, shift, unit):
        return typed(rows.exp_sum, nbytes, "f", "iif", unit)

    @intrinsic
    def soft_cap(context, row, count, cap, unit):
        return typed(rows.soft_cap, nbytes, "-", "iif", unit)

    @intrinsic
    def select(context, row, word, fill, unit):
        return typed(rows.select, nbytes, "-", "iif", unit)

    return SimpleNamespace(gemm=gemm, row_max=row_max, exp_sum=exp_sum, soft_cap=soft_cap,
                           select=select)


_host = micro_kernels(vector_bytes())
gemm, row_max, exp_sum = _host.gemm, _host.row_max, _host.exp_sum
soft_cap, select = _host.soft_cap, _host.select
