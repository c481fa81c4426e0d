"""bfloat16 products on AMX: eight tile registers of 16 rows of 64 bytes.

A tile holds 16 x 16 sums, 16 rows of 32 numbers of A, or 16 rows of 16 pairs of B. What a product
does with tiles goes through the few operations of `Tiles`; `EmulatedTiles` does the same to memory,
so that every host can test it.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from .emit import I64, Vectors

SIDE, BYTES, DEPTH = 16, 64, 32
I8 = ir.IntType(8)
A, B = (4, 5), (6, 7)
"""Tiles of the operands; the first four hold sums."""


class Tiles:
    """The tile operations of AMX."""

    def __init__(self, build: ir.IRBuilder) -> None:
        self.build = build

    def _call(self, name: str, *arguments: Any) -> None:
        kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
        name = f"llvm.x86.{name}"
        self.build.call(cgutils.get_or_insert_function(self.build.module, kind, name), arguments)

    def _pointer(self, address: Any) -> Any:
        return self.build.inttoptr(address, I8.as_pointer())

    def configure(self) -> None:
        """Make all tiles of the full size, for this thread."""
        image = bytearray(BYTES)
        image[0] = 1
        for tile in range(8):
            image[16 + 2 * tile], image[48 + tile] = BYTES, SIDE
        memory = _memory(self.build)
        kind = ir.ArrayType(I8, BYTES)
        self.build.store(ir.Constant(kind, image), self.build.bitcast(memory, kind.as_pointer()))
        self._call("ldtilecfg", memory)

    def release(self) -> None:
        """Give the tiles back: threads that hold none are cheaper to switch to."""
        self._call("tilerelease")

    def zero(self, tile: int) -> None:
        """Fill a tile with zeros."""
        self._call("tilezero", I8(tile))

    def load(self, tile: int, address: Any, stride: Any) -> None:
        """Read a tile whose rows are `stride` bytes apart."""
        self._call("tileloadd64", I8(tile), self._pointer(address), stride)

    def store(self, tile: int, address: Any, stride: Any) -> None:
        """Write a tile."""
        self._call("tilestored64", I8(tile), self._pointer(address), stride)

    def multiply(self, c: int, a: int, b: int) -> None:
        """Add a product of tiles to tile `c`."""
        self._call("tdpbf16ps", I8(c), I8(a), I8(b))


class EmulatedTiles(Tiles):
    """The same operations, number by number, on tiles that are memory."""

    def __init__(self, v: Vectors) -> None:
        super().__init__(v.builder)
        self.one = v.one_lane()
        self.at = [v.builder.ptrtoint(_memory(v.builder), I64) for _ in range(8)]

    def _copy(self, target: Any, target_row: Any, source: Any, source_row: Any) -> None:
        build, one = self.build, self.one
        with cgutils.for_range(build, I64(SIDE)) as r, cgutils.for_range(
                build, I64(SIDE)) as x:
            place, to = (build.add(start, build.mul(r.index, step))
                         for start, step in ((source, source_row), (target, target_row)))
            build.store(one.load_number(place, x.index), one.place(to, x.index))

    def zero(self, tile: int) -> None:
        """Fill a tile with zeros."""
        with cgutils.for_range(self.build, I64(SIDE * SIDE)) as x:
            self.one.store(self.one.const(0.0), self.at[tile], x.index)

    def load(self, tile: int, address: Any, stride: Any) -> None:
        """Read a tile whose rows are `stride` bytes apart."""
        self._copy(self.at[tile], I64(BYTES), address, stride)

    def store(self, tile: int, address: Any, stride: Any) -> None:
        """Write a tile."""
        self._copy(address, stride, self.at[tile], I64(BYTES))

    def multiply(self, c: int, a: int, b: int) -> None:
        """Add a product of tiles to tile `c`."""
        build, one, side = self.build, self.one, I64(SIDE)
        upper = one.whole(0xFFFF0000)
        with cgutils.for_range(build, side) as r, cgutils.for_range(build, side) as k:
            x = one.bits(one.load(self.at[a], build.add(build.mul(r.index, side), k.index)))
            with cgutils.for_range(build, side) as j:
                y = one.bits(one.load(self.at[b], build.add(build.mul(k.index, side), j.index)))
                at = build.add(build.mul(r.index, side), j.index)
                total = one.load(self.at[c], at)
                low = (one.floats(build.shl(word, one.whole(16))) for word in (x, y))
                high = (one.floats(build.and_(word, upper)) for word in (x, y))
                total = one.fma(*low, one.fma(*high, total))
                one.store(total, self.at[c], at)


def _memory(build: ir.IRBuilder) -> Any:
    """Return a pointer to as much of the stack as a tile takes."""
    with build.goto_entry_block():
        place = build.alloca(ir.ArrayType(I8, SIDE * BYTES))
        place.align = BYTES
        return build.bitcast(place, I8.as_pointer())


def product(v: Vectors, rows: Any, columns: Any, depth: Any, a: Any, a_row: Any, b: Any, b_row: Any,
            c: Any, c_row: Any, accumulate: Any) -> None:
    """C (+)= A B in blocks of 2 x 2 tiles of sums.

    Rows are rounded up to 16 and the depth to 32: memory reaches that far, and zeros fill the depth
    of at least one operand while the other is finite there. Columns are a multiple of 16.
    """
    build = v.builder
    tiles = EmulatedTiles(v) if v.dot == "emulated" else Tiles(build)
    add_to_c = build.icmp_signed("!=", accumulate, I64(0))
    steps = build.udiv(build.add(depth, I64(DEPTH - 1)), I64(DEPTH))
    row_tiles = build.udiv(build.add(rows, I64(SIDE - 1)), I64(SIDE))
    a_step, b_step = (build.mul(row, I64(2)) for row in (a_row, b_row))
    c_step = build.mul(c_row, I64(4))
    for width, j in v.blocks(build.udiv(columns, I64(SIDE)), (2, 1)):
        for height, i in v.blocks(row_tiles, (2, 1)):
            down = [build.mul(build.add(i, I64(t)), I64(SIDE)) for t in range(height)]
            across = [build.mul(build.add(j, I64(u)), I64(BYTES)) for u in range(width)]
            a_at = [build.add(a, build.mul(r, a_step)) for r in down]
            b_at = [build.add(b, x) for x in across]
            sums = {(t, u): (t * width + u, build.add(build.add(c, build.mul(r, c_step)), x))
                    for t, r in enumerate(down) for u, x in enumerate(across)}
            with build.if_else(add_to_c) as (add, overwrite):
                with add:
                    for tile, at in sums.values():
                        tiles.load(tile, at, c_step)
                with overwrite:
                    for tile, _ in sums.values():
                        tiles.zero(tile)
            with cgutils.for_range(build, steps) as k:
                along = build.mul(k.index, I64(BYTES))
                for t, at in enumerate(a_at):
                    tiles.load(A[t], build.add(at, along), a_step)
                below = build.mul(k.index, build.mul(b_step, I64(SIDE)))
                for u, at in enumerate(b_at):
                    tiles.load(B[u], build.add(at, below), b_step)
                for (t, u), (tile, _) in sums.items():
                    tiles.multiply(tile, A[t], B[u])
            for tile, at in sums.values():
                tiles.store(tile, at, c_step)


def enter_tiles(v: Vectors) -> None:
    """Configure the thread's tiles, where products use any."""
    if v.bf16 and v.dot == "amx":
        Tiles(v.builder).configure()
    v.builder.ret_void()


def leave_tiles(v: Vectors) -> None:
    """Undo `enter_tiles`."""
    if v.bf16 and v.dot == "amx":
        Tiles(v.builder).release()
    v.builder.ret_void()
