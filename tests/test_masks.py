"""Masks against rules written here, and BlockMasks against both, decoded from rows and columns."""

from __future__ import annotations

import argparse
import dataclasses
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from pyattn import masks
from pyattn.checks import BackendError, DtypeError, OptionError, ShapeError
from pyattn.cli import show as show_command
from pyattn.masks import compile as compiler
from pyattn.masks.algebra import EMPTY, FULL
from pyattn.masks.bits import unpack
from pyattn.masks.placement import bottom_right

TILE = 64
LENGTHS = [(0, 0), (0, 65), (65, 0), (1, 1), (1, 200), (63, 64), (64, 63), (64, 64), (65, 65),
           (200, 65), (65, 200), (200, 200)]


def random(n, m, *lead, chance=0.5, seed=0):
    return np.random.default_rng((seed, n, m)).random((*lead, n, m)) < chance


def sparse(n, m):
    return scipy.sparse.csr_array(random(n, m, chance=0.03))


def split(length, parts=3):
    """`length` cut into segments, the second of them empty."""
    cuts = [0, *sorted(np.random.default_rng(length).integers(0, length + 1, parts - 2)), length]
    sizes = np.diff(cuts).tolist()
    return [sizes[0], 0, *sizes[1:]]


def of_segment(sizes):
    return np.repeat(np.arange(len(sizes)), sizes)


def in_segment(sizes):
    """Position of each token in its own segment."""
    return np.concatenate([np.arange(0), *map(np.arange, sizes)])


def table(n, m, size):
    return random(-(-n // size), -(-m // size), chance=0.4)


def grid(n, m):
    return 1 + max(n, m) // 17, 17


# name: (mask for n and m, rule over storage indices i and j, and positions p and j)
CASES = {
    "full": (lambda n, m: masks.full(), lambda i, j, p, n, m: j >= 0),
    "causal": (lambda n, m: masks.causal(), lambda i, j, p, n, m: j <= p),
    "window": (lambda n, m: masks.window(5, 3), lambda i, j, p, n, m: (p - 5 <= j) & (j <= p + 3)),
    "window-left": (lambda n, m: masks.window(70, None), lambda i, j, p, n, m: p - 70 <= j),
    "window-right": (lambda n, m: masks.window(None, 0), lambda i, j, p, n, m: j <= p),
    "dilated": (lambda n, m: masks.window(4, 30, dilation=3),
                lambda i, j, p, n, m: (p - 12 <= j) & (j <= p + 90) & ((j - p) % 3 == 0)),
    "window_2d": (lambda n, m: masks.window_2d(grid(n, m), (2, 3)),
                  lambda i, j, p, n, m: (abs(p // 17 - j // 17) <= 2)
                  & (abs(p % 17 - j % 17) <= 3)),
    "global": (lambda n, m: masks.global_tokens([0, 3, 77, 500]),
               lambda i, j, p, n, m: np.isin(p, [0, 3, 77]) | np.isin(j, [0, 3, 77])),
    "global-none": (lambda n, m: masks.global_tokens([]), lambda i, j, p, n, m: j < 0),
    "strided": (lambda n, m: masks.strided(7), lambda i, j, p, n, m: abs(p - j) % 7 == 0),
    "strided-3": (lambda n, m: masks.strided(3), lambda i, j, p, n, m: (p - j) % 3 == 0),
    "fixed": (lambda n, m: masks.fixed(20, 3),
              lambda i, j, p, n, m: (p // 20 == j // 20) | (j % 20 >= 17)),
    "staircase": (lambda n, m: masks.staircase(7, 3), lambda i, j, p, n, m: 3 * j + 6 <= p),
    "staircase-1": (lambda n, m: masks.staircase(1, 1), lambda i, j, p, n, m: j <= p),
    "predicate": (lambda n, m: masks.predicate(lambda i, j: (i * j) % 5 == 0),
                  lambda i, j, p, n, m: (p * j) % 5 == 0),
    "predicate-bounds": (
        lambda n, m: masks.predicate(lambda i, j: (i + j) % 2 == 0, masks.window(50, 2)),
        lambda i, j, p, n, m: ((p + j) % 2 == 0) & (p - 50 <= j) & (j <= p + 2)),
    "dense": (lambda n, m: masks.dense(random(n, m)), lambda i, j, p, n, m: random(n, m)),
    "dense-keys": (lambda n, m: masks.dense(random(1, m, chance=0.9)),
                   lambda i, j, p, n, m: random(1, m, chance=0.9)),
    "dense-queries": (lambda n, m: masks.dense(random(n, 1, chance=0.9)),
                      lambda i, j, p, n, m: random(n, 1, chance=0.9)),
    "dense-one": (lambda n, m: masks.dense([[True]]), lambda i, j, p, n, m: j >= 0),
    "blocks": (lambda n, m: masks.blocks(table(n, m, 24), 24),
               lambda i, j, p, n, m: np.kron(table(n, m, 24), np.ones((24, 24)))[:n, :m] > 0),
    "blocks-64": (lambda n, m: masks.blocks(table(n, m, 64), 64),
                  lambda i, j, p, n, m: np.kron(table(n, m, 64), np.ones((64, 64)))[:n, :m] > 0),
    "blocks-1": (lambda n, m: masks.blocks(random(n, m), 1), lambda i, j, p, n, m: random(n, m)),
    "random_blocks": (
        lambda n, m: masks.random_blocks(2, 48, rng=5),
        lambda i, j, p, n, m: (masks.random_blocks(2, 48, rng=5).numbers(n, m)[i // 48]
                               == j[:, :, None] // 48).any(2)),
    "segments": (lambda n, m: masks.segments(split(n), split(m)),
                 lambda i, j, p, n, m: of_segment(split(n))[:, None] == of_segment(split(m))),
    "packed": (
        lambda n, m: masks.packed(masks.window(90, 1) | masks.global_tokens([2]), split(n),
                                  split(m), "top_left"),
        lambda i, j, p, n, m: (of_segment(split(n))[:, None] == of_segment(split(m)))
        & ((np.abs(2 * (in_segment(split(n))[:, None] - in_segment(split(m))) - 89) <= 91)
           | (in_segment(split(n))[:, None] == 2) | (in_segment(split(m)) == 2))),
    "graph": (lambda n, m: masks.graph(sparse(n, m)), lambda i, j, p, n, m: sparse(n, m).toarray()),
}

def rule(name, n, m, offset=None):
    i, j = np.arange(n)[:, None], np.arange(m)[None, :]
    answer = CASES[name][1](i, j, i + (m - n if offset is None else offset), n, m)
    return np.broadcast_to(answer, (n, m)).astype(bool)


def disagreement(blocks, expected):
    """Where a BlockMask, read by rows or by columns, is not `expected`; None if nowhere."""
    for columns in (False, True):
        decoded = blocks.dense(columns=columns)
        if decoded.shape != expected.shape:
            return f"shape {decoded.shape}, not {expected.shape}"
        if not np.array_equal(decoded, expected):
            return columns, np.argwhere(decoded != expected)[0].tolist()
    return None


def check(mask, n, m, expected, **placing):
    dense = mask.dense(n, m, **placing)
    assert dense.dtype == bool
    assert np.array_equal(dense, expected)
    blocks = mask.compile(n, m, **placing)
    assert disagreement(blocks, expected) is None
    well_formed(blocks)
    times = blocks.layout.size // max(expected[..., :1, :1].size, 1) if expected.size else 1
    assert blocks.count().pairs == times * expected.sum()
    return blocks


def well_formed(blocks):
    """What kernels rely on, beyond the pairs being right."""
    for runs, lines, others in ((blocks.rows, blocks.n, blocks.m), (blocks.columns, blocks.m,
                                                                    blocks.n)):
        assert [x.dtype for x in runs] == [np.int64] + [np.int32] * 4
        assert runs.start.shape[1] == -(-lines // TILE) + 1
        assert (np.diff(runs.start.ravel()) >= 0).all()
        assert (runs.count > 0).all()
        assert (runs.first >= 0).all()
        assert (runs.first + runs.count <= -(-others // TILE)).all()
        assert runs.names.size == runs.count[runs.tile >= 0].sum()
    assert blocks.layout.dtype == np.int32
    assert blocks.layout.ndim >= 1
    assert blocks.bits.shape == blocks.bits_t.shape == (len(blocks.bits), TILE)
    assert len(np.unique(blocks.bits, axis=0)) == len(blocks.bits)
    assert np.array_equal(unpack(blocks.bits), unpack(blocks.bits_t).transpose(0, 2, 1))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("n", "m"), LENGTHS)
def test_a_mask_is_its_rule(name, n, m):
    mask = CASES[name][0](n, m)
    expected = rule(name, n, m)
    check(mask, n, m, expected)
    check(~mask, n, m, ~expected)
    near = np.abs(np.arange(n)[:, None] + m - n - np.arange(m)) <= 40
    check(mask & masks.window(40, 40), n, m, expected & near)
    check(~mask | ~masks.window(40, 40), n, m, ~(expected & near))


POSITIONAL = ["causal", "window", "dilated", "global", "strided", "fixed", "staircase",
              "predicate", "predicate-bounds"]


@pytest.mark.parametrize("name", POSITIONAL)
@pytest.mark.parametrize("offset", [-70, 0, 3, 200])
def test_positions_follow_the_offset(name, offset):
    mask = CASES[name][0](130, 100)
    check(mask, 130, 100, rule(name, 130, 100, offset), offset=offset)


def test_a_window_may_be_as_large_as_an_integer_gets():
    for huge in (sys.maxsize, 10**30):
        assert masks.window(huge, huge).compile(100, 200).tiles == (8, 0, 0)
        check(masks.window(huge, 0, dilation=3), 70, 70,
              rule("causal", 70, 70) & rule("strided-3", 70, 70))


def test_storage_masks_do_not_follow_the_offset():
    mask = masks.dense(random(100, 130)) & masks.segments([40, 60], [100, 30])
    assert np.array_equal(mask.dense(100, 130, offset=7), mask.dense(100, 130))


def test_one_offset_per_batch_item():
    offsets = np.array([[0, 5], [-3, 5], [100, 0]])
    expected = np.stack([rule("causal", 90, 130, x) for x in offsets.ravel()])
    blocks = check(masks.causal(), 90, 130, expected.reshape(3, 2, 1, 90, 130), offset=offsets)
    assert blocks.layout.tolist() == [[[0], [1]], [[2], [1]], [[3], [0]]]
    assert len(blocks.rows.start) == 4


def test_offsets_and_leading_axes_together():
    array = random(70, 70, 2, 3)
    expected = np.stack([array[b] & rule("causal", 70, 70, x) for b, x in enumerate((0, -5))])
    check(masks.dense(array) & masks.causal(), 70, 70, expected, offset=[0, -5])


@pytest.mark.parametrize("lead", [(1,), (4,), (2, 1), (2, 3), (0, 3)])
def test_dense_with_leading_axes(lead):
    array = random(70, 130, *lead)
    blocks = check(masks.dense(array), 70, 130, array)
    assert blocks.layout.shape == lead


def test_dense_axes_of_stride_zero_are_compiled_once():
    wide = np.broadcast_to(random(70, 70), (5, 3, 70, 70))
    assert masks.dense(wide).lead == (1, 1)
    assert len(masks.dense(wide).compile(70, 70).rows.start) == 1


def test_equal_layouts_are_shared():
    array = np.stack([random(70, 70), random(70, 70), ~random(70, 70)])
    assert masks.dense(array).compile(70, 70).layout.tolist() == [0, 0, 1]
    heads = masks.per_head([masks.causal(), masks.window(3, 0), masks.causal()])
    assert heads.compile(100, 100).layout.tolist() == [0, 1, 0]


def test_padding_as_a_dense_array_compiles_to_runs():
    kept = np.arange(100_000) < np.array([70_000, 100_000])[:, None]
    blocks = masks.dense(kept[:, None, None]).compile(100_000, 100_000)
    assert blocks.built.evaluated <= 2
    assert blocks.nbytes < 1e6
    assert blocks.count().pairs == 170_000 * 100_000


def test_lengths():
    expected = np.broadcast_to(np.arange(130) < np.array([0, 64, 130])[:, None, None], (3, 70, 130))
    mask = masks.lengths([0, 64, 130])
    assert mask.lead == (3, 1)
    check(mask, 70, 130, expected[:, None])
    check(mask & masks.dense(random(70, 130, 2)), 70, 130, expected[:, None] & random(70, 130, 2))


def test_per_head_with_batch_axes():
    heads = masks.per_head([masks.lengths([5, 70]), masks.causal(), masks.dense(random(70, 70))])
    assert heads.lead == (2, 3)
    expected = np.empty((2, 3, 70, 70), bool)
    expected[0, 0], expected[1, 0] = np.arange(70) < 5, True
    expected[:, 1], expected[:, 2] = rule("causal", 70, 70), random(70, 70)
    check(heads, 70, 70, expected)


def test_block_lists():
    lists = np.array([[0, 2, 2], [-1, -1, -1], [1, -1, 0]])
    seen = np.zeros((3, 3), bool)
    seen[[0, 0, 2, 2], [0, 2, 1, 0]] = True
    for size in (3, 32, 50, 64, 100, 128):
        expected = np.kron(seen, np.ones((size, size))) > 0
        check(masks.block_lists(lists, size), 3 * size - 1, 3 * size - 2, expected[:-1, :-2])
    both = masks.block_lists([lists, lists[::-1]], 32)
    assert both.lead == (2,)
    check(both, 96, 96, np.stack([np.kron(x, np.ones((32, 32))) > 0 for x in (seen, seen[::-1])]))


@pytest.mark.parametrize("alignment", ["bottom_right", "top_left"])
@pytest.mark.parametrize("name", [*POSITIONAL, "full"])
def test_packed_segments_start_anew(name, alignment):
    queries, keys = [40, 0, 100, 3, 57], [50, 7, 64, 0, 57]
    n, m = sum(queries), sum(keys)
    expected = np.zeros((n, m), bool)
    i = j = 0
    for q, k in zip(queries, keys, strict=True):
        expected[i:i + q, j:j + k] = rule(name, q, k, 0 if alignment == "top_left" else None)
        i, j = i + q, j + k
    mask = CASES[name][0](n, m)
    check(masks.packed(mask, queries, keys, alignment), n, m, expected)
    together = masks.packed(~mask, queries, keys, alignment) | masks.packed(
        mask, queries, keys, alignment)
    check(together, n, m, masks.segments(queries, keys).dense(n, m))


def test_packed_masks_keep_storage_masks_and_leading_axes():
    array = random(50, 50, 2)
    mask = masks.packed(masks.causal() & masks.dense(array), [20, 30])
    inside = np.kron(np.eye(2), np.ones((30, 30)))[10:, 10:] > 0
    check(mask, 50, 50, array & inside & np.tri(50, dtype=bool))


LEAVES = st.sampled_from([
    "masks.causal()", "masks.window(5, 90)", "masks.window(70, None, 2)", "masks.strided(5)",
    "masks.fixed(50, 4)", "masks.global_tokens((0, 66))", "masks.window_2d((15, 10), 2)",
    "masks.full()", "masks.random_blocks(1, 32, rng=3)"])
EXPRESSIONS = st.recursive(LEAVES, lambda inner: st.one_of(
    st.builds("~({})".format, inner), st.builds("({}) & ({})".format, inner, inner),
    st.builds("({}) | ({})".format, inner, inner),
    st.builds("masks.per_head([{}, {}])".format, LEAVES, LEAVES)), max_leaves=6)
SIZES = st.integers(0, 150)


@settings(max_examples=60, deadline=None)
@given(EXPRESSIONS, EXPRESSIONS, SIZES, SIZES)
def test_the_algebra(first, second, n, m):
    a, b = eval(first), eval(second)
    if len({x.lead for x in (a, b)} - {()}) > 1:
        return
    x, y = a.dense(n, m), b.dense(n, m)
    for mask, expected in ((a & b, x & y), (a | b, x | y), (~a, ~x), (~(a & b), ~x | ~y),
                           (a & ~a, x & False), (~~a, x)):
        assert np.array_equal(mask.dense(n, m), expected)
        assert disagreement(mask.compile(n, m), expected) is None


@settings(max_examples=60, deadline=None)
@given(EXPRESSIONS)
def test_repr_is_the_expression(expression):
    mask = eval(expression)
    again = eval(repr(mask), {name: getattr(masks, name) for name in masks.__all__})
    assert again == mask
    assert hash(again) == hash(mask)
    assert repr(again) == repr(mask) == str(mask)
    assert pickle.loads(pickle.dumps(mask)) == mask


@pytest.mark.parametrize("name", CASES)
def test_classify_is_sound(name):
    n, m = 150, 200
    resolved = CASES[name][0](n, m).resolve(bottom_right(n, m))
    allowed = rule(name, n, m)
    rng = np.random.default_rng(0)
    i0, i1 = np.sort(rng.integers(0, n, (2, 400)), axis=0)
    j0, j1 = np.sort(rng.integers(0, m, (2, 400)), axis=0)
    i1[:100], j1[:200] = np.minimum(i1, i0 + 3)[:100], np.minimum(j1, j0 + 3)[:200]
    kinds = resolved.classify(i0, i1, j0, j1)
    assert kinds.dtype == np.int8
    for kind, a, b, c, d in zip(kinds, i0, i1, j0, j1, strict=True):
        box = allowed[a:b + 1, c:d + 1]
        assert kind != FULL or box.all()
        assert kind != EMPTY or not box.any()


@pytest.mark.parametrize("name", CASES)
def test_words_and_signatures(name):
    n, m = 256, 320
    resolved = CASES[name][0](n, m).resolve(bottom_right(n, m))
    i0, j0 = (x.ravel() * TILE for x in np.mgrid[:n // TILE, :m // TILE])
    lanes = np.arange(TILE)
    bits = unpack(resolved.words(i0[:, None] + lanes, j0[:, None] + lanes))
    known = {}
    signature = np.stack(np.broadcast_arrays(np.zeros(len(i0)), *resolved.signature(i0, j0)), 1)
    for key, i, j, tile in zip(signature.tolist(), i0, j0, bits, strict=True):
        assert np.array_equal(tile, rule(name, n, m)[i:i + TILE, j:j + TILE])
        assert np.array_equal(known.setdefault(tuple(key), tile), tile)


def test_a_users_function_is_never_asked_beyond_the_ends():
    lookup = np.arange(70) % 3

    def same(i, j):
        return lookup[i] == lookup[j]

    check(masks.predicate(same), 70, 70, lookup[:, None] == lookup)


# ---- what it costs

MILLION = 1_000_000


@pytest.mark.parametrize(("mask", "megabytes", "boxes", "evaluated", "pairs"), [
    (masks.causal(), 2, 70_000, 2, MILLION * (MILLION + 1) // 2),
    (masks.causal() & masks.window(511, 0), 3, 140_000, 4, 512 * MILLION - 511 * 512 // 2),
    (masks.full(), 2, 1, 0, MILLION**2),
    (masks.window(64, 64, dilation=4), 4, 300_000, 20, None),
    (masks.window(256, 256) | masks.global_tokens([0, 5, 600_000]), 8, 600_000, 200, None),
    (masks.random_blocks(3, 64, rng=0), 4, 2_000_000, 0, 4 * 15625 * 64 * 64),
    (masks.window_2d((1000, 1000), 3), 10, 2_000_000, 10_000, None),
    (masks.packed(masks.causal(), [1000] * 1000), 4, 300_000, 60_000, 1000 * 1000 * 1001 // 2),
    (masks.packed(masks.causal(), [40_000] * 25), 4, 300_000, 1, 25 * 40_000 * 40_001 // 2),
], ids=str)
def test_a_million_tokens(mask, megabytes, boxes, evaluated, pairs):
    blocks = mask.compile(MILLION, MILLION)
    assert blocks.nbytes < megabytes * 1e6
    assert blocks.built.boxes <= boxes
    assert blocks.built.evaluated <= evaluated
    assert pairs is None or blocks.count().pairs == pairs


def test_cost_grows_with_the_tiles_of_a_band_not_with_all_pairs():
    boxes = [masks.window(300, 0).compile(n, n).built.boxes for n in (2**15, 2**16, 2**17)]
    assert boxes[2] / boxes[1] < 2.1
    assert boxes[1] / boxes[0] < 2.1


def test_a_bare_predicate_costs_all_pairs_once_and_bounds_restrict_it():
    asked = []

    def even(i, j):
        asked.append(np.broadcast(i, j).size)
        return (i + j) % 2 == 0

    masks.predicate(even).compile(640, 640)
    assert sum(asked) == 640 * 640
    asked.clear()
    masks.predicate(even, masks.window(63, 0)).compile(640, 640)
    assert sum(asked) == 19 * 64 * 64


def test_causal_at_256_is_the_example_of_the_design():
    blocks = masks.causal().compile(256, 256)
    assert len(blocks.bits) == 1
    assert np.array_equal(unpack(blocks.bits)[0], np.tri(64, dtype=bool))
    start = blocks.rows.start[0]
    runs = [list(zip(*(x[start[t]:start[t + 1]].tolist() for x in
                       (blocks.rows.first, blocks.rows.count, blocks.rows.tile)), strict=True))
            for t in range(4)]
    assert runs[0] == [(0, 1, 0)]
    assert runs[2] == [(0, 2, -1), (2, 1, 2)]
    assert blocks.rows.names.tolist() == [0, 0, 0, 0]
    assert blocks.tiles == (6, 4, 6)


@pytest.mark.parametrize("mask", [
    masks.causal() & masks.window(100, 0), masks.dense(random(200, 300, 3)), masks.full(),
    masks.random_blocks(1, 50, 1)], ids=str)
def test_counts_against_brute_force(mask):
    n, m = 200, 300
    rng = np.random.default_rng(1)
    layout = rng.integers(0, mask.lead[-1] if mask.lead else 1, (20, 3))
    q_lengths, kv_lengths = rng.integers(0, n + 1, 20), rng.integers(0, m + 1, 20)
    q_lengths[:3], kv_lengths[:3] = [0, n, 64], [m, 0, 128]
    blocks, dense = mask.compile(n, m), mask.dense(n, m).reshape(-1, n, m)
    padded = np.zeros((len(dense), 256, 320), bool)
    padded[:, :n, :m] = dense
    visited = padded.reshape(-1, 4, 64, 5, 64).any((2, 4))
    tiles = pairs = 0
    for row, q, k in zip(layout, q_lengths, kv_lengths, strict=True):
        for number in row:
            tiles += visited[number, :-(-q // 64), :-(-k // 64)].sum()
            pairs += dense[number, :q, :k].sum()
    assert blocks.count(layout, q_lengths, kv_lengths) == (tiles, pairs)
    assert blocks.count() == (visited.sum(), dense.sum())
    assert blocks.tiles.full + blocks.tiles.partial == visited.sum()
    assert sum(blocks.tiles) == visited.size
    assert blocks.count(np.zeros((0, 4), int), np.zeros(0), np.zeros(0)) == (0, 0)


# ---- the judge is judged

def broken(blocks, **changes):
    return dataclasses.replace(blocks, **changes)


def test_the_comparison_notices_what_is_wrong():
    expected = rule("causal", 200, 200)
    blocks = masks.causal().compile(200, 200)
    assert disagreement(blocks, expected) is None
    bits = blocks.bits.copy()
    bits[:, 5] ^= np.uint64(1 << 7)
    assert disagreement(broken(blocks, bits=bits), expected) == (False, [5, 7])
    assert disagreement(broken(blocks, bits_t=bits), expected)[0] is True
    first = blocks.columns.first.copy()
    first[-1] -= 1
    assert disagreement(broken(blocks, columns=blocks.columns._replace(first=first)), expected)
    tile = blocks.rows.tile.copy()
    tile[-1] = -1
    assert disagreement(broken(blocks, rows=blocks.rows._replace(tile=tile)), expected)
    assert disagreement(blocks, expected[:-1]) is not None


# ---- the cache

def test_equal_masks_compile_to_one_object():
    mask = masks.causal() & masks.window(33, 0)
    again = masks.causal() & masks.window(33, 0)
    assert mask == again
    assert mask.compile(100, 120) is again.compile(100, 120)
    assert mask.compile(100, 120) is not mask.compile(120, 100)
    assert mask.compile(100, 120, offset=[1, 2]) is again.compile(100, 120, offset=[1, 2])
    assert mask.compile(100, 120, offset=[1, 2]) is not mask.compile(100, 120, offset=[2, 1])
    assert masks.dense(random(9, 9)).compile(9, 9) is masks.dense(random(9, 9)).compile(9, 9)
    assert masks.dense(random(9, 9)) != masks.dense(~random(9, 9))
    assert masks.window(3, 4) != masks.window(4, 3)
    assert masks.segments([3, 4]) != masks.segments([3, 4], [3, 4])


def test_a_dense_mask_does_not_follow_its_array():
    array = random(70, 70)
    mask = masks.dense(array)
    before = array.copy()
    array[:] = False
    check(mask, 70, 70, before)
    assert array.flags.writeable


def test_arrays_are_read_only():
    blocks = (masks.causal() & masks.dense(random(70, 70, 2))).compile(70, 70)
    for array in (blocks.layout, *blocks.rows, *blocks.columns, blocks.bits, blocks.bits_t):
        assert not array.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        masks.segments([3, 4]).q_lengths[0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        masks.causal().low = 3


def test_the_cache_is_bounded_by_bytes_and_drops_what_was_used_longest_ago():
    kept = [masks.window(size, 0).compile(500, 500) for size in range(4)]
    size = kept[0].nbytes
    assert {blocks.nbytes for blocks in kept[1:]} == {kept[1].nbytes}
    cache = compiler.Cache(size + 2 * kept[1].nbytes)
    keys = [(blocks.source, 500, 500) for blocks in kept]
    for key, blocks in zip(keys[:3], kept[:3], strict=True):
        assert cache.put(key, blocks) is blocks
    assert cache.get(keys[0]) is kept[0]
    cache.put(keys[3], kept[3])
    assert [cache.get(key) is not None for key in keys] == [True, False, True, True]
    assert cache.held <= cache.limit
    other = masks.window(0, 0).compile(501, 501)
    assert cache.put(keys[0], other) is kept[0]
    small = compiler.Cache(10)
    assert small.put(keys[0], kept[0]) is kept[0]
    assert small.get(keys[0]) is None
    assert small.held == 0


def test_threads_get_the_same_object():
    compiler.cache.clear()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: masks.fixed(40, 2).compile(n, n), [300, 301] * 40))
    assert len({id(blocks) for blocks in found}) == 2
    assert disagreement(found[0], masks.fixed(40, 2).dense(300, 300)) is None


# ---- BlockMask as a mask, randomness

def test_a_block_mask_combines_through_its_source():
    blocks = masks.causal().compile(100, 130)
    both = blocks & masks.window(5, 0)
    expected = masks.window(5, 0).dense(100, 130)
    assert np.array_equal(both.dense(100, 130), expected)
    assert disagreement(both.compile(100, 130), expected) is None
    assert np.array_equal((~blocks).dense(100, 130), ~rule("causal", 100, 130))
    assert blocks.compile(100, 130) is blocks
    assert blocks.dense(100, 130).shape == (100, 130)
    assert repr(blocks) == "causal()"
    assert blocks == masks.causal().compile(100, 130)
    with pytest.raises(ShapeError, match=r"compiled for n = 100, m = 130; got n = 100, m = 131"):
        both.compile(100, 131)


def test_a_block_mask_keeps_the_offset_it_was_given():
    blocks = masks.causal().compile(100, 130, offset=[0, 7])
    assert blocks.lead == (2, 1)
    both = blocks & masks.window(5, 0)
    assert np.array_equal(both.dense(100, 130)[:, 0],
                          blocks.dense()[:, 0] & rule("causal", 100, 130)
                          & (np.arange(130) >= np.arange(100)[:, None] + 30 - 5))
    pinned = masks.causal().compile(100, 130, offset=0)
    assert np.array_equal(pinned.compile(100, 130, offset=9).dense(), pinned.dense())
    free = masks.causal().compile(100, 130)
    assert np.array_equal(free.compile(100, 130, offset=0).dense(), pinned.dense())


def test_block_masks_pickle_and_index():
    blocks = masks.per_head([masks.causal(), masks.full()]).compile(70, 70)
    again = pickle.loads(pickle.dumps(blocks))
    assert np.array_equal(again.dense(), blocks.dense())
    assert np.array_equal(blocks.at((0,)).dense(), rule("causal", 70, 70))


def test_random_blocks():
    mask = masks.random_blocks(3, 16, rng=np.random.default_rng(4))
    numbers = mask.numbers(160, 300)
    assert np.array_equal(numbers, mask.numbers(160, 300))
    assert numbers.shape == (10, 4)
    assert np.array_equal(numbers[:, 0], np.arange(10))
    assert all(len(set(row)) == 4 for row in numbers.tolist())
    assert numbers.min() >= 0
    assert numbers.max() < 19
    resolved = mask.resolve(bottom_right(160, 300))
    assert np.array_equal(resolved.numbers, numbers)
    assert np.array_equal(masks.block_lists(numbers, 16).dense(160, 300), mask.dense(160, 300))
    assert masks.random_blocks(3, 16, rng=7) == masks.random_blocks(3, 16, rng=7)
    assert masks.random_blocks(3, 16) != masks.random_blocks(3, 16)
    assert masks.random_blocks(99, 16, rng=0).dense(160, 300).all()
    assert masks.random_blocks(2, 16, rng=0).numbers(100, 20)[:, 0].tolist() == [0, *[1] * 6]
    often = np.bincount(np.concatenate([masks.random_blocks(2, 1, rng=seed).numbers(1, 5)[0, 1:]
                                        for seed in range(400)]), minlength=5)
    assert often[0] == 0
    assert often[1:].min() > 150


def test_graph_takes_any_sparse_format_and_stored_zeros_are_edges():
    dense = random(70, 90, chance=0.05)
    for form in ("csr", "csc", "coo", "dok", "lil", "bsr"):
        graph = scipy.sparse.coo_array(dense).asformat(form)
        check(masks.graph(graph), 70, 90, dense)
    zeros = scipy.sparse.csr_array((np.zeros(2), ([0, 1], [1, 0])), shape=(2, 2))
    check(masks.graph(zeros), 2, 2, ~np.eye(2, dtype=bool))
    twice = scipy.sparse.coo_array((np.ones(3), ([0, 0, 1], [1, 1, 0])), shape=(2, 2))
    check(masks.graph(twice), 2, 2, ~np.eye(2, dtype=bool))
    check(masks.graph(scipy.sparse.csr_matrix(dense)), 70, 90, dense)


def test_scipy_and_matplotlib_are_not_imported():
    code = ("import sys; from pyattn import masks; masks.causal().compile(99, 99);"
            "bad = {'scipy', 'matplotlib', 'numba'} & set(sys.modules); assert not bad, bad")
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- errors

@pytest.mark.parametrize(("call", "error", "says"), [
    (lambda: masks.window(-1, 0), OptionError, "window's left must be at least 0; got -1"),
    (lambda: masks.window(1, 0.5), OptionError, r"window's right must be an integer; got 0.5"),
    (lambda: masks.window(1, 0, dilation=0), OptionError, "dilation must be at least 1; got 0"),
    (lambda: masks.strided(0), OptionError, "stride must be at least 1; got 0"),
    (lambda: masks.fixed(4, 5), OptionError, "columns must be at most its stride 4; got 5"),
    (lambda: masks.window_2d((3, 0), 1), ShapeError, r"each >= 1; got \(3, 0\)"),
    (lambda: masks.window_2d((3, 3), -1), OptionError, "radius must be at least 0; got -1"),
    (lambda: masks.window_2d((3, 3), (1, 2, 3)), ShapeError, r"or two; got \(1, 2, 3\)"),
    (lambda: masks.window_2d((3, 3), 1).compile(9, 10), ShapeError, "9 tokens; positions up to 9"),
    (lambda: masks.global_tokens([-1]), OptionError, "index must be at least 0; got -1"),
    (lambda: masks.global_tokens([0.5]), DtypeError, "must hold integers; got float64"),
    (lambda: masks.global_tokens(3), ShapeError, r"must have 1 axis; got shape \(\)"),
    (lambda: masks.dense(np.ones((3, 3))), DtypeError, "must be boolean .*; got float64"),
    (lambda: masks.dense(np.ma.array([True, False])), DtypeError, "must be plain; got MaskedArray"),
    (lambda: masks.dense(random(3, 4)).compile(3, 5), ShapeError, r"\(..., 3, 4\) must broadcast"),
    (lambda: masks.lengths([3, 9]).compile(4, 8), ShapeError, "at most M = 8; got 9"),
    (lambda: masks.lengths([True]), DtypeError, "must hold integers; got bool"),
    (lambda: masks.segments([3, 4]).compile(7, 8), ShapeError, "add up to M = 8; got 7 in 2"),
    (lambda: masks.segments([3], [1, 2]), ShapeError, "as many for queries .* got 1 and 2"),
    (lambda: masks.packed(masks.causal(), [3], [4], "left"), OptionError, "alignment must be"),
    (lambda: masks.packed(masks.window_2d((2, 2), 1), [3, 5]).compile(8, 8), ShapeError,
     "4 tokens; positions up to 4"),
    (lambda: masks.blocks(np.ones((2, 2)), 4), DtypeError, "must be boolean; got float64"),
    (lambda: masks.blocks(np.ones(2, bool), 4), ShapeError, r"key blocks\); got \(2,\)"),
    (lambda: masks.blocks(np.ones((2, 2), bool), 4).compile(9, 8), ShapeError,
     "N = 9 makes 3 blocks of 4; .* has 2"),
    (lambda: masks.block_lists([[3]], 4).compile(4, 12), ShapeError, "-1 to 2, .* got 3 to 3"),
    (lambda: masks.block_lists([[0.5]], 4), DtypeError, "must be integers; got float64"),
    (lambda: masks.random_blocks(-1, 4), OptionError, "num must be at least 0; got -1"),
    (lambda: masks.graph(np.eye(3)), DtypeError, "must be a scipy.sparse array; got ndarray"),
    (lambda: masks.graph(scipy.sparse.eye_array(3)).compile(3, 4), ShapeError,
     r"graph \(3, 3\) must be \(N, M\) = \(3, 4\)"),
    (lambda: masks.predicate(3), DtypeError, "takes a function of .*; got int"),
    (lambda: masks.predicate(lambda i, j: i + j).compile(3, 3), DtypeError, "booleans; got int64"),
    (lambda: masks.predicate(lambda i, j: np.ones(7, bool)).compile(3, 3), ShapeError,
     "broadcast shape of its arguments"),
    (lambda: masks.predicate(min, 3), DtypeError, "bounds must be a mask; got int"),
    (lambda: masks.per_head([]), ShapeError, "at least one mask"),
    (lambda: masks.per_head([masks.causal(), 3]), DtypeError, "head 1 is a int"),
    (lambda: masks.per_head([masks.dense(random(3, 3, 2))]), ShapeError, "head axis of 1 or none"),
    (lambda: masks.dense(random(3, 3, 2)) & masks.dense(random(3, 3, 3)), ShapeError,
     r"must broadcast; .* has \(2,\), .* has \(3,\)"),
    (lambda: masks.causal().compile(-1, 3), OptionError, "n must be at least 0; got -1"),
    (lambda: masks.causal().compile(1.5, 3), OptionError, "n must be an integer; got 1.5"),
    (lambda: masks.causal().compile(3, 3, offset=0.5), DtypeError, "offset must hold integers"),
    (lambda: masks.dense(random(3, 3, 2, 2)).compile(3, 3, offset=[1, 2, 3]), ShapeError,
     r"offset \(3,\) must broadcast"),
    (lambda: masks.causal() and masks.full(), TypeError, "combine masks with &"),
    (lambda: masks.causal() & random(3, 3), TypeError, "operand"),
    (lambda: random(3, 3) & masks.causal(), TypeError, "unsupported operand"),
])
def test_errors_name_the_rule_and_what_was_given(call, error, says):
    with pytest.raises(error, match=says):
        call()


# ---- pictures

def test_text_of_pairs_and_of_tiles():
    assert masks.window(1, 0).draw(3) == "█··\n██·\n·██"
    assert masks.full().draw(0) == ""
    assert masks.causal().draw(256) == "▒···\n█▒··\n██▒·\n███▒"
    assert masks.causal().draw(100, 250) == "██▒▒\n███▒"
    heads = masks.per_head([masks.full(), masks.causal()])
    assert heads.draw(2) == "██\n██"
    assert heads.draw(2, index=(1,)) == "█·\n██"
    assert masks.causal().compile(2, 3).draw() == "██·\n███"


def test_a_large_picture_fits():
    lines = masks.causal().draw(100_000).splitlines()
    assert len(lines) == len(lines[0]) <= 80
    assert all(line == "█" * t + "▒" + "·" * (len(lines) - t - 1) for t, line in enumerate(lines))


@pytest.fixture
def axes():
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    from matplotlib.figure import Figure

    return Figure().add_subplot()


@pytest.mark.parametrize(("n", "m"), [(0, 3), (1, 1), (200, 150), (700, 700), (60_000, 60_000)])
def test_plot_tells_tiles_apart(axes, n, m):
    mask = masks.causal() & masks.window(300, 0)
    assert mask.plot(n, m, ax=axes) is axes
    assert axes.get_title() == repr(mask)
    assert len(axes.images) == (n > 0)
    if n == 700:
        colours = {tuple(x) for x in np.asarray(axes.images[0].get_array()).reshape(-1, 3).tolist()}
        assert len(colours) == 3
    axes.figure.canvas.draw()


def test_plot_without_matplotlib_prints(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.patches", None)
    assert masks.causal().plot(2) == "█·\n██"
    assert capsys.readouterr().out == "█·\n██\n"


def show(*arguments):
    parser = argparse.ArgumentParser()
    show_command.add(parser.add_subparsers())
    args = parser.parse_args(["show", *arguments])
    return args.run(args)


def test_show_counts_and_draws(capsys):
    assert show("causal", "--n", "256") == 0
    assert capsys.readouterr().out.splitlines() == [
        "causal(), 256 queries, 256 keys", "tiles  6 full, 4 partial, 6 empty",
        "pairs  32,896 of 65,536 allowed (50.20%)",
        f"bytes  {masks.causal().compile(256, 256).nbytes:,} in 7 runs and 1 bit tiles", "",
        "▒···", "█▒··", "██▒·", "███▒"]


def test_show_takes_expressions_and_leading_axes(capsys):
    assert show("per_head([~causal & window(3, None), full])", "--n", "3", "--m", "4") == 0
    said = capsys.readouterr().out
    assert said.startswith("per_head([~causal() & window(3, None), full()]), 3 queries, 4 keys, "
                           "leading axes (2,), the first drawn\n")
    assert said.endswith("\n\n··██\n···█\n····\n")
    assert show("causal", "--n", "0") == 0


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_show_writes_a_picture(tmp_path, capsys, ending):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    path = tmp_path / f"mask.{ending}"
    assert show("causal & window(99, 0)", "--n", "300", "--output", str(path)) == 0
    assert path.stat().st_size > 1000
    assert f"wrote {path}" in capsys.readouterr().out
    with pytest.raises(OptionError, match=r"--output .*nonsense"):
        show("causal", "--output", str(tmp_path / "mask.nonsense"))


def test_show_needs_matplotlib_for_a_picture(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BackendError, match="needs matplotlib"):
        show("causal", "--output", "mask.png")


@pytest.mark.parametrize(("expression", "says"), [
    ("casual", "there is no mask 'casual'; there are block_lists, blocks, causal, "),
    ("window", r"missing a required argument: 'left'; it is window\(left, right, dilation=1\)"),
    ("window(1, 2, reach=3)", "unexpected keyword argument 'reach'"),
    ("window(*[1, 2])", "has no place in an expression"),
    ("window(-1, 0)", "must be at least 0; got -1"),
    ("causal() & 3", "'3' is none"),
    ("causal() + causal()", "has no place"),
    ("causal().compile(3, 3)", "has no place"),
    ("__import__('os')", "there is no mask '__import__'"),
    ("[causal]", "is no mask"),
    ("(lambda: 3)()", "has no place"),
    ("3 +", "is no expression of masks: invalid syntax"),
    ("~" * 5000 + "causal()", "is no expression of masks"),
    ("", "is no expression of masks"),
])
def test_show_evaluates_nothing_but_masks(expression, says):
    with pytest.raises(OptionError, match=says):
        show(expression)


def test_show_exits_with_2_for_an_unknown_mask():
    command = [sys.executable, "-m", "pyattn", "show", "casual"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "there is no mask 'casual'; there are " in done.stderr
