"""What channels have in common over an image's pixels, and pixels over its channels, and gates.

Images are (B, C, P), B all leading axes in one and P pixels; everything is in the computing dtype.
A maximum is the first of equals, by an index that is kept on the host; it has the gradient.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..checks import OptionError, ShapeError
from ..differentiable import ON_HOST, Saved
from .activation import logistic
from .image_convolution import Conv2dSaved, conv2d


def largest(xp: Any, x: Array, axis: int, index: np.ndarray | None) -> tuple[Array, np.ndarray]:
    """Return the first largest number along an axis and where it is; or the one at `index`.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features.channel_pooling import largest
    >>> largest(np, np.array([[1.0, 3.0, 3.0]]), 1, None)
    (array([3.]), array([1], dtype=int32))
    """
    if index is None:
        top, found = xp.max(x, axis=axis), arrays.to_host(xp.argmax(x, axis=axis))
        return top, found.astype(np.int32)
    zeros = xp.zeros_like(x)
    return xp.sum(xp.where(_at(xp, x, axis, index), x, zeros), axis=axis), index


def spread(xp: Any, dtop: Array, x: Array, axis: int, index: np.ndarray) -> Array:
    """Undo `largest`: its gradient in the shape of `x`."""
    wide = xp.expand_dims(dtop, axis=axis)
    return xp.where(_at(xp, x, axis, index), wide, xp.zeros_like(wide))


def _at(xp: Any, x: Array, axis: int, index: np.ndarray) -> Array:
    """Whether each place of `x` is the one that the index names along the axis."""
    where = arrays.device(x)
    shape = [1] * x.ndim
    shape[axis] = x.shape[axis]
    places = arrays.from_host(xp, np.arange(x.shape[axis], dtype=np.int32).reshape(shape), where)
    return places == arrays.from_host(xp, np.expand_dims(index, axis), where)


def given_index(decisions: dict[str, Any] | None, name: str, shape: tuple[int, ...],
                limit: int) -> np.ndarray | None:
    """Return the index `name` of `decisions`, (..., ) as `shape` says; None if it is not there."""
    if not decisions or name not in decisions:
        return None
    index = np.asarray(decisions[name])
    if index.dtype.kind not in "iu" or index.shape != shape:
        raise ShapeError(f"decisions[{name!r}] must be integers {shape}; got {index.dtype} "
                         f"{index.shape}")
    if index.size and not (index.min() >= 0 and index.max() < limit):
        raise OptionError(f"decisions[{name!r}] must lie in 0..{limit - 1}; got "
                          f"{index.min()}..{index.max()}")
    return index.astype(np.int32)


@dataclasses.dataclass(frozen=True)
class ChannelGateSaved(Saved):
    """What `channel_gate` keeps."""

    pooled: tuple[Array, ...]
    """The means of the pixels, and perhaps the maxima, (B, C)."""
    hidden: tuple[Array, ...]
    """Before the activation, (B, C / r) for each."""
    gate: Array
    w1: Array
    w2: Array
    index: np.ndarray | None = dataclasses.field(metadata=ON_HOST)

    def backward(self, dgate: Array, x: Array) -> tuple[Array, dict[str, Array]]:
        """Gradient of x (B, C, P), and of the weights by name."""
        xp = arrays.namespace(dgate, x)
        # forward: gate = sigmoid(sum of relu(pooled @ w1 + b1) @ w2 + b2)
        dlogits = dgate * self.gate * (1 - self.gate)
        found = {name: xp.zeros((), dtype=x.dtype, device=arrays.device(x))
                 for name in ("w1", "b1", "w2", "b2")}
        dpooled = []
        for pooled, hidden in zip(self.pooled, self.hidden, strict=True):
            active = xp.where(hidden > 0, hidden, xp.zeros_like(hidden))
            dhidden = xp.matmul(dlogits, self.w2.T)
            dhidden = xp.where(hidden > 0, dhidden, xp.zeros_like(dhidden))
            found["w2"] = found["w2"] + xp.matmul(active.T, dlogits)
            found["b2"] = found["b2"] + xp.sum(dlogits, axis=0)
            found["w1"] = found["w1"] + xp.matmul(pooled.T, dhidden)
            found["b1"] = found["b1"] + xp.sum(dhidden, axis=0)
            dpooled.append(xp.matmul(dhidden, self.w1.T))
        # forward: the mean, and the maximum, of an image's pixels
        dx = dpooled[0][:, :, None] / max(1, x.shape[2])
        if self.index is not None:
            dx = dx + spread(xp, dpooled[1], x, 2, self.index)
        return xp.broadcast_to(dx, x.shape), found


def channel_gate(xp: Any, x: Array, w1: Array, b1: Array | None, w2: Array, b2: Array | None, *,
                 maximum: bool, index: np.ndarray | None = None) -> tuple[Array, ChannelGateSaved]:
    """Return a number in (0, 1) for each channel (B, C), from what its pixels are like.

    Without pixels means and maxima are 0.
    """
    if x.shape[2] == 0:
        x = xp.zeros((*x.shape[:2], 1), dtype=x.dtype, device=arrays.device(x))
    pooled = [xp.mean(x, axis=2)]
    if maximum:
        top, index = largest(xp, x, 2, index)
        pooled.append(top)
    hidden, logits = [], None
    for part in pooled:
        inside = xp.matmul(part, w1)
        hidden.append(inside if b1 is None else inside + b1)
        active = xp.where(hidden[-1] > 0, hidden[-1], xp.zeros_like(hidden[-1]))
        more = xp.matmul(active, w2)
        more = more if b2 is None else more + b2
        logits = more if logits is None else logits + more
    gate = logistic(xp, logits)
    return gate, ChannelGateSaved(tuple(pooled), tuple(hidden), gate, w1, w2,
                                  index if maximum else None)


@dataclasses.dataclass(frozen=True)
class SpatialGateSaved(Saved):
    """What `spatial_gate` keeps."""

    convolved: Conv2dSaved
    statistics: tuple[float, float] | None
    """Mean and variance of the map, where there is a normalisation by its own."""
    normal: Array | None
    """The map after its normalisation, before gamma and beta."""
    rstd: Array | None
    gamma: Array | None
    gate: Array
    """(B, H, W)."""
    index: np.ndarray = dataclasses.field(metadata=ON_HOST)
    reverse: bool

    def backward(self, dgate: Array, x: Array) -> tuple[Array, dict[str, Array]]:
        """Gradient of x (B, C, P), and of the weights by name."""
        xp = arrays.namespace(dgate, x)
        # forward: gate = sigmoid(gamma normal + beta), or of the convolution itself
        dlogits = xp.reshape(dgate, self.gate.shape) * self.gate * (1 - self.gate)
        found: dict[str, Array] = {}
        if self.normal is not None:
            found["gamma"] = xp.sum(dlogits * self.normal)
            found["beta"] = xp.sum(dlogits)
            dlogits = dlogits * self.gamma
            if self.statistics is not None:
                dlogits = (dlogits - xp.mean(dlogits)
                           - self.normal * xp.mean(dlogits * self.normal))
            dlogits = dlogits * self.rstd
        grads = self.convolved.backward(dlogits[:, None, :, :])
        found["w_spatial"] = xp.permute_dims(grads.w[:, :, :, 0], (2, 0, 1))
        dmaps = xp.reshape(grads.x, (x.shape[0], 2, x.shape[2]))
        dmax, dmean = (dmaps[:, 1, :], dmaps[:, 0, :]) if self.reverse else (
            dmaps[:, 0, :], dmaps[:, 1, :])
        # forward: the mean, and the maximum, of a pixel's channels
        dx = dmean[:, None, :] / max(1, x.shape[1])
        return dx + spread(xp, dmax, x, 1, self.index), found


def spatial_gate(xp: Any, x: Array, size: tuple[int, int], w: Array, gamma: Array | None,
                 beta: Array | None, statistics: tuple[float, float] | None, eps: float, *,
                 reverse: bool, index: np.ndarray | None = None) -> tuple[Array, SpatialGateSaved]:
    """Return a number in (0, 1) for each pixel (B, P), from what its channels are like."""
    top, index = largest(xp, x, 1, index)
    maps = [top, xp.mean(x, axis=1)]
    stacked = xp.stack(maps[::-1] if reverse else maps, axis=1)
    stacked = xp.reshape(stacked, (x.shape[0], 2, *size))
    y, convolved = conv2d.forward(stacked, xp.permute_dims(w, (1, 2, 0))[..., None])
    logits, normal, rstd, own = y[:, 0, :, :], None, None, None
    if gamma is not None and beta is not None:
        if statistics is None:
            mean = xp.mean(logits)
            variance = xp.mean((logits - mean) ** 2)
            own = float(mean), float(variance)
        else:
            mean, variance = (xp.asarray(number, dtype=x.dtype, device=arrays.device(x))
                              for number in statistics)
        rstd = 1 / xp.sqrt(variance + eps)
        normal = (logits - mean) * rstd
        logits = gamma * normal + beta
    gate = logistic(xp, logits)
    return xp.reshape(gate, (x.shape[0], x.shape[2])), SpatialGateSaved(
        convolved, own, normal, rstd, gamma, gate, index, reverse)


def flat_images(xp: Any, x: Array) -> Array:
    """(..., C, H, W) as (B, C, P)."""
    return xp.reshape(x, (math.prod(x.shape[:-3]), x.shape[-3], x.shape[-2] * x.shape[-1]))


def require_images(x: Array) -> None:
    """Raise ShapeError unless `x` is (..., C, H, W) with a channel at least."""
    if x.ndim < 3 or not x.shape[-3]:
        raise ShapeError(f"x must be (..., C, H, W) with C at least 1; got {tuple(x.shape)}")


def require_network(x: Array, w1: Array, b1: Array | None, w2: Array, b2: Array | None,
                    suffix: str = "") -> None:
    """Raise ShapeError unless the weights go from C channels to some, and back."""
    c = x.shape[-3]
    if w1.ndim != 2 or w1.shape[0] != c or w2.ndim != 2 or tuple(w2.shape) != w1.shape[::-1]:
        raise ShapeError(f"w1{suffix} must be (C, R) and w2{suffix} (R, C) for C = {c} channels; "
                         f"got {tuple(w1.shape)} and {tuple(w2.shape)}")
    for name, b, width in (("b1", b1, w1.shape[1]), ("b2", b2, c)):
        if b is not None and tuple(b.shape) != (width,):
            raise ShapeError(f"{name}{suffix} must have shape ({width},); got {tuple(b.shape)}")
