"""How softmax kernels divide their work: tilings by dtype, width and what a device has room for.

What is chosen here is what the kernels are compiled for. Registers and shared memory bound it:
`configurations` lists what it comes to, to be compiled and looked at. Where a table was measured
(tuning.py), that chooses among what the rules say and what `FURTHER` has.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from .device import Kernel
from .layout import ELEMENTS

WIDTHS = (32, 64, 96, 128, 192, 256, 384, 512)
"""What widths are rounded up to."""

KINDS = {"float16": "half", "bfloat16": "half", "float32": "float32", "float64": "float64"}
"""Dtypes whose kernels are equally fast have one name in a table."""

SOFTCAP, BIAS, OFFSETS, GATE, DROPOUT = 1, 2, 4, 8, 16
ALL_TERMS = 31
"""The score terms that a kernel is built for, as terms.cuh numbers them."""


class Tiling(NamedTuple):
    """How a kernel divides its work; see the sources for what the numbers are."""

    slices: int
    warps: int
    load: int
    step: int
    blocks: int

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return 16 * self.slices * self.warps


def rounded(width: int) -> int:
    """Return the width that kernels are built for."""
    return next(known for known in WIDTHS if known >= width)


FURTHER: dict[tuple[str, str, int], tuple[Tiling, ...]] = {
    ("forward", "half", 64): (Tiling(1, 4, 64, 64, 3), Tiling(2, 4, 64, 32, 2),
                              Tiling(2, 8, 64, 64, 1)),
    ("forward", "half", 128): (Tiling(1, 4, 64, 32, 2), Tiling(1, 8, 64, 64, 1),
                               Tiling(2, 4, 64, 16, 2)),
    ("packed", "half", 64): (Tiling(1, 2, 64, 64, 4), Tiling(1, 1, 64, 64, 4)),
    ("packed", "half", 128): (Tiling(1, 2, 64, 64, 3), Tiling(1, 1, 64, 64, 3)),
    ("keys", "half", 64): (Tiling(1, 4, 64, 32, 2),),
    ("queries", "half", 64): (Tiling(1, 4, 64, 32, 3),),
    ("queries", "half", 128): (Tiling(1, 4, 64, 32, 2), Tiling(2, 2, 64, 16, 4)),
    ("forward", "float32", 64): (Tiling(1, 4, 32, 32, 2), Tiling(1, 4, 32, 16, 2)),
    ("forward", "float32", 128): (Tiling(1, 4, 32, 16, 2),),
    ("keys", "float32", 64): (Tiling(1, 4, 32, 16, 2),),
    ("queries", "float32", 64): (Tiling(1, 4, 32, 16, 2),),
    ("forward", "float64", 64): (Tiling(1, 4, 16, 16, 2),),
}
"""Tilings beside those of the rules, by what they are for, kind of dtype and width: without score
terms, and with values as wide as keys."""

FILES = {"forward": "softmax_forward", "packed": "softmax_forward",
         "keys": "softmax_backward_keys", "queries": "softmax_backward_queries"}


@functools.lru_cache(maxsize=256)
def candidates(part: str, name: str, d: int, e: int, terms: int, shared: int, rows: int,
               rule: Tiling) -> list[Tiling]:
    """Return the tilings that a table may choose from: the rule first.

    All fit the shared memory, and have `rows` or more.
    """
    needed = forward_shared if FILES[part] == "softmax_forward" else backward_shared
    further = FURTHER.get((part, KINDS[name], d), ()) if d == e and not terms else ()
    return [rule, *(x for x in further
                    if x != rule and x.rows >= rows and needed(name, x, d, e) <= shared)]


def rule(part: str, name: str, width: int, shared: int) -> Tiling:
    """Return what the rules say for a part of `FURTHER`."""
    if FILES[part] == "softmax_forward":
        found = forward_tiling(name, width, width, 0, shared, part == "packed")
    else:
        columns = 2 * width if part == "keys" else width
        found = backward_tiling(name, width, width, columns, 0, shared)
    assert found is not None
    return found


def chunk_of_values(name: str, e: int) -> int:
    """Return how many columns of v a launch does: sums of more do not fit the registers."""
    return min(rounded(e), 128 if name == "float64" else 256)


@functools.lru_cache(maxsize=256)
def forward_tiling(name: str, d: int, e: int, terms: int, shared: int,
                   packed: bool = False) -> Tiling | None:
    """Return how the forward divides its work: the first tiling whose tiles fit shared memory."""
    wide = max(d, e)
    if name == "float64":
        choices = [Tiling(1, 4, 32, 32 if wide <= 64 and not terms else 16, 1),
                   Tiling(1, 4, 16, 16, 1), Tiling(1, 2, 16, 16, 1)]
    elif name == "float32":
        choices = [Tiling(1, 4, 64 if wide <= 64 else 32, 32, 1),
                   Tiling(1, 4, 32, 32, 1), Tiling(1, 2, 16, 16, 1)]
    elif wide <= 64 and not terms and not packed:
        choices = [Tiling(2, 4, 64, 64, 2)]
    else:
        step = (32 if terms else 64) if wide <= 128 else 16 if terms else 32
        choices = [Tiling(1, 4, 64, step, 2 if wide <= 128 else 1),
                   Tiling(1, 4, 32, min(step, 32), 1), Tiling(1, 2, 32, min(step, 32), 1),
                   Tiling(1, 2, 16, 16, 1)]
    return next((x for x in choices if forward_shared(name, x, d, e) <= shared), None)


def forward_shared(name: str, tiling: Tiling, d: int, e: int) -> int:
    """Return the bytes of shared memory that the forward needs."""
    panels = [-(-width * item_bytes(name) // 128) * 128 for width in (d, e)]
    return tiling.rows * panels[0] + 2 * tiling.load * sum(panels) + 8 * tiling.rows


def item_bytes(name: str) -> int:
    """Return the bytes of a number of a dtype."""
    return {"float64": 8, "float32": 4}.get(name, 2)


def kernel(name: str, file: str, tiling: Tiling, d: int, e: int, terms: int, **more: int) -> Kernel:
    """Return a kernel of `file`, which has one function of the same name."""
    macros = {"ELEMENT": ELEMENTS[name], "D": d, "E": e, "TERMS": terms, "SLICES": tiling.slices,
              "WARPS": tiling.warps, "LOAD": tiling.load, "STEP": tiling.step,
              "BLOCKS": tiling.blocks, "THREADS": 32 * tiling.warps, **more}
    return Kernel(f"{file}.cu", file, tuple(macros.items()), 32 * tiling.warps)


def simple_kernel(name: str, file: str) -> Kernel:
    """Return a kernel that works on rows, a warp each."""
    return Kernel(f"{file}.cu", file, (("ELEMENT", ELEMENTS[name]), ("THREADS", 128), ("TERMS", 0)),
                  128)


ROOM_OF_QUERIES = 192
"""Columns of sums that the kernel of dq has room for, as it keeps two numbers for each row."""


def sums_room(name: str, terms: int) -> int:
    """Return how many columns of sums the registers of a backward have room for."""
    if name == "float64":
        return 64
    if name == "float32":
        return 64 if terms else 128
    return 256


def column_chunk(name: str, width: int, terms: int, most: int = 256) -> int:
    """Return how many columns a launch sums: a part of the width that ends with a panel."""
    panel = max(16, 128 // item_bytes(name))
    width, room = rounded(width), min(most, sums_room(name, terms))
    return next(width // parts for parts in range(1, width)
                if width // parts <= room and width % parts == 0
                and (parts == 1 or width // parts % panel == 0))


@functools.lru_cache(maxsize=256)
def backward_tiling(name: str, d: int, e: int, columns: int, terms: int,
                    shared: int) -> Tiling | None:
    """Return how a backward kernel divides its work, if it sums so many columns."""
    if name == "float64":
        choices = [Tiling(1, 4, 16, 16, 1), Tiling(1, 2, 16, 16, 1)]
    elif name == "float32":
        choices = [Tiling(1, 4, 64 if columns <= 64 or terms else 32, 16, 1),
                   Tiling(1, 4, 32, 16, 1), Tiling(1, 4, 16, 16, 1), Tiling(1, 2, 16, 16, 1)]
    else:
        step = 16 if columns > 192 or (terms and columns > 128) else 32 if (
            terms or columns > 128) else 64
        choices = [Tiling(1, 4, 64, step, 2), Tiling(1, 4, 32, min(step, 32), 1),
                   Tiling(1, 4, 16, 16, 1), Tiling(1, 2, 16, 16, 1)]
    return next((x for x in choices if backward_shared(name, x, d, e) <= shared), None)


def backward_shared(name: str, tiling: Tiling, d: int, e: int) -> int:
    """Return the bytes of shared memory that a backward kernel needs."""
    panels = sum(-(-width * item_bytes(name) // 128) * 128 for width in (d, e))
    rows = 2 * 2 * tiling.load * (8 if name == "float64" else 4)
    return (tiling.rows + 2 * tiling.load) * panels + rows + 8 * tiling.rows


def launches_of_keys(name: str, d: int, e: int, terms: int) -> list[tuple[int, int, int, int]]:
    """Return for each launch the columns of dk and dv that it sums, and where these begin."""
    if rounded(d) + rounded(e) <= sums_room(name, terms):
        return [(rounded(d), rounded(e), 0, 0)]
    dk, dv = column_chunk(name, d, terms), column_chunk(name, e, terms)
    return [*((dk, 0, first, 0) for first in range(0, d, dk)),
            *((0, dv, 0, first) for first in range(0, e, dv))]


def terms_tiling(name: str, d: int, e: int, shared: int) -> Tiling | None:
    """Return how the gradients of terms are divided."""
    load = {"float64": 16, "float32": 32}.get(name, 64)
    choices = [Tiling(1, 4, load, 16, 1), Tiling(1, 4, 16, 16, 1), Tiling(1, 2, 16, 16, 1)]
    return next((x for x in choices if terms_shared(name, x, d, e) <= shared), None)


def terms_shared(name: str, tiling: Tiling, d: int, e: int) -> int:
    """Return the bytes of shared memory that the kernel of the terms' gradients needs."""
    panels = sum(-(-width * item_bytes(name) // 128) * 128 for width in (d, e))
    return (tiling.rows + tiling.load) * panels


def fits(name: str, d: int, e: int, shared: int) -> bool:
    """Whether every kernel that a forward and backward may need has a tiling."""
    return None not in (forward_tiling(name, d, chunk_of_values(name, e), ALL_TERMS, shared),
                        backward_tiling(name, d, e, 1, ALL_TERMS, shared),
                        terms_tiling(name, d, e, shared))


SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
"""Bytes of shared memory that a block may have, by architecture."""


def configurations() -> Iterator[tuple[Kernel, tuple[str, ...], str | None]]:
    """Yield kernels to be compiled and read: (kernel, architectures, an instruction it must have).

    All dtypes, widths that a dtype's tilings differ for, no terms and all; of what lies between,
    a few. And all that a table may choose.
    """
    for name, widths in (("bfloat16", (32, 64, 128, 256)), ("float16", (64, 128)),
                         ("float32", (64, 128)), ("float64", (64, 128))):
        for width, terms, architecture in itertools.product(widths, (0, ALL_TERMS), SHARED):
            if name != "bfloat16" and (architecture, terms) not in (("sm_80", 0),
                                                                     ("sm_90", ALL_TERMS)):
                continue
            for found in kernels(name, width, width, terms, SHARED[architecture]):
                yield found, (architecture,), "DMMA" if name == "float64" else "HMMA"
    for terms in (SOFTCAP, BIAS, OFFSETS, GATE, DROPOUT):
        for found in kernels("bfloat16", 128, 128, terms, SHARED["sm_90"]):
            yield found, ("sm_90",), "HMMA"
    for found in kernels("bfloat16", 192, 128, 0, SHARED["sm_80"]):
        yield found, ("sm_80",), "HMMA"
    for (part, kind, width), tilings in FURTHER.items():
        name = "bfloat16" if kind == "half" else kind
        sums: dict[str, dict[str, int]] = {
            "forward": {"PACKED": 0}, "packed": {"PACKED": 1}, "keys": {"DK": width, "DV": width},
            "queries": {"DQ": width}}
        for tiling in (rule(part, name, width, SHARED["sm_90"]), *tilings):
            yield (kernel(name, FILES[part], tiling, width, width, 0, **sums[part]), ("sm_90",),
                   "DMMA" if name == "float64" else "HMMA")
    for name, file in itertools.product(ELEMENTS, ("softmax_delta", "softmax_join")):
        yield simple_kernel(name, file), ("sm_80",), None


def kernels(name: str, d: int, e: int, terms: int, shared: int) -> Iterator[Kernel]:
    """Yield the kernels of forward and backward for some widths, as far as they are large."""
    for packed in (False, True):
        chunk = chunk_of_values(name, e)
        tiling = forward_tiling(name, d, chunk, terms, shared, packed)
        if tiling is not None and not (packed and terms):
            yield kernel(name, "softmax_forward", tiling, d, chunk, terms, PACKED=int(packed))
    for dk, dv, dk_from, dv_from in launches_of_keys(name, d, e, terms):
        tiling = backward_tiling(name, d, e, dk + dv, terms, shared)
        if tiling is not None and dk_from == dv_from == 0:
            yield kernel(name, "softmax_backward_keys", tiling, d, e, terms, DK=dk, DV=dv)
    chunk = column_chunk(name, d, terms, ROOM_OF_QUERIES)
    tiling = backward_tiling(name, d, e, chunk, terms, shared)
    if tiling is not None:
        yield kernel(name, "softmax_backward_queries", tiling, d, e, terms, DQ=chunk)
    tiling = terms_tiling(name, d, e, shared)
    if tiling is not None and terms:
        yield kernel(name, "softmax_backward_terms", tiling, d, e, terms)
