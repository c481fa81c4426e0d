"""Where a token stands: embeddings of tokens and positions, and rotary rotation.

Letters: N tokens, C width, D width of a head (even), V rows of a table.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..checks import DtypeError, OptionError, ShapeError, require_integer, require_real
from ..differentiable import Saved, differentiable, gradients
from .precision import cast_like, require_same_shape, widened

VOCABULARY_TILE = 1024
"""Rows of the table whose gradient is made at once; bounds the memory of `embedding`."""


def _frequencies(width: int, base: float) -> np.ndarray:
    return require_real("base", base) ** (-np.arange(0, width, 2) / width)


def sinusoidal(n: int, width: int, *, base: float = 10000.0, dtype: Any = None,
               xp: Any = np, device: Any = None) -> Array:
    """A fixed table of positions: sines and cosines of falling frequency.

    ``table[p, 2i] = sin(p / base**(2i / width))``, ``table[p, 2i + 1] = cos(`` the same ``)``.

    Parameters
    ----------
    n : int, >= 0
        Positions.
    width : int, >= 1
        Columns; of an odd width the last cosine is left out.
    base : float
        The longest wavelength is about ``2 pi base``.
    dtype : dtype of `xp`, optional
        Default ``xp.float32``.
    xp : array namespace, optional
        Whose array to make: ``numpy`` (default), ``torch``, ``cupy``, ...
    device : device of `xp`, optional
        Where to.

    Returns
    -------
    array, shape (n, width)
        Computed in float64, then cast.

    References
    ----------
    .. [1] Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762, section 3.5.

    Examples
    --------
    >>> from pyattn.features import sinusoidal
    >>> sinusoidal(2, 4).round(2)
    array([[0.  , 1.  , 0.  , 1.  ],
           [0.84, 0.54, 0.01, 1.  ]], dtype=float32)
    """
    n = require_integer("n", n, minimum=0)
    width = require_integer("width", width, minimum=1)
    angles = np.arange(n)[:, None] * _frequencies(width, base)
    pairs = np.stack([np.sin(angles), np.cos(angles)], axis=-1)
    table = pairs.reshape(n, 2 * angles.shape[1])[:, :width]
    return xp.asarray(table.copy(), dtype=xp.float32 if dtype is None else dtype,
                      device=device)


@dataclasses.dataclass(frozen=True)
class RotarySaved(Saved):
    """The turns of `rotary`, and its argument for the dtype and shape of the gradient."""

    x: Array
    cos: Array
    """(N, D / 2), or with leading axes where the positions have them."""
    sin: Array
    interleaved: bool

    def backward(self, dout: Array) -> Any:
        """Gradient of x: a rotation's transpose turns back."""
        require_same_shape("dout", dout, self.x.shape)
        xp = arrays.namespace(dout)
        return gradients(("x",))(cast_like(
            xp, _rotate(xp, dout, self.cos, -self.sin, self.interleaved), self.x))


def _rotate(xp: Any, x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    wide = xp.astype(x, cos.dtype, copy=False)
    if interleaved:
        a, b = wide[..., 0::2], wide[..., 1::2]
    else:
        a, b = wide[..., :x.shape[-1] // 2], wide[..., x.shape[-1] // 2:]
    a, b = a * cos - b * sin, a * sin + b * cos
    if interleaved:
        return xp.reshape(xp.stack([a, b], axis=-1), x.shape)
    return xp.concat([a, b], axis=-1)


@differentiable
def rotary(x: Array, *, positions: Any = None, base: float = 10000.0,
           interleaved: bool = False) -> tuple[Array, RotarySaved]:
    """Turn pairs of columns by angles that grow with the position.

    Pair i of the token at position p turns by ``p * base**(-2i / D)``. Applied to queries and to
    keys it makes ``q_m . k_n`` depend on the positions only through ``m - n``.

    Parameters
    ----------
    x : array, shape (..., N, D), float16 / bfloat16 / float32 / float64
        Queries or keys; D even.
    positions : integers, shape (N,) or broadcasting to (..., N), optional
        Read on the host. Default ``0, 1, ..., N - 1``; give ``arange(M - N, M)`` for the last N
        queries of M tokens.
    base : float
        Of the angles.
    interleaved : bool
        False pairs column i with ``i + D / 2`` (LLaMA's released code, GPT-NeoX); True pairs
        ``2i`` with ``2i + 1``, as the paper does. The two differ by a permutation of columns.

    Returns
    -------
    array, shape and dtype of `x`

    Raises
    ------
    ShapeError
        D is odd, or the positions do not fit.
    DtypeError
        The positions are not integers.

    Notes
    -----
    O(N D). Angles are made in float64, the rotation in float32 (float64 for float64). Kept for
    backward: the argument, for its dtype and shape, and the N x D/2 cosines and sines.

    References
    ----------
    .. [1] Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021,
       arXiv:2104.09864, section 3.2.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.layers import rotary
    >>> x = np.random.default_rng(0).standard_normal((2, 5, 8))
    >>> y = rotary(x)
    >>> bool(np.allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1)))
    True
    """
    arrays.require_float("x", x)
    if x.ndim < 2 or x.shape[-1] % 2:
        raise ShapeError(f"x must be (..., N, D) with D even; got {tuple(x.shape)}")
    if positions is None:
        positions = np.arange(x.shape[-2])
    else:
        positions = np.asarray(arrays.to_host(positions))
        if not np.issubdtype(positions.dtype, np.integer):
            raise DtypeError(f"positions must be integers; got {positions.dtype}")
        try:
            fits = np.broadcast_shapes(positions.shape, x.shape[:-1]) == tuple(x.shape[:-1])
        except ValueError:
            fits = False
        if not fits or positions.ndim == 0:
            raise ShapeError(f"positions must broadcast to (..., N) = {tuple(x.shape[:-1])}; "
                             f"got {positions.shape}")
    xp = arrays.namespace(x)
    angles = positions[..., None] * _frequencies(x.shape[-1], base)
    cos, sin = (xp.asarray(turn(angles), dtype=arrays.accumulator(xp, x),
                           device=arrays.device(x)) for turn in (np.cos, np.sin))
    y = cast_like(xp, _rotate(xp, x, cos, sin, interleaved), x)
    return y, RotarySaved(x, cos, sin, interleaved)


@dataclasses.dataclass(frozen=True)
class AddPositionsSaved(Saved):
    """The arguments of `add_positions`, whose shapes and dtypes the gradients take."""

    x: Array
    table: Array

    def backward(self, dout: Array) -> Any:
        """Gradients of x and table; rows beyond the N that were read have zero."""
        require_same_shape("dout", dout, self.x.shape)
        xp, dy = widened(dout=dout)
        n, width = self.x.shape[-2:]
        by_item = xp.reshape(dy, (math.prod(self.x.shape[:-2]), n, width))
        unread = xp.zeros((self.table.shape[0] - n, width), dtype=dy.dtype,
                          device=arrays.device(dy))
        dtable = xp.concat([xp.sum(by_item, axis=0), unread], axis=0)
        return gradients(("x", "table"))(cast_like(xp, dy, self.x),
                                         cast_like(xp, dtable, self.table))


@differentiable
def add_positions(x: Array, table: Array) -> tuple[Array, AddPositionsSaved]:
    """Add row p of a table, learned or fixed, to the token at position p.

    Parameters
    ----------
    x : array, shape (..., N, C), float16 / bfloat16 / float32 / float64
        Tokens.
    table : array, shape (L, C), L >= N
        One row a position; the first N are read.

    Returns
    -------
    array, shape and dtype of `x`

    Raises
    ------
    ShapeError
        The table is too short or of another width.

    Notes
    -----
    Computes in float32, or in float64 if an argument is.

    References
    ----------
    .. [1] Gehring et al., "Convolutional Sequence to Sequence Learning", 2017, arXiv:1705.03122,
       section 3.1 (learned); Vaswani et al., 2017, section 3.5 (fixed).

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features import add_positions
    >>> y, saved = add_positions.forward(np.zeros((2, 3, 1)), np.arange(4.0)[:, None])
    >>> y[0, :, 0], saved.backward(np.ones_like(y)).table[:, 0]
    (array([0., 1., 2.]), array([2., 2., 2., 0.]))
    """
    if x.ndim < 2 or table.ndim != 2 or table.shape[0] < x.shape[-2] \
            or table.shape[1] != x.shape[-1]:
        raise ShapeError("table must be (L, C) with L >= N for x (..., N, C); "
                         f"got table {tuple(table.shape)}, x {tuple(x.shape)}")
    xp, wide, rows = widened(x=x, table=table)
    return cast_like(xp, wide + rows[:x.shape[-2], :], x), AddPositionsSaved(x, table)


@dataclasses.dataclass(frozen=True)
class EmbeddingSaved(Saved):
    """The arguments of `embedding`."""

    tokens: Array
    table: Array

    def backward(self, dout: Array) -> Any:
        """Gradient of table: row t sums the gradients of all places that hold token t."""
        require_same_shape("dout", dout, (*self.tokens.shape, self.table.shape[1]))
        xp, dy = widened(dout=dout)
        dy = xp.reshape(dy, (math.prod(self.tokens.shape), dy.shape[-1]))
        count = self.table.shape[0]
        tiles = []
        for start in range(0, max(count, 1), VOCABULARY_TILE):
            rows = xp.arange(start, min(start + VOCABULARY_TILE, count),
                             device=arrays.device(dy))
            places = xp.astype(xp.reshape(self.tokens, (1, dy.shape[0])), rows.dtype) \
                == rows[:, None]
            tiles.append(xp.matmul(xp.astype(places, dy.dtype), dy))
        return gradients(("table",))(cast_like(xp, xp.concat(tiles, axis=0), self.table))


@differentiable
def embedding(tokens: Array, table: Array) -> tuple[Array, EmbeddingSaved]:
    """Look up each token's row of a table.

    Parameters
    ----------
    tokens : integer array, shape (...)
        Row numbers, 0 to V - 1.
    table : array, shape (V, C), float16 / bfloat16 / float32 / float64
        One row a token.

    Returns
    -------
    array, shape (..., C), dtype of `table`

    Raises
    ------
    DtypeError
        The tokens are not integers.
    OptionError
        A token is not a row of the table.

    Notes
    -----
    The gradient adds up the places of each token. It is taken as a product with 0/1 matrices of
    1024 rows of the table at a time, so it is the same in every run, needs no scatter, and costs
    O(tokens * V * C), what a model's output layer costs. A NaN in `dout` reaches the whole column.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features import embedding
    >>> out, saved = embedding.forward(np.array([2, 0, 2]), np.eye(3))
    >>> saved.backward(np.ones((3, 3))).table[:, 0]
    array([1., 0., 2.])
    """
    xp = arrays.namespace(tokens, table)
    arrays.require_float("table", table)
    if not xp.isdtype(tokens.dtype, "integral"):
        raise DtypeError(f"tokens must be integers; got {tokens.dtype}")
    if table.ndim != 2:
        raise ShapeError(f"table must be (V, C); got {tuple(table.shape)}")
    if math.prod(tokens.shape) and (int(xp.min(tokens)) < 0
                                    or int(xp.max(tokens)) >= table.shape[0]):
        raise OptionError(f"tokens must be 0 to V - 1 = {table.shape[0] - 1}; got "
                          f"{int(xp.min(tokens))} to {int(xp.max(tokens))}")
    index = xp.astype(xp.reshape(tokens, (math.prod(tokens.shape),)), xp.asarray(0).dtype)
    out = xp.take(table, index, axis=0)
    return xp.reshape(out, (*tokens.shape, table.shape[1])), EmbeddingSaved(tokens, table)
