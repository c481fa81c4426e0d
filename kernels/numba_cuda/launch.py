"""From a `Problem` to the arguments of kernels, their grids and their results.

What the host knows (runs, layouts, lengths, positions) is copied to the device once, and found
again by content. Nothing is waited for. Every result is written by some kernel in every place, so
that none has to be cleared beforehand.
"""

from __future__ import annotations

import collections
import math
from typing import Any

import numpy as np

from pyattn.arrays import Array, dtype_name, namespace

from . import backward as backward_kernels
from . import device, pairs, terms
from .device import Device
from .forward import forward as forward_kernel
from .tiling import Tiling, backward_tiling, forward_tiling

Runs = collections.namedtuple("Runs", "start first length tile names")
"""The runs of a BlockMask; `length` is how many tiles each has."""

Inputs = collections.namedtuple("Inputs", (
    "q k v scale sinks bias bias_item gate gate_item offsets "
    "rows columns bits layout q_lengths kv_lengths q_positions k_positions streams "
    "softcap ramp keep "
    "has_sinks has_bias has_offsets gate_form gate_block shift origin "
    "dropping threshold seed_low seed_high"))
"""The problem as all kernels take it. Terms have stride 0 along what they are broadcast along."""

Output = collections.namedtuple("Output", "out lse")
Rows = collections.namedtuple("Rows", "dout lse delta")
Delta = collections.namedtuple("Delta", "dout out lse dlse has_dlse")
Deltas = collections.namedtuple("Deltas", "delta")
ByQueries = collections.namedtuple("ByQueries", "dq sums")
ByKeys = collections.namedtuple("ByKeys", "dk dv column_sums")
ByTiles = collections.namedtuple("ByTiles", "gradient item heads block")
ByDistance = collections.namedtuple("ByDistance", "tables")
Cells = collections.namedtuple("Cells", "parts gradient n m block")
Summed = collections.namedtuple("Summed", "sums kind item gradient block")
Joined = collections.namedtuple("Joined", "tables gradient")

SCALE, BIAS, GATE = range(3)
"""The sums for each query that `by_queries` leaves; those for each key are BIAS - 1, GATE - 1."""

TABLE_NUMBERS = 2**22
"""Numbers that the tables of `by_distance` have together, at most, if there is more than one."""

PARTS = 32
"""Tables for each head, at most."""


def accumulator(x: Array) -> Any:
    """Return the dtype that sums are carried in."""
    return np.float64 if dtype_name(x) == "float64" else np.float32


def inputs(problem: Any, on: Device) -> Inputs:
    """Return the arguments that all kernels share."""
    number = accumulator(problem.q)
    _, heads, n, _ = problem.q.shape
    m = problem.k.shape[2]
    blocks, form = problem.blocks, problem.gate_form
    nothing = on.constant(np.zeros((1, 1, 1, 1), number))
    nobody = on.constant(np.zeros(1, np.int32))
    nowhere = on.constant(np.zeros((1, 1), np.int64))

    def positions(x: np.ndarray | None) -> Any:
        return nowhere if x is None else on.constant(x.astype(np.int64))

    def item(term: Any) -> Any:
        return nobody if term is None else on.constant(term.item)

    gate, gate_form, block = nothing, pairs.NO_GATE, 1
    if problem.gate is not None:
        array = problem.gate.array
        if form.by_offset:
            gate_form, shape = pairs.BY_OFFSET, (1, array.shape[3])
        elif form.ramp:
            gate_form, shape = pairs.RAMP, (n, 1)
        elif form.block > 1:
            block = form.block
            gate_form, shape = pairs.IN_BLOCKS, (-(-n // block), -(-m // block))
        else:
            gate_form, shape = pairs.BY_STRIDES, (n, m)
        gate = on.view(broadcast(array, (array.shape[0], heads, *shape)))
    bias, offsets = nothing, on.constant(np.zeros((1, 1), number))
    if problem.bias is not None:
        array = problem.bias.array
        bias = on.view(broadcast(array, (array.shape[0], heads, n, m)))
    if problem.offsets is not None:
        offsets = on.view(broadcast(problem.offsets, (heads, problem.offsets.shape[1])))
    seed = int(problem.dropout_seed)
    return Inputs(
        q=on.view(problem.q), k=on.view(problem.k), v=on.view(problem.v),
        scale=on.view(problem.scale),
        sinks=on.view(problem.scale if problem.sinks is None else problem.sinks),
        bias=bias, bias_item=item(problem.bias), gate=gate, gate_item=item(problem.gate),
        offsets=offsets,
        **on.kept(blocks, lambda: _blocks(blocks, on)),
        layout=on.constant(problem.layout),
        q_lengths=on.constant(problem.q_lengths), kv_lengths=on.constant(problem.kv_lengths),
        q_positions=positions(problem.q_positions), k_positions=positions(problem.k_positions),
        streams=positions(problem.streams),
        softcap=number(problem.softcap or 0), ramp=number(form.ramp or 1),
        keep=number(1 / (1 - problem.dropout)),
        has_sinks=problem.sinks is not None, has_bias=problem.bias is not None,
        has_offsets=problem.offsets is not None, gate_form=gate_form, gate_block=block,
        shift=form.shift, origin=problem.offset_origin,
        dropping=problem.dropout > 0, threshold=int(problem.dropout * 2.0**32),
        seed_low=seed & 0xFFFFFFFF, seed_high=seed >> 32)


def _blocks(blocks: Any, on: Device) -> dict[str, Any]:
    """Return the runs and bits of a BlockMask on the device."""
    rows, columns = (Runs(*(on.constant(x) for x in runs))
                     for runs in (blocks.rows, blocks.columns))
    # byte x of row i of a tile has columns 8x to 8x + 7
    words = np.ascontiguousarray(blocks.bits, dtype="<u8")
    return {"rows": rows, "columns": columns,
            "bits": on.constant(words.view(np.uint8).reshape(*words.shape, 8))}


def broadcast(x: Array, shape: tuple[int, ...]) -> Array:
    """Return a view of `x` with stride 0 along axes of length 1 that are longer in `shape`."""
    return namespace(x).broadcast_to(x, shape)


def forward(problem: Any) -> tuple[Array, Array]:
    """Return out (B, H, N, E), in the dtype of q unless it is to be summed, and lse (B, H, N)."""
    on, number = device.of(problem.q), accumulator(problem.q)
    p = inputs(problem, on)
    batch, heads, n, _ = problem.q.shape
    e = problem.v.shape[3]
    tiling = forward_tiling(number, e)
    out = on.empty((batch, heads, n, e), _result_dtype(problem, "out", problem.q))
    lse = on.empty((batch, heads, n), number)
    on.launch(forward_kernel(tiling), _blocks_of(batch * heads, n, tiling.rows, e, tiling),
              tiling.threads, p, Output(on.view(out), on.view(lse)))
    return out, lse


def delta(dout: Array, out: Array, lse: Array, dlse: Array | None) -> Array:
    """Return rowsum(dout * out) - dlse, (B, H, N)."""
    on, number = device.of(out), accumulator(out)
    batch, heads, n, _ = out.shape
    tiling = backward_tiling(number, 1)
    found = on.empty((batch, heads, n), number)
    rows = Delta(on.view(dout), on.view(out), on.view(lse), on.view(lse if dlse is None else dlse),
                 dlse is not None)
    on.launch(backward_kernels.delta(tiling), batch * heads * -(-n // tiling.rows), tiling.threads,
              rows, Deltas(on.view(found)))
    return found


def backward(problem: Any, dout: Array, lse: Array, delta: Array) -> dict[str, Array]:
    """Return the gradients by name."""
    on, number = device.of(problem.q), accumulator(problem.q)
    p = inputs(problem, on)
    batch, heads, n, d = problem.q.shape
    groups, m, e = problem.v.shape[1:]
    rows = Rows(on.view(dout), on.view(lse), on.view(delta))
    grads = {name: on.empty(getattr(problem, name).shape,
                            _result_dtype(problem, name, getattr(problem, name)))
             for name in ("q", "k", "v")}

    tiling = backward_tiling(number, d)
    sums = on.empty((3, batch, heads, n), number)
    on.launch(backward_kernels.by_queries(tiling),
              _blocks_of(batch * heads, n, tiling.rows, d, tiling), tiling.threads, p, rows,
              ByQueries(on.view(grads["q"]), on.view(sums)))
    by_column = any(term is not None and _form(term, problem, name) == "columns"
                    for name, term in (("bias", problem.bias), ("gate", problem.gate)))
    tiling = backward_tiling(number, max(d, e))
    column_sums = on.empty((2 if by_column else 0, batch, heads, m), number)
    on.launch(backward_kernels.by_keys(tiling),
              _blocks_of(batch * groups, m, tiling.columns, max(d, e), tiling), tiling.threads,
              p, rows, ByKeys(on.view(grads["k"]), on.view(grads["v"]), on.view(column_sums)))

    scale = on.empty((1, heads, 1), number)
    everyone = on.constant(np.zeros(batch, np.int32))
    _sum_cells(on, sums, SCALE, everyone, scale, max(n, 1))
    grads["scale"] = scale[0, :, 0]
    if problem.bias is not None:
        grads["bias"] = _term(on, problem, p, rows, "bias", sums, column_sums)
    if problem.gate is not None and not problem.gate_form.by_offset:
        grads["gate"] = _term(on, problem, p, rows, "gate", sums, column_sums)
    elif problem.gate is not None:
        _, own_heads, _, width = problem.gate.array.shape
        grads["gate"] = _table(on, problem, p, rows, own_heads, width, of_gate=True)
    if problem.offsets is not None:
        grads["offsets"] = _table(on, problem, p, rows, *problem.offsets.shape, of_gate=False)
    return grads


def _result_dtype(problem: Any, name: str, x: Array) -> Any:
    """Return the dtype of a result: that of its argument, unless it is added to others."""
    return accumulator(x) if name in problem.summed else x.dtype


def _blocks_of(heads: int, length: int, tile: int, width: int, tiling: Tiling) -> int:
    """Return how many blocks there are for heads, tiles along a length, and slices of a width."""
    return heads * -(-length // tile) * -(-width // tiling.width)


def _form(term: Any, problem: Any, name: str) -> str:
    """Return whose sums a gradient is made of: of rows, of columns, or of pairs."""
    if name == "gate" and problem.gate_form.ramp:
        return "rows"
    _, _, n, m = term.array.shape
    if m == 1:
        return "rows"
    return "columns" if n == 1 else "pairs"


def _term(on: Device, problem: Any, p: Inputs, rows: Rows, name: str, sums: Array,
          column_sums: Array) -> Array:
    """Return the gradient of a bias or gate, in the shape of its array."""
    number, term = accumulator(problem.q), getattr(problem, name)
    items, own_heads, own_n, own_m = shape = term.array.shape
    n, m = problem.q.shape[2], problem.k.shape[2]
    block = problem.gate_form.block if name == "gate" else 1
    item, form = on.constant(term.item), _form(term, problem, name)
    gradient = on.empty(shape, number)
    if form == "pairs":
        tiling = backward_tiling(number, 1)
        tiles = -(-n // tiling.rows) * -(-m // tiling.columns)
        target, cells = gradient, 1
        if block > 1:
            cells = (max(tiling.rows, tiling.columns) - 2) // block + 2
            target = on.empty((items * own_heads * tiles, 1, cells, cells), number)
        view = on.view(target)
        kernel = terms.by_tiles(tiling, of_gate=name == "gate")
        on.launch(kernel, items * own_heads * tiles, tiling.threads, p, rows,
                  ByTiles(view, item, own_heads, block))
        if block > 1:
            on.launch(terms.join_cells(tiling), -(-math.prod(shape) // terms.THREADS),
                      terms.THREADS, Cells(view, on.view(gradient), n, m, block))
        return gradient
    source, place, length, cells = ((sums, 0, n, own_n) if form == "rows" else
                                    (column_sums, 1, m, own_m))
    kind = (BIAS if name == "bias" else GATE) - place
    flat = gradient.reshape(items, own_heads, cells)
    _sum_cells(on, source, kind, item, flat, max(length, 1) if cells == 1 else block)
    return gradient


def _sum_cells(on: Device, sums: Array, kind: int, item: Any, gradient: Array,
               block: int) -> None:
    """Add up the sums of a kind, (B, H, L), to a gradient (items, heads, cells)."""
    on.launch(terms.sum_cells, math.prod(gradient.shape), terms.THREADS,
              Summed(on.view(sums), kind, item, on.view(gradient), block))


def _table(on: Device, problem: Any, p: Inputs, rows: Rows, own_heads: int, width: int, *,
           of_gate: bool) -> Array:
    """Return the gradient (heads, W) of a table by offset."""
    number = accumulator(problem.q)
    batch, heads, n, _ = problem.q.shape
    tiling = backward_tiling(number, 1)
    parts = max(1, min(PARTS, batch * -(-n // tiling.rows),
                       TABLE_NUMBERS // max(1, heads * width)))
    tables = on.empty((parts, heads, width), np.float64)
    on.launch(terms.by_distance(tiling, of_gate=of_gate), parts * heads, tiling.threads, p, rows,
              ByDistance(on.view(tables)))
    gradient = on.empty((own_heads, width), number)
    on.launch(terms.join_tables, -(-own_heads * width // terms.THREADS), terms.THREADS,
              Joined(on.view(tables), on.view(gradient)))
    return gradient
