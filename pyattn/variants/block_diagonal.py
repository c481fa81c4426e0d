"""Attention inside blocks of tokens, each on its own."""

from __future__ import annotations

from typing import Any

from .. import masks
from ..arrays import Array
from ..differentiable import differentiable
from .attention import attention


@differentiable
def block_diagonal_attention(q: Array, k: Array, v: Array, *, block_size: int, mask: Any = None,
                             **options: Any) -> tuple[Any, Any]:
    """Each query sees the keys of its own block.

    Query i sees key j iff ``i // block_size == j // block_size``; the last block may be shorter.
    E.g. ``block_size=2``, four tokens: 0->{0, 1}  1->{0, 1}  2->{2, 3}  3->{2, 3}.

    Parameters
    ----------
    q : array, shape (..., H, N, D), float16, bfloat16, float32 or float64
        Queries.
    k : array, shape (..., G, M, D), dtype of `q`
        Keys; G divides H.
    v : array, shape (..., G, M, E), dtype of `q`
        Values.
    block_size : int >= 1
        Tokens in a block, counted by position: query i stands at ``i + M - N``.
    mask : Mask or boolean array, optional
        Intersected with the rule above.
    **options
        As for `pyattn.attention`: ``causal``, ``bias``, ``scale``, ``dropout``, ``return_lse``, ...

    Returns
    -------
    array, shape (..., H, N, E), dtype of `q`
        Rows that see no key are 0. With ``return_lse`` a tuple, as for `pyattn.attention`.

    Raises
    ------
    OptionError
        A block of no tokens.

    Notes
    -----
    Time O(N * block_size * (D + E)), in tiles of 64 tokens. Kept for backward are the arguments,
    the output and the lse. Differs from the paper: there, a block of queries sees a longer block of
    keys, which begins before it.

    References
    ----------
    .. [1] Parmar et al., "Image Transformer", 2018, arXiv:1802.05751, section 3.3 (1-D local).

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> x = np.random.default_rng(0).standard_normal((2, 4, 8))     # two heads, four tokens
    >>> out = pyattn.block_diagonal_attention(x, x, x, block_size=2)
    >>> bool(np.allclose(out[:, :2], pyattn.attention(x[:, :2], x[:, :2], x[:, :2])))
    True
    """
    # with no columns of other blocks, `fixed` is the block alone
    pattern = masks.restrict(masks.fixed(block_size, 0), mask)
    return attention.forward(q, k, v, mask=pattern, **options)
