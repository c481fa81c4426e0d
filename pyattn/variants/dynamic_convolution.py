"""Convolutions in place of attention: kernels that each token makes, and kernels for all tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..checks import ShapeError, require_choice
from ..differentiable import Saved, differentiable, gradients
from ..engines import convolution as engine
from ..engines.convolution import ConstantSaved, ConvolutionSaved
from ..features.precision import cast_like, widened


@differentiable
def dynamic_convolution(x: Array, kernel_logits: Array, *, causal: bool = False,
                        renorm_padding: bool = False, span: Array | None = None,
                        ramp: float = 32.0, dropout: float = 0.0, rng: Any = None,
                        lengths: Any = None, decisions: dict[str, Any] | None = None,
                        ) -> tuple[Array, ConvolutionSaved]:
    """Convolution of each token with a kernel of its own, a softmax over a few taps.

    Head h has the channels ``h C / H .. (h + 1) C / H - 1``, and there

        out[t] = sum over k of softmax(kernel_logits[t, h])[k] * x[t + k - pad]

    with ``pad = K - 1`` where `causal`, else ``K // 2``; tokens that do not exist are zeros. E.g.
    N=4, K=3: ``0: {-, 0, 1}  1: {0, 1, 2}  2: {1, 2, 3}  3: {2, 3, -}``, and causal
    ``0: {-, -, 0}  1: {-, 0, 1}  2: {0, 1, 2}  3: {1, 2, 3}``.

    Parameters
    ----------
    x : array, shape (..., N, C), float16, bfloat16, float32 or float64
        Tokens.
    kernel_logits : array, shape (..., N, H, K), any of those dtypes
        H divides C. Usually ``x @ w`` with ``w (C, H K)``, seen as (..., N, H, K). Leading axes
        broadcast with those of `x`. -inf leaves a tap out.
    causal : bool
        Whether a token sees none that follow it.
    renorm_padding : bool
        Whether the softmax is over the taps that have a token alone; else the others take their
        share of it, so that rows near the ends sum to less than 1.
    span : array that broadcasts to (..., N, H), optional
        Reach in tokens, of heads (H,) or of each token: the exponential of a tap at distance d is
        multiplied by ``clip((ramp + span - d) / ramp, 0, 1)``.
    ramp : float, tokens
        How far a tap beyond `span` fades.
    dropout : float in [0, 1), default 0
        Probability that a tap's weight becomes 0 (DropConnect); the others grow by ``1 / (1 -
        dropout)``. The draw depends on the seed, the batch item, the head, the token and the tap.
    rng : int or numpy.random.Generator, optional
        Where the seed of dropout comes from.
    lengths : int or array of int, broadcasting to the leading axes, optional
        Tokens from here on are padding: zeros as taps, and their output is 0.
    decisions : dict, optional
        What an earlier call drew: ``dropout_seed``.

    Returns
    -------
    array, shape (..., N, C), dtype of `x`
        0 where no tap has a weight. Gradients: x, kernel_logits, and span where given.

    Raises
    ------
    ShapeError, DtypeError, OptionError
        Arguments that do not fit; the message names the argument, the rule and what was given.

    Notes
    -----
    O(N K C) time. Kept for backward: the arguments; the softmax is made again. A tap whose weight
    is 0 does not look at its token, whatever that holds. Sums in float32 (float64 for float64).
    Differs from the paper: `span` is not in it; for an even K, fairseq's centred kernel has its
    extra tap ahead, here it is behind; and where K exceeds N, fairseq's two implementations leave
    the taps that never have a token out of the softmax before it, or after it: here they stay in,
    unless `renorm_padding` says otherwise.

    References
    ----------
    .. [1] Wu et al., "Pay Less Attention with Lightweight and Dynamic Convolutions", 2019,
       arXiv:1901.10430, section 4.
    .. [2] Sukhbaatar et al., "Adaptive Attention Span in Transformers", 2019, arXiv:1905.07799,
       equation 1, for `span`.

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> x = np.arange(4.0)[:, None]
    >>> pyattn.dynamic_convolution(x, np.zeros((4, 1, 2)), causal=True)[:, 0]
    array([0. , 0.5, 1.5, 2.5])
    >>> out, saved = pyattn.dynamic_convolution.forward(x, np.zeros((4, 1, 3)))
    >>> saved.backward(out)._fields, saved.stats["pairs"]
    (('x', 'kernel_logits'), 10)
    """
    return engine.forward(x, kernel_logits, causal=causal, renorm=renorm_padding, span=span,
                          ramp=ramp, dropout=dropout, rng=rng, lengths=lengths,
                          decisions=decisions)


@dataclasses.dataclass(frozen=True)
class LightweightSaved(Saved):
    """The arguments of `lightweight_convolution`, and its kernels after the softmax."""

    convolved: ConstantSaved
    kernel_logits: Array
    weights: Array
    """(H, K), acc, before dropout."""
    factors: Array | None
    """(H, K), acc: what dropout multiplies by."""
    dropout_seed: int | None

    @property
    def decisions(self) -> dict[str, Array]:
        """``dropout_seed``, where there was dropout."""
        if self.dropout_seed is None:
            return {}
        return {"dropout_seed": np.asarray(self.dropout_seed, dtype=np.uint64)}

    @property
    def stats(self) -> dict[str, int]:
        """The engine's."""
        return self.convolved.stats

    def backward(self, dout: Array) -> Any:
        """Gradients of x and kernel_logits."""
        grads, (heads, taps) = self.convolved.backward(dout), self.weights.shape
        xp, dw, p = widened(dw=grads.w, p=self.weights)
        # forward: the kernel of a head is that of each of its channels
        dp = xp.sum(xp.reshape(xp.matrix_transpose(dw), (heads, -1, taps)), axis=1)
        if self.factors is not None:
            dp = dp * self.factors
        # forward: p = softmax(kernel_logits)
        dlogits = p * (dp - xp.sum(p * dp, axis=-1, keepdims=True))
        return gradients(("x", "kernel_logits"))(
            grads.x, cast_like(xp, dlogits, self.kernel_logits))


@differentiable
def lightweight_convolution(x: Array, kernel_logits: Array, *, causal: bool = False,
                            dropout: float = 0.0, rng: Any = None, lengths: Any = None,
                            decisions: dict[str, Any] | None = None,
                            ) -> tuple[Array, LightweightSaved]:
    """Convolution of all tokens with one kernel for each head, a softmax over a few taps.

    Head h has the channels ``h C / H .. (h + 1) C / H - 1``, and there

        out[t] = sum over k of softmax(kernel_logits[h])[k] * x[t + k - pad]

    with ``pad = K - 1`` where `causal`, else ``K // 2``; tokens that do not exist are zeros. E.g.
    N=4, K=3: ``0: {-, 0, 1}  1: {0, 1, 2}  2: {1, 2, 3}  3: {2, 3, -}``.

    Parameters
    ----------
    x : array, shape (..., N, C), float16, bfloat16, float32 or float64
        Tokens.
    kernel_logits : array, shape (H, K), any of those dtypes
        H divides C.
    causal : bool
        Whether a token sees none that follow it.
    dropout : float in [0, 1), default 0
        Probability that a weight of a kernel becomes 0, for all tokens at once; the others grow by
        ``1 / (1 - dropout)``.
    rng : int or numpy.random.Generator, optional
        Where the seed of dropout comes from.
    lengths : int or array of int, broadcasting to the leading axes, optional
        Tokens from here on are padding: zeros as taps, and their output is 0.
    decisions : dict, optional
        What an earlier call drew: ``dropout_seed``.

    Returns
    -------
    array, shape (..., N, C), dtype of `x`
        Gradients: x and kernel_logits.

    Raises
    ------
    ShapeError, DtypeError, OptionError
        Arguments that do not fit; the message names the argument, the rule and what was given.

    Notes
    -----
    O(N K C) time. Kept for backward: the arguments, and the kernels by channel. Sums in float32
    (float64 for float64). For an even K, fairseq's centred kernel has its extra tap ahead, here it
    is behind.

    References
    ----------
    .. [1] Wu et al., "Pay Less Attention with Lightweight and Dynamic Convolutions", 2019,
       arXiv:1901.10430, section 3.

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> x = np.arange(4.0)[:, None]
    >>> pyattn.lightweight_convolution(x, np.log([[1.0, 3.0]]), causal=True)[:, 0]
    array([0.  , 0.75, 1.75, 2.75])
    """
    from pyattn.kernels.array_api.philox import kept

    xp = arrays.namespace(x, kernel_logits)
    arrays.require_float("x", x)
    arrays.require_float("kernel_logits", kernel_logits)
    require_choice("causal", causal, (False, True))
    if x.ndim < 2 or kernel_logits.ndim != 2 or 0 in kernel_logits.shape \
            or x.shape[-1] % kernel_logits.shape[0]:
        raise ShapeError("x must be (..., N, C) and kernel_logits (H, K), H a divisor of C and K "
                         f"at least 1; got {tuple(x.shape)} and {tuple(kernel_logits.shape)}")
    heads, taps = kernel_logits.shape
    rate = engine.require_rate(dropout)
    seed = engine.draw_seed(rate, rng, decisions)
    acc = arrays.accumulator(xp, x)
    logits = arrays.cast(xp, kernel_logits, acc)
    weights = xp.exp(logits - xp.max(logits, axis=-1, keepdims=True))
    weights = weights / xp.sum(weights, axis=-1, keepdims=True)
    used, factors = weights, None
    if seed is not None:
        stays = kept(rate, seed, np.zeros(1, int), np.arange(heads)[:, None], np.zeros(1, int),
                     np.arange(taps))
        factors = arrays.cast(xp, arrays.from_host(xp, stays, arrays.device(x)), acc) / (1 - rate)
        used = weights * factors
    each = x.shape[-1] // heads
    by_channel = xp.reshape(xp.broadcast_to(used[:, None, :], (heads, each, taps)),
                            (heads * each, taps))
    out, convolved = engine.constant(x, xp.matrix_transpose(by_channel),
                                     pad=engine.padding(taps, causal), lengths=lengths)
    return out, LightweightSaved(convolved, kernel_logits, weights, factors, seed)
