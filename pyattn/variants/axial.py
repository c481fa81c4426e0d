"""Axial attention: along one axis of a grid at a time."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

from .. import arrays, masks
from ..arrays import Array
from ..checks import OptionError, ShapeError, require_choice, require_integer, require_rng
from ..differentiable import Saved, differentiable, gradients
from ..engines.softmax import SoftmaxSaved
from ..features.windows import inside, line_order, refuse, require_grid
from .attention import attend

REFUSED = ("bias", "gate", "q_lengths", "kv_lengths", "segments", "return_lse", "return_weights")


@dataclasses.dataclass(frozen=True)
class AxialSaved(Saved):
    """What attention along each axis keeps."""

    passes: tuple[SoftmaxSaved, ...]
    axes: tuple[int, ...]
    mode: str

    @property
    def decisions(self) -> dict[str, Array]:
        """Those of each axis, their names preceded by its number and a dot."""
        return {f"{axis}.{name}": value for axis, saved in zip(self.axes, self.passes, strict=True)
                for name, value in saved.decisions.items()}

    @property
    def stats(self) -> dict[str, int]:
        """The sums of those along each axis."""
        every = [saved.stats for saved in self.passes]
        return {name: sum(stats[name] for stats in every) for name in every[0]}

    def backward(self, dout: Array) -> Any:
        """Gradients of q, k, v, then of the attention's array options."""
        total: dict[str, Array] = {}
        for saved in reversed(self.passes):
            found = saved.backward(dout)._asdict()
            if self.mode == "sequential":
                # forward: this axis' values were the axis before's output
                dout = found["v"]
                total.pop("v", None)
            for name, grad in found.items():
                total[name] = arrays.added(total[name], grad) if name in total else grad
        return gradients(tuple(total))(**total)


@differentiable
def axial_attention(q: Array, k: Array, v: Array, *, shape: Any, axes: Any = None,
                    mode: str = "sum", mask: Any = None, rng: Any = None, decisions: Any = None,
                    **options: Any) -> tuple[Any, Any]:
    """Attention of the cells of a grid along its axes, one axis at a time.

    Along an axis a query sees the cells that differ from its own in that coordinate alone.
    ``mode="sum"`` adds what is found along each axis, each by a softmax of its own;
    ``mode="sequential"`` gives what was found along one axis to the next as its values, with q and
    k as they are, so that after all axes every cell has reached every other.
    E.g. ``shape=(2, 2)``, along axis 0: 0->{0, 2}  1->{1, 3}  2->{0, 2}  3->{1, 3};
    along axis 1: 0->{0, 1}  1->{0, 1}  2->{2, 3}  3->{2, 3}.

    Parameters
    ----------
    q : array, shape (..., H, N, D), float16, bfloat16, float32 or float64
        Queries; token ``row * columns + column`` is that cell of the grid.
    k : array, shape (..., G, N, D), dtype of `q`
        Keys; G divides H, and is H where more than one axis is taken in sequence.
    v : array, shape (..., G, N, E), dtype of `q`
        Values.
    shape : sequence of int
        Sides of the grid, with product N; any number of axes.
    axes : sequence of int, optional
        Along which axes, in the order of a sequence; none twice. All, in order, by default.
    mode : {"sum", "sequential"}
        What to do with the results along several axes.
    mask : Mask, or boolean array broadcasting to (..., H, N, N), optional
        Intersected with the rule above; evaluated on the pairs of a line alone.
    rng, decisions
        As for `pyattn.attention`; the axes draw in turn, and the decisions of axis a are named
        ``a.dropout_seed``.
    **options
        As for `pyattn.attention`, speaking of places along the axis: ``causal``, ``window``,
        ``alibi_slopes``, ``scale``, ``softcap``, ``sinks``, ``dropout``.

    Returns
    -------
    array, shape (..., H, N, E), dtype of `q`

    Raises
    ------
    ShapeError
        The grid has not N cells, or k has fewer heads than q in a sequence of axes.
    OptionError
        `axes` are not axes of the grid, or an option cannot be honoured.

    Notes
    -----
    Time O(N (sum of sides) (D + E)). Kept for backward: the arguments, and for each
    axis the output and the lse. With ``causal=True`` a cell sees only cells whose coordinates are
    all at most its own, in either mode; the autoregressive model of the paper, which sees all
    earlier rows, shifts the output of one pass before the next, which is the caller's part. Differs
    from the paper: projections, which it has for each axis, belong to the caller, who may call this
    for each axis in turn.

    References
    ----------
    .. [1] Ho et al., "Axial Attention in Multidimensional Transformers", 2019, arXiv:1912.12180,
       section 3.1.

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> x = np.random.default_rng(0).standard_normal((2, 12, 8))          # two heads, 3 x 4 cells
    >>> rows = pyattn.axial_attention(x, x, x, shape=(3, 4), axes=[1])
    >>> bool(np.allclose(rows[:, :4], pyattn.attention(x[:, :4], x[:, :4], x[:, :4])))
    True
    """
    shape = require_grid(shape, q=q, k=k, v=v)
    order = _axes(axes, len(shape))
    require_choice("mode", mode, ("sum", "sequential"))
    refuse(options, REFUSED, "every axis has a softmax and a sequence of its own")
    if mode == "sequential" and len(order) > 1 and k.shape[-3] != q.shape[-3]:
        raise ShapeError("k must have the heads of q where axes are taken in sequence, as one "
                         f"axis' output is the next one's v; got q {tuple(q.shape)}, "
                         f"k {tuple(k.shape)}")
    if rng is not None:
        rng = require_rng(rng)
    if mask is not None:
        mask = masks.restrict(masks.full(), mask)
    out, passes = None, []
    for axis in order:
        own = None if decisions is None else {
            name.partition(".")[2]: value for name, value in decisions.items()
            if name.partition(".")[0] == str(axis)}
        found, saved = attend(
            q, k, v, order=line_order(shape, axis),
            mask=None if mask is None else lined(mask, shape, axis), rng=rng, decisions=own,
            **options)
        passes.append(saved)
        if mode == "sequential":
            v = out = found
        else:
            out = found if out is None else out + found
    return out, AxialSaved(tuple(passes), order, mode)


@functools.lru_cache(32)
def lined(mask: masks.Mask, shape: tuple[int, ...], axis: int) -> masks.Mask:
    """What `mask` allows inside the lines along `axis`."""
    return inside(mask, line_order(shape, axis).index, math.prod(shape))


def _axes(axes: Any, count: int) -> tuple[int, ...]:
    if axes is None:
        return tuple(range(count))
    order = tuple(require_integer("axes", axis) for axis in axes)
    places = tuple(axis + count if axis < 0 else axis for axis in order)
    if not places or len(set(places)) < len(places) or not set(places) <= set(range(count)):
        raise OptionError(f"axes must be one or more of the {count} axes of shape, none twice; "
                          f"got {axes!r}")
    return places
