"""Handing work to a helper who is awake, without Python and without putting anyone to sleep.

To wake a thread takes longer than a short call. So a helper that has finished looks into its *box*
for a while before it goes to sleep, and a caller looks there for its end:

    asleep -> ready          the helper looks into its box
    ready -> posted          a caller has written what is to be done
    posted -> ready          the helper has done it, and `done` has grown by 1
    ready -> asleep          nothing came
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .. import host
from ..compile import kernel
from ..records import BOX
from .access import record_at

I64 = ir.IntType(64)
ASLEEP, READY, POSTED = np.int64(0), np.int64(1), np.int64(2)
ONE = np.int64(1)
STATE, DONE = (np.int64(BOX.fields[name][1]) for name in ("state", "done"))

box_at = record_at(BOX)


@intrinsic
def watch(context, place):
    """Return the int64 at address `place`, and see all that was written before it was."""
    def read(context, builder, signature, values):
        pointer = builder.inttoptr(values[0], I64.as_pointer())
        return builder.load_atomic(pointer, "acquire", 8, typ=I64)

    return types.int64(types.int64), read


@intrinsic
def publish(context, place, value):
    """Write an int64 to address `place`, after all that was written before."""
    def write(context, builder, signature, values):
        pointer = builder.inttoptr(values[0], I64.as_pointer())
        builder.store_atomic(values[1], pointer, "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), write


@intrinsic
def replaced(context, place, old, new):
    """Write `new` to address `place` if `old` is there; return whether it was."""
    def swap(context, builder, signature, values):
        pointer = builder.inttoptr(values[0], I64.as_pointer())
        result = builder.cmpxchg(pointer, values[1], values[2], "seq_cst", "seq_cst")
        return builder.extract_value(result, 1)

    return types.boolean(types.int64, types.int64, types.int64), swap


@intrinsic
def call(context, kernel, place, queue, units, scratch):
    """Call the kernel at an address."""
    def jump(context, builder, signature, values):
        kind = ir.FunctionType(ir.VoidType(), [I64] * 4)
        function = builder.inttoptr(values[0], kind.as_pointer())
        builder.call(function, values[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), jump


@intrinsic
def pause(context):
    """Tell the CPU that this is a loop that waits."""
    def tell(context, builder, signature, values):
        if host.target().triple.startswith(("x86", "i686")):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(
                builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), tell


@kernel
def serve(box, turns, unit, operand):
    """Do what is posted, until for so many turns nothing is."""
    job = box_at(box)
    publish(box + STATE, READY)
    turn = np.int64(0)
    while turn < turns or not replaced(box + STATE, READY, ASLEEP):
        if watch(box + STATE) == POSTED:
            call(job.kernel, job.place, job.queue, job.units, job.scratch)
            publish(box + DONE, job.done + ONE)
            publish(box + STATE, READY)
            turn = np.int64(0)
        pause()
        turn += ONE


@kernel
def post(box, unit, operand):
    """Post what is written in the box, if its helper is ready; `posted` says whether it was."""
    box_at(box).posted = np.int64(replaced(box + STATE, READY, POSTED))


@kernel
def until_done(box, done, turns, unit, operand):
    """Return when `done` calls have been done, or after so many turns."""
    turn = np.int64(0)
    while turn < turns and watch(box + DONE) != done:
        pause()
        turn += ONE
