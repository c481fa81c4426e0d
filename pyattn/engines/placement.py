"""Where the tokens of a call stand: lengths, packed segments, and the positions that masks see."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from .. import arrays, masks
from ..checks import OptionError, ShapeError, require_broadcast
from ..masks.algebra import host_array

ALIGNMENTS = ("bottom_right", "top_left")

SHARED_ITEMS = 1024
"""Placements of at most so many batch items are kept between calls, 12 KB each."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """Positions of N queries and M keys, for every item of the leading axes `batch`.

    Key j stands at position j. Query i of an item stands at ``i + kv_length - q_length``, so that
    its last query meets its last key (bottom right), or at i (top left). In packed segments
    positions start anew in each segment.
    """

    batch: tuple[int, ...]
    n: int
    m: int
    alignment: str
    q_lengths: np.ndarray
    """int32 (B,)."""
    kv_lengths: np.ndarray
    """int32 (B,)."""
    segments: tuple[tuple[int, ...], tuple[int, ...]] | None

    @property
    def top_left(self) -> bool:
        """Whether queries stand at their own index."""
        return self.alignment == "top_left"

    @property
    def ragged(self) -> bool:
        """Whether any item has padding."""
        return bool((self.q_lengths != self.n).any() or (self.kv_lengths != self.m).any())

    @functools.cached_property
    def offset(self) -> np.ndarray:
        """Position of query 0, int32 (B,)."""
        return np.zeros_like(self.q_lengths) if self.top_left else self.kv_lengths - self.q_lengths

    @functools.cached_property
    def mask_offset(self) -> int | np.ndarray | None:
        """`offset` as masks are compiled for it: None for m - n, one integer where all agree."""
        if self.segments is not None or (self.offset == self.m - self.n).all():
            return None
        alike = (self.offset == self.offset[0]).all()
        return int(self.offset[0]) if alike else self.offset.reshape(self.batch)

    @property
    def distance_origin(self) -> int:
        """The smallest distance, key position - query position, that can occur."""
        return 1 - self.n if self.top_left else 1 - self.m

    @property
    def distances(self) -> np.ndarray:
        """All N + M - 1 distances that can occur, ascending."""
        return np.arange(max(self.n + self.m - 1, 0)) + self.distance_origin

    @property
    def q_positions(self) -> np.ndarray:
        """int32 (1 or B, N)."""
        if self.segments is None:
            return np.arange(self.n, dtype=np.int32) + self.offset[:, None]
        queries, keys = self.segments
        start = [0 if self.top_left else k - q for q, k in zip(queries, keys, strict=True)]
        return _restarting(queries) + np.repeat(start, queries).astype(np.int32)[None]

    @property
    def k_positions(self) -> np.ndarray:
        """int32 (1, M)."""
        if self.segments is None:
            return np.arange(self.m, dtype=np.int32)[None]
        return _restarting(self.segments[1])

    @property
    def streams(self) -> np.ndarray:
        """Which sequence each query is of, int32 (B, N): dropout draws anew for each."""
        items = np.arange(math.prod(self.batch), dtype=np.int32)[:, None]
        if self.segments is None:
            return np.broadcast_to(items, (items.shape[0], self.n))
        queries = self.segments[0]
        segment = np.repeat(np.arange(len(queries), dtype=np.int32), queries)
        return items * np.int32(len(queries)) + segment[None]

    def compile(self, mask: masks.Mask) -> masks.BlockMask:
        """Compile a mask over positions for where the tokens of this call stand."""
        if self.segments is not None:
            mask = masks.packed(mask, *self.segments, self.alignment)
        # where all is allowed, lengths need no compilation of their own
        offset = None if isinstance(mask, masks.full) else self.mask_offset
        return mask.compile(self.n, self.m, offset=offset)


def first_position(n: int, m: int, causal: bool | str, q_lengths: Any, kv_lengths: Any) -> Any:
    """Return the position of query 0, an integer or one for each batch item.

    For who makes a mask over positions before the engine has placed the tokens.
    """
    if causal == "top_left":
        return 0
    ends = m if kv_lengths is None else host_array(kv_lengths)
    return ends - (n if q_lengths is None else host_array(q_lengths))


def _restarting(lengths: tuple[int, ...]) -> np.ndarray:
    """0, 1, ... in each segment, int32 (1, total)."""
    parts = [np.arange(length, dtype=np.int32) for length in lengths]
    return np.concatenate([np.zeros(0, np.int32), *parts])[None]


def place(batch: tuple[int, ...], n: int, m: int, alignment: str, q_lengths: Any, kv_lengths: Any,
          segments: Any) -> Placement:
    """Check the lengths or segments of a call and place its tokens."""
    if alignment not in ALIGNMENTS:
        raise OptionError(f"alignment must be one of {', '.join(ALIGNMENTS)}; got {alignment!r}")
    given = q_lengths is not None or kv_lengths is not None or segments is not None
    if not given and math.prod(batch) <= SHARED_ITEMS:
        return _unpadded(batch, n, m, alignment)
    if segments is not None:
        if q_lengths is not None or kv_lengths is not None:
            raise OptionError("segments cannot be combined with q_lengths or kv_lengths")
        segments = _segments(segments, n, m)
    return Placement(batch, n, m, alignment, _lengths("q_lengths", q_lengths, batch, n),
                     _lengths("kv_lengths", kv_lengths, batch, m), segments)


@functools.lru_cache(256)
def _unpadded(batch: tuple[int, ...], n: int, m: int, alignment: str) -> Placement:
    """Place whole sequences: one record for all calls of a shape, so no one may write to it."""
    placement = Placement(batch, n, m, alignment, _lengths("q_lengths", None, batch, n),
                          _lengths("kv_lengths", None, batch, m), None)
    for array in (placement.q_lengths, placement.kv_lengths, placement.offset):
        array.flags.writeable = False
    return placement


def _integers(name: str, value: Any) -> np.ndarray:
    array = arrays.to_host(value) if hasattr(value, "__array__") else np.asarray(value)
    if array.size and array.dtype.kind not in "iu":
        raise OptionError(f"{name} must be integers; got {array.dtype}")
    return array.astype(np.int64)


def _lengths(name: str, value: Any, batch: tuple[int, ...], limit: int) -> np.ndarray:
    if value is None:
        return np.full(math.prod(batch), limit, dtype=np.int32)
    lengths = _integers(name, value)
    require_broadcast(name, lengths.shape, batch, "the leading axes")
    if lengths.size and not (lengths.min() >= 0 and lengths.max() <= limit):
        raise ShapeError(f"{name} must lie in 0..{limit}; got {lengths.min()}..{lengths.max()}")
    return np.broadcast_to(lengths, batch).reshape(-1).astype(np.int32)


def _segments(value: Any, n: int, m: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """One list of lengths for both sides, or a pair of lists."""
    pair = isinstance(value, tuple | list) and len(value) == 2 and all(
        hasattr(part, "__len__") for part in value)
    queries, keys = value if pair else (value, value)
    queries, keys = _segment_lengths("queries", queries, n), _segment_lengths("keys", keys, m)
    if len(queries) != len(keys):
        raise ShapeError(f"segments must pair each piece of the queries with one of the keys; got "
                         f"{len(queries)} and {len(keys)} pieces")
    return queries, keys


def _segment_lengths(side: str, value: Any, total: int) -> tuple[int, ...]:
    """Lengths that sum to `total`; cumulative lengths (0, ..., total) are taken as well."""
    given = _integers("segments", value)
    if given.ndim != 1:
        raise ShapeError(f"segments must be a list of lengths; got shape {given.shape}")
    lengths = given
    if given.sum() != total and given.size and given[0] == 0 and given[-1] == total:
        lengths = np.diff(given)
    if lengths.sum() != total or (lengths < 0).any():
        raise ShapeError(f"segments must be lengths that sum to the {total} {side}, or cumulative "
                         f"lengths from 0 to {total}; got {given.tolist()}")
    return tuple(int(length) for length in lengths)
