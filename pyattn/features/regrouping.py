"""Tokens listed by a label of theirs, a bucket or a cluster, and where in that list each stands.

Letters: I items (batch items and heads in one), N tokens.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from .. import arrays
from ..arrays import Array

NONE = -1
FEW = 2**16
"""So many labels are sorted digit by digit, in linear time."""


@dataclasses.dataclass(frozen=True, eq=False)
class Regrouped:
    """Tokens sorted by label, those of one label by position; padding behind them.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features.regrouping import regroup
    >>> found = regroup(np.array([[1, 0, 1, 0]]), np.array([3]))
    >>> found.token, found.label, found.first
    (array([[ 1,  0,  2, -1]], dtype=int32), array([[ 0,  1,  1, -1]]), array([[0, 1, 1, 3]]))
    """

    token: np.ndarray
    """int32 (I, N): which token is in a slot; -1 for none."""
    label: np.ndarray
    """int64 (I, N): its label; -1 for none."""
    tokens: int
    """How many tokens there are, listed or not."""

    @functools.cached_property
    def slot(self) -> np.ndarray:
        """In which slot each token is, int64 (I, N); -1 for padding."""
        slot = np.full((len(self.token), self.tokens), NONE, np.int64)
        item, place = np.nonzero(self.token >= 0)
        slot[item, self.token[item, place]] = place
        return slot

    @functools.cached_property
    def first(self) -> np.ndarray:
        """The first slot of each slot's label, int64 (I, N)."""
        begins = np.ones(self.label.shape, bool)
        begins[:, 1:] = self.label[:, 1:] != self.label[:, :-1]
        return np.maximum.accumulate(np.where(begins, np.arange(self.label.shape[1]), 0), axis=1)

    @functools.cached_property
    def stop(self) -> np.ndarray:
        """The slot behind the last of each slot's label, int64 (I, N)."""
        n = self.label.shape[1]
        ends = np.ones(self.label.shape, bool)
        ends[:, :-1] = self.label[:, 1:] != self.label[:, :-1]
        stop = np.where(ends, np.arange(1, n + 1), n)
        return np.minimum.accumulate(stop[:, ::-1], axis=1)[:, ::-1]


def regroup(labels: np.ndarray, lengths: np.ndarray, token: np.ndarray | None = None) -> Regrouped:
    """Sort tokens by labels (I, N), not negative; those from `lengths` (I,) on are padding.

    `token` is what `sorted_tokens` has found for them, if it was asked.
    """
    n = labels.shape[1]
    padding = np.arange(n) >= lengths[:, None]
    if token is None:
        most = int(labels.max(initial=0)) + 1
        key = np.where(padding, most, labels).astype(np.uint16 if most < FEW else np.int64)
        token = np.argsort(key, axis=1, kind="stable")
    # padding comes behind all else
    return Regrouped(np.where(padding, NONE, token).astype(np.int32),
                     np.where(padding, NONE, np.take_along_axis(labels, token, axis=1)), n)


def sorted_tokens(labels: Array, lengths: np.ndarray) -> Array:
    """Return tokens by label, then position, padding last; int32 (I, ..., N), where labels live."""
    xp, n, where = arrays.namespace(labels), labels.shape[-1], arrays.device(labels)
    if (lengths < n).any():
        ends = arrays.from_host(xp, lengths.astype(np.int32), where)
        ends = xp.reshape(ends, (len(lengths), *(1,) * (labels.ndim - 1)))
        # padding stands behind all of the last label too
        padding = xp.arange(n, dtype=xp.int32, device=where) >= ends
        labels = xp.where(padding, xp.iinfo(labels.dtype).max, labels)
    return xp.astype(xp.argsort(labels, axis=-1, stable=True), xp.int32)
