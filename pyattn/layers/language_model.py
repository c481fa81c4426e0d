"""A decoder-only Transformer: from tokens to the logits of the tokens that follow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..arrays import Array
from ..checks import OptionError, require_rng
from ..differentiable import Saved, differentiable, gradients
from ..features.positions import add_positions, embedding
from .linear import linear
from .norm import layer_norm
from .transformer import init_transformer_block, transformer

WEIGHTS = ("embedding", "blocks", "norm_gamma", "norm_beta", "w_out", "b_out")
"""The parameters that every language model has; ``positions`` is one that it may have."""


def init_language_model(rng: Any, *, vocabulary: int, width: int, depth: int, num_heads: int = 1,
                        positions: int = 0,
                        attention: Callable[[np.random.Generator], Mapping[str, Array]] | None
                        = None, dtype: Any = np.float32) -> dict[str, Any]:
    """Fresh parameters for `language_model`, as NumPy arrays.

    Parameters
    ----------
    rng : int or numpy.random.Generator
        Where the weights are drawn from.
    vocabulary, width, depth, num_heads : int
        V, the width of the tokens, how many blocks, and heads of each.
    positions : int
        Rows of a table of learned positions; 0 for none (with rotary positions, say).
    attention : function of a numpy.random.Generator, optional
        Gives a block the parameters of its attention layer, as
        ``lambda rng: init_nsa_layer(rng, width, num_heads=num_heads)`` does.
    dtype : dtype
        Of every array.

    Returns
    -------
    dict, by the names that `language_model` documents

    Examples
    --------
    >>> from pyattn.layers import init_language_model
    >>> sorted(init_language_model(0, vocabulary=10, width=8, depth=1))
    ['b_out', 'blocks', 'embedding', 'norm_beta', 'norm_gamma', 'w_out']
    """
    rng = require_rng(rng)
    # so that the untrained model holds all tokens for about equally likely
    small = 0.1 / math.sqrt(width)
    params = {
        "embedding": rng.standard_normal((vocabulary, width)).astype(dtype),
        "blocks": [init_transformer_block(rng, width, num_heads=num_heads, depth=depth, dtype=dtype,
                                          attention=None if attention is None else attention(rng))
                   for _ in range(depth)],
        "norm_gamma": np.ones(width, dtype), "norm_beta": np.zeros(width, dtype),
        "w_out": (rng.standard_normal((width, vocabulary)) * small).astype(dtype),
        "b_out": np.zeros(vocabulary, dtype),
    }
    if positions:
        params["positions"] = (0.1 * rng.standard_normal((positions, width))).astype(dtype)
    return params


@dataclasses.dataclass(frozen=True)
class LanguageModelSaved(Saved):
    """What the layers of a language model keep."""

    embedded: Any
    placed: Any
    """Of the learned positions, else None."""
    blocks: Any
    normed: Any
    projected: Any

    @property
    def decisions(self) -> dict[str, Array]:
        """Those of block i's attention, their names preceded by ``i.``."""
        return self.blocks.decisions

    def backward(self, dout: Array) -> Any:
        """Gradients of params, nested as they were given, and the attention's array options."""
        dx, dw, db = self.projected.backward(dout)
        dx, dgamma, dbeta = self.normed.backward(dx)
        dx, dblocks, *more = grads = self.blocks.backward(dx)
        params = {"blocks": dblocks, "norm_gamma": dgamma, "norm_beta": dbeta, "w_out": dw,
                  "b_out": db}
        if self.placed is not None:
            dx, params["positions"] = self.placed.backward(dx)
        params["embedding"] = self.embedded.backward(dx).table
        return gradients(("params", *grads._fields[2:]))(params, *more)


@differentiable
def language_model(tokens: Array, params: Mapping[str, Any], *, num_heads: int, eps: float = 1e-5,
                   causal: bool = True, **options: Any) -> tuple[Array, LanguageModelSaved]:
    """Predict each next token from those before it.

    ``x = embedding[tokens] (+ positions)``; the blocks; layer norm; ``logits = x @ w_out + b_out``.

    Parameters
    ----------
    tokens : integer array, shape (..., N)
        Numbers of tokens, 0 to V - 1.
    params : dict
        ``embedding (V, C)``, ``blocks``: a list of dicts for `transformer_block`, ``norm_gamma``
        and ``norm_beta (C,)``, ``w_out (C, V)``, ``b_out (V,)``; for learned positions also
        ``positions (at least N, C)``. `init_language_model` makes one.
    num_heads, eps, **options
        As for `transformer`: ``attention``, ``rotary_base``, ``norm``, ``activation``, ...
    causal : bool
        Handed to the attention.

    Returns
    -------
    array, shape (..., N, V), dtype of the embedding
        Logits of the token at n + 1, given those up to n. Gradients: params, nested as they are
        given, then the attention's array options.

    Raises
    ------
    OptionError
        A parameter is missing or unknown, or a token is not in the vocabulary.
    ShapeError
        The widths do not fit, or the table of positions is too short.

    Notes
    -----
    Kept for backward: what the layers keep.

    References
    ----------
    .. [1] Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.3.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.layers import cross_entropy, init_language_model, language_model
    >>> params = init_language_model(0, vocabulary=10, width=8, depth=2, num_heads=2)
    >>> text = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    >>> logits, saved = language_model.forward(text[:, :-1], params, num_heads=2, rotary_base=1e4)
    >>> loss, saved_loss = cross_entropy.forward(logits, text[:, 1:])
    >>> grads = saved.backward(saved_loss.backward().logits)
    >>> grads.params.keys() == params.keys()
    True
    """
    missing = [name for name in WEIGHTS if name not in params]
    unknown = [name for name in params if name not in (*WEIGHTS, "positions")]
    if missing or unknown:
        raise OptionError(f"params must have {', '.join(WEIGHTS)} and may have positions; "
                          f"missing {missing}, unknown {unknown}")
    x, embedded = embedding.forward(tokens, params["embedding"])
    placed = None
    if "positions" in params:
        x, placed = add_positions.forward(x, params["positions"])
    x, blocks = transformer.forward(x, params["blocks"], num_heads=num_heads, eps=eps,
                                    causal=causal, **options)
    x, normed = layer_norm.forward(x, params["norm_gamma"], params["norm_beta"], eps=eps)
    logits, projected = linear.forward(x, params["w_out"], params["b_out"])
    return logits, LanguageModelSaved(embedded, placed, blocks, normed, projected)
