"""Overlapping blocks of tokens, each summed up in one.

Letters: G heads, N tokens, D width, l tokens in a block, C blocks, O width of what sums one up.
Block c is tokens ``c * stride .. c * stride + l - 1``. One that would reach beyond the last token,
or into padding, does not exist.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..checks import (
    OptionError,
    ShapeError,
    require_broadcast,
    require_choice,
    require_integer,
)
from ..differentiable import Saved, differentiable, gradients
from ..masks.algebra import host_array
from .activation import ACTIVATIONS
from .precision import cast_like, require_same_shape, widened

KINDS = ("mean", "mlp", "conv")

WEIGHTS = {"mean": (), "mlp": ("w1", "b1", "w2", "b2"), "conv": ("kernel",)}
"""The arrays that each kind takes beside ``pe``."""


def complete_blocks(n: Any, block_size: int, stride: int) -> Any:
    """Return how many blocks lie within the first n tokens; n is an integer or an array of them.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features.compression import complete_blocks
    >>> complete_blocks(np.array([3, 4, 5, 6, 7]), block_size=4, stride=2)
    array([0, 1, 1, 2, 2])
    """
    return np.maximum((np.asarray(n) - block_size) // stride + 1, 0)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How tokens fall into overlapping blocks: by pieces, the s-th `stride` tokens of each."""

    size: int
    stride: int
    tokens: int

    @property
    def count(self) -> int:
        """How many blocks there are."""
        return int(complete_blocks(self.tokens, self.size, self.stride))

    @property
    def pieces(self) -> list[int]:
        """How many tokens each piece of a block has."""
        return [min(self.stride, self.size - start) for start in range(0, self.size, self.stride)]

    def chunks(self, xp: Any, x: Array) -> Array:
        """``x (..., N, D)`` as (..., C + pieces - 1, stride, D); what no block holds is left out.

        Piece s of block c is the first tokens of chunk ``c + s``.
        """
        count = self.count + len(self.pieces) - 1
        *lead, n, width = x.shape
        missing = max(count * self.stride - n, 0)
        if missing:
            x = xp.concat([x, xp.zeros((*lead, missing, width), dtype=x.dtype,
                                       device=arrays.device(x))], axis=-2)
        x = x[..., :count * self.stride, :]
        return xp.reshape(x, (*lead, count, self.stride, width))

    def piece(self, chunks: Array, s: int) -> Array:
        """Piece s of every block, (..., C, tokens of the piece, D)."""
        return chunks[..., s:s + self.count, :self.pieces[s], :]

    def put_back(self, xp: Any, pieces: list[Array]) -> Array:
        """Undo `piece` and `chunks`: (..., N, D), where blocks overlap their sum."""
        *lead, count, _, width = pieces[0].shape
        where, dtype = arrays.device(pieces[0]), pieces[0].dtype

        def zeros(*rows: int) -> Array:
            return xp.zeros((*lead, *rows, width), dtype=dtype, device=where)

        total = None
        for s, piece in enumerate(pieces):
            short = self.stride - piece.shape[-2]
            if short:
                piece = xp.concat([piece, zeros(count, short)], axis=-2)
            rows = [piece, zeros(len(pieces) - 1 - s, self.stride)]
            spread = xp.concat([zeros(s, self.stride), *rows], axis=-3)
            total = spread if total is None else arrays.added(total, spread)
        assert total is not None
        total = xp.reshape(total, (*lead, total.shape[-3] * self.stride, width))
        beyond = self.tokens - total.shape[-2]
        if beyond > 0:
            total = xp.concat([total, zeros(beyond)], axis=-2)
        return total[..., :self.tokens, :]


@dataclasses.dataclass(frozen=True)
class CompressSaved(Saved):
    """The arguments of `compress`."""

    x: Array
    weights: dict[str, Array]
    kind: str
    blocks: Blocks
    activation: str
    lengths: Any
    """An int, or lists of them, by leading axis; None."""
    hidden: Array | None
    """What the activation of ``"mlp"`` is applied to."""

    def backward(self, dout: Array) -> Any:
        """Gradients of x and of the weights given, in the order of the signature."""
        shape = (*self.x.shape[:-2], self.blocks.count, _out_width(self.x, self.weights))
        require_same_shape("dout", dout, shape)
        xp, dy, x, *weights = widened(dout=dout, x=self.x, **self.weights)
        given = dict(zip(self.weights, weights, strict=True))
        x = _only(xp, x, _inside(self.x.shape[-2], self.lengths))
        dy = _only(xp, dy, _whole(self.blocks, self.lengths))
        chunks, pe = self.blocks.chunks(xp, x), _by_piece(self.blocks, given.get("pe"))
        found: dict[str, Array] = {}
        if self.kind == "mlp" or _is_dense(self.weights, self.blocks.size, x.shape[-1]):
            flat = _unfolded(xp, self.blocks, chunks, pe)
            if self.kind == "mlp":
                # forward: y = activation(hidden) @ w2 + b2; hidden = flat @ w1 + b1
                active, slope = ACTIVATIONS[self.activation](xp, self.hidden, True)
                found["w2"] = _product_gradient(xp, active, dy, given["w2"])
                found["b2"] = _summed(xp, dy, given.get("b2"))
                dy = xp.matmul(dy, _transposed(given["w2"])) * slope
                found["b1"] = _summed(xp, dy, given.get("b1"))
                found["w1"] = _product_gradient(xp, flat, dy, given["w1"])
                matrix = given["w1"]
            else:
                matrix = _matrix(xp, given["kernel"])
                found["kernel"] = xp.reshape(_product_gradient(xp, flat, dy, matrix),
                                             given["kernel"].shape)
            dflat = xp.matmul(dy, _transposed(matrix))
            dflat = xp.reshape(dflat, (*dflat.shape[:-1], self.blocks.size, x.shape[-1]))
            dpieces = [dflat[..., s * self.blocks.stride:s * self.blocks.stride + tokens, :]
                       for s, tokens in enumerate(self.blocks.pieces)]
        else:
            # forward: y = sum over the block's tokens of kernel * (x + pe)
            kernel = _by_piece(self.blocks, _kernel(xp, x, given, self.blocks))
            wide = dy[..., :, None, :]
            dpieces = [wide * part for part in kernel]
            if "kernel" in given:
                held = [_plus(self.blocks.piece(chunks, s), pe[s])
                        for s in range(len(dpieces))]
                found["kernel"] = _reduced(xp, xp.concat(
                    [xp.sum(part * wide, axis=-3) for part in held], axis=-2), given["kernel"])
        if "pe" in given:
            found["pe"] = _reduced(xp, xp.concat([xp.sum(part, axis=-3) for part in dpieces],
                                                 axis=-2), given["pe"])
        dx = _only(xp, self.blocks.put_back(xp, dpieces),
                   _inside(self.x.shape[-2], self.lengths))
        return gradients(("x", *self.weights))(
            cast_like(xp, dx, self.x),
            *(cast_like(xp, found[name], like) for name, like in self.weights.items()))


@differentiable
def compress(x: Array, pe: Array | None = None, w1: Array | None = None, b1: Array | None = None,
             w2: Array | None = None, b2: Array | None = None, kernel: Array | None = None, *,
             block_size: int, stride: int, kind: str = "mean", activation: str = "gelu",
             lengths: Any = None) -> tuple[Array, CompressSaved]:
    """Sum up overlapping blocks of tokens: by their mean, a small network, or a convolution.

    Block c is tokens ``c * stride .. c * stride + block_size - 1``; to each of them its place in
    the block adds a row of `pe` first. E.g. four tokens, ``block_size=2, stride=1``: blocks
    ``{0, 1} {1, 2} {2, 3}``. Of the tokens ``x_t`` of a block,

    - ``"mean"``: ``y = mean_t x_t``;
    - ``"mlp"``: ``y = activation(flat @ w1 + b1) @ w2 + b2``, where flat is the block's tokens side
      by side, token after token;
    - ``"conv"``: ``y = sum_t kernel[t] * x_t``, or ``sum_t x_t @ kernel[t]`` if the kernel has
      a matrix for each t.

    Parameters
    ----------
    x : array, shape (..., G, N, D), float16 / bfloat16 / float32 / float64
        Tokens of G heads.
    pe : array, shape (l, D) or (G, l, D), optional
        Positions within a block, of l = `block_size` tokens.
    w1, b1, w2, b2 : arrays, shapes (l D, F), (F,), (F, O) and (O,)
        For ``"mlp"``; each with a leading G if heads have their own. Biases are optional.
    kernel : array, shape (l, D) or (l, D, O)
        For ``"conv"``; with a leading G if heads have their own. Three axes that could be both
        (G, l, D) and (l, D, O) are refused: give (1, l, D, O) for the latter.
    block_size, stride : int >= 1, tokens
        Blocks overlap where the stride is smaller.
    kind : {"mean", "mlp", "conv"}
    activation : {"gelu", "relu", "gelu_tanh", "silu"}
        Of ``"mlp"``.
    lengths : int or array of int, broadcasting to the leading axes, optional
        Tokens from here on are padding; blocks that reach there are zeros, whatever they hold.

    Returns
    -------
    array, shape (..., G, C, O), dtype of `x`
        ``C = (N - l) // stride + 1``, none if there are fewer than l tokens: what is left over at
        the end is in no block. O is D but for matrices.

    Raises
    ------
    ShapeError, OptionError
        A shape does not fit, a weight is missing, or one is given that this kind does not take.

    Notes
    -----
    ``"mean"`` and (l, D) kernels cost O(N D l / stride), matrices as much as their products of
    (C, l D) with (l D, F). Kept for backward: the arguments and the hidden layer; blocks are cut
    out again. Gradients of tokens that several blocks share add up. Computes in float32, or in
    float64 if any argument is.

    References
    ----------
    .. [1] Yuan et al., "Native Sparse Attention", 2025, arXiv:2502.11089, section 3.3.1 (an MLP
       with positions within the block; mean and convolution are those of public implementations).

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features import compress
    >>> x = np.arange(5.0).reshape(1, 5, 1)
    >>> y, saved = compress.forward(x, block_size=3, stride=2)
    >>> y.ravel(), saved.backward(np.array([[[3.0], [6.0]]])).x.ravel()
    (array([1., 3.]), array([1., 1., 3., 2., 2.]))
    """
    arrays.require_float("x", x)
    if x.ndim < 3:
        raise ShapeError(f"x must be (..., G, N, D); got {tuple(x.shape)}")
    blocks = Blocks(require_integer("block_size", block_size, minimum=1),
                    require_integer("stride", stride, minimum=1), x.shape[-2])
    kind = require_choice("kind", kind, KINDS)
    require_choice("activation", activation, tuple(ACTIVATIONS))
    named = {"pe": pe, "w1": w1, "b1": b1, "w2": w2, "b2": b2, "kernel": kernel}
    weights = {name: w for name, w in named.items() if w is not None}
    _check_weights(kind, weights, x, blocks.size)
    # beyond the tokens, sizes make no difference
    blocks = Blocks(blocks.size if weights else min(blocks.size, x.shape[-2] + 1),
                    min(blocks.stride, x.shape[-2] + 1), x.shape[-2])
    lengths = _lengths(lengths, x)
    xp, wide, *given = widened(x=x, **weights)
    held = dict(zip(weights, given, strict=True))
    wide = _only(xp, wide, _inside(x.shape[-2], lengths))
    chunks, pe_parts = blocks.chunks(xp, wide), _by_piece(blocks, held.get("pe"))
    hidden = None
    if kind == "mlp":
        hidden = _added_row(xp.matmul(_unfolded(xp, blocks, chunks, pe_parts), held["w1"]),
                            held.get("b1"))
        y = _added_row(xp.matmul(ACTIVATIONS[activation](xp, hidden, False)[0], held["w2"]),
                       held.get("b2"))
    elif _is_dense(weights, blocks.size, x.shape[-1]):
        y = xp.matmul(_unfolded(xp, blocks, chunks, pe_parts), _matrix(xp, held["kernel"]))
    else:
        parts = _by_piece(blocks, _kernel(xp, wide, held, blocks))
        y = sum((xp.sum(_plus(blocks.piece(chunks, s), pe_parts[s]) * part, axis=-2)
                 for s, part in enumerate(parts[1:], 1)),
                start=xp.sum(_plus(blocks.piece(chunks, 0), pe_parts[0]) * parts[0], axis=-2))
    y = _only(xp, y, _whole(blocks, lengths))
    return cast_like(xp, y, x), CompressSaved(x, weights, kind, blocks, activation, lengths, hidden)


def _check_weights(kind: str, weights: dict[str, Array], x: Array, size: int) -> None:
    wanted = ("pe", *WEIGHTS[kind])
    foreign = [name for name in weights if name not in wanted]
    if foreign:
        raise OptionError(f"{kind!r} takes {', '.join(wanted)} and not {', '.join(foreign)}")
    missing = [name for name in WEIGHTS[kind] if name in ("w1", "w2", "kernel")
               and name not in weights]
    if missing:
        raise OptionError(f"{kind!r} needs {', '.join(missing)}")
    heads, width = x.shape[-3], x.shape[-1]

    def require(name: str, *shape: int | None) -> None:
        if name not in weights:
            return
        own = tuple(weights[name].shape)
        tail, lead = own[-len(shape):], own[:-len(shape)]
        fits = len(own) >= len(shape) and all(
            want is None or want == have for want, have in zip(shape, tail, strict=True))
        if not fits or lead not in ((), (1,), (heads,)):
            text = ", ".join("any" if want is None else str(want) for want in shape)
            raise ShapeError(f"{name} must be ({text}), or that for each of {heads} heads; "
                             f"got {own}")

    require("pe", size, width)
    if kind == "mlp":
        require("w1", size * width, None)
        hidden = weights["w1"].shape[-1]
        require("b1", hidden)
        require("w2", hidden, None)
        require("b2", weights["w2"].shape[-1])
    if kind == "conv":
        own = tuple(weights["kernel"].shape)
        dense = _is_dense(weights, size, width)
        if dense and own == (heads, size, width) and width > 1:
            raise ShapeError(f"kernel {own} may be (G, l, D) or (l, D, O); give (1, l, D, O) for "
                             "the latter, or the former as (G, l, D, O)")
        require("kernel", *((size, width, None) if dense else (size, width)))


def _is_dense(weights: dict[str, Array], size: int, width: int) -> bool:
    """Whether the kernel has a matrix for each token of a block."""
    if "kernel" not in weights:
        return False
    return weights["kernel"].ndim == 4 or (
        weights["kernel"].ndim == 3 and tuple(weights["kernel"].shape[:2]) == (size, width))


def _lengths(lengths: Any, x: Array) -> Any:
    if lengths is None:
        return None
    given = host_array(lengths)
    require_broadcast("lengths", given.shape, tuple(x.shape[:-3]), "the leading axes")
    if given.size and given.dtype.kind not in "iu":
        raise OptionError(f"lengths must be integers; got {given.dtype}")
    if given.size and not (given.min() >= 0 and given.max() <= x.shape[-2]):
        raise ShapeError(f"lengths must lie in 0..{x.shape[-2]}; got {given.min()}..{given.max()}")
    return given.tolist()


def _inside(n: int, lengths: Any) -> np.ndarray | None:
    """Whether each token is before the length, (..., N)."""
    return None if lengths is None else np.arange(n) < host_array(lengths)[..., None]


def _whole(blocks: Blocks, lengths: Any) -> np.ndarray | None:
    """Whether each block lies before the length, (..., C)."""
    if lengths is None:
        return None
    ends = complete_blocks(host_array(lengths), blocks.size, blocks.stride)
    return np.arange(blocks.count) < ends[..., None]


def _only(xp: Any, x: Array, kept: np.ndarray | None) -> Array:
    """Return `x` (..., G, T, D) with zeros where `kept` (..., T) is False."""
    if kept is None:
        return x
    rows = arrays.from_host(xp, kept[..., None, :, None], arrays.device(x))
    return xp.where(rows, x, xp.zeros_like(x))


def _by_piece(blocks: Blocks, x: Array | None) -> list[Any]:
    """Cut (..., l, D) into the pieces of a block, each (..., 1, tokens, D)."""
    starts = range(0, blocks.size, blocks.stride)
    if x is None:
        return [None for _ in starts]
    return [x[..., None, start:min(start + blocks.stride, blocks.size), :] for start in starts]


def _plus(x: Array, pe: Array | None) -> Array:
    return x if pe is None else x + pe


def _added_row(x: Array, b: Array | None) -> Array:
    """Add ``b (O,)`` or (G, O) to every row of (..., G, C, O)."""
    return x if b is None else x + b[..., None, :]


def _unfolded(xp: Any, blocks: Blocks, chunks: Array, pe: list[Any]) -> Array:
    """Blocks as rows, (..., C, l D)."""
    parts = [_plus(blocks.piece(chunks, s), part) for s, part in enumerate(pe)]
    whole = parts[0] if len(parts) == 1 else xp.concat(parts, axis=-2)
    return xp.reshape(whole, (*whole.shape[:-2], whole.shape[-2] * whole.shape[-1]))


def _kernel(xp: Any, x: Array, given: dict[str, Array], blocks: Blocks) -> Array:
    """The kernel (..., l, D) of a convolution without matrices; the mean is one."""
    if "kernel" in given:
        return given["kernel"]
    return xp.full((blocks.size, 1), 1 / blocks.size, dtype=x.dtype, device=arrays.device(x))


def _matrix(xp: Any, kernel: Array) -> Array:
    """(..., l, D, O) as (..., l D, O)."""
    *lead, size, width, out = kernel.shape
    return xp.reshape(kernel, (*lead, size * width, out))


def _out_width(x: Array, weights: dict[str, Array]) -> int:
    if "w2" in weights:
        return int(weights["w2"].shape[-1])
    return int(weights["kernel"].shape[-1] if "kernel" in weights else x.shape[-1])


def _transposed(w: Array) -> Array:
    return w.T if w.ndim == 2 else w.mT


def _product_gradient(xp: Any, a: Array, dy: Array, w: Array) -> Array:
    """Gradient of `w` in ``y = a @ w`` for a (..., G, C, K), w (K, O), (1, K, O) or (G, K, O)."""
    if w.ndim == 2 or w.shape[0] == 1:
        flat = [xp.reshape(x, (-1, x.shape[-1])) for x in (a, dy)]
        return xp.reshape(xp.matmul(flat[0].T, flat[1]), w.shape)
    return _reduced(xp, xp.matmul(a.mT, dy), w)


def _summed(xp: Any, dy: Array, b: Array | None) -> Array | None:
    """Gradient of a bias (O,), (1, O) or (G, O) that every row of (..., G, C, O) was given."""
    return None if b is None else _reduced(xp, xp.sum(dy, axis=-2), b)


def _reduced(xp: Any, x: Array, like: Array) -> Array:
    """Sum `x` over the leading axes that `like` does not have."""
    extra = x.ndim - like.ndim
    if extra:
        x = xp.sum(x, axis=tuple(range(extra)))
    for axis, size in enumerate(like.shape):
        if size == 1 and x.shape[axis] != 1:
            x = xp.sum(x, axis=axis, keepdims=True)
    return x
