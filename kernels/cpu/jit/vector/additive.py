"""Sums over features of tanh(a + c), for a row of queries and 64 keys, and their gradients.

Keys lie side by side in the lanes: c is (features, 64), so nothing is summed across lanes but the
gradients of a query.
"""

from __future__ import annotations

from typing import Any

from numba.core import cgutils

from .emit import I64, UNROLL, Vectors
from .products import sum_each

KEYS = 64


def tanh_sums(v: Vectors, rows: Any, depth: Any, a: Any, a_row: Any, c: Any, w: Any, scores: Any,
              row: Any) -> None:
    """scores[r, :64] = sum_f w[f] tanh(a[r, f] + c[f, :64])."""
    build = v.builder
    with cgutils.for_range(build, rows) as loop:
        _sum_row(v, depth, a, build.mul(loop.index, a_row), c, w, scores,
                 build.mul(loop.index, row))
    build.ret_void()


def tanh_sums_kept(v: Vectors, depth: Any, a: Any, c: Any, w: Any, tanhs: Any,
                   scores: Any) -> None:
    """Do what `tanh_sums` does for one row, and leave its terms' tanh in tanhs[f, :64]."""
    _sum_row(v, depth, a, I64(0), c, w, scores, I64(0), tanhs)
    v.builder.ret_void()


def _sum_row(v: Vectors, depth: Any, a: Any, a_at: Any, c: Any, w: Any, scores: Any, at: Any,
             tanhs: Any = None) -> None:
    build = v.builder
    for first in range(0, KEYS, UNROLL * v.lanes):
        places = range(first, min(first + UNROLL * v.lanes, KEYS), v.lanes)
        totals = [v.variable(v.const(0.0)) for _ in places]
        with cgutils.for_range(build, depth) as loop:
            x = v.splat(v.load_number(a, build.add(a_at, loop.index)))
            weight = v.splat(v.load_number(w, loop.index))
            start = build.mul(loop.index, I64(KEYS))
            for place, slot in zip(places, totals, strict=True):
                index = build.add(start, I64(place))
                t = v.tanh(build.fadd(x, v.load(c, index)))
                if tanhs is not None:
                    v.store(t, tanhs, index)
                build.store(v.fma(weight, t, build.load(slot, typ=v.type)), slot)
        for place, slot in zip(places, totals, strict=True):
            v.store(build.load(slot, typ=v.type), scores, build.add(at, I64(place)))


def tanh_gradients(v: Vectors, depth: Any, tanhs: Any, dscores: Any, w: Any, words: Any, da: Any,
                   dc: Any, dw: Any) -> None:
    """Add the gradients of one row's sums, given those of its 64 scores.

    With y = dscore (1 - tanh^2): da[f] += w[f] sum of y, dc[f, :64] += w[f] y, and
    dw[f, :], a number per lane, += dscore tanh. If `words` is given, pairs whose bit is clear add
    nothing, whatever their tanh.
    """
    build = v.builder

    def feature(f: Any, masked: bool) -> Any:
        """Add what belongs to one feature; return y by lane."""
        start, lane = build.mul(f, I64(KEYS)), build.mul(f, I64(v.lanes))
        weight, word = v.splat(v.load_number(w, f)), v.load_word(words, I64(0)) if masked else None
        sums, products = None, v.load(dw, lane)
        for place in range(0, KEYS, v.lanes):
            at = build.add(start, I64(place))
            t, ds = v.load(tanhs, at), v.load(dscores, I64(place))
            product = build.fmul(ds, t)
            if masked:
                product = build.select(v.lanes_of(word, place), product, v.const(0.0))
            y = v.fma(build.fneg(product), t, ds)
            if masked:
                y = build.select(v.lanes_of(word, place), y, v.const(0.0))
            v.store(v.fma(weight, y, v.load(dc, at)), dc, at)
            products = build.fadd(products, product)
            sums = y if sums is None else build.fadd(sums, y)
        v.store(products, dw, lane)
        return sums

    def emit(masked: bool) -> None:
        for count, first in v.blocks(depth, (v.lanes, 1)):
            sums = [feature(build.add(first, I64(u)), masked) for u in range(count)]
            if count == 1:
                total = v.reduce("fadd", [v.scalar(0.0)], sums[0])
                total = build.fmul(total, v.load_number(w, first))
                build.store(build.fadd(v.load_number(da, first), total), v.place(da, first))
            else:
                v.store(v.fma(v.load(w, first), sum_each(v, sums), v.load(da, first)), da, first)

    with build.if_else(build.icmp_signed("!=", words, I64(0))) as (some, all_of_them):
        with some:
            emit(masked=True)
        with all_of_them:
            emit(masked=False)
    build.ret_void()
