"""Routing attention against loops over tokens, in both modes."""

from __future__ import annotations

import numpy as np
import pytest

import pyattn
from pyattn.features.gathering import spread_tokens, take_tokens
from pyattn.testing import gradcheck


def draw(shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def normal(x):
    """Each row with mean 0 and variance 1, and what undoes that for a gradient."""
    centred = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    y = centred / deviation

    def backward(dy):
        return (dy - dy.mean(-1, keepdims=True) - y * (dy * y).mean(-1, keepdims=True)) / deviation

    return y, backward


def masked(q, k, v, allowed, scale):
    """Dense attention of one head; the output and the gradients' function."""
    scores = np.where(allowed, scale * q @ k.T, -np.inf)
    top = np.where(allowed.any(1), scores.max(1, initial=-np.inf), 0)
    p = np.exp(scores - top[:, None])
    total = p.sum(1, keepdims=True)
    p = np.divide(p, total, out=np.zeros_like(p), where=total > 0)

    def backward(dout):
        dp = dout @ v.T
        ds = scale * p * (dp - (p * dp).sum(1, keepdims=True))
        return ds @ k, ds.T @ q, p.T @ dout

    return p @ v, backward


def lists(products, length, size):
    """Tokens with the largest products, ascending; of equals the first."""
    best = sorted(range(length), key=lambda t: (-products[t], t))[:size]
    return sorted(best) + [-1] * (size - len(best))


def expected(q, k, v, centroids, size, mode, causal, reference, lengths, dout, alignment):
    """One head, item by item: out, dq, dk, dv."""
    n, m = lengths
    offset = 0 if alignment == "top_left" else m - n
    scale = q.shape[-1] ** -0.5
    nq, back_q = normal(q[:n])
    nk, back_k = normal(k[:m])
    out, dq = np.zeros((len(q), v.shape[-1])), np.zeros_like(q)
    dk, dv = np.zeros_like(k), np.zeros_like(v)
    if mode == "assign":
        own, other = (nq @ centroids.T).argmax(1), (nk @ centroids.T).argmax(1)
        allowed = np.zeros((n, m), bool)
        for i in range(n):
            members = [j for j in range(m) if other[j] == own[i]]
            before = [j for j in members if j <= i + offset]
            allowed[i, before[-size:]] = True
            if not causal:
                allowed[i, [j for j in members if j > i + offset][:size]] = True
        out[:n], backward = masked(nq, nk, v[:m], allowed, scale)
        gq, gk, dv[:m] = backward(dout[:n])
    else:
        times, passes = np.zeros(n), []
        for c in range(len(centroids)):
            i, j = (np.array([t for t in lists(x @ centroids[c], length, size) if t >= 0], int)
                    for x, length in ((nq, n), (nk, m)))
            allowed = np.ones((len(i), len(j)), bool)
            if causal:
                allowed = (np.tri(len(i), len(j), dtype=bool) if reference
                           else j <= i[:, None] + offset)
            found, backward = masked(nq[i], nk[j], v[j], allowed, scale)
            out[i] += found
            times[i] += 1
            passes.append((i, j, backward))
        times = np.maximum(times, 1)[:, None]
        out[:n] /= times
        gq, gk = np.zeros_like(nq), np.zeros_like(nk)
        for i, j, backward in passes:
            parts = backward(dout[i] / times[i])
            gq[i] += parts[0]
            gk[j] += parts[1]
            dv[j] += parts[2]
    dq[:n], dk[:m] = back_q(gq), back_k(gk)
    return out, dq, dk, dv


CASES = [
    {}, {"causal": True}, {"mode": "assign"}, {"mode": "top", "causal": True},
    {"causal": True, "reference": True}, {"causal": "top_left"},
]


@pytest.mark.parametrize("backend", ["cpu", "array_api"])
@pytest.mark.parametrize(("n", "m", "size", "heads", "groups"), [
    (1, 1, 1, 1, 1), (33, 33, 8, 2, 2), (100, 100, 70, 2, 1), (40, 90, 16, 4, 2),
    (90, 40, 5, 1, 1)])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_forward_and_backward(options, n, m, size, heads, groups, backend):
    q, k, v = (draw((2, h, length, width), seed) for seed, (h, length, width) in enumerate(
        ((heads, n, 6), (groups, m, 6), (groups, m, 5))))
    centroids, dout = draw((heads, 3, 6), 3), draw((2, heads, n, 5), 4)
    rng = np.random.default_rng(n)
    lengths = [(n, m), (rng.integers(0, n + 1), rng.integers(0, m + 1))]
    with pyattn.use_backend(backend):
        out, saved = pyattn.routing_attention.forward(
            q, k, v, centroids, cluster_size=size, q_lengths=[x[0] for x in lengths],
            kv_lengths=[x[1] for x in lengths], **options)
        grads = saved.backward(dout)
    causal = options.get("causal", False)
    reference = options.get("reference", False)
    mode = options.get("mode") or ("assign" if causal and not reference else "top")
    want = [np.zeros_like(x) for x in (q, k, v)]
    for b, h in np.ndindex(2, heads):
        g = h * groups // heads
        result = expected(q[b, h], k[b, g], v[b, g], centroids[h], size, mode, bool(causal),
                          reference, lengths[b], dout[b, h],
                          "top_left" if causal == "top_left" else "bottom_right")
        np.testing.assert_allclose(out[b, h], result[0], atol=1e-11)
        for total, at, part in zip(want, (h, g, g), result[1:], strict=True):
            total[b, at] += part
    for got, exact in zip(grads[:3], want, strict=True):
        np.testing.assert_allclose(got, exact, atol=1e-10)
    assert not grads.centroids.any()
    again = pyattn.routing_attention(
        q, k, v, centroids, cluster_size=size, q_lengths=[x[0] for x in lengths],
        kv_lengths=[x[1] for x in lengths], decisions=saved.decisions, **options)
    np.testing.assert_allclose(again, out, atol=1e-12)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_finite_differences(options):
    q, k, v = (draw((2, 11, 4), seed) for seed in range(3))
    centroids = draw((2, 3, 4), 3)
    _, saved = pyattn.routing_attention.forward(q, k, v, centroids, cluster_size=4, **options)

    gradcheck(pyattn.routing_attention, q, k, v, centroids, cluster_size=4,
              decisions=saved.decisions, **options)


@pytest.mark.parametrize("mode", ["assign", "top"])
@pytest.mark.parametrize("causal", [False, True])
def test_one_cluster_for_all_is_dense(mode, causal):
    q, k, v = (draw((2, 70, 8), seed) for seed in range(3))
    out = pyattn.routing_attention(q, k, v, draw((2, 1, 8), 3), cluster_size=70, mode=mode,
                                   causal=causal)
    want = pyattn.attention(normal(q)[0], normal(k)[0], v, causal=causal)
    np.testing.assert_allclose(out, want, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"reference": True}, {"mode": "top"}], ids=str)
def test_only_what_the_paper_does_hears_of_later_tokens(options):
    q, k, v = (draw((1, 96, 8), seed) for seed in range(3))
    centroids = draw((1, 6, 8), 3)

    def run(q, k, v):
        return pyattn.routing_attention(q, k, v, centroids, cluster_size=10, causal=True,
                                        **options)

    before, leaks = run(q, k, v), []
    for t in (30, 60, 90):
        changed = [x.copy() for x in (q, k, v)]
        for seed, x in enumerate(changed):
            x[0, t] = draw(8, 100 * t + seed)
        leaks.append(not np.array_equal(run(*changed)[0, :t], before[0, :t]))
    assert any(leaks) == bool(options)


def test_leading_axes_broadcast():
    q, k, v = draw((3, 2, 20, 4)), draw((2, 20, 4), 1), draw((1, 2, 20, 4), 2)
    centroids, dout = draw((2, 2, 4), 3), draw((3, 2, 20, 4), 4)
    out, saved = pyattn.routing_attention.forward(q, k, v, centroids, cluster_size=6)
    found = saved.backward(dout)
    full = [np.broadcast_to(x, q.shape) for x in (q, k, v)]
    want, saved = pyattn.routing_attention.forward(*full, centroids, cluster_size=6)
    grads = saved.backward(dout)
    np.testing.assert_array_equal(out, want)
    np.testing.assert_allclose(found.k, grads.k.sum(0))
    np.testing.assert_allclose(found.v, grads.v.sum(0, keepdims=True))


@pytest.mark.parametrize("options", CASES, ids=str)
def test_nothing_is_too_odd(options):
    for shape in ((0, 2, 5, 4), (1, 2, 0, 4), (2, 2, 1, 4)):
        x = np.ones(shape)
        out, saved = pyattn.routing_attention.forward(x, x, x, np.ones((2, 3, 4)), cluster_size=4,
                                                      **options)
        assert saved.backward(out).k.shape == shape
    x = draw((1, 50, 4))
    spoiled = x.copy()
    spoiled[:, 30:] = np.nan
    results = []
    for y in (x, spoiled):
        out, saved = pyattn.routing_attention.forward(
            y, y, y, draw((1, 4, 4), 1), cluster_size=9, q_lengths=30, kv_lengths=30, **options)
        results.append((out, *saved.backward(np.ones_like(out))))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)
        assert np.isfinite(other).all()


@pytest.mark.parametrize("options", CASES, ids=str)
def test_what_is_not_a_number_stays_where_it_is(options):
    """No cluster takes such a token for one of its best, if it has others."""
    x, centroids = draw((1, 60, 4)), draw((1, 6, 4), 1)
    x[:, 7] = np.nan
    out, saved = pyattn.routing_attention.forward(x, x, x, centroids, cluster_size=10, **options)
    if saved.mode == "top":
        assert np.isfinite(out).all()
    else:
        assert np.isnan(out).any(-1).mean() < 0.5
    x[:] = np.nan
    out = pyattn.routing_attention(x, x, x, centroids, cluster_size=60, **options)
    assert np.isnan(out).all()


@pytest.mark.parametrize("mode", ["assign", "top"])
@pytest.mark.parametrize("library", ["torch", "array_api_strict"])
def test_other_libraries(library, mode):
    xp = pytest.importorskip(library)
    given = [*(draw((2, 2, 40, 8), seed) for seed in range(3)), draw((2, 5, 8), 3)]
    options = {"cluster_size": 9, "mode": mode, "causal": True}
    want, kept = pyattn.routing_attention.forward(*given, **options)
    out, saved = pyattn.routing_attention.forward(*map(xp.asarray, given), **options)
    np.testing.assert_allclose(np.asarray(out), want, atol=1e-12)
    moved = kept.to(xp)
    assert type(moved.decisions["clusters"]) is np.ndarray
    for own, other, exact in zip(saved.backward(out), moved.backward(out), kept.backward(want),
                                 strict=True):
        np.testing.assert_allclose(np.asarray(own), exact, atol=1e-12)
        np.testing.assert_allclose(np.asarray(other), exact, atol=1e-12)


@pytest.mark.parametrize("mode", ["assign", "top"])
def test_a_cluster_larger_than_all_takes_no_more(mode):
    q, k, v = (draw((1, 7, 4), seed) for seed in range(3))
    outs = [pyattn.routing_attention(q, k, v, draw((1, 2, 4), 3), cluster_size=size, mode=mode)
            for size in (7, 10**12)]
    np.testing.assert_array_equal(*outs)


@pytest.mark.parametrize("mode", ["assign", "top"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_other_dtypes(dtype, mode):
    import ml_dtypes  # noqa: F401

    q, k, v = (draw((2, 200, 16), seed) for seed in range(3))
    centroids = draw((2, 5, 16), 3)
    want, saved = pyattn.routing_attention.forward(q, k, v, centroids, cluster_size=40, mode=mode)
    out, saved = pyattn.routing_attention.forward(
        *(x.astype(dtype) for x in (q, k, v)), centroids, cluster_size=40, mode=mode,
        decisions=saved.decisions)
    assert out.dtype == dtype
    assert saved.backward(out).q.dtype == dtype
    tolerance = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 6e-2}[dtype]
    np.testing.assert_allclose(out.astype(np.float64), want, atol=tolerance)


@pytest.mark.parametrize("library", ["torch", "array_api_strict"])
def test_gathering_is_the_same_in_every_library(library):
    xp = pytest.importorskip(library)
    index = np.random.default_rng(0).integers(-1, 7, (3, 20))
    x, y = draw((3, 7, 2)), draw((3, 20, 2), 1)
    for function, argument, rest in ((take_tokens, x, ()), (spread_tokens, y, (7,))):
        want = function(argument, index, *rest)
        found = function(xp.asarray(argument), index, *rest)
        np.testing.assert_allclose(np.asarray(found), want, atol=1e-14)
    assert np.isclose((take_tokens(x, index) * y).sum(), (x * spread_tokens(y, index, 7)).sum())


def test_tiles_grow_with_the_length():
    tiles = []
    for n in (1024, 4096):
        clusters = int(n**0.5)
        q, k, v = (draw((1, n, 8), seed, np.float32) for seed in range(3))
        _, saved = pyattn.routing_attention.forward(
            q, k, v, draw((1, clusters, 8), 3), cluster_size=clusters, causal=True)
        tiles.append(saved.stats["tiles"])
        assert saved.stats["pairs"] <= n * clusters
    assert tiles[1] < 9 * tiles[0]


@pytest.mark.parametrize(("options", "error", "says"), [
    ({"cluster_size": 0}, pyattn.OptionError, "cluster_size"),
    ({"mode": "best"}, pyattn.OptionError, "mode"),
    ({"mode": "assign", "reference": True}, pyattn.OptionError, "reference"),
    ({"return_lse": True}, pyattn.OptionError, "return_lse"),
    ({"centroids": np.ones((1, 2, 4))}, pyattn.ShapeError, "centroids"),
    ({"centroids": np.ones((2, 0, 4))}, pyattn.ShapeError, "at least one cluster"),
    ({"mode": "assign", "decisions": {"clusters": np.zeros((2, 7), int)}}, pyattn.ShapeError,
     "clusters"),
    ({"mode": "assign", "decisions": {"clusters": np.full((2, 8), 3)}}, pyattn.OptionError,
     "0..2"),
    ({"decisions": {"buckets": 1}}, pyattn.OptionError, "decisions"),
    ({"decisions": {"clusters": np.tile([1, 0, 2, 3], (2, 3, 1))}}, pyattn.OptionError,
     "ascending"),
    ({"decisions": {"clusters": np.tile([0, 0, 2, 3], (2, 3, 1))}}, pyattn.OptionError,
     "each once"),
    ({"decisions": {"clusters": np.tile([-1, 0, 2, 3], (2, 3, 1))}}, pyattn.OptionError,
     "behind them"),
    ({"kv_lengths": 3, "decisions": {"key_clusters": np.tile([0, 1, 2, 3], (2, 3, 1))}},
     pyattn.OptionError, "no padding"),
], ids=str)
def test_errors(options, error, says):
    x = np.ones((2, 8, 4))
    centroids = options.pop("centroids", np.ones((2, 3, 4)))
    with pytest.raises(error, match=says):
        pyattn.routing_attention(x, x, x, centroids, **{"cluster_size": 4, **options})
