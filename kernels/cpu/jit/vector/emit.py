"""Vectors of the host's width in LLVM IR, from which the micro-kernels are put together."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from decimal import Decimal, localcontext
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from ...host import target

I64 = ir.IntType(64)
UNROLL = 4


@functools.cache
def converts_halves() -> bool:
    """Return whether the CPU has an instruction for float16 to float32; else LLVM calls libgcc."""
    triple, _, features = target()
    return "+f16c" in features.split(",") or triple.startswith(("aarch64", "arm64"))


class Vectors:
    """Emits vectors of one dtype and width into one LLVM function.

    `bf16` says that the operands of products are bfloat16, and `dot` how these are multiplied:
    "amx", "avx512bf16", or by arithmetic that any CPU has.
    """

    def __init__(self, builder: ir.IRBuilder, dtype: types.Float, nbytes: int, *,
                 bf16: bool = False, dot: str = "widened") -> None:
        self.builder = builder
        self.dtype, self.nbytes, self.bf16, self.dot = dtype, nbytes, bf16, dot
        self.size = dtype.bitwidth // 8
        self.lanes = nbytes // self.size
        self.scalar = ir.FloatType() if self.size == 4 else ir.DoubleType()
        self.type = ir.VectorType(self.scalar, self.lanes)
        self.integers = ir.VectorType(ir.IntType(8 * self.size), self.lanes)
        self.fraction_bits = 23 if self.size == 4 else 52
        self.largest_exponent = 127 if self.size == 4 else 1023

    def one_lane(self) -> Vectors:
        """Return an emitter of vectors of one number, for what lies apart."""
        return Vectors(self.builder, self.dtype, self.size, bf16=self.bf16, dot=self.dot)

    def const(self, value: float) -> ir.Constant:
        """Return a vector of equal constants."""
        return ir.Constant(self.type, [value] * self.lanes)

    def whole(self, value: int) -> ir.Constant:
        """Return a vector of equal integers."""
        return ir.Constant(self.integers, [value] * self.lanes)

    def splat(self, x: Any) -> Any:
        """Return a vector of `x` in every lane."""
        undefined = ir.Constant(self.type, ir.Undefined)
        first = self.builder.insert_element(undefined, x, ir.IntType(32)(0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(first, undefined, zeros)

    def where(self, address: Any, index: Any, kind: Any) -> Any:
        """Return a pointer to number `index` from `address` on."""
        base = self.builder.inttoptr(address, self.scalar.as_pointer())
        pointer = self.builder.gep(base, [index], source_etype=self.scalar)
        return self.builder.bitcast(pointer, kind.as_pointer())

    def load(self, address: Any, index: Any) -> Any:
        """Read a vector from number `index` on."""
        return self.builder.load(self.where(address, index, self.type), align=self.size,
                                 typ=self.type)

    def load_number(self, address: Any, index: Any) -> Any:
        """Read number `index`."""
        return self.builder.load(self.where(address, index, self.scalar), align=self.size,
                                 typ=self.scalar)

    def store(self, x: Any, address: Any, index: Any) -> None:
        """Write a vector from number `index` on."""
        self.builder.store(x, self.where(address, index, self.type), align=self.size)

    def first(self, live: Any) -> Any:
        """Return a mask of the first `live` lanes."""
        build, kind = self.builder, ir.IntType(32)
        lanes = ir.VectorType(kind, self.lanes)
        count = build.insert_element(ir.Constant(lanes, ir.Undefined), build.trunc(live, kind),
                                     kind(0))
        counts = build.shuffle_vector(count, count, ir.Constant(lanes, [0] * self.lanes))
        return build.icmp_unsigned("<", ir.Constant(lanes, list(range(self.lanes))), counts)

    def load_masked(self, pointer: Any, kind: ir.VectorType, nbytes: int, mask: Any) -> Any:
        """Read the lanes of `kind` (`nbytes` each) that `mask` names; the others are zero."""
        integer = isinstance(kind.element, ir.IntType)
        name = f"llvm.masked.load.v{self.lanes}{'i' if integer else 'f'}{8 * nbytes}.p0"
        function = cgutils.get_or_insert_function(
            self.builder.module,
            ir.FunctionType(kind, [pointer.type, ir.IntType(32), mask.type, kind]), name)
        return self.builder.call(function, [pointer, ir.IntType(32)(nbytes), mask,
                                            ir.Constant(kind, None)])

    def store_masked(self, x: Any, address: Any, index: Any, mask: Any) -> None:
        """Write the lanes that `mask` names, from number `index` on."""
        pointer = self.where(address, index, self.type)
        name = f"llvm.masked.store.v{self.lanes}f{8 * self.size}.p0"
        kinds = [self.type, pointer.type, ir.IntType(32), mask.type]
        function = cgutils.get_or_insert_function(
            self.builder.module, ir.FunctionType(ir.VoidType(), kinds), name)
        self.builder.call(function, [x, pointer, ir.IntType(32)(self.size), mask])

    def any(self, mask: Any) -> Any:
        """Return whether a lane of a mask is set."""
        word = ir.IntType(self.lanes)
        return self.builder.icmp_unsigned("!=", self.builder.bitcast(mask, word), word(0))

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        """Return x * y + z, rounded once where the CPU can."""
        name = f"llvm.fmuladd.v{self.lanes}f{8 * self.size}"
        function = cgutils.get_or_insert_function(
            self.builder.module, ir.FunctionType(self.type, [self.type] * 3), name)
        return self.builder.call(function, [x, y, z])

    def reduce(self, operation: str, start: list[Any], x: Any,
               may: tuple[str, ...] = ("reassoc",)) -> Any:
        """Return one number from all lanes."""
        name = f"llvm.vector.reduce.{operation}.v{self.lanes}f{8 * self.size}"
        kinds = [argument.type for argument in start] + [self.type]
        function = cgutils.get_or_insert_function(
            self.builder.module, ir.FunctionType(self.scalar, kinds), name)
        return self.builder.call(function, [*start, x], fastmath=may)

    def together(self, slots: list[Any]) -> Any:
        """Return the sum of a few variables, lane by lane."""
        total = self.builder.load(slots[0], typ=self.type)
        for slot in slots[1:]:
            total = self.builder.fadd(total, self.builder.load(slot, typ=self.type))
        return total

    def largest(self, x: Any) -> Any:
        """Return the largest lane of `x`, which holds no NaN."""
        return self.reduce("fmax", [], x, ("nnan", "nsz"))

    def place(self, address: Any, index: Any) -> Any:
        """Return a pointer to number `index` from `address` on."""
        return self.where(address, index, self.scalar)

    def load_word(self, address: Any, index: Any) -> Any:
        """Read 64-bit word number `index`."""
        pointer = self.builder.inttoptr(address, I64.as_pointer())
        return self.builder.load(self.builder.gep(pointer, [index], source_etype=I64), typ=I64)

    def lanes_of(self, word: Any, first: int) -> Any:
        """Return the bits of a word from bit `first` on, one for each lane."""
        bits = self.builder.trunc(self.builder.lshr(word, I64(first)), ir.IntType(self.lanes))
        return self.builder.bitcast(bits, ir.VectorType(ir.IntType(1), self.lanes))

    def variable(self, value: Any) -> Any:
        """Make a variable that loops may change; LLVM turns it into a register."""
        slot = cgutils.alloca_once(self.builder, value.type)
        self.builder.store(value, slot)
        return slot

    def bits(self, x: Any) -> Any:
        """Return the lanes of floats as integers, bit by bit."""
        return self.builder.bitcast(x, self.integers)

    def floats(self, x: Any) -> Any:
        """Return the lanes of integers as floats, bit by bit."""
        return self.builder.bitcast(x, self.type)

    def blocks(self, total: Any, sizes: tuple[int, ...]) -> Iterator[tuple[int, Any]]:
        """Emit what follows once per block size: as many blocks of it as still fit in `total`."""
        done = I64(0)
        for size in sizes:
            count = self.builder.udiv(self.builder.sub(total, done), I64(size))
            with cgutils.for_range(self.builder, count) as loop:
                start = self.builder.mul(loop.index, I64(size))
                yield size, self.builder.add(done, start)
            done = self.builder.add(done, self.builder.mul(count, I64(size)))

    def row(self, total: Any) -> Iterator[list[Any]]:
        """Emit what follows for all vectors of a row, UNROLL of them at a time."""
        step = UNROLL * self.lanes
        with cgutils.for_range(self.builder, self.builder.udiv(total, I64(step))) as loop:
            start = self.builder.mul(loop.index, I64(step))
            yield [self.builder.add(start, I64(u * self.lanes)) for u in range(UNROLL)]

    def power(self, x: Any, rate: Decimal) -> tuple[Any, Any, Any]:
        """Split exp(x rate) = 2^r (1 + f * series): what multiplies a float by 2^r if added to it.

        Adding 1.5 * 2^fraction_bits rounds t = x rate / ln 2 to the integer r and leaves r in the
        lowest bits; f = t - r. Two parts of 1 / ln 2 keep f exact to rounding however large x is.
        """
        b = self.builder
        factor = rate / Decimal(2).ln()
        high = representable(float(factor), self.size)
        low = representable(float(factor - Decimal(high)), self.size)
        rounder = self.const(1.5 * 2.0**self.fraction_bits)
        rounded = self.fma(x, self.const(high), rounder)
        f = self.fma(x, self.const(high), b.fneg(b.fsub(rounded, rounder)))
        f = self.fma(x, self.const(low), f)
        *coefficients, last = (self.const(representable(coefficient, self.size))
                               for coefficient in power_series(6 if self.size == 4 else 11))
        series = last
        for coefficient in reversed(coefficients):
            series = self.fma(series, f, coefficient)
        shift = ir.Constant(self.integers, [self.fraction_bits] * self.lanes)
        return b.shl(self.bits(rounded), shift), f, series

    def falling_exp(self, x: Any) -> Any:
        """Return exp x for x <= 0 or NaN, and 0 where that is below the normal range.

        Denormal products stall.
        """
        b = self.builder
        exponent, f, series = self.power(x, Decimal(1))
        power = self.floats(b.add(self.bits(self.fma(series, f, self.const(1.0))), exponent))
        least = self.const(representable(math.log(2) * (1 - self.largest_exponent), self.size))
        return b.select(b.fcmp_unordered(">", x, least), power, self.const(0.0))

    def exp(self, x: Any) -> Any:
        """Return exp x for any x, and 0 where that is below the normal range."""
        b = self.builder
        most = self.const(representable(math.log(2) * (1 + self.largest_exponent), self.size))
        huge_or_nan = b.fcmp_unordered(">=", x, most)
        return b.select(huge_or_nan, b.fadd(x, self.const(math.inf)), self.falling_exp(x))

    def tanh(self, x: Any) -> Any:
        """Return tanh x: tanh |x| = -e / (2 + e) with e = exp(-2 |x|) - 1, good near 0 too."""
        b = self.builder
        negative = b.fcmp_ordered("<", x, self.const(0.0))
        below = b.select(negative, x, b.fneg(x))
        # from here on tanh is -1 to rounding
        least = self.const(-2.0 - self.fraction_bits // 2)
        below = b.select(b.fcmp_ordered("<", below, least), least, below)
        exponent, f, series = self.power(below, Decimal(2))
        one = self.const(1.0)
        power = self.floats(b.add(self.bits(one), exponent))
        e = self.fma(power, b.fmul(series, f), b.fsub(power, one))
        y = b.fdiv(e, b.fadd(e, self.const(2.0)))
        return b.select(negative, y, b.fneg(y))


@functools.cache
def power_series(count: int) -> tuple[float, ...]:
    """Return the coefficients of a polynomial for (2^f - 1) / f, |f| <= 1/2, the constant first.

    It meets the function where Chebyshev's polynomial of degree `count` is 0, which is nearly best.
    """
    with localcontext(prec=40):
        nodes = [Decimal(math.cos(math.pi * (k + 0.5) / count)) / 2 for k in range(count)]
        differences = [((Decimal(2).ln() * f).exp() - 1) / f if f else Decimal(2).ln()
                       for f in nodes]
        for order in range(1, count):       # Newton's divided differences
            for k in range(count - 1, order - 1, -1):
                differences[k] -= differences[k - 1]
                differences[k] /= nodes[k] - nodes[k - order]
        coefficients = [Decimal(0)] * count
        for node, difference in zip(reversed(nodes), reversed(differences), strict=True):
            shifted = [Decimal(0), *coefficients[:-1]]
            coefficients = [up - node * same
                            for up, same in zip(shifted, coefficients, strict=True)]
            coefficients[0] += difference
        return tuple(map(float, coefficients))


def representable(x: float, size: int) -> float:
    """LLVM takes a float32 constant only if it is one."""
    return types.float32.cast_python_value(x).item() if size == 4 else x


def typed(emit: Callable[..., None], nbytes: int, returns: str, takes: str, *tags: Any,
          dot: str = "widened") -> tuple[Any, Any] | None:
    """Type an intrinsic and emit its body; `takes` has an i for each int64, an f for each float.

    The tags that end its arguments say the dtypes: `unit`, and `operand` where that matters;
    without any, the intrinsic is about float32.
    """
    dtype = tags[0] if tags else types.float32
    if dtype not in (types.float32, types.float64):
        return None
    bf16 = tags[1:] == (types.uint16,)
    if (tags[1:] not in ((), (dtype,)) and not bf16) or (bf16 and dtype != types.float32):
        return None
    kinds = {"i": types.int64, "f": dtype, "-": types.void}
    signature = kinds[returns](*(kinds[letter] for letter in takes), *tags)

    def call(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        values = values[:len(takes)]
        name = f"pyattn_{emit.__name__}_{'bf16' if bf16 else dtype}_{nbytes}_{dot}"
        result = ir.VoidType() if returns == "-" else context.get_value_type(kinds[returns])
        kind = ir.FunctionType(result, [value.type for value in values])
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        if function.is_declaration:
            function.linkage = "linkonce_odr"
            # copies of a micro-kernel at every place that calls it would take long to compile
            function.attributes.add("noinline")
            inside = ir.IRBuilder(function.append_basic_block("entry"))
            emit(Vectors(inside, dtype, nbytes, bf16=bf16, dot=dot), *function.args)
        value = builder.call(function, values)
        return context.get_dummy_value() if returns == "-" else value

    return signature, call
