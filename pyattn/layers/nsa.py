"""Native sparse attention on plain weight arrays: projections, gates and output of `nsa_attention`.

Letters: N tokens x of width C, H query heads and G key/value heads of width D.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..checks import (
    OptionError,
    ShapeError,
    require_choice,
    require_flag,
    require_integer,
    require_real,
    require_rng,
)
from ..differentiable import Saved, differentiable, gradients
from ..features.positions import rotary
from ..features.precision import cast_like, require_same_shape, widened
from ..variants.nsa import nsa_attention
from .linear import affine, affine_gradients, require_affine
from .multi_head import _heads, _merge, _split, _swap
from .swin import require_params

WEIGHTS = ("w_q", "w_kv", "w_o", "w_gate", "b_gate")
"""The arrays that every layer has."""

BRANCHES = {"w_kv": ("k", "v"), "w_kv_compressed": ("k_compressed", "v_compressed"),
            "w_kv_window": ("k_window", "v_window")}
"""Projections of keys and values, and the arguments they give; the last two may be missing."""

COMPRESSION = {side: tuple(f"{side}_{name}" for name in ("pe", "w1", "b1", "w2", "b2", "kernel"))
               for side in ("k", "v")}
"""What keys and values are compressed with."""


def init_nsa_layer(rng: Any, width: int, *, num_heads: int, num_kv_heads: int | None = None,
                   head_width: int | None = None, separate: bool = True, block_size: int = 32,
                   compression: str = "mean", hidden: int | None = None, depth: int = 1,
                   dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Fresh parameters for `nsa_layer`, as NumPy arrays.

    Parameters
    ----------
    rng : int or numpy.random.Generator
        Where the weights are drawn from.
    width : int
        C.
    num_heads, num_kv_heads, head_width : int
        H, G (default H) and D (default C / H, which must then be a whole number).
    separate : bool
        Whether each branch has keys and values of its own, as in the paper.
    block_size, compression, hidden
        As `nsa_layer` will be called with; `hidden` is the width inside ``"mlp"``, default 2 D.
    depth : int
        Blocks in the whole model: `w_o` is scaled by ``1 / sqrt(2 depth)``.
    dtype : dtype
        Of every array.

    Returns
    -------
    dict of arrays
        ``w_q (C, H D)``, ``w_kv (C, 2 G D)``, ``w_o (H D, C)``, ``w_gate (C, 3 H)``,
        ``b_gate (3 H,)``; if `separate` also ``w_kv_compressed`` and ``w_kv_window``; and for
        keys (``k_``) and values (``v_``) what `compress` takes: ``pe (block_size, D)`` at 0 and,
        for ``"mlp"``, ``w1, b1, w2, b2``, for ``"conv"`` a ``kernel (block_size, D)`` that starts
        as the mean. Gates start at one half.

    Examples
    --------
    >>> from pyattn.layers import init_nsa_layer
    >>> params = init_nsa_layer(0, 16, num_heads=4, num_kv_heads=1, separate=False)
    >>> {name: x.shape for name, x in params.items()}
    {'w_q': (16, 16), 'w_kv': (16, 8), 'w_o': (16, 16), 'w_gate': (16, 12), 'b_gate': (12,)}
    """
    rng = require_rng(rng)
    separate = require_flag("separate", separate)
    width = require_integer("width", width, minimum=1)
    num_heads, groups = _heads(num_heads, num_kv_heads)
    depth = require_integer("depth", depth, minimum=1)
    block_size = require_integer("block_size", block_size, minimum=1)
    compression = require_choice("compression", compression, ("mean", "mlp", "conv"))
    if head_width is None and width % num_heads:
        raise OptionError(f"width must be a multiple of num_heads; got {width} and {num_heads}")
    d = width // num_heads if head_width is None else require_integer("head_width", head_width,
                                                                      minimum=1)

    def normal(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * (gain / math.sqrt(rows))).astype(dtype)

    params = {"w_q": normal(width, num_heads * d), "w_kv": normal(width, 2 * groups * d)}
    if separate:
        params |= {name: normal(width, 2 * groups * d)
                   for name in ("w_kv_compressed", "w_kv_window")}
    params |= {"w_o": normal(num_heads * d, width, 1 / math.sqrt(2 * depth)),
               "w_gate": np.zeros((width, 3 * num_heads), dtype),
               "b_gate": np.zeros(3 * num_heads, dtype)}
    inside = 2 * d if hidden is None else require_integer("hidden", hidden, minimum=1)
    for side in ("k", "v") if compression != "mean" else ():
        params[f"{side}_pe"] = np.zeros((block_size, d), dtype)
        if compression == "mlp":
            params |= {f"{side}_w1": normal(block_size * d, inside),
                       f"{side}_b1": np.zeros(inside, dtype), f"{side}_w2": normal(inside, d),
                       f"{side}_b2": np.zeros(d, dtype)}
        else:
            params[f"{side}_kernel"] = np.full((block_size, d), 1 / block_size, dtype)
    return params


@dataclasses.dataclass(frozen=True)
class NsaLayerSaved(Saved):
    """The arguments of `nsa_layer`, the gates, and what lies between the projections."""

    x: Array
    params: Mapping[str, Array]
    gates: Array
    """(..., H, N, 3)."""
    turned: dict[str, Any]
    """The rotations of queries and keys by argument; empty without rotary positions."""
    attended: Any
    merged: Array
    """What the heads found, (..., N, H D)."""
    num_heads: int

    @property
    def decisions(self) -> dict[str, Array]:
        """The attention's."""
        return self.attended.decisions

    @property
    def stats(self) -> dict[str, int]:
        """The attention's."""
        return self.attended.stats

    def backward(self, dout: Array) -> Any:
        """Gradients of x and of params, a dict with the same keys."""
        p = self.params
        require_same_shape("dout", dout, (*self.merged.shape[:-1], p["w_o"].shape[1]))
        xp, dy, x, merged, gates, *weights = widened(
            dout=dout, x=self.x, merged=self.merged, gates=self.gates, **p)
        wide = dict(zip(p, weights, strict=True))
        found: dict[str, Array] = {}
        # forward: y = merged @ w_o
        dmerged, found["w_o"], _ = affine_gradients(xp, merged, wide["w_o"], dy)
        dheads = cast_like(xp, _split(xp, dmerged, self.num_heads), self.merged)
        grads = self.attended.backward(dheads)._asdict()
        for name, turn in self.turned.items():
            grads[name] = turn.backward(grads[name]).x
        # forward: gates = sigmoid(x @ w_gate + b_gate)
        dlogits = xp.astype(grads["gates"], gates.dtype) * gates * (1 - gates)
        dx, found["w_gate"], found["b_gate"] = affine_gradients(
            xp, x, wide["w_gate"], _merge(xp, _swap(xp, dlogits)))
        for name, columns in (("w_q", ("q",)), *BRANCHES.items()):
            if name in p:
                dcolumns = [_merge(xp, _swap(xp, xp.astype(grads[column], x.dtype)))
                            for column in columns]
                whole = xp.concat(dcolumns, axis=-1)
                more, found[name], _ = affine_gradients(xp, x, wide[name], whole)
                dx = dx + more
        for side in ("k", "v"):
            for name, grad in (grads.get(f"{side}_weights") or {}).items():
                found[f"{side}_{name}"] = grad
        return gradients(("x", "params"))(
            cast_like(xp, dx, self.x),
            {name: cast_like(xp, found[name], w) for name, w in p.items()})


@differentiable
def nsa_layer(x: Array, params: Mapping[str, Array], *, num_heads: int,
              num_kv_heads: int | None = None, rotary_base: float | None = None,
              positions: Any = None, interleaved: bool = False,
              **options: Any) -> tuple[Array, NsaLayerSaved]:
    """Native sparse attention of a sequence to itself, with its projections and its gates.

    Queries are ``x @ w_q``; keys, then values, are the halves of ``x @ w_kv``, and of a product of
    their own for the compressed and the window branch where there are such weights. The gates are
    ``sigmoid(x @ w_gate + b_gate)``, for each head three side by side: compressed, selected,
    window. What the heads find is laid side by side and mixed: ``y = heads @ w_o``.

    Parameters
    ----------
    x : array, shape (..., N, C), float16 / bfloat16 / float32 / float64
        Tokens.
    params : dict of arrays
        ``w_q (C, H D)``, ``w_kv (C, 2 G D)``, ``w_o (H D, O)``, ``w_gate (C, 3 H)``,
        ``b_gate (3 H,)``; if present also ``w_kv_compressed`` and ``w_kv_window``, and
        ``k_pe, k_w1, ..., v_kernel`` for `pyattn.features.compress`. `init_nsa_layer` makes one.
    num_heads, num_kv_heads : int
        H and G, H a multiple of G; G defaults to H.
    rotary_base, positions, interleaved
        With a `rotary_base` (usually 10000.0), queries and the keys of all branches are turned by
        `rotary` first, before they are compressed.
    **options
        Handed to `pyattn.nsa_attention`: ``window``, ``block_size``, ``compression``,
        ``decisions``, ...

    Returns
    -------
    array, shape (..., N, O), dtype of `x`
        Gradients: x, params (a dict with the keys of `params`). ``saved.decisions`` are the
        attention's.

    Raises
    ------
    ShapeError
        The widths do not fit.
    OptionError
        A parameter is missing or unknown, or an option outside its rule.

    Notes
    -----
    Projections compute in float32 (float64 if any argument is); q, k and v have the dtype of `x`.
    Kept for backward: the arguments, the gates, what the attention keeps, and its output.

    References
    ----------
    .. [1] Yuan et al., "Native Sparse Attention", 2025, arXiv:2502.11089, section 3.2. There the
       gates come from an MLP and a sigmoid; here from one affine map.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.layers import init_nsa_layer, nsa_layer
    >>> params = init_nsa_layer(0, 16, num_heads=4, num_kv_heads=1, compression="mlp")
    >>> y, saved = nsa_layer.forward(np.ones((2, 100, 16), np.float32), params, num_heads=4,
    ...                              num_kv_heads=1, compression="mlp", window=15)
    >>> grads = saved.backward(y)
    >>> grads.x.shape, grads.params.keys() == params.keys()
    ((2, 100, 16), True)
    """
    num_heads, groups = _heads(num_heads, num_kv_heads)
    require_params(params, WEIGHTS, ("w_kv_compressed", "w_kv_window",
                                     *COMPRESSION["k"], *COMPRESSION["v"]))
    d = params["w_q"].shape[-1] // num_heads
    arrays.require_float("x", x)
    require_affine(x, params["w_q"], None, ("x", "w_q", ""))
    require_affine(x, params["w_gate"], params["b_gate"], ("x", "w_gate", "b_gate"))
    for name, columns in (("w_q", num_heads * d), ("w_gate", 3 * num_heads),
                          *((name, 2 * groups * d) for name in BRANCHES)):
        if name in params:
            require_affine(x, params[name], None, ("x", name, ""))
            if params[name].shape[1] != columns:
                raise ShapeError(f"{name} must have {columns} columns; got shape "
                                 f"{tuple(params[name].shape)}")
    if params["w_o"].ndim != 2 or params["w_o"].shape[0] != num_heads * d:
        raise ShapeError(f"w_o must have num_heads * value width = {num_heads * d} rows; got shape "
                         f"{tuple(params['w_o'].shape)}")
    interleaved = require_flag("interleaved", interleaved)
    if rotary_base is not None and require_real("rotary_base", rotary_base) <= 0:
        raise OptionError(f"rotary_base must be positive; got {rotary_base}")
    if rotary_base is None and (positions is not None or interleaved):
        raise OptionError("positions and interleaved speak of rotary positions; give rotary_base "
                          "with them")
    xp, wide, *weights = widened(x=x, **params)
    held = dict(zip(params, weights, strict=True))
    given = {"q": _split(xp, cast_like(xp, affine(xp, wide, held["w_q"], None), x), num_heads)}
    for name, pair in BRANCHES.items():
        if name in params:
            both = _split(xp, cast_like(xp, affine(xp, wide, held[name], None), x), 2 * groups)
            given |= {pair[0]: both[..., :groups, :, :], pair[1]: both[..., groups:, :, :]}
    turned = {}
    if rotary_base is not None:
        for name in ("q", "k", "k_compressed", "k_window"):
            if name in given:
                given[name], turned[name] = rotary.forward(
                    given[name], base=rotary_base, positions=positions, interleaved=interleaved)
    logits = affine(xp, wide, held["w_gate"], held["b_gate"])
    # the logistic function by tanh, which cannot overflow
    gates = _split(xp, 0.5 * (1 + xp.tanh(0.5 * logits)), num_heads)
    compression: dict[str, Any] = {
        f"{side}_weights": {name.partition("_")[2]: params[name] for name in names
                            if name in params} or None
        for side, names in COMPRESSION.items()}
    out, attended = nsa_attention.forward(**given, gates=gates, **compression, **options)
    merged = _merge(xp, _swap(xp, out))
    xp, wide_merged, w_o = widened(merged=merged, w_o=params["w_o"])
    y = cast_like(xp, affine(xp, wide_merged, w_o, None), x)
    return y, NsaLayerSaved(x, dict(params), gates, turned, attended, merged, num_heads)
