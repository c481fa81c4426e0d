"""The windows and lines of a grid's cells; tables of relative positions.

A grid of any number of axes is a sequence of N tokens, its last axis running fastest. Each cell is
in one window, so gathering and putting back are one `take` each, and each is the other's backward.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import arrays, masks
from ..arrays import Array
from ..checks import OptionError, ShapeError, require_integer
from ..masks.order import Order
from ..masks.placement import bottom_right


def per_axis(name: str, value: Any, axes: int, minimum: int) -> tuple[int, ...]:
    """One integer for each axis of a grid, from one for all or a sequence of them."""
    sides = value if isinstance(value, Sequence | np.ndarray) else (value,) * axes
    if len(sides) != axes:
        raise OptionError(f"{name} must be one integer, or one for each of the {axes} axes; got "
                          f"{value!r}")
    return tuple(require_integer(name, side, minimum=minimum) for side in sides)


def require_grid(shape: Any, **named: Array) -> tuple[int, ...]:
    """Return `shape` as a tuple; ShapeError unless its cells are the tokens of the arrays."""
    sides = tuple(shape) if isinstance(shape, Sequence | np.ndarray) else (shape,)
    sides = tuple(require_integer("shape", side, minimum=1) for side in sides)
    if not sides:
        raise OptionError("shape must have at least one axis; got ()")
    for name, x in named.items():
        if x.ndim < 3 or x.shape[-2] != math.prod(sides):
            raise ShapeError(f"{name} must be (..., heads, tokens, width) with {math.prod(sides)} "
                             f"tokens, the cells of shape {sides}; got {tuple(x.shape)}")
    return sides


def refuse(options: dict[str, Any], names: tuple[str, ...], reason: str) -> None:
    """Raise OptionError if one of the options `names` is asked for."""
    for name in names:
        value = options.get(name)
        if value is not None and value is not False:
            raise OptionError(f"{name} cannot be given here: {reason}; got {name}={value!r}")


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Which cell of a grid stands where; made by `windows`, once for each set of options."""

    shape: tuple[int, ...]
    """Cells of the grid along each axis; N together."""
    size: tuple[int, ...]
    """Cells of a window along each axis; P together."""
    cells: np.ndarray
    """int (W, P): the cell at each place of each window; -1 is padding."""
    regions: np.ndarray
    """int (W, P): places of a window lay side by side before the roll iff these are equal."""

    @functools.cached_property
    def padded(self) -> bool:
        """Whether there is padding."""
        return bool((self.cells < 0).any())

    @functools.cached_property
    def order(self) -> Order:
        """Every window as an item."""
        return Order(self.cells)

    @functools.cached_property
    def places(self) -> np.ndarray:
        """Where in the flattened `cells` each cell is, int (N,)."""
        order = np.argsort(self.cells, axis=None, kind="stable")
        return order[self.cells.size - math.prod(self.shape):]


@functools.lru_cache(128)
def windows(shape: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...]) -> Windows:
    """Cut a grid, padded at its far ends and rolled by ``-shift``, into windows, row by row.

    A window is no longer than the grid; a grid that fits into one along any axis is not rolled.
    """
    if any(side <= reach for side, reach in zip(shape, window, strict=True)):
        shift = (0,) * len(shape)
    size = tuple(map(min, window, shape))
    cells = np.zeros((1,) * len(shape), np.int64)
    regions, real = cells, np.ones_like(cells, bool)
    for axis, (side, reach, roll) in enumerate(zip(shape, size, shift, strict=True)):
        long = -(-side // reach) * reach
        place = np.arange(long)
        cell = (place + roll) % long
        line = (-1,) + (1,) * (len(shape) - 1 - axis)
        # the last window holds what was rolled round, which is no neighbour of the rest
        region = (place >= long - roll).astype(np.int64)
        cells = cells * side + cell.reshape(line)
        regions = regions * 2 + region.reshape(line)
        real = real & (cell < side).reshape(line)
    cells = np.where(real, cells, -1)
    return Windows(shape, size, _tiled(cells, size), _tiled(regions, size))


def _tiled(x: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """An array over the padded grid as (windows, places)."""
    axes = x.ndim
    pieces = [n for side, reach in zip(x.shape, size, strict=True) for n in (side // reach, reach)]
    order = [*range(0, 2 * axes, 2), *range(1, 2 * axes, 2)]
    return x.reshape(pieces).transpose(order).reshape(-1, math.prod(size))


@functools.lru_cache(128)
def region_mask(layout: Windows, padding: bool) -> masks.Mask | None:
    """Pairs of one region, (W, 1, P, P), or None for all; `padding` says whether it takes part."""
    same = layout.regions[:, :, None] == layout.regions[:, None, :]
    if layout.padded and not padding:
        real = layout.cells >= 0
        same = same & real[:, :, None] & real[:, None, :]
    return None if same.all() else masks.dense(same[:, None])


@functools.lru_cache(128)
def _gathering(layout: Windows, heads: int) -> np.ndarray:
    """Rows of (heads * N) in the order (W, heads, P); ``heads * N`` at padding."""
    tokens, cells = math.prod(layout.shape), layout.cells[:, None, :]
    row = cells + tokens * np.arange(heads)[:, None]
    return np.where(cells < 0, heads * tokens, row).ravel()


@functools.lru_cache(128)
def _returning(layout: Windows, heads: int) -> np.ndarray:
    """Rows of (W * heads * P) in the order (heads, N)."""
    window, place = np.divmod(layout.places, layout.cells.shape[1])
    return ((window * heads + np.arange(heads)[:, None]) * layout.cells.shape[1] + place).ravel()


def partition(x: Array, layout: Windows) -> Array:
    """(..., H, N, D) as (..., W, H, P, D), with zeros for padding."""
    xp = arrays.namespace(x)
    *lead, heads, tokens, width = x.shape
    rows = arrays.reshape(xp, x, (*lead, heads * tokens, width))
    if layout.padded:
        empty = xp.zeros((*lead, 1, width), dtype=x.dtype, device=arrays.device(x))
        rows = xp.concat([rows, empty], axis=-2)
    return arrays.reshape(xp, _taken(xp, rows, _gathering(layout, heads)),
                          (*lead, layout.cells.shape[0], heads, layout.cells.shape[1], width))


def merge(x: Array, layout: Windows) -> Array:
    """Undo `partition`: (..., W, H, P, D) as (..., H, N, D), padding dropped."""
    xp = arrays.namespace(x)
    *lead, count, heads, places, width = x.shape
    rows = arrays.reshape(xp, x, (*lead, count * heads * places, width))
    return arrays.reshape(xp, _taken(xp, rows, _returning(layout, heads)),
                          (*lead, heads, math.prod(layout.shape), width))


def _taken(xp: Any, rows: Array, index: np.ndarray) -> Array:
    if type(rows) is not np.ndarray:
        index = arrays.from_host(xp, index, arrays.device(rows))
    return xp.take(rows, index, axis=-2)


@functools.lru_cache(128)
def line_order(shape: tuple[int, ...], axis: int) -> Order:
    """Every line of a grid's cells along `axis` as an item."""
    cells = np.arange(math.prod(shape)).reshape(shape)
    return Order(np.moveaxis(cells, axis, -1).reshape(-1, shape[axis]))


def inside(mask: masks.Mask, cells: np.ndarray, tokens: int) -> masks.Mask:
    """The pairs of `mask`, which speaks of all `tokens`, inside each group of cells.

    Parameters
    ----------
    mask : Mask
    cells : int array (*groups, L)
    tokens : int
        N.

    Returns
    -------
    Mask, leading axes (..., *groups, H), for L queries and keys
        Evaluated on the pairs inside groups alone.
    """
    frame = bottom_right(tokens, tokens)
    lead = mask.lead or (1,)
    i, j = cells[..., :, None], cells[..., None, :]
    found = np.empty((*lead, *i.shape[:-2], cells.shape[-1], cells.shape[-1]), bool)
    for index in itertools.product(*map(range, lead)):
        found[index] = mask.pick(index).resolve(frame).allowed(i, j)
    return masks.dense(np.moveaxis(found, len(lead) - 1, -3))


def expand_table(table: Array, window: tuple[int, ...], size: tuple[int, ...]) -> Array:
    """A bias (H, P, P) from one number for each head and distance, (rows, H).

    Place i of a window and place j differ by d along each axis; the row is d + window - 1, the last
    axis running fastest. `size` is the part of the window that exists.
    """
    xp = arrays.namespace(table)
    index = _relative(window, size)
    if type(table) is not np.ndarray:
        index = arrays.from_host(xp, index, arrays.device(table))
    places = math.prod(size)
    bias = xp.take(xp.permute_dims(table, (1, 0)), index, axis=1)
    return arrays.reshape(xp, bias, (table.shape[1], places, places))


@functools.lru_cache(128)
def _relative(window: tuple[int, ...], size: tuple[int, ...]) -> np.ndarray:
    places = np.indices(size).reshape(len(size), -1)
    row: Any = 0
    for place, reach in zip(places, window, strict=True):
        row = row * (2 * reach - 1) + place[:, None] - place[None, :] + reach - 1
    return row.ravel()


def collect_table(bias: Array, window: tuple[int, ...], size: tuple[int, ...]) -> Array:
    """Undo `expand_table`: sum a gradient (H, P, P) into (rows, H), without scattered writes."""
    xp = arrays.namespace(bias)
    axes = len(size)
    grid = arrays.reshape(xp, bias, (bias.shape[0], *size, *size))
    for axis in range(axes):
        # the axes of this i and j to the end, where their place is taken by the distance
        first, second = 1, 1 + axes - axis
        rest = [a for a in range(grid.ndim) if a not in (first, second)]
        grid = _diagonals(xp, xp.permute_dims(grid, (*rest, first, second)))
        short = window[axis] - size[axis]
        if short:
            edge = xp.zeros((*grid.shape[:-1], short), dtype=grid.dtype, device=arrays.device(grid))
            grid = xp.concat([edge, grid, edge], axis=-1)
    return xp.permute_dims(
        arrays.reshape(xp, grid, (bias.shape[0], math.prod(2 * side - 1 for side in window))),
        (1, 0))


def _diagonals(xp: Any, x: Array) -> Array:
    """Sum x (..., n, n) over i - j = d, for d = 1 - n to n - 1."""
    *lead, n, _ = x.shape
    blank = xp.zeros(x.shape, dtype=x.dtype, device=arrays.device(x))
    # in rows of 2 n, cut anew into rows of 2 n - 1, each row moves one column beyond the last
    rows = xp.concat([xp.flip(x, axis=-1), blank], axis=-1)
    flat = arrays.reshape(xp, rows, (*lead, 2 * n * n))[..., :n * (2 * n - 1)]
    return xp.sum(arrays.reshape(xp, flat, (*lead, n, 2 * n - 1)), axis=-2)
