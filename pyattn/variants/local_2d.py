"""Local attention on a grid of tokens."""

from __future__ import annotations

from typing import Any

from .. import masks
from ..arrays import Array
from ..differentiable import differentiable
from .attention import attention


@differentiable
def local_attention_2d(q: Array, k: Array, v: Array, *, shape: tuple[int, int],
                       window: int | tuple[int, int], mask: Any = None,
                       **options: Any) -> tuple[Any, Any]:
    """Each cell of a grid sees the rectangle of cells around it.

    Tokens are the cells, row by row: token i lies in row ``i // columns`` and column
    ``i % columns``. It sees token j iff their rows differ by at most ``window[0]`` and their
    columns by at most ``window[1]``; the end of a row does not touch the start of the next.
    E.g. ``shape=(2, 2)``, ``window=(0, 1)``: 0->{0, 1}  1->{0, 1}  2->{2, 3}  3->{2, 3}.

    Parameters
    ----------
    q : array, shape (..., H, N, D), float16, bfloat16, float32 or float64
        Queries; ``N = rows * columns``, or the last N of the keys' cells.
    k : array, shape (..., G, M, D), dtype of `q`
        Keys; G divides H.
    v : array, shape (..., G, M, E), dtype of `q`
        Values.
    shape : (rows, columns)
        Cells of the grid; M is at most their number.
    window : int >= 0, or (rows, columns)
        Reach on each side, in cells, along both axes of the grid or each.
    mask : Mask or boolean array, optional
        Intersected with the rule above.
    **options
        As for `pyattn.attention`: ``causal`` (in the order of the tokens), ``bias``, ``scale``,
        ``dropout``, ``return_lse``, ...

    Returns
    -------
    array, shape (..., H, N, E), dtype of `q`
        Rows that see no key are 0. With ``return_lse`` a tuple, as for `pyattn.attention`.

    Raises
    ------
    ShapeError
        The grid has no cells, or fewer than there are tokens; a window of more than two axes.
    OptionError
        A reach below 0.

    Notes
    -----
    Time O(N * (2 window + 1)^2 * (D + E)) for the pairs, in tiles of 64 tokens: patches of 8 x 8
    cells, or such as fit the window, where these are fewer than tiles of whole rows (on 128 x 128
    cells, 2 times the pairs of a window of 8 and 11 times those of a window of 3); with padding
    always whole rows. Kept for backward are the arguments, the output and the lse. Differs from the
    paper: every cell stands in the middle of its own window, where Image Transformer's cells share
    the memory of their block.

    References
    ----------
    .. [1] Parmar et al., "Image Transformer", 2018, arXiv:1802.05751, section 3.3 (2-D local).
    .. [2] Ramachandran et al., "Stand-Alone Self-Attention in Vision Models", 2019,
       arXiv:1906.05909, section 3 (a window around each pixel).

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> x = np.random.default_rng(0).standard_normal((2, 4, 8))     # two heads, 2 x 2 cells
    >>> rows = pyattn.local_attention_2d(x, x, x, shape=(2, 2), window=(0, 1))
    >>> bool(np.allclose(rows[:, :2], pyattn.attention(x[:, :2], x[:, :2], x[:, :2])))
    True
    """
    pattern = masks.restrict(masks.window_2d(shape, window), mask)
    return attention.forward(q, k, v, mask=masks.plan(pattern, q.shape[-2], k.shape[-2]), **options)
