"""Numbers on their way to where products want them: converted, transposed, paired.

bfloat16 is rounded to nearest even, NaN stays NaN, and denormals become zeros, as they do in the
instructions of CPUs that have bfloat16: all hosts give the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from .emit import I64, Vectors, converts_halves

FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = range(4)
SIZES = (8, 4, 2, 2)
I16 = ir.IntType(16)
EXPONENT, LARGEST_BF16 = 0x7F800000, 0x7F7F8000


def each_kind(v: Vectors, kind: Any) -> Iterator[int]:
    """Emit what follows for each dtype that a source may have; `kind` picks one as it runs."""
    if v.size == 8:
        yield FLOAT64
        return
    for code in (FLOAT32, FLOAT16, BFLOAT16):
        with v.builder.if_then(v.builder.icmp_signed("==", kind, I64(code))):
            yield code


def load_as(v: Vectors, code: int, address: Any, mask: Any = None) -> Any:
    """Read a vector of numbers of dtype `code` from a byte address, zeros where `mask` is unset."""
    build = v.builder
    nbytes = SIZES[code]
    kind = v.type if nbytes > 2 else ir.VectorType(I16, v.lanes)
    pointer = build.inttoptr(address, kind.as_pointer())
    if mask is None:
        raw = build.load(pointer, align=nbytes, typ=kind)
    else:
        raw = v.load_masked(pointer, kind, nbytes, mask)
    if nbytes > 2:
        return raw
    if code == BFLOAT16:
        return v.floats(build.shl(build.zext(raw, v.integers), v.whole(16)))
    if v.nbytes > 16 and converts_halves():
        halves = build.bitcast(raw, ir.VectorType(ir.HalfType(), v.lanes))
        return build.fpext(halves, v.type)
    return _from_half(v, build.zext(raw, v.integers))


def _from_half(v: Vectors, bits: Any) -> Any:
    """Return float16 as float32: exponent and fraction moved, then rebiased by a product."""
    build = v.builder
    size = build.shl(build.and_(bits, v.whole(0x7FFF)), v.whole(13))
    value = v.bits(build.fmul(v.floats(size), v.const(2.0**112)))
    special = build.icmp_unsigned(">=", size, v.whole(0x7C00 << 13))
    value = build.select(special, build.or_(size, v.whole(EXPONENT)), value)
    return v.floats(build.or_(value, build.shl(build.and_(bits, v.whole(0x8000)), v.whole(16))))


def _has_instruction(v: Vectors) -> bool:
    return v.dot in ("avx512bf16", "amx") and v.nbytes == 64


def _upper(v: Vectors, x: Any) -> Any:
    """Round to bfloat16; return it as the upper halves of integers whose lower halves are junk."""
    build = v.builder
    bits = v.bits(x)
    odd = build.and_(build.lshr(bits, v.whole(16)), v.whole(1))
    nearest = build.add(build.add(bits, v.whole(0x7FFF)), odd)
    nan = build.fcmp_unordered("uno", x, x)
    denormal = build.icmp_unsigned("==", build.and_(bits, v.whole(EXPONENT)), v.whole(0))
    nearest = build.select(nan, build.or_(bits, v.whole(0x400000)), nearest)
    return build.select(denormal, build.and_(bits, v.whole(0x80000000)), nearest)


def bfloat16s(v: Vectors, x: Any) -> Any:
    """Return float32 rounded to bfloat16, as 16-bit integers."""
    build = v.builder
    kind = ir.VectorType(I16, v.lanes)
    if _has_instruction(v):
        function = cgutils.get_or_insert_function(
            build.module, ir.FunctionType(kind, [v.type]),
            "llvm.x86.avx512bf16.cvtneps2bf16.512")
        return build.call(function, [x])
    return build.trunc(build.lshr(_upper(v, x), v.whole(16)), kind)


def _words(v: Vectors, first: Any, second: Any) -> Any:
    """Return two vectors rounded to bfloat16, the second in the upper halves of 32-bit words."""
    build = v.builder
    if _has_instruction(v):
        first, second = (build.zext(bfloat16s(v, x), v.integers) for x in (first, second))
        return build.or_(first, build.shl(second, v.whole(16)))
    return build.or_(build.lshr(_upper(v, first), v.whole(16)),
                     build.and_(_upper(v, second), v.whole(0xFFFF0000)))


def _write(v: Vectors, x: Any, target: Any, index: Any) -> None:
    """Write a vector as operands from number `index` on."""
    if not v.bf16:
        v.store(x, target, index)
        return
    values = bfloat16s(v, x)
    place = v.builder.add(target, v.builder.mul(index, I64(2)))
    v.builder.store(values, v.builder.inttoptr(place, values.type.as_pointer()), align=2)


def _halves(v: Vectors, x: Any) -> Any:
    """Return float32 rounded to float16, as 16-bit integers."""
    build, kind = v.builder, ir.VectorType(I16, v.lanes)
    if v.nbytes > 16 and converts_halves():
        halves = build.fptrunc(x, ir.VectorType(ir.HalfType(), v.lanes))
        return build.bitcast(halves, kind)
    bits = v.bits(x)
    size = build.and_(bits, v.whole(0x7FFFFFFF))
    # the exponent moved, then rounded to nearest even; what is too large carries on to infinity
    odd = build.and_(build.lshr(size, v.whole(13)), v.whole(1))
    nearest = build.add(build.add(size, v.whole(0xFFF - (112 << 23))), odd)
    nearest = build.lshr(nearest, v.whole(13))
    # a sum with 0.5 has the fraction of a denormal in its last bits
    small = build.sub(v.bits(build.fadd(v.floats(size), v.const(0.5))), v.whole(126 << 23))
    nearest = build.select(build.icmp_unsigned("<", size, v.whole(113 << 23)), small, nearest)
    nan = build.icmp_unsigned(">", size, v.whole(EXPONENT))
    large = build.select(nan, v.whole(0x7E00), v.whole(0x7C00))
    nearest = build.select(build.icmp_unsigned(">=", size, v.whole(143 << 23)), large, nearest)
    sign = build.lshr(build.and_(bits, v.whole(0x80000000)), v.whole(16))
    return build.trunc(build.or_(nearest, sign), kind)


def store_as(v: Vectors, code: int, x: Any, address: Any) -> None:
    """Write a vector as numbers of dtype `code` to a byte address."""
    values = bfloat16s(v, x) if code == BFLOAT16 else _halves(v, x) if code == FLOAT16 else x
    pointer = v.builder.inttoptr(address, values.type.as_pointer())
    v.builder.store(values, pointer, align=SIZES[code])


def write_rows(v: Vectors, source: Any, source_row: Any, rows: Any, count: Any, factors: Any,
               target: Any, target_row: Any, kind: Any) -> None:
    """Write `count` numbers of each row times the row's factor, as dtype `kind`.

    `target_row` is bytes; without `factors` they are 1.
    """
    for code in each_kind(v, kind):
        with cgutils.for_range(v.builder, rows) as row:
            to = v.builder.add(target, v.builder.mul(row.index, target_row))
            _write_row(v, code, source, source_row, row.index, count, factors, to)
    v.builder.ret_void()


def scatter_rows(v: Vectors, source: Any, source_row: Any, rows: Any, count: Any, factors: Any,
                 places: Any, kind: Any) -> None:
    """Do what `write_rows` does, each row to the address that `places` says; not at all for 0."""
    for code in each_kind(v, kind):
        with cgutils.for_range(v.builder, rows) as row, _placed(v, places, row.index) as to:
            _write_row(v, code, source, source_row, row.index, count, factors, to)
    v.builder.ret_void()


def add_rows(v: Vectors, source: Any, source_row: Any, rows: Any, count: Any, factors: Any,
             kept: Any, places: Any) -> None:
    """Make each row at an address of `places` itself * kept + a row of source * its factor.

    There is no row at 0. Without `factors`, or `kept`, they are 1.
    """
    build = v.builder
    with cgutils.for_range(build, rows) as row, _placed(v, places, row.index) as to:
        start = build.mul(row.index, source_row)
        new, old = (_factor(v, at, row.index) for at in (factors, kept))
        for emit, at in _each_width(v, count):
            total = emit.load(to, at)
            total = build.fmul(total, emit.splat(old))
            x = emit.load(source, build.add(start, at))
            emit.store(emit.fma(x, emit.splat(new), total), to, at)
    build.ret_void()


def _write_row(v: Vectors, code: int, source: Any, source_row: Any, row: Any, count: Any,
               factors: Any, target: Any) -> None:
    build = v.builder
    start, factor = build.mul(row, source_row), _factor(v, factors, row)
    for emit, at in _each_width(v, count):
        x = build.fmul(emit.load(source, build.add(start, at)), emit.splat(factor))
        store_as(emit, code, x, build.add(target, build.mul(at, I64(SIZES[code]))))


def _each_width(v: Vectors, count: Any) -> Iterator[tuple[Vectors, Any]]:
    """Emit what follows for whole vectors of `count` numbers, then for each that is left."""
    for width, at in v.blocks(count, (v.lanes, 1)):
        yield (v if width == v.lanes else v.one_lane()), at


def _factor(v: Vectors, factors: Any, row: Any) -> Any:
    """Read a row's factor, 1 where there are none."""
    build = v.builder
    factor = v.variable(v.scalar(1.0))
    with build.if_then(build.icmp_signed("!=", factors, I64(0))):
        build.store(v.load_number(factors, row), factor)
    return build.load(factor, typ=v.scalar)


@contextlib.contextmanager
def _placed(v: Vectors, places: Any, row: Any) -> Iterator[Any]:
    """Emit what follows for a row that has a place, which is given."""
    place = _place(v, places, row)
    with v.builder.if_then(v.builder.icmp_signed("!=", place, I64(0))):
        yield place


def _place(v: Vectors, places: Any, row: Any) -> Any:
    build = v.builder
    pointer = build.inttoptr(build.add(places, build.mul(row, I64(8))), I64.as_pointer())
    return build.load(pointer, align=8, typ=I64)


def convert_rows(v: Vectors, source: Any, source_row: Any, step: Any, kind: Any, rows: Any,
                 count: Any, padded: Any, scale: Any, target: Any, target_row: Any) -> None:
    """Write scale * `count` numbers of each row, and zeros up to `padded`, as operands.

    `source_row` and `step` are bytes, `target_row` numbers; `padded` is a multiple of the lanes.
    Returns whether any number written is not finite.
    """
    build = v.builder

    def row_at(row: Any) -> tuple[Any, Any]:
        return build.add(source, build.mul(row, source_row)), count

    _convert(v, row_at, step, kind, rows, padded, scale, target, target_row)


def gather_rows(v: Vectors, places: Any, start: Any, step: Any, kind: Any, rows: Any, count: Any,
                padded: Any, scale: Any, target: Any, target_row: Any) -> None:
    """Do what `convert_rows` does, each row from `start` bytes behind where `places` says.

    These are addresses, int64; a row that has 0 becomes zeros.
    """
    build = v.builder

    def row_at(row: Any) -> tuple[Any, Any]:
        place = _place(v, places, row)
        nowhere = build.icmp_signed("==", place, I64(0))
        return build.add(place, start), build.select(nowhere, I64(0), count)

    _convert(v, row_at, step, kind, rows, padded, scale, target, target_row)


def _convert(v: Vectors, row_at: Callable[[Any], tuple[Any, Any]], step: Any, kind: Any, rows: Any,
             padded: Any, scale: Any, target: Any, target_row: Any) -> None:
    """Emit `convert_rows` for rows of which `row_at` tells the address and how many numbers."""
    build, one = v.builder, v.one_lane()
    scales = v.splat(scale)
    largest = {emit: v.variable(emit.whole(0)) for emit in (v, one)}

    def put(emit: Vectors, x: Any, target: Any, index: Any) -> None:
        size = build.and_(emit.bits(x), emit.whole(2 ** (8 * v.size - 1) - 1))
        old = build.load(largest[emit], typ=emit.integers)
        build.store(build.select(build.icmp_signed(">", size, old), size, old), largest[emit])
        _write(emit, x, target, index)

    lanes = I64(v.lanes)
    for code in each_kind(v, kind):
        nbytes = I64(SIZES[code])
        contiguous = build.icmp_signed("==", step, nbytes)
        with cgutils.for_range(build, rows) as row:
            start, count = row_at(row.index)
            whole = build.and_(count, I64(-v.lanes))
            rest = build.sub(count, whole)
            mask = v.first(rest)
            to = build.mul(row.index, target_row)
            with build.if_else(contiguous) as (vectors, numbers):
                with vectors:
                    with cgutils.for_range(build, build.udiv(whole, lanes)) as loop:
                        x = build.mul(loop.index, lanes)
                        address = build.add(start, build.mul(x, nbytes))
                        put(v, build.fmul(load_as(v, code, address), scales), target,
                            build.add(to, x))
                    with build.if_then(build.icmp_signed("!=", rest, I64(0))):
                        address = build.add(start, build.mul(whole, nbytes))
                        x = build.fmul(load_as(v, code, address, mask), scales)
                        put(v, build.select(mask, x, v.const(0.0)), target, build.add(to, whole))
                with numbers:
                    with build.if_then(build.icmp_signed("!=", rest, I64(0))):
                        _write(v, v.const(0.0), target, build.add(to, whole))
                    with cgutils.for_range(build, count) as loop:
                        address = build.add(start, build.mul(loop.index, step))
                        put(one, build.fmul(load_as(one, code, address), one.splat(scale)), target,
                            build.add(to, loop.index))
            zeros = build.and_(build.add(count, I64(v.lanes - 1)), I64(-v.lanes))
            with cgutils.for_range(build, build.udiv(build.sub(padded, zeros), lanes)) as loop:
                x = build.add(zeros, build.mul(loop.index, lanes))
                _write(v, v.const(0.0), target, build.add(to, x))
    infinite = LARGEST_BF16 if v.bf16 else (EXPONENT if v.size == 4 else 0x7FF << 52)
    strange = [emit.any(build.icmp_signed(">=", build.load(slot, typ=emit.integers),
                                          emit.whole(infinite))) for emit, slot in largest.items()]
    build.ret(build.zext(build.or_(*strange), I64))


def transposed(v: Vectors, block: list[Any]) -> list[Any]:
    """Transpose a square of vectors: quarters change places, then quarters of quarters, ..."""
    apart = len(block) // 2
    while apart:
        low = [lane if not lane & apart else len(block) + lane - apart
               for lane in range(len(block))]
        kind = ir.VectorType(ir.IntType(32), len(block))
        masks = [ir.Constant(kind, low), ir.Constant(kind, [lane + apart for lane in low])]
        for i in range(len(block)):
            if not i & apart:
                pair = block[i], block[i + apart]
                block[i], block[i + apart] = (v.builder.shuffle_vector(*pair, mask)
                                              for mask in masks)
        apart //= 2
    return block


def transpose(v: Vectors, source: Any, source_row: Any, target: Any, target_row: Any, rows: Any,
              columns: Any) -> None:
    """target[c, r] = source[r, c]; what does not fill a square of vectors goes number by number."""
    build = v.builder
    for width, c in v.blocks(columns, (v.lanes, 1)):
        for height, r in v.blocks(rows, (v.lanes, 1)):
            if width == height == v.lanes:
                starts = [build.add(build.mul(build.add(r, I64(i)), source_row), c)
                          for i in range(height)]
                block = transposed(v, [v.load(source, start) for start in starts])
                for i, x in enumerate(block):
                    v.store(x, target, build.add(build.mul(build.add(c, I64(i)), target_row), r))
                continue
            with cgutils.for_range(build, I64(width)) as i, cgutils.for_range(
                    build, I64(height)) as j:
                at = build.add(c, i.index), build.add(r, j.index)
                x = v.load_number(source, build.add(build.mul(at[1], source_row), at[0]))
                build.store(x, v.place(target, build.add(build.mul(at[0], target_row), at[1])))
    build.ret_void()


def pair_rows(v: Vectors, first: Any, second: Any, count: Any, target: Any) -> None:
    """Interleave `count` 16-bit numbers of two rows."""
    build = v.builder
    for lanes, x in v.blocks(count, (v.lanes, 1)):
        emit = v if lanes == v.lanes else v.one_lane()
        kind = ir.VectorType(I16, lanes)
        low, high = (build.zext(
            build.load(build.inttoptr(build.add(row, build.mul(x, I64(2))), kind.as_pointer()),
                       align=2, typ=kind), emit.integers) for row in (first, second))
        word = build.or_(low, build.shl(high, emit.whole(16)))
        emit.store(emit.floats(word), target, x)
    build.ret_void()


def round_row(v: Vectors, source: Any, count: Any, target: Any) -> None:
    """Round a row of float32 to bfloat16; target may be source."""
    build = v.builder
    for lanes, x in v.blocks(count, (v.lanes, 1)):
        emit = v if lanes == v.lanes else v.one_lane()
        values = bfloat16s(emit, emit.load(source, x))
        place = build.add(target, build.mul(x, I64(2)))
        build.store(values, build.inttoptr(place, values.type.as_pointer()), align=2)
    build.ret_void()


def pair_rounded(v: Vectors, source: Any, source_row: Any, rows: Any, columns: Any, target: Any,
                 target_row: Any) -> None:
    """Write the transpose of float32 rows as bfloat16: target[c, r] = source[r, c].

    Both strides are numbers; rows are a multiple of twice the lanes, columns of the lanes.
    """
    build = v.builder
    for height, r in v.blocks(rows, (2 * v.lanes,)):
        for width, c in v.blocks(columns, (v.lanes,)):
            starts = [build.add(build.mul(build.add(r, I64(i)), source_row), c)
                      for i in range(height)]
            loaded = [v.load(source, start) for start in starts]
            words = [v.floats(_words(v, *loaded[i:i + 2])) for i in range(0, height, 2)]
            for i, x in zip(range(width), transposed(v, words), strict=True):
                place = build.add(build.mul(build.add(c, I64(i)), target_row), r)
                # two numbers make a word: half as far as a vector's own numbers are
                place = build.add(target, build.mul(place, I64(2)))
                v.store(x, place, I64(0))
    build.ret_void()
