"""Performer against its formula with N x M weights, and what random features promise."""

from __future__ import annotations

import itertools
import math

import array_api_strict
import ml_dtypes
import numpy as np
import oracle
import pytest
from table import Shape

import pyattn
from pyattn import performer_attention
from pyattn.checks import DtypeError, OptionError, ShapeError
from pyattn.features import random_projection
from pyattn.testing import gradcheck

BACKENDS = ["cpu", "array_api"]
SHAPES = [Shape((2,), 4, 2, 33, 47, 20, 13), Shape((), 2, 2, 150, 150, 8, 8),
          Shape((2, 2), 3, 1, 130, 65, 16, 16), Shape((1,), 1, 1, 1, 1, 4, 4)]
KERNELS = ["softmax", "relu"]
FEATURES = 24


def draw(s, dtype=np.float64, seed=0):
    rng = np.random.default_rng([s.n, s.m, seed])
    return tuple(rng.standard_normal((*s.batch, h, n, w)).astype(dtype) for h, n, w in (
        (s.heads, s.n, s.d), (s.groups, s.m, s.d), (s.groups, s.m, s.e)))


def rows(width, features=FEATURES):
    return random_projection(features, width, rng=7)


def positions(n, m, top_left=False):
    return np.arange(n)[:, None] + (0 if top_left else m - n), np.arange(m)[None]


# the formula, every intermediate an array; its gradient by the rules of calculus


def exponents(x, w, scale, r):
    """log(phi) of the softmax kernel, and what W multiplies."""
    x = r(r(math.sqrt(scale)) * r(x))
    return r(r(x @ r(w).T) - r(r((x * x).sum(axis=-1, keepdims=True)) / 2)), x


def attended(q, k, v, w, kernel, scale, epsilon, allowed, r):
    """Output, weights, features and so on, of as many key heads as query heads."""
    heads = q.shape[-3]
    k, v = (oracle.repeat_heads(x, heads) for x in (k, v))
    a, wide_q = exponents(q, w, scale, r)
    b, wide_k = exponents(k, w, scale, r)
    if kernel == "relu":
        a, b = (r(x @ r(w).T) for x in (wide_q, wide_k))
        phi_q, phi_k = (r(np.maximum(x, 0) + r(epsilon)) for x in (a, b))
    else:
        # any number may be taken from all exponents of a query, and of all keys
        phi_q = r(np.exp(r(a - a.max(axis=-1, keepdims=True, initial=-np.inf))))
        phi_k = r(np.exp(r(b - b.max(axis=(-2, -1), keepdims=True, initial=-1e9))))
    weights = np.where(allowed, r(phi_q @ np.swapaxes(phi_k, -1, -2)), 0)
    total = r(weights.sum(axis=-1, keepdims=True))
    share = r(weights / np.where(total == 0, 1, total))
    return r(share @ r(v)), (k, r(v), a, b, wide_q, wide_k, phi_q, phi_k, total, share)


def formula(q, k, v, w, dout, kernel, scale, epsilon, allowed, r):
    out, (_, vv, a, b, wide_q, wide_k, phi_q, phi_k, total, share) = attended(
        q, k, v, w, kernel, scale, epsilon, allowed, r)
    dout = r(dout)
    delta = r((dout * out).sum(axis=-1, keepdims=True))
    dweights = np.where(allowed, r(r(dout @ np.swapaxes(vv, -1, -2)) - delta), 0)
    dweights = r(dweights / np.where(total == 0, 1, total))

    def back(dphi, phi, h, wide):
        if kernel == "relu":
            return r(math.sqrt(scale) * r(np.where(h > 0, dphi, 0) @ r(w)))
        dh = r(dphi * phi)
        return r(math.sqrt(scale) * r(r(dh @ r(w)) - r(dh.sum(axis=-1, keepdims=True) * wide)))

    def groups(x, like):
        x = x.reshape(*x.shape[:-3], like.shape[-3], -1, *x.shape[-2:]).sum(axis=-3)
        return oracle.sum_to(x, like.shape)

    dq = back(r(dweights @ phi_k), phi_q, a, wide_q)
    dk = back(r(np.swapaxes(dweights, -1, -2) @ phi_q), phi_k, b, wide_k)
    dv = r(np.swapaxes(share, -1, -2) @ dout)
    return {"out": out, "q": oracle.sum_to(dq, q.shape), "k": groups(dk, k), "v": groups(dv, v)}


def judge(q, k, v, backend, kernel, allowed=True, *, epsilon=None, scale=None, atol=1e-10,
          **options):
    """float64 against longdouble; others within their rounding of the formula in float64."""
    dtype, rng, w = q.dtype, np.random.default_rng(5), rows(q.shape[-1])
    with pyattn.use_backend(backend):
        out, saved = performer_attention.forward(q, k, v, kernel=kernel, projection=w, scale=scale,
                                                 epsilon=epsilon, **options)
        dout = rng.standard_normal(out.shape).astype(dtype)
        grads = saved.backward(dout)._asdict()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    epsilon = 1e-3 if epsilon is None else epsilon
    n, m = q.shape[-2], k.shape[-2]
    allowed = np.broadcast_to(allowed, np.broadcast_shapes(np.shape(allowed), (n, m)))
    exact, rough = (formula(q, k, v, w, dout, kernel, scale, epsilon, allowed, r)
                    for r in (oracle.exact(dtype), oracle.plain(dtype)))
    for name, x in {"out": out, **grads}.items():
        if dtype == np.float64:
            assert x.dtype == dtype
            np.testing.assert_allclose(x, exact[name].astype(np.float64), rtol=0, err_msg=name,
                                       atol=atol * max(1, abs(exact[name]).max()))
        else:
            oracle.assert_close(x, exact[name], rough[name], factor=2 if name == "out" else 3,
                                name=name, dtype=dtype)
    return saved


@pytest.mark.parametrize("dtype", [np.float64, np.float32, ml_dtypes.bfloat16, np.float16],
                         ids=lambda x: np.dtype(x).name)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_formula(shape, kernel, backend, dtype):
    if shape.m == 1 and dtype != np.float64:
        pytest.skip("gradients that are 0 but for rounding")
    judge(*draw(shape, dtype), backend, kernel)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("causal", [True, "top_left"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_causal(shape, causal, kernel, backend, dtype):
    if shape.m == 1 and dtype != np.float64:
        pytest.skip("gradients that are 0 but for rounding")
    i, j = positions(shape.n, shape.m, causal == "top_left")
    judge(*draw(shape, dtype), backend, kernel, j <= i, causal=causal)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [1, 7, 64, 150])
@pytest.mark.parametrize("kernel", KERNELS)
def test_steps_of_any_length_agree(chunk, kernel, backend):
    shape = SHAPES[1]
    i, j = positions(shape.n, shape.m)
    if backend == "array_api":
        judge(*draw(shape), backend, kernel, j <= i, causal=True, order="qk")
    elif chunk > 64:
        pytest.skip("the CPU's kernels take up to 64")
    judge(*draw(shape), backend, kernel, j <= i, causal=True, chunk=chunk, order="kv")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_scale_and_epsilon(kernel, backend):
    given = draw(SHAPES[0])
    judge(*given, backend, kernel, scale=0.9)
    if kernel == "relu":
        judge(*given, backend, kernel, epsilon=0.3)
        judge(*given, backend, kernel, epsilon=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_padding_has_no_say(kernel, backend):
    shape = SHAPES[0]
    q, k, v = draw(shape)
    lengths = np.array([20, 0])
    i, j = np.arange(shape.n)[:, None], np.arange(shape.m)
    inside = j < lengths[:, None, None, None]
    for causal in (False, True):
        end = lengths[:, None, None, None]
        allowed = inside & ((j <= i + end - shape.n) | (not causal))
        clean = [x.copy() for x in (k, v)]
        dirty = [x.copy() for x in (k, v)]
        for x, filler in [*((x, 0) for x in clean), *((x, np.nan) for x in dirty)]:
            for item, stop in enumerate(lengths):
                x[item, :, stop:] = filler
        saved = judge(q, *clean, backend, kernel, allowed, kv_lengths=lengths, causal=causal)
        with pyattn.use_backend(backend):
            out, again = performer_attention.forward(
                q, *dirty, kernel=kernel, projection=rows(20), kv_lengths=lengths, causal=causal)
            assert np.array_equal(out, saved.attended.out)
            for x, y in zip(again.backward(out), saved.backward(out), strict=True):
                assert np.array_equal(x, y)
        assert not out[1].any()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_by_differences(kernel, causal):
    given = draw(Shape((2,), 4, 2, 9, 11, 4, 3))
    gradcheck(performer_attention, *given, kernel=kernel, causal=causal, rng=0, chunk=4)


@pytest.mark.parametrize("epsilon", [None, 0.05])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_the_original_by_differences(causal, epsilon):
    given = draw(Shape((2,), 4, 2, 9, 11, 4, 3))
    gradcheck(performer_attention, *given, reference=True, causal=causal, rng=0, epsilon=epsilon,
              kv_lengths=[11, 5])


# strictness, range, streams


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_later_tokens_change_nothing_before_them(dtype, kernel, backend):
    """Bit for bit, even where a later key's exponent is larger than any other by far."""
    shape = Shape((1,), 2, 1, 150, 150, 8, 8)
    w = rows(8)
    q, k, v = draw(shape, dtype)
    with pyattn.use_backend(backend):
        options = {"kernel": kernel, "projection": w, "causal": True}
        out, saved = performer_attention.forward(q, k, v, **options)
        for t in (1, 63, 64, 100, 149):
            changed = [x.copy() for x in (q, k, v)]
            changed[0][..., t:, :] += 1
            changed[1][..., t:, :] *= 40
            changed[2][..., t:, :] = 1e6
            again = performer_attention(*changed, **options)
            assert np.array_equal(again[..., :t, :], out[..., :t, :])
            assert not np.array_equal(again[..., t:, :], out[..., t:, :])
            dout = np.zeros_like(out)
            dout[..., :t, :] = 1
            for x in saved.backward(dout):
                assert not x[..., t:, :].any()


def test_the_original_leaks():
    """Its largest exponent is that of all keys, which epsilon makes felt."""
    q, k, v = draw(Shape((1,), 2, 1, 40, 40, 8, 8))
    changed = k.copy()
    changed[..., 30:, :] *= 3
    for reference in (False, True):
        before, after = (performer_attention(q, x, v, causal=True, rng=0, reference=reference)
                         for x in (k, changed))
        assert np.array_equal(before[..., :30, :], after[..., :30, :]) is not reference


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_huge_tokens_do_not_overflow(dtype, causal, backend):
    q, k, v = draw(Shape((1,), 2, 1, 90, 90, 8, 8), dtype)
    large = dtype(100)
    with pyattn.use_backend(backend):
        out, saved = performer_attention.forward(large * q, large * k, v, causal=causal, rng=0)
        assert np.isfinite(out).all()
        assert all(np.isfinite(x).all() for x in saved.backward(np.ones_like(out)))
    # means of values
    assert (out <= v.max(axis=-2, keepdims=True) * dtype(1.01)).all()
    assert (out >= v.min(axis=-2, keepdims=True) * dtype(1.01)).all()
    assert abs(out).max() > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_stream_in_pieces(kernel, backend):
    """Of one token, or more: outputs and all gradients are those of the whole."""
    shape = Shape((2,), 4, 2, 37, 37, 8, 5)
    q, k, v = draw(shape)
    options = {"kernel": kernel, "projection": rows(8), "causal": True}
    with pyattn.use_backend(backend):
        out, saved = performer_attention.forward(q, k, v, **options)
        whole = saved.backward(np.cos(out))
        state, outs, records = None, [], []
        cuts = [0, 1, 2, 3, 20, 36, 37]
        for start, end in itertools.pairwise(cuts):
            piece = [x[..., start:end, :] for x in (q, k, v)]
            (part, state), kept = performer_attention.forward(
                *piece, **options, state=state, return_state=True)
            outs.append(part)
            records.append(kept)
        np.testing.assert_allclose(np.concatenate(outs, axis=-2), out, atol=1e-11)
        dstate, grads = None, []
        for part, kept in zip(outs[::-1], records[::-1], strict=True):
            found = kept.backward(np.cos(part), dstate)
            dstate = getattr(found, "state", None)
            grads.append(found[:3])
    for i, name in enumerate("qkv"):
        joined = np.concatenate([g[i] for g in grads[::-1]], axis=-2)
        np.testing.assert_allclose(joined, whole[i], atol=1e-10, err_msg=name)


def test_a_stream_needs_its_projection():
    q, k, v = draw(Shape((), 1, 1, 5, 5, 4, 4))
    (_, state), saved = performer_attention.forward(q, k, v, causal=True, return_state=True, rng=3)
    told = [performer_attention(q, k, v, causal=True, state=state, **how) for how in (
        {"rng": 3}, {"decisions": saved.decisions}, {"projection": saved.decisions["projection"]})]
    assert np.array_equal(told[0], told[1])
    assert np.array_equal(told[0], told[2])
    for rng in (None, np.random.default_rng(3)):
        with pytest.raises(OptionError, match="state was made with a projection"):
            performer_attention(q, k, v, causal=True, state=state, rng=rng)


# draws


def test_decisions():
    given = draw(SHAPES[0])
    out, saved = performer_attention.forward(*given)
    assert saved.decisions["projection"].shape == (math.floor(20 * math.log(20)), 20)
    assert np.array_equal(performer_attention(*given, decisions=saved.decisions), out)
    assert not np.array_equal(performer_attention(*given), out)
    first, second, third = (performer_attention(*given, rng=rng, num_features=9)
                            for rng in (4, 4, 5))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, third)
    want = random_projection(9, 20, rng=4)
    assert np.array_equal(first, performer_attention(*given, projection=want))
    narrow = draw(Shape((), 1, 1, 3, 3, 1, 4))
    assert performer_attention.forward(*narrow)[1].decisions["projection"].shape == (1, 1)


def error(q, k, v, features, draws=8):
    exact = pyattn.attention(q, k, v)
    square = [np.mean((performer_attention(q, k, v, num_features=features, rng=seed) - exact) ** 2)
              for seed in range(draws)]
    return math.sqrt(np.mean(square) / np.mean(exact**2))


def test_the_error_against_attention_falls_as_the_root_of_the_number_of_features():
    q, k, v = (x / 3 for x in draw(Shape((), 2, 2, 64, 64, 16, 16)))
    times_root = [error(q, k, v, m) * math.sqrt(m) for m in (256, 1024, 4096)]
    assert max(times_root) < 1.4 * min(times_root)
    assert times_root[-1] < 1.5


# other arrays, other backends


@pytest.mark.parametrize(("first", "second"), [("cpu", "array_api"), ("array_api", "cpu")])
@pytest.mark.parametrize("kernel", KERNELS)
def test_backward_of_the_other_backend(first, second, kernel):
    given = draw(SHAPES[1])
    with pyattn.use_backend(first):
        out, saved = performer_attention.forward(*given, kernel=kernel, causal=True, rng=0)
        want = saved.backward(out)
    with pyattn.use_backend(second):
        for x, y in zip(saved.backward(out), want, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-11)


@pytest.mark.parametrize("library", ["array_api_strict", "torch"])
@pytest.mark.parametrize("options", [
    {}, {"causal": True}, {"kernel": "relu"}, {"reference": True, "kv_lengths": [30, 47]}],
    ids=str)
def test_other_array_libraries(library, options):
    xp = array_api_strict if library == "array_api_strict" else pytest.importorskip(library)
    given, w = draw(SHAPES[0]), rows(20)
    out, saved = performer_attention.forward(*given, projection=w, **options)
    got, kept = performer_attention.forward(*map(xp.asarray, given), projection=xp.asarray(w),
                                            **options)
    assert isinstance(kept.decisions["projection"], np.ndarray)
    np.testing.assert_allclose(np.asarray(got), out, atol=1e-12)
    for x, y in zip(kept.backward(got), saved.backward(out), strict=True):
        np.testing.assert_allclose(np.asarray(x), y, atol=1e-11)
    moved = saved.to(xp)
    assert isinstance(moved.decisions["projection"], np.ndarray)
    for x, y in zip(moved.backward(got), saved.backward(out), strict=True):
        np.testing.assert_allclose(np.asarray(x), y, atol=1e-11)


@pytest.mark.parametrize("shape", [
    Shape((2,), 2, 1, 0, 5, 4, 4), Shape((2,), 2, 1, 5, 0, 4, 4), Shape((0,), 2, 2, 3, 3, 4, 4),
    Shape((1,), 0, 0, 3, 3, 4, 4)], ids=str)
@pytest.mark.parametrize("options", [
    {}, {"causal": True}, {"kernel": "relu"}, {"reference": True}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do(shape, options, backend):
    given = draw(shape)
    with pyattn.use_backend(backend):
        out, saved = performer_attention.forward(*given, rng=0, **options)
        assert out.shape == (*shape.batch, shape.heads, shape.n, shape.e)
        assert not out.any()
        for x, y in zip(saved.backward(out), given, strict=True):
            assert x.shape == y.shape
            assert not x.any()


def test_nothing_is_written_to():
    given = [np.ascontiguousarray(np.swapaxes(x, 1, 2)).swapaxes(1, 2) for x in draw(SHAPES[0])]
    w = rows(20)
    for x in (*given, w):
        x.flags.writeable = False
    for options in ({}, {"reference": True}, {"kernel": "relu"}):
        out, saved = performer_attention.forward(*given, projection=w, **options)
        out.flags.writeable = False
        first, second = saved.backward(out), saved.backward(out)
        assert all(np.array_equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("options", [{"causal": True}, {}, {"kernel": "relu", "causal": True}],
                         ids=str)
def test_what_it_costs_grows_with_the_tokens(options):
    found = [performer_attention.forward(*draw(Shape((1,), 2, 2, n, n, 16, 16)), rng=0,
                                         **options)[1] for n in (1024, 2048, 4096)]
    stats = [saved.stats for saved in found]
    assert stats[2]["flops"] - stats[1]["flops"] == 2 * (stats[1]["flops"] - stats[0]["flops"])
    # the arguments, the output and its denominators: no features
    assert found[2].nbytes < 8 * 2 * 4096 * (4 * 16 + 1) + 10**5


def test_features_of_the_original_are_counted():
    given = draw(Shape((1,), 2, 2, 200, 100, 16, 16))
    plain, original = (performer_attention.forward(*given, projection=rows(16), order="kv",
                                                   reference=reference)[1].stats["flops"]
                       for reference in (False, True))
    assert plain == original


@pytest.mark.parametrize(("error", "options", "match"), [
    (OptionError, {"kernel": "cosine"}, "kernel must be"),
    (OptionError, {"reference": 1}, "reference must be"),
    (OptionError, {"num_features": 0}, "num_features must be at least 1"),
    (OptionError, {"num_features": 2.5}, "num_features must be an integer"),
    (OptionError, {"scale": 0.0}, "scale must be above 0"),
    (OptionError, {"scale": math.nan}, "scale must be finite"),
    (OptionError, {"epsilon": 1e-3}, "epsilon is added"),
    (OptionError, {"kernel": "relu", "epsilon": -1.0}, "epsilon must be"),
    (OptionError, {"causal": "left"}, "causal must be"),
    (OptionError, {"decisions": {"buckets": np.ones(2)}}, "decisions may hold projection"),
    (OptionError, {"decisions": {"projection": np.ones((3, 20))}, "projection": np.ones((3, 20))},
     "must not both"),
    (OptionError, {"projection": np.ones((3, 20)), "num_features": 4}, "number of rows"),
    (ShapeError, {"projection": np.ones((3, 19))}, "projection must be"),
    (ShapeError, {"projection": np.ones((0, 20))}, "projection must be"),
    (ShapeError, {"projection": np.ones(20)}, "projection must be"),
    (DtypeError, {"projection": np.ones((3, 20), int)}, "projection must be"),
    (OptionError, {"reference": True, "return_state": True}, "state cannot be carried"),
    (OptionError, {"mask": np.ones((33, 47), bool)}, "mask must be None"),
])
def test_arguments_that_do_not_fit(error, options, match):
    with pytest.raises(error, match=match):
        performer_attention(*draw(SHAPES[0]), **options)
