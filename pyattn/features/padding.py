"""Padding: tokens from a length on, whatever they hold."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..checks import OptionError, ShapeError, require_broadcast
from ..masks.algebra import host_array


def require_lengths(name: str, lengths: Any, lead: tuple[int, ...],
                    n: int) -> tuple[Any, ...] | int | None:
    """Return `lengths` as numbers that a record may keep; they broadcast to `lead`, up to n.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features.padding import require_lengths
    >>> require_lengths("kv_lengths", np.array([1, 3]), (2,), 3)
    (1, 3)
    """
    if lengths is None:
        return None
    found = host_array(lengths)
    require_broadcast(name, found.shape, lead, "the leading axes")
    if found.size and found.dtype.kind not in "iu":
        raise OptionError(f"{name} must be integers; got {found.dtype}")
    if found.size and not (found.min() >= 0 and found.max() <= n):
        raise ShapeError(f"{name} must lie in 0..{n}; got {found.min()}..{found.max()}")
    return _nested(found.tolist())


def _nested(numbers: Any) -> Any:
    return tuple(map(_nested, numbers)) if isinstance(numbers, list) else numbers


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
