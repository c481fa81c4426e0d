"""What happens to rows of scores between two products."""

from __future__ import annotations

import math
from typing import Any

from numba.core import cgutils

from .emit import I64, UNROLL, Vectors


def weigh(v: Vectors, scores: Any, row: Any, rows: Any, tiles: Any, words: Any, words_row: Any,
          gates: Any, tops: Any, sums: Any, decays: Any) -> None:
    """Turn scores into weights exp(score - top), in place.

    A row is `tiles` times 64 scores, and if `words` is given, as many words that say which of them
    count; if `gates` is given, it lies like the scores and multiplies the weights. tops[r] becomes
    the largest score so far, decays[r] what sums so far are to be multiplied with, and sums[r, :],
    one number per lane, is brought up to date. Returns whether any top grew.
    """
    build = v.builder
    width = build.mul(tiles, I64(64))
    masked, gated = (build.icmp_signed("!=", given, I64(0)) for given in (words, gates))
    any_grew = v.variable(I64(0))
    largest = [v.variable(v.const(0.0)) for _ in range(UNROLL)]
    totals = [v.variable(v.const(0.0)) for _ in range(UNROLL)]

    def join(x: Any, slot: Any) -> None:
        old = build.load(slot, typ=v.type)
        build.store(build.select(build.fcmp_ordered(">", x, old), x, old), slot)

    def exponentials(start: Any, shift: Any, *, gated: bool) -> None:
        for places in v.row(width):
            for place, slot in zip(places, totals, strict=True):
                at = build.add(start, place)
                p = v.falling_exp(build.fsub(v.load(scores, at), shift))
                if gated:
                    p = build.fmul(p, v.load(gates, at))
                v.store(p, scores, at)
                build.store(build.fadd(build.load(slot, typ=v.type), p), slot)

    with cgutils.for_range(build, rows) as loop:
        r = loop.index
        start = build.mul(r, row)
        old = v.load_number(tops, r)
        for slot in largest:
            build.store(v.splat(old), slot)
        with build.if_else(masked) as (some, all_of_them):
            with some, cgutils.for_range(build, tiles) as tile:
                first = build.add(start, build.mul(tile.index, I64(64)))
                word = v.load_word(words, build.add(build.mul(r, words_row), tile.index))
                for step, place in enumerate(range(0, 64, v.lanes)):
                    at = build.add(first, I64(place))
                    x = build.select(v.lanes_of(word, place), v.load(scores, at),
                                     v.const(-math.inf))
                    v.store(x, scores, at)
                    join(x, largest[step % UNROLL])
            with all_of_them:
                for places in v.row(width):
                    for place, slot in zip(places, largest, strict=True):
                        join(v.load(scores, build.add(start, place)), slot)
        for slot in largest[1:]:
            join(build.load(slot, typ=v.type), largest[0])
        top = v.largest(build.load(largest[0], typ=v.type))
        some_seen = build.fcmp_ordered(">", top, v.scalar(-math.inf))
        shift = build.select(some_seen, top, v.scalar(0.0))
        sums_r = build.mul(r, I64(v.lanes))
        build.store(v.load(sums, sums_r), totals[0])
        for slot in totals[1:]:
            build.store(v.const(0.0), slot)
        build.store(v.scalar(1.0), v.place(decays, r))
        with build.if_then(build.fcmp_ordered(">", top, old)):
            decay = v.falling_exp(v.splat(build.fsub(old, shift)))
            build.store(build.extract_element(decay, I64(0)), v.place(decays, r))
            build.store(build.fmul(build.load(totals[0], typ=v.type), decay), totals[0])
            build.store(top, v.place(tops, r))
            build.store(I64(1), any_grew)
        with build.if_else(gated) as (with_gates, without):
            with with_gates:
                exponentials(start, v.splat(shift), gated=True)
            with without:
                exponentials(start, v.splat(shift), gated=False)
        v.store(v.together(totals), sums, sums_r)
    build.ret(build.load(any_grew, typ=I64))


def differentiate(v: Vectors, scores: Any, dweights: Any, row: Any, rows: Any, words: Any,
                  lse: Any, delta: Any) -> None:
    """Turn scores into weights exp(score - lse), their gradients into weight * (gradient - delta).

    Both in place, on rows of 64. If `words` is given, what is not in a row's word becomes 0.
    """
    build = v.builder

    def emit(masked: bool) -> None:
        with cgutils.for_range(build, rows) as loop:
            r = loop.index
            start = build.mul(r, row)
            shift, mean = v.splat(v.load_number(lse, r)), v.splat(v.load_number(delta, r))
            word = v.load_word(words, r) if masked else None
            for place in range(0, 64, v.lanes):
                at = build.add(start, I64(place))
                p = v.exp(build.fsub(v.load(scores, at), shift))
                ds = build.fmul(p, build.fsub(v.load(dweights, at), mean))
                if masked:
                    keep = v.lanes_of(word, place)
                    p, ds = (build.select(keep, x, v.const(0.0)) for x in (p, ds))
                v.store(p, scores, at)
                v.store(ds, dweights, at)

    with build.if_else(build.icmp_signed("!=", words, I64(0))) as (some, all_of_them):
        with some:
            emit(masked=True)
        with all_of_them:
            emit(masked=False)
    build.ret_void()


def exp_rows(v: Vectors, scores: Any, row: Any, rows: Any, lse: Any) -> None:
    """Turn rows of 64 scores into exp(score - lse), in place."""
    build = v.builder
    with cgutils.for_range(build, rows) as loop:
        start = build.mul(loop.index, row)
        shift = v.splat(v.load_number(lse, loop.index))
        for place in range(0, 64, v.lanes):
            at = build.add(start, I64(place))
            v.store(v.exp(build.fsub(v.load(scores, at), shift)), scores, at)
    build.ret_void()


def scale_rows(v: Vectors, x: Any, row: Any, rows: Any, width: Any, factors: Any) -> None:
    """Multiply each row by its factor, in place; the width is one of whole vectors."""
    build = v.builder
    with cgutils.for_range(build, rows) as loop:
        factor = v.load_number(factors, loop.index)
        start = build.mul(loop.index, row)
        with build.if_then(build.fcmp_unordered("!=", factor, v.scalar(1.0))):
            factors_r = v.splat(factor)
            with cgutils.for_range(build, build.udiv(width, I64(v.lanes))) as inner:
                at = build.add(start, build.mul(inner.index, I64(v.lanes)))
                v.store(build.fmul(v.load(x, at), factors_r), x, at)
    build.ret_void()


def lane_sums(v: Vectors, sums: Any, rows: Any, totals: Any) -> None:
    """Add up the lanes of each row's sums: totals[r] = sum of sums[r, :]."""
    build = v.builder
    with cgutils.for_range(build, rows) as loop:
        x = v.load(sums, build.mul(loop.index, I64(v.lanes)))
        total = v.reduce("fadd", [v.scalar(0.0)], x)
        build.store(total, v.place(totals, loop.index))
    build.ret_void()


def row_dots(v: Vectors, a: Any, b: Any, row: Any, rows: Any, width: Any, products: Any) -> None:
    """Multiply rows with rows: products[r] = sum of a[r, :] b[r, :]; the width is whole vectors."""
    build = v.builder
    total = v.variable(v.const(0.0))
    with cgutils.for_range(build, rows) as loop:
        start = build.mul(loop.index, row)
        build.store(v.const(0.0), total)
        with cgutils.for_range(build, build.udiv(width, I64(v.lanes))) as inner:
            at = build.add(start, build.mul(inner.index, I64(v.lanes)))
            x = v.fma(v.load(a, at), v.load(b, at), build.load(total, typ=v.type))
            build.store(x, total)
        product = v.reduce("fadd", [v.scalar(0.0)], build.load(total, typ=v.type))
        build.store(product, v.place(products, loop.index))
    build.ret_void()


def soft_cap(v: Vectors, row: Any, count: Any, cap: Any) -> None:
    """Cap scores: s = cap * tanh(s / cap) in place."""
    caps = v.splat(cap)
    for places in v.row(count):
        for place in places:
            x = v.builder.fdiv(v.load(row, place), caps)
            v.store(v.builder.fmul(caps, v.tanh(x)), row, place)
    v.builder.ret_void()


def select(v: Vectors, row: Any, word: Any, fill: Any) -> None:
    """`fill` where a bit of a 64-bit word is clear."""
    build = v.builder
    fills = v.splat(fill)
    for place in range(0, 64, v.lanes):
        x = build.select(v.lanes_of(word, place), v.load(row, I64(place)), fills)
        v.store(x, row, I64(place))
    build.ret_void()
