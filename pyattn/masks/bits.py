"""Tiles of 64 x 64 pairs as 64 words of 64 bits, and ranges of integers laid end to end."""

from __future__ import annotations

import numpy as np

TILE = 64
"""Queries and keys of a tile, on every backend."""

LANES = np.arange(TILE)
"""The rows, or columns, of a tile."""


def tiles_of(length: int) -> int:
    """Return the number of tiles that cover `length` tokens."""
    return -(-length // TILE)


def pack(allowed: np.ndarray) -> np.ndarray:
    """Turn booleans that broadcast to (T, 64, 64) into uint64 (T, 64): word i, bit j."""
    full = np.broadcast_to(allowed, (len(allowed), TILE, TILE))
    octets = np.packbits(full, axis=-1, bitorder="little")
    return np.ascontiguousarray(octets).view("<u8")[..., 0]


def unpack(words: np.ndarray) -> np.ndarray:
    """Undo `pack`: booleans (T, 64, 64)."""
    octets = np.ascontiguousarray(words, "<u8")[..., None].view(np.uint8)
    return np.unpackbits(octets, axis=-1, bitorder="little").view(bool)


def transpose(words: np.ndarray) -> np.ndarray:
    """Exchange queries and keys of tiles: ever smaller squares beside the diagonal change places.

    Of the squares of side s, bits s to 2 s of a word meet bits 0 to s of the word s rows on.
    """
    out = np.array(words, np.uint64)
    side = TILE // 2
    low = np.uint64(2**32 - 1)
    while side:
        shift = np.uint64(side)
        pair = out.reshape(-1, TILE // (2 * side), 2, side)
        upper, lower = pair[:, :, 0], pair[:, :, 1]
        moved = (upper >> shift ^ lower) & low
        lower ^= moved
        upper ^= moved << shift
        side //= 2
        low ^= low << np.uint64(side)
    return out


def low_bits(count: np.ndarray) -> np.ndarray:
    """Return words whose lowest `count` bits, 0 to 64, are set."""
    count = np.asarray(count)
    ones = np.uint64(2**64 - 1) >> (TILE - np.maximum(count, 1)).astype(np.uint64)
    return np.where(count > 0, ones, np.uint64(0))


def spans(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return first[0] .. first[0] + count[0] - 1, then as many from first[1], and so on."""
    ends = np.cumsum(count, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(first - ends + count, count) + np.arange(total)
