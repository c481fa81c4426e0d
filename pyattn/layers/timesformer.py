"""TimeSformer: attention over the frames of a video, then over the places of each frame."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..checks import ShapeError, require_integer, require_rng
from ..differentiable import Saved, differentiable, gradients
from ..variants.temporal import temporal_attention
from .feed_forward import feed_forward
from .linear import linear
from .multi_head import multi_head
from .norm import layer_norm
from .swin import require_params
from .transformer import BIASES, WEIGHTS, init_transformer_block

TEMPORAL = ("temporal_norm_gamma", "temporal_norm_beta", "temporal_w_qkv", "temporal_w_o",
            "w_temporal", "b_temporal")
"""What a block has beside `WEIGHTS`."""

TEMPORAL_BIASES = ("temporal_b_qkv", "temporal_b_o")
"""What it may have beside `BIASES`."""


def init_timesformer_block(rng: Any, width: int, *, num_heads: int, hidden: int | None = None,
                           depth: int = 1, first: bool = True,
                           dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Fresh parameters for `timesformer_block`, as NumPy arrays.

    Parameters
    ----------
    rng : int or numpy.random.Generator
        Where the weights are drawn from.
    width : int
        C, a multiple of `num_heads`.
    num_heads, hidden, depth : int
        As for `init_transformer_block`.
    first : bool
        Whether this is the first block of its model; in the others ``w_temporal`` is 0, so that
        training begins with attention inside frames alone.
    dtype : dtype
        Of every array.

    Returns
    -------
    dict of arrays, by the names that `timesformer_block` documents

    Examples
    --------
    >>> from pyattn.layers import init_timesformer_block
    >>> init_timesformer_block(0, 8, num_heads=2)["temporal_w_qkv"].shape
    (8, 24)
    """
    rng = require_rng(rng)
    options = {"num_heads": num_heads, "hidden": hidden, "depth": depth, "dtype": dtype}
    params = init_transformer_block(rng, width, **options)
    temporal = init_transformer_block(rng, width, **options)
    params |= {f"temporal_norm_{name}": temporal[f"norm1_{name}"] for name in ("gamma", "beta")}
    params |= {f"temporal_{name}": temporal[name] for name in ("w_qkv", "w_o", *BIASES)}
    mixing = rng.standard_normal((width, width)) / np.sqrt(width)
    return {**params, "w_temporal": (mixing if first else 0 * mixing).astype(dtype),
            "b_temporal": np.zeros(width, dtype)}


@dataclasses.dataclass(frozen=True)
class TimesformerBlockSaved(Saved):
    """What the layers of a block keep, in their order."""

    frames: int
    temporal_norm: Any
    temporal: Any
    mixed: Any
    norm1: Any
    spatial: Any
    norm2: Any
    fed: Any

    @property
    def decisions(self) -> dict[str, Array]:
        """Those of the two attentions, named ``temporal.…`` and ``spatial.…``."""
        return {f"{part}.{name}": value
                for part, saved in (("temporal", self.temporal), ("spatial", self.spatial))
                for name, value in saved.decisions.items()}

    def backward(self, dout: Array) -> Any:
        """Gradients of x and of params, a dict with the same keys."""
        xp = arrays.namespace(dout)
        # forward: y = m + feed_forward(norm2(m))
        fed = self.fed.backward(dout)
        norm2 = self.norm2.backward(fed.x)
        dm = dout + norm2.x
        # m = z + gathered(spatial(norm1(spread(z)))): gathering takes the mean of the class tokens
        dfound = _spread(xp, dm, self.frames, 1 / self.frames)
        spatial = self.spatial.backward(dfound)
        norm1 = self.norm1.backward(spatial.x)
        dz = dm + _gathered(xp, norm1.x, 1.0)
        # z = x, and linear(temporal(norm(x))) for all but the class token
        mixed = self.mixed.backward(dz[..., 1:, :])
        temporal = self.temporal.backward(mixed.x)
        normed = self.temporal_norm.backward(temporal.x)
        dx = xp.concat([dz[..., :1, :], dz[..., 1:, :] + normed.x], axis=-2)
        params = {"norm1_gamma": norm1.gamma, "norm1_beta": norm1.beta,
                  "norm2_gamma": norm2.gamma, "norm2_beta": norm2.beta,
                  "w1": fed.w1, "b1": fed.b1, "w2": fed.w2, "b2": fed.b2,
                  "temporal_norm_gamma": normed.gamma, "temporal_norm_beta": normed.beta,
                  "w_temporal": mixed.w, "b_temporal": mixed.b}
        for prefix, found in (("", spatial), ("temporal_", temporal)):
            params |= {prefix + name: grad for name, grad in found._asdict().items()
                       if name in (*WEIGHTS, *BIASES)}
        return gradients(("x", "params"))(dx, params)


def _spread(xp: Any, x: Array, frames: int, share: float) -> Array:
    """(..., 1 + T P, C) as (..., T, 1 + P, C), the class token times `share` in every frame."""
    lead, width = tuple(x.shape[:-2]), x.shape[-1]
    places = (x.shape[-2] - 1) // frames
    cells = arrays.reshape(xp, x[..., 1:, :], (*lead, frames, places, width))
    token = x[..., None, :1, :]
    token = xp.broadcast_to(token if share == 1 else token * share, (*lead, frames, 1, width))
    return xp.concat([token, cells], axis=-2)


def _gathered(xp: Any, x: Array, share: float) -> Array:
    """Undo `_spread`: the class token is `share` of the sum of its copies."""
    *lead, frames, tokens, width = x.shape
    token = xp.sum(x[..., :1, :], axis=-3, dtype=x.dtype)
    cells = arrays.reshape(xp, x[..., 1:, :], (*lead, frames * (tokens - 1), width))
    return xp.concat([token if share == 1 else token * share, cells], axis=-2)


@differentiable
def timesformer_block(x: Array, params: Mapping[str, Array], *, frames: int, num_heads: int,
                      window: Any = None, activation: str = "gelu", eps: float = 1e-5,
                      dropout: float = 0.0, rng: Any = None,
                      decisions: Mapping[str, Array] | None = None
                      ) -> tuple[Array, TimesformerBlockSaved]:
    """Divided space-time attention: over frames, then inside each frame, then a feed-forward net.

    With x a class token and the cells of all frames::

        z = x + linear(temporal(norm(x)))        cells only; the class token stays as it is
        m = z + spatial(norm1(z))                in each frame: the class token and its cells
        y = m + feed_forward(norm2(m))

    Every frame has its own copy of the class token, and the mean of what the copies find is added
    to it.

    Parameters
    ----------
    x : array, shape (..., 1 + T P, C), float16 / bfloat16 / float32 / float64
        A class token, then the cells, frame by frame: place p of frame t is token
        ``1 + t * P + p``.
    params : dict of arrays
        As for `transformer_block` (the spatial attention and the network), and for the attention
        over frames ``temporal_norm_gamma``, ``temporal_norm_beta``, ``temporal_w_qkv``,
        ``temporal_w_o``, if present ``temporal_b_qkv`` and ``temporal_b_o``, and ``w_temporal
        (C, C)``, ``b_temporal (C,)`` for the map behind it. `init_timesformer_block` makes one.
    frames : int
        T.
    num_heads : int
        H, of both attentions.
    window : int or (left, right), frames, optional
        How far attention over frames reaches; all frames by default.
    activation : {"gelu", "relu", "gelu_tanh", "silu"}
        Of the feed-forward network.
    eps : float
        Of the three norms.
    dropout, rng, decisions
        Of both attentions, as for `pyattn.attention`; decisions are named ``temporal.…`` and
        ``spatial.…``.

    Returns
    -------
    array, shape (..., 1 + T P, C), dtype of `x`
        Gradients: x, and params, a dict with the keys of `params`.

    Raises
    ------
    ShapeError
        The tokens behind the first are not a multiple of `frames`, or widths do not fit.
    OptionError
        A parameter is missing or unknown, or an option outside its rule.

    Notes
    -----
    Attention costs O(T P (T + P) C) where all tokens together would cost O(T^2 P^2 C). Kept for
    backward: what the layers keep. Differs from the paper: `window`, which it does not have; the
    authors' code lays tokens out place by place.

    References
    ----------
    .. [1] Bertasius et al., "Is Space-Time Attention All You Need for Video Understanding?", 2021,
       arXiv:2102.05095, section 3 (divided space-time attention).

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.layers import init_timesformer_block, timesformer_block
    >>> params = init_timesformer_block(0, 8, num_heads=2)
    >>> x = np.ones((2, 1 + 3 * 4, 8), np.float32)
    >>> y, saved = timesformer_block.forward(x, params, frames=3, num_heads=2)
    >>> saved.backward(y).x.shape
    (2, 13, 8)
    """
    require_params(params, (*WEIGHTS, *TEMPORAL), (*BIASES, *TEMPORAL_BIASES))
    frames = require_integer("frames", frames, minimum=1)
    if x.ndim < 2 or x.shape[-2] < 1 or (x.shape[-2] - 1) % frames:
        raise ShapeError(f"x must be (..., 1 + frames * places, C) for {frames} frames; got "
                         f"{tuple(x.shape)}")
    rng = None if rng is None else require_rng(rng)
    xp = arrays.namespace(x)

    def attend(name: str, tokens: Array, prefix: str, **options: Any) -> tuple[Array, Any]:
        own = None if decisions is None else {
            key.partition(".")[2]: value for key, value in decisions.items()
            if key.partition(".")[0] == name}
        biases = {bias: params[prefix + bias] for bias in BIASES if prefix + bias in params}
        return multi_head.forward(tokens, params[f"{prefix}w_qkv"], params[f"{prefix}w_o"],
                                  **biases, num_heads=num_heads, dropout=dropout, rng=rng,
                                  decisions=own, **options)

    cells = x[..., 1:, :]
    normal, temporal_norm = layer_norm.forward(
        cells, params["temporal_norm_gamma"], params["temporal_norm_beta"], eps=eps)
    found, temporal = attend("temporal", normal, "temporal_", attention=temporal_attention,
                             frames=frames, window=window)
    found, mixed = linear.forward(found, params["w_temporal"], params["b_temporal"])
    z = xp.concat([x[..., :1, :], cells + found], axis=-2)

    normal, norm1 = layer_norm.forward(_spread(xp, z, frames, 1.0), params["norm1_gamma"],
                                       params["norm1_beta"], eps=eps)
    found, spatial = attend("spatial", normal, "")
    m = z + _gathered(xp, found, 1 / frames)

    normal, norm2 = layer_norm.forward(m, params["norm2_gamma"], params["norm2_beta"], eps=eps)
    found, fed = feed_forward.forward(normal, *(params[name] for name in ("w1", "b1", "w2", "b2")),
                                      activation=activation)
    return m + found, TimesformerBlockSaved(frames, temporal_norm, temporal, mixed, norm1, spatial,
                                            norm2, fed)
