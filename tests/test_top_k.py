"""Attention to the highest scores, against a selection by sorting and dense formulas."""

from __future__ import annotations

import tracemalloc

import array_api_strict
import ml_dtypes
import numpy as np
import oracle
import pytest
from pyattn.kernels.array_api import selection
from pyattn.kernels.array_api.selection import highest
from table import Shape

import pyattn
from pyattn import masks
from pyattn.checks import DtypeError, OptionError, ShapeError
from pyattn.testing import gradcheck

BACKENDS = ["cpu", "array_api"]
SHAPES = [Shape((2,), 4, 2, 70, 90, 20, 13), Shape((), 2, 2, 9, 9, 8, 8),
          Shape((2, 2), 3, 1, 130, 65, 16, 16), Shape((1,), 1, 1, 1, 1, 4, 4)]


def draw(s, dtype=np.float64):
    rng = np.random.default_rng([s.n, s.m])
    return tuple(rng.standard_normal((*s.batch, h, n, w)).astype(dtype) for h, n, w in (
        (s.heads, s.n, s.d), (s.groups, s.m, s.d), (s.groups, s.m, s.e)))


def selected(q, k, allowed, top, threshold=-np.inf):
    """bool (..., H, N, M): sorted by score, equal ones by index."""
    k = oracle.repeat_heads(k.astype("f8"), q.shape[-3])
    score = (q.astype("f8") * q.shape[-1] ** -0.5) @ np.swapaxes(k, -1, -2)
    allowed = np.broadcast_to(allowed, score.shape) & (score > threshold)
    order = np.argsort(np.where(allowed, -score, np.inf), axis=-1, kind="stable")
    found = np.zeros_like(allowed)
    np.put_along_axis(found, order[..., :top], True, axis=-1)
    return found & allowed


def chosen(indices, m):
    found = np.zeros((*indices.shape[:-1], m + 1), bool)
    np.put_along_axis(found, indices, True, axis=-1)
    return found[..., :m]


def judge(q, k, v, backend, top, allowed=True, *, threshold=-np.inf, softcap=None, **options):
    """The selection must be the sorted one, but for scores that rounding may exchange."""
    dtype, rng = q.dtype, np.random.default_rng(7)
    with pyattn.use_backend(backend):
        (out, lse), saved = pyattn.top_k_attention.forward(
            q, k, v, top=top, softcap=softcap, return_lse=True,
            threshold=threshold if np.isfinite(threshold) else None, **options)
        dout = rng.standard_normal(out.shape).astype(dtype)
        dlse = rng.standard_normal(lse.shape).astype(lse.dtype)
        grads = saved.backward(dout, dlse)
    held = chosen(saved.decisions["indices"], k.shape[-2])
    want = selected(q, k, allowed, top, threshold)
    if dtype == np.float64:
        assert np.array_equal(held, want)
    assert np.array_equal(held.sum(-1), want.sum(-1))
    assert saved.stats["pairs"] == want.sum()
    problem = oracle.Dense(q, k, v, np.full(q.shape[-3], q.shape[-1] ** -0.5), held,
                           softcap=softcap)
    exact, rough = ((*oracle.forward(problem, r), oracle.backward(problem, dout, dlse, r))
                    for r in (oracle.exact(dtype), oracle.plain(dtype)))
    oracle.assert_close(out, exact[0], rough[0], factor=2, name="out", dtype=dtype)
    oracle.assert_close(lse, exact[1], rough[1], factor=2, name="lse", dtype=lse.dtype)
    for name, x in grads._asdict().items():
        oracle.assert_close(x, exact[2][name], rough[2][name], factor=3, name=name)
    return saved


def positions(n, m, top_left=False):
    return np.arange(n)[:, None] + (0 if top_left else m - n), np.arange(m)[None]


@pytest.mark.parametrize("dtype", [np.float64, np.float32, ml_dtypes.bfloat16],
                         ids=lambda x: np.dtype(x).name)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("top", [1, 7, 200])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_rule(shape, top, backend, dtype):
    judge(*draw(shape, dtype), backend, top)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, "top_left"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_causal(shape, causal, backend, dtype):
    i, j = positions(shape.n, shape.m, causal == "top_left")
    judge(*draw(shape, dtype), backend, 8, j <= i, causal=causal)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threshold", [-0.5, 0.3, 100.0])
def test_threshold(threshold, backend):
    judge(*draw(SHAPES[0]), backend, 12, threshold=threshold, softcap=2.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiles_behind_the_last_key_allow_nothing_before_it(backend):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, 200, 8)) for _ in range(3))
    given = np.ones((200, 200), bool)
    given[:, :128] = rng.random((200, 128)) < 0.3
    j = np.arange(200)
    for end in (5, 70, 130):
        judge(q, k, v, backend, 9, given & (j < end), mask=given, kv_lengths=[end])


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_and_lengths(backend):
    shape = SHAPES[0]
    q, k, v = draw(shape)
    i, j = positions(shape.n, shape.m)
    rng = np.random.default_rng(0)
    given = rng.random((2, 4, shape.n, shape.m)) < 0.3
    judge(q, k, v, backend, 9, given, mask=given)
    judge(q, k, v, backend, 9, given & (j <= i), mask=given, causal=True)
    judge(q, k, v, backend, 9, abs(i - j) <= 5, mask=masks.window(5, 5))
    blocks = masks.window(5, 5).compile(shape.n, shape.m)
    judge(q, k, v, backend, 9, abs(i - j) <= 5, mask=blocks)
    for lengths in ([70, 33], [0, 90]):
        inside = j < np.array(lengths)[:, None, None, None]
        k2, v2 = k.copy(), v.copy()
        for item, end in enumerate(lengths):
            k2[item, :, end:], v2[item, :, end:] = np.nan, np.nan
        saved = judge(np.nan_to_num(q), np.nan_to_num(k), np.nan_to_num(v), backend, 9, inside,
                      kv_lengths=lengths)
        again = pyattn.top_k_attention(q, k2, v2, top=9, kv_lengths=lengths)
        np.testing.assert_allclose(again, saved.attended.out, atol=1e-14)
    rows = np.arange(shape.n)[:, None] < np.array([20, 70])[:, None, None, None]
    judge(q, k, v, backend, 9, rows, q_lengths=[20, 70])
    at = i - shape.m + np.array([50, 90])[:, None, None, None] + shape.n - np.array(
        [20, 70])[:, None, None, None]
    judge(q, k, v, backend, 9, rows & (j < np.array([50, 90])[:, None, None, None]) & (j <= at),
          q_lengths=[20, 70], kv_lengths=[50, 90], causal=True)


@pytest.mark.parametrize("top", [1, 3, 6, 10, 11])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_of_equal_scores_the_first_are_taken(top, dtype):
    rng = np.random.default_rng(top)
    scores = rng.integers(0, 4, (300, 10)).astype(dtype)
    scores[::7] = 1
    scores[rng.random(scores.shape) < 0.2] = -np.inf
    found = highest(scores, top)
    for row, own in zip(scores, found, strict=True):
        order = sorted((-x, j) for j, x in enumerate(row) if x > -np.inf)[:top]
        want = sorted(j for _, j in order)
        assert own.tolist() == want + [-1] * (min(top, 10) - len(want))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_keys_share_no_more_than_their_places(backend):
    """All keys equal: the first `top` of those that are seen."""
    x = np.ones((1, 8, 4))
    v = np.arange(8.0).reshape(1, 8, 1)
    with pyattn.use_backend(backend):
        assert np.allclose(pyattn.top_k_attention(x, x, v, top=3), 1)
        out = pyattn.top_k_attention(x, x, v, top=3, causal=True)
    assert np.allclose(out.ravel(), [0, 0.5, 1, 1, 1, 1, 1, 1])


def test_blocks_of_queries_do_not_change_the_selection(monkeypatch):
    q, k, v = draw(Shape((1,), 2, 1, 300, 200, 8, 8))
    want = pyattn.top_k_attention.forward(q, k, v, top=5, causal=True)[1].decisions["indices"]
    monkeypatch.setattr(selection, "SCORED", 1)
    found = pyattn.top_k_attention.forward(q, k, v, top=5, causal=True)[1].decisions["indices"]
    assert np.array_equal(found, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_as_many_as_there_are_is_dense_attention(backend):
    q, k, v = draw(SHAPES[0])
    with pyattn.use_backend(backend):
        for causal in (False, True):
            out, saved = pyattn.top_k_attention.forward(q, k, v, top=90, causal=causal)
            want, dense = pyattn.attention.forward(q, k, v, causal=causal)
            np.testing.assert_allclose(out, want, atol=1e-13)
            for x, y in zip(saved.backward(out), dense.backward(out), strict=True):
                np.testing.assert_allclose(x, y, atol=1e-13)


def test_gradients_are_those_of_selected_pairs_alone():
    q, k, v = draw(SHAPES[1])
    _, saved = pyattn.top_k_attention.forward(q, k, v, top=2)
    held = chosen(saved.decisions["indices"], 9)
    for head, i in np.ndindex(2, 9):
        dout = np.zeros_like(q)
        dout[head, i] = 1
        grads = saved.backward(dout)
        assert not grads.k[head, ~held[head, i]].any()
        assert not grads.v[head, ~held[head, i]].any()
        assert not np.delete(grads.q[head], i, axis=0).any()


def test_future_tokens_change_nothing():
    q, k, v = draw(Shape((), 2, 2, 40, 40, 8, 8))
    before = pyattn.top_k_attention(q, k, v, top=4, causal=True)
    for x in (q, k, v):
        x[..., 25:, :] += 3
    after = pyattn.top_k_attention(q, k, v, top=4, causal=True)
    assert np.array_equal(before[..., :25, :], after[..., :25, :])
    assert (before[..., 25:, :] != after[..., 25:, :]).any()


def test_finite_differences():
    gradcheck(pyattn.top_k_attention, *draw(SHAPES[1]), top=3, softcap=2.0, return_lse=True)


def test_decisions_are_taken_as_they_are():
    q, k, v = draw(SHAPES[0])
    _, saved = pyattn.top_k_attention.forward(q, k, v, top=5)
    rng = np.random.default_rng(0)
    shuffled = rng.permuted(saved.decisions["indices"], axis=-1)
    q2 = q + 1
    again, same = pyattn.top_k_attention.forward(q2, k, v, top=5, causal=True,
                                                 decisions={"indices": shuffled})
    assert same.stats["scored"] == 0
    assert saved.stats["scored"] == 2 * 4 * 70 * 90
    want = pyattn.top_k_attention(q2, k, v, top=1, decisions=saved.decisions)
    assert np.array_equal(again, want)


def test_a_score_that_is_nan_is_selected():
    q, k, v = draw(SHAPES[1])
    k[0, 4] = np.nan
    out, saved = pyattn.top_k_attention.forward(q, k, v, top=2)
    assert (saved.decisions["indices"][0] == 4).any(-1).all()
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()


def test_arrays_of_another_library():
    q, k, v = draw(SHAPES[0])
    k[..., 10:30, :] = k[..., 5:6, :]           # equal scores
    out, saved = pyattn.top_k_attention.forward(q, k, v, top=8, causal=True)
    strict = [array_api_strict.asarray(x) for x in (q, k, v)]
    got, same = pyattn.top_k_attention.forward(*strict, top=8, causal=True,
                                               decisions=saved.decisions)
    np.testing.assert_allclose(np.asarray(got), out, atol=1e-13)
    for x, y in zip(same.backward(got), saved.backward(out), strict=True):
        np.testing.assert_allclose(np.asarray(x), y, atol=1e-13)
    own = pyattn.top_k_attention.forward(*strict, top=8, causal=True)[1].decisions["indices"]
    assert isinstance(own, np.ndarray)
    assert np.mean(own == saved.decisions["indices"]) > 0.95


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [
    Shape((2,), 2, 1, 0, 5, 4, 4), Shape((2,), 2, 1, 5, 0, 4, 4), Shape((0,), 2, 2, 3, 3, 4, 4),
    Shape((1,), 0, 0, 3, 3, 4, 4)], ids=str)
def test_nothing_to_do(shape, backend):
    q, k, v = draw(shape)
    with pyattn.use_backend(backend):
        out, saved = pyattn.top_k_attention.forward(q, k, v, top=2, causal=True)
        assert not out.any()
        assert saved.backward(out).k.shape == k.shape


def test_arguments_that_do_not_fit():
    q, k, v = draw(SHAPES[0])
    with pytest.raises(OptionError, match="top must be at least 1"):
        pyattn.top_k_attention(q, k, v, top=0)
    with pytest.raises(OptionError, match="causal"):
        pyattn.top_k_attention(q, k, v, top=1, causal="left")
    with pytest.raises(ShapeError, match="k has width"):
        pyattn.top_k_attention(q, k[..., 1:], v, top=1)
    with pytest.raises(ShapeError, match="mask"):
        pyattn.top_k_attention(q, k, v, top=1, mask=np.ones((3, 4, 70, 90), bool))
    with pytest.raises(OptionError, match="decisions may hold"):
        pyattn.top_k_attention(q, k, v, top=1, decisions={"blocks": 1})
    with pytest.raises(DtypeError, match="indices must be integers"):
        pyattn.top_k_attention(q, k, v, top=1, decisions={"indices": np.zeros((2, 4, 70, 1))})
    with pytest.raises(ShapeError, match="indices must be"):
        pyattn.top_k_attention(q, k, v, top=1, decisions={"indices": np.zeros((2, 4, 7, 1), int)})
    with pytest.raises(OptionError, match="indices must lie"):
        pyattn.top_k_attention(q, k, v, top=1,
                               decisions={"indices": np.full((2, 4, 70, 1), 90)})


def test_no_array_of_all_scores_is_made():
    x = np.random.default_rng(0).standard_normal((1, 4096, 4), dtype=np.float32)
    tracemalloc.start()
    try:
        pyattn.top_k_attention(x, x, x, top=4)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4096 * 4096 * 4 / 2


ORDERS = {"ascending": lambda j: j, "descending": lambda j: -j, "few values": lambda j: j % 3,
          "all equal": lambda j: 0 * j, "saw": lambda j: j * 37 % 101,
          "infinite": lambda j: np.where(j % 5 == 0, np.inf, j),
          "mixed signs": lambda j: (-1.0) ** j * j,
          "no numbers": lambda j: np.where(j % 7, j, np.nan),
          "tiny": lambda j: (j % 90 - 45) * 5e-324}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("top", [1, 15, 64, 400])
def test_whatever_the_order_of_scores_the_same_keys_are_chosen(order, dtype, top):
    """Of scores that are the keys themselves, of width 1."""
    n, m = 70, 700
    with np.errstate(under="ignore"):
        scores = ORDERS[order](np.arange(m, dtype=np.float64)).astype(dtype)
    q, k = np.ones((1, n, 1), dtype), scores[None, :, None]
    ranks = np.where(np.isnan(scores), np.inf, scores)
    first = pyattn.top_k_attention.forward(
        q, k, np.ones_like(k), top=top, scale=1.0, causal=True)[1].decisions["indices"]
    for i in range(n):
        seen = ranks[:m - n + i + 1]
        want = sorted(sorted(range(len(seen)), key=lambda j: (-seen[j], j))[:top])
        assert first[0, i, :len(want)].tolist() == want
