"""Reading and writing at addresses: kernels take integers, so that one compilation serves all.

An array argument would compile a kernel anew for every layout and for read-only memory, and a
missing one for every combination of terms.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array
from numba.np.numpy_support import from_dtype

from ..records import DELTA, JOB, PACK


def record_at(dtype: np.dtype) -> Any:
    """Make the function that turns an address into a record of `dtype`, inside kernels."""
    record = from_dtype(dtype)

    @intrinsic
    def at(context, place):
        def cast(context, builder, signature, values):
            return builder.inttoptr(values[0], context.get_value_type(record))

        return record(types.int64), cast

    return at


@intrinsic
def load(context, place, like):
    """Return the number at address `place`, of the type of `like`."""
    def read(context, builder, signature, values):
        kind = context.get_data_type(like)
        pointer = builder.inttoptr(values[0], kind.as_pointer())
        return builder.load(pointer, align=like.bitwidth // 8, typ=kind)

    return like(types.int64, like), read


@intrinsic
def store(context, place, value):
    """Write `value` at address `place`."""
    def write(context, builder, signature, values):
        pointer = builder.inttoptr(values[0], values[1].type.as_pointer())
        builder.store(values[1], pointer, align=value.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(types.int64, value), write


@intrinsic
def prefetch(context, place):
    """Ask for the cache line at address `place`, which need not exist, to be brought near."""
    def ask(context, builder, signature, values):
        number, byte = ir.IntType(32), ir.IntType(8).as_pointer()
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [byte] + [number] * 3),
            "llvm.prefetch.p0")
        read, keep, data = number(0), number(3), number(1)
        builder.call(function, [builder.inttoptr(values[0], byte), read, keep, data])
        return context.get_dummy_value()

    return types.void(types.int64), ask


@intrinsic
def pointer(context, place, like):
    """Return a pointer to numbers of the type of `like`."""
    def cast(context, builder, signature, values):
        return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(types.int64, like), cast


@intrinsic
def rounded(context, x, unit):
    """Return the float64 `x` rounded to the dtype of `unit`."""
    def cast(context, builder, signature, values):
        return context.cast(builder, values[0], types.float64, unit)

    return unit(types.float64, unit), cast


@intrinsic
def numbers(context, place, count, like):
    """Return the `count` numbers from address `place` on, as an array."""
    kind = types.Array(like, 1, "C")

    def view(context, builder, signature, values):
        array = context.make_array(kind)(context, builder)
        size = context.get_constant(types.intp, like.bitwidth // 8)
        populate_array(array, data=builder.inttoptr(values[0], array.data.type),
                       shape=[values[1]], strides=[size], itemsize=size, meminfo=None)
        return array._getvalue()

    return kind(types.int64, types.int64, like), view


@intrinsic
def fetch_add(context, place, count):
    """Add `count` to the int64 at address `place`, and return what it was; threads take turns."""
    def add(context, builder, signature, values):
        pointer = builder.inttoptr(values[0], values[1].type.as_pointer())
        return builder.atomic_rmw("add", pointer, values[1], "monotonic")

    return types.int64(types.int64, types.int64), add


@intrinsic
def widened(context, place, unit, operand):
    """Return the operand at address `place` as a number of the type of `unit`."""
    def read(context, builder, signature, values):
        kind = context.get_data_type(operand)
        pointer = builder.inttoptr(values[0], kind.as_pointer())
        x = builder.load(pointer, align=operand.bitwidth // 8, typ=kind)
        if operand == unit:
            return x
        # bfloat16 is the upper half of float32
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(x, word), word(16)),
                               context.get_value_type(unit))

    return unit(types.int64, unit, operand), read


delta_at = record_at(DELTA)
job_at = record_at(JOB)
pack_at = record_at(PACK)
