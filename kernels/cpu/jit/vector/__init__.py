"""Micro-kernels in LLVM vector IR: the inner loops of attention, for the host's vector width.

One generator emits them for float32 and float64 and for any number of lanes; nothing but products
and roundings of bfloat16 is written per instruction set. A micro-kernel is a Numba intrinsic that
takes addresses (int64), counts and strides in numbers, not bytes. Its last arguments are tags:
`unit`, any number of the dtype to compute in, and `operand`, any number of the dtype of products'
operands: the same, or an uint16 for bfloat16.

Products:

    gemm             C[r, :] (+)= sum_k A[r, k] B[k, :], any strides of A, blocks held in registers
    multiply         the same for either kind of operand; bfloat16: rows of A, pairs of rows of B
    enter_tiles      to be called before and
    leave_tiles      after a thread multiplies: some CPUs' products need a state of their own
    dots             C[r, j] = sum_d A[r, d] B[j, d], B of any dtype read where it lies
    accumulate_rows  acc[r, :] += sum_j p[r, j] values[j, :], values of any dtype where they lie
    dots_listed, accumulate_listed    the same with rows index[j] of B and of the values
    correlate        C[u, :] (+)= sum_s A[s, :] B[s + u, :], number by number

Rows of scores and of sums, in place but for `lane_sums` and `row_dots`:

    weigh            s = exp(s - top) of rows of tiles, with `tops`, `sums` and `decays` kept
    differentiate    s = exp(s - lse), and of the gradients g = s * (g - delta)
    exp_rows         s = exp(s - lse)
    scale_rows       rows times a factor each
    lane_sums        totals[r] = sum of sums[r, :], as many as a vector has lanes
    row_dots         products[r] = sum of a[r, :] b[r, :]
    soft_cap         s = cap * tanh(s / cap) of one row
    select           `fill` where a bit of a 64-bit word is clear

Numbers on their way to a product, or to the caller's array:

    convert_rows     rows of any dtype and stride times a scale, padded, as operands
    write_rows       rows times a factor each, as any dtype
    gather_rows      as convert_rows, from wherever a list of addresses says
    scatter_rows     as write_rows, to wherever a list of addresses says
    add_rows         the same, added to what is there times another factor each
    transpose        target[c, r] = source[r, c]
    pair_rows        two rows of bfloat16 interleaved
    round_row        a row of float32 as bfloat16, in place if need be
    pair_rounded     the transpose of rows of float32, as bfloat16

Rows of scores are 64 numbers long, and multiples of that for `weigh` and `soft_cap`.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

from numba.extending import intrinsic

from ...host import dot_product, vector_bytes
from . import layout, listed, products, rows, shifted, tiles
from .emit import typed


@functools.cache
def micro_kernels(nbytes: int, dot: str = "widened") -> SimpleNamespace:
    """Make the micro-kernels for vectors of `nbytes`; `dot` is how bfloat16 is multiplied."""

    @intrinsic
    def gemm(context, rows, columns, depth, a, a_row, a_depth, b, b_row, c, c_row, accumulate,
             unit):
        return typed(products.gemm, nbytes, "-", "iiiiiiiiiii", unit)

    @intrinsic
    def multiply(context, rows, columns, depth, a, a_row, a_depth, b, b_row, c, c_row, accumulate,
                 unit, operand):
        return typed(products.multiply, nbytes, "-", "iiiiiiiiiii", unit, operand, dot=dot)

    @intrinsic
    def enter_tiles(context, unit, operand):
        return typed(tiles.enter_tiles, nbytes, "-", "", unit, operand, dot=dot)

    @intrinsic
    def leave_tiles(context, unit, operand):
        return typed(tiles.leave_tiles, nbytes, "-", "", unit, operand, dot=dot)

    @intrinsic
    def dots(context, rows, columns, depth, a, a_row, b, b_row, kind, c, c_row, unit):
        return typed(products.dots, nbytes, "-", "iiiiiiiiii", unit)

    @intrinsic
    def accumulate_rows(context, rows, count, width, p, p_row, values, values_row, kind, acc,
                        acc_row, unit):
        return typed(products.accumulate_rows, nbytes, "-", "iiiiiiiiii", unit)

    @intrinsic
    def dots_listed(context, rows, columns, depth, a, a_row, b, b_row, index, kind, c, c_row,
                    unit):
        return typed(listed.dots_listed, nbytes, "-", "iiiiiiiiiii", unit)

    @intrinsic
    def accumulate_listed(context, rows, count, width, p, p_row, values, values_row, index, kind,
                          acc, acc_row, unit):
        return typed(listed.accumulate_listed, nbytes, "-", "iiiiiiiiiii", unit)

    @intrinsic
    def correlate(context, count, taps, width, a, a_row, b, b_row, c, c_row, accumulate, unit):
        return typed(shifted.correlate, nbytes, "-", "iiiiiiiiii", unit)

    @intrinsic
    def weigh(context, scores, row, count, tiles, words, words_row, gates, tops, sums, decays,
              unit):
        return typed(rows.weigh, nbytes, "i", "iiiiiiiiii", unit)

    @intrinsic
    def differentiate(context, scores, dweights, row, count, words, lse, delta, unit):
        return typed(rows.differentiate, nbytes, "-", "iiiiiii", unit)

    @intrinsic
    def exp_rows(context, scores, row, count, lse, unit):
        return typed(rows.exp_rows, nbytes, "-", "iiii", unit)

    @intrinsic
    def scale_rows(context, x, row, count, width, factors, unit):
        return typed(rows.scale_rows, nbytes, "-", "iiiii", unit)

    @intrinsic
    def lane_sums(context, sums, count, totals, unit):
        return typed(rows.lane_sums, nbytes, "-", "iii", unit)

    @intrinsic
    def row_dots(context, a, b, row, count, width, products, unit):
        return typed(rows.row_dots, nbytes, "-", "iiiiii", unit)

    @intrinsic
    def soft_cap(context, row, count, cap, unit):
        return typed(rows.soft_cap, nbytes, "-", "iif", unit)

    @intrinsic
    def select(context, row, word, fill, unit):
        return typed(rows.select, nbytes, "-", "iif", unit)

    @intrinsic
    def convert_rows(context, source, source_row, step, kind, rows, count, padded, scale, target,
                     target_row, unit, operand):
        return typed(layout.convert_rows, nbytes, "i", "iiiiiiifii", unit, operand, dot=dot)

    @intrinsic
    def gather_rows(context, places, start, step, kind, rows, count, padded, scale, target,
                    target_row, unit, operand):
        return typed(layout.gather_rows, nbytes, "i", "iiiiiiifii", unit, operand, dot=dot)

    @intrinsic
    def scatter_rows(context, source, source_row, rows, count, factors, places, kind, unit):
        return typed(layout.scatter_rows, nbytes, "-", "iiiiiii", unit, dot=dot)

    @intrinsic
    def add_rows(context, source, source_row, rows, count, factors, kept, places, unit):
        return typed(layout.add_rows, nbytes, "-", "iiiiiii", unit)

    @intrinsic
    def write_rows(context, source, source_row, count, width, factors, target, target_row, kind,
                   unit):
        return typed(layout.write_rows, nbytes, "-", "iiiiiiii", unit, dot=dot)

    @intrinsic
    def transpose(context, source, source_row, target, target_row, rows, columns, unit):
        return typed(layout.transpose, nbytes, "-", "iiiiii", unit)

    @intrinsic
    def pair_rows(context, first, second, count, target):
        return typed(layout.pair_rows, nbytes, "-", "iiii")

    @intrinsic
    def round_row(context, source, count, target):
        return typed(layout.round_row, nbytes, "-", "iii", dot=dot)

    @intrinsic
    def pair_rounded(context, source, source_row, rows, columns, target, target_row):
        return typed(layout.pair_rounded, nbytes, "-", "iiiiii", dot=dot)

    return SimpleNamespace(
        gemm=gemm, multiply=multiply, enter_tiles=enter_tiles, leave_tiles=leave_tiles, dots=dots,
        accumulate_rows=accumulate_rows, dots_listed=dots_listed,
        accumulate_listed=accumulate_listed, correlate=correlate, weigh=weigh,
        differentiate=differentiate, exp_rows=exp_rows, scale_rows=scale_rows,
        lane_sums=lane_sums, row_dots=row_dots, soft_cap=soft_cap, select=select,
        convert_rows=convert_rows, gather_rows=gather_rows, scatter_rows=scatter_rows,
        add_rows=add_rows, write_rows=write_rows, transpose=transpose, pair_rows=pair_rows,
        round_row=round_row, pair_rounded=pair_rounded)


_host = micro_kernels(vector_bytes(), dot_product() or "widened")
gemm, multiply = _host.gemm, _host.multiply
enter_tiles, leave_tiles = _host.enter_tiles, _host.leave_tiles
dots, accumulate_rows = _host.dots, _host.accumulate_rows
dots_listed, accumulate_listed = _host.dots_listed, _host.accumulate_listed
correlate = _host.correlate
weigh, differentiate, exp_rows = _host.weigh, _host.differentiate, _host.exp_rows
scale_rows, lane_sums, row_dots = _host.scale_rows, _host.lane_sums, _host.row_dots
soft_cap, select = _host.soft_cap, _host.select
gather_rows, scatter_rows, add_rows = _host.gather_rows, _host.scatter_rows, _host.add_rows
convert_rows, write_rows, transpose = _host.convert_rows, _host.write_rows, _host.transpose
pair_rows, round_row, pair_rounded = _host.pair_rows, _host.round_row, _host.pair_rounded
