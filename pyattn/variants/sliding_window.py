"""Sliding-window attention, dilated or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import masks
from ..arrays import Array
from ..checks import OptionError, ShapeError
from ..differentiable import differentiable
from .attention import attention


@differentiable
def sliding_window_attention(q: Array, k: Array, v: Array, *,
                             window: int | tuple[int | None, int | None],
                             dilation: int | Sequence[int] = 1, mask: Any = None,
                             **options: Any) -> tuple[Any, Any]:
    """Each query sees the keys around it.

    Query i sees key j iff ``|i - j| <= window * dilation`` and `dilation` divides ``i - j``; with
    ``causal=True`` also ``j <= i``.
    E.g. ``window=1``, four tokens: 0->{0, 1}  1->{0, 1, 2}  2->{1, 2, 3}  3->{2, 3}; causal:
    0->{0}  1->{0, 1}  2->{1, 2}  3->{2, 3}; ``dilation=2``: 0->{0, 2}  1->{1, 3}  2->{0, 2}
    3->{1, 3}.

    Parameters
    ----------
    q : array, shape (..., H, N, D), float16, bfloat16, float32 or float64
        Queries.
    k : array, shape (..., G, M, D), dtype of `q`
        Keys; G divides H.
    v : array, shape (..., G, M, E), dtype of `q`
        Values.
    window : int >= 0, or (left, right)
        Keys on each side. A pair gives each side its own reach, None for no limit.
    dilation : int >= 1, or a sequence of H of them
        Distance between the keys that a query sees, for all heads or for each.
    mask : Mask or boolean array, optional
        Intersected with the rule above.
    **options
        As for `pyattn.attention`: ``causal``, ``bias``, ``scale``, ``kv_lengths``, ``dropout``,
        ``return_lse``, ...

    Returns
    -------
    array, shape (..., H, N, E), dtype of `q`
        Rows that see no key are 0. With ``return_lse`` a tuple, as for `pyattn.attention`.

    Raises
    ------
    OptionError
        A reach below 0, a dilation below 1, or a window that is neither a number nor a pair.
    ShapeError
        The dilations are not as many as the heads.

    Notes
    -----
    Time O(N * window * (D + E)), with dilation too: tokens are regrouped by their residue. Kept for
    backward are the arguments, the output and the lse. Differs from the papers: `window` counts the
    keys on one side, where Longformer's is the width of both; lucidrains' `local-attention` cuts
    the sequence into blocks, and sees a window by tokens only with ``exact_windowsize``.

    References
    ----------
    .. [1] Beltagy et al., "Longformer", 2020, arXiv:2004.05150, section 3.1 (sliding and dilated
       windows, dilation by head).
    .. [2] Parmar et al., "Image Transformer", 2018, arXiv:1802.05751, section 3.3 (local).

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> x = np.random.default_rng(0).standard_normal((2, 4, 8))     # two heads, four tokens
    >>> out = pyattn.sliding_window_attention(x, x, x, window=0)
    >>> bool(np.allclose(out, x))
    True
    >>> pyattn.sliding_window_attention(x, x, x, window=1, dilation=(1, 2), causal=True).shape
    (2, 4, 8)
    """
    reach = tuple(window) if isinstance(window, tuple | list) else (window, window)
    if len(reach) != 2:
        raise OptionError(f"window must be an integer or a pair (left, right); got {window}")
    if isinstance(dilation, Sequence | np.ndarray):
        if q.shape[-3:-2] != (len(dilation),):
            raise ShapeError(f"dilation must hold one number for each head of q; got "
                             f"{len(dilation)}, q is {tuple(q.shape)}")
        pattern: masks.Mask = masks.per_head(
            tuple(masks.window(*reach, step) for step in dilation))
    else:
        pattern = masks.window(*reach, dilation)
    pattern = masks.restrict(pattern, mask)
    return attention.forward(q, k, v, mask=masks.plan(pattern, q.shape[-2], k.shape[-2]), **options)
