"""Convolution over tokens: kernels of a few taps, one for each position, or one for all.

    out[t, c] = sum over taps k of weight[k] * x[t + k - pad, c]

Per position: ``weight = dropout(softmax(logits[t, h]))`` over the taps, shared by the channels of
head h. Constant: ``weight = w[:, c]``, as it is. Tokens before the first and from `lengths` on
count as zeros. What is kept is the arguments; the softmax is done again by the backward, and no
array has two axes of tokens.

Letters: B batch items (all leading axes in one), N tokens, C channels, H heads of C / H channels
side by side, K taps.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from .. import arrays, dispatch
from ..arrays import Array
from ..checks import (
    DtypeError,
    OptionError,
    ShapeError,
    require_broadcast,
    require_choice,
    require_real,
)
from ..differentiable import Saved, gradients
from ..masks.algebra import host_array
from .problem import record

DECISIONS = ("dropout_seed",)


@dataclasses.dataclass(frozen=True)
class PerPosition:
    """What a kernel module, ``pyattn.kernels.<backend>.convolution``, is handed.

    It has ``refuses(problem)``; ``forward(problem)``, which returns out (B, N, C); and
    ``backward(problem, dout)``, which returns gradients by name: "x", "logits", and "span"
    (B, N, H) where given. The numbers of each are those of its argument, or acc: float64 where
    that of x is, else float32. A tap of weight 0 does not look at its token.
    """

    x: Array
    """(B, N, C)."""
    logits: Array
    """(B, N, H, K)."""
    pad: int
    """The tap of position t: tap k is token t + k - pad."""
    lengths: np.ndarray
    """int32 (B,): tokens from here on are padding."""
    renorm: bool = False
    """Whether the softmax is over the taps that have a token alone."""
    span: Array | None = None
    """(B, N, H), acc: tap k's exponential is multiplied by clip((ramp + span - |k - pad|) / ramp,
    0, 1)."""
    ramp: float = 1.0
    dropout: float = 0.0
    """Probability that a weight is dropped; the others are divided by 1 - dropout."""
    dropout_seed: int = 0
    """64 bits. The draw is by tap, token, head and batch item."""


@dataclasses.dataclass(frozen=True)
class Constant:
    """The other problem, for ``constant(problem)`` and ``constant_backward(problem, dout)``."""

    x: Array
    """(B, N, C)."""
    w: Array
    """(K, C)."""
    pad: int
    lengths: np.ndarray
    """int32 (B,)."""


def padding(taps: int, causal: bool) -> int:
    """Return the tap of the position itself: the last, or the middle one.

    Examples
    --------
    >>> from pyattn.engines.convolution import padding
    >>> padding(3, True), padding(3, False), padding(4, False)
    (2, 1, 2)
    """
    return taps - 1 if causal else taps // 2


def tap_count(n: int, taps: int, pad: int, lengths: np.ndarray) -> int:
    """Return how many taps have a token, over all positions of all items.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.engines.convolution import tap_count
    >>> tap_count(4, 3, 1, np.array([4, 2]))
    14
    """
    ends = np.minimum(lengths, n).astype(np.int64)
    offsets = np.abs(np.arange(taps) - pad)
    return int(np.maximum(ends[:, None] - offsets, 0).sum())


@dataclasses.dataclass(frozen=True)
class ConvolutionSaved(Saved):
    """The arguments of `forward`."""

    x: Array
    logits: Array
    span: Array | None
    pad: int
    lengths: tuple[int, ...]
    renorm: bool
    ramp: float
    dropout: float
    dropout_seed: int | None

    @property
    def decisions(self) -> dict[str, Array]:
        """``dropout_seed``, where there was dropout."""
        if self.dropout_seed is None:
            return {}
        return {"dropout_seed": np.asarray(self.dropout_seed, dtype=np.uint64)}

    @property
    def stats(self) -> dict[str, int]:
        """Counters: pairs (taps that have a token, for each head), flops, bytes in and out."""
        n, c = self.x.shape[-2:]
        heads, taps = self.logits.shape[-2:]
        pairs = tap_count(n, taps, self.pad, np.asarray(self.lengths, np.int32))
        held = [self.x, self.x, self.logits, *([] if self.span is None else [self.span])]
        return {"pairs": heads * pairs, "flops": 2 * c * pairs,
                "bytes": sum(map(arrays.nbytes, held))}

    def backward(self, dout: Array) -> Any:
        """Gradients of x, of the logits, and of the span where given, like their arguments."""
        batch, problem = _problem(self)
        xp = arrays.namespace(self.x, dout)
        _require_dout(dout, (*batch, *self.x.shape[-2:]), self.x)
        dout = arrays.reshape(xp, dout, tuple(problem.x.shape))
        found = dispatch.kernel("convolution", problem, self.x).backward(problem, dout)
        given = {"x": self.x, "logits": self.logits, "span": self.span}
        names = {"x": "x", "logits": "kernel_logits", "span": "span"}
        wide = {"x": (*batch, *self.x.shape[-2:]), "logits": (*batch, *self.logits.shape[-3:]),
                "span": (*batch, *self.logits.shape[-3:-1])}
        grads = {names[name]: _reduced(xp, arrays.reshape(xp, found[name], wide[name]), x)
                 for name, x in given.items() if x is not None}
        return gradients(tuple(grads))(**grads)


def forward(x: Array, logits: Array, *, causal: bool = False, renorm: bool = False,
            span: Array | None = None, ramp: float = 32.0, dropout: float = 0.0, rng: Any = None,
            lengths: Any = None,
            decisions: dict[str, Any] | None = None) -> tuple[Array, ConvolutionSaved]:
    """Convolve every token with a kernel of its own.

    Parameters
    ----------
    x : array, shape (..., N, C)
    logits : array, shape (..., N, H, K), any float dtype
        H divides C, K >= 1; leading axes broadcast with those of `x`.
    causal : bool
        Whether the last tap is the token itself, or the middle one (tap ``K // 2``) is.
    renorm : bool
        Whether the softmax leaves out taps that have no token.
    span : array that broadcasts to (..., N, H), optional
    ramp : float, > 0
        Tap k's exponential is multiplied by ``clip((ramp + span - |distance|) / ramp, 0, 1)``.
    dropout, rng, decisions
        Of the weights, as for `pyattn.attention`.
    lengths : int or array of int, broadcasting to the leading axes, optional

    Returns
    -------
    array, shape (..., N, C), dtype of `x`; and what its backward needs
    """
    xp = arrays.namespace(x, logits, span)
    arrays.require_same_device({"x": x, "kernel_logits": logits, "span": span})
    for name, given in (("x", x), ("kernel_logits", logits), ("span", span)):
        if given is not None:
            arrays.require_float(name, given)
    if x.ndim < 2 or logits.ndim < 3:
        raise ShapeError("x must be (..., N, C) and kernel_logits (..., N, H, K); got "
                         f"{tuple(x.shape)} and {tuple(logits.shape)}")
    (n, c), (rows, heads, taps) = x.shape[-2:], logits.shape[-3:]
    if rows != n or taps < 1 or heads < 1 or c % heads:
        raise ShapeError(f"kernel_logits must be (..., N, H, K) with N = {n}, H a divisor of C = "
                         f"{c} and K at least 1; got {tuple(logits.shape)}")
    try:
        batch = np.broadcast_shapes(tuple(x.shape[:-2]), tuple(logits.shape[:-3]))
    except ValueError:
        raise ShapeError("leading axes of x and kernel_logits must broadcast; got "
                         f"{tuple(x.shape)} and {tuple(logits.shape)}") from None
    require_choice("causal", causal, (False, True))
    require_choice("renorm_padding", renorm, (False, True))
    if span is not None:
        require_broadcast("span", tuple(span.shape), (*batch, n, heads), "(..., N, H)")
    if require_real("ramp", ramp) <= 0:
        raise OptionError(f"ramp must be positive; got {ramp}")
    rate = require_rate(dropout)
    fields = {"x": x, "logits": logits, "span": span, "pad": padding(taps, bool(causal)),
              "lengths": flat_lengths(lengths, batch, n), "renorm": bool(renorm),
              "ramp": float(ramp), "dropout": rate, "dropout_seed": draw_seed(rate, rng, decisions)}
    saved = record(ConvolutionSaved, fields)
    _, problem = _problem(saved)
    out = dispatch.kernel("convolution", problem, x).forward(problem)
    return arrays.cast(xp, arrays.reshape(xp, out, (*batch, n, c)), x.dtype), saved


@dataclasses.dataclass(frozen=True)
class ConstantSaved(Saved):
    """The arguments of `constant`."""

    x: Array
    w: Array
    pad: int
    lengths: tuple[int, ...]

    @property
    def stats(self) -> dict[str, int]:
        """Counters: pairs (taps that have a token), flops of the forward, bytes in and out."""
        n, c = self.x.shape[-2:]
        pairs = tap_count(n, self.w.shape[0], self.pad, np.asarray(self.lengths, np.int32))
        return {"pairs": pairs, "flops": 2 * c * pairs,
                "bytes": 2 * arrays.nbytes(self.x) + arrays.nbytes(self.w)}

    def backward(self, dout: Array) -> Any:
        """Gradients of x and w."""
        _require_dout(dout, tuple(self.x.shape), self.x)
        xp, problem = arrays.namespace(self.x, dout), _constant_problem(self)
        dout = arrays.reshape(xp, dout, tuple(problem.x.shape))
        dx, dw = dispatch.kernel("convolution", problem, self.x).constant_backward(problem, dout)
        return gradients(("x", "w"))(
            arrays.cast(xp, arrays.reshape(xp, dx, tuple(self.x.shape)), self.x.dtype),
            arrays.cast(xp, dw, self.w.dtype))


def constant(x: Array, w: Array, *, pad: int, lengths: Any = None) -> tuple[Array, ConstantSaved]:
    """Convolve every channel with a kernel of its own, the same at every position.

    Parameters
    ----------
    x : array, shape (..., N, C)
    w : array, shape (K, C), any float dtype
    pad : int
        Tap k is token ``t + k - pad``.
    lengths : int or array of int, broadcasting to the leading axes, optional

    Returns
    -------
    array, shape (..., N, C), dtype of `x`; and what its backward needs
    """
    xp = arrays.namespace(x, w)
    arrays.require_same_device({"x": x, "w": w})
    for name, given in (("x", x), ("w", w)):
        arrays.require_float(name, given)
    if x.ndim < 2 or w.ndim != 2 or w.shape[0] < 1 or w.shape[1] != x.shape[-1]:
        raise ShapeError("x must be (..., N, C) and w (K, C) with K at least 1; got "
                         f"{tuple(x.shape)} and {tuple(w.shape)}")
    batch = tuple(x.shape[:-2])
    saved = ConstantSaved(x, w, pad, flat_lengths(lengths, batch, x.shape[-2]))
    problem = _constant_problem(saved)
    out = dispatch.kernel("convolution", problem, x).constant(problem)
    return arrays.cast(xp, arrays.reshape(xp, out, tuple(x.shape)), x.dtype), saved


def flat_lengths(lengths: Any, batch: tuple[int, ...], n: int) -> tuple[int, ...]:
    """Return the length of each of the batch items, in one row; n where none are given."""
    size = math.prod(batch)
    if lengths is None:
        return (n,) * size
    given = host_array(lengths)
    require_broadcast("lengths", given.shape, batch, "the leading axes")
    if given.size and given.dtype.kind not in "iu":
        raise OptionError(f"lengths must be integers; got {given.dtype}")
    if given.size and not (given.min() >= 0 and given.max() <= n):
        raise ShapeError(f"lengths must lie in 0..{n}; got {given.min()}..{given.max()}")
    return tuple(np.broadcast_to(given, batch).reshape(-1).tolist())


def _problem(saved: ConvolutionSaved) -> tuple[tuple[int, ...], PerPosition]:
    """Return the batch axes, and the problem with these in one."""
    x, logits, span = saved.x, saved.logits, saved.span
    xp = arrays.namespace(x, logits, span)
    batch = np.broadcast_shapes(tuple(x.shape[:-2]), tuple(logits.shape[:-3]))
    if span is not None:
        span = arrays.cast(xp, span, arrays.accumulator(xp, x))
        span = _flat(xp, xp.broadcast_to(span, (*batch, *logits.shape[-3:-1])), batch, 2)
    return batch, PerPosition(
        _flat(xp, x, batch, 2), _flat(xp, logits, batch, 3), saved.pad,
        np.asarray(saved.lengths, np.int32), saved.renorm, span, saved.ramp, saved.dropout,
        saved.dropout_seed or 0)


def _constant_problem(saved: ConstantSaved) -> Constant:
    batch = tuple(saved.x.shape[:-2])
    x = _flat(arrays.namespace(saved.x), saved.x, batch, 2)
    return Constant(x, saved.w, saved.pad, np.asarray(saved.lengths, np.int32))


def _flat(xp: Any, x: Array, batch: tuple[int, ...], tail: int) -> Array:
    """Return `x` with its leading axes, broadcast to `batch`, in one; a view where there can be."""
    own = tuple(x.shape[x.ndim - tail:])
    if tuple(x.shape) != (*batch, *own):
        x = xp.broadcast_to(x, (*batch, *own))
    return x if len(batch) == 1 else arrays.reshape(xp, x, (math.prod(batch), *own))


def _reduced(xp: Any, gradient: Array, like: Array) -> Array:
    """Return a gradient in the shape and dtype of `like`, which was broadcast."""
    extra = gradient.ndim - like.ndim
    own = (1,) * extra + tuple(like.shape)
    axes = tuple(axis for axis, size in enumerate(own) if size != gradient.shape[axis])
    if axes:
        gradient = xp.sum(gradient, axis=axes)
    return arrays.cast(xp, arrays.reshape(xp, gradient, tuple(like.shape)), like.dtype)


def _require_dout(dout: Array, shape: tuple[int, ...], x: Array) -> None:
    if tuple(dout.shape) != tuple(shape):
        raise ShapeError(f"dout must have shape {tuple(shape)}; got {tuple(dout.shape)}")
    if dout.dtype != x.dtype:
        raise DtypeError(f"dout must have the dtype of the output, {arrays.dtype_name(x)}; "
                         f"got {arrays.dtype_name(dout)}")


def require_rate(dropout: float) -> float:
    """Return the probability that a weight is dropped, or raise OptionError."""
    rate = require_real("dropout", dropout)
    if not 0 <= rate < 1:
        raise OptionError(f"dropout must be at least 0 and below 1; got {rate}")
    return rate


def draw_seed(dropout: float, rng: Any, decisions: dict[str, Any] | None) -> int | None:
    """Return the seed of dropout, drawn or as decided; None if there is no dropout."""
    unknown = sorted(set(decisions or {}) - set(DECISIONS))
    if unknown:
        raise OptionError(f"decisions may hold {', '.join(DECISIONS)}; got {', '.join(unknown)}")
    if not dropout:
        return None
    if decisions and "dropout_seed" in decisions:
        return int(decisions["dropout_seed"])
    return int(np.random.default_rng(rng).integers(2**64, dtype=np.uint64))
