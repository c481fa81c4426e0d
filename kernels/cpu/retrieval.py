"""The kernels of retrieval: best nodes of an index for each query, and best tokens of lists.

What the two functions find is written in `pyattn.kernels.array_api.retrieval`; here a node's
children lie side by side, and so do the rows of a leaf's tokens.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from . import threads
from .compile import native
from .host import vector_bytes
from .job import HELPER_FLOPS, sections
from .memory import address, address_of_buffer

TILE, LINE = 64, 256
"""Queries of a unit of work, and children scored at a time."""

ON_HOST = True

RECORD = np.dtype([*((name, "i8") for name in (
    "size lanes d n blocks queries "            # q: (heads, n, d), in blocks of 64
    "rows counts nodes "                        # of a level
    "child_rows child_order child_start children children_of "      # of the level above
    "first stop "                               # int32 (heads, n): roots of this level
    "keep above kept scored "                   # int32: (heads, n, keep), and (heads, n)
    "runs run_count order tokens gather exact number indices most "
    "row_count scores floor tops names ids places row chosen seen").split()),
    ("threshold", "f8"), ("duplicate", "f8")])


def refuses(problem: Any) -> str | None:
    """Take what is NumPy's."""
    del problem
    return None


def search(q: np.ndarray, layers: Any, roots: list[tuple[np.ndarray, np.ndarray]],
           keep: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Find the best nodes of each level; see `array_api.retrieval.search`.

    `layers` are those of `pyattn.features.retrieval`.
    """
    heads, n, _ = q.shape
    scored, found = np.zeros((heads, n), np.int32), []
    above = np.empty(0, np.int32)
    wide = TILE * q.itemsize
    parts, total = sections((q.shape[2] * wide, TILE * wide, wide, keep * wide, 4 * keep * TILE,
                             LINE * q.itemsize))
    for level in range(len(layers) - 1, -1, -1):
        layer, (first, stop) = layers[level], roots[level]
        kept = np.empty((heads, n, keep), np.int32)
        children = {}
        if above.size:
            parent = layers[level + 1]
            children = {"child_rows": parent.child_rows, "child_order": parent.child_order,
                        "child_start": parent.child_start, "above": above}
        flops = 2.0 * q.shape[2] * float((stop - first).clip(0).sum(dtype=np.int64))
        _run("search", q, total, flops, {
            "rows": layer.rows, "counts": layer.counts, "first": first, "stop": stop,
            "kept": kept, "scored": scored, **children},
            nodes=layer.counts.shape[1], keep=keep, children=bool(children),
            children_of=layers[level + 1].counts.shape[1] if children else 0,
            **dict(zip(("scores", "floor", "tops", "names", "row"), parts[1:], strict=True)))
        found.insert(0, kept)
        above = kept
    return found, scored


def pick(q: np.ndarray, rows: np.ndarray, order: np.ndarray, runs: np.ndarray, gather: bool,
         number: int, tokens: int, threshold: float | None,
         duplicate: float | None) -> np.ndarray:
    """Choose the best tokens of lists; see `array_api.retrieval.pick`.

    Row x of `rows` is of token ``order[x]``, or with `gather` of token x.
    """
    heads, n, d = q.shape
    indices = np.empty((heads, n, number), np.int32)
    if not indices.size:
        return indices
    lengths = (runs[..., 1] - runs[..., 0]).sum(axis=-1)
    most = max(1, int(lengths.max(initial=0)))
    # scores in whole words of 64, of which the last may be followed by a vector of others
    wide = (-(-most // TILE) + 1) * TILE
    parts, total = sections((wide * q.itemsize, 4 * most, 4 * most, 4 * number,
                             number * d * q.itemsize if duplicate is not None else 0,
                             number * q.itemsize, 8 * -(-tokens // TILE)))
    _run("pick", q, total, 2.0 * d * float(lengths.sum()), {
        "rows": rows, "order": order, "runs": runs, "indices": indices},
        run_count=runs.shape[2], gather=gather, exact=duplicate is not None, number=number,
        tokens=tokens, most=wide, row_count=len(rows),
        threshold=-math.inf if threshold is None else threshold,
        duplicate=math.inf if duplicate is None else duplicate,
        **dict(zip(("scores", "ids", "places", "names", "chosen", "row", "seen"), parts,
                   strict=True)))
    return indices


def _run(kernel: str, q: np.ndarray, scratch: int, flops: float, arrays: dict[str, np.ndarray],
         **numbers: float) -> None:
    """Fill in a record and run a kernel over blocks of queries."""
    heads, n, d = q.shape
    record, blocks = np.zeros(1, RECORD), -(-n // TILE)
    values = {"size": q.itemsize, "lanes": vector_bytes() // q.itemsize, "d": d, "n": n,
              "blocks": blocks, **numbers}
    for name, value in values.items():
        record[name] = value
    held = [np.ascontiguousarray(array) for array in (q, *arrays.values())]
    for name, array in zip(("queries", *arrays), held, strict=True):
        record[name] = address(array)
    memory = bytearray(record.tobytes())
    kind = "float64" if q.dtype == np.float64 else "float32"
    threads.run(native(f"retrieval.{kernel}", kind), address_of_buffer(memory), heads * blocks,
                scratch, int(flops / HELPER_FLOPS))
