"""Masks over storage: they speak of array indices, wherever the tokens stand."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from ..checks import DtypeError, ShapeError, require_integer, require_rng
from .algebra import EMPTY, FULL, PARTIAL, Index, Mask, host_array, share, within
from .bits import TILE, pack, spans
from .placement import Frame
from .positions import whole_numbers


def dense(array: Any) -> Mask:
    """Make a mask of a boolean array; True = may attend.

    Parameters
    ----------
    array : bool array, shape (..., H, N, M), (N, M) or (M,)
        Copied, one bit per pair. Axes of size 1 broadcast without being expanded, the last two to
        whatever lengths the mask is compiled for; leading axes of stride 0 count as size 1.

    Raises
    ------
    DtypeError
        The array is not boolean: 0 and 1, or 0 and -inf, mean different things to different people.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn import masks
    >>> padding = masks.dense(np.array([True, True, False]))
    >>> print((masks.causal() & padding).draw(3))
    █··
    ██·
    ██·
    """
    host = host_array(array)
    if host.dtype != bool:
        raise DtypeError(f"a dense mask must be boolean (True = may attend); got {host.dtype}")
    host = host.reshape((1,) * (2 - host.ndim) + host.shape)
    lead = host.ndim - 2
    host = host[tuple(slice(0, 1) if axis < lead and not step and host.size else slice(None)
                      for axis, step in enumerate(host.strides))]
    octets = np.packbits(host, axis=-1, bitorder="little")
    padded = np.zeros((*octets.shape[:-1], -(-octets.shape[-1] // 8) * 8), np.uint8)
    padded[..., :octets.shape[-1]] = octets
    return Bitmap(padded.view("<u8"), host.shape[-1])


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Bitmap(Mask):
    """What `dense` makes: a bit per pair."""

    bits: np.ndarray
    """uint64 (..., N, M / 64): bit j % 64 of word j // 64 is key j's."""
    width: int
    """M."""

    def __post_init__(self) -> None:
        self.bits.flags.writeable = False

    @property
    def lead(self) -> tuple[int, ...]:
        return self.bits.shape[:-2]

    def at(self, index: tuple[int, ...]) -> Mask:
        return Bitmap(self.bits[index], self.width) if index else self

    def resolve(self, frame: Frame) -> Mask:
        rows = self.bits.shape[-2]
        if rows not in (1, frame.n) or self.width not in (1, frame.m):
            raise ShapeError(f"a dense mask (..., {rows}, {self.width}) must broadcast to "
                             f"(..., N, M) = (..., {frame.n}, {frame.m})")
        return self

    def allowed(self, i: Index, j: Index) -> np.ndarray:
        i = i * 0 if self.bits.shape[0] == 1 else i
        j = j * 0 if self.width == 1 else j
        return self.bits[i, j >> 6] >> (j & 63).astype(np.uint64) & np.uint64(1) != 0

    def classify(self, i0: Index, i1: Index, j0: Index, j1: Index) -> np.ndarray:
        if self.bits.shape[0] == 1 and self.width > 1:
            return share(self._before[j1 + 1] - self._before[j0], j1 - j0 + 1)
        if self.width == 1 and self.bits.shape[0] > 1:
            return share(self._before[i1 + 1] - self._before[i0], i1 - i0 + 1)
        return super().classify(i0, i1, j0, j1)

    @functools.cached_property
    def _before(self) -> np.ndarray:
        """For a mask along one axis: how many tokens before each one are allowed."""
        length = max(self.bits.shape[0], self.width)
        token = np.arange(length)
        line = self.allowed(token, token)
        return np.concatenate([[0], np.cumsum(line)])

    def words(self, i: Index, j: Index) -> np.ndarray:
        i = i * 0 if self.bits.shape[0] == 1 else i
        if self.width == 1:
            return np.where(self.bits[i, 0] & np.uint64(1), ~np.uint64(0), np.uint64(0))
        return self.bits[i, j[:, :1] // TILE]

    def signature(self, i0: Index, j0: Index) -> tuple[np.ndarray, ...]:
        return (() if self.bits.shape[0] == 1 else (i0,)) + (() if self.width == 1 else (j0,))

    def __repr__(self) -> str:
        return f"dense(<bool array {(*self.bits.shape[:-1], self.width)}>)"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class lengths(Mask):
    """Padding: batch item b sees its first ``kv_lengths[b]`` keys.

    Parameters
    ----------
    kv_lengths : int array, shape (B...,)

    Examples
    --------
    >>> from pyattn import masks
    >>> masks.lengths([1, 3]).dense(1, 4).astype(int)[:, 0, 0]
    array([[1, 0, 0, 0],
           [1, 1, 1, 0]])
    """

    kv_lengths: Any

    def __post_init__(self) -> None:
        self._set(kv_lengths=whole_numbers("kv_lengths", self.kv_lengths))

    @property
    def lead(self) -> tuple[int, ...]:
        return (*self.kv_lengths.shape, 1)

    def at(self, index: tuple[int, ...]) -> Mask:
        return lengths(self.kv_lengths[index[:-1]])

    def resolve(self, frame: Frame) -> Mask:
        if self.kv_lengths.max(initial=0) > frame.m:
            raise ShapeError(f"kv_lengths must be at most M = {frame.m}; "
                             f"got {self.kv_lengths.max()}")
        return self

    def allowed(self, i: Index, j: Index) -> np.ndarray:
        return np.broadcast_to(j < self.kv_lengths, np.broadcast_shapes(i.shape, j.shape))

    def classify(self, i0: Index, i1: Index, j0: Index, j1: Index) -> np.ndarray:
        return within(j0, j1, 0, self.kv_lengths - 1)

    def signature(self, i0: Index, j0: Index) -> tuple[np.ndarray, ...]:
        return (j0,)


class Blockwise(Mask):
    """Allowed by the pair of blocks (i // block_size, j // block_size) alone."""

    block_size: int

    def holds(self, row: Index, column: Index) -> np.ndarray:
        """Tell for pairs of blocks whether they are allowed; blocks beyond the ends are asked."""
        raise NotImplementedError

    def allowed(self, i: Index, j: Index) -> np.ndarray:
        return self.holds(i // self.block_size, j // self.block_size)

    def words(self, i: Index, j: Index) -> np.ndarray:
        # a tile touches few blocks: ask once for each pair of them
        row, column = i // self.block_size, j // self.block_size
        near = np.arange(TILE // self.block_size + 2)
        table = self.holds(row[:, :1, None] + near[:, None], column[:, :1, None] + near)
        row, column = row - row[:, :1], column - column[:, :1]
        return pack(table[np.arange(len(i))[:, None, None], row[:, :, None], column[:, None, :]])

    def _fit(self, frame: Frame, rows: int | None, columns: int | None) -> None:
        for name, length, blocks in (("N", frame.n, rows), ("M", frame.m, columns)):
            needed = -(-length // self.block_size)
            if blocks is not None and blocks != needed:
                raise ShapeError(f"{name} = {length} makes {needed} blocks of {self.block_size}; "
                                 f"{self!r} has {blocks}")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class blocks(Blockwise):
    """Whole blocks of queries see whole blocks of keys.

    Parameters
    ----------
    table : bool array, shape (..., H, query blocks, key blocks)
        Copied. The last block of either side may be shorter.
    block_size : int >= 1
        Tokens in a block; any size.

    Examples
    --------
    >>> from pyattn import masks
    >>> print(masks.blocks([[True, False], [True, True]], 2).draw(4, 3))
    ██·
    ██·
    ███
    ███
    """

    table: Any
    block_size: int

    def __post_init__(self) -> None:
        table = np.array(host_array(self.table))
        if table.dtype != bool:
            raise DtypeError(f"the table of blocks must be boolean; got {table.dtype}")
        if table.ndim < 2:
            raise ShapeError(f"the table of blocks must be (..., query blocks, key blocks); "
                             f"got {table.shape}")
        table.flags.writeable = False
        self._set(table=table, block_size=require_integer("block_size", self.block_size, minimum=1))

    @property
    def lead(self) -> tuple[int, ...]:
        return self.table.shape[:-2]

    def at(self, index: tuple[int, ...]) -> Mask:
        return blocks(self.table[index], self.block_size) if index else self

    def resolve(self, frame: Frame) -> Mask:
        self._fit(frame, *self.table.shape[-2:])
        return self

    def holds(self, row: Index, column: Index) -> np.ndarray:
        rows, columns = self.table.shape
        return self.table[np.minimum(row, rows - 1), np.minimum(column, columns - 1)]

    @functools.cached_property
    def _sums(self) -> np.ndarray:
        """How many blocks are allowed above and left of each corner."""
        sums = np.zeros(tuple(size + 1 for size in self.table.shape), np.int64)
        np.cumsum(np.cumsum(self.table, axis=0, dtype=np.int64), axis=1, out=sums[1:, 1:])
        return sums

    def classify(self, i0: Index, i1: Index, j0: Index, j1: Index) -> np.ndarray:
        top, left = i0 // self.block_size, j0 // self.block_size
        bottom, right = i1 // self.block_size + 1, j1 // self.block_size + 1
        sums = self._sums
        count = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
        return share(count, (bottom - top) * (right - left))


class Points:
    """Points of a grid in Morton order, where each aligned power-of-two square is one slice."""

    def __init__(self, row: np.ndarray, column: np.ndarray):
        code = _morton(row, column)
        self.order = np.argsort(code, kind="stable")
        self.code = code[self.order]

    def slices(self, row: Index, column: Index, level: Any = 0) -> tuple[np.ndarray, np.ndarray]:
        """Where in `order` the points of squares of 2^level cells begin, and how many there are."""
        shift = np.asarray(2 * level, np.uint64)
        code = _morton(row, column)
        first = np.searchsorted(self.code, code << shift)
        return first, np.searchsorted(self.code, (code + np.uint64(1)) << shift) - first

    def near(self, top: Index, bottom: Index, left: Index, right: Index) -> np.ndarray:
        """Tell which rectangles, bounds inclusive, lie in squares that hold a point.

        The squares are the smallest of which two by two cover the rectangle.
        """
        size = np.maximum(bottom - top, right - left) + 1
        level = np.ceil(np.log2(size)).astype(np.int64)
        found = np.zeros(size.shape, bool)
        for row in (top, bottom):
            for column in (left, right):
                found |= self.slices(row >> level, column >> level, level)[1] > 0
        return found


def _morton(row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Take bits of row and column, below 2^31, in turns."""
    def spread(x: np.ndarray) -> np.ndarray:
        x = np.asarray(x).astype(np.uint64)
        for shift, mask in ((16, 0x0000FFFF0000FFFF), (8, 0x00FF00FF00FF00FF),
                            (4, 0x0F0F0F0F0F0F0F0F), (2, 0x3333333333333333),
                            (1, 0x5555555555555555)):
            x = (x | x << np.uint64(shift)) & np.uint64(mask)
        return x

    return spread(row) << np.uint64(1) | spread(column)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class block_lists(Blockwise):
    """Each block of queries sees the key blocks of its list.

    Parameters
    ----------
    numbers : int array, shape (..., H, query blocks, count)
        Numbers of key blocks; -1 is no block. A block listed twice counts once.
    block_size : int >= 1

    Examples
    --------
    >>> from pyattn import masks
    >>> print(masks.block_lists([[0, -1], [1, 2]], 2).draw(4, 6))
    ██····
    ██····
    ··████
    ··████
    """

    numbers: Any
    block_size: int

    def __post_init__(self) -> None:
        numbers = host_array(self.numbers)
        if numbers.dtype.kind not in "iu" and numbers.size:
            raise DtypeError(f"numbers of blocks must be integers; got {numbers.dtype}")
        if numbers.ndim < 2:
            raise ShapeError(f"numbers of blocks must be (..., query blocks, count); "
                             f"got {numbers.shape}")
        numbers = numbers.astype(np.int64)
        numbers.flags.writeable = False
        self._set(numbers=numbers,
                  block_size=require_integer("block_size", self.block_size, minimum=1))

    @property
    def lead(self) -> tuple[int, ...]:
        return self.numbers.shape[:-2]

    def at(self, index: tuple[int, ...]) -> Mask:
        return block_lists(self.numbers[index], self.block_size) if index else self

    def resolve(self, frame: Frame) -> Mask:
        self._fit(frame, self.numbers.shape[-2], None)
        available = -(-frame.m // self.block_size)
        if self.numbers.max(initial=-1) >= available or self.numbers.min(initial=-1) < -1:
            raise ShapeError(f"numbers of key blocks must be -1 to {available - 1}, for M = "
                             f"{frame.m} in blocks of {self.block_size}; got "
                             f"{self.numbers.min()} to {self.numbers.max()}")
        return self

    @functools.cached_property
    def _points(self) -> Points:
        row, place = np.nonzero(self.numbers >= 0)
        return Points(row, self.numbers[row, place])

    def holds(self, row: Index, column: Index) -> np.ndarray:
        return self._points.slices(row, column)[1] > 0

    def classify(self, i0: Index, i1: Index, j0: Index, j1: Index) -> np.ndarray:
        (top, bottom), (left, right) = ((low // self.block_size, high // self.block_size)
                                        for low, high in ((i0, i1), (j0, j1)))
        one_block = (top == bottom) & (left == right)
        near = self._points.near(top, bottom, left, right)
        return np.where(near, np.where(one_block, FULL, PARTIAL), EMPTY)


def random_blocks(num: int, block_size: int, rng: Any = None) -> Mask:
    """Make a mask where each block of queries sees its own key block and `num` random others.

    Parameters
    ----------
    num : int >= 0
        Random key blocks for each query block, distinct and not its own; all, if there are fewer.
    block_size : int >= 1
    rng : None, int or numpy.random.Generator
        A generator is drawn from here, once: the mask always gives the same layout for the same
        lengths. The table is drawn when the lengths are known; see `RandomBlocks.numbers`.

    Examples
    --------
    >>> from pyattn import masks
    >>> mask = masks.random_blocks(1, 2, rng=0)
    >>> mask.numbers(8, 8)
    array([[0, 3],
           [1, 2],
           [2, 1],
           [3, 0]])
    """
    seed = rng if isinstance(rng, int) else int(require_rng(rng).integers(2**63))
    return RandomBlocks(num, block_size, seed)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RandomBlocks(Mask):
    """What `random_blocks` makes: the table is drawn from `seed` for given lengths."""

    num: int
    block_size: int
    seed: int

    def __post_init__(self) -> None:
        self._set(num=require_integer("random_blocks' num", self.num, minimum=0),
                  block_size=require_integer("block_size", self.block_size, minimum=1),
                  seed=require_integer("random_blocks' rng", self.seed, minimum=0))

    def numbers(self, n: int, m: int) -> np.ndarray:
        """Return the key blocks of each query block, own block first: (query blocks, count).

        Query blocks beyond the keys have the last key block for their own.
        """
        rows, columns = -(-n // self.block_size), -(-m // self.block_size)
        rng = np.random.default_rng(self.seed)
        own = np.minimum(np.arange(rows), columns - 1)
        others = max(columns - 1, 0)
        drawn = np.empty((rows, min(self.num, others)), np.int64)
        # Floyd's sampling without replacement, for all rows at once
        for step in range(drawn.shape[1]):
            last = others - drawn.shape[1] + step
            choice = rng.integers(0, last, size=rows, endpoint=True)
            taken = (drawn[:, :step] == choice[:, None]).any(1)
            drawn[:, step] = np.where(taken, last, choice)
        drawn += drawn >= own[:, None]
        return np.concatenate([own[:, None], drawn], axis=1)

    def resolve(self, frame: Frame) -> Mask:
        return block_lists(self.numbers(frame.n, frame.m), self.block_size).resolve(frame)

    def __repr__(self) -> str:
        return f"random_blocks({self.num}, {self.block_size}, rng={self.seed})"


def graph(csr: Any) -> Mask:
    """Make a mask of a graph: query i sees key j iff there is an edge (i, j).

    Parameters
    ----------
    csr : scipy.sparse array or matrix, shape (N, M), of any format
        Its explicit entries are the edges, stored zeros among them; values are not looked at.

    Examples
    --------
    >>> import numpy as np, scipy.sparse
    >>> from pyattn import masks
    >>> ring = scipy.sparse.diags_array([np.ones(3), np.ones(1)], offsets=[-1, 3], shape=(4, 4))
    >>> print(masks.graph(ring).draw(4))
    ···█
    █···
    ·█··
    ··█·
    """
    if not hasattr(csr, "tocoo"):
        raise DtypeError(f"a graph must be a scipy.sparse array; got {type(csr).__name__}")
    if len(csr.shape) != 2:
        raise ShapeError(f"a graph must be (N, M); got {csr.shape}")
    # through CSR: some formats, such as DIA, drop stored zeros on their way to COO
    entries = csr.tocsr().tocoo()
    row, column = entries.row.astype(np.int64), entries.col.astype(np.int64)
    order = Points(row // TILE, column // TILE).order
    return Edges(row[order], column[order], (int(csr.shape[0]), int(csr.shape[1])))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Edges(Mask):
    """What `graph` makes: a list of edges, those of a tile side by side."""

    row: np.ndarray
    column: np.ndarray
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        self.row.flags.writeable = self.column.flags.writeable = False

    def resolve(self, frame: Frame) -> Mask:
        if self.shape != (frame.n, frame.m):
            raise ShapeError(f"a graph {self.shape} must be (N, M) = ({frame.n}, {frame.m})")
        return self

    @functools.cached_property
    def _points(self) -> Points:
        return Points(self.row // TILE, self.column // TILE)

    @functools.cached_property
    def _sorted(self) -> np.ndarray:
        return np.sort(self.row * self.shape[1] + self.column)

    def allowed(self, i: Index, j: Index) -> np.ndarray:
        pair = i * self.shape[1] + j
        return np.searchsorted(self._sorted, pair) < np.searchsorted(self._sorted, pair, "right")

    def classify(self, i0: Index, i1: Index, j0: Index, j1: Index) -> np.ndarray:
        near = self._points.near(i0 // TILE, i1 // TILE, j0 // TILE, j1 // TILE)
        return np.where(near, PARTIAL, EMPTY)

    def words(self, i: Index, j: Index) -> np.ndarray:
        first, count = self._points.slices(i[:, 0] // TILE, j[:, 0] // TILE)
        edge = self._points.order[spans(first, count)]
        tile = np.repeat(np.arange(len(i)), count)
        words = np.zeros((len(i), TILE), np.uint64)
        lane = (self.column[edge] % TILE).astype(np.uint64)
        np.bitwise_or.at(words, (tile, self.row[edge] % TILE), np.uint64(1) << lane)
        return words

    def __repr__(self) -> str:
        return f"graph(<{self.row.size} edges {self.shape}>)"
