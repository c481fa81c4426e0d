"""Tiled softmax attention on NumPy arrays: forward, backward, weights.

A bias of -inf and a gate of exactly 0 mask a pair, as the BlockMask and the lengths do: what lies
behind it is never looked at, with one exception. The gradient of a closed gate is what opening it
would change, so it does meet the values behind.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np

from . import threads, tuning
from .compile import native
from .job import (
    HELPER_FLOPS,
    SOURCE_CODES,
    TILE,
    Geometry,
    Job,
    backward_scratch,
    forward_scratch,
    geometry_of,
    kind_of,
    sections,
)
from .memory import CACHE_LINE, address
from .ownership import UNITS, Pieces, TableGradient, TermGradient
from .records import DELTA

INDEXED = True

GROUP_BYTES = 2**18
"""Packed keys and values of a group that fit in the cache beside the queries."""

PAIR_BYTES = 2**21
"""What is packed of a group's queries for the backward, if it is to stay in the cache."""

DELTA_FLOPS = 128.0
"""How many operations of a product take as long as a number of `delta`, which waits for memory."""

SPLIT_TILES = 8
"""Tiles of keys that a split has at least."""


def refuses(problem: Any) -> str | None:
    """Say why `problem` cannot run here; there is no such reason today."""
    return None


def forward(problem: Any, onto: tuple[np.ndarray, np.ndarray] | None = None,
            ) -> tuple[np.ndarray, np.ndarray]:
    """Return out (B, H, N, E) in the dtype of q, and lse (B, H, N)."""
    g = geometry_of(problem)
    plan = forward_plan(g, short=onto is None and is_short(problem, g),
                        gated=problem.gate is not None, chunk=tuning.table().chunk[g.kind])
    job = Job(problem, g, plan.record)
    if onto is None:
        shape = (*problem.q.shape[:3], g.e)
        given = g.dtype if "out" in problem.summed else problem.q.dtype.newbyteorder("=")
        out = empty(shape, given, problem.q_index)
        lse = (np.empty(shape[:3], g.dtype) if problem.q_index is None else
               np.full(shape[:3], -np.inf, g.dtype))
    else:
        out, lse = onto
    job.describe_result("out", out, onto is not None)
    job.put("lse", address(lse), *lse.strides[:2])
    groups = g.batch * g.groups
    if plan.kernel == "decode.decode":
        if plan.splits > 1:
            job.put("parts", job.empty(plan.units * plan.part_bytes, dtype=np.uint8))
        job.run(plan.kernel, plan.units, plan.scratch,
                64.0 * groups * g.m * (g.d + g.e))
        if plan.splits > 1:
            job.run("decode.join", groups, plan.scratch)
    else:
        if not plan.per_group:
            tiles, each = groups * g.key_tiles, g.operand.itemsize
            pack_all(job, "k", tiles, g.d_depth, each, "columns")
            pack_all(job, "v", tiles, g.e_padded, each, "pairs" if g.fold > 1 else "rows")
        job.run(plan.kernel, plan.units, plan.scratch, job.flops)
    return out, lse


def is_short(p: Any, g: Geometry) -> bool:
    """Whether a group has so few queries that keys are better read where they lie."""
    return (0 < g.heads // max(1, g.groups) * g.n <= tuning.table().short[g.kind]
            and g.m > 0 and p.q_index is None and p.k_index is None
            and p.k.strides[3] == p.k.itemsize and p.v.strides[3] == p.v.itemsize
            and (g.heads == g.groups or len(p.blocks.rows.start) == 1))


class ForwardPlan(NamedTuple):
    """How a forward is done; `record` has what kernels must know of it."""

    kernel: str
    units: int
    scratch: int
    per_group: bool
    splits: int
    part_bytes: int
    record: bytes


@functools.lru_cache(maxsize=1024)
def forward_plan(g: Geometry, *, short: bool, gated: bool, chunk: int) -> ForwardPlan:
    """Decide how to do a forward: never by the number of threads, so that they change no bit."""
    groups, blocks = g.batch * g.groups, g.batch * g.heads * g.row_tiles
    chunk, per_group, splits, part = min(chunk, g.key_tiles), False, 1, 0
    if short:
        kernel = "decode.decode"
        splits = max(1, min(-(-UNITS // max(1, groups)), g.key_tiles // SPLIT_TILES))
        numbers = g.heads // max(1, g.groups) * g.n * (1 + g.lanes + g.e_padded)
        part = -(-numbers * g.dtype.itemsize // CACHE_LINE) * CACHE_LINE
        units = groups * splits
    else:
        kernel = "forward.forward"
        keys = g.key_tiles * TILE * (g.d_depth + g.e_padded) * g.operand.itemsize
        per_group = keys <= GROUP_BYTES and (groups >= UNITS or blocks <= 2 * groups)
        units = groups if per_group else blocks
    starts, scratch = forward_scratch(g, chunk, gated=gated, per_group=per_group, part=part)
    record = g.with_fields({"per_group": (per_group, chunk, splits, part), "ahead": starts})
    return ForwardPlan(kernel, units, scratch, per_group, splits, part, record)


def pack_all(job: Job, name: str, tiles: int, width: int, itemsize: int, layout: str) -> None:
    """Pack an array as a whole, in parallel."""
    at = job.workspace(tiles=tiles * TILE * width * itemsize, notes=tiles)
    job.put(f"{name}.{layout}", at["tiles"])
    job.put(f"{name}.notes", at["notes"])
    job.run("packing.pack_tiles", tiles, flops=64.0 * tiles * TILE * width, at=name)


def delta(dout: np.ndarray, out: np.ndarray, lse: np.ndarray,
          dlse: np.ndarray | None) -> np.ndarray:
    """Return rowsum(dout * out) - dlse, (B, H, N); 0 in rows that see no key."""
    _, dtype, _ = kind_of(dout.dtype)
    batch, heads, n, e = out.shape
    found = np.empty((batch, heads, n), dtype)
    lse = np.ascontiguousarray(lse, dtype)
    dlse = None if dlse is None else np.ascontiguousarray(dlse, dtype)
    dout, out = (np.require(x, x.dtype.newbyteorder("="), ["ALIGNED"]) for x in (dout, out))
    e_padded = -(-e // CACHE_LINE) * CACHE_LINE
    record = np.array(
        (dtype.itemsize, SOURCE_CODES[dout.dtype], heads, n, e, e_padded, address(dout),
         *dout.strides, address(out), *out.strides, address(lse),
         0 if dlse is None else address(dlse), address(found)), DELTA)
    threads.run(native("backward.delta", "float64" if dtype == np.float64 else "float32"),
                address(record), batch * heads * -(-n // TILE),
                (2 * e_padded + 1) * TILE * dtype.itemsize,
                int(DELTA_FLOPS * out.size / HELPER_FLOPS))
    return found


def empty(shape: tuple[int, ...], dtype: np.dtype, index: np.ndarray | None) -> np.ndarray:
    """Make room for a result; zeros where an index may leave tokens out."""
    return np.empty(shape, dtype) if index is None else np.zeros(shape, dtype)


def backward(problem: Any, dout: np.ndarray, lse: np.ndarray, delta: np.ndarray,
             onto: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """Return the gradients by argument; lse and delta (B, H, N) are those of the merged result."""
    p, g = problem, geometry_of(problem)
    job = Job(p, g, g.record)
    lse_at = job.hold(lse)
    job.describe("q", p.q, job.q_index, job.q_lengths, job.scale, lse_at)
    job.describe("dout", dout, job.q_index, job.q_lengths, 0, lse_at)

    terms, tables = gradients_of_terms(p, g.groups)
    fewer_tiles = min(g.row_tiles, g.key_tiles)
    labels = [*(term.labels(g.groups) for term in terms.values()),
              *(table.labels(g.batch) for table in tables.values())]
    copy_bytes = (sum(term.nbytes(g.dtype) for term in terms.values())
                  + sum(table.nbytes(fewer_tiles) for table in tables.values()))
    pieces = divide(g, len(p.q), labels, fewer_tiles, copy_bytes)
    for name, term in terms.items():
        job.put(f"d{name}", *term.allocate(pieces, g.batch, g.heads, g.dtype))
    for name, table in tables.items():
        job.put("doffsets" if name == "offsets" else "dgate_table", *table.allocate(pieces))
    job.put("pairs", *(job.hold(x, np.int64) for x in (pieces.pairs, pieces.start, pieces.slice)),
            pieces.chunks, onto is None and is_short(p, g) and g.fold == 1)

    indices = {"q": p.q_index, "k": p.k_index, "v": p.k_index}
    found = {name: empty(x.shape, g.dtype if name in p.summed else p.q.dtype.newbyteorder("="),
                         indices[name])
             for name, x in (("q", p.q), ("k", p.k), ("v", p.v))} if onto is None else dict(onto)
    for name, x in found.items():
        job.describe_result(f"d{name}", x, onto is not None)
    per_pair = pieces.chunks == 1 and packed_bytes(g) <= PAIR_BYTES
    sizes, in_place = backward_space(g, pieces, found, per_pair=per_pair, onto=onto is not None,
                                     listed=[name for name in indices if indices[name] is not None])
    starts, total = sections(tuple(sizes.values()))
    at = dict(zip(sizes, starts, strict=True)) if per_pair else job.workspace(**sizes)
    at |= {f"d{name}": address(found[name]) for name in in_place}
    starts, scratch = backward_scratch(g, total if per_pair else 0)
    job.put("back", *starts)
    job.put("per_pair", per_pair)
    dscale = np.zeros((g.batch, g.heads, g.row_tiles))
    for name in ("q", "dout"):
        job.put(f"{name}.rows", at[name], 0, at[f"{name}_pairs"], at[f"{name}_notes"])
    job.put("delta", job.hold(delta), *(at[name] for name in ("shifts", "means", "dq", "dk", "dv")),
            address(dscale))
    run_phases(job, pieces, g.batch * g.heads * g.row_tiles, scratch)

    found["scale"] = dscale.sum((0, 2)).astype(g.dtype)
    return found | {name: x.result(g.dtype) for name, x in (terms | tables).items()}


def gradients_of_terms(p: Any, groups: int,
                       ) -> tuple[dict[str, TermGradient], dict[str, TableGradient]]:
    """Return where the gradients of bias and gate go, and those of tables by offset."""
    terms, tables = {}, {}
    if p.bias is not None:
        terms["bias"] = TermGradient(p.bias)
    if p.gate is not None and p.gate_form.by_offset:
        _, heads, _, width = p.gate.array.shape
        tables["gate"] = TableGradient((heads, width), groups)
    elif p.gate is not None:
        terms["gate"] = TermGradient(p.gate, p.gate_form.block)
    if p.offsets is not None:
        tables["offsets"] = TableGradient(p.offsets.shape, groups)
    return terms, tables


def packed_bytes(g: Geometry) -> int:
    """Return how much is packed of a group's queries."""
    each = g.operand.itemsize * (1 + (g.fold > 1)) + g.dtype.itemsize
    return g.heads // max(1, g.groups) * g.row_tiles * TILE * each * (g.d_padded + g.e_padded)


def backward_space(g: Geometry, pieces: Pieces, found: dict[str, np.ndarray], *, per_pair: bool,
                   onto: bool, listed: list[str]) -> tuple[dict[str, int], list[str]]:
    """Return the bytes of what a backward packs and sums, and which sums take a result's place.

    Sums of dk and dv are kept where there are several phases. In a result's place there are those
    that are laid out as it is; those of dq are scaled at the end, so not if it is added to.
    """
    size, pairs = g.dtype.itemsize, g.fold > 1
    tiles = g.heads * g.row_tiles * g.batch // (max(1, g.batch * g.groups) if per_pair else 1)
    rows = tiles * TILE
    q, dout = (rows * width * g.operand.itemsize for width in (g.d_padded, g.e_padded))
    columns = g.batch * g.groups * g.m * size * (pieces.chunks > 1)
    sums = {"q": rows * g.d_padded * size, "k": columns * g.d, "v": columns * g.e}
    in_place = [name for name, x in found.items()
                if x.nbytes == sums[name] and x.dtype == g.dtype and x.flags.c_contiguous
                and name not in listed and (name != "q" or not (per_pair or onto))]
    return {"q": q, "q_pairs": q * pairs, "q_notes": tiles, "dout": dout,
            "dout_pairs": dout * pairs, "dout_notes": tiles, "shifts": rows * size,
            "means": rows * size,
            **{f"d{name}": 0 if name in in_place else nbytes for name, nbytes in sums.items()},
            }, in_place


def run_phases(job: Job, pieces: Pieces, tiles: int, scratch: int) -> None:
    """Run the backward's phases; a single one does what comes before and after by itself."""
    phases = pieces.chunks
    if phases > 1:
        job.run("backward.prepare", tiles, flops=job.flops)
    for phase in range(phases):
        job.put("phase", phase)
        job.run("backward.backward", len(pieces) * phases, scratch, job.flops)
    if phases > 1:
        job.run("backward.finish", tiles, scratch, job.flops)


def divide(g: Geometry, sources: int, labels: list[np.ndarray], tiles: int,
           copy_bytes: int) -> Pieces:
    """Divide (batch, group) pairs among pieces of work."""
    if labels:
        return Pieces.of(g.batch * g.groups, labels, tiles, copy_bytes)
    return _plainly(g.batch, g.groups, sources, tiles)


@functools.lru_cache(maxsize=256)
def _plainly(batch: int, groups: int, sources: int, tiles: int) -> Pieces:
    pieces = Pieces.of(batch * groups, [], tiles, 0)
    # items of one source in turn, as their tokens lie side by side
    items = batch // max(1, sources)
    order = pieces.pairs.reshape(sources, items, groups).swapaxes(1, 2)
    return dataclasses.replace(pieces, pairs=np.ascontiguousarray(order).ravel())


def weights(problem: Any, lse: np.ndarray) -> np.ndarray:
    """Return the probabilities (B, H, N, M), before dropout."""
    from pyattn.kernels.array_api import softmax

    return softmax.weights(problem, lse)
