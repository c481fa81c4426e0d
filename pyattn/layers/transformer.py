"""The Transformer block: attention and a feed-forward network, each with residual and norm."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..arrays import Array
from ..checks import OptionError, require_choice, require_integer, require_rng
from ..differentiable import Saved, differentiable, gradients
from .feed_forward import feed_forward
from .multi_head import multi_head
from .norm import layer_norm

PROJECTIONS = ("w_qkv", "w_o")
"""Parameters in whose place a block may have those of a layer, as ``attention``."""

WEIGHTS = ("norm1_gamma", "norm1_beta", *PROJECTIONS, "norm2_gamma", "norm2_beta",
           "w1", "b1", "w2", "b2")
"""The parameters that every other block has."""

BIASES = ("b_qkv", "b_o")
"""The parameters that a block with projections may have as well."""


def init_transformer_block(rng: Any, width: int, *, num_heads: int = 1,
                           num_kv_heads: int | None = None, hidden: int | None = None,
                           biases: bool = True, depth: int = 1,
                           attention: Mapping[str, Array] | None = None,
                           dtype: Any = np.float32) -> dict[str, Any]:
    """Fresh parameters for `transformer_block`, as NumPy arrays.

    Weights are normal with deviation ``1 / sqrt(rows)``; ``w_o`` and ``w2``, which write to the
    residual stream, are divided by ``sqrt(2 depth)`` so that the stream of a deep model starts with
    the variance of a shallow one. Gammas are 1; betas and biases 0.

    Parameters
    ----------
    rng : int or numpy.random.Generator
        Where the weights are drawn from.
    width : int
        C, a multiple of `num_heads`.
    num_heads, num_kv_heads : int
        H and G; they matter to the width of ``w_qkv`` only where G < H.
    hidden : int, optional
        Width of the feed-forward network's hidden layer. Default 4 C.
    biases : bool
        Whether to have ``b_qkv`` and ``b_o``.
    depth : int
        Blocks in the whole model.
    attention : dict of arrays, optional
        Parameters of an attention layer, such as `init_nsa_layer` makes; the block has them in
        place of projections.
    dtype : dtype
        Of every array.

    Returns
    -------
    dict of arrays, by the names that `transformer_block` documents

    Examples
    --------
    >>> from pyattn.layers import init_transformer_block
    >>> init_transformer_block(0, 8, num_heads=2)["w_qkv"].shape
    (8, 24)
    """
    rng = require_rng(rng)
    width = require_integer("width", width, minimum=1)
    num_heads = require_integer("num_heads", num_heads, minimum=1)
    groups = num_heads if num_kv_heads is None else require_integer(
        "num_kv_heads", num_kv_heads, minimum=1)
    depth = require_integer("depth", depth, minimum=1)
    hidden = 4 * width if hidden is None else require_integer("hidden", hidden, minimum=1)
    if width % num_heads:
        raise OptionError(f"width must be a multiple of num_heads; got {width} and {num_heads}")
    if num_heads % groups:
        raise OptionError(f"num_heads must be a multiple of num_kv_heads; got {num_heads} "
                          f"and {groups}")
    packed = width + 2 * groups * (width // num_heads)
    residual = 1 / math.sqrt(2 * depth)

    def normal(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * (gain / math.sqrt(rows))).astype(dtype)

    params: dict[str, Any] = {
        "norm1_gamma": np.ones(width, dtype), "norm1_beta": np.zeros(width, dtype)}
    if attention is None:
        params |= {"w_qkv": normal(width, packed), "w_o": normal(width, width, residual)}
    else:
        params["attention"] = dict(attention)
    params |= {
        "norm2_gamma": np.ones(width, dtype), "norm2_beta": np.zeros(width, dtype),
        "w1": normal(width, hidden), "b1": np.zeros(hidden, dtype),
        "w2": normal(hidden, width, residual), "b2": np.zeros(width, dtype),
    }
    if biases and attention is None:
        params |= {"b_qkv": np.zeros(packed, dtype), "b_o": np.zeros(width, dtype)}
    return params


@dataclasses.dataclass(frozen=True)
class TransformerBlockSaved(Saved):
    """What the four layers of a block keep."""

    norm1: Any
    attended: Any
    norm2: Any
    fed: Any
    norm: str

    @property
    def decisions(self) -> dict[str, Array]:
        """The attention's."""
        return self.attended.decisions

    def backward(self, dout: Array) -> Any:
        """Gradients of x, of params (a dict with the same keys), of attention's array options."""
        if self.norm == "pre":
            # forward: middle = x + multi_head(norm1(x)); y = middle + feed_forward(norm2(middle))
            fed = self.fed.backward(dout)
            norm2 = self.norm2.backward(fed.x)
            dmiddle = dout + norm2.x
            attended = self.attended.backward(dmiddle)
            norm1 = self.norm1.backward(attended.x)
            dx = dmiddle + norm1.x
        else:
            # forward: middle = norm1(x + multi_head(x)); y = norm2(middle + feed_forward(middle))
            norm2 = self.norm2.backward(dout)
            fed = self.fed.backward(norm2.x)
            norm1 = self.norm1.backward(norm2.x + fed.x)
            attended = self.attended.backward(norm1.x)
            dx = norm1.x + attended.x
        grads = {"norm1_gamma": norm1.gamma, "norm1_beta": norm1.beta,
                 "norm2_gamma": norm2.gamma, "norm2_beta": norm2.beta,
                 "w1": fed.w1, "b1": fed.b1, "w2": fed.w2, "b2": fed.b2}
        options = attended._asdict()
        del options["x"]
        grads |= {name: options.pop(name) for name in (*WEIGHTS, *BIASES) if name in options}
        if "params" in options:
            grads["attention"] = options.pop("params")
        return gradients(("x", "params", *options))(dx, grads, *options.values())


@differentiable
def transformer_block(x: Array, params: Mapping[str, Any], *, num_heads: int,
                      num_kv_heads: int | None = None, attention: Any = None, norm: str = "pre",
                      activation: str = "gelu", eps: float = 1e-5,
                      **options: Any) -> tuple[Array, TransformerBlockSaved]:
    """Attention among the tokens, then a feed-forward network on each, both added to the stream.

    ``norm="pre"``:  ``m = x + multi_head(norm1(x))``,  ``y = m + feed_forward(norm2(m))``.
    ``norm="post"``: ``m = norm1(x + multi_head(x))``,  ``y = norm2(m + feed_forward(m))``.

    Parameters
    ----------
    x : array, shape (..., N, C), float16 / bfloat16 / float32 / float64
        Tokens.
    params : dict of arrays
        ``norm1_gamma, norm1_beta, norm2_gamma, norm2_beta (C,)``, ``w_qkv (C, (H + 2 G) D)``,
        ``w_o (H D, C)``, ``w1 (C, F)``, ``b1 (F,)``, ``w2 (F, C)``, ``b2 (C,)``; if present also
        ``b_qkv ((H + 2 G) D,)`` and ``b_o (C,)``. In place of ``w_qkv``, ``w_o`` and their biases
        there may be ``attention``, a dict: the parameters of a layer. `init_transformer_block`
        makes one.
    num_heads, num_kv_heads, attention, **options
        As for `multi_head`: any attention function with its options, rotary positions too. Where
        ``params["attention"]`` is given, a layer instead, such as `nsa_layer`, which is called as
        ``attention(x, params["attention"], num_heads=..., num_kv_heads=..., **options)``.
    norm : {"pre", "post"}
        Normalise what each layer reads, or the sum that it has written.
    activation : {"gelu", "relu", "gelu_tanh", "silu"}
        Of the feed-forward network.
    eps : float
        Of both norms.

    Returns
    -------
    array, shape (..., N, C), dtype of `x`
        Gradients: x, params (a dict with the keys of `params`), then the attention's array options.
        ``saved.decisions`` are the attention's.

    Raises
    ------
    ShapeError
        The widths do not fit.
    OptionError
        A parameter is missing or unknown, or an option outside its rule.

    Notes
    -----
    Kept for backward: what the four layers keep.

    References
    ----------
    .. [1] Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762, section 3.1 (post).
    .. [2] Xiong et al., "On Layer Normalization in the Transformer Architecture", 2020,
       arXiv:2002.04745, table 1 (pre).

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.layers import init_transformer_block, transformer_block
    >>> params = init_transformer_block(0, 8, num_heads=2)
    >>> y, saved = transformer_block.forward(np.ones((2, 5, 8), np.float32), params, num_heads=2,
    ...                                      causal=True)
    >>> grads = saved.backward(y)
    >>> grads.x.shape, grads.params.keys() == params.keys()
    ((2, 5, 8), True)
    """
    require_choice("norm", norm, ("pre", "post"))
    layer = "attention" in params
    needed = WEIGHTS if not layer else (
        "attention", *(name for name in WEIGHTS if name not in PROJECTIONS))
    missing = [name for name in needed if name not in params]
    unknown = [name for name in params if name not in needed and (layer or name not in BIASES)]
    if missing or unknown:
        more = "" if layer else f" and may have {', '.join(BIASES)}"
        raise OptionError(f"params must have {', '.join(needed)}{more}; missing {missing}, unknown "
                          f"{unknown}")
    if layer and not hasattr(attention, "forward"):
        raise OptionError("attention must be a layer with .forward(x, params, num_heads=..., ...), "
                          "such as pyattn.layers.nsa_layer, where params have attention; got "
                          f"{attention!r}")
    scale1, scale2 = ((params[f"{name}_gamma"], params[f"{name}_beta"])
                      for name in ("norm1", "norm2"))
    feed = [params[name] for name in ("w1", "b1", "w2", "b2")]
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, **options}

    def attend(x: Array) -> tuple[Array, Any]:
        if layer:
            return attention.forward(x, params["attention"], **heads)
        biases = {name: params[name] for name in BIASES if name in params}
        return multi_head.forward(x, params["w_qkv"], params["w_o"], **biases, **heads,
                                  attention=attention)

    if norm == "pre":
        normal, norm1 = layer_norm.forward(x, *scale1, eps=eps)
        found, attended = attend(normal)
        middle = x + found
        normal, norm2 = layer_norm.forward(middle, *scale2, eps=eps)
        found, fed = feed_forward.forward(normal, *feed, activation=activation)
        y = middle + found
    else:
        found, attended = attend(x)
        middle, norm1 = layer_norm.forward(x + found, *scale1, eps=eps)
        found, fed = feed_forward.forward(middle, *feed, activation=activation)
        y, norm2 = layer_norm.forward(middle + found, *scale2, eps=eps)
    return y, TransformerBlockSaved(norm1, attended, norm2, fed, norm)


@dataclasses.dataclass(frozen=True)
class TransformerSaved(Saved):
    """What the blocks of a stack keep."""

    blocks: tuple[TransformerBlockSaved, ...]

    @property
    def decisions(self) -> dict[str, Array]:
        """Those of block i's attention, their names preceded by ``i.``."""
        return {f"{i}.{name}": value for i, block in enumerate(self.blocks)
                for name, value in block.decisions.items()}

    def backward(self, dout: Array) -> Any:
        """Gradients of x, of blocks (a list of dicts), and of the attention's array options."""
        dx, params = dout, []
        options: dict[str, Array] = {}
        for block in reversed(self.blocks):
            grads = block.backward(dx)._asdict()
            dx = grads.pop("x")
            params.append(grads.pop("params"))
            # every block was given the same options
            options = {name: options[name] + grad if name in options else grad
                       for name, grad in grads.items()}
        return gradients(("x", "blocks", *options))(dx, params[::-1], *options.values())


@differentiable
def transformer(x: Array, blocks: Sequence[Mapping[str, Array]], *, num_heads: int,
                rng: Any = None, decisions: Mapping[str, Array] | None = None,
                **options: Any) -> tuple[Array, TransformerSaved]:
    """Transformer blocks one after the other.

    Parameters
    ----------
    x : array, shape (..., N, C), float16 / bfloat16 / float32 / float64
        Tokens.
    blocks : sequence of dicts of arrays
        The parameters of each block, for `transformer_block`.
    num_heads, **options
        As for `transformer_block`, the same in every block.
    rng : int or numpy.random.Generator, optional
        One stream for all blocks, which draw from it in turn.
    decisions : dict, optional
        As ``saved.decisions`` has them: names preceded by the block's number and a dot.

    Returns
    -------
    array, shape (..., N, C), dtype of `x`
        Gradients: x, blocks (a list of dicts), then the attention's array options, summed over the
        blocks.

    Raises
    ------
    ShapeError, OptionError
        As for `transformer_block`.

    Notes
    -----
    Kept for backward: what the blocks keep.

    References
    ----------
    .. [1] Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762, section 3.1.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.layers import init_transformer_block, transformer
    >>> blocks = [init_transformer_block(seed, 8, num_heads=2, depth=3) for seed in range(3)]
    >>> y, saved = transformer.forward(np.ones((2, 5, 8), np.float32), blocks, num_heads=2)
    >>> len(saved.backward(y).blocks)
    3
    """
    if rng is not None:
        options["rng"] = require_rng(rng)
    kept = []
    for i, params in enumerate(blocks):
        if decisions is not None:
            options["decisions"] = {name.partition(".")[2]: value for name, value in
                                    decisions.items() if name.partition(".")[0] == str(i)}
        x, saved = transformer_block.forward(x, params, num_heads=num_heads, **options)
        kept.append(saved)
    return x, TransformerSaved(tuple(kept))
