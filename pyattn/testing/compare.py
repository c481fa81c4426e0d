"""Is an array right? Its error in the unit of a plain implementation's, and where it is wrong."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import ml_dtypes
import numpy as np

from pyattn import arrays

TILE = 64
FORWARD, BACKWARD = 2.0, 3.0
"""How many times the error of a plain implementation is allowed."""
_LOOSE = 1e-3
"""1 - correlation that is always allowed: rounding alone stays far below it."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One array judged. True if it passed; prints as one line and, if it failed, a reason."""

    name: str
    passed: bool
    reason: str
    """Why it failed, in words; empty if it passed."""
    error: float
    """Largest absolute difference from the exact array."""
    plain_error: float
    """The same of a plain implementation in the same dtype."""
    bound: float
    """The error that is allowed."""
    correlation: float
    """Cosine of the angle between the array and the exact one."""
    parity: bool
    """Whether NaN, inf and -inf stand exactly where they should."""
    shape: tuple[int, ...]
    dtype: str
    worst: tuple[int, ...] | None = None
    """Index of the largest difference."""
    heat: np.ndarray | None = None
    """Largest error / bound by tile, (leading axes..., tiles[, tiles]); inf where NaNs differ."""
    axes: int = 2
    """How many trailing axes are cut into tiles of 64."""

    def __bool__(self) -> bool:
        return self.passed

    @property
    def ratio(self) -> float:
        """The error as a multiple of the plain implementation's."""
        if self.plain_error:
            return self.error / self.plain_error
        return 0.0 if self.error == 0 else math.inf

    @property
    def tile(self) -> tuple[int, ...] | None:
        """Index into `heat` of the tile that holds the largest difference."""
        if self.worst is None:
            return None
        cut = len(self.worst) - self.axes
        return (*self.worst[:cut], *(i // TILE for i in self.worst[cut:]))

    @property
    def where(self) -> str:
        """The worst tile in words, such as ``batch 0, head 3, rows 64:128``."""
        if self.worst is None or self.tile is None:
            return ""
        if len(self.shape) < 2:
            return f"element {', '.join(map(str, self.worst))}"
        cut = len(self.shape) - self.axes
        *batch, head = self.tile[:cut] or (None,)
        words = [f"batch {', '.join(map(str, batch))}"] if batch else []
        words += [] if head is None else [f"head {head}"]
        for name, tile, size in zip(("rows", "columns"), self.tile[cut:], self.shape[cut:],
                                    strict=False):
            if name != "columns" or size > TILE:
                words.append(f"{name} {tile * TILE}:{min(size, (tile + 1) * TILE)}")
        return ", ".join(words)

    def __str__(self) -> str:
        line = (f"{self.name}: {'ok' if self.passed else 'FAILED'}, error {self.error:.2e} "
                f"({self.ratio:.2g}x plain, allowed {self.bound:.2e}), "
                f"correlation {self.correlation:.6f}")
        return line if self.passed else f"{line}; {self.reason}"


def compare(got: Any, exact: Any, plain: Any, *, name: str = "array", factor: float = FORWARD,
            axes: int = 2, unit: float = 0.0, floor: float = 0.0) -> Comparison:
    """Judge `got` against `exact` in the unit of what `plain` does.

    It passes if its shape is that of `exact` and its dtype that of `plain`, NaN and inf stand where
    they stand in `exact`, the largest error is at most ``factor * (error of plain)`` + 2 ulp of the
    largest value, and it points where `exact` points (correlation, as a whole and tile by tile,
    wherever `plain` does). The error rule is that of flash-attention's tests.

    Parameters
    ----------
    got : array of any library
    exact : array_like
        From `pyattn.reference`, in float64 (longdouble to judge float64).
    plain : array_like
        From `pyattn.reference` with ``precision=plain(dtype)``, in the dtype that is wanted.
    name : str
        For messages.
    factor : float
        2 for outputs, 3 for gradients.
    axes : {2, 1}
        Trailing axes that are cut into tiles of 64 to locate an error; the others are batch and
        head. 1 for lse and whatever has one number per head.
    unit : float
        What a plain implementation's error may be, where the array has too few numbers for its
        largest error to tell.
    floor : float
        Rounding that no implementation avoids, where the terms of a sum nearly cancel; it counts
        if it is more than those 2 ulp.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.testing import compare
    >>> exact = np.linspace(1, 2, 200).reshape(100, 2)
    >>> plain = exact.astype(np.float32)
    >>> bool(compare(plain, exact, plain))
    True
    >>> wrong = plain.copy()
    >>> wrong[70] = 0
    >>> print(compare(wrong, exact, plain, name="out").reason)
    error 1.71 is 2.9e+06 times what is allowed; 1 of 100 rows is wrong: 70
    """
    wanted_dtype, wanted_shape = arrays.dtype_name(np.asarray(plain)), np.shape(exact)
    found_dtype, found_shape = arrays.dtype_name(got), tuple(got.shape)
    if found_shape != wanted_shape:
        return Comparison(name, False, f"shape {found_shape} where {wanted_shape} is right",
                          math.nan, math.nan, math.nan, math.nan, False, found_shape, found_dtype)

    exact = np.asarray(exact)
    wide = np.result_type(exact.dtype, np.float64)
    got, plain, exact = (np.asarray(x).astype(wide) for x in (arrays.to_host(got), plain, exact))
    with np.errstate(all="ignore"):
        finite = np.isfinite(exact)
        amiss = np.where(finite, ~np.isfinite(got), ~_same(got, exact))
        error = np.where(finite & np.isfinite(got), abs(got - exact), 0)
        plain_error = _largest(np.where(finite & np.isfinite(plain), abs(plain - exact), 0))
        plain_error = max(plain_error, unit)
        largest = _largest(np.where(finite, abs(exact), 0))
        bound = factor * plain_error + max(floor, 2 * ulp(largest, plain_dtype(wanted_dtype)))
        sums = np.dtype(np.float64 if wanted_dtype == "float64" else np.float32)
        noise = 16 * max(floor, 2 * ulp(largest, sums))
        relative = error / bound
        relative = np.where(amiss, np.inf, relative)
        value = [np.where(finite & np.isfinite(got), x, 0) for x in (got, plain, exact)]
        correlation = _cosine(value[0], value[2])

    worst = None
    if error.size:
        worst = tuple(int(i) for i in np.unravel_index(
            np.argmax(relative if not amiss.any() else amiss), error.shape))
    axes = min(axes, error.ndim)
    heat = _by_tile(relative, axes)
    reasons = []
    if found_dtype != wanted_dtype:
        reasons.append(f"dtype {found_dtype} where {wanted_dtype} is right")
    if amiss.any():
        reasons.append(
            f"{int(amiss.sum())} of {amiss.size} values are not finite where they should be, or "
            f"finite where they should not; at {list(worst or ())} {got[worst]:.4g} where "
            f"{exact[worst]:.4g} is right")
    if (relative > 1).any():
        if (error > bound).any():
            reasons.append(f"error {error.max():.3g} is {error.max() / bound:.2g} times what is "
                           "allowed")
        reasons.append(_rows(relative, axes))
    if not reasons:
        reasons += _astray(value[0], value[1], value[2], factor, axes, noise)
    return Comparison(
        name, not reasons, "; ".join(reasons), float(_largest(error)), float(plain_error),
        float(bound), float(correlation), not amiss.any(), wanted_shape, found_dtype, worst,
        heat, axes)


def plain_dtype(name: str) -> np.dtype:
    """NumPy's dtype of that name, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def ulp(value: float, dtype: np.dtype) -> float:
    """Distance from `value` to the next number of `dtype`."""
    limits: Any = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]  # theirs
    exponent = math.frexp(max(float(value), float(limits.smallest_normal)))[1] - 1
    return math.ldexp(float(limits.eps), exponent)


def _same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.asarray((a == b) | (np.isnan(a) & np.isnan(b)))


def _largest(x: np.ndarray) -> Any:
    return x.max(initial=0)


def _cosine(a: np.ndarray, b: np.ndarray, axis: Any = None) -> Any:
    """Cosine of the angle between a and b: 1 where both are 0, 0 where one is."""
    top = [np.maximum(abs(x).max(axis, keepdims=True, initial=0), np.finfo(x.dtype).tiny)
           for x in (a, b)]
    a, b = a / top[0], b / top[1]
    aa, bb, ab = (a * a).sum(axis), (b * b).sum(axis), (a * b).sum(axis)
    return np.where((aa > 0) & (bb > 0), ab / np.sqrt(np.maximum(aa * bb, 1e-300)),
                    (aa == 0) & (bb == 0))


def _tiles(x: np.ndarray, axes: int) -> np.ndarray:
    """(..., N, D) as (..., tiles, tiles, 64 * 64), filled up with zeros."""
    if not axes:
        return x[..., None]
    lead = x.shape[:x.ndim - axes]
    counts = [max(1, -(-s // TILE)) for s in x.shape[x.ndim - axes:]]
    sides = [min(TILE, s) if c == 1 else TILE
             for s, c in zip(x.shape[x.ndim - axes:], counts, strict=True)]
    pad = [(0, 0)] * len(lead) + [(0, c * side - s) for c, side, s in
                                  zip(counts, sides, x.shape[x.ndim - axes:], strict=True)]
    x = np.pad(x, pad).reshape(*lead, *(p for pair in zip(counts, sides, strict=True)
                                        for p in pair))
    inner = tuple(len(lead) + 1 + 2 * a for a in range(axes))
    x = np.moveaxis(x, inner, range(x.ndim - axes, x.ndim))
    return x.reshape(*lead, *counts, math.prod(sides))


def _by_tile(x: np.ndarray, axes: int) -> np.ndarray:
    return np.asarray(_tiles(x, axes).max(-1, initial=0))


def _astray(got: np.ndarray, plain: np.ndarray, exact: np.ndarray, factor: float,
            axes: int, noise: float) -> list[str]:
    """Where `got` points elsewhere than `exact` although `plain` does not, above the noise."""
    def wrong(a: Any, b: Any) -> Any:
        return (b > 0.9) & (1 - a > np.maximum(_LOOSE, factor ** 2 * (1 - b)))

    whole, plain_whole = _cosine(got, exact), _cosine(plain, exact)
    if wrong(whole, plain_whole) and _largest(abs(exact)) > noise:
        return [f"correlation {whole:.3f} where a plain implementation has {plain_whole:.6f}"]
    tiles = [_tiles(x, axes) for x in (got, plain, exact)]
    cosine = _cosine(tiles[0], tiles[2], -1)
    # of a tile more is forgiven: it has fewer numbers to average over
    bad = wrong(cosine, _cosine(tiles[1], tiles[2], -1)) & (cosine < 0.9)
    bad &= abs(tiles[2]).max(-1, initial=0) > noise
    if not bad.any():
        return []
    return [f"correlation {cosine[bad].min():.3f} in {int(bad.sum())} of {bad.size} tiles, where a "
            "plain implementation has over 0.9"]


def _rows(relative: np.ndarray, axes: int) -> str:
    """How many rows are wrong, and which: one row, a tile, or everything."""
    if relative.ndim == 0:
        return "it is wrong"
    rows = relative.max(-1) > 1 if axes == 2 else relative > 1
    count = int(rows.sum())
    index = [int(i) for i in np.flatnonzero(rows.any(tuple(range(rows.ndim - 1))))]
    words = f"{count} of {rows.size} rows {'is' if count == 1 else 'are'} wrong: {_ranges(index)}"
    heads = math.prod(rows.shape[:-1])
    return words + (f", in {int(rows.any(-1).sum())} of {heads} heads" if heads > 1 else "")


def _ranges(index: list[int], limit: int = 6) -> str:
    """[0, 1, 2, 7] as '0-2, 7'."""
    runs: list[list[int]] = []
    for i in index:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    words = [str(a) if a == b else f"{a}-{b}" for a, b in runs[:limit]]
    return ", ".join(words) + (", ..." if len(runs) > limit else "")
