"""Softmax attention on Hopper: launch code of hopper_forward.cu and hopper_backward.cu.

It serves float16 and bfloat16, with widths of 64 and 128, any mask and any lengths; score terms and
what else `refuses` names go to the kernels that run everywhere. q, k, v and dout are read where
they lie, by tensor maps.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from pyattn.arrays import Array, dtype_name, namespace

from . import device as devices
from .device import Device, Kernel
from .walk import Walk, coarse

TILE = 64
CAPABILITY = (9, 0)
WIDTHS = (64, 128)

GROUPS = 2
"""Warpgroups that compute; each has 64 rows of a block."""

STAGES = {64: 4, 128: 2}
INSPECTORS = 3
LOAD_REGISTERS, COMPUTE_REGISTERS = 40, 232

CACHE_BYTES = 2**25
"""Keys and values that are read again from the second-level cache, if their blocks run together."""

WORST_FILL = 0.6
"""The least share of tiles that hold pairs, among those of the steps that a walk takes."""


def refuses(problem: Any) -> str | None:
    """Say why `problem` is not for these kernels, or None."""
    q, v = problem.q, problem.v
    if devices.of(q).capability != CAPABILITY:
        return "the kernels for Hopper need compute capability 9.0"
    if dtype_name(q) not in ("float16", "bfloat16"):
        return f"the kernels for Hopper take float16 and bfloat16; got {dtype_name(q)}"
    if q.shape[3] not in WIDTHS or v.shape[3] != q.shape[3]:
        return (f"the kernels for Hopper take widths of 64 and 128; got {q.shape[3]} and "
                f"{v.shape[3]}")
    if 0 in (*q.shape, *v.shape):
        return "the kernels for Hopper take no empty arrays"
    for name in ("softcap", "bias", "gate", "offsets", "q_index", "k_index"):
        if getattr(problem, name) is not None:
            return f"the kernels for Hopper take no {name}"
    if problem.dropout:
        return "the kernels for Hopper have no dropout"
    if problem.summed:
        return "the kernels for Hopper do not sum over broadcast operands"
    for name in ("q", "k", "v"):
        if not _mappable(getattr(problem, name)):
            return f"the kernels for Hopper read {name} by rows at multiples of 16 bytes"
    if _fill(problem.blocks) < WORST_FILL:
        return "the mask has pairs in few of the tiles that steps of 128 would visit"
    return None


def forward(problem: Any) -> tuple[Array, Array]:
    """Return out (B, H, N, D) in the dtype of q, and lse (B, H, N) in float32."""
    device = devices.of(problem.q)
    batch, heads, n, width = problem.q.shape
    walk = coarse(problem.blocks, GROUPS, 2)
    items = _items(problem, walk, heads, n, problem.k.shape[2])
    out = device.empty((batch, heads, n, width), problem.q.dtype)
    lse = device.empty((batch, heads, n), np.float32)
    launch = _Launch(device, problem, FORWARD)
    launch.put_map("q", problem.q, GROUPS * TILE)
    launch.put_map("k", problem.k, 2 * TILE)
    launch.put_map("v", problem.v, 2 * TILE)
    launch.put_rows("values", problem.v)
    launch.put_lists(walk, GROUPS)
    launch.put_items(items)
    for name, array in (("out", out), ("lse", lse), ("sinks", problem.sinks)):
        launch.put(name, array)
    stages = STAGES[width]
    row = 2 * width
    shared = (GROUPS * TILE * row + 2 * stages * 2 * TILE * row + 4 * GROUPS * 16 * row
              + 16 * stages + 16 + 40 * stages)
    launch.run("hopper_forward.cu", "hopper_forward", len(items), shared, STAGES=stages)
    return out, lse


def _mappable(x: Array) -> bool:
    """Whether the tensor memory accelerator can read an array (B, H, N, D)."""
    *steps, column = x.strides
    address = devices.of(x).address(x)
    return column == 2 and address % 16 == 0 and all(
        size == 1 or (step > 0 and step % 16 == 0)
        for size, step in zip(x.shape, steps, strict=False))


_fills: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()


def _fill(blocks: Any) -> float:
    """Return which share of the tiles that steps of two by two visit have pairs."""
    if blocks not in _fills:
        walk = coarse(blocks, GROUPS, 2)
        layouts, lines = walk.steps.shape
        line = np.repeat(np.tile(np.arange(lines), layouts), np.diff(walk.start).ravel())
        high = np.minimum(blocks.rows.start.shape[1] - 1 - line * GROUPS, GROUPS)
        wide = np.minimum(blocks.columns.start.shape[1] - 1 - 2 * walk.first, 2 * walk.count)
        visited = (high.astype(np.int64) * wide).sum()
        _fills[blocks] = float(blocks.rows.count.sum(dtype=np.int64)) / max(1, int(visited))
    return _fills[blocks]


def _items(problem: Any, walk: Walk, heads: int, n: int, m: int) -> np.ndarray:
    """List the lines of all heads, (line, batch item * `heads` + head), as blocks take them.

    Those that take longest come first, but heads whose keys and values fit in the cache stay
    together.
    """
    batch = len(problem.layout)
    repeats = problem.layout.shape[1] // heads
    layout = problem.layout[:, ::repeats].ravel()
    steps = walk.steps[layout]
    each = 4 * m * problem.k.shape[3] * problem.k.shape[1] // heads
    section = np.arange(batch * heads) // max(1, CACHE_BYTES // max(1, each))
    head, line = np.indices(steps.shape, np.int32)
    order = np.lexsort((head.ravel(), -steps.ravel(), np.repeat(section, steps.shape[1])))
    return np.stack([line.ravel()[order], head.ravel()[order]], axis=1)


def _structure(fields: Sequence[tuple[str, Any]]) -> np.dtype:
    """Lay out a struct as C++ does; tensor maps, if any, come first and align it to 64 bytes."""
    laid = np.dtype(list(fields), align=True)
    names = laid.names or ()
    size = -(-laid.itemsize // 64) * 64
    return np.dtype({"names": names, "formats": [laid[name] for name in names],
                     "offsets": [laid.fields[name][1] for name in names],  # type: ignore[index]
                     "itemsize": size})


_MAP = "V128"
_LISTS = np.dtype([(name, "u8") for name in ("start", "first", "count", "at", "names", "bits",
                                             "layout")] + [("lines", "i4")], align=True)
_ROWS = np.dtype([("first", "u8"), ("batch", "i8"), ("head", "i8"), ("row", "i8")])

FORWARD = _structure(
    [("q", _MAP), ("k", _MAP), ("v", _MAP), ("lists", _LISTS), ("values", _ROWS)]
    + [(name, "u8") for name in ("items", "q_lengths", "kv_lengths", "scale", "sinks", "out",
                                 "lse")]
    + [(name, "i4") for name in ("item_count", "heads", "group_heads", "n")])


class _Launch:
    """The arguments of one launch, and what keeps their arrays alive."""

    def __init__(self, device: Device, problem: Any, structure: np.dtype):
        self.device, self.problem = device, problem
        self.arguments = np.zeros((), structure)
        self._held: list[Any] = []
        heads = problem.q.shape[1]
        for name, value in (("heads", heads), ("group_heads", heads // problem.k.shape[1]),
                            ("n", problem.q.shape[2]), ("m", problem.k.shape[2])):
            if name in (structure.names or ()):
                self.arguments[name] = value
        self.put("scale", problem.scale)
        for name in ("q_lengths", "kv_lengths"):
            self.put(name, self._constant(getattr(problem, name), np.int32))

    def _constant(self, x: np.ndarray, dtype: Any) -> Array:
        return self.device.constant(np.ascontiguousarray(x, dtype))

    def put(self, name: str, array: Array | None) -> None:
        """Tell the address of a dense array, 0 for none."""
        if array is not None:
            array = contiguous(array)
            self._held.append(array)
            self.arguments[name] = self.device.address(array)

    def put_map(self, name: str, array: Array, rows: int) -> None:
        """Tell how boxes of `rows` rows of (B, H, N, D) are read."""
        code = self.device.tensor_map(array, rows, 64)
        self.arguments[name] = np.frombuffer(code, _MAP)[0]
        self._held.append(array)

    def put_rows(self, name: str, array: Array) -> None:
        """Tell where single rows lie."""
        size = array.dtype.itemsize
        self.arguments[name] = (self.device.address(array),
                                *(step // size for step in array.strides[:3]))

    def put_lists(self, walk: Walk, rows: int) -> None:
        """Tell the steps of a walk."""
        lists = self.arguments["lists"]
        for name in ("start", "first", "count", "at", "names", "bits"):
            array = self.device.constant(getattr(walk, name))
            self._held.append(array)
            lists[name] = self.device.address(array)
        layout = self._constant(self.problem.layout, np.int32)
        self._held.append(layout)
        lists["layout"] = self.device.address(layout)
        lists["lines"] = walk.start.shape[1] - 1

    def put_items(self, items: np.ndarray) -> None:
        """Tell what blocks take, in order."""
        self.put("items", self._constant(items, np.int32))
        self.arguments["item_count"] = len(items)

    def run(self, file: str, name: str, blocks: int, shared: int, **macros: int) -> None:
        """Launch as many blocks as have items, one to a multiprocessor at most."""
        given = {"BRAIN": int(dtype_name(self.problem.q) == "bfloat16"),
                 "D": self.problem.q.shape[3], "GROUPS": GROUPS,
                 "LOAD_REGISTERS": LOAD_REGISTERS, "COMPUTE_REGISTERS": COMPUTE_REGISTERS, **macros}
        kernel = Kernel(file, name, tuple(given.items()), 128 * (1 + GROUPS),
                        architecture_specific=True)
        self.device.launch(kernel, min(blocks, self.device.multiprocessors), self.arguments, shared)


def contiguous(array: Array) -> Array:
    """Return a dense array of the same values, the array itself if it is one."""
    return namespace(array).ascontiguousarray(array)
