"""What linear attention turns queries and keys into: a map's description, small and frozen.

Kernels compute the features of a chunk of tokens while it lies in the cache, forward and again
backward, so that none are kept. Letters: D width, F features.
"""

from __future__ import annotations

import dataclasses
import math

from .. import arrays
from ..arrays import Array
from ..checks import OptionError, ShapeError, require_choice, require_real

KINDS = ("identity", "elu1", "relu", "exp")


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureMap:
    """phi(x) = f(h) with ``h = projection @ (scale * x)``, or ``h = scale * x`` without one.

    ``identity``: f(h) = h. ``elu1``: elu(h) + 1, that is h + 1 above 0 and exp(h) below. ``relu``:
    max(h, 0) + epsilon. ``exp``: exp(h - |scale * x|^2 / 2), the positive random features of
    softmax; their common factor F^-1/2 falls out of the normalised output and is left out.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features.feature_maps import FeatureMap
    >>> FeatureMap("exp", np.ones((6, 4)), scale=4 ** -0.25).width(4), FeatureMap("elu1").width(4)
    (6, 4)
    """

    kind: str = "elu1"
    projection: Array | None = None
    """(F, D), any float dtype; a constant, it has no gradient."""
    scale: float = 1.0
    epsilon: float = 0.0
    """Added to the features of "relu"."""

    def __post_init__(self) -> None:
        require_choice("kind", self.kind, KINDS)
        if self.projection is not None:
            arrays.require_float("projection", self.projection)
            if self.projection.ndim != 2 or not math.prod(self.projection.shape):
                raise ShapeError("projection must be (F, D), neither of them 0; got "
                                 f"{tuple(self.projection.shape)}")
        require_real("scale", self.scale)
        if require_real("epsilon", self.epsilon) < 0:
            raise OptionError(f"epsilon must be at least 0; got {self.epsilon}")
        if self.epsilon and self.kind != "relu":
            raise OptionError(f"epsilon is for features of kind 'relu'; got {self.epsilon} for "
                              f"{self.kind!r}")

    def width(self, d: int) -> int:
        """Return F for tokens of width `d`."""
        if self.projection is None:
            return d
        if self.projection.shape[1] != d:
            raise ShapeError(f"projection must be (F, D) with the width of q and k, {d}; got "
                             f"{tuple(self.projection.shape)}")
        return int(self.projection.shape[0])
