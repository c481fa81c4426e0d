"""Attention to blocks of keys drawn at random."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import masks
from ..arrays import Array
from ..checks import require_integer, require_rng
from ..differentiable import differentiable
from .attention import attention
from .block_choice import BlockChoiceSaved, draw_blocks, heads_and_tokens, take_blocks


@differentiable
def random_attention(q: Array, k: Array, v: Array, *, num_random: int, block_size: int = 64,
                     mask: Any = None, rng: Any = None, decisions: dict[str, Any] | None = None,
                     **options: Any) -> tuple[Any, Any]:
    """Each block of queries sees its own block of keys and some others, drawn at random.

    Every head and block of queries draws `num_random` other blocks, distinct, all equally likely.
    E.g. ``num_random=1``, ``block_size=1``, four tokens, one draw: 0->{0, 3}  1->{1, 2}
    2->{1, 2}  3->{0, 3}.

    Parameters
    ----------
    q : array, shape (..., H, N, D), float16, bfloat16, float32 or float64
        Queries.
    k : array, shape (..., G, N, D), dtype of `q`
        Keys of the same tokens; G divides H.
    v : array, shape (..., G, N, E), dtype of `q`
        Values.
    num_random : int >= 0
        Blocks beside its own that a block of queries sees; all, if there are fewer.
    block_size : int >= 1
        Tokens in a block; the last block may be shorter. With 1, each token draws for itself.
    mask : Mask or boolean array, optional
        Intersected with the rule above.
    rng : int, numpy.random.Generator or None
        Where blocks, and the seed of dropout, are drawn from (`numpy.random.default_rng`).
    decisions : dict, optional
        What an earlier call drew, from its ``saved.decisions``: ``blocks`` (..., H, query blocks,
        count), numbers of key blocks, -1 for none; ``dropout_seed``.
    **options
        As for `pyattn.attention`: ``causal``, ``bias``, ``scale``, ``kv_lengths``, ``dropout``,
        ``return_lse``, ...

    Returns
    -------
    array, shape (..., H, N, E), dtype of `q`
        Rows that see no key are 0. With ``return_lse`` a tuple, as for `pyattn.attention`.

    Raises
    ------
    ShapeError
        q and k are not of the same tokens, or blocks in `decisions` that these tokens do not have.
    OptionError
        A negative number of blocks, or a block of no tokens.

    Notes
    -----
    Time O(N * num_random * block_size * (D + E)), in tiles of 64 tokens: blocks of fewer visit
    tiles that are mostly masked. Kept for backward are the arguments, the output, the lse and the
    numbers of the blocks. With ``causal=True`` the draw is the same and later keys are masked.
    Differs from the paper: there, single keys are drawn, and BigBird joins them to windows and
    global tokens (`pyattn.bigbird_attention`); here a token always sees its own block, too.

    References
    ----------
    .. [1] Zaheer et al., "Big Bird", 2020, arXiv:2007.14062, section 2 (random attention).

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> x = np.random.default_rng(0).standard_normal((1, 4, 8))     # one head, four tokens
    >>> out, saved = pyattn.random_attention.forward(x, x, x, num_random=1, block_size=1, rng=0)
    >>> saved.decisions["blocks"].shape                             # (heads, blocks, count)
    (1, 4, 1)
    >>> again = pyattn.random_attention(x, x, x, num_random=1, block_size=1,
    ...                                 decisions=saved.decisions)
    >>> bool((again == out).all())
    True
    """
    num_random = require_integer("num_random", num_random, minimum=0)
    block_size = require_integer("block_size", block_size, minimum=1)
    heads, tokens = heads_and_tokens(q, k)
    num_blocks = -(-tokens // block_size)
    own = np.arange(num_blocks)[:, None]
    blocks, decisions = take_blocks(decisions)
    if blocks is None:
        rng = require_rng(rng)
        count = max(min(num_random, num_blocks - 1), 0)
        blocks = draw_blocks(rng, heads, own, num_blocks, count)
    pattern = masks.block_lists(blocks, block_size) | masks.block_lists(own, block_size)
    out, saved = attention.forward(q, k, v, mask=masks.restrict(pattern, mask), rng=rng,
                                   decisions=decisions, **options)
    return out, BlockChoiceSaved(saved, blocks)
