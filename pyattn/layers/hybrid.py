"""Attention with another way to mix tokens: below it, or beside it in the same layer.

Letters: N tokens of width C, H attention heads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..checks import OptionError, require_choice, require_integer
from ..differentiable import Saved, differentiable, gradients
from ..features.activation import ACTIVATIONS
from ..features.precision import cast_like, widened
from .convolution import conv1d, init_span_convolution, span_convolution
from .linear import linear
from .multi_head import multi_head
from .norm import layer_norm
from .recurrent import gru, init_gru
from .swin import require_params
from .transformer import init_transformer_block, transformer_block

KINDS = ("convolution", "gru", "parallel")

CONVOLUTION = ("w_depthwise", "b_depthwise", "w_pointwise", "b_pointwise")
"""The parameters of a convolution below attention."""

RECURRENT = ("w_x", "w_h", "b_x", "b_h")
"""Those of a recurrent network."""

NORM = ("norm_gamma", "norm_beta")

ATTENTION = ("w_qkv", "w_o")


@dataclasses.dataclass(frozen=True)
class MixedHeadsSaved(Saved):
    """What the two kinds of heads and the convolution's output projection keep."""

    params: Mapping[str, Any]
    attended: Any
    convolved: Any
    mixed: Any

    @property
    def decisions(self) -> dict[str, Array]:
        """The attention's."""
        return self.attended.decisions

    def backward(self, dout: Array) -> Any:
        """Gradients of x, of params (a dict of dicts with the same keys), and array options."""
        attended = self.attended.backward(dout)._asdict()
        mixed = self.mixed.backward(dout)
        convolved = self.convolved.backward(mixed.x)
        names = self.params["attention"]
        own = {"attention": {name: attended.pop(name) for name in names},
               "convolution": {**convolved.params, "w_o": mixed.w}}
        dx = attended.pop("x") + convolved.x
        return gradients(("x", "params", *attended))(dx, own, *attended.values())


@differentiable
def mixed_heads(x: Array, params: Mapping[str, Any], *, num_heads: int,
                num_kv_heads: int | None = None, conv_heads: int | None = None,
                causal: bool = False, lengths: Any = None,
                **options: Any) -> tuple[Array, MixedHeadsSaved]:
    """Some heads attend, others convolve with kernels from a token's span; all are mixed.

    ``y = multi_head(x) + span_convolution(x) @ w_o``, where `multi_head` has an output projection
    of its own: together they are one matrix over all heads side by side.

    Parameters
    ----------
    x : array, shape (..., N, C), float16 / bfloat16 / float32 / float64
        Tokens.
    params : dict of two dicts of arrays
        ``attention``: as for `multi_head`, ``w_qkv, w_o`` and perhaps ``b_qkv, b_o``.
        ``convolution``: as for `span_convolution`, and ``w_o``, from its heads to the output.
        `init_hybrid_block` makes them.
    num_heads, num_kv_heads : int
        H and G of the attention.
    conv_heads : int, optional
        Of the convolution. Default `num_heads`.
    causal : bool
        Whether a token sees none that follow it.
    lengths : int or array of int, broadcasting to the leading axes, optional
        Tokens from here on are padding, for both kinds.
    **options
        Handed to `multi_head`: ``attention``, ``rotary_base``, and the attention's own.

    Returns
    -------
    array, shape (..., N, O), dtype of `x`
        Gradients: x, params, then the attention's array options.

    Raises
    ------
    ShapeError, OptionError
        As for the two layers.

    Notes
    -----
    Kept for backward: what the two layers keep.

    References
    ----------
    .. [1] Jiang et al., "ConvBERT: Improving BERT with Span-based Dynamic Convolution", 2020,
       arXiv:2008.02496, section 3.3. There both kinds of heads share their queries.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.layers import init_hybrid_block, mixed_heads
    >>> params = init_hybrid_block(0, 8, kind="parallel", num_heads=2)["attention"]
    >>> mixed_heads(np.ones((2, 5, 8), np.float32), params, num_heads=2, causal=True).shape
    (2, 5, 8)
    """
    require_params(params, ("attention", "convolution"))
    attention, convolution = params["attention"], dict(params["convolution"])
    require_params(attention, ATTENTION, ("b_qkv", "b_o"))
    if "w_o" not in convolution:
        raise OptionError("params['convolution'] must have w_o, from its heads to the output")
    w_o = convolution.pop("w_o")
    weights = [attention.get(name) for name in ("w_qkv", "w_o", "b_qkv", "b_o")]
    y, attended = multi_head.forward(x, *weights, num_heads=num_heads, num_kv_heads=num_kv_heads,
                                     causal=causal, **_padding(lengths, options))
    found, convolved = span_convolution.forward(
        x, convolution, num_heads=num_heads if conv_heads is None else conv_heads, causal=causal,
        lengths=lengths)
    more, mixed = linear.forward(found, w_o)
    return y + more, MixedHeadsSaved(dict(params), attended, convolved, mixed)


def _padding(lengths: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return the attention's options, with `lengths` by its names."""
    for name in ("q_lengths", "kv_lengths"):
        if options.get(name) is not None:
            raise OptionError(f"{name} must be None here: lengths is about all that mixes tokens")
    if lengths is None:
        return options
    return {**options, "q_lengths": lengths, "kv_lengths": lengths}


def init_hybrid_block(rng: Any, width: int, *, kind: str = "convolution", num_heads: int = 1,
                      kernel_size: int = 9, depth: int = 1, dtype: Any = np.float32,
                      **options: Any) -> dict[str, Any]:
    """Fresh parameters for `hybrid_block`, as NumPy arrays.

    Parameters
    ----------
    rng : int or numpy.random.Generator
        Where the weights are drawn from.
    width : int
        C, a multiple of `num_heads`.
    kind : {"convolution", "gru", "parallel"}
        As `hybrid_block` will be called with.
    num_heads : int
        H; for ``"parallel"`` of either kind, each half as wide.
    kernel_size : int
        K, of convolutions.
    depth : int
        Blocks in the whole model.
    dtype : dtype
        Of every array.
    **options
        Handed to `init_transformer_block`: ``hidden``, ``biases``, ``num_kv_heads``.

    Returns
    -------
    dict, by the names that `hybrid_block` documents

    Examples
    --------
    >>> from pyattn.layers import init_hybrid_block
    >>> sorted(init_hybrid_block(0, 8, kind="gru", num_heads=2)["local"])
    ['b_h', 'b_x', 'norm_beta', 'norm_gamma', 'w_h', 'w_x']
    """
    require_choice("kind", kind, KINDS)
    rng = np.random.default_rng(rng)
    block = {"num_heads": num_heads, "depth": depth, "dtype": dtype, **options}
    if kind != "parallel":
        params = init_transformer_block(rng, width, **block)
        local = {"norm_gamma": np.ones(width, dtype), "norm_beta": np.zeros(width, dtype)}
        if kind == "gru":
            local |= init_gru(rng, width, width, dtype=dtype)
        else:
            scale = 1 / math.sqrt(2 * depth * width)
            local |= {"w_depthwise": (rng.standard_normal((kernel_size, width))
                                      / math.sqrt(kernel_size)).astype(dtype),
                      "b_depthwise": np.zeros(width, dtype),
                      "w_pointwise": (rng.standard_normal((width, width)) * scale).astype(dtype),
                      "b_pointwise": np.zeros(width, dtype)}
        return params | {"local": local}
    num_heads = require_integer("num_heads", num_heads, minimum=1)
    if width % (2 * num_heads):
        raise OptionError("width must be a multiple of 2 num_heads, for two kinds of heads; got "
                          f"{width} and {num_heads}")
    half = width // 2
    groups = options.pop("num_kv_heads", None) or num_heads
    d = half // num_heads

    def normal(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * (gain / math.sqrt(rows))).astype(dtype)

    # both write to the residual stream, as one matrix of `width` rows would
    gain = 1 / math.sqrt(4 * depth)
    attention = {"w_qkv": normal(width, half + 2 * groups * d), "w_o": normal(half, width, gain)}
    convolution = init_span_convolution(rng, width, num_heads=num_heads, head_width=d,
                                        kernel_size=kernel_size, dtype=dtype)
    mixed = {"attention": attention,
             "convolution": convolution | {"w_o": normal(half, width, gain)}}
    block.pop("num_kv_heads", None)
    return init_transformer_block(rng, width, **block, attention=mixed)


@dataclasses.dataclass(frozen=True)
class LocalSaved(Saved):
    """What the parts below the attention keep."""

    kind: str
    norm: Any
    parts: tuple[Any, ...]
    hidden: Array | None
    """What the activation of the convolution is applied to, the computing dtype."""
    activation: str

    def backward(self, dout: Array) -> tuple[Array, dict[str, Array]]:
        """Gradients of what comes in, and of the parameters."""
        # forward: out = x + mix(norm(x))
        if self.kind == "gru":
            grads = self.parts[0].backward(dout)._asdict()
        else:
            depthwise, pointwise = self.parts
            last = pointwise.backward(dout)
            xp, dactive = widened(dactive=last.x)
            _, slope = ACTIVATIONS[self.activation](xp, self.hidden, True)
            first = depthwise.backward(cast_like(xp, dactive * slope, dout))
            grads = {"x": first.x, "w_depthwise": first.w, "b_depthwise": first.b,
                     "w_pointwise": last.w, "b_pointwise": last.b}
        norm = self.norm.backward(grads.pop("x"))
        return dout + norm.x, {"norm_gamma": norm.gamma, "norm_beta": norm.beta, **grads}


@dataclasses.dataclass(frozen=True)
class HybridBlockSaved(Saved):
    """What the parts of a block keep."""

    local: LocalSaved | None
    block: Any

    @property
    def decisions(self) -> dict[str, Array]:
        """The attention's."""
        return self.block.decisions

    def backward(self, dout: Array) -> Any:
        """Gradients of x, of params (a dict with the same keys), and of array options."""
        grads = self.block.backward(dout)
        if self.local is None:
            return grads
        dx, local = self.local.backward(grads.x)
        return grads._replace(x=dx, params={**grads.params, "local": local})


@differentiable
def hybrid_block(x: Array, params: Mapping[str, Any], *, num_heads: int, kind: str = "convolution",
                 causal: bool = False, lengths: Any = None, activation: str = "gelu",
                 eps: float = 1e-5, **options: Any) -> tuple[Array, HybridBlockSaved]:
    """A Transformer block with a convolution or a recurrent network below, or convolving heads.

    - ``"convolution"``: ``m = x + pointwise(activation(depthwise(norm(x))))``, then
      `transformer_block` of m. What is below sees K tokens, what is above sees all.
    - ``"gru"``: ``m = x + gru(norm(x))``, then `transformer_block` of m. What is below sees the
      tokens before, in their order.
    - ``"parallel"``: a `transformer_block` whose attention is `mixed_heads`.

    Parameters
    ----------
    x : array, shape (..., N, C), float16 / bfloat16 / float32 / float64
        Tokens.
    params : dict
        As for `transformer_block`, and a dict ``local``: ``norm_gamma, norm_beta (C,)``, then
        ``w_depthwise (K, C), b_depthwise (C,), w_pointwise (C, C), b_pointwise (C,)``, or
        ``w_x, w_h (C, 3 C), b_x, b_h (3 C,)`` as `gru` has them. For ``"parallel"``, in its place,
        ``attention`` as `mixed_heads` has it. `init_hybrid_block` makes them.
    num_heads : int
        H.
    kind : {"convolution", "gru", "parallel"}
    causal : bool
        Whether a token sees none that follow it. A recurrent network never does.
    lengths : int or array of int, broadcasting to the leading axes, optional
        Tokens from here on are padding, for all that mixes tokens.
    activation : {"gelu", "relu", "gelu_tanh", "silu"}
        Between the two convolutions, and of the feed-forward network.
    eps : float
        Of the norms.
    **options
        Handed to `transformer_block`: ``num_kv_heads``, ``attention``, ``norm``, ``rotary_base``,
        ...

    Returns
    -------
    array, shape (..., N, C), dtype of `x`
        Gradients: x, params (a dict with the keys of `params`), then the attention's array options.

    Raises
    ------
    ShapeError, OptionError
        As for the parts.

    Notes
    -----
    Kept for backward: what the parts keep.

    References
    ----------
    .. [1] Gulati et al., "Conformer", 2020, arXiv:2005.08100, section 2.2, for a convolution with
       attention in one block (there above it).
    .. [2] Jiang et al., "ConvBERT", 2020, arXiv:2008.02496, section 3.3, for ``"parallel"``.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.layers import hybrid_block, init_hybrid_block
    >>> params = init_hybrid_block(0, 8, kind="gru", num_heads=2)
    >>> y, saved = hybrid_block.forward(np.ones((2, 5, 8), np.float32), params, num_heads=2,
    ...                                 kind="gru")
    >>> saved.backward(y).params.keys() == params.keys()
    True
    """
    require_choice("kind", kind, KINDS)
    require_choice("activation", activation, tuple(ACTIVATIONS))
    rest: dict[str, Any] = {"num_heads": num_heads, "causal": causal, "activation": activation,
                            "eps": eps}
    if kind == "parallel":
        if options.get("attention") is not None:
            raise OptionError("attention must be None where kind is 'parallel', whose heads are "
                              "those of mixed_heads")
        y, block = transformer_block.forward(
            x, params, **{**options, **rest, "attention": mixed_heads}, lengths=lengths)
        return y, HybridBlockSaved(None, block)
    if "local" not in params:
        raise OptionError(f"params must have local, for {kind!r}; got {', '.join(params)}")
    middle, local = _local(x, params["local"], kind, causal, lengths, activation, eps)
    upper = {name: value for name, value in params.items() if name != "local"}
    y, block = transformer_block.forward(middle, upper, **_padding(lengths, options), **rest)
    return y, HybridBlockSaved(local, block)


def _local(x: Array, params: Mapping[str, Array], kind: str, causal: bool, lengths: Any,
           activation: str, eps: float) -> tuple[Array, LocalSaved]:
    """Return x with what a convolution or a recurrent network finds added."""
    names = RECURRENT if kind == "gru" else CONVOLUTION
    require_params(params, (*NORM, *names))
    normal, norm = layer_norm.forward(x, params["norm_gamma"], params["norm_beta"], eps=eps)
    weights = [params[name] for name in names]
    if kind == "gru":
        found, saved = gru.forward(normal, *weights, lengths=lengths)
        return x + found, LocalSaved(kind, norm, (saved,), None, activation)
    near, depthwise = conv1d.forward(normal, *weights[:2], causal=causal, lengths=lengths)
    xp, hidden = widened(near=near)
    active, _ = ACTIVATIONS[activation](xp, hidden, False)
    found, pointwise = linear.forward(arrays.cast(xp, active, x.dtype), *weights[2:])
    return x + found, LocalSaved(kind, norm, (depthwise, pointwise), hidden, activation)
