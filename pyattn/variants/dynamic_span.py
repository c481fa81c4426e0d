"""Every token has a span of its own in every head, made from what it holds."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import arrays, masks
from ..arrays import Array
from ..checks import ShapeError, require_broadcast, require_choice, require_real
from ..differentiable import differentiable
from ..engines.placement import first_position
from ..features.spans import require_span
from .adaptive_span import SpanSaved, attend_spans, require_ramp

TILE = 64


@differentiable
def dynamic_span_attention(q: Array, k: Array, v: Array, span: Array, *, ramp: float = 32,
                           max_span: float | None = None, include_self: bool = True,
                           causal: bool | str = True, mask: Any = None, q_lengths: Any = None,
                           kv_lengths: Any = None, segments: Any = None,
                           **options: Any) -> tuple[Any, SpanSaved]:
    """Causal attention as far back as each token's span, with a soft edge that lets it learn.

    As `pyattn.adaptive_span_attention`, but that query i of a head has its own span: a key at
    distance d before it has the factor ``clip((ramp + span_i - d) / ramp, 0, 1)``.
    E.g. ``ramp=1``, spans 0, 0, 2, 0: 0->{0}  1->{1}  2->{0, 1, 2}  3->{3}.

    Parameters
    ----------
    q : array, shape (..., H, N, D), float16, bfloat16, float32 or float64
        Queries.
    k : array, shape (..., G, M, D), dtype of `q`
        Keys; G divides H.
    v : array, shape (..., G, M, E), dtype of `q`
        Values.
    span : array, broadcasting to (..., H, N), any float dtype
        In tokens, at least 0; `pyattn.features.dynamic_spans` makes it. Read on the host as well.
    ramp : float, > 0, tokens
        Width of the soft edge.
    max_span : float, optional
        Longer spans are refused.
    include_self : bool
        If False, a query does not see its own token, and its neighbour is at distance 0.
    causal : True or "top_left"
        Query i stands at position ``i + M - N``, or at i.
    mask : Mask or boolean array, optional
        Intersected with the rule above.
    q_lengths, kv_lengths, segments, **options
        As for `pyattn.attention`, but ``gate`` and ``window``.

    Returns
    -------
    array, shape (..., H, N, E), dtype of `q`
        Rows that see no key are 0. With ``return_lse`` a tuple, as for `pyattn.attention`.
        Gradients: q, k, v, span, then those of options.

    Raises
    ------
    OptionError
        A span below 0 or beyond `max_span`, a ramp that is not positive, ``causal=False``.
    ShapeError
        `span` does not broadcast to (..., H, N).

    Notes
    -----
    Time O(sum of (span + ramp) (D + E)), by tiles of 64 x 64: what the longest span of 64 queries
    side by side reaches. With ``segments`` all that is causal is visited. Kept for backward as for
    `pyattn.attention`. The paper has one such span for a token, shared by a layer's heads; give a
    `span` of one head for that.

    References
    ----------
    .. [1] Sukhbaatar et al., "Adaptive Attention Span in Transformers", 2019, arXiv:1905.07799,
       section 2.2, "Dynamic attention span".

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> from pyattn.features import dynamic_spans
    >>> rng = np.random.default_rng(0)
    >>> x, (q, k, v) = rng.standard_normal((100, 16)), rng.standard_normal((3, 2, 100, 8))
    >>> span, made = dynamic_spans.forward(x, rng.standard_normal((16, 2)), np.zeros(2),
    ...                                    max_span=50)
    >>> out, saved = pyattn.dynamic_span_attention.forward(q, k, v, span, ramp=8)
    >>> made.backward(saved.backward(out).span).x.shape
    (100, 16)
    """
    ramp, causal = require_ramp(ramp), require_choice("causal", causal, (True, "top_left"))
    limit = None if max_span is None else require_real("max_span", max_span)
    host = require_span(span, limit)
    if span.ndim < 1:
        raise ShapeError("span must broadcast to (..., H, N); got one value")
    xp, (n, m) = arrays.namespace(q, k, v, span), (q.shape[-2], k.shape[-2])
    batch = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    require_broadcast("span", tuple(span.shape), (*batch, *q.shape[-3:-1]), "(..., H, N)")
    reach: masks.Mask = masks.full()
    if segments is None and n and m:
        first = first_position(n, m, causal, q_lengths, kv_lengths)
        longest = np.nan_to_num(host) + ramp + (not include_self)
        reach = masks.blocks(_within(longest, np.asarray(first), n, m), TILE)
    options |= {"q_lengths": q_lengths, "kv_lengths": kv_lengths, "segments": segments}
    return attend_spans(q, k, v, span, xp.expand_dims(span, axis=-1), ramp=ramp,
                        include_self=include_self, causal=causal, reach=reach, mask=mask,
                        options=options)


def _within(longest: np.ndarray, first: np.ndarray, n: int, m: int) -> np.ndarray:
    """Tell which tiles hold a key less than `longest` (..., H, N) before a query of theirs.

    `first` is the position of query 0, one number or one for each batch item.
    """
    longest = np.broadcast_to(longest, (*longest.shape[:-1], n))
    needed = np.arange(n) - np.ceil(longest) + 1 + first[..., None, None]
    tiles = np.pad(needed, [(0, 0)] * (needed.ndim - 1) + [(0, -n % TILE)], mode="edge")
    least = tiles.reshape(*needed.shape[:-1], -1, TILE).min(-1)
    return TILE * np.arange(1, -(-m // TILE) + 1) > least[..., None]
