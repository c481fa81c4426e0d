"""Linear attention against dense formulas: every feature map, forward, backward and state."""

from __future__ import annotations

import tracemalloc
from types import SimpleNamespace

import array_api_strict
import ml_dtypes
import numpy as np
import oracle
import pytest
from table import Shape
from test_micro_kernels import FLOATS, WIDTHS, at, micro_kernel

import pyattn
from pyattn.checks import BackendError, DtypeError, OptionError, ShapeError
from pyattn.engines import linear as engine
from pyattn.engines.linear import State, cheaper, steps
from pyattn.features.feature_maps import FeatureMap
from pyattn.testing import gradcheck

BACKENDS = ["cpu", "array_api"]
SHAPES = [Shape((), 1, 1, 2, 3, 1, 1), Shape((2,), 4, 2, 33, 47, 20, 13),
          Shape((1,), 3, 1, 70, 40, 16, 64), Shape((2, 2), 2, 2, 9, 150, 8, 8)]
EMPTY = [Shape((2,), 2, 1, 0, 5, 4, 4), Shape((2,), 2, 1, 5, 0, 4, 4),
         Shape((0,), 2, 2, 3, 3, 4, 4), Shape((1,), 0, 0, 3, 3, 4, 4)]
DTYPES = [np.float64, np.float32, ml_dtypes.bfloat16, np.float16]
MAPS = ["elu1", "relu", "identity", "exp"]
CAUSAL = [False, True, "top_left"]


def made(kind, d, projected=True, dtype=np.float64):
    """A feature map with 21 features, or as many as there are columns."""
    w = np.random.default_rng(d).standard_normal((21, d)).astype(dtype) if projected else None
    return FeatureMap(kind, w, scale=d ** -0.25, epsilon=0.01 if kind == "relu" else 0.0)


def draw(s, dtype=np.float64, seed=0):
    rng = np.random.default_rng([s.n, s.m, seed])
    return tuple(rng.standard_normal((*s.batch, h, n, w)).astype(dtype) for h, n, w in (
        (s.heads, s.n, s.d), (s.groups, s.m, s.d), (s.groups, s.m, s.e)))


def features(made, x, r):
    """phi(x) and d phi / d h, and h's own input."""
    x = r(made.scale * r(x))
    h = x if made.projection is None else r(x @ r(made.projection).T)
    if made.kind == "identity":
        return h, np.ones_like(h), x
    if made.kind == "elu1":
        low = np.exp(np.minimum(h, 0))
        return r(np.where(h > 0, h + 1, low)), r(np.where(h > 0, 1, low)), x
    if made.kind == "relu":
        return r(np.maximum(h, 0) + made.epsilon), (h > 0).astype(h.dtype), x
    phi = r(np.exp(h - h.max(axis=-1, keepdims=True, initial=-np.inf)))
    return phi, phi, x


def tops(made, x, r):
    """What the features of kind "exp" leave out, as a logarithm."""
    x = r(made.scale * r(x))
    h = x if made.projection is None else r(x @ r(made.projection).T)
    return r(h.max(axis=-1, initial=-np.inf) - r((x * x).sum(axis=-1)) / 2)


def allowed(n, m, causal):
    offset = 0 if causal == "top_left" else m - n
    seen = np.arange(m) <= np.arange(n)[:, None] + offset
    return seen if causal else np.ones_like(seen)


def dense(made, q, k, v, dout, r, *, causal=False, normalize=True, epsilon=0.0):
    """Output and gradients by N x M arrays."""
    heads, seen = q.shape[-3], allowed(q.shape[-2], k.shape[-2], causal)
    k_all, v_all = (oracle.repeat_heads(x, heads) for x in (k, v))
    (phi_q, slope_q, x_q), (phi_k, slope_k, x_k) = (features(made, x, r) for x in (q, k_all))
    v_all = r(v_all)
    weight = seen
    if made.kind == "exp" and seen.size:
        c = np.where(seen, tops(made, k_all, r)[..., None, :], -np.inf)
        top = c.max(axis=-1, keepdims=True)
        weight = np.where(seen, np.exp(c - np.where(top == -np.inf, 0, top)), 0)
    a = r(np.where(seen, phi_q @ np.swapaxes(phi_k, -1, -2), 0) * weight)
    num = r(a @ v_all)
    den = r(a.sum(axis=-1, keepdims=True)) if normalize else np.ones((*num.shape[:-1], 1))
    den = np.where(den == 0, 0, den + epsilon)
    safe = np.where(den == 0, 1, den)
    out = r(np.where(den == 0, 0, num / safe))
    dnum = r(np.where(den == 0, 0, r(dout) / safe))
    dden = -r((dnum * out).sum(axis=-1, keepdims=True)) if normalize else 0
    da = r(np.where(seen, r(dnum @ np.swapaxes(v_all, -1, -2)) + dden, 0) * weight)
    dphi = r(da @ phi_k), r(np.swapaxes(da, -1, -2) @ phi_q)

    def pull(dphi, slope, x):
        dh = r(dphi * slope)
        dx = dh if made.projection is None else r(dh @ r(made.projection))
        if made.kind == "exp":
            dx = r(dx - dh.sum(axis=-1, keepdims=True) * x)
        return r(made.scale * dx)

    def shared(x, like):
        size = like.shape[-3]
        split = (*x.shape[:-3], size, x.shape[-3] // max(size, 1), *x.shape[-2:])
        return x.reshape(split).sum(axis=-3)

    return {"out": out, "q": pull(dphi[0], slope_q, x_q),
            "k": shared(pull(dphi[1], slope_k, x_k), k),
            "v": shared(r(np.swapaxes(a, -1, -2) @ dnum), v)}


def judge(made, shape, dtype, backend, **options):
    q, k, v = draw(shape, dtype)
    with pyattn.use_backend(backend):
        out, saved = engine.forward(q, k, v, feature_map=made, **options)
        dout = np.random.default_rng(5).standard_normal(out.shape).astype(dtype)
        found = {"out": out, **saved.backward(dout)._asdict()}
    kept = {name: x for name, x in options.items() if name in ("causal", "normalize", "epsilon")}
    exact, rough = (dense(made, q, k, v, dout, r, **kept)
                    for r in (oracle.exact(dtype), oracle.plain(dtype)))

    def again():
        for seed in range(1, 5):
            given = draw(shape, dtype, seed)
            yield tuple(dense(made, *given, dout, r, **kept)
                        for r in (oracle.exact(dtype), oracle.plain(dtype)))

    for name, x in found.items():
        oracle.assert_close(x, exact[name], rough[name], factor=2 if name == "out" else 3,
                            name=name, dtype=dtype,
                            again=lambda name=name: [(a[name], b[name]) for a, b in again()])
    return saved


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: np.dtype(x).name)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_rule(shape, kind, causal, backend, dtype):
    # sums of products of any sign may be near 0, and nothing then is left of their digits
    judge(made(kind, shape.d), shape, dtype, backend, causal=causal, order="kv",
          normalize=kind != "identity")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["elu1", "relu", "identity"])
@pytest.mark.parametrize("causal", CAUSAL)
def test_without_a_projection_or_a_normaliser(causal, kind, backend):
    for dtype in (np.float64, np.float32):
        bare = FeatureMap(kind)
        judge(bare, SHAPES[1], dtype, backend, causal=causal, normalize=False)
        if kind == "elu1":
            judge(bare, SHAPES[1], dtype, backend, causal=causal, epsilon=0.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["elu1", "exp"])
@pytest.mark.parametrize("causal", CAUSAL)
def test_one_token_is_its_value(causal, kind, backend):
    q, k, v = draw(Shape((2,), 2, 2, 1, 1, 8, 5))
    with pyattn.use_backend(backend):
        out, dq, dk, dv = both(made(kind, 8), q, k, v, causal=causal)
    np.testing.assert_allclose(out, v, rtol=1e-14)
    dout = np.random.default_rng(1).standard_normal(out.shape)
    np.testing.assert_allclose(dv, dout, rtol=1e-14)
    for x in (dq, dk):
        np.testing.assert_allclose(x, 0, atol=1e-14)


def both(made, q, k, v, **options):
    """Output and gradients, one after another."""
    out, saved = engine.forward(q, k, v, feature_map=made, **options)
    dout = np.random.default_rng(1).standard_normal(out.shape).astype(out.dtype)
    return out, *saved.backward(dout)


def same(found, wanted, tolerance=1e-10):
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1, abs(want).max()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["elu1", "exp"])
@pytest.mark.parametrize("causal", CAUSAL)
def test_chunks_and_orders_agree(causal, kind, backend):
    given = draw(Shape((2,), 2, 1, 50, 61, 8, 8))
    with pyattn.use_backend(backend):
        wanted = both(made(kind, 8), *given, causal=causal, order="qk")
        for chunk in (1, 7, 64):
            same(both(made(kind, 8), *given, causal=causal, order="kv", chunk=chunk), wanted)
    if backend == "array_api":
        with pyattn.use_backend(backend):
            same(both(made(kind, 8), *given, causal=causal, order="kv", chunk=1000), wanted)


def test_auto_takes_the_order_with_fewer_products():
    for d, e, chunk in ((16, 16, None), (8, 32, None), (96, 96, 500)):
        # n n (d + e) against d e 2 n
        flip = 2 * d * e // (d + e)
        for n, order in ((flip, "qk"), (flip + 1, "kv")):
            q, k, v = draw(Shape((), 1, 1, n, n, d, e))
            saved = pyattn.linear_attention.forward(q, k, v, chunk=chunk)[1]
            assert saved.order == order == cheaper(n, n, d, e)
            other = "kv" if order == "qk" else "qk"
            np.testing.assert_allclose(pyattn.linear_attention(q, k, v, order=other, chunk=chunk),
                                       saved.attended.out, rtol=1e-11, atol=1e-13)
    # beyond a chunk there are steps in any case
    assert cheaper(96, 96, 96, 96) == "qk"
    few = np.s_[..., :96, :]
    assert pyattn.linear_attention.forward(q[few], k[few], v[few])[1].order == "kv"
    # fewer pairs are allowed where each query sees half of them
    assert cheaper(20, 20, 16, 16, causal=True) == "qk"
    assert pyattn.linear_attention.forward(q[:, :2], k[:, :2], v[:, :2], return_state=True)[
        1].order == "kv"


def test_steps_cover_every_pair_once():
    for n, m, offset, chunk in ((5, 9, 4, 4), (9, 5, -4, 4), (9, 5, 0, 3), (1, 9, 8, 4),
                                (0, 3, 3, 2), (3, 0, -3, 2)):
        for causal in (False, True):
            met = np.zeros((n, m), int)
            state = []
            for step in steps(n, m, offset, chunk=chunk, causal=causal, order="kv"):
                rows = np.arange(n)[step.queries]
                met[np.ix_(rows, state)] += 1
                for r, i in enumerate(rows):
                    met[i, np.arange(m)[step.keys][:max(0, r + step.shift + 1)]] += 1
                state += range(m)[step.keys]
            seen = np.arange(m) <= np.arange(n)[:, None] + offset
            np.testing.assert_array_equal(met, seen if causal else 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["elu1", "exp"])
def test_token_by_token_is_the_same_as_all_at_once(kind, backend):
    q, k, v = draw(Shape((2,), 4, 2, 20, 20, 8, 5))
    with pyattn.use_backend(backend):
        whole = engine.forward(q, k, v, feature_map=made(kind, 8), causal=True)[0]
        state = None
        for t in range(20):
            now = np.s_[..., t:t + 1, :]
            (out, state), _ = engine.forward(q[now], k[now], v[now], feature_map=made(kind, 8),
                                             causal=True, state=state, return_state=True)
            np.testing.assert_allclose(out, whole[now], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", MAPS)
def test_pieces_hand_on_their_state_and_its_gradient(kind, backend):
    shape = Shape((2,), 4, 2, 150, 150, 8, 5)
    q, k, v = draw(shape)
    options = {"feature_map": made(kind, 8), "causal": True, "normalize": kind != "identity"}
    with pyattn.use_backend(backend):
        out, saved = engine.forward(q, k, v, **options)
        dout = np.random.default_rng(0).standard_normal(out.shape)
        wanted = saved.backward(dout)
        pieces, state = [], None
        for start, end in ((0, 70), (70, 71), (71, 150)):
            part = np.s_[..., start:end, :]
            (found, state), saved = engine.forward(q[part], k[part], v[part], **options,
                                                   state=state, return_state=True)
            np.testing.assert_allclose(found, out[part], rtol=1e-9, atol=1e-11)
            pieces.append((part, saved))
        dstate = None
        for part, saved in reversed(pieces):
            grads = saved.backward(dout[part], dstate)
            assert grads._fields == ("q", "k", "v", "state")[:len(grads)]
            same(grads[:3], [x[part] for x in wanted])
            dstate = getattr(grads, "state", None)
    assert dstate is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", MAPS)
def test_the_state_is_the_sum_over_keys(kind, backend):
    q, k, v = draw(Shape((2,), 4, 2, 3, 90, 8, 5))
    with pyattn.use_backend(backend):
        (_, state), _ = engine.forward(q, k, v, feature_map=made(kind, 8), causal=True,
                                       normalize=kind != "identity", return_state=True)
    exact = oracle.exact(np.float64)
    phi = features(made(kind, 8), k, exact)[0]
    ones = np.ones((*v.shape[:-1], int(kind != "identity")))
    if kind == "exp":
        assert isinstance(state, State)
        state = state.sums * np.exp(state.log_scale)[..., None, None]
        phi = phi * np.exp(tops(made(kind, 8), k, exact))[..., None]
    wanted = np.swapaxes(phi, -1, -2) @ np.concatenate([v, ones], axis=-1)
    np.testing.assert_allclose(state, wanted.astype(float), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["elu1", "exp"])
def test_no_output_knows_a_later_token(kind, backend):
    q, k, v = draw(Shape((1,), 2, 1, 150, 150, 8, 5), np.float32)
    cut = 100
    with pyattn.use_backend(backend):
        out = engine.forward(q, k, v, feature_map=made(kind, 8), causal=True)[0]
        for later in (3.0, 1e4, np.nan, np.inf):
            changed = [x.copy() for x in (q, k, v)]
            for x in changed:
                x[..., cut:, :] *= later
            found, saved = engine.forward(*changed, feature_map=made(kind, 8), causal=True)
            # a library's products may depend on the shapes and strides it is handed
            if backend == "cpu" or np.isfinite(later):
                np.testing.assert_array_equal(found[..., :cut, :], out[..., :cut, :])
            np.testing.assert_allclose(found[..., :cut, :], out[..., :cut, :], rtol=1e-5,
                                       atol=1e-6)
            dout = np.ones_like(found)
            dout[..., cut:, :] = 0
            if np.isfinite(later):
                grads = saved.backward(dout)
                for x in grads:
                    assert not x[..., cut:, :].any()
                    assert np.isfinite(x).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["elu1", "exp"])
@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
def test_a_token_that_is_not_finite_reaches_those_that_see_it_alone(where, kind, backend):
    shape = Shape((1,), 2, 1, 40, 40, 8, 5)
    given = dict(zip("qkv", draw(shape), strict=True))
    dout = np.random.default_rng(0).standard_normal((1, 2, 40, 5))
    at_token = 20
    (given | {"dout": dout})[where][..., at_token, :] = np.nan
    with pyattn.use_backend(backend):
        out, saved = engine.forward(*given.values(), feature_map=made(kind, 8), causal=True)
        dq, dk, dv = saved.backward(dout)
    i = np.arange(40)
    touched = {"q": i == at_token, "k": i >= at_token, "v": i >= at_token, "dout": i < 0}[where]
    assert (np.isnan(out).any(axis=(0, 1, 3)) == touched).all()
    for x in (dk, dv):
        # keys hear of what queries after them met
        assert np.isfinite(x[..., at_token + 1:, :]).all() or where in ("k", "v")
    if where in ("q", "dout"):
        assert (np.isnan(dq).any(axis=(0, 1, 3)) == (i == at_token)).all()
    else:
        assert np.isfinite(dq[..., :at_token, :]).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["elu1", "exp"])
@pytest.mark.parametrize("causal", CAUSAL)
def test_padding_is_as_if_it_was_not_there(causal, kind, backend):
    q, k, v = draw(Shape((3,), 4, 2, 70, 80, 8, 5))
    n, m = [70, 3, 0], [66, 80, 5]
    dout = np.random.default_rng(0).standard_normal((3, 4, 70, 5))
    for b in range(3):
        q[b, :, n[b]:] = dout[b, :, n[b]:] = np.nan
        k[b, :, m[b]:] = v[b, :, m[b]:] = np.nan
    options = {"feature_map": made(kind, 8), "causal": causal, "return_state": True}
    with pyattn.use_backend(backend):
        (out, state), saved = engine.forward(q, k, v, **options, q_lengths=n, kv_lengths=m)
        found = out, *saved.backward(dout)
        for b in range(3):
            own = q[b, :, :n[b]], k[b, :, :m[b]], v[b, :, :m[b]]
            (alone, own_state), own_saved = engine.forward(*own, **options)
            grads = own_saved.backward(dout[b, :, :n[b]])
            for got, want in zip(found, (alone, *grads), strict=True):
                np.testing.assert_allclose(got[b, :, :want.shape[1]], want, rtol=1e-9, atol=1e-12)
                assert not got[b, :, want.shape[1]:].any()
            sums, own_sums = (x.sums if kind == "exp" else x for x in (state, own_state))
            np.testing.assert_allclose(sums[b], own_sums, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["elu1", "exp"])
@pytest.mark.parametrize("causal", [False, True])
def test_segments_of_long_sequences_agree(causal, kind):
    shape = Shape((1,), 2, 1, 2100, 2100, 8, 16)
    q, k, v = draw(shape)
    options = {"feature_map": made(kind, 8), "causal": causal, "return_state": True}
    found = {}
    for backend in BACKENDS:
        with pyattn.use_backend(backend):
            (_, start), _ = engine.forward(q[..., :9, :], k[..., :9, :], v[..., :9, :], **options)
            (out, state), saved = engine.forward(q, k, v, **options, state=start)
            dstate = np.ones(saved.backward(out).state.shape)
            found[backend] = out, *state, *saved.backward(out, dstate)
            if kind == "elu1":
                found[backend] = out, state, *saved.backward(out, dstate)
    same(found["cpu"], found["array_api"], 1e-9)


def test_results_do_not_depend_on_the_number_of_threads():
    given = draw(Shape((1,), 1, 1, 3000, 3000, 16, 16), np.float32)
    count = pyattn.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            pyattn.set_num_threads(threads)
            found.append([both(made(kind, 16), *given, causal=True) for kind in ("elu1", "exp")])
    finally:
        pyattn.set_num_threads(count)
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            for x, y in zip(one, two, strict=True):
                np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("kind", ["elu1", "exp"])
def test_one_backend_undoes_what_another_did(kind):
    q, k, v = draw(SHAPES[1])
    found = []
    for first, second in (("cpu", "array_api"), ("array_api", "cpu")):
        with pyattn.use_backend(first):
            out, saved = engine.forward(q, k, v, feature_map=made(kind, 20), causal=True)
        with pyattn.use_backend(second):
            found.append(saved.backward(np.ones_like(out)))
    same(*found)


def test_cost_is_linear_in_the_number_of_tokens():
    stats = []
    for n in (1024, 2048, 4096):
        q, k, v = draw(Shape((1,), 2, 1, n, n, 8, 8), np.float32)
        saved = engine.forward(q, k, v, feature_map=made("exp", 8), causal=True)[1]
        stats.append(saved.stats)
        # no field has as many numbers as there are tokens times features, or pairs
        most = max(x.size for x in (saved.q, saved.out, saved.den))
        assert most <= 2 * n * 8
    for name in ("pairs", "tiles", "flops"):
        assert [x[name] for x in stats] == [stats[0][name] * factor for factor in (1, 2, 4)]
    assert {x["state"] for x in stats} == {21 * 9}
    assert stats[0]["pairs"] == 2 * 1024 * 64


def test_streams_take_constant_memory():
    piece, made_exp = 2048, made("exp", 16, dtype=np.float32)
    q, k, v = draw(Shape((1,), 1, 1, piece, piece, 16, 16), np.float32)
    peaks, state = [], None
    tracemalloc.start()
    try:
        for _ in range(12):
            tracemalloc.reset_peak()
            (out, state), _ = engine.forward(q, k, v, feature_map=made_exp, causal=True,
                                             state=state, return_state=True)
            peaks.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
    assert np.isfinite(out).all()
    assert max(peaks[2:]) < 1.05 * min(peaks[2:])


def test_memory_of_a_backward_holds_no_features():
    n = 4096
    q, k, v = draw(Shape((1,), 1, 1, n, n, 16, 16), np.float32)
    wide = FeatureMap("exp", np.random.default_rng(0).standard_normal((256, 16)), scale=0.5)
    both(wide, q, k, v, causal=True)
    tracemalloc.start()
    try:
        both(wide, q, k, v, causal=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < n * 256 * 4 * 0.8


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_stay_finite(backend):
    q, k, v = (30 * x for x in draw(Shape((1,), 2, 1, 100, 100, 8, 5), np.float32))
    with pyattn.use_backend(backend):
        for causal in (True, False):
            found = both(made("exp", 8), q, k, v, causal=causal)
            for x in found:
                assert np.isfinite(x).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_whose_weights_are_all_zero(backend):
    q, k, v = draw(Shape((1,), 1, 1, 6, 6, 4, 4))
    q[..., 2, :] = -1
    with pyattn.use_backend(backend):
        for epsilon in (0.0, 1e-6):
            out, saved = engine.forward(q, k, v, feature_map=FeatureMap("relu"), causal=True,
                                        epsilon=epsilon)
            dout = np.ones_like(out)
            dout[..., 2, :] = np.nan
            assert not out[..., 2, :].any()
            grads = saved.backward(dout)
            assert all(np.isfinite(x).all() for x in grads)
            assert not grads.q[..., 2, :].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("kind", ["elu1", "exp"])
@pytest.mark.parametrize("causal", CAUSAL)
def test_nothing_to_do(causal, kind, shape, backend):
    q, k, v = draw(shape, np.float32)
    with pyattn.use_backend(backend):
        (out, state), saved = engine.forward(q, k, v, feature_map=made(kind, shape.d),
                                             causal=causal, return_state=True)
        grads = saved.backward(np.ones_like(out))
    assert out.shape == (*shape.batch, shape.heads, shape.n, shape.e)
    sums = state.sums if kind == "exp" else state
    assert sums.shape == (*shape.batch, shape.groups, 21, shape.e + 1)
    for x, like in zip((out, *grads), (out, q, k, v), strict=True):
        assert x.shape == like.shape
        assert not x.any() or not x.size


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_axes_broadcast_and_strides_do_not_matter(backend):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((3, 2, 9, 4, 8)).swapaxes(2, 3)
    k, v = rng.standard_normal((2, 1, 2, 8, 14)).swapaxes(-1, -2)[..., ::2, :]
    dout = rng.standard_normal((3, 2, 4, 9, 8))
    for x in (q, k, v, dout):
        x.flags.writeable = False
    with pyattn.use_backend(backend):
        out, saved = pyattn.linear_attention.forward(q, k, v, causal=True)
        dq, dk, dv = saved.backward(dout)
        full = [np.ascontiguousarray(np.broadcast_to(x, (3, 2, *x.shape[-3:]))) for x in (k, v)]
        want, full_saved = pyattn.linear_attention.forward(q.copy(), *full, causal=True)
        grads = full_saved.backward(dout.copy())
    same((out, dq, dk, dv), (want, grads.q, *(x.sum(axis=(0, 1))[None] for x in grads[1:])))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_finite_differences(backend):
    given = draw(Shape((2,), 4, 2, 9, 12, 5, 3))
    state = np.abs(np.random.default_rng(0).standard_normal((2, 2, 5, 4)))

    def forward(q, k, v, state):
        return pyattn.linear_attention.forward(q, k, v, causal=True, chunk=4, state=state,
                                               return_state=True)

    with pyattn.use_backend(backend):
        gradcheck(SimpleNamespace(forward=forward, __name__="with_state"), *given, state)
        gradcheck(pyattn.linear_attention, *given, feature_map=made("exp", 5), causal=True)
        gradcheck(pyattn.linear_attention, *given, feature_map=made("elu1", 5), normalize=False)


class Squares:
    """A user's feature map: x and its squares."""

    @staticmethod
    def forward(x):
        def backward(dphi):
            return (dphi[..., :x.shape[-1]] + 2 * x * dphi[..., x.shape[-1]:],)

        return np.concatenate([x + 5, x**2], axis=-1), SimpleNamespace(backward=backward)


def test_any_operation_is_a_feature_map():
    q, k, v = draw(Shape((2,), 4, 2, 9, 12, 5, 3))
    out, saved = pyattn.linear_attention.forward(q, k, v, feature_map=Squares())
    phi_q, phi_k = (oracle.repeat_heads(Squares.forward(x)[0], 4) for x in (q, k))
    a = phi_q @ np.swapaxes(phi_k, -1, -2)
    np.testing.assert_allclose(
        out, a @ oracle.repeat_heads(v, 4) / a.sum(axis=-1, keepdims=True), rtol=1e-10)
    assert saved.attended.features == 10
    gradcheck(pyattn.linear_attention, q, k, v, feature_map=Squares(), causal=True)


def test_strict_arrays():
    given = [array_api_strict.asarray(x) for x in draw(SHAPES[1])]
    w = array_api_strict.asarray(made("exp", 20).projection)
    for kind in ("elu1", "exp"):
        for causal in (False, True):
            (out, _), saved = engine.forward(
                *given, feature_map=FeatureMap(kind, w, scale=0.5), causal=causal,
                q_lengths=[33, 4], kv_lengths=[40, 47], return_state=True)
            grads = saved.backward(out)
            assert all(type(x) is type(out) for x in grads)
            moved = saved.to(np)
            same(moved.backward(np.asarray(out)), [np.asarray(x) for x in grads])


def test_torch_arrays():
    torch = pytest.importorskip("torch")
    given = [torch.tensor(x) for x in draw(SHAPES[1])]
    out, saved = pyattn.linear_attention.forward(*given, causal=True)
    want = pyattn.linear_attention(*draw(SHAPES[1]), causal=True)
    np.testing.assert_allclose(out.numpy(), want, rtol=1e-10)
    assert saved.backward(out).k.shape == given[1].shape


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"feature_map": "elu"}, OptionError, "feature_map must be one of 'elu1'"),
    ({"feature_map": "softmax"}, OptionError, "no product of features"),
    ({"mask": np.ones((3, 3), bool)}, OptionError, "takes no mask"),
    ({"causal": "bottom"}, OptionError, "causal must be one of"),
    ({"order": "vk"}, OptionError, "order must be one of"),
    ({"chunk": 0}, OptionError, "chunk must be at least 1"),
    ({"epsilon": -1.0}, OptionError, "epsilon must be at least 0"),
    ({"epsilon": 1.0, "normalize": False}, OptionError, "joins the denominators"),
    ({"feature_map": FeatureMap("exp"), "normalize": False}, OptionError, "kind 'exp'"),
    ({"feature_map": FeatureMap("exp"), "epsilon": 1e-6}, OptionError, "kind 'exp'"),
    ({"feature_map": FeatureMap("elu1", np.ones((4, 3)))}, ShapeError, "projection must be"),
    ({"state": np.ones((1, 4, 4))}, ShapeError, r"state must be \(1, 4, 5\)"),
    ({"state": (np.ones((1, 4, 5)), np.ones(1))}, DtypeError, "state must be an array"),
    ({"state": np.ones((1, 4, 5)), "feature_map": FeatureMap("exp")}, DtypeError, "log_scale"),
    ({"kv_lengths": 9}, ShapeError, "kv_lengths"),
])
def test_what_does_not_fit_is_refused(options, error, message):
    x = np.ones((1, 3, 4))
    with pytest.raises(error, match=message):
        pyattn.linear_attention(x, x, x, **options)


def test_maps_that_do_not_fit_are_refused():
    for arguments, error in (
            (("cosine",), OptionError), (("elu1", np.ones(3)), ShapeError),
            (("elu1", np.ones((2, 3), int)), DtypeError),
            (("elu1", None, 1.0, 0.1), OptionError), (("relu", None, 1.0, -0.1), OptionError)):
        with pytest.raises(error):
            FeatureMap(*arguments)


def test_gradients_that_do_not_fit_are_refused():
    x = np.ones((1, 3, 4))
    (out, state), saved = pyattn.linear_attention.forward(x, x, x, return_state=True)
    with pytest.raises(ShapeError, match="dout must have the shape"):
        saved.backward(out[:, :2])
    with pytest.raises(DtypeError, match="dout must have the dtype"):
        saved.backward(out.astype(np.float32))
    with pytest.raises(ShapeError, match="dstate must have the shape"):
        saved.backward(out, state[..., :2])


def test_the_cpu_says_what_it_leaves_to_others():
    x = np.ones((1, 70, 4))
    explained = str(pyattn.explain(pyattn.linear_attention, x, x, x, chunk=100, order="kv"))
    assert "array_api" in explained
    assert "chunks of 100 tokens" in explained
    with pyattn.use_backend("cpu"), pytest.raises(BackendError, match="order 'qk'"):
        pyattn.linear_attention(x, x, x, order="qk")


@pytest.mark.parametrize("nbytes", WIDTHS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_micro_kernels_of_features(dtype, nbytes):
    rng = np.random.default_rng(0)
    unit, lanes, size = dtype(1), nbytes // np.dtype(dtype).itemsize, np.dtype(dtype).itemsize
    columns = max(lanes, 32)
    start = rng.standard_normal((5, 64)).astype(dtype) * 3
    start[1, 3], start[2, 4], start[3, :] = np.nan, np.inf, 0
    tolerance = 8 * np.finfo(dtype).eps
    elu, relu, exponential = 1, 2, 3

    def run(name, *arguments):
        micro_kernel(name, nbytes)(*arguments, unit)

    def close(found, want, untouched):
        with np.errstate(all="ignore"):
            np.testing.assert_allclose(found[:, :columns], want[:, :columns], rtol=tolerance,
                                       atol=tolerance)
        np.testing.assert_array_equal(found[:, columns:], untouched[:, columns:])

    dphi, wide = rng.standard_normal((5, 64)).astype(dtype), start.astype(np.float64)
    with np.errstate(all="ignore"):
        phi = {elu: np.where(wide > 0, wide + 1, np.exp(np.minimum(wide, 0))),
               relu: np.maximum(wide, 0) + 0.5}
        slope = {elu: np.where(wide > 0, 1, np.exp(np.minimum(wide, 0))), relu: wide > 0}
    for kind in (elu, relu):
        found, pulled = start.copy(), dphi.copy()
        run("map_features", at(found), 5, columns, kind, dtype(0.5))
        close(found, phi[kind], start)
        run("pull_features", at(pulled), at(found), 5, columns, kind, dtype(0.5))
        there = np.isfinite(wide)
        close(np.where(there, pulled, 0), np.where(there, dphi * slope[kind], 0),
              np.where(there, dphi, 0))
    clean = np.nan_to_num(start, posinf=2.0)
    found, tops, pulled = clean.copy(), np.zeros(64, dtype), dphi.copy()
    run("exp_columns", at(found), 5, columns, at(tops))
    close(found, np.exp(clean - clean.max(axis=0)), clean)
    np.testing.assert_array_equal(tops[:columns], clean.max(axis=0)[:columns])
    run("pull_features", at(pulled), at(found), 5, columns, exponential, dtype(0))
    close(pulled, dphi * found, dphi)

    bases, factors = (rng.standard_normal(64).astype(dtype) for _ in range(2))
    found = clean.copy()
    run("decay_pairs", at(found), 5, columns, at(tops), at(bases))
    close(found, clean * np.exp(np.minimum(tops - bases[:5, None], 0)), clean)
    found = clean.copy()
    run("scale_columns", at(found), 5, columns, at(factors))
    close(found, clean * factors, clean)
    assert size * lanes == nbytes
