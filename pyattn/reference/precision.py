"""How exactly the formulas are evaluated: one set of formulas, several precisions."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Precision:
    """In what the formulas are summed, and to what their intermediate arrays are rounded."""

    sums: np.dtype
    """Matrix products and sums are carried in this dtype."""
    store: np.dtype
    """Every intermediate array is rounded to this dtype; it is the dtype of results."""
    judge: bool = False
    """Whether gradients stay as they are, or take the dtype of their argument."""
    order: int = 0
    """In which order sums are taken: 0 as they stand, 1 from the end, 2 from the middle. Rounding
    depends on it, so that several orders tell what the error of an implementation may be."""

    def load(self, x: Any) -> np.ndarray:
        """Take an argument exactly as it was given."""
        return np.asarray(x).astype(self.sums)

    def gradient(self, x: np.ndarray, argument: Any) -> np.ndarray:
        """Give `x` the dtype of a result: the judge's own, or that of the `argument`."""
        return x.astype(self.store if self.judge else np.asarray(argument).dtype)

    def matmul(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Return ``a @ b``, rounded."""
        return self.round(self._turned(a, -1) @ self._turned(b, -2))

    def sum(self, x: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
        """Sum over axes; statistics are not rounded."""
        axes = (axis,) if isinstance(axis, int) else axis
        for each in axes:
            x = self._turned(x, each)
        return np.asarray(x.sum(axes))

    def _turned(self, x: np.ndarray, axis: int) -> np.ndarray:
        if self.order == 1:
            return np.ascontiguousarray(np.flip(x, axis))
        return np.roll(x, x.shape[axis] // 2, axis) if self.order == 2 else x

    def round(self, x: np.ndarray) -> np.ndarray:
        """Return what is left of `x` after it was stored."""
        return x if self.store == self.sums else x.astype(self.store).astype(self.sums)


FLOAT64 = Precision(np.dtype(np.float64), np.dtype(np.float64), judge=True)
"""The judge of float16, bfloat16 and float32."""

LONGDOUBLE = Precision(np.dtype(np.longdouble), np.dtype(np.longdouble), judge=True)
"""The judge of float64."""


def plain(dtype: Any, order: int = 0) -> Precision:
    """Evaluate as a plain implementation in `dtype` does: the unit in which errors are measured.

    Matrix products are summed in float32 (float64 for float64) and every intermediate array is
    rounded to `dtype`; softmax counts as one operation, as it does in the frameworks.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn import reference
    >>> q = k = v = np.eye(3, dtype=np.float16)[None]
    >>> out, lse = reference.attention(q, k, v, precision=reference.plain(np.float16))
    >>> out.dtype, lse.dtype
    (dtype('float16'), dtype('float32'))
    """
    store = np.dtype(dtype)
    sums = np.dtype(np.float64 if store == np.float64 else np.float32)
    return Precision(sums, store, order=order)
