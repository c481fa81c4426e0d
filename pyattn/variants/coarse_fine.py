"""Attention that is exact inside a block and sees other blocks by their means."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from .. import arrays, masks
from ..arrays import Array
from ..checks import ShapeError, require_choice, require_integer
from ..differentiable import Saved, differentiable, gradients
from ..engines.placement import first_position
from ..features.pooling import MeanPoolSaved, block_counts, mean_pool
from ..masks.algebra import FULL, within
from ..masks.placement import Positional
from ..masks.positions import FAR
from .attention import attention


@dataclasses.dataclass(frozen=True)
class CoarseFineSaved(Saved):
    """Attention over keys and pooled keys, and the poolings."""

    attended: Any
    pooled_k: MeanPoolSaved
    pooled_v: MeanPoolSaved

    @property
    def decisions(self) -> dict[str, Array]:
        """Those of the attention."""
        return self.attended.decisions

    @property
    def stats(self) -> dict[str, int]:
        """Those of the attention; a pooled key counts as one."""
        return self.attended.stats

    def backward(self, dout: Array, dlse: Array | None = None) -> Any:
        """Gradients of the array arguments given; keys and values get those of their means too."""
        found = self.attended.backward(dout, dlse)._asdict()
        del found["bias"]
        for name, pooled in (("k", self.pooled_k), ("v", self.pooled_v)):
            m = pooled.x.shape[-2]
            exact, coarse = found[name][..., :m, :], found[name][..., m:, :]
            found[name] = exact + pooled.backward(coarse).x
        return gradients(tuple(found))(**found)


@differentiable
def coarse_fine_attention(q: Array, k: Array, v: Array, *, block_size: int,
                          causal: bool | str = False, scale: float | Array | None = None,
                          softcap: float | None = None, sinks: Array | None = None,
                          dropout: float = 0.0, rng: Any = None, q_lengths: Any = None,
                          kv_lengths: Any = None, return_lse: bool = False,
                          decisions: dict[str, Any] | None = None) -> tuple[Any, CoarseFineSaved]:
    """Exact attention inside a block of tokens, and to the means of all other blocks.

    Tokens are cut into blocks of `block_size`. A query sees the keys of its own block, and for
    every other block c the mean of its keys and of its values, with ``log |c|`` added to the
    score, so that a mean weighs as much as the ``|c|`` keys it stands for; one softmax over all.
    E.g. four tokens in blocks a = {0, 1} and b = {2, 3}: 0->{0, 1, b}  1->{0, 1, b}
    2->{a, 2, 3}  3->{a, 2, 3}. With ``causal=True``: 0->{0}  1->{0, 1}  2->{a, 2}  3->{a, 2, 3}.

    Parameters
    ----------
    q : array, shape (..., H, N, D), float16, bfloat16, float32 or float64
        Queries.
    k : array, shape (..., G, M, D), dtype of `q`
        Keys; G divides H.
    v : array, shape (..., G, M, E), dtype of `q`
        Values.
    block_size : int >= 1, tokens
        About sqrt(M) costs least. The last block may be shorter.
    causal : bool or "top_left"
        A query sees its own block up to its own position, and earlier blocks, which are complete;
        positions as for `pyattn.attention`.
    scale, softcap, sinks, dropout, rng
        As for `pyattn.attention`; dropout drops a mean as a whole.
    q_lengths, kv_lengths : int or array of int, broadcasting to the leading axes, optional
        Tokens from here on are padding: they are in no mean. `kv_lengths` must broadcast to the
        leading axes of `k` and of `v`.
    return_lse : bool
        Also return the log-sum-exp of each row, (..., H, N).
    decisions : dict, optional
        What an earlier call drew, from its ``saved.decisions``: ``dropout_seed``.

    Returns
    -------
    array, shape (..., H, N, E), dtype of `q`
        With `return_lse` a tuple, as for `pyattn.attention`.

    Raises
    ------
    ShapeError, DtypeError, OptionError
        Arguments that do not fit; the message names the argument, the rule and what was given.

    Notes
    -----
    Time O(N (block_size + M / block_size) (D + E)), O(N sqrt(N)) at best. Kept for backward: the
    arguments, the keys and values with their means behind them, the output and the log-sum-exp.
    A key's gradient is that of its own score and its share, ``1 / |c|``, of the mean's. `mask` and
    `bias` are not taken: a mean has no pair of its own in them. The rule is not one paper's: local
    blocks are BlockBERT's [1]_, means for what is far are those of compressed attention [2]_, and
    the logarithm makes equal keys in each block give what dense attention gives.

    References
    ----------
    .. [1] Qiu et al., "Blockwise Self-Attention for Long Document Understanding", 2019,
       arXiv:1911.02972, section 3.
    .. [2] Liu et al., "Generating Wikipedia by Summarizing Long Sequences", 2018,
       arXiv:1801.10198, section 4.2.3 (there by strided convolution).

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> q, v = np.random.default_rng(0).standard_normal((2, 1, 6, 8))
    >>> k = np.repeat(np.eye(8)[None, :3], 2, axis=1)           # equal keys inside each block
    >>> out = pyattn.coarse_fine_attention(q, k, v, block_size=2)
    >>> np.allclose(out, pyattn.attention(q, k, v))
    True
    """
    if k.shape[-2:-1] != v.shape[-2:-1]:
        raise ShapeError(f"k and v must have equally many tokens; got k {tuple(k.shape)}, "
                         f"v {tuple(v.shape)}")
    pooled_k, saved_k = mean_pool.forward(k, block_size=block_size, lengths=kv_lengths)
    pooled_v, saved_v = mean_pool.forward(v, block_size=block_size, lengths=kv_lengths)
    xp, n, m = arrays.namespace(k, v), q.shape[-2], k.shape[-2]
    mask: masks.Mask = pattern(n, m, block_size=block_size, causal=causal,
                               offset=first_position(n, m, causal, q_lengths, kv_lengths))
    # 1 for each key, |c| for the mean of block c, 0 for what is padding
    counts = np.concatenate([block_counts(m, 1, kv_lengths),
                             block_counts(m, block_size, kv_lengths)], axis=-1)
    counts = counts[..., None, None, :] if counts.ndim > 1 else counts
    if kv_lengths is not None:
        mask = mask & masks.dense(counts > 0)
    bias = arrays.from_host(xp, np.log(np.maximum(counts, 1)), arrays.device(k))
    out, attended = attention.forward(
        q, xp.concat([k, pooled_k], axis=-2), xp.concat([v, pooled_v], axis=-2), mask=mask,
        bias=xp.astype(bias, arrays.accumulator(xp, k)), scale=scale, softcap=softcap, sinks=sinks,
        dropout=dropout, rng=rng, q_lengths=q_lengths, return_lse=return_lse, decisions=decisions)
    return out, CoarseFineSaved(attended, saved_k, saved_v)


def pattern(n: int, m: int, *, block_size: int, causal: bool | str = False,
            offset: Any = None) -> masks.plan:
    """Return the pairs that attend: m keys, and the means of their blocks behind them.

    Query i stands at position ``i + offset``, by default ``m - n``, or 0 if causal is "top_left".

    Examples
    --------
    >>> from pyattn.variants.coarse_fine import pattern
    >>> print(pattern(5, 5, block_size=2, causal=True).draw(5, 8))
    █·······
    ██······
    ··█··█··
    ··██·█··
    ····███·
    """
    causal = require_choice("causal", causal, (False, True, "top_left"))
    block_size = require_integer("block_size", block_size, minimum=1)
    if offset is None:
        offset = 0 if causal == "top_left" else m - n
    width = m + -(-m // block_size)
    # `fixed` without its summary columns is the block diagonal
    own = masks.fixed(block_size, 0) & masks.dense(np.arange(width) < m)
    if causal is not False:
        own = own & masks.causal()
    mask = own | pooled_blocks(block_size, m, causal is not False)
    return masks.plan(masks.placed(mask, offset), n, width)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class pooled_blocks(Positional):
    """Key ``first + c`` is the mean of block c: seen from outside the block, or from behind it."""

    block_size: int
    first: int
    causal: bool

    def allowed(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Tell by the query's block and the mean's."""
        block, mean = i // self.block_size, j - self.first
        return (mean >= 0) & (mean < block if self.causal else mean != block)

    def classify(self, i0: np.ndarray, i1: np.ndarray, j0: np.ndarray,
                 j1: np.ndarray) -> np.ndarray:
        """Tell by the range of differences of the two."""
        low, high = j0 - self.first, j1 - self.first
        apart = low - i1 // self.block_size, high - i0 // self.block_size
        seen = within(*apart, -FAR, -1) if self.causal else FULL - within(*apart, 0, 0)
        return np.minimum(within(low, high, 0, FAR), seen)

    def signature(self, i0: np.ndarray, j0: np.ndarray) -> tuple[np.ndarray, ...]:
        """Tell apart by places in a block, and by the difference of the two blocks."""
        mean = j0 - self.first
        return i0 % self.block_size, mean - i0 // self.block_size, np.minimum(mean, 0)
