"""Merging attention over disjoint sets of keys by log-sum-exp."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..checks import DtypeError, ShapeError
from ..differentiable import Saved, differentiable, gradients
from .indexed import log_sum, share_of


@dataclasses.dataclass(frozen=True)
class MergeSaved(Saved):
    """Both partial results and the merged one."""

    out_a: Array
    lse_a: Array
    out_b: Array
    lse_b: Array
    out: Array
    lse: Array

    def backward(self, dout: Array, dlse: Array | None = None) -> Any:
        """Gradients of ``out_a, lse_a, out_b, lse_b``; `dlse` is that of the merged lse."""
        xp = arrays.namespace(self.out_a, dout, dlse)
        if tuple(dout.shape) != tuple(self.out.shape):
            raise ShapeError(f"dout must have the shape of the output, {tuple(self.out.shape)}; "
                             f"got {tuple(dout.shape)}")
        acc = self.lse.dtype
        dout = xp.astype(dout, acc)
        found = {}
        for side, other in (("a", self.lse_b), ("b", self.lse_a)):
            out, lse = getattr(self, f"out_{side}"), getattr(self, f"lse_{side}")
            share = share_of(xp, lse, other)[..., None]
            seen = share > 0
            # forward: out = share_a out_a + share_b out_b, with share = exp(lse_part - lse)
            found[f"out_{side}"] = arrays.cast(xp, xp.where(seen, share * dout, 0.0), out.dtype)
            moved = xp.where(seen, dout * (xp.astype(out, acc) - xp.astype(self.out, acc)), 0.0)
            pull = xp.sum(moved, axis=-1)
            if dlse is not None:
                pull = xp.where(seen[..., 0], pull + xp.astype(dlse, acc), 0.0)
            found[f"lse_{side}"] = arrays.cast(xp, share[..., 0] * pull, lse.dtype)
        return gradients(("out_a", "lse_a", "out_b", "lse_b"))(
            found["out_a"], found["lse_a"], found["out_b"], found["lse_b"])


@differentiable
def merge(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Any, MergeSaved]:
    """Attention over two disjoint sets of keys from the attention over each.

    ``lse = logaddexp(lse_a, lse_b)``, ``out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b``.
    A part that saw no key (lse = -inf) adds nothing, whatever its output holds. Merging is
    associative and commutative to rounding.

    Parameters
    ----------
    out_a, out_b : array, shape (..., N, E)
        Partial outputs, of one shape and dtype.
    lse_a, lse_b : array, shape (..., N), float32 or float64
        Their log-sum-exps, natural logarithm, as ``return_lse=True`` gives them.

    Returns
    -------
    out : array, shape and dtype of `out_a`
    lse : array, shape and dtype of `lse_a`

    Raises
    ------
    ShapeError, DtypeError
        The two parts do not fit together.

    Notes
    -----
    Kept for backward: the four arguments and the result. When each part comes from
    ``attention.forward``, their backwards may instead take the merged lse and delta.

    References
    ----------
    .. [1] Dao et al., "FlashAttention", 2022, arXiv:2205.14135, section 3.1.

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 4, 8))
    >>> near = pyattn.attention(q, k[:, :2], v[:, :2], return_lse=True)
    >>> far = pyattn.attention(q, k[:, 2:], v[:, 2:], return_lse=True)
    >>> out, lse = pyattn.merge(*near, *far)
    >>> np.allclose(out, pyattn.attention(q, k, v))
    True
    """
    xp = arrays.namespace(out_a, lse_a, out_b, lse_b)
    arrays.require_same_device({"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b})
    for name, a, b in (("out_b", out_a, out_b), ("lse_b", lse_a, lse_b)):
        arrays.require_float(name, b)
        if tuple(a.shape) != tuple(b.shape):
            raise ShapeError(f"{name} must have the shape of {name[:-1]}a, {tuple(a.shape)}; got "
                             f"{tuple(b.shape)}")
        if a.dtype != b.dtype:
            raise DtypeError(f"{name} must have the dtype of {name[:-1]}a, {arrays.dtype_name(a)}; "
                             f"got {arrays.dtype_name(b)}")
    if tuple(out_a.shape[:-1]) != tuple(lse_a.shape):
        raise ShapeError(f"lse_a must have the shape of out_a without its last axis, "
                         f"{tuple(out_a.shape[:-1])}; got {tuple(lse_a.shape)}")
    acc = lse_a.dtype
    lse = log_sum(xp, lse_a, lse_b)
    out = xp.zeros(out_a.shape, dtype=acc, device=arrays.device(out_a))
    for part, own, other in ((out_a, lse_a, lse_b), (out_b, lse_b, lse_a)):
        share = share_of(xp, own, other)[..., None]
        with np.errstate(all="ignore"):
            out = out + xp.where(share > 0, share * xp.astype(part, acc), xp.where(
                share == 0, 0.0, share))
    out = arrays.cast(xp, out, out_a.dtype)
    return (out, lse), MergeSaved(out_a, lse_a, out_b, lse_b, out, lse)
