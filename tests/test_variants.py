"""Variants over a set of pairs: the rows of variants_table, and what the papers promise."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from test_attention import BACKENDS, judge, run
from variants_table import SHAPES, VARIANTS, causal, padded, square

import pyattn
from pyattn.checks import DtypeError, OptionError, ShapeError

ROWS = [*VARIANTS, *map(causal, VARIANTS)]
PADDED = list(map(padded, VARIANTS))


def fitting(cases, shapes):
    return [
        pytest.param(case, shape, id=f"{case.name}-{shape}")
        for case in cases
        for shape in shapes
        if case.suits(shape)
    ]


def draw(*shape, dtype="f8", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def qkv(*shape, dtype="f8"):
    return (draw(*shape, dtype=dtype, seed=seed) for seed in range(3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("case", "shape"), fitting(ROWS, SHAPES))
def test_float32(case, shape, backend):
    drawn = case.make(shape, np.float32)
    judge(drawn, *run(drawn, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("case", "shape"), fitting(ROWS, [SHAPES[3], SHAPES[5]]))
def test_float64(case, shape, backend):
    drawn = case.make(shape, np.float64)
    judge(drawn, *run(drawn, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("case", "shape"), fitting(PADDED, list(filter(square, SHAPES))))
def test_padding(case, shape, backend):
    drawn = case.make(shape, np.float32)
    judge(drawn, *run(drawn, backend))


def test_names_are_unique():
    names = [case.name for case in ROWS + PADDED]
    assert len(set(names)) == len(names)


# what the papers promise


def seen(name, n, heads=1, m=None, **options):
    """Pairs (H, N, M) that a variant gives a weight."""
    q, x = np.zeros((heads, n, 2)), np.zeros((heads, n if m is None else m, 2))
    return getattr(pyattn, name)(q, x, x, return_weights=True, **options)[1] > 0


def seen_split(n, **options):
    """Pairs (2, N, N) of a head of each pattern."""
    x = np.zeros((2, n, 2))
    options |= {"heads": "split", "return_weights": True}
    return pyattn.sparse_transformer_attention(x, x, x, **options)[1] > 0


def blocks_seen(name, rows, heads, size, **options):
    """Pairs of blocks (H, rows, rows); all pairs of a block go together."""
    pairs = seen(name, rows * size, heads, block_size=size, **options)
    table = pairs[:, ::size, ::size]
    np.testing.assert_array_equal(table.repeat(size, 1).repeat(size, 2), pairs)
    return table


LIMITS = {
    "window": ("sliding_window_attention", {"window": 96}, False),
    "window_causal": ("sliding_window_attention", {"window": 96, "causal": True}, True),
    "grid": ("local_attention_2d", {"shape": (10, 10), "window": (9, 9)}, False),
    "one_block": ("block_diagonal_attention", {"block_size": 97}, False),
    "one_block_of_bert": ("blockbert_attention", {"num_blocks": 1}, False),
    "all_global": ("global_local_attention", {"global_index": range(97)}, False),
    "all_words_global": (
        "global_local_attention",
        {"token_ids": np.zeros(97, int), "global_ids": [0]},
        False,
    ),
    "all_random": ("random_attention", {"num_random": 97, "block_size": 4}, False),
    "all_random_causal": (
        "random_attention",
        {"num_random": 97, "block_size": 1, "causal": True},
        True,
    ),
    "all_random_and_local": (
        "sparse_transformer_attention",
        {"mode": "random_local", "stride": 10, "num_random": 9},
        True,
    ),
    "stride_1": ("sparse_transformer_attention", {"stride": 1}, True),
    "stride_n": ("sparse_transformer_attention", {"stride": 97}, True),
    "all_columns": (
        "sparse_transformer_attention",
        {"stride": 9, "mode": "fixed", "columns": 9},
        True,
    ),
    "bigbird_short": ("bigbird_attention", {"block_size": 9, "num_random": 3}, False),
    "bigbird_many": ("bigbird_attention", {"block_size": 4, "num_random": 11}, False),
    "bigbird_extra": ("bigbird_attention", {"block_size": 4, "extra_tokens": 97}, False),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("limit", LIMITS)
def test_limits_are_dense(limit, backend):
    name, options, causal = LIMITS[limit]
    q, k, v = qkv(2, 2, 97, 8)
    dout = draw(2, 2, 97, 8, seed=3)
    with pyattn.use_backend(backend):
        out, saved = getattr(pyattn, name).forward(q, k, v, **options)
        dense, exact = pyattn.attention.forward(q, k, v, causal=causal)
        pairs = zip(saved.backward(dout), exact.backward(dout), strict=True)
    np.testing.assert_allclose(out, dense, rtol=0, atol=1e-14)
    for got, want in pairs:
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)


def test_beyond_the_window_the_jacobian_is_exactly_zero():
    q, k, v = qkv(1, 150, 4)
    for token in (0, 63, 64, 100, 149):
        out, saved = pyattn.sliding_window_attention.forward(q, k, v, window=7)
        dout = np.zeros_like(out)
        dout[:, token] = 1
        reached = (saved.backward(dout).v != 0).any((0, 2))
        np.testing.assert_array_equal(reached, abs(np.arange(150) - token) <= 7)


def test_the_end_of_a_row_does_not_touch_the_start_of_the_next():
    pairs = seen("local_attention_2d", 77, shape=(7, 11), window=1)[0]
    grid = pairs.reshape(7, 11, 7, 11)
    assert not grid[2, 10, 3, 0]
    assert not grid[3, 0, 2, 10]
    assert grid[2, 10, 3, 9]
    assert grid[4, 4].sum() == 9
    assert grid[0, 0].sum() == 4


def test_token_sets_are_lists_of_positions():
    """Explicit positions, first and last, and words: the same tokens, the same result."""
    q, k, v = qkv(2, 20, 4)
    words = np.ones(20, int)
    words[[0, 1, 7, 19]] = 5, 6, 5, 6
    results = [
        pyattn.global_local_attention(q, k, v, window=2, **options)
        for options in (
            {"global_index": [19, 0, 1, 7, 7]},
            {"global_index": np.isin(np.arange(20), [0, 1, 7, 19])},
            {"global_index": [7], "first": 2, "last": 1},
            {"token_ids": words, "global_ids": {5, 6}},
            {"token_ids": words, "global_ids": (5,), "first": 2, "last": 1},
        )
    ]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_last_tokens_are_those_before_the_padding():
    q, k, v = qkv(2, 1, 12, 4)
    lengths = np.array([12, 7])
    options = {"window": 1, "first": 1, "last": 2}
    out = pyattn.global_local_attention(q, k, v, q_lengths=lengths, kv_lengths=lengths, **options)
    for item, length in enumerate(lengths):
        part = np.s_[item, :, :length]
        alone = pyattn.global_local_attention(q[part], k[part], v[part], **options)
        np.testing.assert_allclose(out[part], alone, rtol=0, atol=1e-14)


def test_global_positions_count_from_the_start_of_each_segment():
    q, k, v = qkv(2, 12, 4)
    options = {"window": 1, "global_index": [3], "first": 1}
    out = pyattn.global_local_attention(q, k, v, segments=[5, 7], **options)
    for part in (np.s_[:, :5], np.s_[:, 5:]):
        alone = pyattn.global_local_attention(q[part], k[part], v[part], **options)
        np.testing.assert_allclose(out[part], alone, rtol=0, atol=1e-14)


def test_other_blocks_do_not_matter():
    x = draw(1, 30, 4)
    other = x.copy()
    other[:, :10] = np.nan
    other[:, 20:] = np.nan
    out, dirty = (pyattn.block_diagonal_attention(a, a, a, block_size=10) for a in (x, other))
    np.testing.assert_array_equal(out[:, 10:20], dirty[:, 10:20])
    assert np.isnan(dirty[:, :10]).all()


@pytest.mark.parametrize("n", [12, 14, 3])
def test_all_shifts_on_as_many_heads_cover_every_pair_once(n):
    pairs = seen("blockbert_attention", n, heads=5, num_blocks=5, shifts=range(5))
    np.testing.assert_array_equal(pairs.sum(0), 1)


@pytest.mark.parametrize(
    ("heads", "num_blocks", "want"),
    [
        (12, 2, [10, 2]),
        (12, 3, [8, 2, 2]),
        (16, 2, [14, 2]),
        (4, 3, [2, 1, 1]),
        (2, 3, [1, 1, 0]),
        (1, 2, [1, 0]),
        (12, 1, [12]),
    ],
)
def test_blockberts_heads_are_distributed_as_in_the_paper(heads, num_blocks, want):
    pairs = seen("blockbert_attention", num_blocks, heads=heads, num_blocks=num_blocks)
    assert pairs[:, 0].sum(0).tolist() == want


@pytest.mark.parametrize("mode", ["strided", "fixed"])
def test_two_steps_reach_every_earlier_key(mode):
    """A key by the second pattern, which has seen its own neighbours by the first."""
    near, far = seen_split(60, stride=7, mode=mode)
    assert not (near | far)[50, 3]
    reached = (far | np.eye(60, dtype=bool)).astype(int) @ near
    np.testing.assert_array_equal(reached > 0, np.tri(60, dtype=bool))


def test_the_sparse_transformer_is_causal_by_default():
    for mode in ("strided", "fixed", "random_local"):
        pairs = seen("sparse_transformer_attention", 40, stride=6, mode=mode)
        assert not np.triu(pairs[0], 1).any()


@pytest.mark.parametrize("num_random", [1, 3])
def test_bigbirds_rows_have_the_blocks_of_the_paper(num_random):
    table = blocks_seen("bigbird_attention", 14, heads=4, size=3, num_random=num_random, rng=0)
    counts = table.sum(-1)
    assert (counts[:, [0, -1]] == 14).all()
    assert (table[:, :, [0, -1]]).all()
    assert (counts[:, [1, -2]] == 4 + num_random).all()
    assert (counts[:, 2:-2] == 5 + num_random).all()
    row = np.arange(14)
    assert table[:, abs(row[:, None] - row) <= 1].all()


def test_bigbird_with_one_block_more_than_it_needs_is_not_dense():
    for rows, dense in ((9, True), (10, False)):
        pairs = seen("bigbird_attention", rows, block_size=1, num_random=2)
        assert pairs.all() == dense


def test_bigbird_with_causal_drops_the_last_block_as_global():
    options = {"num_random": 2, "rng": 0, "causal": True}
    pairs = seen("bigbird_attention", 56, heads=2, block_size=4, **options)
    assert not np.triu(pairs, 1).any()
    counts = pairs[:, 3::4, ::4].sum(-1)
    assert (counts[:, -1] <= 1 + 2 + 2).all()
    assert pairs[:, :, 0].all()


DRAWN = {
    "random_attention": {"num_random": 2, "block_size": 5},
    "bigbird_attention": {"num_random": 2, "block_size": 5},
    "sparse_transformer_attention": {"mode": "random_local", "stride": 5, "num_random": 2},
}


@pytest.mark.parametrize("name", DRAWN)
def test_draws_are_distinct_and_differ_by_head_and_seed(name):
    x = np.zeros((3, 60, 2))

    def blocks(rng):
        saved = getattr(pyattn, name).forward(x, x, x, rng=rng, **DRAWN[name])[1]
        return saved.decisions["blocks"]

    first = blocks(0)
    assert first.shape == (3, 12, 2)
    middle = first[:, 1:-1]
    assert ((middle >= 0) & (middle < 12)).all()
    assert (middle[..., 0] != middle[..., 1]).all()
    assert (middle != np.arange(1, 11)[:, None]).all()
    np.testing.assert_array_equal(first, blocks(0))
    np.testing.assert_array_equal(first, blocks(np.random.default_rng(0)))
    assert (first != blocks(1)).any()
    assert (first[0] != first[1]).any()


@pytest.mark.parametrize("name", DRAWN)
def test_every_candidate_is_drawn_equally_often(name):
    x = np.zeros((1000, 60, 1))
    saved = getattr(pyattn, name).forward(x, x, x, rng=0, **DRAWN[name])[1]
    blocks = saved.decisions["blocks"]
    for row in (1, 2, 6):
        often = np.bincount(blocks[:, row].ravel(), minlength=12)
        never = {row}
        if name == "bigbird_attention":
            never |= {0, row - 1, row + 1, 11}
        assert set(np.flatnonzero(often == 0)) == never
        mean = 2000 / (12 - len(never))
        assert abs(often[often > 0] - mean).max() < 5 * mean**0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DRAWN)
def test_decisions_bring_back_the_same_result(name, backend):
    q, k, v = qkv(2, 2, 60, 4, dtype="f4")
    operation, options = getattr(pyattn, name), DRAWN[name] | {"dropout": 0.3}
    with pyattn.use_backend(backend):
        out, saved = operation.forward(q, k, v, rng=5, **options)
        assert set(saved.decisions) == {"blocks", "dropout_seed"}
        again, copy = operation.forward(q, k, v, decisions=saved.decisions, **options)
        pairs = zip(saved.backward(out), copy.backward(out), strict=True)
        partial = {"blocks": saved.decisions["blocks"]}
        redrawn = operation.forward(q, k, v, decisions=partial, rng=6, **options)[1]
    np.testing.assert_array_equal(out, again)
    for a, b in pairs:
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(redrawn.decisions["blocks"], partial["blocks"])
    assert redrawn.decisions["dropout_seed"] != saved.decisions["dropout_seed"]
    moved = pickle.loads(pickle.dumps(saved)).to(np)
    assert saved.nbytes >= saved.decisions["blocks"].nbytes + 4 * q.nbytes
    with pyattn.use_backend(backend):
        np.testing.assert_array_equal(moved.backward(out).k, saved.backward(out).k)


@pytest.mark.parametrize("name", ["random_attention", "bigbird_attention"])
def test_decisions_may_differ_by_batch_item(name):
    q, k, v = qkv(2, 2, 60, 4)
    operation, options = getattr(pyattn, name), DRAWN[name]
    blocks = [operation.forward(q, k, v, rng=s, **options)[1].decisions["blocks"] for s in (0, 1)]
    out = operation(q, k, v, decisions={"blocks": np.stack(blocks)}, **options)
    for item in range(2):
        part = np.s_[item : item + 1]
        alone = operation(q[part], k[part], v[part], decisions={"blocks": blocks[item]}, **options)
        np.testing.assert_array_equal(out[part], alone)


LINEAR = {
    "sliding_window_attention": {"window": 100},
    "local_attention_2d": {"shape": (128, 32), "window": 2},
    "global_local_attention": {"window": 64, "global_index": [0, 1, 700]},
    "random_attention": {"num_random": 2, "block_size": 64, "rng": 0},
    "block_diagonal_attention": {"block_size": 128},
    "bigbird_attention": {"rng": 0, "num_random": 2},
}


@pytest.mark.parametrize("name", LINEAR)
def test_tiles_grow_with_the_length(name):
    counts = []
    for n in (1024, 2048, 4096):
        x = np.zeros((1, n, 2), "f")
        saved = getattr(pyattn, name).forward(x, x, x, **LINEAR[name])[1]
        counts.append(saved.stats["tiles"])
    first, second = np.diff(counts)
    # but for the ends, where a window is cut off
    assert abs(second - 2 * first) <= 4
    assert counts[-1] < 64 * 64 / 4


SCATTERED = np.random.default_rng(0).choice(2**14, 32, replace=False).tolist()
LONG = {
    "window": ("sliding_window_attention", {"window": 256}),
    "dilated": ("sliding_window_attention", {"window": 64, "dilation": 16}),
    "dilated_by_head": ("sliding_window_attention", {"window": 64, "dilation": (1, 16)}),
    "global": ("global_local_attention", {"window": 128, "global_index": SCATTERED}),
    "strided": ("sparse_transformer_attention", {"stride": 128}),
    "strided_split": ("sparse_transformer_attention", {"stride": 128, "heads": "split"}),
    "fixed": ("sparse_transformer_attention", {"stride": 128, "mode": "fixed", "columns": 8}),
    "random": ("random_attention", {"num_random": 3, "rng": 0}),
    "bigbird": ("bigbird_attention", {"rng": 0}),
    "blockbert": ("blockbert_attention", {"num_blocks": 4}),
    "block_diagonal": ("block_diagonal_attention", {"block_size": 256}),
}


@pytest.mark.parametrize("pattern", LONG)
def test_executed_pairs_are_within_twice_those_of_the_pattern(pattern):
    name, options = LONG[pattern]
    x = np.zeros((2, 2**14, 2), "f")
    stats = getattr(pyattn, name).forward(x, x, x, **options)[1].stats
    assert stats["pairs"] <= 64 * 64 * stats["tiles"] <= 2 * stats["pairs"]


@pytest.mark.parametrize("mode", ["strided", "fixed"])
def test_a_stride_of_the_square_root_costs_n_sqrt_n(mode):
    counts = []
    for n, stride in ((2**12, 64), (2**14, 128), (2**16, 256)):
        x = np.zeros((1, n, 1), "f")
        saved = pyattn.sparse_transformer_attention.forward(x, x, x, stride=stride, mode=mode)[1]
        counts.append(saved.stats["tiles"])
    assert counts[1] < 9 * counts[0]
    assert counts[2] < 9 * counts[1]


def test_options_reach_the_attention():
    """What every variant passes on: a mask, a bias with its gradient, GQA, empty rows."""
    q, (k, v) = draw(4, 20, 4), (draw(2, 20, 4, seed=s) for s in (1, 2))
    bias, mask = draw(4, 20, 20, seed=4), draw(20, 20, seed=5) > 0
    mask[3] = False
    for case in VARIANTS:
        name = case.function
        options = {
            key: value
            for key, value in case.draw(np.random.default_rng(0), SHAPES[0]).items()
            if key not in ("decisions", "shifts", "token_ids", "global_ids", "global_index")
        }
        if "dilation" in options:
            options["dilation"] = 2
        options |= {"bias": bias, "rng": 0, "return_lse": True}
        (out, lse), saved = getattr(pyattn, name).forward(q, k, v, mask=mask, **options)
        assert (out[:, 3] == 0).all()
        assert (lse[:, 3] == -np.inf).all()
        grads = saved.backward(np.ones_like(out), np.zeros_like(lse))
        assert grads._fields == ("q", "k", "v", "bias")
        assert (grads.bias[:, ~mask] == 0).all()
        both = getattr(pyattn, name)(q, k, v, mask=mask, return_weights=True, **options)
        assert (both[2][:, ~mask] == 0).all()


X = np.zeros((2, 12, 4))
LONGER = np.zeros((2, 13, 4))
NOT_THE_SAME = r"of the same tokens; got q \(2, 12, 4\), k \(2, 13, 4\)"


@pytest.mark.parametrize(
    ("name", "options", "error", "says"),
    [
        ("sliding_window", {"window": -1}, OptionError, "left must be at least 0; got -1"),
        ("sliding_window", {"window": 1.5}, OptionError, "left must be an integer; got 1.5"),
        ("sliding_window", {"window": (1, 2, 3)}, OptionError, "or a pair"),
        ("sliding_window", {"window": 1, "dilation": 0}, OptionError, "at least 1; got 0"),
        ("sliding_window", {"window": 1, "dilation": [1, 2, 3]}, ShapeError, "got 3, q is"),
        ("sliding_window", {"window": 1, "dilation": [1]}, ShapeError, "got 1, q is"),
        ("global_local", {"global_index": [12]}, OptionError, r"lie in 0..11; got 12"),
        ("global_local", {"global_index": [-1, 3]}, OptionError, r"lie in 0..11; got -1"),
        ("global_local", {"global_index": [0.5]}, DtypeError, "integers or booleans; got float"),
        ("global_local", {"global_index": [[1]]}, ShapeError, r"a list of positions.*\(1, 1\)"),
        ("global_local", {"global_index": [True]}, ShapeError, r"with M = 12; got \(1,\)"),
        ("global_local", {"first": -1}, OptionError, "first must be at least 0"),
        ("global_local", {"last": -2}, OptionError, "last must be at least 0"),
        ("global_local", {"token_ids": [1] * 12}, OptionError, "given together"),
        ("global_local", {"global_ids": [1]}, OptionError, "given together"),
        (
            "global_local",
            {"token_ids": [1.0] * 12, "global_ids": [1]},
            DtypeError,
            "token_ids must hold integers; got float64",
        ),
        (
            "global_local",
            {"token_ids": [1] * 11, "global_ids": [1]},
            ShapeError,
            r"token_ids must be \(..., M\) with M = 12; got \(11,\)",
        ),
        ("global_local", {"last": 1, "segments": [5, 7]}, OptionError, "combined with segments"),
        ("random", {"num_random": -1}, OptionError, "num_random must be at least 0; got -1"),
        ("random", {"num_random": 1, "block_size": 0}, OptionError, "block_size must be"),
        (
            "random",
            {"num_random": 1, "block_size": 3, "decisions": {"blocks": [[0]] * 5}},
            ShapeError,
            "makes 4 blocks of 3",
        ),
        (
            "random",
            {"num_random": 1, "block_size": 3, "decisions": {"blocks": [[4]] * 4}},
            ShapeError,
            "must be -1 to 3",
        ),
        (
            "random",
            {"num_random": 1, "decisions": {"buckets": [1]}},
            OptionError,
            "decisions may hold",
        ),
        ("sparse_transformer", {"stride": 0}, OptionError, "stride must be at least 1; got 0"),
        ("sparse_transformer", {"stride": 3, "columns": 4}, OptionError, "0..3; got 4"),
        ("sparse_transformer", {"stride": 3, "mode": "random"}, OptionError, "mode must be one"),
        ("sparse_transformer", {"stride": 3, "heads": "both"}, OptionError, "heads must be one"),
        (
            "sparse_transformer",
            {"stride": 3, "decisions": {"blocks": [[1]] * 4}},
            OptionError,
            "decisions may hold",
        ),
        (
            "sparse_transformer",
            {
                "stride": 3,
                "mode": "random_local",
                "decisions": {"blocks": np.zeros((1, 2, 4, 1), int)},
            },
            ShapeError,
            r"\(H, query blocks, count\); got \(1, 2, 4, 1\)",
        ),
        ("block_diagonal", {"block_size": 0}, OptionError, "at least 1; got 0"),
        ("blockbert", {"num_blocks": 0}, OptionError, "num_blocks must be at least 1; got 0"),
        ("blockbert", {"num_blocks": 2, "shifts": [1]}, ShapeError, "each head of q; got 1"),
        ("blockbert", {"num_blocks": 2, "shifts": [0, 0.5]}, OptionError, "shifts must be an int"),
        ("bigbird", {"num_window": 2}, OptionError, "num_window must be odd; got 2"),
        ("bigbird", {"num_window": 0}, OptionError, "num_window must be at least 1"),
        ("bigbird", {"num_global": -1}, OptionError, "num_global must be at least 0"),
        ("bigbird", {"extra_tokens": -1}, OptionError, "extra_tokens must be at least 0"),
        ("bigbird", {"causal": "bottom_right"}, OptionError, "causal must be one of"),
    ],
)
def test_errors_name_the_rule_and_what_was_given(name, options, error, says):
    with pytest.raises(error, match=says):
        getattr(pyattn, f"{name}_attention")(X, X, X, **options)


def test_a_grid_must_hold_the_tokens():
    with pytest.raises(ShapeError, match="has 10 tokens; positions up to 11"):
        pyattn.local_attention_2d(X, X, X, shape=(2, 5), window=1)
    with pytest.raises(ShapeError, match="an integer or two"):
        pyattn.local_attention_2d(X, X, X, shape=(3, 4), window=(1, 2, 3))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("random_attention", {"num_random": 1}),
        ("bigbird_attention", {}),
        ("blockbert_attention", {"num_blocks": 2}),
        ("sparse_transformer_attention", {"stride": 3, "mode": "random_local"}),
    ],
)
def test_blocks_of_queries_are_blocks_of_keys(name, options):
    with pytest.raises(ShapeError, match=NOT_THE_SAME):
        getattr(pyattn, name)(X, LONGER, LONGER, **options)
    with pytest.raises(ShapeError, match=r"q must have at least 3 axes.*got \(12, 4\)"):
        getattr(pyattn, name)(X[0], X[0], X[0], **options)


def test_dilations_may_be_an_array():
    q, k, v = qkv(2, 30, 4)
    one, other = (
        pyattn.sliding_window_attention(q, k, v, window=2, dilation=steps)
        for steps in ((1, 3), np.array([1, 3]))
    )
    np.testing.assert_array_equal(one, other)
