"""Scaled dot-product attention, dense and masked: the frame that all softmax variants share."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from .. import arrays, masks
from ..arrays import Array
from ..checks import OptionError, require_broadcast, require_choice, require_integer
from ..differentiable import Saved, differentiable, gradients
from ..engines import softmax

CAUSAL = masks.causal()


@dataclasses.dataclass(frozen=True)
class AttentionSaved(Saved):
    """The engine's record, and the ALiBi slopes that made its offset table."""

    softmax: softmax.SoftmaxSaved
    alibi_slopes: Array

    @property
    def decisions(self) -> dict[str, Array]:
        """Those of the engine."""
        return self.softmax.decisions

    @property
    def stats(self) -> dict[str, int]:
        """Those of the engine."""
        return self.softmax.stats

    def backward(self, dout: Array, dlse: Array | None = None) -> Any:
        """Gradients of the array arguments given, ``alibi_slopes`` last."""
        found = self.softmax.backward(dout, dlse)._asdict()
        xp = arrays.namespace(self.alibi_slopes)
        table = found.pop("offsets")
        # forward: offsets = -slope |distance|
        reach = _reach(xp, self.softmax.placement.distances, table)
        slopes = -xp.sum(table * reach[None, :], axis=1)
        slopes = xp.reshape(slopes, self.alibi_slopes.shape)
        return gradients((*found, "alibi_slopes"))(
            **found, alibi_slopes=arrays.cast(xp, slopes, self.alibi_slopes.dtype))


def _reach(xp: Any, distances: np.ndarray, like: Array) -> Array:
    return xp.astype(arrays.from_host(xp, np.abs(distances), arrays.device(like)), like.dtype)


@differentiable
def attention(q: Array, k: Array, v: Array, *, mask: Any = None, bias: Array | None = None,
              gate: Array | None = None, causal: bool | str = False,
              window: int | tuple[int | None, int | None] | None = None,
              scale: float | Array | None = None, softcap: float | None = None,
              sinks: Array | None = None, alibi_slopes: Array | None = None, dropout: float = 0.0,
              rng: Any = None, q_lengths: Any = None, kv_lengths: Any = None, segments: Any = None,
              return_lse: bool = False, return_weights: bool = False,
              decisions: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """Scaled dot-product attention: each query averages the values of the keys it may see.

    ``out_i = sum_j p_ij v_j`` with ``p_i = softmax_j(scale q_i.k_j)`` over the allowed keys. The
    order of the terms is fixed::

        scale * q.k -> softcap -> + bias -> x gate / mask -> softmax with sinks -> dropout

    With ``causal=True`` and four tokens: 0 sees {0}, 1 sees {0, 1}, 2 sees {0, 1, 2}, 3 sees all;
    with ``window=1`` as well, 3 sees {2, 3}.

    Parameters
    ----------
    q : array, shape (..., H, N, D), float16, bfloat16, float32 or float64
        Queries. Leading axes are batch axes and broadcast; strided views are read in place.
    k : array, shape (..., G, M, D), dtype of `q`
        Keys. G divides H; query head h reads key head ``h // (H // G)``, without a copy
        (grouped-query attention; G = 1 is multi-query).
    v : array, shape (..., G, M, E), dtype of `q`
        Values, whose width may differ from that of the keys.
    mask : Mask, BlockMask or boolean array broadcasting to (..., H, N, M), optional
        Which pairs are allowed (True = may attend), see `pyattn.masks`. Intersected with `causal`
        and `window`. A boolean array is read on the host.
    bias : array broadcasting to (..., H, N, M), any float dtype, optional
        Added to the scores after `softcap`. A bias of -inf masks.
    gate : array broadcasting to (..., H, N, M), values in [0, 1], any float dtype, optional
        Multiplies the exponentials inside the softmax; its gradient is finite at 0, where a
        logarithm added as a bias would have none.
    causal : bool or "top_left", default False
        True: query i stands at position ``i + M - N`` and sees keys up to its own position, so the
        last query sees every key. "top_left": query i stands at position i.
    window : int or (left, right), tokens, optional
        Keys within ``|i - j| <= window`` of the query's position (with `causal`,
        ``0 <= i - j <= window``); a pair gives each side its own reach, None for no limit.
    scale : float or array of shape (H,), default D ** -0.5
        As an array it has a gradient.
    softcap : float, optional
        Scores become ``softcap * tanh(scores / softcap)``.
    sinks : array, shape (H,), optional
        A logit for each head that joins every row's denominator and carries no value.
    alibi_slopes : array, shape (H,), optional
        Adds ``-slope |i - j|`` by positions.
    dropout : float in [0, 1), default 0
        Probability that a weight becomes 0; the others grow by ``1 / (1 - dropout)``. The draw
        depends on the seed, the sequence, the head and the positions alone.
    rng : int, numpy.random.Generator or None
        Where the seed of dropout comes from (`numpy.random.default_rng`).
    q_lengths, kv_lengths : int or array of int, broadcasting to the leading axes, optional
        Tokens from here on are padding: padded keys are masked, padded queries see no key.
        Positions then align each item's last query with its last key.
    segments : list of int, or a pair of lists, optional
        Packed sequences of these lengths along N and M (or their cumulative lengths, from 0):
        each attends to itself alone, and its positions start at 0.
    return_lse : bool
        Also return the log-sum-exp of each row, (..., H, N), natural logarithm, float32 (float64
        for float64), sinks included.
    return_weights : bool
        Also return the weights before dropout, (..., H, N, M), dtype of `q`: an array that is
        otherwise never made, and that has no gradient here.
    decisions : dict, optional
        What an earlier call drew, from its ``saved.decisions``: ``dropout_seed``.

    Returns
    -------
    array, shape (..., H, N, E), dtype of `q`
        Rows that see no key are 0, and their lse is -inf (or the sink). With `return_lse` or
        `return_weights`, a tuple that holds them behind the output.

    Raises
    ------
    ShapeError, DtypeError, OptionError
        Arguments that do not fit; the message names the argument, the rule and what was given.
    BackendError
        Arrays of different libraries or devices, or a forced backend that cannot run the call.

    Notes
    -----
    ``attention.forward(...)`` returns ``(out, saved)`` (``((out, lse), saved)`` with `return_lse`);
    ``saved.backward(dout, dlse)`` gives the gradients of the array arguments, in their order.
    Time O(pairs * (D + E)), counted in 64 x 64 tiles: tiles that the mask leaves empty are not
    visited. Memory O(N + M) beside the operands; kept for backward are the arguments, the output
    and the lse, by reference: do not write to them between the two passes. A NaN or inf in a key
    or value reaches only queries that may see it.

    References
    ----------
    .. [1] Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762, section 3.2.1.
    .. [2] Dao, "FlashAttention-2", 2023, arXiv:2307.08691, section 3.1.
    .. [3] Shazeer, "Fast Transformer Decoding", 2019, arXiv:1911.02150 (multi-query);
       Ainslie et al., "GQA", 2023, arXiv:2305.13245 (grouped-query).
    .. [4] Press et al., "Train Short, Test Long", 2022, arXiv:2108.12409, section 3 (ALiBi).
       For queries before keys the paper has no rule; the distance counts here.

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> x = np.arange(12.0).reshape(1, 4, 3)           # one head, four tokens
    >>> pyattn.attention(x, x, x, causal=True).shape
    (1, 4, 3)
    >>> out, saved = pyattn.attention.forward(x, x, x, causal=True, return_lse=True)
    >>> saved.backward(np.ones((1, 4, 3)), np.zeros((1, 4))).q.shape
    (1, 4, 3)
    """
    return attend(
        q, k, v, mask=mask, causal=causal, window=window, alibi_slopes=alibi_slopes, bias=bias,
        gate=gate, scale=scale, softcap=softcap, sinks=sinks, dropout=dropout, rng=rng,
        q_lengths=q_lengths, kv_lengths=kv_lengths, segments=segments, return_lse=return_lse,
        return_weights=return_weights, decisions=decisions)


def attend(q: Array, k: Array, v: Array, *, mask: Any = None, causal: bool | str = False,
           window: Any = None, alibi_slopes: Array | None = None, offsets: Any = None,
           **options: Any) -> tuple[Any, Any]:
    """The forward of `attention`, for callers who also have an `order` for the engine.

    Or a form of the gate, or `offsets` that are not those of ALiBi.
    """
    causal = require_choice("causal", causal, (False, True, "top_left"))
    if causal is not False or window is not None:
        mask = intersected(mask, _pattern(causal, window))
    if alibi_slopes is not None:
        arrays.require_float("alibi_slopes", alibi_slopes)
        require_broadcast("alibi_slopes", alibi_slopes.shape, tuple(q.shape[-3:-2]), "(H,)")
        xp = arrays.namespace(q, alibi_slopes)
        slopes = xp.astype(alibi_slopes, arrays.accumulator(xp, q))

        def offsets(distances: np.ndarray) -> Array:
            return -xp.reshape(slopes, (-1, 1)) * _reach(xp, distances, slopes)[None, :]

    out, saved = softmax.forward(
        q, k, v, mask=mask, alignment="top_left" if causal == "top_left" else "bottom_right",
        offsets=offsets, **options)
    return out, saved if alibi_slopes is None else AttentionSaved(saved, alibi_slopes)


def _pattern(causal: bool | str, window: Any) -> masks.Mask:
    """The mask that `causal` and `window` describe together."""
    if window is None:
        return CAUSAL
    pair = window if isinstance(window, tuple | list) else (window, window)
    if len(pair) != 2:
        raise OptionError(f"window must be an integer or a pair (left, right); got {window}")
    left, right = pair
    left, right = (None if reach is None else require_integer("window", reach, minimum=0)
                   for reach in (left, right))
    if causal is not False:
        if isinstance(window, tuple | list) and right not in (None, 0):
            raise OptionError(f"a causal window reaches to the left only; got window={window}")
        right = 0
    return _window(left, right)


@functools.lru_cache(256)
def _window(left: int | None, right: int | None) -> masks.Mask:
    """Make the mask once: equal masks are found faster when they are the same object."""
    return masks.window(left, right)


def intersected(mask: Any, pattern: masks.Mask) -> masks.Mask:
    """Return what a pattern allows and `mask`, too: a Mask, a boolean array, or None."""
    if mask is None:
        return pattern
    if not isinstance(mask, masks.Mask):
        mask = masks.dense(arrays.to_host(mask))
    return mask & pattern
