"""Multi-head attention on plain weight arrays, around any attention function.

Letters: N tokens x of width C, M tokens of context, H query heads and G key/value heads of width D
(values E). Heads lie side by side in a projection's columns, so that splitting them is a view.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ..arrays import Array
from ..checks import OptionError, ShapeError, require_integer
from ..differentiable import Saved, differentiable, gradients
from ..features.positions import rotary
from ..features.precision import cast_like, require_same_shape, widened
from .linear import affine, affine_gradients, require_affine


def _swap(xp: Any, x: Array) -> Array:
    """(..., N, heads, D) to (..., heads, N, D), and back."""
    n = x.ndim
    return xp.permute_dims(x, (*range(n - 3), n - 2, n - 3, n - 1))


def _split(xp: Any, x: Array, heads: int) -> Array:
    """(..., N, heads * D) to (..., heads, N, D)."""
    return _swap(xp, xp.reshape(x, (*x.shape[:-1], heads, x.shape[-1] // heads)))


def _merge(xp: Any, x: Array) -> Array:
    """(..., N, heads, D) to (..., N, heads * D)."""
    return xp.reshape(x, (*x.shape[:-2], x.shape[-2] * x.shape[-1]))


@dataclasses.dataclass(frozen=True)
class HeadsSaved(Saved):
    """What lies between the projections of q, k, v and the output, the output's own included."""

    attended: Any
    """The attention's own."""
    turned: tuple[Any, ...]
    """The rotations' of q and k; empty without rotary positions."""
    merged: Array
    """What the heads found, (..., N, H E)."""
    w_o: Array
    b_o: Array | None
    num_heads: int

    @property
    def decisions(self) -> dict[str, Array]:
        """The attention's."""
        return self.attended.decisions

    def backward(self, dout: Array) -> tuple[list[Array], Array, Array, dict[str, Array]]:
        """Gradients of q, k and v as (..., N, heads, D), of w_o, b_o, and of array options."""
        require_same_shape("dout", dout, (*self.merged.shape[:-1], self.w_o.shape[1]))
        xp, dy, merged, w_o = widened(dout=dout, merged=self.merged, w_o=self.w_o)
        dmerged, dw_o, db_o = affine_gradients(xp, merged, w_o, dy)
        grads = self.attended.backward(
            _split(xp, cast_like(xp, dmerged, self.merged), self.num_heads))
        dq, dk, dv, *more = grads
        options = dict(zip(grads._fields[3:], more, strict=True)) if more else {}
        if self.turned:
            dq, dk = (turn.backward(d).x for turn, d in zip(self.turned, (dq, dk), strict=True))
        return [_swap(xp, d) for d in (dq, dk, dv)], dw_o, db_o, options


def _heads(num_heads: int, num_kv_heads: int | None) -> tuple[int, int]:
    num_heads = require_integer("num_heads", num_heads, minimum=1)
    groups = num_heads if num_kv_heads is None else require_integer(
        "num_kv_heads", num_kv_heads, minimum=1)
    if num_heads % groups:
        raise OptionError(f"num_heads must be a multiple of num_kv_heads; got {num_heads} "
                          f"and {groups}")
    return num_heads, groups


def _width(name: str, w: Array, heads: int, meaning: str) -> int:
    if w.ndim != 2 or w.shape[1] % heads:
        raise ShapeError(f"{name} must have a multiple of {meaning} = {heads} columns; "
                         f"got shape {tuple(w.shape)}")
    return w.shape[1] // heads


def _attend(xp: Any, x: Array, q: Array, k: Array, v: Array, w_o: Array, b_o: Array | None,
            num_heads: int, groups: int, attention: Any, turns: dict[str, Any] | None,
            options: dict[str, Any]) -> tuple[Array, HeadsSaved]:
    """From the projected q (..., N, H D), k (..., M, G D), v (..., M, G E) to the output."""
    if attention is None:
        from ..variants.attention import attention
    if not hasattr(attention, "forward"):
        raise OptionError("attention must be a function with .forward(q, k, v, **options), such as "
                          f"pyattn.attention; got {attention!r}")
    for option in ("return_lse", "return_weights"):
        if options.get(option):
            raise OptionError(f"{option} must be False here, where heads are mixed by w_o; "
                              "call the attention function itself")
    found = num_heads * (v.shape[-1] // groups)
    if w_o.ndim != 2 or w_o.shape[0] != found:
        raise ShapeError(f"w_o must have num_heads * value width = {found} rows; "
                         f"got shape {tuple(w_o.shape)}")
    q, k, v = (_split(xp, cast_like(xp, y, x), heads)
               for y, heads in ((q, num_heads), (k, groups), (v, groups)))
    turned: tuple[Any, ...] = ()
    if turns is not None:
        (q, turned_q), (k, turned_k) = rotary.forward(q, **turns), rotary.forward(k, **turns)
        turned = turned_q, turned_k
    out, attended = attention.forward(q, k, v, **options)
    merged = _merge(xp, _swap(xp, out))
    xp, wide, wide_w, wide_b = widened(merged=merged, w_o=w_o, b_o=b_o)
    y = affine(xp, wide, wide_w, wide_b)
    return cast_like(xp, y, x), HeadsSaved(attended, turned, merged, w_o, b_o, num_heads)


def _turns(rotary_base: float | None, positions: Any, interleaved: bool) -> dict[str, Any] | None:
    if rotary_base is None:
        if positions is not None or interleaved:
            raise OptionError("positions and interleaved speak of rotary positions; give "
                              "rotary_base with them")
        return None
    return {"base": rotary_base, "positions": positions, "interleaved": interleaved}


def _named(xp: Any, arguments: dict[str, tuple[Array | None, Array]],
           options: dict[str, Array]) -> Any:
    """The NamedTuple of the gradients of the arguments that were given, in their dtypes."""
    given = {name: cast_like(xp, grad, argument)
             for name, (argument, grad) in arguments.items() if argument is not None}
    return gradients((*given, *options))(*given.values(), *options.values())


@dataclasses.dataclass(frozen=True)
class MultiHeadSaved(Saved):
    """The arguments of `multi_head`, and what its heads keep."""

    x: Array
    w_qkv: Array
    b_qkv: Array | None
    heads: HeadsSaved

    @property
    def decisions(self) -> dict[str, Array]:
        """The attention's."""
        return self.heads.decisions

    def backward(self, dout: Array) -> Any:
        """Gradients of the arrays given: x, the weights, then the attention's array options."""
        parts, dw_o, db_o, options = self.heads.backward(dout)
        xp, x, w, dq, dk, dv = widened(x=self.x, w_qkv=self.w_qkv, dq=parts[0], dk=parts[1],
                                       dv=parts[2])
        dx, dw, db = affine_gradients(xp, x, w, _merge(xp, xp.concat([dq, dk, dv], axis=-2)))
        return _named(xp, {
            "x": (self.x, dx), "w_qkv": (self.w_qkv, dw), "w_o": (self.heads.w_o, dw_o),
            "b_qkv": (self.b_qkv, db), "b_o": (self.heads.b_o, db_o)}, options)


@differentiable
def multi_head(x: Array, w_qkv: Array, w_o: Array, b_qkv: Array | None = None,
               b_o: Array | None = None, *, num_heads: int, num_kv_heads: int | None = None,
               attention: Any = None, rotary_base: float | None = None, positions: Any = None,
               interleaved: bool = False, **options: Any) -> tuple[Array, MultiHeadSaved]:
    """Multi-head self-attention whose queries, keys and values come from one matrix product.

    ``x @ w_qkv + b_qkv`` has (H + 2 G) D columns: the queries of all heads, the keys of all groups,
    the values of all groups, which for G = H is the packing ``reshape(B, N, 3, H, D)``. The heads
    attend, are laid side by side again, and are mixed: ``y = heads @ w_o + b_o``.

    Parameters
    ----------
    x : array, shape (..., N, C), float16 / bfloat16 / float32 / float64
        Tokens.
    w_qkv : array, shape (C, (H + 2 G) D)
        Fused projection.
    w_o : array, shape (H D, O)
        Output projection.
    b_qkv, b_o : arrays, shapes ((H + 2 G) D,) and (O,), optional
        Biases of the two.
    num_heads, num_kv_heads : int
        H and G, H a multiple of G; G defaults to H.
    attention : function with ``.forward(q, k, v, **options)``, optional
        Default ``pyattn.attention``.
    rotary_base, positions, interleaved
        With a `rotary_base` (usually 10000.0), queries and keys are turned by `rotary` first.
    **options
        Handed to `attention`: ``causal``, ``mask``, ``bias``, ``dropout``, ``rng``, ``decisions``,
        ...; array options that it differentiates have gradients here too.

    Returns
    -------
    array, shape (..., N, O), dtype of `x`
        ``saved.decisions`` are the attention's. Gradients: x, w_qkv, w_o, b_qkv and b_o where
        given, then the array options, each in its own dtype and shape.

    Raises
    ------
    ShapeError
        The widths do not fit, or heads do not divide them.
    OptionError
        G does not divide H; ``return_lse`` or ``return_weights`` is asked for.

    Notes
    -----
    One matrix product for q, k and v; heads are strided views of it. Projections compute in
    float32 (float64 if any argument is), and q, k and v have the dtype of `x`. Kept for backward:
    the arguments, what the attention keeps, and its output (..., N, H D).

    References
    ----------
    .. [1] Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762, section 3.2.2.
    .. [2] Ainslie et al., "GQA", 2023, arXiv:2305.13245, section 2.2, for G < H.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.layers import multi_head
    >>> rng = np.random.default_rng(0)
    >>> x, w_qkv, w_o = (rng.standard_normal(s) for s in ((2, 5, 8), (8, 24), (8, 8)))
    >>> y, saved = multi_head.forward(x, w_qkv, w_o, num_heads=2, causal=True)
    >>> y.shape, saved.backward(y)._fields
    ((2, 5, 8), ('x', 'w_qkv', 'w_o'))
    """
    num_heads, groups = _heads(num_heads, num_kv_heads)
    width = _width("w_qkv", w_qkv, num_heads + 2 * groups, "num_heads + 2 num_kv_heads")
    require_affine(x, w_qkv, b_qkv, ("x", "w_qkv", "b_qkv"))
    turns = _turns(rotary_base, positions, interleaved)
    xp, wide, wide_w, wide_b = widened(x=x, w_qkv=w_qkv, b_qkv=b_qkv)
    qkv = affine(xp, wide, wide_w, wide_b)
    keys, values = num_heads * width, (num_heads + groups) * width
    out, heads = _attend(xp, x, qkv[..., :keys], qkv[..., keys:values], qkv[..., values:], w_o, b_o,
                         num_heads, groups, attention, turns, options)
    return out, MultiHeadSaved(x, w_qkv, b_qkv, heads)


@dataclasses.dataclass(frozen=True)
class CrossAttentionSaved(Saved):
    """The arguments of `cross_attention`, and what its heads keep."""

    x: Array
    context: Array
    w_q: Array
    w_kv: Array
    b_q: Array | None
    b_kv: Array | None
    heads: HeadsSaved

    @property
    def decisions(self) -> dict[str, Array]:
        """The attention's."""
        return self.heads.decisions

    def backward(self, dout: Array) -> Any:
        """Gradients of the arrays given: x, context, weights, the attention's array options."""
        (dq, dk, dv), dw_o, db_o, options = self.heads.backward(dout)
        xp, dq, dk, dv, x, context, w_q, w_kv = widened(
            dq=dq, dk=dk, dv=dv, x=self.x, context=self.context, w_q=self.w_q, w_kv=self.w_kv)
        dx, dw_q, db_q = affine_gradients(xp, x, w_q, _merge(xp, dq))
        dcontext, dw_kv, db_kv = affine_gradients(
            xp, context, w_kv, _merge(xp, xp.concat([dk, dv], axis=-2)))
        return _named(xp, {
            "x": (self.x, dx), "context": (self.context, dcontext), "w_q": (self.w_q, dw_q),
            "w_kv": (self.w_kv, dw_kv), "w_o": (self.heads.w_o, dw_o), "b_q": (self.b_q, db_q),
            "b_kv": (self.b_kv, db_kv), "b_o": (self.heads.b_o, db_o)}, options)


@differentiable
def cross_attention(x: Array, context: Array, w_q: Array, w_kv: Array, w_o: Array,
                    b_q: Array | None = None, b_kv: Array | None = None,
                    b_o: Array | None = None, *, num_heads: int, num_kv_heads: int | None = None,
                    attention: Any = None, **options: Any) -> tuple[Array, CrossAttentionSaved]:
    """Multi-head attention of tokens to another sequence, as a decoder attends to an encoder.

    Queries are ``x @ w_q + b_q``; keys, then values, are the halves of ``context @ w_kv + b_kv``.

    Parameters
    ----------
    x : array, shape (..., N, C), float16 / bfloat16 / float32 / float64
        Tokens that ask.
    context : array, shape (..., M, K)
        Tokens that are asked; leading axes broadcast with those of `x`.
    w_q : array, shape (C, H D)
        Projection of the queries.
    w_kv : array, shape (K, 2 G D)
        Fused projection: keys of all groups, values of all groups.
    w_o : array, shape (H D, O)
        Output projection.
    b_q, b_kv, b_o : arrays, shapes (H D,), (2 G D,), (O,), optional
        Biases of the three.
    num_heads, num_kv_heads, attention, **options
        As for `multi_head`. ``causal=True`` aligns the last query with the last key.

    Returns
    -------
    array, shape (..., N, O), dtype of `x`
        Gradients: x, context, w_q, w_kv, w_o, the biases given, then the array options.

    Raises
    ------
    ShapeError, OptionError
        As for `multi_head`.

    Notes
    -----
    Two matrix products for q, k and v. Precision and what is kept: as for `multi_head`.

    References
    ----------
    .. [1] Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762, section 3.2.3.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.layers import cross_attention
    >>> x, context = np.ones((3, 8)), np.ones((7, 6))
    >>> cross_attention(x, context, np.eye(8), np.eye(6, 16), np.eye(8), num_heads=2).shape
    (3, 8)
    """
    num_heads, groups = _heads(num_heads, num_kv_heads)
    width = _width("w_q", w_q, num_heads, "num_heads")
    require_affine(x, w_q, b_q, ("x", "w_q", "b_q"))
    require_affine(context, w_kv, b_kv, ("context", "w_kv", "b_kv"))
    if w_kv.shape[1] != 2 * groups * width:
        raise ShapeError(f"w_kv must have 2 * num_kv_heads * head width = {2 * groups * width} "
                         f"columns; got shape {tuple(w_kv.shape)}")
    xp, wide, wide_context, *weights = widened(x=x, context=context, w_q=w_q, b_q=b_q, w_kv=w_kv,
                                               b_kv=b_kv)
    q = affine(xp, wide, weights[0], weights[1])
    kv = affine(xp, wide_context, weights[2], weights[3])
    out, heads = _attend(xp, x, q, kv[..., :groups * width], kv[..., groups * width:], w_o, b_o,
                         num_heads, groups, attention, None, options)
    return out, CrossAttentionSaved(x, context, w_q, w_kv, b_q, b_kv, heads)


@dataclasses.dataclass(frozen=True)
class ProjectedAttentionSaved(Saved):
    """The arguments of `projected_attention`, and what its heads keep."""

    x: Array
    w_q: Array
    w_k: Array
    w_v: Array
    b_q: Array | None
    b_k: Array | None
    b_v: Array | None
    context: Array | None
    heads: HeadsSaved

    @property
    def decisions(self) -> dict[str, Array]:
        """The attention's."""
        return self.heads.decisions

    def backward(self, dout: Array) -> Any:
        """Gradients of the arrays given: x, weights, context, the attention's array options."""
        (dq, dk, dv), dw_o, db_o, options = self.heads.backward(dout)
        context = self.x if self.context is None else self.context
        xp, dq, dk, dv, x, context, w_q, w_k, w_v = widened(
            dq=dq, dk=dk, dv=dv, x=self.x, context=context, w_q=self.w_q, w_k=self.w_k,
            w_v=self.w_v)
        dx, dw_q, db_q = affine_gradients(xp, x, w_q, _merge(xp, dq))
        from_keys, dw_k, db_k = affine_gradients(xp, context, w_k, _merge(xp, dk))
        from_values, dw_v, db_v = affine_gradients(xp, context, w_v, _merge(xp, dv))
        dcontext = from_keys + from_values
        return _named(xp, {
            "x": (self.x, dx + dcontext if self.context is None else dx),
            "w_q": (self.w_q, dw_q), "w_k": (self.w_k, dw_k), "w_v": (self.w_v, dw_v),
            "w_o": (self.heads.w_o, dw_o), "b_q": (self.b_q, db_q), "b_k": (self.b_k, db_k),
            "b_v": (self.b_v, db_v), "b_o": (self.heads.b_o, db_o),
            "context": (self.context, dcontext)}, options)


@differentiable
def projected_attention(x: Array, w_q: Array, w_k: Array, w_v: Array, w_o: Array,
                        b_q: Array | None = None, b_k: Array | None = None,
                        b_v: Array | None = None, b_o: Array | None = None, *,
                        num_heads: int, num_kv_heads: int | None = None,
                        context: Array | None = None, attention: Any = None,
                        rotary_base: float | None = None, positions: Any = None,
                        interleaved: bool = False,
                        **options: Any) -> tuple[Array, ProjectedAttentionSaved]:
    """Multi-head attention with three separate projections, to itself or to a context.

    The same as `multi_head` with ``w_qkv = concat([w_q, w_k, w_v], axis=1)``; here each may be
    bound or frozen on its own, and values may have another width than keys.

    Parameters
    ----------
    x : array, shape (..., N, C), float16 / bfloat16 / float32 / float64
        Tokens that ask, and without a context are asked.
    w_q, w_k, w_v : arrays, shapes (C, H D), (K, G D), (K, G E)
        Projections; K is C without a context.
    w_o : array, shape (H E, O)
        Output projection.
    b_q, b_k, b_v, b_o : arrays, shapes (H D,), (G D,), (G E,), (O,), optional
        Biases of the four.
    context : array, shape (..., M, K), optional
        Tokens that are asked.
    num_heads, num_kv_heads, attention, rotary_base, positions, interleaved, **options
        As for `multi_head`. Rotary positions are refused with a context, whose tokens stand
        elsewhere.

    Returns
    -------
    array, shape (..., N, O), dtype of `x`
        Gradients: x, the weights, the biases given, context where given, then the array options.

    Raises
    ------
    ShapeError, OptionError
        As for `multi_head`.

    Notes
    -----
    Three matrix products for q, k and v. Precision and what is kept: as for `multi_head`.

    References
    ----------
    .. [1] Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762, section 3.2.2.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.layers import projected_attention
    >>> x, w = np.ones((3, 8)), np.eye(8)
    >>> projected_attention(x, w, w, w, w, num_heads=2).shape
    (3, 8)
    """
    num_heads, groups = _heads(num_heads, num_kv_heads)
    width = _width("w_q", w_q, num_heads, "num_heads")
    if _width("w_k", w_k, groups, "num_kv_heads") != width:
        raise ShapeError(f"w_k must have num_kv_heads * head width = {groups * width} columns; "
                         f"got shape {tuple(w_k.shape)}")
    _width("w_v", w_v, groups, "num_kv_heads")
    turns = _turns(rotary_base, positions, interleaved)
    if turns is not None and context is not None:
        raise OptionError("rotary_base must be None with a context, whose tokens stand elsewhere")
    source, source_name = (x, "x") if context is None else (context, "context")
    require_affine(x, w_q, b_q, ("x", "w_q", "b_q"))
    require_affine(source, w_k, b_k, (source_name, "w_k", "b_k"))
    require_affine(source, w_v, b_v, (source_name, "w_v", "b_v"))
    xp, wide, wide_source, *weights = widened(x=x, context=source, w_q=w_q, b_q=b_q, w_k=w_k,
                                              b_k=b_k, w_v=w_v, b_v=b_v)
    q = affine(xp, wide, weights[0], weights[1])
    k = affine(xp, wide_source, weights[2], weights[3])
    v = affine(xp, wide_source, weights[4], weights[5])
    out, heads = _attend(xp, x, q, k, v, w_o, b_o, num_heads, groups, attention, turns, options)
    return out, ProjectedAttentionSaved(x, w_q, w_k, w_v, b_q, b_k, b_v, context, heads)
