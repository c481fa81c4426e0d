"""Convolution of images, as one matrix product over their taps.

Letters: B images (all leading axes in one), C channels, O output channels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from .. import arrays
from ..arrays import Array
from ..checks import OptionError, ShapeError, require_choice, require_integer
from ..differentiable import Saved, differentiable, gradients
from .precision import cast_like, require_same_shape, widened

COLUMNS = 2**20
"""Numbers of unfolded images that there are at a time."""


def require_bias(b: Array | None, w: Array) -> None:
    """Raise ShapeError unless `b` is as wide as the output of `w`."""
    if b is not None and tuple(b.shape) != (w.shape[-1],):
        raise ShapeError(f"b must have shape ({w.shape[-1]},), the output width of w; got "
                         f"{tuple(b.shape)}")


@dataclasses.dataclass(frozen=True)
class Conv2dSaved(Saved):
    """The arguments of `conv2d`."""

    x: Array
    w: Array
    b: Array | None
    stride: int
    padding: tuple[int, int]

    def backward(self, dout: Array) -> Any:
        """Gradients of x, w and, where given, b."""
        (kh, kw, c, o), lead = self.w.shape, tuple(self.x.shape[:-3])
        (height, width), size = self.x.shape[-2:], _sizes(self.x, self.w, self.stride, self.padding)
        require_same_shape("dout", dout, (*lead, o, *size))
        xp, dy, x, w = widened(dout=dout, x=self.x, w=self.w)
        dy, x = (xp.reshape(y, (math.prod(lead), *y.shape[-3:])) for y in (dy, x))
        rows = xp.reshape(dy, (dy.shape[0], o, size[0] * size[1]))
        dw = xp.zeros((o, c * kh * kw), dtype=w.dtype, device=arrays.device(w))
        for images, columns in _unfolded(xp, x, (kh, kw), self.stride, self.padding):
            # forward: y = w @ columns
            dw = dw + xp.sum(xp.matmul(rows[images, :, :], xp.matrix_transpose(columns)), axis=0)
        dw = xp.permute_dims(xp.reshape(dw, (o, c, kh, kw)), (2, 3, 1, 0))
        # forward: y[r, s] = sum_ij w[i, j] x[r stride + i - pad, s stride + j - pad]; so dx is the
        # convolution of dy, stretched by the stride, with w turned round
        turned = xp.permute_dims(xp.flip(w, axis=(0, 1)), (0, 1, 3, 2))
        stretched = _stretched(xp, dy, self.stride)
        ends = [(k - 1 - pad, have - full - (k - 1 - pad) + k - 1) for k, pad, have, full in zip(
            (kh, kw), self.padding, (height, width), stretched.shape[-2:], strict=True)]
        dx = _convolved(xp, stretched, turned, 1, ends)
        found = {"x": cast_like(xp, xp.reshape(dx, self.x.shape), self.x),
                 "w": cast_like(xp, dw, self.w)}
        if self.b is not None:
            found["b"] = cast_like(xp, xp.sum(dy, axis=(0, 2, 3)), self.b)
        return gradients(tuple(found))(**found)


@differentiable
def conv2d(x: Array, w: Array, b: Array | None = None, *, stride: int = 1,
           padding: Any = "same") -> tuple[Array, Conv2dSaved]:
    """Convolve images: ``y[r, s] = sum over i, j of x[r + i - pad, s + j - pad] @ w[i, j] + b``.

    Pixels that do not exist are zeros. With a `stride` the rows and columns 0, stride, 2 stride,
    ... of that are kept.

    Parameters
    ----------
    x : array, shape (..., C, height, width), float16 / bfloat16 / float32 / float64
        Images.
    w : array, shape (kh, kw, C, O)
        A matrix for each tap. torch's ``Conv2d.weight (O, C, kh, kw)`` is
        ``w.transpose(3, 2, 0, 1)``.
    b : array, shape (O,), optional
        Added to every pixel.
    stride : int >= 1
        Down and across.
    padding : "same", int, or a pair of int
        Rows and columns of zeros on each side; ``"same"``, for odd kh and kw, is half of them.

    Returns
    -------
    array, shape (..., O, (height + 2 pad - kh) // stride + 1, ...), dtype of `x`

    Raises
    ------
    ShapeError, DtypeError, OptionError
        Arguments that do not fit.

    Notes
    -----
    The taps of some images at a time are laid out as columns of one matrix product: O(pixels kh kw
    C O) time, and memory for some million numbers or one image's. Kept for backward: the arguments;
    the columns are laid out again.

    References
    ----------
    .. [1] Chellapilla, Puri, Simard, "High Performance Convolutional Neural Networks for Document
       Processing", 2006, section 3.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.layers import conv2d
    >>> conv2d(np.ones((1, 3, 3)), np.ones((3, 3, 1, 1)))[0]
    array([[4., 6., 4.],
           [6., 9., 6.],
           [4., 6., 4.]])
    """
    stride = require_integer("stride", stride, minimum=1)
    if x.ndim < 3 or w.ndim != 4 or 0 in w.shape[:2] or w.shape[2] != x.shape[-3]:
        raise ShapeError("x must be (..., C, height, width) and w (kh, kw, C, O), kh and kw at "
                         f"least 1; got {tuple(x.shape)} and {tuple(w.shape)}")
    require_bias(b, w)
    pads = _pads(padding, w)
    size = _sizes(x, w, stride, pads)
    if min(size) < 0:
        raise ShapeError(f"the kernel of w {tuple(w.shape)} must fit into the image with its "
                         f"padding, {pads}; got {tuple(x.shape)}")
    xp, wide, wide_w, wide_b = widened(x=x, w=w, b=b)
    lead = tuple(x.shape[:-3])
    wide = xp.reshape(wide, (math.prod(lead), *x.shape[-3:]))
    y = _convolved(xp, wide, wide_w, stride, pads)
    if wide_b is not None:
        y = y + wide_b[:, None, None]
    y = xp.reshape(y, (*lead, w.shape[3], *size))
    return cast_like(xp, y, x), Conv2dSaved(x, w, b, stride, pads)


def _pads(padding: Any, w: Array) -> tuple[int, int]:
    if isinstance(padding, str):
        require_choice("padding", padding, ("same",))
        if not w.shape[0] % 2 or not w.shape[1] % 2:
            raise OptionError("padding must be a number for a kernel of even size; got 'same' for "
                              f"w {tuple(w.shape)}")
        return w.shape[0] // 2, w.shape[1] // 2
    pair = padding if isinstance(padding, tuple | list) else (padding, padding)
    if len(pair) != 2:
        raise OptionError(f"padding must be 'same', an integer or a pair; got {padding!r}")
    down, across = (require_integer("padding", pad, minimum=0) for pad in pair)
    return down, across


def _sizes(x: Array, w: Array, stride: int, pads: tuple[int, int]) -> tuple[int, int]:
    """Return the height and the width of the output."""
    down, across = ((have + 2 * pad - k) // stride + 1 for have, pad, k in
                    zip(x.shape[-2:], pads, w.shape[:2], strict=True))
    return down, across


def _convolved(xp: Any, x: Array, w: Array, stride: int, pads: Any) -> Array:
    """Convolve images (B, C, height, width) with w (kh, kw, C, O)."""
    kh, kw, c, o = w.shape
    matrix = xp.reshape(xp.permute_dims(w, (3, 2, 0, 1)), (o, c * kh * kw))
    parts = [xp.matmul(matrix, columns)
             for _, columns in _unfolded(xp, x, (kh, kw), stride, pads)]
    y = parts[0] if len(parts) == 1 else xp.concat(parts, axis=0)
    (top, bottom), (left, right) = _sides(pads)
    size = ((x.shape[2] + top + bottom - kh) // stride + 1,
            (x.shape[3] + left + right - kw) // stride + 1)
    return xp.reshape(y, (x.shape[0], o, *size))


def _sides(pads: Any) -> list[tuple[int, int]]:
    return [pad if isinstance(pad, tuple) else (pad, pad) for pad in pads]


def _unfolded(xp: Any, x: Array, kernel: tuple[int, int], stride: int,
              pads: Any) -> Iterator[tuple[slice, Array]]:
    """Give, some images at a time, the taps of all pixels of the output (b, C kh kw, pixels).

    Negative padding leaves out what there is.
    """
    (top, bottom), (left, right) = _sides(pads)
    batch, c, height, width = x.shape
    kh, kw = kernel
    rows, columns = ((have - k) // stride + 1 for have, k in (
        (height + top + bottom, kh), (width + left + right, kw)))
    each = max(1, COLUMNS // max(1, c * kh * kw * rows * columns))

    def zeros(*shape: int) -> Array:
        return xp.zeros(shape, dtype=x.dtype, device=arrays.device(x))

    for first in range(0, max(1, batch), each):
        images = slice(first, min(first + each, batch))
        part = x[images, :, max(0, -top):height + min(0, bottom),
                 max(0, -left):width + min(0, right)]
        b, inner = part.shape[0], part.shape[3]
        part = xp.concat([zeros(b, c, max(0, top), inner), part,
                          zeros(b, c, max(0, bottom), inner)], axis=2)
        full = part.shape[2]
        part = xp.concat([zeros(b, c, full, max(0, left)), part,
                          zeros(b, c, full, max(0, right))], axis=3)
        taps = [part[:, :, i:i + (rows - 1) * stride + 1:stride,
                     j:j + (columns - 1) * stride + 1:stride]
                if rows and columns else zeros(b, c, rows, columns)
                for i in range(kh) for j in range(kw)]
        yield images, xp.reshape(xp.stack(taps, axis=2), (b, c * kh * kw, rows * columns))


def _stretched(xp: Any, x: Array, stride: int) -> Array:
    """Put stride - 1 zeros between the rows and the columns of (B, O, height, width)."""
    if stride == 1 or 0 in x.shape:
        return x
    batch, o, height, width = x.shape
    wide = xp.concat([x[..., None], xp.zeros((*x.shape, stride - 1), dtype=x.dtype,
                                             device=arrays.device(x))], axis=-1)
    wide = xp.reshape(wide, (batch, o, height, 1, width * stride))[..., :(width - 1) * stride + 1]
    rows = xp.zeros((batch, o, height, stride - 1, wide.shape[-1]), dtype=x.dtype,
                    device=arrays.device(x))
    wide = xp.reshape(xp.concat([wide, rows], axis=3),
                      (batch, o, height * stride, wide.shape[-1]))
    return wide[:, :, :(height - 1) * stride + 1, :]
