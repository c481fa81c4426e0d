"""Attention among tokens that hash alike (Reformer)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..checks import (
    DtypeError,
    OptionError,
    ShapeError,
    require_decisions,
    require_flag,
    require_integer,
    require_real,
    require_rng,
)
from ..differentiable import ON_HOST, Saved, differentiable, gradients
from ..engines import softmax
from ..engines.placement import place
from ..features.hashing import MOST_BUCKETS, hashed, require_buckets
from ..features.normalise import UnitLengthSaved, unit_length
from ..features.padding import without_padding
from ..features.regrouping import Regrouped, regroup, sorted_tokens
from ..masks.algebra import host_array
from ..masks.tiled import Listing, Round, between, rounds


@dataclasses.dataclass(frozen=True)
class LshSaved(Saved):
    """What the engine keeps, and what made unit-length keys."""

    attended: softmax.SoftmaxSaved
    unit: UnitLengthSaved
    buckets: np.ndarray = dataclasses.field(metadata=ON_HOST)

    @property
    def decisions(self) -> dict[str, Array]:
        """``buckets``, int32 (..., H, rounds, N), and the engine's."""
        return {"buckets": self.buckets, **self.attended.decisions}

    @property
    def stats(self) -> dict[str, int]:
        """Those of the engine; pairs count as often as they are met."""
        return self.attended.stats

    def backward(self, dout: Array, dlse: Array | None = None) -> Any:
        """Gradients of qk and v."""
        qk, rows = self.unit.x, self.attended.lse.shape
        xp = arrays.namespace(qk)
        dlse = None if dlse is None else arrays.reshape(xp, dlse, rows)
        found = self.attended.backward(arrays.reshape(xp, dout, (*rows, dout.shape[-1])), dlse)
        # forward: q = qk, k = qk / |qk|
        through_keys = self.unit.backward(arrays.reshape(xp, found.k, qk.shape)).x
        dqk = arrays.reshape(xp, found.q, qk.shape) + through_keys
        return gradients(("qk", "v"))(dqk, arrays.reshape(xp, found.v, dout.shape))


@differentiable
def lsh_attention(qk: Array, v: Array, *, num_rounds: int = 8, bucket_length: int = 64,
                  num_buckets: int | tuple[int, ...] | None = None,
                  attend_across_buckets: bool = True, deduplicate: bool = False,
                  causal: bool = False, reference: bool = False, scale: float | None = None,
                  kv_lengths: Any = None, softcap: float | None = None, dropout: float = 0.0,
                  rng: Any = None, return_lse: bool = False,
                  decisions: dict[str, Any] | None = None) -> tuple[Any, LshSaved]:
    """Attention of each token to tokens that random rotations hash into its bucket.

    Queries are keys: ``score_ij = scale q_i.q_j / |q_j|``. In each of several rounds tokens are
    hashed anew and sorted by bucket, those of a bucket by position, and the rounds are merged as if
    their keys were one softmax's. A token does not see itself, unless it sees no other in any
    round. With buckets (0, 1, 0, 1) of four tokens, in order 0 2 1 3:

    - ``causal=True``: the last `bucket_length` members of its bucket up to itself: 2 sees {0},
      3 sees {1}, and 0 and 1, which see no other, themselves. Nothing depends on later tokens.
    - otherwise, for ``bucket_length=2``: chunks of that many tokens in that order, each of which
      sees itself and the chunk before, the first the last: all see all others here.

    Parameters
    ----------
    qk : array, shape (..., H, N, D), float16, bfloat16, float32 or float64
        Queries, and before they are divided by their lengths, keys.
    v : array, shape (..., H, N, E), dtype of `qk`
        Values.
    num_rounds : int, >= 1
        How often tokens are hashed.
    bucket_length : int, >= 1, tokens
        Length of a chunk, or how far back a token sees in its bucket.
    num_buckets : int or tuple of int, even, optional
        Buckets of a round, of several numbers the product (see `pyattn.features.lsh_hash`). By
        default as many as make buckets of `bucket_length` on average; as it depends on N, give
        it where streams of different lengths are compared.
    attend_across_buckets : bool
        Whether tokens of a chunk see those of other buckets there.
    deduplicate : bool
        Whether a key that is met in several rounds counts once; else it counts each time.
    causal : bool
        Whether keys stand before their queries.
    reference : bool
        Do as the original does, which lets later tokens move the chunks' edges even if causal, and
        shows the first chunk of a round the last chunk of the round before.
    scale : float, optional
        1 by default, as in the paper; some implementations have D ** -0.5.
    kv_lengths : int or array of int, broadcasting to the leading axes, optional
        Tokens from here on are padding, as queries too.
    softcap, dropout, return_lse
        As for `pyattn.attention`; rounds draw alike.
    rng : int, numpy.random.Generator or None
        Where rotations, and the seed of dropout, come from.
    decisions : dict, optional
        What an earlier call drew, from its ``saved.decisions``: ``buckets``, int
        (..., H, num_rounds, N), and ``dropout_seed``.

    Returns
    -------
    array, shape (..., H, N, E), dtype of `qk`
        With `return_lse` a tuple, as for `pyattn.attention`.

    Raises
    ------
    ShapeError, DtypeError, OptionError
        Arguments that do not fit; the message names the argument, the rule and what was given.

    Notes
    -----
    Time O(num_rounds N (bucket_length (D + E) + D num_buckets)), memory O(num_rounds N) beside the
    operands. Kept for backward: the arguments, the keys, the output, the log-sum-exp, each round's
    order and the bits of its tiles. Buckets are constants of the backward. Later tokens of a causal
    call move where a query's keys are cut into tiles, and so, if anything, its last bit. With
    padding, an item's chunks are those of the item alone. Different from [1]_: a causal call is
    strictly so, where the original shows each query its chunk, whose edges later tokens move; a
    round's first chunk looks back into its own round; a single chunk is not seen twice; and a token
    sees itself by rule, not by a score of -1e5. `reference` undoes the first three.

    References
    ----------
    .. [1] Kitaev, Kaiser, Levskaya, "Reformer: The Efficient Transformer", 2020,
       arXiv:2001.04451, section 2.

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> qk, v = np.random.default_rng(0).standard_normal((2, 1, 4, 8))
    >>> out, saved = pyattn.lsh_attention.forward(qk, v, causal=True, num_rounds=2, rng=0)
    >>> np.array_equal(out[0, 0], v[0, 0])      # the first token has itself alone
    True
    >>> saved.decisions["buckets"].shape
    (1, 2, 4)
    """
    causal = require_flag("causal", causal)
    bucket_length = require_integer("bucket_length", bucket_length, minimum=1)
    num_rounds = require_integer("num_rounds", num_rounds, minimum=1)
    reference = require_flag("reference", reference)
    across = require_flag("attend_across_buckets", attend_across_buckets)
    deduplicate = require_flag("deduplicate", deduplicate)
    return_lse = require_flag("return_lse", return_lse)
    scale = 1.0 if scale is None else require_real("scale", scale)
    xp = arrays.namespace(qk, v)
    dtypes = arrays.require_float("qk", qk), arrays.require_float("v", v)
    if dtypes[0] != dtypes[1]:
        raise DtypeError("qk and v must share one dtype; got qk {}, v {}".format(*dtypes))
    for name, x in (("qk", qk), ("v", v)):
        if x.ndim < 3 or x.shape[:-1] != qk.shape[:-1] or not x.shape[-1]:
            raise ShapeError(f"{name} must be (..., H, N, width) with the leading axes, heads and "
                             "tokens of qk, and a width of at least 1; got qk "
                             f"{tuple(qk.shape)}, v {tuple(v.shape)}")
    *batch, heads, n, _width = qk.shape
    # a longer chunk holds no more
    bucket_length = min(bucket_length, max(1, n))
    generator = require_rng(rng)
    decisions = require_decisions(decisions, ("buckets", *softmax.DECISIONS))
    buckets, tokens = decisions.pop("buckets", None), None
    placement = place(tuple(batch), n, n, "top_left", None, kv_lengths, None)
    lengths = np.repeat(placement.kv_lengths.astype(np.int64), heads)
    if buckets is None:
        if num_buckets is None:
            num_buckets = max(2, 2 * round(n / (2 * bucket_length)))
        require_buckets(num_buckets)
        buckets = hashed(qk, num_buckets=num_buckets, num_rounds=num_rounds, rng=generator)
        if type(buckets) is not np.ndarray:
            tokens = sorted_tokens(arrays.reshape(xp, buckets, (len(lengths), num_rounds, n)),
                                   lengths)
            buckets, tokens = arrays.decided(buckets, tokens)
    buckets = _check_buckets(buckets, (*batch, heads, num_rounds, n))
    qk = without_padding(qk, kv_lengths)
    listed = _rounds(buckets.reshape(len(lengths), num_rounds, n), tokens, lengths, bucket_length,
                     strict=causal and not reference, causal=causal, reference=reference,
                     across=across, deduplicate=deduplicate)
    keys, unit = unit_length.forward(qk)
    # each head has an order of its own, as items have
    q, k, values = (arrays.reshape(xp, x, (len(lengths), 1, n, x.shape[-1]))
                    for x in (qk, keys, v))
    out, attended = softmax.forward(
        q, k, values, mask=listed, alignment="top_left", scale=scale, softcap=softcap,
        dropout=dropout, rng=generator, q_lengths=lengths, kv_lengths=lengths,
        return_lse=return_lse, decisions=decisions)
    saved = LshSaved(attended, unit, buckets)
    if return_lse:
        return (arrays.reshape(xp, out[0], v.shape),
                arrays.reshape(xp, out[1], qk.shape[:-1])), saved
    return arrays.reshape(xp, out, v.shape), saved


def _check_buckets(buckets: Any, shape: tuple[int, ...]) -> np.ndarray:
    buckets = host_array(buckets)
    if buckets.shape != shape:
        raise ShapeError("decisions['buckets'] must be (..., H, num_rounds, N) = "
                         f"{shape}; got {buckets.shape}")
    if buckets.dtype.kind not in "iu":
        raise DtypeError(f"decisions['buckets'] must be integers; got {buckets.dtype}")
    if buckets.size and not (buckets.min() >= 0 and buckets.max() < MOST_BUCKETS):
        raise OptionError(f"decisions['buckets'] must lie in 0..{MOST_BUCKETS - 1}; got "
                          f"{buckets.min()}..{buckets.max()}")
    return buckets


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """Who meets whom in a round, or a part of it: stretches of the keys' list."""

    queries: Regrouped
    keys: Regrouped
    first: np.ndarray
    """int64 (I, slots, stretches)."""
    stop: np.ndarray

    def meet(self, item: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Tell whether token i meets token j."""
        slot, other = self.queries.slot[item, i], self.keys.slot[item, j]
        first, stop = self.first[item, slot], self.stop[item, slot]
        met = ((first <= other[..., None]) & (other[..., None] < stop)).any(-1)
        return met & (slot >= 0) & (other >= 0)


def _rounds(buckets: np.ndarray, tokens: np.ndarray | None, lengths: np.ndarray,
            bucket_length: int, *, strict: bool, causal: bool, reference: bool, across: bool,
            deduplicate: bool) -> rounds:
    """Describe all rounds for buckets (I, rounds, N) of items with these lengths.

    `tokens`, likewise, lists them by bucket, if they have been sorted.
    """
    items, count, n = buckets.shape
    orders = [regroup(buckets[:, turn], lengths, None if tokens is None else tokens[:, turn])
              for turn in range(count)]
    pairs = [_last_members(order, bucket_length) if strict else
             _chunks(order, lengths, bucket_length, across=across, wrap=not reference)
             for order in orders]
    # buckets of different rounds are different ones, but one round comes before itself
    if reference and not strict and n and (across or count == 1):
        pairs += [_round_before(orders[turn], orders[turn - 1], lengths, bucket_length,
                                across=across) for turn in range(count)]
    parts = [between(part.first, part.stop, part.keys.token.shape[1]) for part in pairs]
    for number, (part, own) in enumerate(zip(parts, pairs, strict=True)):
        before = pairs[:number] if deduplicate else []
        same = own.queries is own.keys
        if same:
            part = part.with_diagonal(np.zeros((items, n), bool))
        if not same or before or (causal and not strict):
            part = part.where(functools.partial(_kept, own, before, causal=causal))
        parts[number] = part

    others = np.zeros((items, n), np.int64)
    for part, own in zip(parts, pairs, strict=True):
        item, slot = np.nonzero(own.queries.token >= 0)
        others[item, own.queries.token[item, slot]] += part.seen[item, slot]
    alone = np.take_along_axis(others == 0, np.maximum(orders[0].token, 0).astype(np.int64), axis=1)
    parts[0] = parts[0].with_diagonal(alone & (orders[0].token >= 0))
    return rounds(tuple(Round(Listing(own.queries.token), Listing(own.keys.token), part)
                        for part, own in zip(parts, pairs, strict=True)), items, n, n)


def _kept(own: _Pairs, before: list[_Pairs], item: np.ndarray, i: np.ndarray, j: np.ndarray, *,
          causal: bool) -> np.ndarray:
    """Tell which slots hold tokens of which one may see the other, and has not yet."""
    query, key = own.queries.token[item, i], own.keys.token[item, j]
    kept = (key < query) if causal else (key != query)
    for part in before:
        kept = kept & ~part.meet(item, query, key)
    return kept & (query >= 0) & (key >= 0)


def _last_members(order: Regrouped, bucket_length: int) -> _Pairs:
    """Each token meets the last of its bucket, itself included."""
    stop = np.where(order.token >= 0, np.arange(order.token.shape[1]) + 1, 0)
    return _Pairs(order, order, np.maximum(order.first, stop - bucket_length)[..., None],
                  stop[..., None])


def _chunks(order: Regrouped, lengths: np.ndarray, size: int, *, across: bool,
            wrap: bool) -> _Pairs:
    """Each token meets its chunk and the one before, the first chunk of several the last."""
    n = order.token.shape[1]
    slot, lengths = np.arange(n), lengths[:, None]
    chunk, chunks = slot // size, -(-lengths // size)
    first = np.broadcast_to(np.maximum(chunk - 1, 0) * size, order.token.shape)
    stop = np.minimum((chunk + 1) * size, lengths)
    # two chunks meet already
    far = (chunk == 0) & (chunks > 1) & wrap
    last = np.where(far, np.maximum((chunks - 1) * size, stop), 0)
    end = np.where(far, lengths, 0)
    if not across:
        first, stop = np.maximum(first, order.first), np.minimum(stop, order.stop)
        last, end = np.maximum(last, order.first), np.minimum(end, order.stop)
    held = order.token >= 0
    return _Pairs(order, order, np.stack([first, last], axis=-1),
                  np.where(held[..., None], np.stack([stop, end], axis=-1), 0))


def _round_before(order: Regrouped, other: Regrouped, lengths: np.ndarray, size: int, *,
                  across: bool) -> _Pairs:
    """The first chunk of a round meets the last chunk of the round before.

    If not across buckets, the round before is the same.
    """
    items = np.arange(len(lengths))[:, None]
    count = np.where(lengths > 0, (lengths - 1) % size + 1, 0)
    place = np.arange(size)
    slot = np.where(place < count[:, None], (lengths - count)[:, None] + place, -1)
    last, head = (Regrouped(np.where(held, source.token[items, np.maximum(at, 0)], -1),
                            np.where(held, 0, -1), order.tokens)
                  for source, at, held in (
                      (other, slot, slot >= 0),
                      (order, place[None], place < np.minimum(lengths, size)[:, None])))
    first, stop = np.zeros_like(head.token, np.int64), count[:, None]
    if not across:
        begin = (lengths - count)[:, None]
        first = np.maximum(order.first[:, :size] - begin, 0)
        stop = np.minimum(order.stop[:, :size] - begin, stop)
    stop = np.where(head.token >= 0, stop, 0)
    return _Pairs(head, last, first[..., None], stop[..., None])
