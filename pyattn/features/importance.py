"""Which blocks of keys matter to a query: by the weights it gives to compressed keys.

Letters: B batch items (all leading axes in one), H query heads, G key/value heads, N queries,
C compressed keys, D width. What is chosen is a constant of every backward.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from .. import arrays, dispatch
from ..arrays import Array
from ..checks import (
    DtypeError,
    OptionError,
    ShapeError,
    require_broadcast,
    require_choice,
    require_integer,
    require_real,
)
from ..masks.algebra import host_array
from .compression import complete_blocks


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a kernel module, ``pyattn.kernels.<backend>.importance``, is asked.

    ``forward(problem)`` returns lists of blocks, int32 (B, G, N, count) of the library of q,
    ascending and then -1; ``refuses(problem)`` says why it cannot, or None.
    """

    q: Array
    """(B, H, N, D)."""
    k: Array
    """(B, G, C, D), dtype of q."""
    lse: Array
    """(B, H, N): of each row over the compressed keys that it sees."""
    scale: float
    offset: np.ndarray
    """int32 (B,): position of query 0."""
    q_lengths: np.ndarray
    """int32 (B,)."""
    kv_lengths: np.ndarray
    """int32 (B,): tokens that are no padding."""
    complete: np.ndarray
    """int32 (B,): compressed keys that exist."""
    tokens: int
    block_size: int
    stride: int
    select_block: int
    count: int
    num_initial: int
    num_local: int
    causal: bool


def important_blocks(q: Array, k_compressed: Array, lse: Array, *, tokens: int, block_size: int,
                     stride: int, select_block: int, num_selected: int, num_initial: int = 1,
                     num_local: int = 2, causal: bool | str = True, q_lengths: Any = None,
                     kv_lengths: Any = None, scale: float | None = None) -> np.ndarray:
    """List for every query the blocks of keys that its group of heads weighs most.

    Compressed key c stands for tokens ``c * stride .. c * stride + block_size - 1``, and block j is
    tokens ``j * select_block .. (j + 1) * select_block - 1``. With ``p_c = exp(scale q.k_c - lse)``
    the weight of a compressed key, summed over the group's heads, the importance of block j is
    ``sum_c p_c * (tokens that c and j share) / stride``. Listed are the first `num_initial` blocks,
    the last `num_local` up to the query's own, and of the others the most important, up to
    `num_selected` in all; of equals the lowest. E.g. blocks of 2, ``num_selected=2, num_initial=1,
    num_local=1``: queries 0 and 1 list {0}, 2 and 3 {0, 1}, 4 and 5 {0, 2}.

    Parameters
    ----------
    q : array, shape (..., H, N, D), float16 / bfloat16 / float32 / float64
        Queries.
    k_compressed : array, shape (..., G, C, D), dtype of `q`
        Compressed keys; G divides H.
    lse : array, shape (..., H, N)
        Of every row over the compressed keys that it sees, -inf where it sees none.
    tokens : int
        How many tokens the compressed keys were made from.
    block_size, stride, select_block : int >= 1, tokens
    num_selected, num_initial, num_local : int
        Blocks in a list; of these the first ones and the nearest ones, at least 0.
    causal : bool or "top_left"
        A query sees the compressed keys whose last token is not after it, and lists no block that
        starts after it. Query i stands at ``i + tokens - N`` ("top_left": at i). If False,
        the `num_local` nearest are those on either side, ``2 num_local - 1`` with its own.
    q_lengths, kv_lengths : int or array of int, broadcasting to the leading axes, optional
        Tokens from here on are padding; the last query then stands at the last key.
    scale : float, default D ** -0.5

    Returns
    -------
    int32 array on the host, shape (..., G, N, count)
        ``count = min(num_selected, ceil(tokens / select_block))``; ascending, then -1 where there
        are fewer. Padded queries list none.

    Raises
    ------
    ShapeError, DtypeError, OptionError
        Arguments that do not fit, or more blocks that are always listed than `num_selected`.

    Notes
    -----
    Time O(N C D / 2) for H heads where causal, a part of what compressed attention itself takes;
    memory O(N count) beside tiles of 64 queries. A weight of NaN counts as 0. The paper's sum
    (equation 9) runs over other indices than its text; shared tokens are what the text says.

    References
    ----------
    .. [1] Yuan et al., "Native Sparse Attention", 2025, arXiv:2502.11089, section 3.3.2,
       equations 8-12.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features import important_blocks
    >>> q = k = np.ones((1, 6, 4))      # each token a compressed key of its own
    >>> lse = np.log(np.arange(1.0, 7)[None]) + 2
    >>> important_blocks(q, k, lse, tokens=6, block_size=1, stride=1, select_block=2,
    ...                  num_selected=2, num_initial=1, num_local=1)[0].T
    array([[ 0,  0,  0,  0,  0,  0],
           [-1, -1,  1,  1,  2,  2]], dtype=int32)
    """
    sizes = {name: require_integer(name, value, minimum=least) for name, value, least in (
        ("tokens", tokens, 0), ("block_size", block_size, 1), ("stride", stride, 1),
        ("select_block", select_block, 1), ("num_initial", num_initial, 0),
        ("num_local", num_local, 0))}
    causal = require_choice("causal", causal, (False, True, "top_left"))
    num_selected = require_choices(num_selected, num_initial, num_local, causal=causal is not False)
    batch = _check(q, k_compressed, lse, sizes)
    n, d = q.shape[-2:]
    scale = d ** -0.5 if scale is None else require_real("scale", scale)
    q_length = _lengths("q_lengths", q_lengths, batch, n)
    kv_length = _lengths("kv_lengths", kv_lengths, batch, tokens)
    offset = np.zeros_like(q_length) if causal == "top_left" else kv_length - q_length
    xp, items = arrays.namespace(q, k_compressed, lse), math.prod(batch)

    def flat(x: Array, axes: int) -> Array:
        tail = x.shape[x.ndim - axes:]
        if tuple(x.shape[:x.ndim - axes]) != batch:
            x = xp.broadcast_to(x, (*batch, *tail))
        return arrays.reshape(xp, x, (items, *tail))

    problem = Problem(
        flat(q, 3), flat(k_compressed, 3), flat(lse, 2), float(scale), offset, q_length, kv_length,
        complete_blocks(kv_length, block_size, stride).astype(np.int32),
        count=min(num_selected, -(-tokens // select_block)), causal=causal is not False, **sizes)
    found, = arrays.decided(dispatch.kernel("importance", problem, q).forward(problem))
    return found.reshape(*batch, k_compressed.shape[-3], n, problem.count)


def require_choices(num_selected: Any, num_initial: Any, num_local: Any, *, causal: bool) -> int:
    """Return `num_selected`, or raise OptionError if more blocks than that are always listed."""
    num_selected = require_integer("num_selected", num_selected, minimum=0)
    initial = require_integer("num_initial", num_initial, minimum=0)
    local = require_integer("num_local", num_local, minimum=0)
    forced = initial + (local if causal else max(2 * local - 1, 0))
    if forced > num_selected:
        raise OptionError(f"num_selected must be at least the {forced} blocks that are always "
                          f"listed (num_initial={initial}, num_local={local}, "
                          f"causal={causal}); got {num_selected}")
    return num_selected


def _check(q: Array, k: Array, lse: Array, sizes: dict[str, int]) -> tuple[int, ...]:
    """Check the arrays; the leading axes that they broadcast to."""
    if arrays.require_float("q", q) != arrays.require_float("k_compressed", k):
        raise DtypeError("q and k_compressed must share one dtype; got "
                         f"{arrays.dtype_name(q)} and {arrays.dtype_name(k)}")
    arrays.require_float("lse", lse)
    shapes = f"q {tuple(q.shape)}, k_compressed {tuple(k.shape)}, lse {tuple(lse.shape)}"
    if q.ndim < 3 or k.ndim < 3 or q.shape[-1] != k.shape[-1]:
        raise ShapeError(f"q and k_compressed must be (..., heads, tokens, D), with one D; got "
                         f"{shapes}")
    heads, groups = q.shape[-3], k.shape[-3]
    if heads % groups if groups else heads:
        raise ShapeError(f"H must be a multiple of G; got {shapes}")
    count = int(complete_blocks(sizes["tokens"], sizes["block_size"], sizes["stride"]))
    if k.shape[-2] != count:
        raise ShapeError(f"k_compressed must have {count} tokens, the blocks that lie within "
                         f"{sizes['tokens']}; got {shapes}")
    try:
        batch = np.broadcast_shapes(q.shape[:-3], k.shape[:-3])
    except ValueError:
        raise ShapeError(f"leading axes must broadcast; got {shapes}") from None
    require_broadcast("lse", tuple(lse.shape), (*batch, *q.shape[-3:-1]), "(..., H, N)")
    return batch


def _lengths(name: str, value: Any, batch: tuple[int, ...], limit: int) -> np.ndarray:
    given = host_array(limit if value is None else value)
    if given.size and given.dtype.kind not in "iu":
        raise OptionError(f"{name} must be integers; got {given.dtype}")
    require_broadcast(name, given.shape, batch, "the leading axes")
    if given.size and not (given.min() >= 0 and given.max() <= limit):
        raise ShapeError(f"{name} must lie in 0..{limit}; got {given.min()}..{given.max()}")
    return np.broadcast_to(given, batch).reshape(-1).astype(np.int32)
