"""Clustering: which centroid is nearest, who belongs to a cluster, and sums over members.

The nearest centroid is the one of the largest x.c - shift; a tile has centroids for rows and 64
points for columns, so that the search goes down the rows, all lanes abreast, and keeps no more than
the best so far of each point. A thread owns what it writes: points, or clusters, whose members are
added up in the order of their list; nothing depends on who does it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..clustering import BLOCK as BLOCK_ROWS
from ..clustering import FEW as FEW_CLUSTERS
from ..clustering import RECORD
from ..compile import kernel, part
from ..host import vector_bytes
from .access import fetch_add, load, numbers, record_at, store
from .packing import TILE
from .vector import gemm, row_dots, transpose
from .vector.emit import I64, Vectors, typed
from .vector.products import prefetch

STEP, ZERO, NONE = np.int64(1), np.int64(0), np.int32(-1)
BLOCK, FEW, TOGETHER = np.int64(BLOCK_ROWS), np.int64(FEW_CLUSTERS), np.int64(64)

job_at = record_at(RECORD)


def _best_rows(v: Vectors, scores: Any, row: Any, rows: Any, shifts: Any, first: Any, columns: Any,
               best: Any, names: Any) -> None:
    """Keep the largest score - shift of each column and the row it was in, the first of equals.

    Names are numbers like the scores: whole and below 2^24, they are exact.
    """
    build = v.builder
    for width, vector in v.blocks(build.udiv(columns, I64(v.lanes)), (4, 1)):
        places = [build.mul(build.add(vector, I64(u)), I64(v.lanes)) for u in range(width)]
        tops = [v.variable(v.load(best, place)) for place in places]
        owners = [v.variable(v.load(names, place)) for place in places]
        with cgutils.for_range(build, rows) as loop:
            r = loop.index
            shift = v.splat(v.load_number(shifts, r))
            name = v.splat(build.sitofp(build.add(first, r), v.scalar))
            start = build.mul(r, row)
            for place, top, owner in zip(places, tops, owners, strict=True):
                x = build.fsub(v.load(scores, build.add(start, place)), shift)
                old = build.load(top, typ=v.type)
                more = build.fcmp_ordered(">", x, old)
                build.store(build.select(more, x, old), top)
                build.store(build.select(more, name, build.load(owner, typ=v.type)), owner)
        for place, top, owner in zip(places, tops, owners, strict=True):
            v.store(build.load(top, typ=v.type), best, place)
            v.store(build.load(owner, typ=v.type), names, place)
    build.ret_void()


@intrinsic
def best_rows(context, scores, row, rows, shifts, first, columns, best, names, unit):
    """Emit `_best_rows` for the host."""
    return typed(_best_rows, vector_bytes(), "-", "iiiiiiii", unit)


def _add_listed(v: Vectors, x: Any, d: Any, order: Any, count: Any, total: Any) -> None:
    """total[:d] += the sum of `count` rows of x, as many numbers long, which `order` lists."""
    build = v.builder
    rest = build.and_(d, I64(v.lanes - 1))

    def add(first: Any, across: int, mask: Any = None) -> None:
        places = [build.add(first, I64(u * v.lanes)) for u in range(across)]
        slots = [v.variable(v.const(0.0)) for _ in places]
        with cgutils.for_range(build, count) as loop:
            ahead = build.add(loop.index, I64(8))
            soon = build.select(build.icmp_signed("<", ahead, count), ahead, loop.index)
            rows = [build.mul(build.sext(_number(v, order, i), I64), d)
                    for i in (loop.index, soon)]
            for place, slot in zip(places, slots, strict=True):
                prefetch(v, build.add(x, build.mul(build.add(rows[1], place), I64(v.size))))
                pointer = v.where(x, build.add(rows[0], place), v.type)
                row = (build.load(pointer, align=v.size, typ=v.type) if mask is None
                       else v.load_masked(pointer, v.type, v.size, mask))
                build.store(build.fadd(build.load(slot, typ=v.type), row), slot)
        for place, slot in zip(places, slots, strict=True):
            pointer = v.where(total, place, v.type)
            if mask is None:
                old = build.load(pointer, align=v.size, typ=v.type)
                v.store(build.fadd(old, build.load(slot, typ=v.type)), total, place)
            else:
                old = v.load_masked(pointer, v.type, v.size, mask)
                v.store_masked(build.fadd(old, build.load(slot, typ=v.type)), total, place, mask)

    vectors = build.udiv(d, I64(v.lanes))
    for across, vector in v.blocks(vectors, (8, 4, 1)):
        add(build.mul(vector, I64(v.lanes)), across)
    with build.if_then(build.icmp_signed("!=", rest, I64(0))):
        add(build.mul(vectors, I64(v.lanes)), 1, v.first(rest))
    build.ret_void()


def _number(v: Vectors, place: Any, index: Any) -> Any:
    """Read int32 number `index` from address `place` on."""
    kind = ir.IntType(32)
    pointer = v.builder.inttoptr(place, kind.as_pointer())
    return v.builder.load(v.builder.gep(pointer, [index], source_etype=kind), typ=kind)


@intrinsic
def add_listed(context, x, d, order, count, total, unit):
    """Emit `_add_listed` for the host."""
    return typed(_add_listed, vector_bytes(), "-", "iiiii", unit)


@intrinsic
def whole(context, x):
    """Return a floating-point number that is a whole one as int64."""
    def cast(context, builder, signature, values):
        return builder.fptosi(values[0], ir.IntType(64))

    return types.int64(x), cast


@kernel
def nearest(place, queue, units, scratch, unit, operand):
    """Assign blocks of points."""
    job = job_at(place)
    task = fetch_add(queue, STEP)
    while task < units:
        s = load(job.unit_set + 8 * task, STEP)
        begin = load(job.unit_row + 8 * task, STEP)
        end = min(begin + BLOCK, load(job.set_rows + 8 * s, STEP))
        base = load(job.set_row + 8 * s, STEP)
        for row in range(base + begin, base + end, TILE):
            nearest_tile(job, s, row, min(TILE, base + end - row), scratch, unit)
        task = fetch_add(queue, STEP)


@part
def nearest_tile(job, s, row, count, scratch, unit):
    """Assign up to 64 points."""
    size, d = job.size, job.d
    scores, best, names = scratch + job.scores, scratch + job.best, scratch + job.names
    node, nodes = load(job.set_node + 8 * s, STEP), load(job.set_nodes + 8 * s, STEP)
    columns = -(-count // job.lanes) * job.lanes
    transpose(job.x + row * d * size, d, scratch, TILE, count, d, unit)
    tops, owners = numbers(best, TILE, unit), numbers(names, TILE, unit)
    tops[:] = -math.inf
    owners[:] = 0
    for first in range(0, nodes, TOGETHER):
        some = min(TOGETHER, nodes - first)
        gemm(some, columns, d, job.centroids + (node + first) * d * size, d, STEP, scratch, TILE,
             scores, TILE, ZERO, unit)
        best_rows(scores, TILE, some, job.shifts + (node + first) * size, np.int64(first), columns,
                  best, names, unit)
    for r in range(count):
        store(job.assignment + 4 * (row + r), np.int32(node + whole(owners[r])))


@kernel
def members(place, queue, units, scratch, unit, operand):
    """Sort the rows by their clusters, those of a cluster in order."""
    job = job_at(place)
    task = fetch_add(queue, STEP)
    while task < units:
        start = numbers(job.start, job.nodes + STEP, STEP)
        free = numbers(scratch, job.nodes, STEP)
        for r in range(job.rows):
            node = load(job.assignment + 4 * r, NONE)
            if node >= 0:
                start[np.int64(node) + STEP] += STEP
        for node in range(job.nodes):
            free[node] = start[node]
            start[node + STEP] += start[node]
        for r in range(job.rows):
            node = np.int64(load(job.assignment + 4 * r, NONE))
            if node >= 0:
                store(job.order + 4 * free[node], np.int32(r))
                free[node] += STEP
        task = fetch_add(queue, STEP)


@kernel
def sums(place, queue, units, scratch, unit, operand):
    """Add up the members of a few clusters, 64 at a time, and these sums."""
    job = job_at(place)
    size, d = job.size, job.d
    task = fetch_add(queue, STEP)
    while task < units:
        for listed in range(task * FEW, min(task * FEW + FEW, job.nodes)):
            node = load(job.unit_set + 8 * listed, STEP)
            first = load(job.start + 8 * node, STEP)
            stop = load(job.start + 8 * (node + STEP), STEP)
            for begin in range(first, stop, TOGETHER):
                add_listed(job.x, d, job.order + 4 * begin, min(TOGETHER, stop - begin),
                           job.sums + node * d * size, unit)
        task = fetch_add(queue, STEP)


@kernel
def distances(place, queue, units, scratch, unit, operand):
    """Squared distance of each row to its centroid; 0 where it has none."""
    job = job_at(place)
    size, d = job.size, job.d
    apart = numbers(scratch, job.padded, unit)
    task = fetch_add(queue, STEP)
    while task < units:
        apart[:] = 0
        for row in range(task * BLOCK, min(task * BLOCK + BLOCK, job.rows)):
            node = np.int64(load(job.assignment + 4 * row, NONE))
            if node < 0:
                continue
            x = numbers(job.x + row * d * size, d, unit)
            centroid = numbers(job.centroids + node * d * size, d, unit)
            for c in range(d):
                apart[c] = x[c] - centroid[c]
            row_dots(scratch, scratch, job.padded, STEP, job.padded, job.distances + row * size,
                     unit)
        task = fetch_add(queue, STEP)
