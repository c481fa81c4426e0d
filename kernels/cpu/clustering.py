"""The kernels of clustering: nearest centroids, members of clusters, sums and distances.

Points are rows of one matrix, and centroids of another; a `Sets` table says which rows choose among
which centroids, so that heads, segments and the nodes of a tree are all one call. `members`, `sums`
and `distances` do what `pyattn.kernels.array_api.clustering` says of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import threads
from .compile import native
from .host import vector_bytes
from .job import HELPER_FLOPS, sections
from .memory import address, address_of_buffer

TILE, BLOCK, FEW = 64, 256, 16
"""Rows whose scores are held at a time, rows of a unit of work, and clusters of one."""

ON_HOST = True

RECORD = np.dtype([(name, "i8") for name in (
    "size lanes d padded rows nodes "           # bytes of a number, numbers in a vector, widths
    "x centroids shifts assignment "            # (rows, d), (nodes, d), (nodes,), int32 (rows,)
    "start order counts sums distances "        # CSR of members, and results
    "unit_set unit_row set_row set_rows set_node set_nodes "    # int64: see Sets
    "scores best names").split()])              # sections of scratch memory


def refuses(problem: Any) -> str | None:
    """Take what is NumPy's."""
    del problem
    return None


def nearest(x: np.ndarray, centroids: np.ndarray, shifts: np.ndarray, sets: Any,
            active: np.ndarray, assignment: np.ndarray) -> np.ndarray:
    """Return the assignment, int32 (T,), with the rows of active sets given to their best node.

    That is the node of the set with the largest ``x.c - shift``, the first of equals; `assignment`
    holds for the other rows.
    """
    chosen = np.flatnonzero(active)
    blocks = -(-sets.row_count[chosen] // BLOCK)
    unit_set = np.repeat(chosen, blocks)
    within = np.arange(unit_set.size) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    assignment = assignment.copy()
    products = int((sets.row_count[chosen] * sets.node_count[chosen]).sum())
    wide = TILE * x.itemsize
    parts, total = sections((x.shape[1] * wide, TILE * wide, wide, wide))
    _run("nearest", x, unit_set.size, total, 2.0 * products * x.shape[1], {
        "centroids": centroids, "shifts": shifts, "assignment": assignment,
        "unit_set": unit_set, "unit_row": within * BLOCK, **_table(sets)},
        scores=parts[1], best=parts[2], names=parts[3])
    return assignment


def members(assignment: np.ndarray, nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """List the rows of each cluster; see `array_api.clustering.members`."""
    start, order = np.zeros(nodes + 1, np.int64), np.empty(assignment.size, np.int32)
    if not nodes:
        return start, order[:0]
    _run("members", np.empty((0, 1), np.float32), 1, 8 * nodes, 0.0, {
        "assignment": assignment, "start": start, "order": order},
        rows=assignment.size, nodes=nodes)
    return start, order[:start[-1]]


def sums(x: np.ndarray, start: np.ndarray, order: np.ndarray,
         active: np.ndarray | None = None) -> np.ndarray:
    """Add up the rows of each cluster; see `array_api.clustering.sums`."""
    nodes = start.size - 1
    found = np.zeros((nodes, x.shape[1]), x.dtype)
    chosen = np.diff(start) > 0
    if active is not None:
        chosen &= active
    listed = np.flatnonzero(chosen)
    _run("sums", x, -(-listed.size // FEW), 0, float(order.size * x.shape[1]), {
        "start": start, "order": order, "sums": found, "unit_set": listed}, nodes=listed.size)
    return found


def distances(x: np.ndarray, centroids: np.ndarray, assignment: np.ndarray) -> np.ndarray:
    """Squared distance to the own centroid; see `array_api.clustering.distances`."""
    found = np.zeros(assignment.size, x.dtype)
    lanes = vector_bytes() // x.itemsize
    padded = -(-x.shape[1] // lanes) * lanes
    _run("distances", x, -(-found.size // BLOCK), padded * x.itemsize, 3.0 * x.size,
         {"centroids": centroids, "assignment": assignment, "distances": found})
    return found


def _table(sets: Any) -> dict[str, np.ndarray]:
    return {"set_row": sets.row_first, "set_rows": sets.row_count, "set_node": sets.node_first,
            "set_nodes": sets.node_count}


def _run(kernel: str, x: np.ndarray, units: int, scratch: int, flops: float,
         arrays: dict[str, np.ndarray], **numbers: int) -> None:
    """Fill in a record and run a kernel over its units of work."""
    record = np.zeros(1, RECORD)
    lanes = vector_bytes() // x.itemsize
    values = {"size": x.itemsize, "lanes": lanes, "rows": len(x), "d": x.shape[1],
              "padded": -(-x.shape[1] // lanes) * lanes, **numbers}
    for name, value in values.items():
        record[name] = value
    held = [np.ascontiguousarray(array) for array in (x, *arrays.values())]
    for name, array in zip(("x", *arrays), held, strict=True):
        record[name] = address(array)
    memory = bytearray(record.tobytes())
    kind = "float64" if x.dtype == np.float64 else "float32"
    threads.run(native(f"clustering.{kernel}", kind), address_of_buffer(memory), units, scratch,
                int(flops / HELPER_FLOPS))
