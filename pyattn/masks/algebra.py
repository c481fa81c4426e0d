"""What a mask is, and how masks combine.

A mask is a frozen dataclass: printed, compared and hashed by value. It is used in two steps.
``resolve(frame)`` says where queries and keys stand and gives a mask over storage indices. That one
answers four questions, each vectorised, which is all that compilation asks:

- ``allowed(i, j)``: may query i see key j?
- ``classify(i0, i1, j0, j1)``: are all pairs of these boxes (bounds inclusive) allowed, is none, or
  can that not be told cheaply? Telling it for large boxes is what keeps N x N away.
- ``words(i, j)``: the bits of 64 x 64 tiles.
- ``signature(i0, j0)``: integers. Tiles with equal ones have equal bits; one is evaluated.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

from .. import arrays
from ..checks import DtypeError, ShapeError
from .bits import pack

if TYPE_CHECKING:
    from .block_mask import BlockMask
    from .placement import Frame

Index: TypeAlias = np.ndarray

EMPTY, PARTIAL, FULL = np.int8(0), np.int8(1), np.int8(2)
"""What ``classify`` answers. In this order ``&`` is the minimum and ``|`` the maximum."""


def within(low: Index, high: Index, least: Any, most: Any) -> np.ndarray:
    """FULL where all of low..high lies in least..most, EMPTY where none does, else PARTIAL."""
    apart = (high < least) | (most < low)
    return np.where((least <= low) & (high <= most), FULL, np.where(apart, EMPTY, PARTIAL))


def share(count: Index, size: Index) -> np.ndarray:
    """FULL where all `size` things are counted, EMPTY where none is, else PARTIAL."""
    return np.where(count == size, FULL, np.where(count == 0, EMPTY, PARTIAL))


class Mask:
    """Which query may attend to which key. Combine masks with ``&``, ``|`` and ``~``.

    Masks over positions (`causal`, `window`, `global_tokens`, ...) take query i to stand at
    ``i + offset`` and key j at j; masks over storage (`dense`, `graph`, `segments`, ...) speak of
    array indices.

    Examples
    --------
    >>> from pyattn import masks
    >>> mask = masks.causal() & masks.window(2, 0)
    >>> mask
    causal() & window(2, 0)
    >>> mask.dense(4, 4).astype(int)
    array([[1, 0, 0, 0],
           [1, 1, 0, 0],
           [1, 1, 1, 0],
           [0, 1, 1, 1]])
    """

    __array_ufunc__ = None

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading axes, ``(..., H)`` or ``()``, along which the mask differs."""
        return ()

    def at(self, index: tuple[int, ...]) -> Mask:
        """Return the mask at one index into `lead`."""
        del index
        return self

    def pick(self, index: tuple[int, ...]) -> Mask:
        """Return the mask at an index into leading axes that `lead` broadcasts to."""
        own = index[len(index) - len(self.lead):]
        return self.at(tuple(x if size > 1 else 0 for x, size in zip(own, self.lead, strict=True)))

    def resolve(self, frame: Frame) -> Mask:
        """Return this mask over storage indices; ShapeError if it does not fit the lengths."""
        raise NotImplementedError

    def allowed(self, i: Index, j: Index) -> np.ndarray:
        """Tell for each pair of integers, which broadcast, whether query i may see key j."""
        raise NotImplementedError

    def classify(self, i0: Index, i1: Index, j0: Index, j1: Index) -> np.ndarray:
        """Return EMPTY, PARTIAL or FULL for boxes of pairs, bounds inclusive; PARTIAL is safe."""
        del i1, j0, j1
        return np.full(i0.shape, PARTIAL)

    def words(self, i: Index, j: Index) -> np.ndarray:
        """Return the bits, uint64 (T, 64), of tiles with rows i (T, 64) and columns j (T, 64)."""
        return pack(self.allowed(i[:, :, None], j[:, None, :]))

    def signature(self, i0: Index, j0: Index) -> tuple[np.ndarray, ...]:
        """Return integers that determine the bits of the tile with first pair (i0, j0)."""
        return i0, j0

    def compile(self, n: int, m: int, *, offset: Any = None) -> BlockMask:
        """Compile for n queries and m keys.

        Parameters
        ----------
        n, m : int, >= 0
        offset : int or array of int, optional
            Position of query 0, one per batch item if an array over the batch axes. Default
            ``m - n``: the last query stands at the last key ("bottom right").

        Returns
        -------
        BlockMask
            The same object for equal masks and lengths, as long as the cache holds it.

        Raises
        ------
        ShapeError
            The mask was made for other lengths.

        Notes
        -----
        Time and memory are proportional to the *runs* of tiles for structured masks, not to
        ``n * m``: ``causal()`` on 1M x 1M takes a few MB. A bare `predicate`, and `dense`, are
        evaluated on all pairs, once.

        Examples
        --------
        >>> from pyattn import masks
        >>> masks.causal().compile(256, 256).tiles
        Tiles(full=6, partial=4, empty=6)
        """
        if offset is None:
            return _compiler()(self, n, m)
        from .placement import placed

        return _compiler()(placed(self, offset), n, m)

    def dense(self, n: int, m: int, *, offset: Any = None) -> np.ndarray:
        """Return the mask as a boolean array, shape ``lead + (n, m)``; True = may attend."""
        from .placement import bottom_right, placed

        mask = self if offset is None else placed(self, offset)
        frame = bottom_right(n, m)
        out = np.empty((*mask.lead, frame.n, frame.m), bool)
        i, j = np.arange(frame.n)[:, None], np.arange(frame.m)[None, :]
        for index in np.ndindex(mask.lead):
            out[index] = mask.at(index).resolve(frame).allowed(i, j)
        return out

    def draw(self, n: int, m: int | None = None, *, index: tuple[int, ...] | None = None) -> str:
        """Return a picture in characters; see `plot`.

        Up to 64 queries and 80 keys every pair is drawn, █ allowed and · not; beyond, one character
        stands for one tile, or a square of them: █ full, ▒ partly allowed, · empty.

        Examples
        --------
        >>> from pyattn import masks
        >>> print(masks.window(1, 1).draw(4))
        ██··
        ███·
        ·███
        ··██
        """
        from .draw import text

        return text(self, n, n if m is None else m, index)

    def plot(self, n: int, m: int | None = None, *, ax: Any = None,
             index: tuple[int, ...] | None = None) -> Any:
        """Draw the mask with full, partial and empty tiles told apart.

        Parameters
        ----------
        n, m : int
            Queries and keys; m is n by default.
        ax : matplotlib Axes, optional
            Where to draw; a new figure by default.
        index : tuple of int, optional
            Which leading index to draw; the first by default.

        Returns
        -------
        Axes, or the text of `draw`, which is then also printed, where matplotlib is missing.
        """
        from .draw import plot

        return plot(self, n, n if m is None else m, ax, index)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that the mask holds."""
        held = (x for value in self._values
                for x in (value if isinstance(value, tuple) else [value]))
        return sum(x.nbytes for x in held if isinstance(x, np.ndarray | Mask))

    @property
    def _values(self) -> list[Any]:
        return [getattr(self, field.name) for field in dataclasses.fields(cast("Any", self))]

    def __and__(self, other: Mask) -> Mask:
        return And(_flat(And, self, other)) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: Mask) -> Mask:
        return Or(_flat(Or, self, other)) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> Mask:
        return self.mask if isinstance(self, Not) else Not(self)

    def __bool__(self) -> bool:
        raise TypeError("a mask has no truth value; combine masks with &, | and ~, "
                        "not with and, or, not")

    @functools.cached_property
    def _key(self) -> tuple[Any, ...]:
        return (type(self), *(_identity(value) for value in self._values))

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Mask) and self._key == other._key)

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        given = self._values
        for field in reversed(dataclasses.fields(cast("Any", self))):
            if given[-1] is not field.default:
                break
            given.pop()
        return f"{type(self).__name__}({', '.join(map(_shown, given))})"

    def _set(self, **fields: Any) -> None:
        """Write checked fields while the frozen dataclass is being made."""
        for name, value in fields.items():
            object.__setattr__(self, name, value)


@functools.cache
def _compiler() -> Callable[[Mask, int, int], BlockMask]:
    """Return `compile_mask`, whose module builds on this one; looked up once, as that is slow."""
    from .compile import compile_mask

    return compile_mask


def host_array(value: Any) -> np.ndarray:
    """Return an array of any library, or nested lists, as a NumPy array."""
    if not hasattr(value, "dtype"):
        return np.asarray(value)
    arrays.namespace(value)                # refuses masked arrays and matrices
    return arrays.to_host(value)


def _shown(value: Any) -> str:
    """Write `value` as the constructor takes it; long arrays are abridged."""
    if not isinstance(value, np.ndarray):
        return getattr(value, "__name__", None) or repr(value)
    if value.ndim == 1 and value.size <= 8:
        return repr(tuple(value.tolist()))
    return f"<{value.dtype} array {value.shape}>"


def _identity(value: Any) -> Any:
    """Return something hashable that is equal for equal values."""
    if isinstance(value, np.ndarray):
        data = np.ascontiguousarray(value).data
        return value.shape, value.dtype.str, hashlib.blake2b(data, digest_size=16).digest()
    return value


def _flat(kind: type[And | Or], *masks: Mask) -> tuple[Mask, ...]:
    return tuple(part for mask in masks
                 for part in (mask.masks if isinstance(mask, kind) else (mask,)))


def broadcast_leads(*masks: Mask) -> tuple[int, ...]:
    """Return the leading axes of several masks together, or raise ShapeError."""
    distinct = {mask.lead for mask in masks}
    if len(distinct) == 1:
        return distinct.pop()
    try:
        return np.broadcast_shapes(*distinct)
    except ValueError:
        leads = ", ".join(f"{mask!r} has {mask.lead}" for mask in masks)
        raise ShapeError(f"leading axes of combined masks must broadcast; {leads}") from None


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Combined(Mask):
    masks: tuple[Mask, ...]

    def __post_init__(self) -> None:
        broadcast_leads(*self.masks)

    @property
    def lead(self) -> tuple[int, ...]:
        return broadcast_leads(*self.masks)

    def at(self, index: tuple[int, ...]) -> Mask:
        return type(self)(tuple(mask.pick(index) for mask in self.masks))

    def resolve(self, frame: Frame) -> Mask:
        return type(self)(tuple(mask.resolve(frame) for mask in self.masks))

    def signature(self, i0: Index, j0: Index) -> tuple[np.ndarray, ...]:
        return tuple(x for mask in self.masks for x in mask.signature(i0, j0))


class And(_Combined):
    """Allowed by all masks."""

    def allowed(self, i: Index, j: Index) -> np.ndarray:
        return functools.reduce(np.logical_and, (mask.allowed(i, j) for mask in self.masks))

    def classify(self, i0: Index, i1: Index, j0: Index, j1: Index) -> np.ndarray:
        return functools.reduce(np.minimum, (x.classify(i0, i1, j0, j1) for x in self.masks))

    def words(self, i: Index, j: Index) -> np.ndarray:
        return functools.reduce(np.bitwise_and, (mask.words(i, j) for mask in self.masks))

    def __repr__(self) -> str:
        return " & ".join(f"({x!r})" if isinstance(x, Or) else repr(x) for x in self.masks)


class Or(_Combined):
    """Allowed by any of the masks."""

    def allowed(self, i: Index, j: Index) -> np.ndarray:
        return functools.reduce(np.logical_or, (mask.allowed(i, j) for mask in self.masks))

    def classify(self, i0: Index, i1: Index, j0: Index, j1: Index) -> np.ndarray:
        return functools.reduce(np.maximum, (x.classify(i0, i1, j0, j1) for x in self.masks))

    def words(self, i: Index, j: Index) -> np.ndarray:
        return functools.reduce(np.bitwise_or, (mask.words(i, j) for mask in self.masks))

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.masks))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Not(Mask):
    """Allowed where `mask` does not allow."""

    mask: Mask

    @property
    def lead(self) -> tuple[int, ...]:
        return self.mask.lead

    def at(self, index: tuple[int, ...]) -> Mask:
        return Not(self.mask.at(index))

    def resolve(self, frame: Frame) -> Mask:
        return Not(self.mask.resolve(frame))

    def allowed(self, i: Index, j: Index) -> np.ndarray:
        return ~self.mask.allowed(i, j)

    def classify(self, i0: Index, i1: Index, j0: Index, j1: Index) -> np.ndarray:
        return FULL - self.mask.classify(i0, i1, j0, j1)

    def words(self, i: Index, j: Index) -> np.ndarray:
        return ~self.mask.words(i, j)

    def signature(self, i0: Index, j0: Index) -> tuple[np.ndarray, ...]:
        return self.mask.signature(i0, j0)

    def __repr__(self) -> str:
        return f"~({self.mask!r})" if isinstance(self.mask, _Combined) else f"~{self.mask!r}"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class per_head(Mask):
    """One mask for each query head.

    Parameters
    ----------
    masks : sequence of Mask
        ``masks[h]`` is head h's; each may have batch axes, and a head axis of size 1. Equal masks
        are compiled once.

    Examples
    --------
    >>> from pyattn import masks
    >>> masks.per_head([masks.causal(), masks.window(4, 0)]).dense(8, 8).shape
    (2, 8, 8)
    """

    masks: tuple[Mask, ...]

    def __post_init__(self) -> None:
        self._set(masks=tuple(self.masks))
        if not self.masks:
            raise ShapeError("per_head takes at least one mask; got none")
        for head, mask in enumerate(self.masks):
            if not isinstance(mask, Mask):
                raise DtypeError(f"per_head takes masks; head {head} is a {type(mask).__name__}")
            if mask.lead and mask.lead[-1] != 1:
                raise ShapeError(f"a mask in per_head must have a head axis of 1 or none; "
                                 f"that of head {head} has leading axes {mask.lead}")
        broadcast_leads(*self.masks)

    @property
    def lead(self) -> tuple[int, ...]:
        return (*broadcast_leads(*self.masks)[:-1], len(self.masks))

    def at(self, index: tuple[int, ...]) -> Mask:
        return self.masks[index[-1]].pick((*index[:-1], 0))

    def resolve(self, frame: Frame) -> Mask:
        if len(self.masks) > 1:
            raise ShapeError(f"per_head of {len(self.masks)} masks must be picked by head first")
        return self.masks[0].resolve(frame)

    def __repr__(self) -> str:
        return f"per_head([{', '.join(map(repr, self.masks))}])"


def restrict(pattern: Mask, mask: Any) -> Mask:
    """Return the pairs of `pattern` that `mask` allows, too.

    Parameters
    ----------
    pattern : Mask
    mask : Mask, boolean array (..., H, N, M) of any library, or None
        None restricts nothing.

    Examples
    --------
    >>> from pyattn import masks
    >>> masks.restrict(masks.causal(), masks.window(2, 0))
    causal() & window(2, 0)
    """
    if mask is None:
        return pattern
    if not isinstance(mask, Mask):
        from .stored import dense

        mask = dense(arrays.to_host(mask))
    return pattern & mask
