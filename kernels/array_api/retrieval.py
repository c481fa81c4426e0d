"""Retrieval with whole-array operations, where the tokens live: nothing waits for a device.

Letters: P heads (of keys), N queries, M keys, D width, K nodes of a level, p nodes kept, n tokens
chosen, L lists. Queries are (P, N, D) and nodes' and tokens' rows as wide, in the accumulating
dtype, such that a product is the score. What is found is of the same library.
"""

from __future__ import annotations

from typing import Any

from pyattn.arrays import device, from_host, namespace

from .choice import ascending, best

Array = Any
PIECE = 2**21
"""Scores that are held at a time."""

GATHERED = 2**24
"""Numbers of tokens' rows that are held at a time."""

ON_HOST = False
"""Whether lists are searched on the host, by the functions that the CPU's kernels have."""


def refuses(problem: Any) -> str | None:
    """Take everything."""
    del problem
    return None


def search(q: Array, layers: Any, roots: Any, keep: int) -> tuple[list[Array], Array]:
    """Return the best nodes of each level, int32 (P, N, keep), and how many scores that took.

    Levels count from the leaves; the search starts at the last. A query looks at the level's roots
    ``first[p, i]`` to ``stop[p, i]`` and at the children of the nodes it kept above; of these it
    keeps the `keep` of the highest scores, best first, of equals the lower number. A node of no
    token is not kept; -1 is none. `layers` have ``rows`` (P, K, D), ``some`` (P, K), whether a node
    has tokens, and ``parent`` (P, K), in the level above.
    """
    xp, (heads, n, _), where = namespace(q), q.shape, device(q)
    scored = xp.zeros((heads, n), dtype=xp.int32, device=where)
    found: list[Array] = []
    above = None
    for layer, root in zip(reversed(layers), reversed(roots), strict=True):
        first, stop = (from_host(xp, x, where)[:, :, None] for x in root)
        nodes = layer.rows.shape[1]
        number = xp.arange(nodes, dtype=xp.int32, device=where)
        open_to = [xp.zeros((heads, 0), dtype=xp.int32, device=where)]
        kept = [xp.zeros((heads, 0, keep), dtype=xp.int32, device=where)]
        step = max(1, PIECE // max(1, heads * nodes))
        for begin in range(0, n, step):
            some = slice(begin, min(begin + step, n))
            seen = (first[:, some, :] <= number) & (number < stop[:, some, :])
            for turn in range(0 if above is None else keep):
                seen = seen | (above[:, some, turn:turn + 1] == layer.parent[:, None, :]) & (
                    layer.parent >= 0)[:, None, :]
            scores = xp.matmul(q[:, some, :], xp.matrix_transpose(layer.rows))
            # what is not a number is never found
            good = seen & layer.some[:, None, :] & ~xp.isnan(scores)
            order, held = best(xp.where(good, scores, 0.0), good, keep)
            order = xp.where(held, xp.astype(order, xp.int32), -1)
            none = xp.full((*order.shape[:2], keep - order.shape[2]), -1, dtype=xp.int32,
                           device=where)
            kept.append(xp.concat([order, none], axis=2))
            open_to.append(xp.sum(xp.astype(seen, xp.int32), axis=2, dtype=xp.int32))
        scored = scored + xp.concat(open_to, axis=1)
        above = xp.concat(kept, axis=1)
        found.insert(0, above)
    return found, scored


def pick(q: Array, rows: Array, order: Array, runs: Array, most: int, number: int, tokens: int,
         threshold: float | None, duplicate: float | None) -> Array:
    """Return the best tokens of each query's lists, int32 (P, N, number), ascending; -1 is none.

    Lists are ``order[runs[p, i, r, 0]:runs[p, i, r, 1]]``, of all r of a query `most` at most, and
    `order` holds numbers of tokens over all heads, `tokens` each, as `rows` does. Taken are those
    of the highest scores, of equals the first token; with a `threshold` none of lower score, and
    with `duplicate` none whose product with one taken before is higher.
    """
    xp, (heads, n, width), where = namespace(q), q.shape, device(q)
    if not most or not heads * n:
        return xp.full((heads, n, number), -1, dtype=xp.int32, device=where)
    q, runs = xp.reshape(q, (heads * n, width)), xp.reshape(runs, (heads * n, *runs.shape[2:]))
    head = xp.arange(heads * n, dtype=xp.int32, device=where) // n
    found, step = [], max(1, GATHERED // (most * max(1, width)))
    for begin in range(0, heads * n, step):
        some = slice(begin, min(begin + step, heads * n))
        token, held = _listed(order, runs[some, ...], most, rows.shape[0])
        own = xp.take(rows, xp.reshape(xp.where(held, token, 0), (-1,)), axis=0)
        own = xp.reshape(own, (*token.shape, width))
        scores = _products(own, q[some, :])
        good = held & ~xp.isnan(scores)
        if threshold is not None:
            good = good & (scores >= threshold)
        token = token - (head[some] * tokens)[:, None]
        scores = xp.where(good, scores, 0.0)
        if duplicate is None:
            index, good = best(scores, good, number)
            token = xp.take_along_axis(token, index, axis=1)
        else:
            token, good = _apart(own, token, scores, good, number, duplicate)
        chosen = ascending(token, good, tokens)
        none = xp.full((chosen.shape[0], number - chosen.shape[1]), -1, dtype=xp.int32,
                       device=where)
        found.append(xp.concat([chosen, none], axis=1))
    return xp.reshape(xp.concat(found, axis=0), (heads, n, number))


def _listed(order: Array, runs: Array, most: int, limit: int) -> tuple[Array, Array]:
    """Return what lists (B, lists, 2) hold, ascending, (B, most), and which of it counts, once."""
    xp = namespace(order)
    slot = xp.arange(most, dtype=runs.dtype, device=device(runs))[None, :]
    place, filled = runs[:, :1, 0] + slot, runs[:, :1, 1] - runs[:, :1, 0]
    for turn in range(1, runs.shape[1]):
        begin, end = runs[:, turn:turn + 1, 0], runs[:, turn:turn + 1, 1]
        place = xp.where(slot < filled, place, begin + slot - filled)
        filled = filled + end - begin
    held = slot < filled
    token = xp.take(order, xp.reshape(xp.where(held, place, 0), (-1,)))
    token = xp.where(held, xp.reshape(token, held.shape), limit)
    token = xp.sort(xp.astype(token, xp.int32), axis=1)
    new = xp.concat([xp.ones_like(held[:, :1]), token[:, 1:] != token[:, :-1]], axis=1)
    return token, (token < limit) & new


def _products(rows: Array, x: Array) -> Array:
    """Return the products of rows (B, S, D) with x (B, D)."""
    return namespace(rows).matmul(rows, x[:, :, None])[:, :, 0]


def _apart(own: Array, token: Array, scores: Array, good: Array, number: int,
           duplicate: float) -> tuple[Array, Array]:
    """Take tokens one after another, and none that is too like one taken before."""
    xp = namespace(own)
    lowest = -float(xp.finfo(scores.dtype).max)
    slot = xp.arange(token.shape[1], device=device(token))
    tokens, held = [], []
    for _ in range(min(number, token.shape[1])):
        rank = xp.where(good, xp.where(scores > lowest, scores, lowest), -float("inf"))
        first = xp.argmax(rank, axis=1)[:, None]
        tokens.append(xp.take_along_axis(token, first, axis=1))
        held.append(xp.take_along_axis(good, first, axis=1))
        taken = xp.take_along_axis(own, xp.broadcast_to(
            first[:, :, None], (first.shape[0], 1, own.shape[2])), axis=1)[:, 0, :]
        good = good & ~(_products(own, taken) > duplicate) & (slot != first)
    return xp.concat(tokens, axis=1), xp.concat(held, axis=1)


def last_of_bucket(order: Array, sorted_buckets: Array, buckets: Array, stop: Array,
                   count: int) -> Array:
    """Return where in each list the last members of a bucket up to a token lie, (L, N, 2).

    Lists `order`, of tokens (L, M), are sorted by the token's bucket, then its number.
    ``buckets[l, i]`` and ``stop[l, i]`` say what query i asks for: at most `count` of them.
    """
    xp = namespace(order)

    def up_to(token: Array) -> Array:
        """Count the members of earlier buckets, and of this one those up to a token."""
        lists, m = order.shape
        line = xp.arange(lists, dtype=order.dtype, device=device(order))[:, None] * m
        flat = [xp.reshape(x, (-1,)) for x in (sorted_buckets, order)]
        low = xp.zeros_like(buckets)
        high = low + m
        for _ in range(m.bit_length()):
            middle = (low + high) // 2
            index = xp.reshape(line + xp.where(middle < m, middle, m - 1), (-1,))
            bucket, other = (xp.reshape(xp.take(x, index), low.shape) for x in flat)
            before = (bucket < buckets) | (bucket == buckets) & (other <= token)
            between = low < high
            low, high = (xp.where(between & before, middle + 1, low),
                         xp.where(between & ~before, middle, high))
        return low

    ends = up_to(stop)
    begins = up_to(xp.full_like(stop, -1))
    begins = xp.where(begins > ends - count, begins, ends - count)
    return xp.stack([xp.where(begins < ends, begins, ends), ends], axis=2)
