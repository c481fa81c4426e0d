"""Each query attends to the keys that it scores highest."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import numpy as np

from .. import arrays, masks
from ..arrays import Array
from ..checks import (
    DtypeError,
    OptionError,
    ShapeError,
    require_broadcast,
    require_choice,
    require_decisions,
    require_integer,
    require_real,
)
from ..differentiable import ON_HOST, Saved, differentiable
from ..engines import edges as engine
from ..engines.edges import Edges, EdgesSaved
from ..engines.placement import place
from ..engines.selection import select_keys
from ..engines.softmax import require_operands
from ..masks.algebra import host_array
from .attention import CAUSAL, intersected


@dataclasses.dataclass(frozen=True)
class TopKSaved(Saved):
    """The engine's record, and which keys were selected."""

    attended: EdgesSaved
    indices: np.ndarray = dataclasses.field(metadata=ON_HOST)
    scored: int

    @property
    def decisions(self) -> dict[str, Array]:
        """``indices``, int32 (..., H, N, min(top, M)): keys by query, -1 for none."""
        return {"indices": self.indices}

    @property
    def stats(self) -> dict[str, int]:
        """Those of the engine, with the flops of the selection; and pairs `scored` for it."""
        found = self.attended.stats
        # the engine can do without queries; here they were selected by
        found["flops"] += 2 * self.scored * cast("Array", self.attended.q).shape[-1]
        return {**found, "scored": self.scored}

    def backward(self, dout: Array, dlse: Array | None = None) -> Any:
        """Gradients of q, k and v; the selection is a constant."""
        return self.attended.backward(dout, dlse)


@differentiable
def top_k_attention(q: Array, k: Array, v: Array, *, top: int, threshold: float | None = None,
                    causal: bool | str = False, mask: Any = None, scale: float | None = None,
                    softcap: float | None = None, q_lengths: Any = None, kv_lengths: Any = None,
                    return_lse: bool = False,
                    decisions: dict[str, Any] | None = None) -> tuple[Any, TopKSaved]:
    """Attention of each query to its `top` highest scores.

    The softmax is over the `top` keys of the largest ``scale * q.k``, of those that mask, `causal`
    and lengths allow; of equal scores the key of the lowest index is taken. E.g. ``top=2`` and
    scores ``3 1 2 2`` of one query: it sees {0, 2}; with ``threshold=2.5``: {0}.

    Parameters
    ----------
    q : array, shape (..., H, N, D), float16, bfloat16, float32 or float64
        Queries.
    k : array, shape (..., G, M, D), dtype of `q`
        Keys; G divides H.
    v : array, shape (..., G, M, E), dtype of `q`
        Values.
    top : int >= 1, keys
        How many keys a query sees, at most.
    threshold : float, optional
        Of those, only keys with ``scale * q.k > threshold``.
    causal : bool or "top_left"
        A query sees keys up to its own position; positions as for `pyattn.attention`.
    mask : Mask, BlockMask or bool array that broadcasts to (..., H, N, M), optional
        Which pairs may be selected.
    scale : float, optional
        Multiplies the scores. Default ``D ** -0.5``.
    softcap : float, optional
        Scores become ``softcap * tanh(scores / softcap)``, after the selection.
    q_lengths, kv_lengths : int or array of int, broadcasting to the leading axes, optional
        Tokens from here on are padding.
    return_lse : bool
        Also return the log-sum-exp of each row, (..., H, N).
    decisions : dict, optional
        What an earlier call selected, from its ``saved.decisions``: ``indices``, which may list
        the keys of a query in any order. They are taken as they are, whatever `causal`, mask,
        lengths and `threshold` say.

    Returns
    -------
    array, shape (..., H, N, E), dtype of `q`
        A query that sees no key: 0. With `return_lse` a tuple, as for `pyattn.attention`.

    Raises
    ------
    ShapeError, DtypeError, OptionError
        Arguments that do not fit; the message names the argument, the rule and what was given.

    Notes
    -----
    The selection is exact and scores all allowed pairs, tile by tile: O(N M D) time. Only what
    follows, and the backward, is O(N top (D + E)). Kept for backward: the arguments, the lists, the
    output and the log-sum-exp. The selection has no gradient, so pairs that are not selected have
    none. A score that is NaN counts as the largest.

    References
    ----------
    .. [1] Zhao et al., "Explicit Sparse Transformer: Concentrated Attention Through Explicit
       Selection", 2019, arXiv:1912.11637, section 2 (there all that equal the last score are
       taken).

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 6, 8))
    >>> out, saved = pyattn.top_k_attention.forward(q, k, v, top=2)
    >>> saved.decisions["indices"].shape, saved.stats["pairs"]
    ((2, 6, 2), 24)
    >>> np.allclose(pyattn.top_k_attention(q, k, v, top=6), pyattn.attention(q, k, v))
    True
    """
    top = require_integer("top", top, minimum=1)
    causal = require_choice("causal", causal, (False, True, "top_left"))
    if threshold is not None:
        threshold = require_real("threshold", threshold)
    batch = require_operands(q, k, v)
    (heads, n, d), m = q.shape[-3:], k.shape[-2]
    scale = d ** -0.5 if scale is None else require_real("scale", scale)
    indices, scored = _given(decisions, (*batch, heads, n), m), 0
    if indices is None:
        xp = arrays.namespace(q, k, v)
        placement = place(batch, n, m, "top_left" if causal == "top_left" else "bottom_right",
                          q_lengths, kv_lengths, None)
        blocks = placement.compile(_mask(mask, causal, (*batch, heads)))
        flat = (math.prod(batch), heads)
        layout = np.broadcast_to(blocks.layout, (*batch, heads)).reshape(flat)
        lengths = placement.q_lengths, placement.kv_lengths
        wide_q, wide_k = (xp.reshape(xp.broadcast_to(x, (*batch, *x.shape[-3:])),
                                     (flat[0], *x.shape[-3:])) for x in (q, k))
        indices = select_keys(wide_q, wide_k, blocks, layout, *lengths, top=top, scale=scale,
                              threshold=threshold).reshape(*batch, heads, n, min(top, m))
        scored = blocks.count(layout, *lengths).pairs
    edges = Edges.from_lists(indices.reshape(math.prod(batch), heads, n, indices.shape[-1]),
                             batch=math.prod(batch), heads=heads, tokens=m)
    out, attended = engine.forward(q, k, v, edges, scale=scale, softcap=softcap,
                                   return_lse=return_lse)
    return out, TopKSaved(attended, indices, scored)


def _mask(mask: Any, causal: bool | str, rows: tuple[int, ...]) -> masks.Mask:
    """What may be selected."""
    allowed = intersected(mask, masks.full() if causal is False else CAUSAL)
    require_broadcast("the leading axes of mask", allowed.lead, rows, "(..., H)")
    return allowed


def _given(decisions: dict[str, Any] | None, rows: tuple[int, ...], m: int) -> np.ndarray | None:
    """The indices that were decided on before, if there are any."""
    decisions = require_decisions(decisions, ("indices",))
    if not decisions:
        return None
    indices = host_array(decisions["indices"])
    if indices.dtype.kind not in "iu":
        raise DtypeError(f"indices must be integers; got {indices.dtype}")
    if indices.ndim != len(rows) + 1 or indices.shape[:-1] != rows:
        raise ShapeError(f"indices must be (..., H, N, n) with {rows} before n; got "
                         f"{indices.shape}")
    if indices.size and not (indices.min() >= -1 and indices.max() < m):
        raise OptionError(f"indices must lie in -1..{m - 1}; got {indices.min()}..{indices.max()}")
    return indices
