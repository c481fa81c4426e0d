"""Tiled softmax attention on CuPy arrays, by CUDA C++ kernels.

Any dtype, width, mask and score term: the kernels are built for what a problem has, at its first
call. Widths are rounded up to those of WIDTHS, and columns beyond are zeros in shared memory. What
the kernels for Hopper take, on such a GPU, goes to these (hopper.py).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from pyattn.arrays import Array, dtype_name

from . import device as devices
from . import hopper, term_gradients, tuning
from .layout import (
    OPERAND,
    TILE,
    Keeper,
    as_sums,
    fields,
    lists,
    operand,
    readable,
    roomy,
    struct,
    structs,
    sum_type,
    term,
)
from .tilings import (
    ALL_TERMS,
    BIAS,
    DROPOUT,
    GATE,
    KINDS,
    OFFSETS,
    ROOM_OF_QUERIES,
    SOFTCAP,
    WIDTHS,
    Tiling,
    backward_shared,
    backward_tiling,
    candidates,
    chunk_of_values,
    column_chunk,
    fits,
    forward_shared,
    forward_tiling,
    kernel,
    launches_of_keys,
    rounded,
    simple_kernel,
    terms_shared,
    terms_tiling,
)
from .walk import pattern

INDEXED = False

SPLITS = ((4, 1), (2, 1), (8, 1), (2, 2), (4, 2), (4, 4))
"""Tiles of keys that a split has at least, and how many blocks a multiprocessor is to have: what a
table may choose from, the rule first."""

PACKED_ROWS = (16, 32, 64)
"""Queries of all heads of a group, rounded up: what classes of a table tell apart."""


def refuses(problem: Any) -> str | None:
    """Why `problem` cannot run here, or None."""
    p = problem
    reason = devices.missing(p.q)
    if reason is not None:
        return reason
    if 0 in p.q.shape[:3]:
        return None
    device = devices.of(p.q)
    d, e = p.q.shape[3], p.v.shape[3]
    if max(d, e) > WIDTHS[-1]:
        return f"widths must be at most {WIDTHS[-1]}; q and k have {d}, v has {e}"
    name = dtype_name(p.q)
    if not fits(name, rounded(d), rounded(e), device.shared_memory):
        return (f"a block of {name} with widths {d} and {e} does not fit the "
                f"{device.shared_memory} bytes of shared memory that {device.name} has")
    return None


def terms_of(p: Any) -> int:
    """Return which score terms a problem has."""
    return (SOFTCAP * (p.softcap is not None) + BIAS * (p.bias is not None)
            + OFFSETS * (p.offsets is not None) + GATE * (p.gate is not None)
            + DROPOUT * (p.dropout > 0))


class Call(Keeper):
    """A problem as launches need it: device, dtype, and arrays that kernels can read."""

    def __init__(self, p: Any) -> None:
        super().__init__(devices.of(p.q))
        self.p, self.name = p, dtype_name(p.q)
        self.sums = sum_type(self.name)
        self.batch, self.heads, self.n, self.d = p.q.shape
        _, self.groups, self.m, self.e = p.v.shape
        self.q, self.k, self.v = (readable(self.device, x) for x in (p.q, p.k, p.v))
        self.structs = structs(self.sums)
        self.terms = ALL_TERMS if self.device.generic and terms_of(p) else terms_of(p)

    def tiling(self, part: str, e: int, rule: Tiling | None, kind: object = "", *,
               rows: int = 0) -> Tiling:
        """Return what a table says for `part` and a `kind` of problem, or else the rule."""
        assert rule is not None
        d = rounded(self.d)
        found = candidates(part, self.name, d, e, self.terms, self.device.shared_memory, rows,
                           rule)
        if len(found) == 1:
            return rule
        return tuning.chosen(self.device, f"{part} {KINDS[self.name]} {d} {kind}".strip(), found)

    def problem(self, rows: int, transposed: bool = False) -> np.ndarray:
        """Return the problem's struct; lines of the mask have `rows` tiles."""
        p = self.p
        record = np.zeros((), self.structs["problem"])
        for name, x in (("q", self.q), ("k", self.k), ("v", self.v)):
            record[name] = operand(self.device, x)
        record["lists"] = lists(self, p.blocks, p.layout, rows, transposed)
        record["q_lengths"] = self.constant(p.q_lengths)
        record["kv_lengths"] = self.constant(p.kv_lengths)
        for name in ("batch", "heads", "groups", "n", "m", "d", "e"):
            record[name] = getattr(self, name)
        record["scores"] = self.scores
        return record

    @functools.cached_property
    def scores(self) -> np.ndarray:
        """What is added to products and what multiplies weights."""
        p, record = self.p, np.zeros((), self.structs["scores"])
        record["scale"] = self.address(as_sums(p.scale, self.name).copy())
        record["softcap"] = p.softcap or 0.0
        record["gate_block"] = 1
        for name, given in (("bias", p.bias), ("gate", p.gate)):
            if given is not None:
                record[name] = term(self, as_sums(given.array, self.name), given.item)
        if p.gate is not None:
            form = p.gate_form
            record["gate_block"], record["gate_shift"] = form.block, form.shift
            record["gate_ramp"] = form.ramp
            record["gate_width"] = p.gate.array.shape[3] if form.by_offset else 0
        if p.offsets is not None:
            table = as_sums(p.offsets, self.name)
            if table.strides[1] != table.itemsize:
                table = table.copy()
            record["offsets"] = self.address(table)
            record["offsets_h"] = 0 if len(table) == 1 else table.strides[0] // table.itemsize
            record["offsets_width"] = table.shape[1]
        record["offset_origin"] = p.offset_origin
        if p.dropout:
            record["threshold"] = np.uint32(p.dropout * 2.0**32)
            record["seed_low"], record["seed_high"] = (p.dropout_seed & 0xFFFFFFFF,
                                                       p.dropout_seed >> 32)
            record["keep"] = 1 / (1 - p.dropout)
        for name in ("q_positions", "k_positions", "streams"):
            x = getattr(p, name)
            if x is not None:
                record[name] = self.constant(x)
                record[f"{name}_b"] = 0 if len(x) == 1 else x.shape[1]
        return record


def forward(problem: Any) -> tuple[Array, Array]:
    """Return out (B, H, N, E) in the dtype of q, or in acc if it is summed; and lse (B, H, N)."""
    if hopper.refuses(problem) is None:
        return hopper.forward(problem)
    p, call = problem, Call(problem)
    device, acc = call.device, np.dtype(call.sums)
    wide = "out" in p.summed
    out = roomy(device, (call.batch, call.heads, call.n, call.e), acc if wide else p.q.dtype)
    lse = device.empty(out.shape[:3], acc)
    sinks = None if p.sinks is None else as_sums(p.sinks, call.name).copy()
    if 0 in out.shape[:3]:
        return out, lse

    chunk = chunk_of_values(call.name, call.e)
    what = call.name, rounded(call.d), chunk, call.terms, device.shared_memory
    rule = forward_tiling(*what, packed=True)
    packed = rule is not None and is_packed(call, rule.rows)
    if packed:
        rows = call.heads // call.groups * call.n
        rows = next(most for most in PACKED_ROWS if rows <= most)
        tiling = call.tiling("packed", chunk, rule, rows, rows=rows)
    else:
        tiling = call.tiling("forward", chunk, forward_tiling(*what), pattern(p.blocks))
    lines = call.groups if packed else call.heads * -(-call.n // tiling.rows)
    splits, tiles = divide(call, call.batch * lines)
    row = out.strides[2] // out.itemsize
    if splits > 1:
        parts = device.empty((splits, *out.shape[:3], row), acc)
        part_lse = device.empty((splits, *lse.shape), acc)

    arguments = np.zeros((), struct(
        ("problem", call.structs["problem"]), ("out", OPERAND), *fields("u8", "wide_out lse sinks"),
        *fields("i4", "splits tiles_of_split width")))
    whole = call.problem(max(1, tiling.rows // TILE))
    for first in range(0, call.e, chunk):
        own = slice(first, min(first + chunk, call.e))
        arguments["problem"] = whole
        arguments["problem"]["v"] = operand(device, call.v[..., own])
        arguments["problem"]["e"] = own.stop - own.start
        arguments["splits"], arguments["tiles_of_split"], arguments["width"] = splits, tiles, row
        if splits > 1:
            arguments["wide_out"] = device.address(parts[..., own])
            arguments["lse"] = device.address(part_lse)
        else:
            arguments["out"] = operand(device, out[..., own])
            arguments["wide_out"] = device.address(out[..., own]) if wide else 0
            arguments["lse"] = device.address(lse)
            arguments["sinks"] = call.address(sinks)
        device.launch(kernel(call.name, "softmax_forward", tiling, rounded(call.d), chunk,
                             call.terms, PACKED=int(packed)),
                      (call.batch * lines, splits, 1), arguments,
                      forward_shared(call.name, tiling, rounded(call.d), chunk))
    if splits > 1:
        join(call, parts, part_lse, out, lse, sinks, wide)
    return out, lse


def backward(problem: Any, dout: Array, lse: Array, delta: Array) -> dict[str, Array]:
    """Return the gradients by argument; lse and delta (B, H, N) are those of the merged result."""
    lse, delta = (contiguous(as_sums(x, dtype_name(problem.q))) for x in (lse, delta))
    if hopper.refuses(problem, "backward") is None:
        return hopper.backward(problem, dout, lse, delta)
    p, call = problem, Call(problem)
    device, acc = call.device, np.dtype(call.sums)
    found = {name: roomy(device, getattr(p, name).shape, acc if name in p.summed else p.q.dtype)
             for name in ("q", "k", "v")}
    if 0 in p.q.shape[:3] or call.m == 0:
        for x in found.values():
            x[...] = 0
        return found | {"scale": device.zeros((call.heads,), acc)} | gradients_of_terms(
            call, dout, lse, delta)
    dout = readable(device, dout)
    launch_keys(call, found, dout, lse, delta)
    found["scale"] = launch_queries(call, found, dout, lse, delta)
    return found | gradients_of_terms(call, dout, lse, delta)


def launch_keys(call: Call, found: dict[str, Array], dout: Array, lse: Array,
                delta: Array) -> None:
    """Compute the gradients of k and v."""
    device, d, e = call.device, rounded(call.d), rounded(call.e)
    arguments = np.zeros((), struct(
        ("problem", call.structs["problem"]), ("dout", OPERAND), ("dk", OPERAND), ("dv", OPERAND),
        *fields("u8", "wide_dk wide_dv lse delta"),
        *fields("i4", "dk_width dv_width dk_from dv_from")))
    arguments["problem"] = call.problem(1, transposed=True)
    arguments["dout"] = operand(device, dout)
    arguments["lse"], arguments["delta"] = device.address(lse), device.address(delta)
    for name in ("k", "v"):
        put_result(call, arguments, f"d{name}", found[name], wide=name in call.p.summed)
    for dk, dv, dk_from, dv_from in launches_of_keys(call.name, call.d, call.e, call.terms):
        tiling = call.tiling("keys", e, backward_tiling(call.name, d, e, dk + dv, call.terms,
                                                        device.shared_memory))
        arguments["dk_from"], arguments["dv_from"] = dk_from, dv_from
        device.launch(kernel(call.name, "softmax_backward_keys", tiling, d, e, call.terms, DK=dk,
                             DV=dv),
                      call.batch * call.groups * -(-call.m // tiling.rows), arguments,
                      backward_shared(call.name, tiling, d, e))


def launch_queries(call: Call, found: dict[str, Array], dout: Array, lse: Array,
                   delta: Array) -> Array:
    """Compute the gradient of q; return that of the scale, (H,)."""
    device, d, e = call.device, rounded(call.d), rounded(call.e)
    chunk = column_chunk(call.name, call.d, call.terms, ROOM_OF_QUERIES)
    tiling = call.tiling("queries", e, backward_tiling(call.name, d, e, chunk, call.terms,
                                                       device.shared_memory))
    arguments = np.zeros((), struct(
        ("problem", call.structs["problem"]), ("dout", OPERAND), ("dq", OPERAND),
        *fields("u8", "wide_dq lse delta dscale"), *fields("i4", "dq_width dq_from")))
    arguments["problem"] = call.problem(1)
    arguments["dout"] = operand(device, dout)
    arguments["lse"], arguments["delta"] = device.address(lse), device.address(delta)
    put_result(call, arguments, "dq", found["q"], wide="q" in call.p.summed)
    starts = range(0, call.d, chunk)
    dscale = device.empty((len(starts), *lse.shape), np.dtype(call.sums))
    for number, first in enumerate(starts):
        arguments["dq_from"], arguments["dscale"] = first, device.address(dscale[number])
        device.launch(kernel(call.name, "softmax_backward_queries", tiling, d, e, call.terms,
                             DQ=chunk),
                      call.batch * call.heads * -(-call.n // tiling.rows), arguments,
                      backward_shared(call.name, tiling, d, e))
    return dscale.sum((0, 1, 3))


def put_result(call: Call, arguments: np.ndarray, name: str, x: Array, *, wide: bool) -> None:
    """Tell a kernel where a gradient goes: as it is, or in acc where it is `wide`."""
    arguments[name] = operand(call.device, x)
    arguments[f"wide_{name}"] = call.device.address(x) if wide else 0
    arguments[f"{name}_width"] = x.strides[2] // x.itemsize


def gradients_of_terms(call: Call, dout: Array, lse: Array, delta: Array) -> dict[str, Array]:
    """Return the gradients of bias, gate and offsets, where given."""
    p, device, acc = call.p, call.device, np.dtype(call.sums)
    wanted = 2 * device.multiprocessors
    found: dict[str, Array] = {}

    def add_up(pieces: term_gradients.Pieces, of_gate: bool) -> Array:
        return launch_terms(call, pieces, of_gate, dout, lse, delta)

    def of_table(name: str, shape: tuple[int, int]) -> Array:
        table = term_gradients.of_table(add_up, device, p, shape, name == "gate", wanted, acc)
        # packed sequences, whose tiles have no diagonals
        return table if table is not None else slow()[name]

    @functools.cache
    def slow() -> dict[str, Array]:
        from pyattn.kernels.array_api import softmax

        return softmax.backward(p, dout, lse, delta)

    if p.bias is not None:
        found["bias"] = term_gradients.of_array(add_up, device, p, p.bias, 1, False, wanted, acc)
    if p.gate is not None and p.gate_form.by_offset:
        _, heads, _, width = p.gate.array.shape
        found["gate"] = of_table("gate", (heads, width))
    elif p.gate is not None:
        found["gate"] = term_gradients.of_array(add_up, device, p, p.gate, p.gate_form.block, True,
                                                wanted, acc)
        if p.gate_form.ramp:
            # forward: gate = clip((ramp + span - distance) / ramp, 0, 1)
            found["gate"] = found["gate"] / acc.type(p.gate_form.ramp)
    if p.offsets is not None:
        found["offsets"] = of_table("offsets", p.offsets.shape)
    return found


def launch_terms(call: Call, pieces: term_gradients.Pieces, of_gate: bool, dout: Array, lse: Array,
                 delta: Array) -> Array:
    """Return the sums (P, 64, 64) of pieces."""
    device, d, e = call.device, rounded(call.d), rounded(call.e)
    tiling = terms_tiling(call.name, d, e, device.shared_memory)
    assert tiling is not None
    sums = device.empty((len(pieces.pieces), TILE, TILE), np.dtype(call.sums))
    arguments = np.zeros((), struct(
        ("problem", call.structs["problem"]), ("dout", OPERAND),
        *fields("u8", "lse delta pieces tiles pairs sums"), *fields("i4", "of_gate")))
    arguments["problem"] = call.problem(1)
    arguments["dout"] = operand(device, dout)
    for name, x in (("lse", lse), ("delta", delta), ("sums", sums)):
        arguments[name] = device.address(x)
    for name in ("pieces", "tiles", "pairs"):
        arguments[name] = call.constant(getattr(pieces, name))
    arguments["of_gate"] = of_gate
    device.launch(kernel(call.name, "softmax_backward_terms", tiling, d, e, call.terms),
                  (len(pieces.pieces), TILE // tiling.rows, 1), arguments,
                  terms_shared(call.name, tiling, d, e))
    return sums


def is_packed(call: Call, rows: int) -> bool:
    """Whether all queries of a group's heads share a block of `rows`, and have one mask."""
    share = call.heads // call.groups
    layout = call.p.layout.reshape(call.batch, call.groups, share)
    few = share * call.n <= min(rows, TILE)
    return 1 < share and few and bool((layout == layout[..., :1]).all())


def divide(call: Call, blocks: int) -> tuple[int, int]:
    """Return into how many splits the keys are divided, and how many tiles each has."""
    tiles = max(1, -(-call.m // TILE))
    least, filled = tuning.chosen(call.device, f"split {KINDS[call.name]} {rounded(call.d)}",
                                  SPLITS)
    wanted = filled * call.device.multiprocessors // max(1, blocks)
    splits = max(1, min(wanted, tiles // least))
    each = -(-tiles // splits)
    return -(-tiles // each), each


def join(call: Call, parts: Array, part_lse: Array, out: Array, lse: Array, sinks: Array | None,
         wide: bool) -> None:
    """Join what the splits found."""
    device = call.device
    arguments = np.zeros((), struct(
        *fields("u8", "wide_out split_lse"), ("out", OPERAND),
        *fields("u8", "out_as_sum lse sinks"), *fields("i4", "splits batch heads n e width")))
    arguments["wide_out"], arguments["split_lse"] = device.address(parts), device.address(part_lse)
    arguments["out"], arguments["lse"] = operand(device, out), device.address(lse)
    arguments["out_as_sum"] = device.address(out) if wide else 0
    arguments["sinks"] = call.address(sinks)
    for name, value in (("splits", len(parts)), ("batch", call.batch), ("heads", call.heads),
                        ("n", call.n), ("e", call.e), ("width", parts.shape[-1])):
        arguments[name] = value
    launch_rows(call, "softmax_join", arguments, math.prod(lse.shape))


def launch_rows(call: Call, file: str, arguments: np.ndarray, rows: int) -> None:
    """Launch a kernel that gives a warp to each row."""
    found = simple_kernel(call.name, file)
    call.device.launch(found, -(-rows * 32 // found.threads), arguments, 0)


def delta(dout: Array, out: Array, lse: Array, dlse: Array | None) -> Array:
    """Return rowsum(dout * out) - dlse, (B, H, N); 0 in rows that see no key."""
    device, name = devices.of(dout), dtype_name(dout)
    acc = np.dtype(sum_type(name))
    found = device.empty(lse.shape, acc)
    if 0 in lse.shape:
        return found
    arguments = np.zeros((), struct(
        ("dout", OPERAND), ("out", OPERAND), *fields("u8", "lse dlse delta"),
        *fields("i4", "batch heads n e")))
    held = [contiguous(as_sums(x, name)) for x in (lse, dlse) if x is not None]
    # a row is read number by number, but they must lie side by side
    for field, x in (("dout", dout), ("out", out)):
        x = x if x.shape[3] == 1 or x.strides[3] == x.itemsize else x.copy()
        held.append(x)
        arguments[field] = operand(device, x)
    arguments["lse"], arguments["delta"] = device.address(held[0]), device.address(found)
    arguments["dlse"] = 0 if dlse is None else device.address(held[1])
    for field, value in zip(("batch", "heads", "n", "e"), dout.shape, strict=True):
        arguments[field] = value
    kernel_ = simple_kernel(name, "softmax_delta")
    device.launch(kernel_, -(-math.prod(lse.shape) * 32 // kernel_.threads), arguments, 0)
    return found


def contiguous(x: Array) -> Array:
    """Return `x`, or a copy if its numbers do not lie side by side."""
    return x if x.flags.c_contiguous else x.copy()


def weights(problem: Any, lse: Array) -> Array:
    """Return the probabilities (B, H, N, M), before dropout."""
    from pyattn.kernels.array_api import softmax

    return softmax.weights(problem, lse)
