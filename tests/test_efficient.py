"""Efficient attention against its formula with N x M weights."""

from __future__ import annotations

import array_api_strict
import ml_dtypes
import numpy as np
import oracle
import pytest
from table import Shape
from test_linear import BACKENDS, EMPTY, draw, same

import pyattn
from pyattn.checks import DtypeError, OptionError, ShapeError
from pyattn.testing import gradcheck

SHAPES = [Shape((2,), 4, 2, 33, 47, 20, 13), Shape((), 1, 1, 2, 1, 3, 2),
          Shape((2, 2), 2, 1, 130, 70, 8, 8)]
DTYPES = [np.float64, np.float32, ml_dtypes.bfloat16, np.float16]


def softmax(x, axis, r):
    e = r(np.exp(x - x.max(axis=axis, keepdims=True)))
    return r(e / e.sum(axis=axis, keepdims=True))


def dense(q, k, v, dout, r):
    heads = q.shape[-3]
    p_q, p_k = softmax(r(q), -1, r), oracle.repeat_heads(softmax(r(k), -2, r), heads)
    values, dout = oracle.repeat_heads(r(v), heads), r(dout)
    a = r(p_q @ np.swapaxes(p_k, -1, -2))
    da = r(dout @ np.swapaxes(values, -1, -2))

    def pull(p, dp, axis):
        return r(p * (dp - (p * dp).sum(axis=axis, keepdims=True)))

    def shared(x):
        split = (*x.shape[:-3], v.shape[-3], heads // v.shape[-3], *x.shape[-2:])
        return r(x.reshape(split).sum(axis=-3))

    return {"out": r(a @ values), "q": pull(p_q, r(da @ p_k), -1),
            "k": pull(softmax(r(k), -2, r), shared(r(np.swapaxes(da, -1, -2) @ p_q)), -2),
            "v": shared(r(np.swapaxes(a, -1, -2) @ dout))}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: np.dtype(x).name)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_formula(shape, backend, dtype):
    given = draw(shape, dtype)
    with pyattn.use_backend(backend):
        out, saved = pyattn.efficient_attention.forward(*given)
        dout = np.random.default_rng(3).standard_normal(out.shape).astype(dtype)
        found = {"out": out, **saved.backward(dout)._asdict()}
    exact, rough = (dense(*given, dout, r) for r in (oracle.exact(dtype), oracle.plain(dtype)))

    def again():
        for seed in range(1, 5):
            drawn = draw(shape, dtype, seed)
            yield tuple(dense(*drawn, dout, r) for r in (oracle.exact(dtype), oracle.plain(dtype)))

    for name, x in found.items():
        if name == "k" and shape.m == 1:
            # the only token has all the weight whatever its key is
            assert (abs(x) < 1e-6).all()
            continue
        oracle.assert_close(x, exact[name], rough[name], factor=2 if name == "out" else 3,
                            name=name, dtype=dtype,
                            again=lambda name=name: [(a[name], b[name]) for a, b in again()])


def test_gradients_are_those_of_finite_differences():
    gradcheck(pyattn.efficient_attention, *draw(SHAPES[0]))
    gradcheck(pyattn.efficient_attention, *draw(SHAPES[0]), q_lengths=[33, 5], kv_lengths=[3, 47])


@pytest.mark.parametrize("backend", BACKENDS)
def test_implied_weights_sum_up_to_one(backend):
    q, k, _ = draw(Shape((2,), 4, 2, 9, 12, 5, 3))
    with pyattn.use_backend(backend):
        weights = pyattn.efficient_attention(q, k, np.broadcast_to(np.eye(12), (2, 2, 12, 12)))
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-12)
    assert (weights >= 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_as_if_it_was_not_there(backend):
    q, k, v = draw(Shape((3,), 4, 2, 7, 8, 6, 5))
    n, m = [7, 3, 0], [6, 8, 5]
    dout = np.random.default_rng(0).standard_normal((3, 4, 7, 5))
    for b in range(3):
        q[b, :, n[b]:] = dout[b, :, n[b]:] = np.nan
        k[b, :, m[b]:] = v[b, :, m[b]:] = np.nan
    with pyattn.use_backend(backend):
        out, saved = pyattn.efficient_attention.forward(q, k, v, q_lengths=n, kv_lengths=m)
        found = out, *saved.backward(dout)
        for b in range(3):
            alone, own = pyattn.efficient_attention.forward(q[b, :, :n[b]], k[b, :, :m[b]],
                                                            v[b, :, :m[b]])
            for got, want in zip(found, (alone, *own.backward(dout[b, :, :n[b]])), strict=True):
                np.testing.assert_allclose(got[b, :, :want.shape[1]], want, rtol=1e-9, atol=1e-12)
                assert not got[b, :, want.shape[1]:].any()


@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do(shape, backend):
    q, k, v = draw(shape, np.float32)
    with pyattn.use_backend(backend):
        out, saved = pyattn.efficient_attention.forward(q, k, v)
        grads = saved.backward(np.ones_like(out))
    assert out.shape == (*shape.batch, shape.heads, shape.n, shape.e)
    assert not out.any()
    for x, like in zip(grads, (q, k, v), strict=True):
        assert x.shape == like.shape
        assert not x.any()


def test_large_logits_and_broadcast_axes():
    rng = np.random.default_rng(0)
    q, k = 1e4 * rng.standard_normal((3, 2, 4, 9, 8)), 1e4 * rng.standard_normal((2, 2, 9, 8))
    v = rng.standard_normal((1, 2, 9, 5))
    out, saved = pyattn.efficient_attention.forward(q, k, v)
    grads = saved.backward(np.ones_like(out))
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]
    full = [np.broadcast_to(x, (3, 2, *x.shape[-3:])) for x in (k, v)]
    want, full_saved = pyattn.efficient_attention.forward(q, *full)
    wanted = full_saved.backward(np.ones_like(out))
    same((out, grads.q, grads.k, grads.v), (want, wanted.q, wanted.k.sum(axis=0),
                                            wanted.v.sum(axis=(0, 1))[None]))
    lengths = [[9, 4], [5, 0], [1, 2]]
    out, saved = pyattn.efficient_attention.forward(q, k, v, kv_lengths=lengths)
    assert [x.shape for x in saved.backward(out)] == [q.shape, k.shape, v.shape]
    gradcheck(pyattn.efficient_attention, q / 1e4, k / 1e4, v, kv_lengths=lengths)


def test_cost_is_linear_in_the_number_of_tokens():
    flops = []
    for n in (1024, 2048, 4096):
        x = np.ones((2, n, 8), np.float32)
        stats = pyattn.efficient_attention.forward(x, x, x)[1].stats
        assert stats["pairs"] == 0
        flops.append(stats["flops"])
    assert flops == [flops[0], 2 * flops[0], 4 * flops[0]]


def test_strict_arrays():
    given = [array_api_strict.asarray(x) for x in draw(SHAPES[0])]
    out, saved = pyattn.efficient_attention.forward(*given, kv_lengths=[47, 3])
    want = pyattn.efficient_attention(*draw(SHAPES[0]), kv_lengths=[47, 3])
    np.testing.assert_allclose(np.asarray(out), want, rtol=1e-10, atol=1e-12)
    assert saved.backward(out).k.shape == given[1].shape


@pytest.mark.parametrize(("options", "error"), [
    ({"causal": True}, OptionError), ({"causal": "top_left"}, OptionError),
    ({"mask": np.ones((3, 3), bool)}, OptionError), ({"kv_lengths": 4}, ShapeError)])
def test_what_does_not_fit_is_refused(options, error):
    x = np.ones((1, 3, 4))
    with pytest.raises(error):
        pyattn.efficient_attention(x, x, x, **options)


def test_gradients_that_do_not_fit_are_refused():
    x = np.ones((1, 3, 4), np.float16)
    out, saved = pyattn.efficient_attention.forward(x, x, x)
    assert saved.backward(out).q.dtype == np.float16
    with pytest.raises(ShapeError):
        saved.backward(out[:, :2])
    with pytest.raises(DtypeError):
        saved.backward(out.astype(np.float64))
