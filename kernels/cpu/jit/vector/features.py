"""Features of tokens, and what carries their gradients back, on tiles with a token per column.

Rows are 64 numbers apart; of each the first `columns` count, a multiple of the lanes. With tokens
side by side, what belongs to a token is a lane: its largest feature needs no sum across a vector.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from numba.core import cgutils

from .emit import I64, Vectors

IDENTITY, ELU1, RELU, EXP = range(4)


def _each(v: Vectors, rows: Any, columns: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Emit what follows for each vector of a tile; its row, its column, and its place."""
    build = v.builder
    vectors = build.udiv(columns, I64(v.lanes))
    with cgutils.for_range(build, rows) as row, cgutils.for_range(build, vectors) as loop:
        x = build.mul(loop.index, I64(v.lanes))
        yield row.index, x, build.add(build.mul(row.index, I64(64)), x)


def _if_kind(v: Vectors, kind: Any, code: int) -> Any:
    return v.builder.if_then(v.builder.icmp_signed("==", kind, I64(code)))


def map_features(v: Vectors, x: Any, rows: Any, columns: Any, kind: Any, epsilon: Any) -> None:
    """Turn h into elu(h) + 1, or max(h, 0) + epsilon, in place; NaN stays NaN."""
    build = v.builder
    with _if_kind(v, kind, ELU1):
        for _, _, at in _each(v, rows, columns):
            h = v.load(x, at)
            above = build.fcmp_ordered(">", h, v.const(0.0))
            below = v.falling_exp(build.select(above, v.const(0.0), h))
            v.store(build.select(above, build.fadd(h, v.const(1.0)), below), x, at)
    with _if_kind(v, kind, RELU):
        added = v.splat(epsilon)
        for _, _, at in _each(v, rows, columns):
            h = v.load(x, at)
            below = build.fcmp_ordered("<", h, v.const(0.0))
            v.store(build.fadd(build.select(below, v.const(0.0), h), added), x, at)
    build.ret_void()


def pull_features(v: Vectors, dphi: Any, phi: Any, rows: Any, columns: Any, kind: Any,
                  epsilon: Any) -> None:
    """Turn the gradients of features into those of h, in place."""
    build = v.builder
    one = v.const(1.0)
    with _if_kind(v, kind, ELU1):
        for _, _, at in _each(v, rows, columns):
            # forward: phi = h + 1 above 1, exp(h) below
            x = v.load(phi, at)
            slope = build.select(build.fcmp_ordered(">", x, one), one, x)
            v.store(build.fmul(v.load(dphi, at), slope), dphi, at)
    with _if_kind(v, kind, RELU):
        least = v.splat(epsilon)
        for _, _, at in _each(v, rows, columns):
            # forward: phi = max(h, 0) + epsilon
            live = build.fcmp_unordered(">", v.load(phi, at), least)
            v.store(build.select(live, v.load(dphi, at), v.const(0.0)), dphi, at)
    with _if_kind(v, kind, EXP):
        for _, _, at in _each(v, rows, columns):
            # forward: phi = exp(h)
            v.store(build.fmul(v.load(dphi, at), v.load(phi, at)), dphi, at)
    build.ret_void()


def exp_columns(v: Vectors, x: Any, rows: Any, columns: Any, tops: Any) -> None:
    """Turn columns into exp(x - top), in place, with top the largest of the column, kept."""
    build = v.builder
    largest = v.variable(v.const(0.0))
    with cgutils.for_range(build, build.udiv(columns, I64(v.lanes))) as loop:
        c = build.mul(loop.index, I64(v.lanes))
        build.store(v.const(-math.inf), largest)
        with cgutils.for_range(build, rows) as row:
            h = v.load(x, build.add(build.mul(row.index, I64(64)), c))
            old = build.load(largest, typ=v.type)
            build.store(build.select(build.fcmp_ordered(">", h, old), h, old), largest)
        top = build.load(largest, typ=v.type)
        v.store(top, tops, c)
        seen = build.fcmp_ordered(">", top, v.const(-math.inf))
        shift = build.select(seen, top, v.const(0.0))
        with cgutils.for_range(build, rows) as row:
            at = build.add(build.mul(row.index, I64(64)), c)
            v.store(v.falling_exp(build.fsub(v.load(x, at), shift)), x, at)
    build.ret_void()


def decay_pairs(v: Vectors, x: Any, rows: Any, columns: Any, tops: Any, bases: Any) -> None:
    """x[r, c] *= exp(tops[c] - bases[r]), or 1 where that is above 1."""
    build = v.builder
    for r, c, at in _each(v, rows, columns):
        rise = build.fsub(v.load(tops, c), v.splat(v.load_number(bases, r)))
        above = build.fcmp_ordered(">", rise, v.const(0.0))
        factor = v.falling_exp(build.select(above, v.const(0.0), rise))
        v.store(build.fmul(v.load(x, at), factor), x, at)
    build.ret_void()


def scale_columns(v: Vectors, x: Any, rows: Any, columns: Any, factors: Any) -> None:
    """x[r, c] *= factors[c]."""
    for _, c, at in _each(v, rows, columns):
        v.store(v.builder.fmul(v.load(x, at), v.load(factors, c)), x, at)
    v.builder.ret_void()
