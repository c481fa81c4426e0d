"""Masks over positions: query i stands at position ``i + offset``, key j at j."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from ..checks import DtypeError, OptionError, ShapeError, require_integer
from .algebra import FULL, Index, Mask, host_array, share, within
from .bits import LANES, TILE
from .placement import Frame, Positional

FAR = 2**40
"""Beyond all positions, which are int32, and far from where int64 would overflow."""


def whole_numbers(name: str, values: Any, *, ndim: int | None = None) -> np.ndarray:
    """Return a read-only int64 copy of `values`, which must be integers >= 0."""
    array = host_array(values)
    if array.dtype.kind not in "iu" and array.size:
        raise DtypeError(f"{name} must hold integers; got {array.dtype}")
    if ndim is not None and array.ndim != ndim:
        raise ShapeError(f"{name} must have {ndim} axis; got shape {array.shape}")
    array = array.astype(np.int64)
    if array.size and array.min() < 0:
        raise OptionError(f"{name} must be at least 0; got {array.min()}")
    array.flags.writeable = False
    return array


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class full(Positional):
    """Every query sees every key."""

    def resolve(self, frame: Frame) -> Mask:
        return self

    def allowed(self, i: Index, j: Index) -> np.ndarray:
        return np.ones(np.broadcast_shapes(i.shape, j.shape), bool)

    def classify(self, i0: Index, i1: Index, j0: Index, j1: Index) -> np.ndarray:
        return np.full(i0.shape, FULL)

    def signature(self, i0: Index, j0: Index) -> tuple[np.ndarray, ...]:
        return ()


class Relative(Positional):
    """Allowed by the distance d = i - j alone: ``low <= d <= high``, and `step` divides d."""

    low: int | None = None
    high: int | None = None
    step: int = 1

    def allowed(self, i: Index, j: Index) -> np.ndarray:
        # i and j are short before they broadcast, so arithmetic stays on either side
        tests = [np.ones(np.broadcast_shapes(i.shape, j.shape), bool)]
        if self.low is not None:
            tests.append(i - self.low >= j)
        if self.high is not None:
            tests.append(i - self.high <= j)
        if self.step > 1:
            tests.append(i % self.step == j % self.step)
        return functools.reduce(np.logical_and, tests)

    def classify(self, i0: Index, i1: Index, j0: Index, j1: Index) -> np.ndarray:
        least, most = i0 - j1, i1 - j0
        low = least if self.low is None else np.maximum(least, self.low)
        high = most if self.high is None else np.minimum(most, self.high)
        multiples = np.maximum(high // self.step + -low // self.step + 1, 0)
        return share(multiples, most - least + 1)

    def signature(self, i0: Index, j0: Index) -> tuple[np.ndarray, ...]:
        distance = i0 - j0
        edges = [edge for edge in (self.low, self.high) if edge is not None]
        # tiles that lie wholly to one side of the edges are alike
        sides = (np.clip(distance, min(edges) - TILE, max(edges) + TILE),) if edges else ()
        return (*sides, distance % self.step) if self.step > 1 else sides


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class causal(Relative):
    """A query sees the keys up to its own position: ``j <= i``.

    Examples
    --------
    >>> from pyattn import masks
    >>> print(masks.causal().draw(2, 4))           # the last query stands at the last key
    ███·
    ████
    """

    low = 0


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class window(Relative):
    """A query sees its neighbours: ``-right <= i - j <= left``.

    Parameters
    ----------
    left, right : int >= 0, or None
        Keys on either side; None = all of them. ``window(w, w)`` is ``|i - j| <= w``, and
        ``window(w, 0)`` is ``0 <= i - j <= w``: `w` keys and the query's own.
    dilation : int >= 1
        Only every `dilation`-th key: ``-right * dilation <= i - j <= left * dilation``, and
        `dilation` divides ``i - j``.

    Examples
    --------
    >>> from pyattn import masks
    >>> print(masks.window(1, 1, dilation=2).draw(5))
    █·█··
    ·█·█·
    █·█·█
    ·█·█·
    ··█·█
    """

    left: int | None
    right: int | None
    dilation: int = 1

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            if getattr(self, name) is not None:
                value = require_integer(f"window's {name}", getattr(self, name), minimum=0)
                self._set(**{name: value})
        dilation = require_integer("window's dilation", self.dilation, minimum=1)
        self._set(dilation=dilation, step=dilation,
                  low=None if self.right is None else -min(self.right * dilation, FAR),
                  high=None if self.left is None else min(self.left * dilation, FAR))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class strided(Relative):
    """A query sees every `stride`-th key, its own among them: ``(i - j) % stride == 0``.

    With ``& causal()`` it is one half of the Sparse Transformer's strided pattern; the other is
    ``window(stride - 1, 0)``.

    References
    ----------
    .. [1] Child et al., "Generating Long Sequences with Sparse Transformers", 2019,
       arXiv:1904.10509, section 4.3.
    """

    stride: int

    def __post_init__(self) -> None:
        stride = require_integer("strided's stride", self.stride, minimum=1)
        self._set(stride=stride, step=stride)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class fixed(Positional):
    """A query sees its own block of `stride` keys, and the last `columns` keys of every block.

    ``i // stride == j // stride or j % stride >= stride - columns``. With ``& causal()`` it is the
    Sparse Transformer's fixed pattern, where only earlier blocks remain.

    Examples
    --------
    >>> from pyattn import masks
    >>> print((masks.fixed(3, 1) & masks.causal()).draw(6))
    █·····
    ██····
    ███···
    ··██··
    ··███·
    ··████

    References
    ----------
    .. [1] Child et al., "Generating Long Sequences with Sparse Transformers", 2019,
       arXiv:1904.10509, section 4.3.
    """

    stride: int
    columns: int

    def __post_init__(self) -> None:
        stride = require_integer("fixed's stride", self.stride, minimum=1)
        columns = require_integer("fixed's columns", self.columns, minimum=0)
        if columns > stride:
            raise OptionError(f"fixed's columns must be at most its stride {stride}; got {columns}")
        self._set(stride=stride, columns=columns)

    def allowed(self, i: Index, j: Index) -> np.ndarray:
        summary = j % self.stride >= self.stride - self.columns
        return (i // self.stride == j // self.stride) | summary

    def classify(self, i0: Index, i1: Index, j0: Index, j1: Index) -> np.ndarray:
        s = self.stride
        own = within(i0 // s - j1 // s, i1 // s - j0 // s, 0, 0)
        summary = share(self._summaries(j1 + 1) - self._summaries(j0), j1 - j0 + 1)
        return np.maximum(own, summary)

    def _summaries(self, end: Index) -> np.ndarray:
        """How many of the keys before `end` are among the last columns of a block."""
        blocks, rest = np.divmod(end, self.stride)
        return blocks * self.columns + np.maximum(rest - (self.stride - self.columns), 0)

    def signature(self, i0: Index, j0: Index) -> tuple[np.ndarray, ...]:
        return _grid_signature(i0, j0, self.stride, 0)


def _grid_signature(i0: Index, j0: Index, width: int, reach: int) -> tuple[np.ndarray, ...]:
    """Tell tiles apart by places in a row of `width` tokens, and by rows up to `reach` apart."""
    far = reach + TILE // width + 2
    return i0 % width, j0 % width, np.clip(i0 // width - j0 // width, -far, far)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class window_2d(Positional):
    """A query sees a rectangle around itself; tokens are the cells of a grid, row by row.

    With ``r, c = divmod(i, columns)`` a query sees the keys with ``|dr| <= radius[0]`` and
    ``|dc| <= radius[1]``: a row's end does not touch the next row's start.

    Parameters
    ----------
    shape : (rows, columns)
    radius : int or (int, int)
        Reach along rows and columns of the grid.

    Examples
    --------
    >>> from pyattn import masks
    >>> print(masks.window_2d((2, 3), 1).draw(6))
    ██·██·
    ██████
    ·██·██
    ██·██·
    ██████
    ·██·██
    """

    shape: tuple[int, int]
    radius: int | tuple[int, int]

    def __post_init__(self) -> None:
        shape = tuple(whole_numbers("window_2d's shape", self.shape, ndim=1).tolist())
        if len(shape) != 2 or 0 in shape:
            raise ShapeError(f"window_2d's shape must be (rows, columns), each >= 1; got {shape}")
        self._set(shape=shape)
        if np.iterable(self.radius):
            radius = tuple(whole_numbers("window_2d's radius", self.radius, ndim=1).tolist())
            if len(radius) != 2:
                raise ShapeError(f"window_2d's radius must be an integer or two; got {radius}")
            self._set(radius=radius)
        else:
            self._set(radius=require_integer("window_2d's radius", self.radius, minimum=0))

    @property
    def reach(self) -> tuple[int, int]:
        """The radius along rows and columns."""
        return self.radius if isinstance(self.radius, tuple) else (self.radius, self.radius)

    def resolve(self, frame: Frame) -> Mask:
        rows, columns = self.shape
        if frame.end > rows * columns:
            raise ShapeError(f"{self!r} has {rows * columns} tokens; "
                             f"positions up to {frame.end - 1} were asked for")
        return frame.place(self)

    def allowed(self, i: Index, j: Index) -> np.ndarray:
        _, columns = self.shape
        (row_i, column_i), (row_j, column_j) = np.divmod(i, columns), np.divmod(j, columns)
        return self.reaches(row_i - row_j, column_i - column_j)

    def reaches(self, rows: Index, columns: Index) -> np.ndarray:
        """Tell whether cells see each other that lie so many rows and columns apart."""
        rows_reach, columns_reach = self.reach
        return (np.abs(rows) <= rows_reach) & (np.abs(columns) <= columns_reach)

    def classify(self, i0: Index, i1: Index, j0: Index, j1: Index) -> np.ndarray:
        _, columns = self.shape
        rows = (i0 // columns, i1 // columns, j0 // columns, j1 // columns)
        return self.classify_cells(rows, (*self._columns(i0, i1), *self._columns(j0, j1)))

    def classify_cells(self, rows: tuple[Index, ...], columns: tuple[Index, ...]) -> np.ndarray:
        """Classify rectangles of cells: the queries' first and last row, the keys', columns too."""
        kinds = [within(i0 - j1, i1 - j0, -reach, reach)
                 for (i0, i1, j0, j1), reach in zip((rows, columns), self.reach, strict=True)]
        return np.minimum(*kinds)

    def _columns(self, low: Index, high: Index) -> tuple[np.ndarray, np.ndarray]:
        """First and last column of the grid that tokens low..high touch."""
        _, columns = self.shape
        one_row = low // columns == high // columns
        return (np.where(one_row, low % columns, 0),
                np.where(one_row, high % columns, columns - 1))

    def signature(self, i0: Index, j0: Index) -> tuple[np.ndarray, ...]:
        return _grid_signature(i0, j0, self.shape[1], self.reach[0])


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class global_tokens(Positional):
    """Tokens that see all and are seen by all: ``i in index or j in index``.

    Parameters
    ----------
    index : sequence of int, >= 0
        Positions.

    Examples
    --------
    >>> from pyattn import masks
    >>> print(masks.global_tokens([0, 3]).draw(4))
    ████
    █··█
    █··█
    ████
    """

    index: Any

    def __post_init__(self) -> None:
        index = np.unique(whole_numbers("global_tokens' index", self.index, ndim=1))
        index.flags.writeable = False
        self._set(index=index)

    def _holds(self, position: Index) -> np.ndarray:
        position = np.asarray(position)
        if not self.index.size:
            return np.zeros(position.shape, bool)
        at = np.minimum(np.searchsorted(self.index, position), self.index.size - 1)
        return self.index[at] == position

    def allowed(self, i: Index, j: Index) -> np.ndarray:
        return self._holds(i) | self._holds(j)

    def _held(self, low: Index, high: Index) -> np.ndarray:
        count = np.searchsorted(self.index, high + 1) - np.searchsorted(self.index, low)
        return share(count, high - low + 1)

    def classify(self, i0: Index, i1: Index, j0: Index, j1: Index) -> np.ndarray:
        return np.maximum(self._held(i0, i1), self._held(j0, j1))

    def signature(self, i0: Index, j0: Index) -> tuple[np.ndarray, ...]:
        def word(start: Index) -> np.ndarray:
            held = self._holds(start[:, None] + LANES)
            return np.packbits(held, axis=-1, bitorder="little").view("<u8").reshape(-1)

        return word(i0), word(j0)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class staircase(Positional):
    """Key c sums up a block of tokens, and is seen once the block is complete.

    Block c is tokens ``c * stride .. c * stride + block_size - 1``, so a query at position i sees
    the keys with ``c * stride + block_size - 1 <= i``.

    Parameters
    ----------
    block_size, stride : int >= 1, tokens
        Blocks overlap where the stride is smaller.

    Examples
    --------
    >>> from pyattn import masks
    >>> print(masks.placed(masks.staircase(3, 2), 0).draw(8, 3))
    ···
    ···
    █··
    █··
    ██·
    ██·
    ███
    ███

    References
    ----------
    .. [1] Yuan et al., "Native Sparse Attention", 2025, arXiv:2502.11089, section 3.3.1.
    """

    block_size: int
    stride: int

    def __post_init__(self) -> None:
        for name in ("block_size", "stride"):
            value = require_integer(f"staircase's {name}", getattr(self, name), minimum=1)
            self._set(**{name: value})

    def allowed(self, i: Index, j: Index) -> np.ndarray:
        return j * self.stride + (self.block_size - 1) <= i

    def classify(self, i0: Index, i1: Index, j0: Index, j1: Index) -> np.ndarray:
        s = self.stride
        return within(i0 - j1 * s, i1 - j0 * s, self.block_size - 1, FAR)

    def signature(self, i0: Index, j0: Index) -> tuple[np.ndarray, ...]:
        # how far the first key of a tile is behind the last token of its block
        ahead = i0 - j0 * self.stride - (self.block_size - 1)
        return (np.clip(ahead, -TILE, TILE * self.stride),)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class predicate(Positional):
    """A rule of your own: a query sees the keys for which ``function(i, j)`` is True.

    Parameters
    ----------
    function : callable
        Takes integer arrays of positions that broadcast against each other, and returns booleans of
        the broadcast shape. It must be pure: what it answered is kept, and reused for as long as
        this very function is passed.
    bounds : Mask, optional
        Where the rule is looked at; outside nothing is allowed. Without it the function is
        evaluated on all ``n * m`` pairs, once.

    Examples
    --------
    >>> from pyattn import masks
    >>> print(masks.predicate(lambda i, j: (i + j) % 3 == 0, masks.causal()).draw(4))
    █···
    ····
    ·█··
    █··█
    """

    function: Callable[[np.ndarray, np.ndarray], np.ndarray]
    bounds: Mask | None = None

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise DtypeError(f"predicate takes a function of (i, j); "
                             f"got {type(self.function).__name__}")
        if not isinstance(self.bounds, Mask | None):
            raise DtypeError(f"predicate's bounds must be a mask; got {type(self.bounds).__name__}")

    @property
    def lead(self) -> tuple[int, ...]:
        return () if self.bounds is None else self.bounds.lead

    def at(self, index: tuple[int, ...]) -> Mask:
        return predicate(self.function, None if self.bounds is None else self.bounds.at(index))

    def resolve(self, frame: Frame) -> Mask:
        rule = frame.place(predicate(self.function))
        return rule if self.bounds is None else self.bounds.resolve(frame) & rule

    def allowed(self, i: Index, j: Index) -> np.ndarray:
        answer = np.asarray(self.function(i, j))
        if answer.dtype != bool:
            raise DtypeError(f"{self!r} must answer with booleans; got {answer.dtype}")
        try:
            return np.broadcast_to(answer, np.broadcast_shapes(i.shape, j.shape))
        except ValueError:
            raise ShapeError(f"{self!r} must answer with the broadcast shape of its arguments "
                             f"{i.shape} and {j.shape}; got {answer.shape}") from None
