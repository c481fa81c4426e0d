"""BigBird: global tokens, a window of blocks and blocks drawn at random."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import masks
from ..arrays import Array
from ..checks import OptionError, require_integer, require_rng
from ..differentiable import differentiable
from .attention import attention
from .block_choice import BlockChoiceSaved, draw_blocks, heads_and_tokens, take_blocks


@differentiable
def bigbird_attention(q: Array, k: Array, v: Array, *, block_size: int = 64, num_random: int = 3,
                      num_global: int = 2, num_window: int = 3, extra_tokens: int = 0,
                      causal: bool | str = False, mask: Any = None, rng: Any = None,
                      decisions: dict[str, Any] | None = None, **options: Any) -> tuple[Any, Any]:
    """Blocks of queries see global blocks, the blocks around them and some drawn at random.

    Global blocks (the first and the last, say) see all blocks and are seen by all. Any other block
    of queries sees the `num_window` blocks around it, and in each head `num_random` more, drawn
    from those that are neither global nor in its window.
    E.g. ``block_size=1``, ``num_global=1``, ``num_window=1``, ``num_random=1``, five tokens, one
    draw: 0->{0, 1, 2, 3, 4}  1->{0, 1, 3}  2->{0, 1, 2}  3->{0, 3, 4}  4->{0, 2, 4}.

    Parameters
    ----------
    q : array, shape (..., H, N, D), float16, bfloat16, float32 or float64
        Queries.
    k : array, shape (..., G, N, D), dtype of `q`
        Keys of the same tokens; G divides H.
    v : array, shape (..., G, N, E), dtype of `q`
        Values.
    block_size : int >= 1
        Tokens in a block; the last block may be shorter.
    num_random : int >= 0
        Random blocks of each head and block of queries.
    num_global : int >= 0
        Global blocks, in turns from the front and from the back (ITC): 2 are the first and the
        last. With `causal` those at the back are dropped: no earlier query sees them.
    num_window : int >= 1, odd
        Blocks in the window, a block's own in the middle.
    extra_tokens : int >= 0
        The first so many tokens are global as well (ETC: put your extra tokens there). Blocks are
        counted from the first of them.
    causal : bool or "top_left"
        Intersect with ``j <= i``; a rule of ours, the paper has none.
    mask : Mask or boolean array, optional
        Intersected with the rule above.
    rng : int, numpy.random.Generator or None
        Where blocks, and the seed of dropout, are drawn from (`numpy.random.default_rng`).
    decisions : dict, optional
        What an earlier call drew, from its ``saved.decisions``: ``blocks`` (..., H, query blocks,
        num_random), numbers of key blocks, -1 for none, as in the rows of global blocks;
        ``dropout_seed``.
    **options
        As for `pyattn.attention`: ``bias``, ``scale``, ``kv_lengths``, ``dropout``,
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
        A negative number, a block of no tokens, or a window of an even number of blocks.

    Notes
    -----
    Time O(N * block_size * (num_global + num_window + num_random) * (D + E)). Kept for backward are
    the arguments, the output, the lse and the numbers of the blocks. A sequence of at most
    ``num_global + num_window + 2 num_random`` blocks has too few to draw from and is attended to
    densely, as in transformers; ``decisions["blocks"]`` then names none. Differs from the original
    code: random blocks are equally likely everywhere, where some of its plans, for the lengths of
    pretraining, draw from the front alone. Of ETC it is the pattern only: relative positions are
    a ``bias`` of yours.

    References
    ----------
    .. [1] Zaheer et al., "Big Bird: Transformers for Longer Sequences", 2020, arXiv:2007.14062,
       section 2 (the pattern, ITC and ETC) and appendix D (blocks).

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> x = np.random.default_rng(0).standard_normal((2, 10, 8))    # two heads, five blocks
    >>> out, saved = pyattn.bigbird_attention.forward(
    ...     x, x, x, block_size=2, num_global=1, num_window=1, num_random=1, rng=0)
    >>> saved.decisions["blocks"][:, 0].tolist()                    # the first block is global
    [[-1], [-1]]
    >>> bool(np.allclose(out[:, :2], pyattn.attention(x[:, :2], x, x)))
    True
    """
    heads, tokens = heads_and_tokens(q, k)
    size = require_integer("block_size", block_size, minimum=1)
    num_random = require_integer("num_random", num_random, minimum=0)
    num_global = require_integer("num_global", num_global, minimum=0)
    extra = min(require_integer("extra_tokens", extra_tokens, minimum=0), tokens)
    if require_integer("num_window", num_window, minimum=1) % 2 == 0:
        raise OptionError(f"num_window must be odd; got {num_window}")

    rows = -(-tokens // size)
    row = np.arange(rows)
    back = 0 if causal else num_global // 2
    is_global = (row < max((num_global + 1) // 2, extra // size)) | (row >= rows - back)
    blocks, decisions = take_blocks(decisions)
    if rows <= is_global.sum() + num_window + 2 * num_random:
        blocks = np.empty((heads, rows, 0), np.int64)
        pattern: masks.Mask = masks.full()
    else:
        window = row[:, None] + np.arange(num_window) - num_window // 2
        window = np.where((window >= 0) & (window < rows), window, -1)
        if blocks is None:
            rng = require_rng(rng)
            blocks = _draw(rng, heads, is_global, window, num_random)
        token = np.arange(tokens)
        everywhere = is_global[token // size] | (token < extra)
        pattern = (masks.block_lists(window, size) | masks.block_lists(blocks, size)
                   | masks.dense(everywhere) | masks.dense(everywhere[:, None]))
    out, saved = attention.forward(q, k, v, mask=masks.restrict(pattern, mask), causal=causal,
                                   rng=rng, decisions=decisions, **options)
    return out, BlockChoiceSaved(saved, blocks)


def _draw(rng: np.random.Generator, heads: int, is_global: np.ndarray, window: np.ndarray,
          count: int) -> np.ndarray:
    """Draw blocks (heads, rows, count) outside the window and the global blocks."""
    rows = len(is_global)
    drawn = np.full((heads, rows, count), -1)
    window = window[~is_global]
    window = np.where((window < 0) | is_global[window], rows, window)
    fixed = np.broadcast_to(np.flatnonzero(is_global), (len(window), is_global.sum()))
    excluded = np.sort(np.concatenate([window, fixed], axis=1), axis=1)
    drawn[:, ~is_global] = draw_blocks(rng, heads, excluded, rows, count)
    return drawn
