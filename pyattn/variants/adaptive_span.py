"""Every head has a span of its own, which it learns."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from .. import arrays, masks
from ..arrays import Array
from ..checks import OptionError, require_broadcast, require_choice, require_real
from ..differentiable import Saved, differentiable, gradients
from ..engines.problem import GateForm
from ..features.spans import require_span
from .attention import attend, handed_on

REFUSED = ("gate", "window")


@dataclasses.dataclass(frozen=True)
class SpanSaved(Saved):
    """What attention keeps, whose gate is a ramp over the spans."""

    attended: Any
    span: Array

    @property
    def decisions(self) -> dict[str, Array]:
        """Those of the attention."""
        return self.attended.decisions

    @property
    def stats(self) -> dict[str, int]:
        """Those of the attention."""
        return self.attended.stats

    def backward(self, dout: Array, dlse: Array | None = None) -> Any:
        """Gradients of the array arguments given, ``span`` after ``v``."""
        found = self.attended.backward(dout, dlse)._asdict()
        xp = arrays.namespace(self.span)
        # forward: gate = clip((ramp + span - distance) / ramp, 0, 1)
        span = arrays.reshape(xp, found.pop("gate"), self.span.shape)
        operands = {name: found.pop(name) for name in ("q", "k", "v")}
        found = {**operands, "span": span, **found}
        return gradients(tuple(found))(**found)


def attend_spans(q: Array, k: Array, v: Array, span: Array, spans: Array, *, ramp: float,
                 include_self: bool, causal: bool | str, reach: masks.Mask, mask: Any,
                 options: dict[str, Any]) -> tuple[Any, SpanSaved]:
    """Attend with `spans`, which are `span` as a gate has them, to the pairs within `reach`."""
    options = handed_on(options, REFUSED, "spans are gate and window")
    if not include_self:
        reach = reach & ~masks.window(0, 0)
    form = GateForm(ramp=ramp, shift=0 if include_self else 1)
    out, attended = attend(q, k, v, mask=masks.restrict(reach, mask), causal=causal, gate=spans,
                           gate_form=form, **options)
    return out, SpanSaved(attended, span)


def require_ramp(ramp: Any) -> float:
    """Return the ramp's width, or raise OptionError."""
    width = require_real("ramp", ramp)
    if width <= 0:
        raise OptionError(f"ramp must be positive; got {width}")
    return width


def keys_back(span: float, ramp: float, *, include_self: bool) -> int:
    """How far back the last key is whose gate is not 0."""
    return max(math.ceil(span + ramp) - 1 + (not include_self), 0)


@differentiable
def adaptive_span_attention(q: Array, k: Array, v: Array, span: Array, *, ramp: float = 32,
                            max_span: float | None = None, include_self: bool = True,
                            causal: bool | str = True, mask: Any = None,
                            **options: Any) -> tuple[Any, SpanSaved]:
    """Causal attention as far back as each head's span, with a soft edge that lets the span learn.

    A key at distance d before the query has weight ``m e^score`` in the softmax, with ``m = clip(
    (ramp + span - d) / ramp, 0, 1)``: 1 up to the span, then falling to 0. Beyond ``span + ramp``
    nothing is computed.
    E.g. ``span=1, ramp=2``, distances 0, 1, 2, 3: m is 1, 1, 1/2, 0.

    Parameters
    ----------
    q : array, shape (..., H, N, D), float16, bfloat16, float32 or float64
        Queries.
    k : array, shape (..., G, M, D), dtype of `q`
        Keys; G divides H.
    v : array, shape (..., G, M, E), dtype of `q`
        Values.
    span : array, shape (H,) or (1,), any float dtype
        In tokens, at least 0. Keep it in float32: read on the host as well, to see which keys are
        within reach.
    ramp : float, > 0, tokens
        Width of the soft edge.
    max_span : float, optional
        Longer spans are refused. As a step may lead below 0 or beyond, clip spans after it.
    include_self : bool
        If False, a query does not see its own token, and its neighbour is at distance 0: the
        form of the authors' code. The first query then sees nothing.
    causal : True or "top_left"
        Query i stands at position ``i + M - N``, or at i.
    mask : Mask or boolean array, optional
        Intersected with the rule above.
    **options
        As for `pyattn.attention`, but ``gate`` and ``window``: ``bias``, ``scale``, ``kv_lengths``,
        ``dropout``, ``return_lse``, ...

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
        `span` does not hold one number, or one for each head.

    Notes
    -----
    ``d span = (1 / ramp) sum of u (dp - delta)`` over the pairs on the edge, ``u = e^(score -
    lse)``: where no key is on the edge (the sequence is shorter, or the span ends in a token with
    m = 1 or 0 exactly) the gradient is 0. Time O(N sum over heads of (span + ramp) (D + E)), by
    tiles of 64: ``saved.stats`` has them. Kept for backward as for `pyattn.attention`. Differs from
    the authors' code, which divides by the sum of what the gate leaves + 1e-8: here the gate is
    inside the softmax. There a span is a share of `max_span`. `pyattn.features.span_loss` is the
    penalty that keeps spans short.

    References
    ----------
    .. [1] Sukhbaatar et al., "Adaptive Attention Span in Transformers", 2019, arXiv:1905.07799,
       section 2.2, equations 1 to 3.

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 100, 8))
    >>> out, saved = pyattn.adaptive_span_attention.forward(q, k, v, np.array([5.0, 40.0]), ramp=8)
    >>> saved.backward(out).span.shape
    (2,)
    >>> far = pyattn.adaptive_span_attention(q, k, v, np.array([100.0]))
    >>> np.allclose(far, pyattn.attention(q, k, v, causal=True))
    True
    """
    ramp, causal = require_ramp(ramp), require_choice("causal", causal, (True, "top_left"))
    limit = None if max_span is None else require_real("max_span", max_span)
    host = require_span(span, limit)
    require_broadcast("span", tuple(span.shape), tuple(q.shape[-3:-2]), "(H,)")
    xp = arrays.namespace(q, k, v, span)
    windows = tuple(masks.window(keys_back(x, ramp, include_self=include_self), 0)
                    for x in host.reshape(-1))
    reach = masks.per_head(windows) if windows else masks.full()
    return attend_spans(q, k, v, span, arrays.reshape(xp, span, (-1, 1, 1)), ramp=ramp,
                        include_self=include_self, causal=causal, reach=reach, mask=mask,
                        options=options)
