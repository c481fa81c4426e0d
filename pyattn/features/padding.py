"""Padding: tokens from a length on, whatever they hold."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..masks.algebra import host_array


def without_padding(x: Array, lengths: Any) -> Array:
    """Return `x` (..., H, N, D) with zeros from `lengths` (...) on; `x` itself if they are None.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features.padding import without_padding
    >>> without_padding(np.ones((2, 1, 3, 1)), [1, 3])[:, 0, :, 0]
    array([[1., 0., 0.],
           [1., 1., 1.]])
    """
    if lengths is None:
        return x
    xp = arrays.namespace(x)
    inside = np.arange(x.shape[-2]) < host_array(lengths)[..., None]
    inside = arrays.from_host(xp, inside[..., None, :, None], arrays.device(x))
    return xp.where(inside, x, xp.zeros_like(x))
