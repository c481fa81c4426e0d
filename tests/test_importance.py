"""Which blocks a query's group selects, against a loop over queries, blocks and tokens."""

from __future__ import annotations

import math

import array_api_strict
import ml_dtypes
import numpy as np
import pytest

import pyattn
from pyattn.checks import DtypeError, OptionError, ShapeError
from pyattn.features import compress, important_blocks
from pyattn.features.compression import complete_blocks

BACKENDS = ["cpu", "array_api"]


def drawn(batch, heads, groups, n, m, d, size, stride, dtype=np.float64):
    """q, compressed keys, and an lse that is one of the visible keys or, here, anything."""
    rng = np.random.default_rng([n, m, size])
    q = rng.standard_normal((*batch, heads, n, d)).astype(dtype)
    k = rng.standard_normal((*batch, groups, m, d)).astype(dtype)
    lse = rng.uniform(2, 4, (*batch, heads, n))
    return q, compress(k, block_size=size, stride=stride), lse


def listed(q, k, lse, *, tokens, block_size, stride, select_block, num_selected, num_initial=1,
           num_local=2, causal=True, q_lengths=None, kv_lengths=None, scale=None):
    """Everything one at a time; returns lists, and how far the last choice was from a tie."""
    q, k, lse = (np.asarray(x, np.float64) for x in (q, k, lse))
    batch, heads, n = q.shape[:-3], q.shape[-3], q.shape[-2]
    groups, blocks = k.shape[-3], -(-tokens // select_block)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    count = min(num_selected, blocks)
    found = np.full((*batch, groups, n, count), -1, np.int32)
    narrowest = math.inf
    for item in np.ndindex(batch):
        nq = n if q_lengths is None else np.broadcast_to(q_lengths, batch)[item]
        nk = tokens if kv_lengths is None else np.broadcast_to(kv_lengths, batch)[item]
        for g in range(groups):
            for i in range(nq):
                at = i if causal == "top_left" else i + nk - nq
                importance = np.zeros(blocks)
                for h in range(g * heads // groups, (g + 1) * heads // groups):
                    for c in range(k.shape[-2]):
                        members = range(c * stride, c * stride + block_size)
                        if members[-1] >= nk or (causal and members[-1] > at):
                            continue
                        score = scale * float(q[(*item, h, i)] @ k[(*item, g, c)])
                        weight = math.exp(score - lse[(*item, h, i)])
                        for token in members:
                            importance[token // select_block] += weight / stride
                there = [j for j in range(blocks) if j * select_block < nk
                         and not (causal and j * select_block > at)]
                own = at // select_block
                always = [j for j in there if j < num_initial or (
                    own - num_local < j <= own if causal else abs(j - own) < num_local)]
                others = sorted((j for j in there if j not in always),
                                key=lambda j: (-importance[j], j))
                free = count - len(always)
                if 0 < free < len(others):
                    gap = importance[others[free - 1]] - importance[others[free]]
                    if gap > 0:
                        narrowest = min(narrowest, gap)
                chosen = sorted(always + others[:free])
                found[(*item, g, i, slice(len(chosen)))] = chosen
    return found, narrowest


SIZES = {
    "paper": {"block_size": 8, "stride": 4, "select_block": 16, "num_selected": 4},
    "equal blocks": {"block_size": 8, "stride": 8, "select_block": 8, "num_selected": 5},
    "each token": {"block_size": 1, "stride": 1, "select_block": 8, "num_selected": 4},
    "nothing divides": {"block_size": 6, "stride": 4, "select_block": 9, "num_selected": 6,
                        "num_initial": 2, "num_local": 2},
    "stride beyond": {"block_size": 5, "stride": 9, "select_block": 4, "num_selected": 7},
    "nothing forced": {"block_size": 8, "stride": 4, "select_block": 16, "num_selected": 2,
                       "num_initial": 0, "num_local": 0},
    "all": {"block_size": 8, "stride": 4, "select_block": 16, "num_selected": 50},
    "none": {"block_size": 8, "stride": 4, "select_block": 16, "num_selected": 0,
             "num_initial": 0, "num_local": 0},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False, "top_left"])
@pytest.mark.parametrize("case", SIZES)
def test_against_loops(case, causal, backend):
    size, stride = SIZES[case]["block_size"], SIZES[case]["stride"]
    for n, m in ((70, 70), (20, 75), (75, 20)):
        q, k, lse = drawn((1,), 4, 2, n, m, 6, size, stride)
        options = {"tokens": m, "causal": causal, **SIZES[case]}
        want, gap = listed(q, k, lse, **options)
        assert gap > 1e-9
        with pyattn.use_backend(backend):
            got = important_blocks(q, k, lse, **options)
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
def test_padding(causal, backend):
    q, k, lse = drawn((3,), 2, 1, 60, 80, 5, 8, 4)
    options = {"tokens": 80, "causal": causal, "q_lengths": [60, 33, 0],
               "kv_lengths": [80, 51, 7], **SIZES["paper"]}
    want, _ = listed(q, k, lse, **options)
    # what lies in the padding is never looked at
    q[1, :, 33:], k[1, :, complete_blocks(51, 8, 4):] = np.nan, np.nan
    with pyattn.use_backend(backend):
        np.testing.assert_array_equal(important_blocks(q, k, lse, **options), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared", [1, 2, 3, 16])
def test_heads_of_a_group_choose_together(shared, backend):
    q, k, lse = drawn((), 2 * shared, 2, 70, 70, 6, 8, 4)
    options = {"tokens": 70, **SIZES["paper"]}
    want, _ = listed(q, k, lse, **options)
    with pyattn.use_backend(backend):
        got = important_blocks(q, k, lse, **options)
    assert got.shape[:2] == (2, 70)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
def test_narrow_dtypes(dtype):
    """Rounding may turn near ties round: almost all lists are those of float64."""
    q, k, lse = drawn((), 4, 1, 200, 200, 16, 8, 4, dtype)
    options = {"tokens": 200, **SIZES["paper"]}
    want, _ = listed(q, k, lse, **options)
    for backend in BACKENDS:
        with pyattn.use_backend(backend):
            got = important_blocks(q, k, lse, **options)
        assert (got == want).all(-1).mean() > 0.95


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_equals_the_lowest_number_is_taken(backend):
    q, k, lse = np.ones((1, 64, 4)), np.ones((1, 16, 4)), np.full((1, 64), 3.0)
    with pyattn.use_backend(backend):
        got = important_blocks(q, k, lse, tokens=64, block_size=4, stride=4, select_block=4,
                               num_selected=5, num_initial=1, num_local=1)
    assert got[0, 63].tolist() == [0, 1, 2, 3, 15]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_of_nan_counts_as_nothing(backend):
    q, k, lse = drawn((), 1, 1, 64, 64, 4, 4, 4)
    options = {"tokens": 64, "block_size": 4, "stride": 4, "select_block": 4, "num_selected": 5}
    q[0, 9] = np.nan
    k[0, 3] = np.nan
    with pyattn.use_backend(backend):
        got = important_blocks(q, k, lse, **options)
        assert got[0, 9].tolist() == [0, 1, 2, -1, -1]
        k[0, 3] = -100 * q[0, 63]
        want = important_blocks(q, k, lse, **options)
    assert got[0, 63].tolist() == want[0, 63].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_see_no_compressed_key_list_what_is_there(backend):
    q, k, lse = drawn((), 2, 1, 20, 20, 4, 8, 4)
    lse[:, :7] = -np.inf
    with pyattn.use_backend(backend):
        got = important_blocks(q, k, lse, tokens=20, block_size=8, stride=4, select_block=2,
                               num_selected=3, num_initial=1, num_local=1)
    assert got[0, :7:2].tolist() == [[0, -1, -1], [0, 1, -1], [0, 1, 2], [0, 1, 3]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_future_changes_no_list(backend):
    q, k, lse = drawn((), 4, 2, 150, 150, 8, 8, 4)
    options = {"tokens": 150, **SIZES["paper"]}
    with pyattn.use_backend(backend):
        before = important_blocks(q, k, lse, **options)
        for t in (7, 64, 100):
            k2, q2, lse2 = k.copy(), q.copy(), lse.copy()
            # blocks that hold a token from t on
            k2[:, complete_blocks(t, 8, 4):] = np.nan
            q2[:, t:], lse2[:, t:] = 7.0, 1.0
            after = important_blocks(q2, k2, lse2, **options)
            np.testing.assert_array_equal(after[:, :t], before[:, :t])


def test_threads_change_nothing():
    q, k, lse = drawn((2,), 4, 2, 600, 600, 8, 8, 4, np.float32)
    usual = pyattn.get_num_threads()
    found = []
    for threads in (1, 3):
        pyattn.set_num_threads(threads)
        try:
            found.append(important_blocks(q, k, lse, tokens=600, **SIZES["paper"]))
        finally:
            pyattn.set_num_threads(usual)
    np.testing.assert_array_equal(*found)


def test_other_libraries_and_strided_arrays():
    q, k, lse = drawn((2,), 4, 2, 70, 70, 6, 8, 4)
    options = {"tokens": 70, **SIZES["paper"]}
    want = important_blocks(q, k, lse, **options)
    got = important_blocks(*map(array_api_strict.asarray, (q, k, lse)), **options)
    assert type(got) is np.ndarray
    np.testing.assert_array_equal(got, want)
    turned = np.ascontiguousarray(np.swapaxes(q, -3, -2)).swapaxes(-3, -2)
    np.testing.assert_array_equal(important_blocks(turned, k[..., ::-1][..., ::-1], lse,
                                                   **options), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    with pyattn.use_backend(backend):
        for batch, heads, n, m in (((0,), 2, 5, 5), ((2,), 2, 0, 5), ((2,), 2, 5, 0),
                                   ((), 0, 5, 5)):
            q, k, lse = drawn(batch, heads, heads, n, m, 4, 2, 1)
            got = important_blocks(q, k, lse, tokens=m, block_size=2, stride=1, select_block=2,
                                   num_selected=2, num_initial=0, num_local=1)
            assert got.shape == (*batch, heads, n, min(2, -(-m // 2)))


@pytest.mark.parametrize(("error", "change"), [
    (OptionError, {"num_selected": 2}), (OptionError, {"causal": 1}), (OptionError, {"stride": 0}),
    (OptionError, {"select_block": 0}), (OptionError, {"num_local": -1}),
    (OptionError, {"causal": False, "num_selected": 3}), (ShapeError, {"tokens": 19}),
    (ShapeError, {"lse": np.ones((3, 20))}), (ShapeError, {"q": np.ones((3, 20, 4))}),
    (ShapeError, {"q": np.ones((2, 20, 5))}), (DtypeError, {"q": np.ones((2, 20, 4), "f4")}),
    (ShapeError, {"kv_lengths": 21}), (OptionError, {"q_lengths": 1.5}),
], ids=str)
def test_errors(error, change):
    q, k, lse = drawn((), 2, 2, 20, 20, 4, 4, 2)
    given = {"q": q, "k_compressed": k, "lse": lse, "tokens": 20, "block_size": 4, "stride": 2,
             "select_block": 4, "num_selected": 4, **change}
    with pytest.raises(error, match="must"):
        important_blocks(**given)
