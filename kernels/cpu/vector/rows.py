"""What happens to a row of scores between two products."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from .emit import I64, UNROLL, Vectors


def row_max(v: Vectors, row: Any, count: Any, start: Any) -> None:
    """The largest number of a row and `start`, NaN passed over."""
    build = v.builder
    largest = [v.variable(v.splat(start)) for _ in range(UNROLL)]

    def larger(x: Any, slot: Any) -> Any:
        old = build.load(slot, typ=v.type)
        return build.select(build.fcmp_ordered(">", x, old), x, old)

    for places in v.row(count):
        for place, slot in zip(places, largest, strict=True):
            build.store(larger(v.load(row, place), slot), slot)
    for slot in largest[1:]:
        build.store(larger(build.load(slot, typ=v.type), largest[0]), largest[0])
    build.ret(v.reduce("fmax", [], build.load(largest[0], typ=v.type)))


def exp_sum(v: Vectors, row: Any, count: Any, shift: Any) -> None:
    """exp(s - shift) in place; returns the sum."""
    build = v.builder
    shifts = v.splat(shift)
    sums = [v.variable(v.const(0.0)) for _ in range(UNROLL)]
    for places in v.row(count):
        for place, slot in zip(places, sums, strict=True):
            p = v.exp(build.fsub(v.load(row, place), shifts))
            v.store(p, row, place)
            build.store(build.fadd(build.load(slot, typ=v.type), p), slot)
    total = build.load(sums[0], typ=v.type)
    for slot in sums[1:]:
        total = build.fadd(total, build.load(slot, typ=v.type))
    build.ret(v.reduce("fadd", [v.scalar(0.0)], total))


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
        bits = build.trunc(build.lshr(word, I64(place)), ir.IntType(v.lanes))
        keep = build.bitcast(bits, ir.VectorType(ir.IntType(1), v.lanes))
        v.store(build.select(keep, v.load(row, I64(place)), fills), row, I64(place))
    build.ret_void()
