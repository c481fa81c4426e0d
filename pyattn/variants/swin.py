"""Swin: attention inside windows of a grid, shifted from layer to layer."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

from .. import arrays, masks
from ..arrays import Array
from ..checks import OptionError, ShapeError
from ..differentiable import Saved, differentiable, gradients
from ..engines.softmax import SoftmaxSaved
from ..features.windows import (
    Windows,
    collect_table,
    expand_table,
    inside,
    per_axis,
    refuse,
    region_mask,
    require_grid,
    windows,
)
from .attention import attend

REFUSED = ("bias", "gate", "causal", "alibi_slopes", "q_lengths", "kv_lengths", "segments",
           "return_weights")


@dataclasses.dataclass(frozen=True)
class SwinSaved(Saved):
    """What attention inside the windows keeps, and where the windows were."""

    attended: SoftmaxSaved
    bias_table: Array
    layout: Windows
    window: tuple[int, ...]

    @property
    def decisions(self) -> dict[str, Array]:
        """Those of the attention."""
        return self.attended.decisions

    @property
    def stats(self) -> dict[str, int]:
        """Those of the attention, over all windows."""
        return self.attended.stats

    def backward(self, dout: Array, dlse: Array | None = None) -> Any:
        """Gradients of q, k, v, bias_table, then of the attention's array options."""
        found = self.attended.backward(dout, dlse)._asdict()
        bias = found.pop("bias")
        table = collect_table(bias, self.window, self.layout.size)
        grads = {name: found.pop(name) for name in ("q", "k", "v")}
        grads["bias_table"] = arrays.cast(arrays.namespace(table), table, self.bias_table.dtype)
        return gradients((*grads, *found))(**grads, **found)


@differentiable
def swin_attention(q: Array, k: Array, v: Array, bias_table: Array, *, shape: Any, window: Any,
                   shift: Any = 0, reference: bool = False, mask: Any = None,
                   **options: Any) -> tuple[Any, Any]:
    """Attention of the cells of a grid inside square windows, which may be shifted.

    The grid is padded to whole windows, rolled by ``-shift`` and cut into windows. A query sees the
    keys of its window, but not what the roll has brought there from the opposite edge; its scores
    have a bias that depends on the distance along each axis alone.
    E.g. ``shape=(4,), window=2``: 0->{0, 1}  1->{0, 1}  2->{2, 3}  3->{2, 3};
    with ``shift=1``: 0->{0}  1->{1, 2}  2->{1, 2}  3->{3}.

    Parameters
    ----------
    q : array, shape (..., H, N, D), float16, bfloat16, float32 or float64
        Queries; token ``row * columns + column`` is that cell of the grid.
    k : array, shape (..., G, N, D), dtype of `q`
        Keys; G divides H.
    v : array, shape (..., G, N, E), dtype of `q`
        Values.
    bias_table : array, shape ((2 window - 1) ** axes, H), any float dtype
        Added to the scores. The row for a query r rows below and c columns right of its key is
        ``(r + window - 1) * (2 window - 1) + (c + window - 1)``.
    shape : sequence of int
        Rows and columns of the grid, with product N; any number of axes.
    window : int or sequence of int, cells
        Side of the windows, or one for each axis.
    shift : int or sequence of int, cells, default 0
        At least 0 and less than `window`; usually ``window // 2`` in every other layer. It is 0
        where the grid is no longer than the window along any axis.
    reference : bool
        Whether padding takes part, as tokens of zeros, which is how the authors' code treats it.
        By default it is masked.
    mask : Mask, or boolean array broadcasting to (..., H, N, N), optional
        Intersected with the rule above; evaluated on the pairs inside windows alone.
    **options
        As for `pyattn.attention`: ``scale``, ``softcap``, ``sinks``, ``dropout``, ``rng``,
        ``decisions``, ``return_lse``. Those that speak of the sequence as a whole are refused.

    Returns
    -------
    array, shape (..., H, N, E), dtype of `q`
        With ``return_lse`` a pair, as for `pyattn.attention`.

    Raises
    ------
    ShapeError
        The grid has not N cells, or the table not the rows that the window asks for.
    OptionError
        `shift` is not less than `window`, or an option cannot be honoured.

    Notes
    -----
    Time O(N window ** axes (D + E)). On the CPU tokens are read and written where they stand; other
    backends copy them into the order of the windows and back. Kept for backward: the arguments, the
    output and the lse; the bias is made anew for each call, (H, P, P) for the P cells of a window.
    Differs from the authors' code: what is masked is masked with -inf and not with -100; a window
    longer than the grid is cut off without a change to the table, where that code shrinks it to the
    shorter side (`pyattn.layers.swin_block` does so, too).

    References
    ----------
    .. [1] Liu et al., "Swin Transformer", 2021, arXiv:2103.14030, section 3.2 (shifted windows,
       relative position bias, equation 4).

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> x = np.random.default_rng(0).standard_normal((2, 20, 8))          # two heads, 4 x 5 cells
    >>> table = np.zeros((9, 2))
    >>> out, saved = pyattn.swin_attention.forward(x, x, x, table, shape=(4, 5), window=2, shift=1)
    >>> out.shape, saved.backward(out).bias_table.shape
    ((2, 20, 8), (9, 2))
    """
    shape = require_grid(shape, q=q, k=k, v=v)
    reach = per_axis("window", window, len(shape), 1)
    roll = per_axis("shift", shift, len(shape), 0)
    if any(step >= side for step, side in zip(roll, reach, strict=True)):
        raise OptionError(f"shift must be less than window; got {shift} and {window}")
    refuse(options, REFUSED, "windows have their own bias and order")
    if reference and mask is not None:
        raise OptionError("mask must be left out with reference=True, where padding, of which it "
                          "says nothing, takes part")
    rows = math.prod(2 * side - 1 for side in reach)
    if tuple(bias_table.shape) != (rows, q.shape[-3]):
        raise ShapeError(f"bias_table must have shape ({rows}, {q.shape[-3]}), a row for each "
                         f"distance in a window {reach} and a column for each head; got "
                         f"{tuple(bias_table.shape)}")
    arrays.require_float("bias_table", bias_table)
    xp = arrays.namespace(q, k, v, bias_table)
    layout = windows(shape, reach, roll)
    pattern = region_mask(layout, reference)
    if mask is not None:
        pattern = masks.restrict(_windowed(masks.restrict(masks.full(), mask), layout), pattern)
    wide = arrays.cast(xp, bias_table, arrays.accumulator(xp, bias_table))
    out, attended = attend(q, k, v, order=layout.order, mask=pattern,
                           bias=expand_table(wide, reach, layout.size), **options)
    return out, SwinSaved(attended, bias_table, layout, reach)


@functools.lru_cache(32)
def _windowed(mask: masks.Mask, layout: Windows) -> masks.Mask:
    """What `mask` allows inside the windows; padding is given the pairs of cell 0."""
    return inside(mask, layout.cells.clip(0), math.prod(layout.shape))
