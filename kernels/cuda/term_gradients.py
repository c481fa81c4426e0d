"""Gradients of bias, gate and offsets: who owns which numbers, and how tiles become gradients.

A term may be broadcast, so many pairs add to one number of its gradient. What adds to the same
numbers, at the same places within 64 x 64 tiles, is one owner's:

    bias (B, H, N, M)   a tile             bias (B, H, 1, M)   a column of tiles
    bias (B, H, N, 1)   a row of tiles     offsets (H, W)      a diagonal of tiles

and so through all batch items and heads that share the numbers. The kernel adds an owner's tiles
up, in pieces so that all of a GPU has work, and leaves 64 x 64 sums for each piece; these are then
added along rows, columns or diagonals, and put where they belong, in an order that is always the
same.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from pyattn.arrays import Array

from .layout import TILE

AddUp = Callable[["Pieces", bool], Array]
"""Launches pieces, for the gradient of the scores or of the gate; their sums (P, 64, 64)."""

VISITS = 64
"""Tiles that a piece adds up, at most, if there are enough owners anyway."""

PIECES = 2048
"""Pieces whose sums are kept at a time: 16 kB each, 32 in float64."""


class TilesOf(NamedTuple):
    """The tiles that one layout of a BlockMask lists."""

    query: np.ndarray
    key: np.ndarray
    kind: np.ndarray
    """-1 for a full tile, else the number of its bits."""


_tiles: weakref.WeakKeyDictionary[Any, dict[int, TilesOf]] = weakref.WeakKeyDictionary()


def tiles_of(blocks: Any, layout: int) -> TilesOf:
    """Return the tiles of a layout; they are kept as long as the BlockMask is."""
    known = _tiles.setdefault(blocks, {})
    if layout not in known:
        runs = blocks.rows
        start = runs.start[layout]
        mine = slice(start[0], start[-1])
        count = runs.count[mine].astype(np.int64)
        step = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        first = np.repeat(runs.tile[mine].astype(np.int64), count)
        kind = np.full(len(step), -1, np.int64)
        kind[first >= 0] = runs.names[(first + step)[first >= 0]]
        known[layout] = TilesOf(
            np.repeat(np.repeat(np.arange(len(start) - 1), np.diff(start)), count),
            np.repeat(runs.first[mine].astype(np.int64), count) + step, kind)
    return known[layout]


class Pieces(NamedTuple):
    """What the blocks of a launch do, and for which owner."""

    pieces: np.ndarray
    """int32 (P, 4): first tile, tiles, first pair, pairs."""
    tiles: np.ndarray
    """int32 (T, 3): query tile, key tile, kind."""
    pairs: np.ndarray
    """int32 (., 2): batch item, head."""
    label: np.ndarray
    """(P,): which rows of the term the pairs share."""
    key: np.ndarray
    """(P,): which of the places that an owner may have."""
    turn: np.ndarray
    """(P,): how many pieces of the same owner come before."""


def divide(blocks: Any, layout: np.ndarray, labels: np.ndarray, key_of: Any, wanted: int) -> Pieces:
    """Divide work among owners, and these among pieces, of which `wanted` are to be had.

    `labels` (B, H) tells which pairs share numbers, ``key_of(query tile, key tile)`` which tiles.
    """
    order = np.lexsort((layout.ravel(), labels.ravel()))
    pairs = np.stack(np.divmod(order, layout.shape[1]), axis=1)
    both = np.stack([labels.ravel()[order], layout.ravel()[order]], axis=1)
    cuts = np.flatnonzero(np.any(both[1:] != both[:-1], axis=1)) + 1
    begins = np.append(0, cuts) if len(both) else cuts
    ends = np.append(begins[1:], len(both))[:len(begins)]

    listed, at, total = [], {}, 0
    for number in np.unique(layout).tolist():
        tiles = tiles_of(blocks, number)
        keys = key_of(tiles.query, tiles.key)
        by_key = np.argsort(keys, kind="stable")
        listed.append(np.stack([x[by_key] for x in tiles], axis=1))
        found, first, count = np.unique(keys[by_key], return_index=True, return_counts=True)
        at[number] = found, first + total, count
        total += len(keys)

    owners = [(label, number, begin, end) for (label, number), begin, end in
              zip(both[begins].tolist(), begins.tolist(), ends.tolist(), strict=True)]
    plenty = sum(len(at[number][0]) for _, number, _, _ in owners) >= wanted
    rows = []
    for label, number, begin, end in owners:
        found, first, count = at[number]
        most = max(1, VISITS // (end - begin)) if plenty else max(1, 8 // (end - begin))
        slices = -(-count // most)
        owner = np.repeat(np.arange(len(found)), slices)
        turn = np.arange(len(owner)) - np.repeat(np.cumsum(slices) - slices, slices)
        from_ = turn * most
        rows.append(np.stack([
            first[owner] + from_, np.minimum(most, count[owner] - from_),
            np.full(len(owner), begin), np.full(len(owner), end - begin),
            np.full(len(owner), label), found[owner]], axis=1))
    whole = np.concatenate(rows) if rows else np.zeros((0, 6), np.int64)
    # pieces of one owner: those of several layouts come one after the other
    by_owner = np.lexsort((whole[:, 5], whole[:, 4]))
    whole = whole[by_owner]
    new = np.ones(len(whole), bool)
    new[1:] = np.any(whole[1:, 4:] != whole[:-1, 4:], axis=1)
    start = np.flatnonzero(new)
    turn = np.arange(len(whole)) - np.repeat(start, np.diff(np.append(start, len(whole))))
    return Pieces(whole[:, :4].astype(np.int32),
                  np.concatenate(listed).astype(np.int32) if listed else np.zeros((0, 3), np.int32),
                  pairs.astype(np.int32), whole[:, 4], whole[:, 5], turn)


class Axis(NamedTuple):
    """What one axis of tiles comes to in a gradient: how sums go into its numbers."""

    length: int
    """How many numbers the gradient has."""
    tiles: int
    """How many tiles in a row add to the same numbers."""
    lines: int
    """How many lines of a tile add to the same number; 64 or a divisor of it."""
    spread: int = 1
    """If not 1, the numbers found are added up by so many: blocks that tiles do not fit."""

    @property
    def numbers(self) -> int:
        """How many numbers the lines of a tile make."""
        return TILE // self.lines


def axis_of(length: int, tokens: int, block: int) -> Axis:
    """Return the axis of a term that has `length` numbers for `tokens`, one for each `block`."""
    tiles = max(1, -(-tokens // TILE))
    if length == 1 and tokens > block:
        return Axis(1, tiles, TILE)
    if block % TILE == 0:
        return Axis(length, block // TILE, TILE)
    if TILE % block == 0:
        return Axis(length, 1, block)
    return Axis(length, 1, 1, block)


def of_array(add_up: AddUp, device: Any, p: Any, term: Any, block: int, of_gate: bool,
             wanted: int, acc: Any) -> Array:
    """Return the gradient of a term (b, h, n, m), of which an entry is for a block of pairs."""
    b, heads, *shape = term.array.shape
    batch, all_heads, n, _ = p.q.shape
    axes = [axis_of(length, tokens, block)
            for length, tokens in zip(shape, (n, p.k.shape[2]), strict=True)]
    counts = [-(-max(1, -(-tokens // TILE)) // axis.tiles)
              for axis, tokens in zip(axes, (n, p.k.shape[2]), strict=True)]
    own_rows = np.arange(all_heads) if heads > 1 else 0
    labels = np.broadcast_to(term.item.astype(np.int64)[:, None] * heads + own_rows,
                             (batch, all_heads))

    def key_of(query: np.ndarray, key: np.ndarray) -> np.ndarray:
        return query // axes[0].tiles * counts[1] + key // axes[1].tiles

    rows, columns = (axis.numbers for axis in axes)
    total = device.zeros((b * heads, counts[0] * counts[1], rows, columns), acc)
    whole = divide(p.blocks, p.layout, labels, key_of, wanted)
    for pieces, sums in chunks(whole, add_up, of_gate):
        sums = sums.reshape(-1, rows, axes[0].lines, columns, axes[1].lines).sum((2, 4))
        added_at(total, (pieces.label, pieces.key), pieces.turn, sums, device.constant)
    total = total.reshape(b, heads, *counts, rows, columns).transpose(0, 1, 2, 4, 3, 5)
    total = total.reshape(b, heads, counts[0] * rows, counts[1] * columns)
    for number, axis in enumerate(axes, start=2):
        if axis.spread > 1:
            total = by_blocks(device, total, number, axis)
    return total[:, :, :shape[0], :shape[1]]


def by_blocks(device: Any, x: Array, number: int, axis: Axis) -> Array:
    """Add up `axis.spread` numbers at a time along an axis."""
    room = axis.length * axis.spread
    padded = device.zeros((*x.shape[:number], room, *x.shape[number + 1:]), x.dtype)
    inside = (slice(None),) * number + (slice(min(room, x.shape[number])),)
    padded[inside] = x[inside]
    return padded.reshape(*x.shape[:number], axis.length, axis.spread,
                          *x.shape[number + 1:]).sum(number + 1)


def of_table(add_up: AddUp, device: Any, p: Any, shape: tuple[int, int], of_gate: bool,
             wanted: int, acc: Any) -> Array | None:
    """Return the gradient of a table by offset, (1 or H, W); None if tiles have no diagonals.

    They have where positions go up by one, as they do but for packed sequences.
    """
    if not (along(p.q_positions, p.q_lengths) and along(p.k_positions, p.kv_lengths)):
        return None
    heads, width = shape
    batch, all_heads, n, _ = p.q.shape
    if 0 in (batch, n, p.k.shape[2]):
        return device.zeros(shape, acc)
    start = np.broadcast_to(p.k_positions[:, :1].astype(np.int64) - p.q_positions[:, :1],
                            (batch, 1))
    starts, which = np.unique(start, return_inverse=True)
    labels = which.reshape(batch, 1) * heads + (np.arange(all_heads) if heads > 1 else 0)
    labels = np.broadcast_to(labels, (batch, all_heads))
    lines = -(-n // TILE)
    count = lines + max(1, -(-p.k.shape[2] // TILE))

    def key_of(query: np.ndarray, key: np.ndarray) -> np.ndarray:
        return key - query + lines

    # 64 offsets from each diagonal on; those below it belong to the one before
    total = device.zeros((len(starts) * heads, count, TILE), np.float64)
    whole = divide(p.blocks, p.layout, labels, key_of, wanted)
    for pieces, sums in chunks(whole, add_up, of_gate):
        found = diagonals(sums.astype(np.float64), device.zeros)
        added_at(total, (pieces.label, pieces.key), pieces.turn, found[:, TILE - 1:],
                 device.constant)
        below = device.zeros((len(sums), TILE), np.float64)
        below[:, 1:] = found[:, :TILE - 1]
        added_at(total, (pieces.label, pieces.key - 1), pieces.turn, below, device.constant)
    flat = total.reshape(len(starts), heads, count * TILE)
    table = device.zeros(shape, np.float64)
    for number, first in enumerate(starts.tolist()):
        # column of the table that the first of these offsets has
        at = first - lines * TILE - p.offset_origin
        low, high = max(0, at), min(width, at + count * TILE)
        if low < high:
            table[:, low:high] += flat[number][:, low - at:high - at]
    return table.astype(acc)


def chunks(whole: Pieces, add_up: AddUp, of_gate: bool) -> Any:
    """Launch pieces a few at a time; yield them and their sums."""
    for first in range(0, len(whole.pieces), PIECES):
        own = slice(first, first + PIECES)
        pieces = whole._replace(pieces=whole.pieces[own], label=whole.label[own],
                                key=whole.key[own], turn=whole.turn[own])
        yield pieces, add_up(pieces, of_gate)


def added_at(total: Array, places: tuple[np.ndarray, ...], turn: np.ndarray, x: Array,
             on: Any) -> None:
    """Add x[i] to total[places[0][i], ...], one turn after the other: a place has one in each."""
    for number in range(int(turn.max(initial=-1)) + 1):
        mine = np.flatnonzero(turn == number)
        if len(mine):
            index = tuple(on(place[mine]) for place in places)
            total[index] += x[on(mine)]


def diagonals(sums: Array, zeros: Any) -> Array:
    """Return the sums (P, 127) along the diagonals of (P, 64, 64): by key - query, from -63 on."""
    count = len(sums)
    room = zeros((count, TILE, 2 * TILE), sums.dtype)
    room[:, :, :TILE] = sums[:, ::-1, :]
    # a row one shorter than it is moves each row one place on
    flat = room.reshape(count, 2 * TILE * TILE)[:, :TILE * (2 * TILE - 1)]
    return flat.reshape(count, TILE, 2 * TILE - 1).sum(1)


def along(x: np.ndarray, lengths: np.ndarray) -> bool:
    """Whether positions (1 or B, N) go up by one within the lengths."""
    if x.shape[1] < 2:
        return True
    inside = np.arange(1, x.shape[1]) < np.broadcast_to(lengths, (len(lengths),))[:, None]
    return bool(((np.diff(x, axis=1) == 1) | ~inside).all())
