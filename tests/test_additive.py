"""Additive attention against dense formulas, its limits, and its micro-kernels."""

from __future__ import annotations

import tracemalloc

import array_api_strict
import ml_dtypes
import numpy as np
import oracle
import pytest
from pyattn.kernels.cpu import threads
from table import Shape, positions
from test_micro_kernels import WIDTHS, at, micro_kernel

import pyattn
from pyattn import masks
from pyattn.checks import DtypeError, OptionError, ShapeError
from pyattn.testing import gradcheck

BACKENDS = ["cpu", "array_api"]
DTYPES = [np.float64, np.float32, ml_dtypes.bfloat16, np.float16]
NAMES = ("q", "k", "v", "w_q", "w_k", "w_score", "b")
SHAPES = [Shape((), 1, 1, 1, 1, 1, 1), Shape((2,), 4, 2, 33, 70, 20, 13),
          Shape((1,), 3, 1, 140, 64, 7, 32), Shape((2, 1), 2, 2, 9, 150, 8, 8)]
EMPTY = [Shape((2,), 2, 1, 0, 5, 4, 4), Shape((2,), 2, 1, 5, 0, 4, 4),
         Shape((0,), 2, 2, 3, 3, 4, 4), Shape((1,), 0, 0, 3, 3, 4, 4)]
KEY_WIDTH, FEATURES = 11, 19


def draw(s, dtype=np.float64, *, features=FEATURES, per_head=True, seed=0):
    """Arguments whose projected queries and keys are about 1."""
    rng = np.random.default_rng([s.n, s.m, seed])
    heads, groups = ((s.heads,), (s.groups,)) if per_head else ((), ())
    shapes = ((*s.batch, s.heads, s.n, s.d), (*s.batch, s.groups, s.m, KEY_WIDTH),
              (*s.batch, s.groups, s.m, s.e), (*heads, s.d, features),
              (*groups, KEY_WIDTH, features), (*heads, features), (*heads, features))
    scales = (1, 1, 1, s.d**-0.5, KEY_WIDTH**-0.5, 1, 1)
    return [(scale * rng.standard_normal(shape)).astype(dtype)
            for shape, scale in zip(shapes, scales, strict=True)]


def dense(arguments, allowed, r, dout=None, dlse=None):
    """Out and lse, or gradients by name, from arrays with all axes; scores enter as a bias."""
    q, k, v, w_q, w_k, w_score, b = (r(x) for x in arguments)
    heads, groups = q.shape[-3], k.shape[-3]
    w = np.broadcast_to(w_score, (heads, w_score.shape[-1]))
    with np.errstate(all="ignore"):
        a = r(r(q @ w_q) + b[..., None, :])
        c = oracle.repeat_heads(r(k @ w_k), heads)
        t = r(np.tanh(r(a[..., :, None, :] + c[..., None, :, :])))
        scores = r(r(t * w[:, None, None, :]).sum(axis=-1))
    none = np.zeros((*q.shape[:-1], 1)), np.zeros((*k.shape[:-1], 1))
    problem = oracle.Dense(*none, v, np.zeros(heads), allowed, bias=scores)
    if dout is None:
        return oracle.forward(problem, r)
    found = oracle.backward(problem, dout, dlse, r)
    met = np.broadcast_to(allowed, scores.shape)[..., None]
    with np.errstate(all="ignore"):
        ds = r(found["bias"])[..., None]
        y = r(np.where(met, ds * w[:, None, None, :] * (1 - t * t), 0))
        dt = r(np.where(met, ds * t, 0))
    da, dc = r(y.sum(axis=-2)), y.sum(axis=-3)
    dc = r(dc.reshape(*dc.shape[:-3], groups, heads // max(groups, 1), *dc.shape[-2:]).sum(axis=-3))

    def weight(x, dy, w):
        # what nobody may see has a gradient of 0, whatever it holds
        x = np.where((dy != 0).any(axis=-1, keepdims=True), x, 0)
        return oracle.sum_to(np.swapaxes(x, -1, -2) @ dy, w.shape)

    grads = {"q": da @ np.swapaxes(w_q, -1, -2), "k": dc @ np.swapaxes(w_k, -1, -2),
             "v": found["v"], "w_q": weight(q, da, w_q), "w_k": weight(k, dc, w_k),
             "w_score": oracle.sum_to(dt.sum(axis=(-3, -2)), w_score.shape),
             "b": oracle.sum_to(da.sum(axis=-2), b.shape)}
    return {name: r(x) for name, x in grads.items()}


def judge(arguments, allowed, backend, *, factor=4, **options):
    """Hold out, lse and all gradients against dense arithmetic."""
    dtype, rng = arguments[0].dtype, np.random.default_rng(5)
    for x in arguments:
        x.flags.writeable = False
    with pyattn.use_backend(backend):
        (out, lse), saved = pyattn.additive_attention.forward(
            *arguments, return_lse=True, **options)
        dout = rng.standard_normal(out.shape).astype(dtype)
        dlse = rng.standard_normal(lse.shape).astype(lse.dtype)
        grads = saved.backward(dout, dlse)
    assert grads._fields == NAMES
    found = [(*dense(arguments, allowed, r), dense(arguments, allowed, r, dout, dlse))
             for r in (oracle.exact(dtype), oracle.plain(dtype))]
    exact, rough = found
    oracle.assert_close(out, exact[0], rough[0], factor=2, name="out", dtype=dtype)
    oracle.assert_close(lse, exact[1], rough[1], factor=2, name="lse", dtype=lse.dtype)
    for name, x in grads._asdict().items():
        oracle.assert_close(x, exact[2][name], rough[2][name], factor=factor, name=name,
                            dtype=dtype)
    return saved


def inside(s, **options):
    """Pairs by position, those within the lengths."""
    causal = options.pop("causal", False)
    i, j, there = positions(s, "top_left" if causal == "top_left" else "bottom_right", **options)
    return there & (j <= i) if causal else there


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: np.dtype(x).name)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_rule(shape, per_head, backend, dtype):
    judge(draw(shape, dtype, per_head=per_head), inside(shape), backend)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True, "top_left"])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_causal_masked_and_padded(shape, causal, backend, dtype):
    rng = np.random.default_rng(1)
    arguments = draw(shape, dtype)
    lengths = {"q_lengths": rng.integers(0, shape.n + 1, shape.batch),
               "kv_lengths": rng.integers(1, shape.m + 1, shape.batch)}
    mask = rng.random((*shape.batch, shape.heads, shape.n, shape.m)) < 0.4
    mask[..., ::7, :] = False
    allowed = inside(shape, causal=causal, **lengths) & mask
    saved = judge(arguments, allowed, backend, causal=causal, mask=mask, **lengths)
    assert saved.stats["pairs"] == allowed.sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_nothing_to_do(shape, backend):
    if shape.heads:
        judge(draw(shape), inside(shape), backend)
    arguments = draw(shape, per_head=False)
    with pyattn.use_backend(backend):
        out, saved = pyattn.additive_attention.forward(*arguments)
        grads = saved.backward(out)
    assert out.shape == (*arguments[0].shape[:-1], shape.e)
    for x, dx in zip(arguments, grads, strict=True):
        assert x.shape == dx.shape
        assert not np.any(dx)


@pytest.mark.parametrize("backend", BACKENDS)
def test_finite_differences(backend):
    shape = Shape((2,), 2, 1, 5, 6, 3, 4)
    arguments = draw(shape, features=3)
    with pyattn.use_backend(backend):
        assert gradcheck(pyattn.additive_attention, *arguments, causal=True,
                         kv_lengths=np.array([6, 4]))
        assert gradcheck(pyattn.additive_attention, *draw(shape, features=3, per_head=False)[:-1])


def test_queries_and_keys_of_different_widths():
    """The article's "different lengths": the widths of q and k are no matter of each other."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((1, 4, 9)), rng.standard_normal((1, 6, 2))
    w_q, w_k, w = rng.standard_normal((9, 5)), rng.standard_normal((2, 5)), rng.standard_normal(5)
    out, saved = pyattn.additive_attention.forward(q, k, k, w_q, w_k, w)
    assert saved.backward(out).q.shape == q.shape
    assert saved.backward(out).w_k.shape == w_k.shape
    # products of these would not even be defined; and a key of weight 0 in every feature is
    # a constant score
    flat = pyattn.additive_attention(0 * q, k, k, w_q, 0 * w_k, w)
    np.testing.assert_allclose(flat, np.broadcast_to(k.mean(axis=1, keepdims=True), (1, 4, 2)))


def test_one_feature_by_hand():
    q, k, v = np.zeros((1, 1, 1)), np.array([[[0.0], [1.0]]]), np.array([[[2.0], [5.0]]])
    one = np.ones((1, 1))
    first, second = 1, np.exp(np.tanh(1))
    want = (2 * first + 5 * second) / (first + second)
    np.testing.assert_allclose(pyattn.additive_attention(q, k, v, one, one, one[0]), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_what_no_one_may_see_has_no_say(backend, dtype):
    shape = Shape((2,), 4, 2, 70, 133, 6, 7)
    q, k, v, *weights = draw(shape, dtype)
    rng = np.random.default_rng(2)
    mask = rng.random((70, 133)) < 0.5
    mask[:, 40:45], mask[50:53] = False, False
    options = {"mask": mask, "kv_lengths": np.array([133, 100]), "q_lengths": np.array([60, 70])}
    dout = rng.standard_normal((2, 4, 70, 7)).astype(dtype)
    results = []
    for fill in (0, np.nan, np.inf):
        k[..., 40:45, :], v[..., 40:45, :] = fill, fill
        k[1, :, 100:], v[1, :, 100:] = fill, fill
        q[..., 50:53, :], dout[..., 50:53, :] = fill, fill
        q[0, :, 60:], dout[0, :, 60:] = fill, fill
        with pyattn.use_backend(backend):
            (out, lse), saved = pyattn.additive_attention.forward(
                q, k, v, *weights, return_lse=True, **options)
            results.append((out, lse, *saved.backward(dout, np.ones_like(lse))))
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            # what may meet NaN is summed up in another order
            largest = np.abs(x, where=np.isfinite(x), out=np.zeros_like(x)).max()
            np.testing.assert_allclose(x, y, rtol=0, atol=100 * np.finfo(dtype).eps * largest)
    out, lse = results[0][:2]
    assert not out[:, :, 50:53].any()
    assert (lse[:, :, 50:53] == -np.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_value_that_is_seen_by_some_does_not_reach_others(backend):
    shape = Shape((), 1, 1, 80, 80, 4, 4)
    q, k, v, *weights = draw(shape)
    with pyattn.use_backend(backend):
        plain, saved = pyattn.additive_attention.forward(q, k, v, *weights, causal=True)
        dout = np.zeros_like(plain)
        dout[..., :70, :] = 1
        want = saved.backward(dout)
        k[..., 75, :], v[..., 75, :] = np.nan, np.inf
        out, saved = pyattn.additive_attention.forward(q, k, v, *weights, causal=True)
        grads = saved.backward(dout)
    np.testing.assert_allclose(out[..., :75, :], plain[..., :75, :], rtol=0, atol=1e-14)
    assert not np.isfinite(out[..., 75:, :]).any()
    np.testing.assert_allclose(grads.q[..., :70, :], want.q[..., :70, :], rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_saturated_features(backend, dtype):
    """Beyond +-1 there is nothing, and what is infinite there is no NaN."""
    shape = Shape((), 2, 2, 40, 70, 4, 5)
    q, k, v, w_q, w_k, w_score, b = draw(shape, dtype)
    huge = [q * dtype(1e4), k, v, w_q, w_k, w_score, b]
    judge(huge, inside(shape), backend)
    infinite = np.where(q < 0, -np.inf, np.inf).astype(dtype)[..., :1]
    ones = np.ones((1, FEATURES), dtype)
    with pyattn.use_backend(backend):
        out, saved = pyattn.additive_attention.forward(infinite, k, v, ones, w_k, w_score, b)
        grads = saved.backward(out)
    np.testing.assert_allclose(out, np.broadcast_to(v.mean(axis=1, keepdims=True), out.shape),
                               atol=1e-5)
    assert not grads.k.any()


def test_small_features_keep_their_digits():
    """Gradients where the tanhs are small are as exact as where they are not."""
    shape = Shape((), 1, 1, 65, 65, 8, 8)
    q, k, v, w_q, w_k, w_score, b = draw(shape, np.float32)
    judge([q, k, v, 1e-4 * w_q, 1e-4 * w_k, w_score, 0 * b], inside(shape), "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_by_item_and_by_head(backend):
    shape = Shape((2,), 4, 2, 70, 70, 5, 6)
    arguments = draw(shape)
    each = masks.per_head([masks.window(left, 0) for left in (0, 5, 66, 70)])
    i, j = np.arange(70)[:, None], np.arange(70)
    allowed = np.stack([(j <= i) & (j >= i - left) for left in (0, 5, 66, 70)])
    judge(arguments, allowed, backend, mask=each)
    by_item = np.random.default_rng(0).random((2, 1, 70, 70)) < 0.2
    judge(arguments, by_item, backend, mask=by_item)


@pytest.mark.parametrize("backend", BACKENDS)
def test_broadcast_axes_and_strided_views(backend):
    shape = Shape((3,), 4, 2, 20, 70, 5, 6)
    q, k, v, *weights = draw(shape)
    whole = np.broadcast_to(k[:1], k.shape)
    with pyattn.use_backend(backend):
        out, saved = pyattn.additive_attention.forward(q, whole, v, *weights)
        want = saved.backward(out)
        turned = [np.ascontiguousarray(np.swapaxes(x, 1, 2)).swapaxes(1, 2) for x in (q, v)]
        shared, saved = pyattn.additive_attention.forward(turned[0], k[0], turned[1], *weights)
        got = saved.backward(shared)
    np.testing.assert_allclose(shared, out, atol=1e-13)
    for name in NAMES:
        x, y = getattr(got, name), getattr(want, name)
        np.testing.assert_allclose(x, y.sum(axis=0) if name == "k" else y, atol=1e-12)


def test_one_key_gives_its_value_and_the_future_changes_nothing():
    shape = Shape((2,), 2, 1, 90, 90, 5, 6)
    q, k, v, *weights = draw(shape)
    alone = pyattn.additive_attention(q, k[..., :1, :], v[..., :1, :], *weights)
    np.testing.assert_allclose(alone, np.broadcast_to(v[..., :1, :], alone.shape), atol=1e-15)
    out, saved = pyattn.additive_attention.forward(q, k, v, *weights, causal=True)
    dout = np.zeros_like(out)
    dout[..., :70, :] = 1
    grads = saved.backward(dout)
    assert not grads.k[..., 70:, :].any()
    assert not grads.v[..., 70:, :].any()
    k[..., 70:, :] += 1
    again = pyattn.additive_attention(q, k, v, *weights, causal=True)
    np.testing.assert_array_equal(again[..., :70, :], out[..., :70, :])
    assert (again[..., 70:, :] != out[..., 70:, :]).all()


def test_any_number_of_threads_gives_the_same_bits():
    before, results = pyattn.get_num_threads(), []
    arguments = draw(Shape((1,), 2, 1, 300, 310, 16, 16), np.float32)
    try:
        for count in (1, 2, 3):
            pyattn.set_num_threads(count)
            out, saved = pyattn.additive_attention.forward(*arguments, causal=True)
            results.append((out, *saved.backward(out)))
    finally:
        pyattn.set_num_threads(before)
    assert all(np.array_equal(x, y) for other in results[1:]
               for x, y in zip(results[0], other, strict=True))


def test_one_backend_can_undo_the_other():
    arguments = draw(SHAPES[1])
    with pyattn.use_backend("array_api"):
        out, saved = pyattn.additive_attention.forward(*arguments, causal=True)
        want = saved.backward(out)
    with pyattn.use_backend("cpu"):
        for x, y in zip(saved.backward(out), want, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-12)


def test_arrays_of_another_library():
    arguments = draw(SHAPES[1])
    out, saved = pyattn.additive_attention.forward(*arguments, causal=True)
    want = saved.backward(out)
    strict = [array_api_strict.asarray(x) for x in arguments]
    got, saved = pyattn.additive_attention.forward(*strict, causal=True)
    np.testing.assert_allclose(np.asarray(got), out, atol=1e-13)
    for x, y in zip(saved.backward(got), want, strict=True):
        np.testing.assert_allclose(np.asarray(x), y, atol=1e-12)


def test_weights_of_another_dtype_keep_theirs():
    q, k, v, *weights = draw(SHAPES[1], np.float32)
    weights = [x.astype(np.float64) for x in weights]
    out, saved = pyattn.additive_attention.forward(q, k, v, *weights)
    assert [x.dtype for x in saved.backward(out)] == [np.float32] * 3 + [np.float64] * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_is_not_that_of_all_pairs(backend, monkeypatch):
    """Scratch is the same for any length, and all else grows as the operands do."""
    scratch, found, peaks, features = [], [], [], 16
    run = threads.run
    monkeypatch.setattr(threads, "run", lambda kernel, place, units, nbytes, helpers: (
        scratch.append(nbytes), run(kernel, place, units, nbytes, helpers)))
    for n in (256, 512, 1024):
        arguments = draw(Shape((), 1, 1, n, n, 8, 8), np.float32, features=features)
        mask = masks.window(64, 64)
        with pyattn.use_backend(backend):
            out, saved = pyattn.additive_attention.forward(*arguments, mask=mask)
            saved.backward(out)
            scratch.clear()
            tracemalloc.start()
            out, saved = pyattn.additive_attention.forward(*arguments, mask=mask)
            saved.backward(out)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        found.append(set(scratch))
    assert found[0] == found[1] == found[2]
    # what is kept or returned: a few arrays (N, A); no N x N, let alone N x N x A
    tile = 64 * 512 * 4 * 12
    assert peaks[2] < tile + 40 * 4 * 1024 * features
    assert peaks[2] - peaks[1] < 40 * 4 * 512 * features


def test_tiles_executed_are_those_of_the_mask():
    counts = []
    for n in (512, 1024, 2048):
        saved = pyattn.additive_attention.forward(
            *draw(Shape((), 1, 1, n, n, 2, 2), np.float32, features=1),
            mask=masks.window(64, 0))[1]
        counts.append(saved.stats["tiles"])
    assert counts == [15, 31, 63]


def test_arguments_that_do_not_fit():
    q, k, v, w_q, w_k, w_score, b = draw(SHAPES[1])
    forward = pyattn.additive_attention
    with pytest.raises(ShapeError, match=r"w_q must be \(Dq, A\)"):
        forward(q, k, v, w_q[..., 1:, :], w_k, w_score, b)
    with pytest.raises(ShapeError, match=r"w_k must be \(Dk, A\)"):
        forward(q, k, v, w_q, w_q[..., :2, :], w_score, b)
    with pytest.raises(ShapeError, match="b must be"):
        forward(q, k, v, w_q, w_k, w_score, b[..., 1:])
    with pytest.raises(ShapeError, match="w_score must be"):
        forward(q, k, v, w_q, w_k, w_score[:1], b)
    with pytest.raises(ShapeError, match="v must have the heads and tokens of k"):
        forward(q, k, v[..., 1:, :], w_q, w_k, w_score, b)
    with pytest.raises(ShapeError, match="multiple of the 3 heads"):
        forward(q, *(np.zeros((2, 3, 5, KEY_WIDTH)),) * 2, w_q, w_k, w_score, b)
    with pytest.raises(ShapeError, match="at least 3 axes"):
        forward(q[0, 0], k, v, w_q, w_k, w_score, b)
    with pytest.raises(ShapeError, match="mask"):
        forward(q, k, v, w_q, w_k, w_score, b, mask=np.ones((3, 1, 33, 70), bool))
    with pytest.raises(DtypeError, match="share one dtype"):
        forward(q, k.astype(np.float32), v, w_q, w_k, w_score, b)
    with pytest.raises(DtypeError, match="w_score must be one of"):
        forward(q, k, v, w_q, w_k, w_score.astype(int), b)
    with pytest.raises(OptionError, match="causal"):
        forward(q, k, v, w_q, w_k, w_score, b, causal="left")
    out, saved = forward.forward(q, k, v, w_q, w_k, w_score, b)
    with pytest.raises(ShapeError, match="dout"):
        saved.backward(out[..., 1:])
    with pytest.raises(DtypeError, match="dout"):
        saved.backward(out.astype(np.float32))


# micro-kernels


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("nbytes", WIDTHS)
@pytest.mark.parametrize("depth", [1, 5, 16, 37])
def test_sums_of_tanhs(depth, nbytes, dtype):
    rng, unit = np.random.default_rng(depth), dtype(1)
    a, c, w = (rng.standard_normal(shape).astype(dtype) for shape in
               ((3, depth + 2), (depth, 64), depth))
    t = np.tanh(a[:, :depth, None].astype("f8") + c.astype("f8"))
    want = np.einsum("f,rfj->rj", w.astype("f8"), t)
    scores = np.full((3, 70), 7, dtype)
    close = {"rtol": 0, "atol": 8 * depth * np.finfo(dtype).eps}
    micro_kernel("tanh_sums", nbytes)(3, depth, at(a), a.shape[1], at(c), at(w), at(scores),
                                      scores.shape[1], unit)
    np.testing.assert_allclose(scores[:, :64], want, **close)
    assert (scores[:, 64:] == 7).all()
    tanhs, row = np.zeros((depth, 64), dtype), np.zeros(64, dtype)
    micro_kernel("tanh_sums_kept", nbytes)(depth, at(a, 1), at(c), at(w), at(tanhs), at(row), unit)
    np.testing.assert_array_equal(row, scores[1, :64])
    np.testing.assert_allclose(tanhs, t[1], **close)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("nbytes", WIDTHS)
@pytest.mark.parametrize("depth", [1, 5, 16, 37])
def test_gradients_of_tanhs(depth, nbytes, dtype, masked):
    rng, unit, lanes = np.random.default_rng(depth), dtype(1), nbytes // np.dtype(dtype).itemsize
    tanhs, ds, w = (rng.uniform(-1, 1, shape).astype(dtype) for shape in ((depth, 64), 64, depth))
    word = np.array([rng.integers(2**63, dtype=np.uint64)])
    kept = ((word >> np.arange(64, dtype=np.uint64)) & np.uint64(1)).astype(bool)
    if masked:
        ds[~kept] = 0
        tanhs[:, ~kept] = np.nan
    t = np.where(kept | (not masked), tanhs, 0).astype("f8")
    y = w[:, None] * (ds * (1 - t * t))
    da, dc, dw = np.ones(depth, dtype), np.ones((depth, 64), dtype), np.ones((depth, lanes), dtype)
    micro_kernel("tanh_gradients", nbytes)(depth, at(tanhs), at(ds), at(w),
                                           at(word) if masked else 0, at(da), at(dc), at(dw), unit)
    close = {"rtol": 0, "atol": 64 * np.finfo(dtype).eps}
    np.testing.assert_allclose(da, 1 + y.sum(axis=1), **close)
    np.testing.assert_allclose(dc, 1 + y, **close)
    np.testing.assert_allclose(dw.sum(axis=1), lanes + (ds * t).sum(axis=1), **close)
