"""Weighted sums in which a masked pair adds nothing, whatever lies behind it."""

from __future__ import annotations

from typing import Any

from pyattn.arrays import accumulator

from .slabs import Array


def all_finite(xp: Any, *arrays: Array) -> bool:
    """Whether no array holds NaN or inf."""
    return all(bool(xp.all(xp.isfinite(xp.astype(x, accumulator(xp, x))))) for x in arrays)


def weighted(xp: Any, weights: Array, x: Array, allowed: Array | None, finite: bool) -> Array:
    """Weights @ x, in which a pair that is not allowed adds nothing, whatever `x` holds there."""
    if finite or allowed is None:
        return xp.matmul(weights, x)
    total = xp.zeros_like(xp.matmul(weights, x))
    for j in range(0, x.shape[-2], 8):
        part = slice(j, min(j + 8, x.shape[-2]))
        product = weights[..., part][..., None] * x[..., None, part, :]
        total = total + xp.sum(xp.where(allowed[..., part][..., None], product,
                                        xp.zeros_like(product)), axis=-2)
    return total
