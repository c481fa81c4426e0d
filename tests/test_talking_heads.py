"""Talking-heads attention against dense formulas, and its limits."""

from __future__ import annotations

import tracemalloc

import array_api_strict
import ml_dtypes
import numpy as np
import oracle
import pytest
from pyattn.kernels.cpu import talking_heads as cpu
from pyattn.kernels.cpu import threads
from table import positions

import pyattn
from pyattn import masks
from pyattn.checks import DtypeError, OptionError, ShapeError
from pyattn.testing import gradcheck

BACKENDS = ["cpu", "array_api"]
DTYPES = [np.float64, np.float32, ml_dtypes.bfloat16, np.float16]
NAMES = ("q", "k", "v", "w_pre", "w_post", "b_pre", "b_post")


class Shape:
    """Batch; heads of q, k, the softmax, the output and v; tokens; widths."""

    def __init__(self, batch, heads, n, m, d, e):
        self.batch, self.heads, self.n, self.m, self.d, self.e = batch, heads, n, m, d, e

    def __str__(self):
        return f"{self.batch}{self.heads}N{self.n}M{self.m}D{self.d}E{self.e}"


SHAPES = [Shape((), (1, 1, 1, 1, 1), 1, 1, 1, 1), Shape((2,), (4, 2, 5, 6, 3), 33, 70, 20, 13),
          Shape((1,), (3, 1, 2, 1, 1), 140, 64, 7, 32),
          Shape((2, 1), (2, 2, 9, 4, 1), 9, 150, 8, 8)]
EMPTY = [Shape((2,), (2, 1, 2, 2, 1), 0, 5, 4, 4), Shape((2,), (2, 1, 3, 2, 1), 5, 0, 4, 4),
         Shape((0,), (2, 2, 2, 2, 2), 3, 3, 4, 4)]


def draw(s, dtype=np.float64, seed=0):
    rng = np.random.default_rng([s.n, s.m, seed])
    heads_q, heads_k, heads, heads_out, heads_v = s.heads
    shapes = ((*s.batch, heads_q, s.n, s.d), (*s.batch, heads_k, s.m, s.d),
              (*s.batch, heads_v, s.m, s.e), (heads_q, heads), (heads, heads_out), (heads,),
              (heads_out,))
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def dense(arguments, allowed, scale, r, dout=None):
    """Out, or gradients by name, from arrays (..., heads, N, M)."""
    q, k, v, w_pre, w_post, b_pre, b_post = (r(x) for x in arguments)
    groups_k, groups_v = k.shape[-3], v.shape[-3]
    k, v = oracle.repeat_heads(k, q.shape[-3]), oracle.repeat_heads(v, w_post.shape[1])

    def mix(x, w):
        return r(np.moveaxis(np.moveaxis(x, -3, -1) @ w, -1, -3))

    def by_pair(x, y):
        """Sum over all but the heads: (heads of x, heads of y)."""
        x, y = (np.moveaxis(z, -3, 0).reshape(z.shape[-3], -1) for z in (x, y))
        return x @ y.T

    with np.errstate(all="ignore"):
        products = r(scale * r(q @ np.swapaxes(k, -1, -2)))
        products = np.where(allowed, products, 0)
        scores = r(mix(products, w_pre) + b_pre[:, None, None])
        scores = np.where(allowed, scores, -np.inf)
        top = scores.max(axis=-1, initial=-np.inf, keepdims=True)
        p = np.where(allowed, r(np.exp(scores - np.where(top == -np.inf, 0, top))), 0)
        total = p.sum(axis=-1, keepdims=True)
        p = r(p / np.where(total == 0, 1, total))
        mixed = np.where(allowed, r(mix(p, w_post) + b_post[:, None, None]), 0)
        met = np.broadcast_to(allowed, mixed.shape)
        if dout is None:
            return oracle.select_matmul(mixed, v, met, r)
        dout = r(dout)
        dmixed = np.where(allowed, r(dout @ np.swapaxes(v, -1, -2)), 0)
        dp = mix(dmixed, w_post.T)
        ds = r(p * (dp - (p * dp).sum(axis=-1, keepdims=True)))
        dproducts = r(scale * mix(ds, w_pre.T))
        by_q = np.broadcast_to(allowed, dproducts.shape)
        dk = oracle.select_matmul(np.swapaxes(dproducts, -1, -2), q, np.swapaxes(by_q, -1, -2), r)
        dv = oracle.select_matmul(np.swapaxes(mixed, -1, -2), dout, np.swapaxes(met, -1, -2), r)

        def grouped(x, groups):
            return x.reshape(*x.shape[:-3], groups, x.shape[-3] // groups, *x.shape[-2:]).sum(-3)

        found = {"q": oracle.select_matmul(dproducts, k, by_q, r), "k": grouped(dk, groups_k),
                 "v": grouped(dv, groups_v), "w_pre": by_pair(products, ds),
                 "w_post": by_pair(p, dmixed), "b_pre": 0 * b_pre,
                 "b_post": np.moveaxis(dmixed, -3, 0).reshape(len(b_post), -1).sum(-1)}
        # they are 0 but for rounding
        assert abs(np.moveaxis(ds, -3, 0).reshape(len(b_pre), -1).sum(-1)).max(initial=0) <= (
            1e-2 if r.keep is not None else 1e-8) * max(1, abs(ds).sum())
    return {name: r(x) for name, x in found.items()}


def inside(s, **options):
    """Pairs by position, those within the lengths; (..., 1, N, M)."""
    causal = options.pop("causal", False)
    i, j, there = positions(s, "top_left" if causal == "top_left" else "bottom_right", **options)
    return there & (j <= i) if causal else there


def judge(arguments, allowed, backend, *, factor=4, **options):
    """Hold out and all gradients against dense arithmetic."""
    dtype, rng = arguments[0].dtype, np.random.default_rng(5)
    for x in arguments:
        x.flags.writeable = False
    with pyattn.use_backend(backend):
        out, saved = pyattn.talking_heads_attention.forward(*arguments, **options)
        dout = rng.standard_normal(out.shape).astype(dtype)
        grads = saved.backward(dout)
    assert grads._fields == NAMES
    scale = options.get("scale", arguments[0].shape[-1] ** -0.5)
    each = oracle.exact(dtype), oracle.plain(dtype)

    def gradients(dout):
        return [dense(arguments, allowed, scale, r, dout) for r in each]

    exact, rough = (dense(arguments, allowed, scale, r) for r in each)
    oracle.assert_close(out, exact, rough, factor=3, name="out", dtype=dtype)
    exact, rough = gradients(dout)
    for name, x in grads._asdict().items():
        def again(name=name):
            others = (gradients(rng.standard_normal(out.shape).astype(dtype)) for _ in range(8))
            return [(other[0][name], other[1][name]) for other in others]

        oracle.assert_close(x, exact[name], rough[name], factor=factor, name=name, dtype=dtype,
                            again=again)
    return saved


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: np.dtype(x).name)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_rule(shape, backend, dtype):
    judge(draw(shape, dtype), inside(shape), backend)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True, "top_left"])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_causal_masked_and_padded(shape, causal, backend, dtype):
    rng = np.random.default_rng(1)
    lengths = {"q_lengths": rng.integers(0, shape.n + 1, shape.batch),
               "kv_lengths": rng.integers(1, shape.m + 1, shape.batch)}
    mask = rng.random((*shape.batch, 1, shape.n, shape.m)) < 0.4
    mask[..., ::7, :] = False
    allowed = inside(shape, causal=causal, **lengths) & mask
    saved = judge(draw(shape, dtype), allowed, backend, causal=causal, mask=mask, scale=0.3,
                  **lengths)
    assert saved.stats["pairs"] == allowed.sum() * shape.heads[2]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_nothing_to_do(shape, backend):
    arguments = draw(shape)
    with pyattn.use_backend(backend):
        out, saved = pyattn.talking_heads_attention.forward(*arguments)
        grads = saved.backward(np.ones_like(out))
    assert out.shape == (*shape.batch, shape.heads[3], shape.n, shape.e)
    for x, dx in zip([out, *arguments], [out, *grads], strict=True):
        assert x.shape == dx.shape
        assert not np.any(dx)


@pytest.mark.parametrize("backend", BACKENDS)
def test_finite_differences(backend):
    arguments = draw(Shape((2,), (4, 2, 3, 2, 1), 5, 6, 3, 4))
    with pyattn.use_backend(backend):
        assert gradcheck(pyattn.talking_heads_attention, *arguments, causal=True,
                         kv_lengths=np.array([6, 4]))
        assert gradcheck(pyattn.talking_heads_attention, *arguments[:5])


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_identity_leaves_plain_attention(backend, dtype):
    q, k, v, *_ = draw(Shape((2,), (4, 2, 4, 4, 2), 70, 90, 8, 9), dtype)
    same = np.eye(4, dtype=dtype)
    with pyattn.use_backend(backend):
        out, saved = pyattn.talking_heads_attention.forward(q, k, v, same, same, causal=True)
        want, plain = pyattn.attention.forward(q, k, v, causal=True)
        close = {"rtol": 0, "atol": 100 * np.finfo(dtype).eps}
        np.testing.assert_allclose(out, want, **close)
        for name, x in plain.backward(want)._asdict().items():
            np.testing.assert_allclose(getattr(saved.backward(want), name), x, **close)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_permutation_permutes_the_heads(backend):
    q, k, v, *_ = draw(Shape((), (4, 4, 4, 4, 4), 70, 90, 8, 9))
    order = np.array([2, 0, 3, 1])
    w = np.zeros((4, 4))
    w[np.arange(4), order] = 1      # head h becomes head order[h]
    back = np.argsort(order)
    with pyattn.use_backend(backend):
        before = pyattn.talking_heads_attention(q, k, v, w, np.eye(4))
        after = pyattn.talking_heads_attention(q, k, v, np.eye(4), w)
        both = pyattn.talking_heads_attention(q, k, v, w, w.T)
        want = pyattn.attention(q[back], k[back], v)
        np.testing.assert_allclose(before, want, atol=1e-14)
        np.testing.assert_allclose(after, want, atol=1e-14)
        np.testing.assert_allclose(both, pyattn.attention(q, k, v), atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_multiply_from_the_right(backend):
    """w_pre[h, s]: scores of head h of q reach head s of the softmax, not the other way round."""
    q, k, v, *_ = draw(Shape((), (2, 2, 2, 2, 2), 5, 7, 3, 4))
    first_alone = np.array([[1.0, 1.0], [0.0, 0.0]])
    with pyattn.use_backend(backend):
        out = pyattn.talking_heads_attention(q, k, v, first_alone, np.eye(2))
        want = pyattn.attention(q[[0, 0]], k[[0, 0]], v)
    np.testing.assert_allclose(out, want, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_does_not_revive_masked_pairs(backend):
    shape = Shape((2,), (3, 1, 4, 2, 2), 90, 90, 5, 6)
    q, k, v, w_pre, w_post, b_pre, b_post = draw(shape)
    with pyattn.use_backend(backend):
        out, saved = pyattn.talking_heads_attention.forward(
            q, k, v, w_pre, w_post, b_pre + 50, b_post + 50, causal=True)
        dout = np.zeros_like(out)
        dout[..., :70, :] = 1
        grads = saved.backward(dout)
        k[..., 70:, :] += 1
        v[..., 70:, :] += 1
        again = pyattn.talking_heads_attention(
            q, k, v, w_pre, w_post, b_pre + 50, b_post + 50, causal=True)
    np.testing.assert_array_equal(again[..., :70, :], out[..., :70, :])
    assert (again[..., 70:, :] != out[..., 70:, :]).all()
    assert not grads.k[..., 70:, :].any()
    assert not grads.v[..., 70:, :].any()
    assert not grads.b_pre.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bias_before_the_softmax_moves_nothing(backend):
    arguments = draw(SHAPES[1])
    with pyattn.use_backend(backend):
        out = pyattn.talking_heads_attention(*arguments)
        without = pyattn.talking_heads_attention(*arguments[:5], None, arguments[6])
        np.testing.assert_array_equal(out, without)
    fields = pyattn.talking_heads_attention.forward(*arguments[:5])[1].backward(out)._fields
    assert fields == NAMES[:5]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_what_no_one_may_see_has_no_say(backend, dtype):
    q, k, v, *weights = draw(Shape((2,), (4, 2, 3, 4, 2), 70, 133, 6, 7), dtype)
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
            out, saved = pyattn.talking_heads_attention.forward(q, k, v, *weights, **options)
            results.append((out, *saved.backward(dout)))
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            # what may meet NaN is summed up in another order
            largest = max(1, np.abs(x).max())
            np.testing.assert_allclose(x, y, rtol=0, atol=300 * np.finfo(dtype).eps * largest)
    assert not results[0][0][:, :, 50:53].any()
    assert not results[0][0][0, :, 60:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_value_that_is_seen_by_some_does_not_reach_others(backend):
    q, k, v, *weights = draw(Shape((), (2, 1, 3, 2, 1), 80, 80, 4, 4))
    with pyattn.use_backend(backend):
        plain, saved = pyattn.talking_heads_attention.forward(q, k, v, *weights, causal=True)
        dout = np.zeros_like(plain)
        dout[..., :70, :] = 1
        want = saved.backward(dout)
        k[..., 75, :], v[..., 75, :] = np.nan, np.inf
        out, saved = pyattn.talking_heads_attention.forward(q, k, v, *weights, causal=True)
        grads = saved.backward(dout)
    np.testing.assert_allclose(out[..., :75, :], plain[..., :75, :], rtol=0, atol=1e-13)
    assert not np.isfinite(out[..., 75:, :]).any()
    np.testing.assert_allclose(grads.q[..., :70, :], want.q[..., :70, :], rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_broadcast_axes_and_strided_views(backend):
    q, k, v, *weights = draw(Shape((3,), (4, 2, 3, 4, 2), 20, 70, 5, 6))
    whole = np.broadcast_to(k[:1], k.shape)
    with pyattn.use_backend(backend):
        out, saved = pyattn.talking_heads_attention.forward(q, whole, v, *weights)
        want = saved.backward(out)
        turned = [np.ascontiguousarray(np.swapaxes(x, 1, 2)).swapaxes(1, 2) for x in (q, v)]
        shared, saved = pyattn.talking_heads_attention.forward(
            turned[0], k[0], turned[1], *weights)
        got = saved.backward(shared)
    np.testing.assert_allclose(shared, out, atol=1e-13)
    for name in NAMES:
        x, y = getattr(got, name), getattr(want, name)
        np.testing.assert_allclose(x, y.sum(axis=0) if name == "k" else y, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("strip", [2**30, 2**15, 1])
@pytest.mark.parametrize("kept", [0, 2**30])
def test_results_do_not_depend_on_the_size_of_blocks(strip, kept, monkeypatch):
    shape = Shape((2,), (4, 2, 5, 6, 3), 133, 200, 16, 16)
    arguments = draw(shape)
    monkeypatch.setattr(cpu, "STRIP_BYTES", strip)
    monkeypatch.setattr(cpu, "KEPT_BYTES", kept)
    judge(arguments, inside(shape), "cpu")
    judge(arguments, inside(shape, causal=True), "cpu", causal=True)


def test_any_number_of_threads_gives_the_same_bits():
    before, results = pyattn.get_num_threads(), []
    arguments = draw(Shape((1,), (4, 2, 4, 4, 2), 300, 310, 16, 16), np.float32)
    try:
        for count in (1, 2, 3):
            pyattn.set_num_threads(count)
            out, saved = pyattn.talking_heads_attention.forward(*arguments, causal=True)
            results.append((out, *saved.backward(out)))
    finally:
        pyattn.set_num_threads(before)
    assert all(np.array_equal(x, y) for other in results[1:]
               for x, y in zip(results[0], other, strict=True))


def test_one_backend_can_undo_the_other():
    arguments = draw(SHAPES[1])
    with pyattn.use_backend("array_api"):
        out, saved = pyattn.talking_heads_attention.forward(*arguments, causal=True)
        want = saved.backward(out)
    with pyattn.use_backend("cpu"):
        for x, y in zip(saved.backward(out), want, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-11)


def test_arrays_of_another_library():
    arguments = draw(SHAPES[1])
    out, saved = pyattn.talking_heads_attention.forward(*arguments, causal=True)
    want = saved.backward(out)
    strict = [array_api_strict.asarray(x) for x in arguments]
    got, saved = pyattn.talking_heads_attention.forward(*strict, causal=True)
    np.testing.assert_allclose(np.asarray(got), out, atol=1e-12)
    for x, y in zip(saved.backward(got), want, strict=True):
        np.testing.assert_allclose(np.asarray(x), y, rtol=1e-12, atol=1e-11)


def test_weights_of_another_dtype_keep_theirs():
    q, k, v, *weights = draw(SHAPES[1], np.float32)
    weights = [x.astype(np.float64) for x in weights]
    out, saved = pyattn.talking_heads_attention.forward(q, k, v, *weights)
    assert [x.dtype for x in saved.backward(out)] == [np.float32] * 3 + [np.float64] * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_is_not_that_of_all_pairs(backend, monkeypatch):
    """All that grows does so as the operands do; scratch does not once weights are not kept."""
    scratch, found, peaks = [], [], []
    run = threads.run
    monkeypatch.setattr(threads, "run", lambda kernel, place, units, nbytes, helpers: (
        scratch.append(nbytes), run(kernel, place, units, nbytes, helpers)))
    monkeypatch.setattr(cpu, "KEPT_BYTES", 2**16)
    for n in (256, 512, 1024):
        arguments = draw(Shape((), (2, 2, 2, 2, 2), n, n, 8, 8), np.float32)
        mask = masks.window(64, 64)
        with pyattn.use_backend(backend):
            out, saved = pyattn.talking_heads_attention.forward(*arguments, mask=mask)
            saved.backward(out)
            scratch.clear()
            tracemalloc.start()
            out, saved = pyattn.talking_heads_attention.forward(*arguments, mask=mask)
            saved.backward(out)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        found.append(set(scratch))
    assert found[0] == found[1] == found[2]
    # a tile's arrays, and a few of the operands' size; all pairs would be 8 MB
    assert peaks[2] - peaks[1] < 20 * 4 * 2 * 512 * 16
    assert peaks[2] < 4e6


def test_tiles_executed_are_those_of_the_mask():
    counts = []
    for n in (512, 1024, 2048):
        saved = pyattn.talking_heads_attention.forward(
            *draw(Shape((), (1, 1, 2, 1, 1), n, n, 2, 2), np.float32),
            mask=masks.window(64, 0))[1]
        counts.append(saved.stats["tiles"])
    assert counts == [30, 62, 126]


def test_arguments_that_do_not_fit():
    q, k, v, w_pre, w_post, b_pre, b_post = draw(SHAPES[1])
    forward = pyattn.talking_heads_attention
    with pytest.raises(ShapeError, match="q must have as many heads as rows of w_pre"):
        forward(q, k, v, w_pre[1:], w_post)
    with pytest.raises(ShapeError, match="v must have heads that divide the number of columns"):
        forward(q, k, v, w_pre, w_post[:, 2:])
    with pytest.raises(ShapeError, match="as many columns as w_post has rows"):
        forward(q, k, v, w_pre[:, 1:], w_post)
    with pytest.raises(ShapeError, match="w_pre must be"):
        forward(q, k, v, w_pre[0], w_post)
    with pytest.raises(ShapeError, match="b_post must be"):
        forward(q, k, v, w_pre, w_post, b_pre, b_post[1:])
    with pytest.raises(ShapeError, match="v has 69 tokens but k has 70"):
        forward(q, k, v[..., 1:, :], w_pre, w_post)
    with pytest.raises(ShapeError, match="width"):
        forward(q[..., 1:], k, v, w_pre, w_post)
    with pytest.raises(ShapeError, match="multiple of the 3 heads"):
        forward(q, np.zeros((2, 3, 70, 20)), v, w_pre, w_post)
    with pytest.raises(ShapeError, match="one for all heads"):
        forward(q, k, v, w_pre, w_post, mask=np.ones((5, 33, 70), bool))
    with pytest.raises(ShapeError, match="leading axes"):
        forward(q, k, v[:1].repeat(3, axis=0), w_pre, w_post)
    with pytest.raises(DtypeError, match="share one dtype"):
        forward(q, k.astype(np.float32), v, w_pre, w_post)
    with pytest.raises(DtypeError, match="share one dtype"):
        forward(q, k, v.astype(np.float32), w_pre, w_post)
    with pytest.raises(DtypeError, match="w_post must be one of"):
        forward(q, k, v, w_pre, w_post.astype(int))
    with pytest.raises(OptionError, match="causal"):
        forward(q, k, v, w_pre, w_post, causal="left")
    with pytest.raises(OptionError, match="scale"):
        forward(q, k, v, w_pre, w_post, scale=np.nan)
    out, saved = forward.forward(q, k, v, w_pre, w_post)
    with pytest.raises(ShapeError, match="dout"):
        saved.backward(out[..., 1:])
    with pytest.raises(DtypeError, match="dout"):
        saved.backward(out.astype(np.float32))
