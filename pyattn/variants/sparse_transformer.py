"""The factorised patterns of the Sparse Transformer."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import masks
from ..arrays import Array
from ..checks import OptionError, ShapeError, require_choice, require_integer, require_rng
from ..differentiable import differentiable
from .attention import attention
from .block_choice import BlockChoiceSaved, draw_blocks, heads_and_tokens, take_blocks


@differentiable
def sparse_transformer_attention(q: Array, k: Array, v: Array, *, stride: int,
                                 mode: str = "strided", columns: int = 1, num_random: int = 1,
                                 heads: str = "merged", causal: bool | str = True,
                                 mask: Any = None, rng: Any = None,
                                 decisions: dict[str, Any] | None = None,
                                 **options: Any) -> tuple[Any, Any]:
    """Each query sees keys near by, and a few that stand for those far away.

    Query i sees earlier keys, ``j <= i``, by two patterns:

    - strided: ``i - j < stride``, and ``(i - j) % stride == 0``;
    - fixed: those of its own block, ``i // stride == j // stride``, and the last `columns` keys of
      each earlier block;
    - random_local: ``i - j < stride``, and `num_random` blocks of `stride` keys, drawn at random
      for each head and block of queries.

    Merged heads see the keys of both; split, even heads see by the first and odd ones by the
    second. In two steps each query reaches every earlier key, strided or fixed.
    E.g. ``stride=2``, four tokens, strided and merged: 0->{0}  1->{0, 1}  2->{0, 1, 2}
    3->{1, 2, 3}; fixed: 0->{0}  1->{0, 1}  2->{1, 2}  3->{1, 2, 3}.

    Parameters
    ----------
    q : array, shape (..., H, N, D), float16, bfloat16, float32 or float64
        Queries.
    k : array, shape (..., G, M, D), dtype of `q`
        Keys; G divides H. For random_local, those of the same tokens.
    v : array, shape (..., G, M, E), dtype of `q`
        Values.
    stride : int >= 1
        Tokens; near the square root of N both patterns cost the same.
    mode : {"strided", "fixed", "random_local"}
        Strided suits what is periodic, such as images by rows; fixed suits text.
    columns : int, 0 to stride
        For fixed: the keys at the end of a block that later blocks see.
    num_random : int >= 0
        For random_local: blocks drawn; all others, if there are fewer.
    heads : {"merged", "split"}
        Whether every head sees by both patterns, or each by one.
    causal : bool or "top_left", default True
        False drops ``j <= i``: the window then reaches to both sides, and later blocks are seen as
        earlier ones are.
    mask : Mask or boolean array, optional
        Intersected with the rule above.
    rng : int, numpy.random.Generator or None
        Where blocks, and the seed of dropout, are drawn from (`numpy.random.default_rng`).
    decisions : dict, optional
        What an earlier call drew, from its ``saved.decisions``: for random_local ``blocks``
        (H, query blocks, count), numbers of key blocks, -1 for none; ``dropout_seed``.
    **options
        As for `pyattn.attention`: ``bias``, ``scale``, ``kv_lengths``, ``dropout``,
        ``return_lse``, ...

    Returns
    -------
    array, shape (..., H, N, E), dtype of `q`
        Rows that see no key are 0, such as those of the first block in odd heads, where heads are
        split and fixed. With ``return_lse`` a tuple, as for `pyattn.attention`.

    Raises
    ------
    OptionError
        A stride below 1, columns outside 0..stride, an unknown mode, or no "merged" or "split".
    ShapeError
        For random_local, q and k that are not of the same tokens, or blocks in `decisions` that
        these tokens do not have.

    Notes
    -----
    Time O(N * (stride + N / stride) * (D + E)), O(N sqrt(N)) at best: tokens a stride apart are
    regrouped. Kept for backward are the arguments, the output and the lse, and the numbers of
    random blocks. Differs from the paper: the second fixed pattern leaves a query's own block out
    (the paper's holds its last columns too); the vertical columns are the same in all heads; layers
    that alternate are calls that alternate in ``mask``. The paper has no random_local: it is a mode
    of ours, for those who want a random pattern beside the local one.

    References
    ----------
    .. [1] Child et al., "Generating Long Sequences with Sparse Transformers", 2019,
       arXiv:1904.10509, section 4.2 (factorised self-attention), 4.3 (strided and fixed), 5.1
       (merged heads, and heads with a pattern each).

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> x = np.random.default_rng(0).standard_normal((2, 9, 8))     # two heads, nine tokens
    >>> out = pyattn.sparse_transformer_attention(x, x, x, stride=3)
    >>> dense = pyattn.attention(x, x, x, causal=True)
    >>> bool(np.allclose(out[:, :4], dense[:, :4]))                 # 4 is the first to miss one
    True
    """
    require_choice("mode", mode, ("strided", "fixed", "random_local"))
    require_choice("heads", heads, ("merged", "split"))
    stride = require_integer("stride", stride, minimum=1)
    if not 0 <= require_integer("columns", columns) <= stride:
        raise OptionError(f"columns must lie in 0..stride = 0..{stride}; got {columns}")
    blocks = None
    near: masks.Mask = masks.window(stride - 1, stride - 1)
    if mode == "strided":
        far: masks.Mask = masks.strided(stride)
    elif mode == "fixed":
        near = masks.fixed(stride, 0)
        far = masks.fixed(stride, columns) & ~near
    else:
        num_heads, tokens = heads_and_tokens(q, k)
        own = np.arange(-(-tokens // stride))[:, None]
        blocks, decisions = take_blocks(decisions)
        if blocks is None:
            rng = require_rng(rng)
            count = max(min(require_integer("num_random", num_random, minimum=0), len(own) - 1), 0)
            blocks = draw_blocks(rng, num_heads, own, len(own), count)
        if blocks.ndim > 3:
            raise ShapeError(f"blocks must be (H, query blocks, count); got {blocks.shape}")
        far = masks.block_lists(blocks, stride)

    if heads == "merged":
        pattern = near | far
    else:
        pattern = masks.per_head(tuple(far.pick((head,)) if head % 2 else near
                                       for head in range(q.shape[-3])))
    pattern = masks.plan(masks.restrict(pattern, mask), q.shape[-2], k.shape[-2])
    out, saved = attention.forward(q, k, v, mask=pattern, causal=causal, rng=rng,
                                   decisions=decisions, **options)
    return out, saved if blocks is None else BlockChoiceSaved(saved, blocks)
