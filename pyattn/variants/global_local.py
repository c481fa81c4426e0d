"""A few global tokens, which see all and are seen by all, and local windows for the others."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from .. import arrays, masks
from ..arrays import Array
from ..checks import DtypeError, OptionError, ShapeError, require_integer
from ..differentiable import differentiable
from .attention import attention


@differentiable
def global_local_attention(q: Array, k: Array, v: Array, *, window: int | None = None,
                           global_index: Any = None, first: int = 0, last: int = 0,
                           token_ids: Any = None, global_ids: Collection[int] | None = None,
                           mask: Any = None, **options: Any) -> tuple[Any, Any]:
    """Each query sees the keys around it and the global tokens; a global token sees every key.

    Query i sees key j iff i or j is global, or ``|i - j| <= window``; with ``causal=True`` also
    ``j <= i``. Global are all tokens that any of `global_index`, `first`, `last` and `global_ids`
    names.
    E.g. ``global_index=[0]``, ``window=0``, four tokens: 0->{0, 1, 2, 3}  1->{0, 1}  2->{0, 2}
    3->{0, 3}.

    Parameters
    ----------
    q : array, shape (..., H, N, D), float16, bfloat16, float32 or float64
        Queries.
    k : array, shape (..., G, M, D), dtype of `q`
        Keys; G divides H.
    v : array, shape (..., G, M, E), dtype of `q`
        Values.
    window : int >= 0, optional
        Keys on each side. None: global attention alone, where other tokens see global ones only.
    global_index : sequence of int, or bool array (..., M), optional
        Positions of global tokens; or a boolean for each token, with batch axes if items differ.
    first, last : int >= 0
        The first and the last so many tokens are global: the last before ``kv_lengths``.
    token_ids : int array, shape (..., M), optional
        What each token is, with batch axes if items differ.
    global_ids : collection of int, optional
        Tokens of these ids are global, such as those of full stop and comma.
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
        A position that no key has, a negative count, `token_ids` without `global_ids` or the other
        way round, or what is said of single tokens together with ``segments``.
    DtypeError
        Positions or ids that are not integers.
    ShapeError
        `token_ids` or a boolean `global_index` that does not hold M tokens.

    Notes
    -----
    Time O(N * (window + global tokens) * (D + E)); scattered global tokens are gathered first. Kept
    for backward are the arguments, the output and the lse. Differs from the papers: global tokens
    share the projections of the others (`pyattn.longformer_attention` has separate ones); with
    ``segments``, positions and `first` count from the start of each sequence.

    References
    ----------
    .. [1] Beltagy et al., "Longformer", 2020, arXiv:2004.05150, section 3.1 (global attention).
    .. [2] Zaheer et al., "Big Bird", 2020, arXiv:2007.14062, section 2 (internal global tokens).
    .. [3] Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023,
       arXiv:2309.17453, section 3.2 (``first=4`` with a causal window).

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> x = np.random.default_rng(0).standard_normal((2, 4, 8))     # two heads, four tokens
    >>> out = pyattn.global_local_attention(x, x, x, window=0, first=1)
    >>> bool(np.allclose(out[:, :1], pyattn.attention(x[:, :1], x, x)))
    True
    >>> words = np.array([17, 4, 25, 3])                            # 3 and 4 are punctuation
    >>> pyattn.global_local_attention(x, x, x, token_ids=words, global_ids={3, 4}).shape
    (2, 4, 8)
    """
    if (token_ids is None) != (global_ids is None):
        raise OptionError("token_ids and global_ids must be given together")
    tokens = k.shape[-2]
    chosen = _listed(global_index, tokens)
    chosen = chosen | (np.arange(tokens) < require_integer("first", first, minimum=0))
    if require_integer("last", last, minimum=0):
        chosen = chosen | _last(last, tokens, options.get("kv_lengths"))
    if global_ids is not None:
        chosen = chosen | np.isin(_of_tokens("token_ids", token_ids, "iu", tokens),
                                  list(global_ids))
    of_storage = last or token_ids is not None or chosen.ndim > 1
    if of_storage and options.get("segments") is not None:
        raise OptionError("last, token_ids and batch axes cannot be combined with segments: "
                          "positions start anew in each segment; use global_index or first")
    pattern = _global(chosen)
    if window is not None:
        pattern = masks.window(window, window) | pattern
    pattern = masks.restrict(pattern, mask)
    return attention.forward(q, k, v, mask=masks.plan(pattern, q.shape[-2], tokens), **options)


def _listed(index: Any, tokens: int) -> np.ndarray:
    """Which tokens `global_index` names, (..., M)."""
    chosen = np.zeros(tokens, bool)
    if index is None:
        return chosen
    given = arrays.to_host(index) if hasattr(index, "dtype") else np.asarray(index)
    if given.dtype == bool:
        return _of_tokens("global_index", given, "b", tokens)
    if not given.size:
        return chosen
    if given.dtype.kind not in "iu":
        raise DtypeError(f"global_index must hold integers or booleans; got {given.dtype}")
    if given.ndim != 1:
        raise ShapeError(f"global_index must be a list of positions; got shape {given.shape}")
    if given.min() < 0 or given.max() >= tokens:
        raise OptionError(f"global_index must lie in 0..{tokens - 1}; got {given.min()}.."
                          f"{given.max()}")
    chosen[given] = True
    return chosen


def _of_tokens(name: str, values: Any, kinds: str, tokens: int) -> np.ndarray:
    """Return `values` (..., M) on the host."""
    given = arrays.to_host(values) if hasattr(values, "dtype") else np.asarray(values)
    if given.dtype.kind not in kinds:
        raise DtypeError(f"{name} must hold integers; got {given.dtype}")
    if given.shape[-1:] != (tokens,):
        raise ShapeError(f"{name} must be (..., M) with M = {tokens}; got {given.shape}")
    return given


def _last(count: int, tokens: int, kv_lengths: Any) -> np.ndarray:
    """Which tokens are the last `count` of their item, (..., M)."""
    lengths = tokens if kv_lengths is None else kv_lengths
    lengths = arrays.to_host(lengths) if hasattr(lengths, "dtype") else np.asarray(lengths)
    end = lengths[..., None] if lengths.ndim else lengths
    return (np.arange(tokens) >= end - count) & (np.arange(tokens) < end)


def _global(chosen: np.ndarray) -> masks.Mask:
    """Make the mask of tokens (..., M), each item of batch axes with its own."""
    if chosen.ndim == 1:
        return masks.global_tokens(np.flatnonzero(chosen))
    return masks.per_item(tuple(_global(item) for item in chosen))
