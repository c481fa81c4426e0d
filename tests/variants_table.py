"""Variants that are attention over a set of pairs: their options, and the pairs by the paper."""

from __future__ import annotations

import dataclasses

import numpy as np
from table import Case, Shape, positions

SHAPES = [
    Shape((), 1, 1, 1, 1, 4, 4),
    Shape((2,), 4, 2, 63, 63, 16, 16),
    Shape((1,), 2, 1, 64, 64, 32, 24),
    Shape((2,), 3, 3, 133, 133, 8, 8),
    Shape((2, 2), 2, 1, 17, 17, 8, 8),
    Shape((2,), 4, 1, 70, 133, 5, 7),
    Shape((1,), 2, 2, 133, 70, 16, 8),
]


def square(s: Shape) -> bool:
    return s.n == s.m


def at(options, s: Shape):
    """Positions of queries and keys that broadcast to (..., H, N, M)."""
    alignment = "top_left" if options.get("causal") == "top_left" else "bottom_right"
    return positions(s, alignment, options.get("q_lengths"), options.get("kv_lengths"))[:2]


def causal(case: Case) -> Case:
    """The row once more with ``causal=True``."""

    def rule(i, j):
        return (j <= i) & (case.rule is None or case.rule(i, j))

    return dataclasses.replace(
        case,
        name=f"{case.name}_causal",
        draw=lambda r, s: case.draw(r, s) | {"causal": True},
        rule=rule,
    )


def padded(case: Case) -> Case:
    """The row once more with items of different lengths."""

    def draw(r, s):
        lengths = r.integers(0, s.n + 1, s.batch)
        return case.draw(r, s) | {"q_lengths": lengths, "kv_lengths": lengths}

    return dataclasses.replace(case, name=f"{case.name}_padded", draw=draw)


def dilated(options, s: Shape):
    i, j = at(options, s)
    step = np.array(options["dilation"])[:, None, None]
    return (abs(i - j) <= options["window"] * step) & ((i - j) % step == 0)


def global_local(options, s: Shape):
    """Item by item: the set of global positions, spelled out."""
    i, j = at(options, s)
    allowed = np.zeros((*s.batch, 1, s.n, s.m), bool)
    ends = np.broadcast_to(options.get("kv_lengths", s.m), s.batch)
    for item in np.ndindex(s.batch):
        chosen = set(range(options.get("first", 0)))
        chosen |= set(range(ends[item] - options.get("last", 0), ends[item]))
        index = options.get("global_index", [])
        if isinstance(index, np.ndarray):
            index = [a for a, x in enumerate(index[item] if index.ndim > 1 else index) if x]
        chosen |= set(index)
        words = options.get("token_ids", np.zeros(0))
        words = words[item] if words.ndim > 1 else words
        chosen |= {a for a, word in enumerate(words) if word in options["global_ids"]}
        rows, columns = i[(*item, 0)], j[(*item, 0)]
        allowed[item] = np.isin(rows, list(chosen)) | np.isin(columns, list(chosen))
        if "window" in options:
            allowed[item] |= abs(rows - columns) <= options["window"]
    return allowed


def chosen_blocks(r, s: Shape, size: int, count: int):
    """Blocks for every head and block of queries, distinct, some of them none."""
    rows = -(-s.n // size)
    numbers = np.full((s.heads, rows, count), -1)
    for head in range(s.heads):
        for row in range(rows):
            drawn = r.permutation(rows)[:count]
            numbers[head, row, : len(drawn)] = drawn
    return {"blocks": numbers}


def spread(table, size: int, s: Shape):
    """Pairs of blocks (..., rows, columns) as pairs of tokens."""
    return table.repeat(size, axis=-2).repeat(size, axis=-1)[..., : s.n, : s.m]


def listed(options, size: int, s: Shape):
    """Pairs of blocks that the decisions name, (H, rows, columns)."""
    blocks = options["decisions"]["blocks"]
    table = np.zeros((s.heads, -(-s.n // size), -(-s.m // size)), bool)
    for head, row, place in np.ndindex(blocks.shape):
        if blocks[head, row, place] >= 0:
            table[head, row, blocks[head, row, place]] = True
    return table


def random_blocks(options, s: Shape):
    size = options["block_size"]
    table = listed(options, size, s)
    return spread(table | np.eye(table.shape[-1], dtype=bool), size, s)


def random_local(options, s: Shape):
    i, j = at(options, s)
    size = options["stride"]
    near, far = abs(i - j) < size, spread(listed(options, size, s), size, s)
    if options.get("heads") == "split":
        return np.where(np.arange(s.heads)[:, None, None] % 2 == 0, near, far)
    return near | far


def split_strided(options, s: Shape):
    i, j = at(options, s)
    odd = np.arange(s.heads)[:, None, None] % 2
    return np.where(odd, (i - j) % options["stride"] == 0, abs(i - j) < options["stride"])


def split_fixed(options, s: Shape):
    i, j = at(options, s)
    size = options["stride"]
    own, last = i // size == j // size, j % size >= size - options["columns"]
    return np.where(np.arange(s.heads)[:, None, None] % 2, last & ~own, own)


def blockbert(options, s: Shape):
    count = options["num_blocks"]
    size = -(-s.n // count)
    a, b = np.arange(s.n)[:, None] // size, np.arange(s.m) // size
    return (a + np.array(options["shifts"])[:, None, None]) % count == b


def bigbird(options, s: Shape):
    """Row by row of blocks: which it sees."""
    size, num_random = options["block_size"], options["num_random"]
    num_global, num_window = options.get("num_global", 2), options.get("num_window", 3)
    extra = options.get("extra_tokens", 0)
    rows = -(-s.n // size)
    front = max(-(-num_global // 2), min(extra, s.n) // size)
    back = 0 if options.get("causal") else num_global // 2
    ends = {row for row in range(rows) if row < front or row >= rows - back}
    if rows <= len(ends) + num_window + 2 * num_random:
        return np.ones((s.n, s.m), bool)
    table = listed(options, size, s)
    for row in range(rows):
        for column in range(rows):
            if row in ends or column in ends or abs(row - column) <= (num_window - 1) / 2:
                table[:, row, column] = True
    allowed = spread(table, size, s)
    allowed[:, :extra] = allowed[:, :, :extra] = True
    return allowed


VARIANTS = [
    Case(
        "sliding_window",
        lambda r, s: {"window": 5},
        lambda i, j: abs(i - j) <= 5,
        function="sliding_window_attention",
    ),
    Case(
        "sliding_window_sides",
        lambda r, s: {"window": (70, 3)},
        lambda i, j: (i - j <= 70) & (j - i <= 3),
        function="sliding_window_attention",
    ),
    Case(
        "sliding_window_dilated",
        lambda r, s: {"window": 4, "dilation": 3},
        lambda i, j: (abs(i - j) <= 12) & ((i - j) % 3 == 0),
        function="sliding_window_attention",
    ),
    Case(
        "sliding_window_dilated_by_head",
        lambda r, s: {"window": 3, "dilation": [1, 7, 16, 2][: s.heads]},
        pattern=dilated,
        function="sliding_window_attention",
    ),
    Case(
        "local_2d",
        lambda r, s: {"shape": (14, 10), "window": (2, 3)},
        lambda i, j: (abs(i // 10 - j // 10) <= 2) & (abs(i % 10 - j % 10) <= 3),
        function="local_attention_2d",
        suits=lambda s: s.n <= s.m,
    ),
    Case(
        "block_diagonal",
        lambda r, s: {"block_size": 12},
        lambda i, j: i // 12 == j // 12,
        function="block_diagonal_attention",
    ),
    Case(
        "global_index",
        lambda r, s: {"global_index": sorted({0, s.m // 2, s.m - 1})},
        pattern=global_local,
        function="global_local_attention",
    ),
    Case(
        "global_window",
        lambda r, s: {"global_index": r.random(s.m) < 0.05, "window": 4},
        pattern=global_local,
        function="global_local_attention",
    ),
    Case(
        "global_ends",
        lambda r, s: {"first": 2, "last": 3, "window": 1},
        pattern=global_local,
        function="global_local_attention",
    ),
    Case(
        "global_words",
        lambda r, s: {"token_ids": r.integers(0, 40, s.m), "global_ids": {3, 7}, "first": 1},
        pattern=global_local,
        function="global_local_attention",
    ),
    Case(
        "global_words_by_item",
        lambda r, s: {
            "token_ids": r.integers(0, 30, (*s.batch, s.m)),
            "global_ids": [5, 29],
            "last": 1,
            "window": 6,
        },
        pattern=global_local,
        function="global_local_attention",
    ),
    Case(
        "global_by_item",
        lambda r, s: {"global_index": r.random((*s.batch, s.m)) < 0.04, "window": 2},
        pattern=global_local,
        function="global_local_attention",
    ),
    Case(
        "random",
        lambda r, s: {"num_random": 2, "block_size": 9, "decisions": chosen_blocks(r, s, 9, 2)},
        pattern=random_blocks,
        function="random_attention",
        suits=square,
    ),
    Case(
        "random_tokens",
        lambda r, s: {"num_random": 3, "block_size": 1, "decisions": chosen_blocks(r, s, 1, 3)},
        pattern=random_blocks,
        function="random_attention",
        suits=square,
    ),
    Case(
        "strided",
        lambda r, s: {"stride": 11, "causal": False},
        lambda i, j: (abs(i - j) < 11) | ((i - j) % 11 == 0),
        function="sparse_transformer_attention",
    ),
    Case(
        "strided_split",
        lambda r, s: {"stride": 6, "heads": "split", "causal": False},
        pattern=split_strided,
        function="sparse_transformer_attention",
    ),
    Case(
        "fixed",
        lambda r, s: {"stride": 10, "mode": "fixed", "columns": 2, "causal": False},
        lambda i, j: (i // 10 == j // 10) | (j % 10 >= 8),
        function="sparse_transformer_attention",
    ),
    Case(
        "fixed_split",
        lambda r, s: {
            "stride": 7,
            "mode": "fixed",
            "columns": 3,
            "heads": "split",
            "causal": False,
        },
        pattern=split_fixed,
        function="sparse_transformer_attention",
    ),
    Case(
        "random_local",
        lambda r, s: {
            "stride": 8,
            "mode": "random_local",
            "causal": False,
            "decisions": chosen_blocks(r, s, 8, 2),
        },
        pattern=random_local,
        function="sparse_transformer_attention",
        suits=square,
    ),
    Case(
        "random_local_split",
        lambda r, s: {
            "stride": 8,
            "mode": "random_local",
            "heads": "split",
            "causal": False,
            "decisions": chosen_blocks(r, s, 8, 3),
        },
        pattern=random_local,
        function="sparse_transformer_attention",
        suits=square,
    ),
    Case(
        "blockbert",
        lambda r, s: {"num_blocks": 3, "shifts": r.integers(0, 3, s.heads).tolist()},
        pattern=blockbert,
        function="blockbert_attention",
        suits=square,
    ),
    Case(
        "blockbert_empty_blocks",
        lambda r, s: {"num_blocks": 24, "shifts": [23, 1, 0, 5][: s.heads]},
        pattern=blockbert,
        function="blockbert_attention",
        suits=square,
    ),
    Case(
        "bigbird",
        lambda r, s: {"block_size": 4, "num_random": 2, "decisions": chosen_blocks(r, s, 4, 2)},
        pattern=bigbird,
        function="bigbird_attention",
        suits=square,
    ),
    Case(
        "bigbird_wide",
        lambda r, s: {
            "block_size": 3,
            "num_random": 1,
            "num_global": 3,
            "num_window": 5,
            "decisions": chosen_blocks(r, s, 3, 1),
        },
        pattern=bigbird,
        function="bigbird_attention",
        suits=square,
    ),
    Case(
        "bigbird_etc",
        lambda r, s: {
            "block_size": 4,
            "num_random": 1,
            "num_global": 0,
            "extra_tokens": 10,
            "decisions": chosen_blocks(r, s, 4, 1),
        },
        pattern=bigbird,
        function="bigbird_attention",
        suits=square,
    ),
]
