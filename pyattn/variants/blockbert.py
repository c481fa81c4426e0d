"""Blockwise attention of BlockBERT: each head pairs blocks by a shift."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import masks
from ..arrays import Array
from ..checks import ShapeError, require_integer
from ..differentiable import differentiable
from .attention import attention
from .block_choice import heads_and_tokens


@differentiable
def blockbert_attention(q: Array, k: Array, v: Array, *, num_blocks: int,
                        shifts: Sequence[int] | None = None, mask: Any = None,
                        **options: Any) -> tuple[Any, Any]:
    """Each head splits the sequence into n blocks, and block b of queries sees one block of keys.

    In head h, block b of queries sees block ``(b + shifts[h]) % n`` of keys: a shift of 0 is
    attention inside the blocks.
    E.g. ``num_blocks=2``, four tokens, a head of shift 0: 0->{0, 1}  1->{0, 1}  2->{2, 3}
    3->{2, 3}; of shift 1: 0->{2, 3}  1->{2, 3}  2->{0, 1}  3->{0, 1}.

    Parameters
    ----------
    q : array, shape (..., H, N, D), float16, bfloat16, float32 or float64
        Queries.
    k : array, shape (..., G, N, D), dtype of `q`
        Keys of the same tokens; G divides H.
    v : array, shape (..., G, N, E), dtype of `q`
        Values.
    num_blocks : int >= 1
        n; a block has ``ceil(N / n)`` tokens, and the last ones may be shorter or empty.
    shifts : sequence of H int, optional
        By default a sixth of the heads, at least one, for each shift from 1 to n - 1, and shift 0
        for the others, at least one: with 12 heads 10:2 for n = 2, and 8:2:2 for n = 3.
    mask : Mask or boolean array, optional
        Intersected with the rule above.
    **options
        As for `pyattn.attention`: ``causal``, ``bias``, ``scale``, ``kv_lengths``, ``dropout``,
        ``return_lse``, ...

    Returns
    -------
    array, shape (..., H, N, E), dtype of `q`
        Rows that see no key, such as those paired with an empty block, are 0. With ``return_lse`` a
        tuple, as for `pyattn.attention`.

    Raises
    ------
    ShapeError
        q and k are not of the same tokens, or the shifts are not as many as the heads.
    OptionError
        Fewer than one block, or a shift that is no integer.

    Notes
    -----
    Time O(N^2 / n * (D + E)). Kept for backward are the arguments, the output and the lse. Differs
    from the paper: N need not be a multiple of n; the paper allows any permutation of the blocks,
    and uses shifts.

    References
    ----------
    .. [1] Qiu et al., "Blockwise Self-Attention for Long Document Understanding", 2019,
       arXiv:1911.02972, section 3 (blocks and their permutations).

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> x = np.random.default_rng(0).standard_normal((2, 4, 8))     # two heads, four tokens
    >>> out = pyattn.blockbert_attention(x, x, x, num_blocks=2)     # shifts (0, 1)
    >>> bool(np.allclose(out[1, :2], pyattn.attention(x[1:, :2], x[1:, 2:], x[1:, 2:])))
    True
    """
    n = require_integer("num_blocks", num_blocks, minimum=1)
    heads, tokens = heads_and_tokens(q, k)
    if shifts is None:
        shifts = _distribute(heads, n)
    elif len(shifts) != heads:
        raise ShapeError(f"shifts must hold one number for each head of q; got {len(shifts)}, q is "
                         f"{tuple(q.shape)}")
    steps = np.array([require_integer("shifts", shift) for shift in shifts], np.int64)
    block_size = max(-(-tokens // n), 1)
    filled = -(-tokens // block_size)
    paired = (np.arange(filled) + steps[:, None]) % n
    pattern = masks.block_lists(np.where(paired < filled, paired, -1)[..., None], block_size)
    return attention.forward(q, k, v, mask=masks.restrict(pattern, mask), **options)


def _distribute(heads: int, num_blocks: int) -> list[int]:
    """Shifts of the heads, most of them 0."""
    shifted = np.repeat(np.arange(1, num_blocks), max(heads // 6, 1))[:max(heads - 1, 0)]
    return [0] * (heads - len(shifted)) + shifted.tolist()
