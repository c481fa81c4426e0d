"""Softmax attention on Hopper: launch code of hopper_forward.cu and hopper_backward.cu.

It serves float16 and bfloat16, with widths of 64 and 128, any mask and any lengths; score terms and
what else `refuses` names go to the kernels that run everywhere. q, k, v and dout are read where
they lie, by tensor maps.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pyattn.arrays import Array, dtype_name, namespace

from . import device as devices
from . import tuning
from .device import Device, Kernel
from .walk import Walk, coarse

TILE = 64
CAPABILITY = (9, 0)
WIDTHS = (64, 128)
NAMES = ("hopper_forward", "hopper_backward_queries", "hopper_backward_keys")

GROUPS = 2
"""Warpgroups that compute; each has 64 rows of a block. For three there are too few registers."""


class Build(NamedTuple):
    """What a kernel is built with."""

    stages: int
    """How many steps of what is walked there is room for."""
    settle: int
    """Whether exponentials are held before the wait for the products that run meanwhile."""


BUILDS = {
    ("hopper_forward", 64): (Build(4, 1), Build(4, 0), Build(2, 1)),
    ("hopper_forward", 128): (Build(2, 1), Build(2, 0)),
    ("hopper_backward_queries", 64): (Build(4, 1), Build(4, 0)),
    ("hopper_backward_queries", 128): (Build(4, 1), Build(4, 0)),
    ("hopper_backward_keys", 64): (Build(4, 1), Build(2, 1)),
    ("hopper_backward_keys", 128): (Build(4, 1), Build(2, 1)),
}
"""What a table may choose from; the rule first."""

CACHE_BYTES = 2**25
"""Keys and values that are read again from the second-level cache, if their blocks run together."""

WORST_FILL = 0.6
"""The least share of tiles that hold pairs, among those of the steps that a walk takes."""

NEVER = 2.0
FILLS = (0.0, 0.5, 0.75, 1.0, NEVER)
"""What a table may have in its place."""

FEW = TILE
"""Up to so many queries of all heads of a group are for the kernels that run everywhere: these read
keys once for the group, and can divide them among blocks."""


def refuses(problem: Any, way: str = "forward") -> str | None:
    """Say why `problem` is not for these kernels, or None; `way` may be "backward"."""
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
    device, width = devices.of(q), q.shape[3]
    if not all(_builds(name, width, device.shared_memory) for name in NAMES):
        return (f"the kernels for Hopper do not fit the {device.shared_memory} bytes of shared "
                "memory of a block")
    for name in ("q", "k", "v"):
        if not _mappable(getattr(problem, name)):
            return f"the kernels for Hopper read {name} by rows at multiples of 16 bytes"
    few = way == "forward" and q.shape[1] // problem.k.shape[1] * q.shape[2] <= FEW
    if few and not tuning.chosen(device, f"hopper few {width}", (False, True)):
        return "few queries are for kernels that divide keys among blocks"
    least = tuning.chosen(device, f"hopper {way} {width}", (WORST_FILL, *FILLS))
    if _fill(problem.blocks) < least:
        return "the mask has pairs in few of the tiles that steps of 128 would visit"
    return None


@functools.cache
def _builds(name: str, width: int, room: int) -> list[Build]:
    """Return the builds of a kernel that have room in so much shared memory."""
    return [build for build in BUILDS[name, width]
            if _shared_bytes(_kernel(name, width, "bfloat16", build)) <= room]


def _build(device: Device, name: str, width: int) -> Build:
    return tuning.chosen(device, f"{name} {width}", _builds(name, width, device.shared_memory))


def forward(problem: Any) -> tuple[Array, Array]:
    """Return out (B, H, N, D) in the dtype of q, and lse (B, H, N) in float32."""
    device = devices.of(problem.q)
    out = device.empty(problem.q.shape, problem.q.dtype)
    lse = device.empty(problem.q.shape[:3], np.float32)
    launch = _Launch(device, problem, FORWARD, "hopper_forward")
    walk = coarse(problem.blocks, GROUPS, 2)
    launch.put_lists(walk, _steps(walk, problem.layout, problem.q_lengths, problem.kv_lengths, 2))
    launch.put_map("q", problem.q, GROUPS * TILE)
    launch.put_map("k", problem.k, 2 * TILE)
    launch.put_map("v", problem.v, 2 * TILE)
    launch.put_rows("values", problem.v)
    for name, array in (("out", out), ("lse", lse), ("sinks", problem.sinks)):
        launch.put(name, array)
    launch.run()
    return out, lse


def backward(problem: Any, dout: Array, lse: Array, delta: Array) -> dict[str, Array]:
    """Return the gradients of q, k and v, in their dtype, and of scale, (H,) in float32."""
    device, q = devices.of(problem.q), problem.q
    if not _mappable(dout):
        dout = contiguous(dout)
    dq, dk, dv = (device.empty(x.shape, x.dtype) for x in (q, problem.k, problem.v))
    parts = device.empty(q.shape[:3], np.float32)
    own, walked = GROUPS * TILE, TILE

    launch = _Launch(device, problem, BACKWARD, "hopper_backward_queries")
    walk = coarse(problem.blocks, GROUPS, 1)
    launch.put_lists(walk, _steps(walk, problem.layout, problem.q_lengths, problem.kv_lengths, 1))
    for name, array, rows in (("q", q, own), ("dout", dout, own), ("k", problem.k, walked),
                              ("v", problem.v, walked)):
        launch.put_map(name, array, rows)
    launch.put_rows("walked", problem.k, problem.v)
    for name, array in (("lse", lse), ("delta", delta), ("dq", dq), ("dscale", parts)):
        launch.put(name, array)
    launch.run()

    launch = _Launch(device, problem, BACKWARD, "hopper_backward_keys")
    walk = coarse(problem.blocks, GROUPS, 1, transposed=True)
    steps = _steps(walk, problem.layout, problem.kv_lengths, problem.q_lengths, 1)
    launch.put_lists(walk, steps, problem.k.shape[1])
    for name, array, rows in (("q", q, walked), ("dout", dout, walked), ("k", problem.k, own),
                              ("v", problem.v, own)):
        launch.put_map(name, array, rows)
    launch.put_rows("walked", q, dout)
    for name, array in (("lse", lse), ("delta", delta), ("dk", dk), ("dv", dv)):
        launch.put(name, array)
    launch.run()
    with np.errstate(all="ignore"):
        dscale = namespace(q).sum(parts, axis=(0, 2))
    return {"q": dq, "k": dk, "v": dv, "scale": dscale}


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


def _steps(walk: Walk, layout: np.ndarray, lengths: np.ndarray, walked: np.ndarray,
           columns: int) -> np.ndarray:
    """Return how many steps each line of each head has, (B, H, lines).

    Tokens of the lines from `lengths` (B,) on are padding, and those walked from `walked` (B,) on.
    """
    lines = walk.start.shape[1] - 1
    found = np.empty((*layout.shape, lines), np.int32)
    kinds = np.stack([layout, *(np.broadcast_to(x[:, None], layout.shape)
                                for x in (lengths, walked))], axis=-1)
    distinct, which = np.unique(kinds.reshape(-1, 3), axis=0, return_inverse=True)
    counts = np.empty((len(distinct), lines), np.int32)
    for i, (number, length, reached) in enumerate(distinct.tolist()):
        start = walk.start[number]
        mine = slice(start[0], start[-1])
        there = np.clip(-(-reached // (TILE * columns)) - walk.first[mine], 0, walk.count[mine])
        before = np.concatenate([[0], np.cumsum(there, dtype=np.int64)])
        counts[i] = np.diff(before[start - start[0]])
        counts[i, -(-length // (TILE * GROUPS)):] = 0
    found.reshape(-1, lines)[:] = counts[which.ravel()]
    return found


def _items(steps: np.ndarray, groups: int, group_bytes: int) -> np.ndarray:
    """List the lines of all heads (or groups) as blocks take them: line, batch item, head, steps.

    Those that take longest come first, but heads that walk the same tokens stay together: as many
    as have theirs in the cache, `group_bytes` for each of `groups`.
    """
    heads = steps.shape[1]
    item, head, line = (x.ravel() for x in np.indices(steps.shape, np.int32))
    section = (item * groups + head // (heads // groups)) // max(1, CACHE_BYTES // group_bytes)
    order = np.lexsort((head, item, -steps.ravel(), section))
    return np.stack([line, item, head, steps.ravel()], axis=1).astype(np.int32)[order]


def _structure(fields: Sequence[tuple[str, Any]]) -> np.dtype:
    """Lay out a struct as C++ does; tensor maps, if any, come first and align it to 64 bytes."""
    laid = np.dtype(list(fields), align=True)
    places = laid.fields or {}
    return np.dtype({"names": list(places), "formats": [place[0] for place in places.values()],
                     "offsets": [place[1] for place in places.values()],
                     "itemsize": -(-laid.itemsize // 64) * 64})


_MAP = "V128"
_LISTS = np.dtype([(name, "u8") for name in ("start", "first", "count", "at", "names", "bits",
                                             "layout")] + [("lines", "i4")], align=True)
_ROWS = np.dtype([("first", "u8"), ("batch", "i8"), ("head", "i8"), ("row", "i8")])

_COMMON = [(name, "u8") for name in ("items", "q_lengths", "kv_lengths", "scale")]

FORWARD = _structure(
    [("q", _MAP), ("k", _MAP), ("v", _MAP), ("lists", _LISTS), ("values", _ROWS), *_COMMON]
    + [(name, "u8") for name in ("sinks", "out", "lse")]
    + [(name, "i4") for name in ("item_count", "heads", "group_heads", "n")])

BACKWARD = _structure(
    [("q", _MAP), ("k", _MAP), ("v", _MAP), ("dout", _MAP), ("lists", _LISTS),
     ("walked", _ROWS, 2), *_COMMON]
    + [(name, "u8") for name in ("steps", "lse", "delta", "dq", "dk", "dv", "dscale")]
    + [(name, "i4") for name in ("item_count", "heads", "groups", "group_heads", "n", "m")])


class _Launch:
    """The arguments of one launch of a kernel, and what keeps their arrays alive."""

    def __init__(self, device: Device, problem: Any, structure: np.dtype, name: str):
        self.device, self.problem, self.name = device, problem, name
        self.build = _build(device, name, problem.q.shape[3])
        self.arguments = np.zeros((), structure)
        self._held: list[Any] = []
        heads, groups = problem.q.shape[1], problem.k.shape[1]
        for name, value in (("heads", heads), ("groups", groups), ("group_heads", heads // groups),
                            ("n", problem.q.shape[2]), ("m", problem.k.shape[2])):
            if name in (structure.names or ()):
                self.arguments[name] = value
        self.put("scale", problem.scale)
        for name in ("q_lengths", "kv_lengths"):
            self.put(name, self._constant(getattr(problem, name)))

    def _constant(self, x: np.ndarray, dtype: Any = np.int32) -> Array:
        return self.device.constant(np.ascontiguousarray(x, dtype))

    def put(self, name: str, array: Array | None) -> None:
        """Tell the address of a dense array, 0 for none."""
        if array is not None:
            self.arguments[name] = self._address(contiguous(array))

    def _address(self, array: Array) -> int:
        self._held.append(array)
        return self.device.address(array)

    def put_map(self, name: str, array: Array, rows: int) -> None:
        """Tell how boxes of `rows` rows of (B, H, N, D) are read."""
        self._held.append(array)
        self.arguments[name] = np.frombuffer(self.device.tensor_map(array, rows, 64), _MAP)[0]

    def put_rows(self, name: str, *arrays: Array) -> None:
        """Tell where single rows lie."""
        rows = [(self._address(x), *(step // x.dtype.itemsize for step in x.strides[:3]))
                for x in arrays]
        self.arguments[name] = rows if len(rows) > 1 else rows[0]

    def put_lists(self, walk: Walk, steps: np.ndarray, groups: int | None = None) -> None:
        """Tell the steps of a walk, and what blocks take: its lines by head, or by group."""
        lists, (batch, heads, lines) = self.arguments["lists"], steps.shape
        for name in ("start", "first", "count", "at", "names", "bits"):
            lists[name] = self._address(self.device.constant(getattr(walk, name)))
        lists["layout"] = self._address(self._constant(self.problem.layout))
        lists["lines"] = lines
        if groups is not None:
            self.put("steps", self._constant(steps))
            steps = steps.reshape(batch, groups, heads // groups, lines).sum(axis=2)
        _, together, m, width = self.problem.k.shape
        items = _items(steps, together, 4 * width * (m if groups is None else
                                                     self.problem.q.shape[2] * heads // together))
        self.put("items", self._constant(items))
        self.arguments["item_count"] = len(items)

    def run(self) -> None:
        """Launch as many blocks as have items, one to a multiprocessor at most."""
        kernel = _kernel(self.name, self.problem.q.shape[3], dtype_name(self.problem.q),
                         self.build)
        blocks = min(int(self.arguments["item_count"]), self.device.multiprocessors)
        self.device.launch(kernel, blocks, self.arguments, _shared_bytes(kernel))


def configurations() -> list[tuple[Kernel, tuple[str, ...], str]]:
    """Return every kernel that can be launched, what it is compiled for, and what it must have."""
    return [(_kernel(name, width, dtype, build), ("sm_90a",), "HGMMA")
            for (name, width), builds in BUILDS.items() for build in builds
            for dtype in ("float16", "bfloat16")]


def _kernel(name: str, width: int, dtype: str, build: Build) -> Kernel:
    # the sums of two products of 128 columns take nearly all registers that there are
    serve, compute = (32, 240) if (name, width) == ("hopper_backward_keys", 128) else (40, 232)
    macros = {"BRAIN": int(dtype == "bfloat16"), "D": width, "GROUPS": GROUPS,
              "STAGES": build.stages, "SETTLE": build.settle, "SERVE_REGISTERS": serve,
              "COMPUTE_REGISTERS": compute}
    return Kernel(f"{name}.cu", name, tuple(macros.items()), 128 * (1 + GROUPS),
                  architecture_specific=True)


def _shared_bytes(kernel: Kernel) -> int:
    """Return what SHARED_BYTES is in the sources."""
    macros = dict(kernel.macros)
    rows, row, stages = GROUPS * TILE, 2 * int(macros["D"]), int(macros["STAGES"])
    if kernel.name == "hopper_forward":
        tiles = rows * row + stages * 2 * (2 * TILE) * row + 4 * GROUPS * 16 * row
        return tiles + stages * (rows * 2 * TILE // 8 + 32) + 8 * (2 + 6 * stages)
    tiles = 2 * rows * row + stages * 2 * TILE * row
    return tiles + stages * (rows * TILE // 8 + 2 * 4 * TILE + 32) + 8 * (2 + 5 * stages)


def contiguous(array: Array) -> Array:
    """Return a dense array of the same values, the array itself if it is one."""
    return namespace(array).ascontiguousarray(array)
