"""Convolutions over tokens on plain weight arrays, and with kernels that tokens make.

Letters: N tokens of width C, H heads, K taps, O output width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..checks import OptionError, ShapeError, require_choice, require_integer
from ..differentiable import Saved, differentiable, gradients
from ..engines import convolution as engine
from ..features.activation import logistic
from ..features.image_convolution import require_bias
from ..features.precision import cast_like, require_same_shape, widened
from ..variants.dynamic_convolution import dynamic_convolution, lightweight_convolution
from .linear import linear
from .swin import require_params


@dataclasses.dataclass(frozen=True)
class Conv1dSaved(Saved):
    """The arguments of `conv1d`, and the engine's record where it ran."""

    x: Array
    w: Array
    b: Array | None
    pad: int
    lengths: tuple[int, ...]
    convolved: Any
    """None for a dense kernel."""

    def backward(self, dout: Array) -> Any:
        """Gradients of x, w and, where given, b."""
        require_same_shape("dout", dout, (*self.x.shape[:-1], self.w.shape[-1]))
        xp, dy, x, w = widened(dout=dout, x=self.x, w=self.w)
        dy = _inside(xp, dy, self.lengths)
        db = xp.sum(dy, axis=tuple(range(dy.ndim - 1)))
        if self.convolved is not None:
            dx, dw = self.convolved.backward(cast_like(xp, dy, self.x))
        else:
            taps, n = w.shape[0], x.shape[-2]
            wide = _padded(xp, _inside(xp, x, self.lengths), self.pad, taps - 1 - self.pad)
            rows = xp.reshape(dy, (-1, dy.shape[-1]))
            # forward: y[t] = sum_k x[t + k - pad] @ w[k]
            dw = xp.stack([xp.matmul(xp.reshape(wide[..., k:k + n, :], (-1, x.shape[-1])).T, rows)
                           for k in range(taps)])
            back = _padded(xp, dy, taps - 1 - self.pad, self.pad)
            dx = _inside(xp, _shifted_products(xp, back, xp.matrix_transpose(xp.flip(w, axis=0))),
                         self.lengths)
        found = {"x": cast_like(xp, dx, self.x), "w": cast_like(xp, dw, self.w)}
        if self.b is not None:
            found["b"] = cast_like(xp, db, self.b)
        return gradients(tuple(found))(**found)


@differentiable
def conv1d(x: Array, w: Array, b: Array | None = None, *, causal: bool = False,
           lengths: Any = None) -> tuple[Array, Conv1dSaved]:
    """Convolve a sequence: ``y[t] = sum over k of x[t + k - pad] w[k] + b``.

    ``pad = K - 1`` where `causal`, else ``K // 2``; tokens that do not exist are zeros, so there
    are as many tokens as before. E.g. N=4, K=3: ``0: {-, 0, 1}  1: {0, 1, 2}  2: {1, 2, 3}
    3: {2, 3, -}``. Pointwise convolution, K=1, is `linear`.

    Parameters
    ----------
    x : array, shape (..., N, C), float16 / bfloat16 / float32 / float64
        Tokens.
    w : array, shape (K, C) or (K, C, O)
        One number for each tap and channel (depthwise), or a matrix for each tap. torch's
        ``Conv1d.weight (O, C, K)`` is the latter with its axes the other way round.
    b : array, shape (O,), optional
        Added to every token; O is C for a depthwise kernel.
    causal : bool
        Whether a token sees none that follow it.
    lengths : int or array of int, broadcasting to the leading axes, optional
        Tokens from here on are padding: zeros as taps, and their output is 0.

    Returns
    -------
    array, shape (..., N, O), dtype of `x`

    Raises
    ------
    ShapeError, DtypeError, OptionError
        Arguments that do not fit.

    Notes
    -----
    O(N K C), or O(N K C O) as K matrix products. Kept for backward: the arguments.

    References
    ----------
    .. [1] Chollet, "Xception", 2017, arXiv:1610.02357, section 3, for depthwise then pointwise.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.layers import conv1d
    >>> conv1d(np.arange(4.0)[:, None], np.ones((3, 1)))[:, 0]
    array([1., 3., 6., 5.])
    """
    require_choice("causal", causal, (False, True))
    if x.ndim < 2 or w.ndim not in (2, 3) or w.shape[0] < 1 or w.shape[1] != x.shape[-1]:
        raise ShapeError("x must be (..., N, C) and w (K, C) or (K, C, O) with K at least 1; got "
                         f"{tuple(x.shape)} and {tuple(w.shape)}")
    require_bias(b, w)
    pad = engine.padding(w.shape[0], bool(causal))
    if w.ndim == 2:
        y, convolved = engine.constant(x, w, pad=pad, lengths=lengths)
        saved = Conv1dSaved(x, w, b, pad, convolved.lengths, convolved)
        if b is None:
            return y, saved
        xp, wide, b = widened(y=y, b=b)
        return cast_like(xp, _inside(xp, wide + b, saved.lengths), x), saved
    flat = engine.flat_lengths(lengths, tuple(x.shape[:-2]), x.shape[-2])
    xp, wide, wide_w, wide_b = widened(x=x, w=w, b=b)
    wide = _padded(xp, _inside(xp, wide, flat), pad, w.shape[0] - 1 - pad)
    y = _shifted_products(xp, wide, wide_w)
    y = _inside(xp, y if wide_b is None else y + wide_b, flat)
    return cast_like(xp, y, x), Conv1dSaved(x, w, b, pad, flat, None)


def _inside(xp: Any, x: Array, lengths: tuple[int, ...]) -> Array:
    """Return `x` (..., N, C) with zeros from the lengths, one for each batch item, on."""
    n = x.shape[-2]
    if all(length == n for length in lengths):
        return x
    there = np.arange(n) < np.reshape(lengths, (*x.shape[:-2], 1))
    there = arrays.from_host(xp, there[..., None], arrays.device(x))
    return xp.where(there, x, xp.zeros_like(x))


def _padded(xp: Any, x: Array, before: int, after: int) -> Array:
    """Put rows of zeros before and after `x` (..., N, C)."""
    def zeros(rows: int) -> Array:
        return xp.zeros((*x.shape[:-2], rows, x.shape[-1]), dtype=x.dtype, device=arrays.device(x))

    return xp.concat([zeros(before), x, zeros(after)], axis=-2)


def _shifted_products(xp: Any, x: Array, w: Array) -> Array:
    """y[t] = sum_k x[t + k] @ w[k], for x (..., N + K - 1, C) and w (K, C, O)."""
    taps = w.shape[0]
    n = x.shape[-2] - taps + 1
    y = xp.matmul(x[..., :n, :], w[0, :, :])
    for k in range(1, taps):
        y = arrays.added(y, xp.matmul(x[..., k:k + n, :], w[k, :, :]))
    return y


@dataclasses.dataclass(frozen=True)
class GatedSaved(Saved):
    """Both halves of what `gated` is given, in the computing dtype."""

    x: Array

    def backward(self, dout: Array) -> Array:
        """Gradient of x."""
        xp, dy, x = widened(dout=dout, x=self.x)
        half = x.shape[-1] // 2
        gate = logistic(xp, x[..., half:])
        # forward: y = a sigmoid(g)
        dx = xp.concat([dy * gate, dy * x[..., :half] * gate * (1 - gate)], axis=-1)
        return cast_like(xp, dx, self.x)


def gated(x: Array) -> tuple[Array, GatedSaved]:
    """The first half of each row times the logistic function of the second (GLU)."""
    xp, wide = widened(x=x)
    half = x.shape[-1] // 2
    y = wide[..., :half] * logistic(xp, wide[..., half:])
    return cast_like(xp, y, x), GatedSaved(x)


def init_dynamic_conv_layer(rng: Any, width: int, *, num_heads: int, kernel_size: int = 31,
                            lightweight: bool = False, biases: bool = True, depth: int = 1,
                            dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Fresh parameters for `dynamic_conv_layer`, as NumPy arrays.

    Parameters
    ----------
    rng : int or numpy.random.Generator
        Where the weights are drawn from.
    width : int
        C, a multiple of `num_heads`.
    num_heads, kernel_size : int
        H and K.
    lightweight : bool
        Whether there is one kernel for all tokens.
    biases : bool
        Whether to have ``b_in`` and ``b_out``.
    depth : int
        Blocks in the whole model: ``w_out`` is scaled by ``1 / sqrt(2 depth)``.
    dtype : dtype
        Of every array.

    Returns
    -------
    dict of arrays, by the names that `dynamic_conv_layer` documents

    Examples
    --------
    >>> from pyattn.layers import init_dynamic_conv_layer
    >>> init_dynamic_conv_layer(0, 8, num_heads=2, kernel_size=3)["w_kernel"].shape
    (8, 6)
    """
    rng = np.random.default_rng(rng)
    width = require_integer("width", width, minimum=1)
    num_heads = require_integer("num_heads", num_heads, minimum=1)
    kernel_size = require_integer("kernel_size", kernel_size, minimum=1)
    depth = require_integer("depth", depth, minimum=1)
    if width % num_heads:
        raise OptionError(f"width must be a multiple of num_heads; got {width} and {num_heads}")

    def normal(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * (gain / math.sqrt(rows))).astype(dtype)

    params = {"w_in": normal(width, 2 * width)}
    if lightweight:
        params["kernel_logits"] = rng.standard_normal((num_heads, kernel_size)).astype(dtype)
    else:
        params["w_kernel"] = normal(width, num_heads * kernel_size)
    params["w_out"] = normal(width, width, 1 / math.sqrt(2 * depth))
    if biases:
        params |= {"b_in": np.zeros(2 * width, dtype), "b_out": np.zeros(width, dtype)}
    return params


@dataclasses.dataclass(frozen=True)
class DynamicConvLayerSaved(Saved):
    """What the parts of `dynamic_conv_layer` keep."""

    params: Mapping[str, Array]
    entered: Any
    gate: GatedSaved
    kernels: Any
    """None where there is one kernel for all tokens."""
    convolved: Any
    left: Any

    @property
    def decisions(self) -> dict[str, Array]:
        """The convolution's."""
        return self.convolved.decisions

    @property
    def stats(self) -> dict[str, int]:
        """The convolution's."""
        return self.convolved.stats

    def backward(self, dout: Array) -> Any:
        """Gradients of x, of params (a dict with the same keys), and of the span where given."""
        last = self.left.backward(dout)._asdict()
        grads = self.convolved.backward(last["x"])._asdict()
        dmiddle, dlogits = grads.pop("x"), grads.pop("kernel_logits")
        found = {"w_out": last["w"], "b_out": last.get("b")}
        if self.kernels is None:
            found["kernel_logits"] = dlogits
        else:
            # forward: logits = middle @ w_kernel + b_kernel
            *lead, heads, taps = dlogits.shape
            xp = arrays.namespace(dlogits)
            kernel = self.kernels.backward(xp.reshape(dlogits, (*lead, heads * taps)))._asdict()
            dmiddle = dmiddle + kernel["x"]
            found |= {"w_kernel": kernel["w"], "b_kernel": kernel.get("b")}
        first = self.entered.backward(self.gate.backward(dmiddle))._asdict()
        found |= {"w_in": first["w"], "b_in": first.get("b")}
        return gradients(("x", "params", *grads))(
            first["x"], {name: found[name] for name in self.params}, *grads.values())


@differentiable
def dynamic_conv_layer(x: Array, params: Mapping[str, Array], *, num_heads: int,
                       **options: Any) -> tuple[Array, DynamicConvLayerSaved]:
    """Dynamic or lightweight convolution with its projections, in the place of attention.

    ``m = glu(x @ w_in + b_in)``, where ``glu(a, g) = a sigmoid(g)`` of the halves of each row; then
    ``y = dynamic_convolution(m, m @ w_kernel + b_kernel) @ w_out + b_out``, or with
    ``kernel_logits`` `lightweight_convolution` by these.

    Parameters
    ----------
    x : array, shape (..., N, C), float16 / bfloat16 / float32 / float64
        Tokens.
    params : dict of arrays
        ``w_in (C, 2 F)``, ``w_out (F, O)``, and either ``w_kernel (F, H K)`` or
        ``kernel_logits (H, K)``; if present also ``b_in``, ``b_out``, ``b_kernel``.
        `init_dynamic_conv_layer` makes one.
    num_heads : int
        H, which divides F.
    **options
        Handed to `pyattn.dynamic_convolution` or `pyattn.lightweight_convolution`: ``causal``,
        ``renorm_padding``, ``span``, ``dropout``, ``lengths``, ``decisions``, ...

    Returns
    -------
    array, shape (..., N, O), dtype of `x`
        Gradients: x, params (a dict with the keys of `params`), and span where given.

    Raises
    ------
    ShapeError
        The widths do not fit.
    OptionError
        A parameter is missing or unknown, or an option outside its rule.

    Notes
    -----
    O(N C (C + K)). Kept for backward: the arguments, and what lies between the parts.

    References
    ----------
    .. [1] Wu et al., "Pay Less Attention with Lightweight and Dynamic Convolutions", 2019,
       arXiv:1901.10430, figure 2 and section 4.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.layers import dynamic_conv_layer, init_dynamic_conv_layer
    >>> params = init_dynamic_conv_layer(0, 8, num_heads=2, kernel_size=3)
    >>> y, saved = dynamic_conv_layer.forward(np.ones((2, 5, 8), np.float32), params,
    ...                                       num_heads=2, causal=True)
    >>> saved.backward(y).params.keys() == params.keys()
    True
    """
    num_heads = require_integer("num_heads", num_heads, minimum=1)
    kernel, other = ("w_kernel", "kernel_logits") if "kernel_logits" not in params else (
        "kernel_logits", "w_kernel")
    biases = ("b_in", "b_out", *(["b_kernel"] if kernel == "w_kernel" else []))
    if other in params:
        raise OptionError("params must have w_kernel or kernel_logits, not both")
    require_params(params, ("w_in", kernel, "w_out"), biases)
    if params["w_in"].ndim != 2 or params["w_in"].shape[1] % 2:
        raise ShapeError("w_in must be (C, 2 F), a gate for each number; got "
                         f"{tuple(params['w_in'].shape)}")
    wide, entered = linear.forward(x, params["w_in"], params.get("b_in"))
    middle, gate = gated(wide)
    if kernel == "kernel_logits":
        if params[kernel].shape[0] != num_heads:
            raise ShapeError(f"kernel_logits must be (num_heads, K) = ({num_heads}, K); got "
                             f"{tuple(params[kernel].shape)}")
        kernels = None
        out, convolved = lightweight_convolution.forward(middle, params[kernel], **options)
    else:
        logits, kernels = _kernel_logits(middle, params, num_heads)
        out, convolved = dynamic_convolution.forward(middle, logits, **options)
    y, left = linear.forward(out, params["w_out"], params.get("b_out"))
    return y, DynamicConvLayerSaved(dict(params), entered, gate, kernels, convolved, left)


def _kernel_logits(x: Array, params: Mapping[str, Array], num_heads: int) -> tuple[Array, Any]:
    """Return ``x @ w_kernel + b_kernel`` as (..., N, H, K)."""
    w = params["w_kernel"]
    if w.ndim != 2 or w.shape[1] % num_heads or not w.shape[1]:
        raise ShapeError(f"w_kernel must have a multiple of num_heads = {num_heads} columns; got "
                         f"{tuple(w.shape)}")
    logits, saved = linear.forward(x, w, params.get("b_kernel"))
    xp = arrays.namespace(logits)
    shape = (*logits.shape[:-1], num_heads, w.shape[1] // num_heads)
    return xp.reshape(logits, shape), saved


SPAN_WEIGHTS = ("w_q", "w_depthwise", "w_pointwise", "w_kernel", "w_v")
SPAN_BIASES = ("b_q", "b_pointwise", "b_kernel", "b_v")


def init_span_convolution(rng: Any, width: int, *, num_heads: int, head_width: int,
                          kernel_size: int = 9, biases: bool = True,
                          dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Fresh parameters for `span_convolution`, as NumPy arrays.

    Parameters
    ----------
    rng : int or numpy.random.Generator
        Where the weights are drawn from.
    width : int
        C.
    num_heads, head_width, kernel_size : int
        H, D and K.
    biases : bool
        Whether to have biases.
    dtype : dtype
        Of every array.

    Returns
    -------
    dict of arrays, by the names that `span_convolution` documents

    Examples
    --------
    >>> from pyattn.layers import init_span_convolution
    >>> init_span_convolution(0, 8, num_heads=2, head_width=3, kernel_size=5)["w_kernel"].shape
    (6, 10)
    """
    rng = np.random.default_rng(rng)
    inner = num_heads * head_width

    def normal(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) / math.sqrt(rows)).astype(dtype)

    params = {"w_q": normal(width, inner), "w_depthwise": normal(kernel_size, width),
              "w_pointwise": normal(width, inner), "w_kernel": normal(inner, num_heads
                                                                      * kernel_size),
              "w_v": normal(width, inner)}
    if biases:
        params |= {"b_q": np.zeros(inner, dtype), "b_pointwise": np.zeros(inner, dtype),
                   "b_kernel": np.zeros(num_heads * kernel_size, dtype),
                   "b_v": np.zeros(inner, dtype)}
    return params


@dataclasses.dataclass(frozen=True)
class SpanConvolutionSaved(Saved):
    """What the parts of `span_convolution` keep."""

    params: Mapping[str, Array]
    q: Array
    local: Array
    queries: Any
    depthwise: Any
    pointwise: Any
    kernels: Any
    values: Any
    convolved: Any

    @property
    def decisions(self) -> dict[str, Array]:
        """The convolution's."""
        return self.convolved.decisions

    @property
    def stats(self) -> dict[str, int]:
        """The convolution's."""
        return self.convolved.stats

    def backward(self, dout: Array) -> Any:
        """Gradients of x, of params (a dict with the same keys), and of the span where given."""
        grads = self.convolved.backward(dout)._asdict()
        dv, dlogits = grads.pop("x"), grads.pop("kernel_logits")
        xp, q, local = widened(q=self.q, local=self.local)
        *lead, heads, taps = dlogits.shape
        kernel = self.kernels.backward(xp.reshape(dlogits, (*lead, heads * taps)))._asdict()
        # forward: logits = (q local) @ w_kernel + b_kernel
        _, dproduct = widened(dproduct=kernel["x"])
        parts = {"w_q": self.queries.backward(cast_like(xp, dproduct * local, self.q)),
                 "w_pointwise": self.pointwise.backward(cast_like(xp, dproduct * q, self.local)),
                 "w_v": self.values.backward(dv)}
        depthwise = self.depthwise.backward(parts["w_pointwise"].x)
        found = {"w_depthwise": depthwise.w, "w_kernel": kernel["w"],
                 "b_kernel": kernel.get("b")}
        for name, grad in parts.items():
            found |= {name: grad.w, "b" + name[1:]: getattr(grad, "b", None)}
        dx = parts["w_q"].x + parts["w_v"].x + depthwise.x
        return gradients(("x", "params", *grads))(
            dx, {name: found[name] for name in self.params}, *grads.values())


@differentiable
def span_convolution(x: Array, params: Mapping[str, Array], *, num_heads: int,
                     causal: bool = False, lengths: Any = None,
                     **options: Any) -> tuple[Array, SpanConvolutionSaved]:
    """Dynamic convolution whose kernels come from a token and its neighbours.

    A depthwise and a pointwise convolution make ``local`` from the K tokens around each; then

        logits = ((x @ w_q + b_q) * local) @ w_kernel + b_kernel
        y = dynamic_convolution(x @ w_v + b_v, logits)

    so that equal tokens in other surroundings have other kernels.

    Parameters
    ----------
    x : array, shape (..., N, C), float16 / bfloat16 / float32 / float64
        Tokens.
    params : dict of arrays
        ``w_q (C, H D)``, ``w_depthwise (J, C)``, ``w_pointwise (C, H D)``, ``w_kernel (H D, H K)``,
        ``w_v (C, H D)``; if present also ``b_q``, ``b_pointwise``, ``b_kernel``, ``b_v``.
        `init_span_convolution` makes one.
    num_heads : int
        H.
    causal : bool
        Whether both convolutions look back alone.
    lengths : int or array of int, broadcasting to the leading axes, optional
        Tokens from here on are padding.
    **options
        Handed to `pyattn.dynamic_convolution`.

    Returns
    -------
    array, shape (..., N, H D), dtype of `x`
        Gradients: x, params (a dict with the keys of `params`), and span where given.

    Raises
    ------
    ShapeError
        The widths do not fit.
    OptionError
        A parameter is missing or unknown, or an option outside its rule.

    Notes
    -----
    O(N (C H D + K (C + H^2 D))). Kept for backward: the arguments, and what lies between the parts.

    References
    ----------
    .. [1] Jiang et al., "ConvBERT: Improving BERT with Span-based Dynamic Convolution", 2020,
       arXiv:2008.02496, section 3.2. There J = K.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.layers import init_span_convolution, span_convolution
    >>> params = init_span_convolution(0, 8, num_heads=2, head_width=3)
    >>> span_convolution(np.ones((2, 5, 8), np.float32), params, num_heads=2).shape
    (2, 5, 6)
    """
    num_heads = require_integer("num_heads", num_heads, minimum=1)
    require_params(params, SPAN_WEIGHTS, SPAN_BIASES)
    if lengths is not None:
        xp = arrays.namespace(x)
        flat = engine.flat_lengths(lengths, tuple(x.shape[:-2]), x.shape[-2])
        # what padding holds must not meet a matrix, whose gradient is a sum over tokens
        x = _inside(xp, x, flat)
    q, queries = linear.forward(x, params["w_q"], params.get("b_q"))
    near, depthwise = conv1d.forward(x, params["w_depthwise"], causal=causal, lengths=lengths)
    local, pointwise = linear.forward(near, params["w_pointwise"], params.get("b_pointwise"))
    if q.shape != local.shape:
        raise ShapeError("w_q and w_pointwise must have as many columns; got "
                         f"{tuple(params['w_q'].shape)} and {tuple(params['w_pointwise'].shape)}")
    xp, wide_q, wide_local = widened(q=q, local=local)
    product = cast_like(xp, wide_q * wide_local, x)
    logits, kernels = _kernel_logits(product, params, num_heads)
    v, values = linear.forward(x, params["w_v"], params.get("b_v"))
    y, convolved = dynamic_convolution.forward(v, logits, causal=causal, lengths=lengths,
                                               **options)
    return y, SpanConvolutionSaved(dict(params), q, local, queries, depthwise, pointwise, kernels,
                                   values, convolved)
