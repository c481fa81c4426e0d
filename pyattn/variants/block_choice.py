"""Blocks of keys drawn at random: what the variants that draw them share."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..checks import ShapeError
from ..differentiable import Saved


@dataclasses.dataclass(frozen=True)
class BlockChoiceSaved(Saved):
    """The record of the attention, and the blocks that were drawn for it."""

    attention: Any
    blocks: Array

    @property
    def decisions(self) -> dict[str, Array]:
        """``blocks``, int64 (H, query blocks, count), and those of the attention."""
        return {"blocks": self.blocks, **self.attention.decisions}

    @property
    def stats(self) -> dict[str, int]:
        """Those of the attention."""
        return self.attention.stats

    def backward(self, dout: Array, dlse: Array | None = None) -> Any:
        """Gradients of the array arguments that were given; the blocks are constants."""
        return self.attention.backward(dout, dlse)


def take_blocks(decisions: dict[str, Any] | None) -> tuple[np.ndarray | None, dict[str, Any]]:
    """Return the blocks that the caller decided on, or None, and the other decisions."""
    rest = dict(decisions or {})
    blocks = rest.pop("blocks", None)
    if blocks is None or not hasattr(blocks, "dtype"):
        return None if blocks is None else np.asarray(blocks), rest
    return arrays.to_host(blocks), rest


def heads_and_tokens(q: Array, k: Array) -> tuple[int, int]:
    """Return H and N; blocks of queries are blocks of keys, so that N = M is asked for."""
    if len(q.shape) < 3:
        raise ShapeError("q must have at least 3 axes (..., heads, tokens, width); "
                         f"got {tuple(q.shape)}")
    heads, tokens, _ = q.shape[-3:]
    if k.shape[-2:-1] != (tokens,):
        raise ShapeError(f"q and k must be of the same tokens; got q {tuple(q.shape)}, "
                         f"k {tuple(k.shape)}")
    return heads, tokens


def draw_blocks(rng: np.random.Generator, heads: int, excluded: np.ndarray, num_blocks: int,
                count: int) -> np.ndarray:
    """Draw `count` blocks for every head and row, distinct and none of the row's `excluded`.

    Parameters
    ----------
    rng : numpy.random.Generator
    heads : int
    excluded : int array, shape (rows, any)
        Each row distinct and ascending; entries from `num_blocks` on are no block.
    num_blocks : int
    count : int
        Every row must have as many candidates.

    Returns
    -------
    int64 array, shape (heads, rows, count)
    """
    candidates = num_blocks - (excluded < num_blocks).sum(1)
    drawn = np.empty((heads, len(excluded), count), np.int64)
    # Floyd's sampling without replacement, for all rows at once
    for step in range(count):
        last = np.broadcast_to(candidates - count + step, drawn.shape[:2])
        choice = rng.integers(0, last, endpoint=True)
        taken = (drawn[..., :step] == choice[..., None]).any(-1)
        drawn[..., step] = np.where(taken, last, choice)
    # from numbers of candidates to numbers of blocks
    for block in excluded.T:
        drawn += drawn >= block[:, None]
    return drawn
