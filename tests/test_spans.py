"""Adaptive and dynamic spans against the rule spelled out pair by pair."""

from __future__ import annotations

import array_api_strict
import ml_dtypes
import numpy as np
import oracle
import pytest
from table import Shape, positions

import pyattn
from pyattn import arrays, masks
from pyattn.checks import DtypeError, OptionError, ShapeError
from pyattn.features import dynamic_spans, span_loss
from pyattn.testing import gradcheck

BACKENDS = ["cpu", "array_api"]
SHAPES = [Shape((2,), 4, 2, 67, 67, 16, 16), Shape((2,), 2, 1, 70, 133, 5, 7),
          Shape((1,), 3, 3, 133, 70, 8, 8), Shape((), 2, 1, 1, 1, 4, 4),
          Shape((2, 2), 2, 2, 20, 20, 4, 6)]
RAMP = 7.5


def operands(s, dtype):
    rng = np.random.default_rng([s.n, s.m])
    return tuple(rng.standard_normal((*s.batch, h, n, w)).astype(dtype) for h, n, w in (
        (s.heads, s.n, s.d), (s.groups, s.m, s.d), (s.groups, s.m, s.e)))


def ramp_of(span, i, j, *, include_self, ramp=RAMP):
    """The gate of every pair and its slope, by the paper: x = i - j, or i - j - 1."""
    x = i - j - (0 if include_self else 1)
    bare = (ramp + span - x) / ramp
    return np.clip(bare, 0, 1), np.where((0 < bare) & (bare < 1), 1 / ramp, 0)


def judge(variant, span, s, dtype, backend, *, include_self=True, allowed=True, **options):
    qkv = operands(s, dtype)
    with pyattn.use_backend(backend):
        (out, lse), saved = variant.forward(*qkv, span, ramp=RAMP, include_self=include_self,
                                            return_lse=True, **options)
        rng = np.random.default_rng(1)
        dout = rng.standard_normal(out.shape).astype(dtype)
        dlse = rng.standard_normal(lse.shape).astype(lse.dtype)
        grads = saved.backward(dout, dlse)
    alignment = "top_left" if options.get("causal") == "top_left" else "bottom_right"
    i, j, inside = positions(s, alignment, options.get("q_lengths"), options.get("kv_lengths"))
    wide = span.astype(np.float64)
    whole = wide[:, None] if variant is pyattn.adaptive_span_attention else wide
    whole = np.broadcast_to(whole, (*s.batch, s.heads, s.n))
    gate, slope = ramp_of(whole[..., None], i, j, include_self=include_self)
    seen = inside & ((j <= i) if include_self else (j < i)) & allowed
    problem = oracle.Dense(*qkv, np.full(s.heads, s.d ** -0.5), seen, gate=gate,
                           softcap=options.get("softcap"))
    found = []
    for r in (oracle.exact(dtype), oracle.plain(dtype)):
        want = oracle.backward(problem, dout, dlse, r)
        by_query = (want.pop("gate") * slope).sum(-1)
        if variant is pyattn.adaptive_span_attention:
            by_query = by_query.sum((*range(len(s.batch)), -1))
        want["span"] = oracle.sum_to(by_query, span.shape)
        found.append({"out": oracle.forward(problem, r)[0], "lse": oracle.forward(problem, r)[1],
                      **want})
    exact, rough = found
    for name, x in {"out": out, "lse": lse, **grads._asdict()}.items():
        if dtype == np.float64:
            np.testing.assert_allclose(x, exact[name].astype(dtype), rtol=1e-11, atol=1e-11,
                                       err_msg=name)
        else:
            oracle.assert_close(x, exact[name], rough[name], factor=2 if name in "out lse" else 3,
                                name=name)
    return saved


def spans(s, dynamic, dtype=np.float64, *, alike=False):
    rng = np.random.default_rng(3)
    shape = (*s.batch, 1 if alike else s.heads, s.n) if dynamic else (1 if alike else s.heads,)
    return rng.uniform(0, 50, shape).astype(dtype)


VARIANTS = [pytest.param(pyattn.adaptive_span_attention, False, id="adaptive"),
            pytest.param(pyattn.dynamic_span_attention, True, id="dynamic")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize(("variant", "dynamic"), VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_rule(shape, variant, dynamic, include_self, backend):
    judge(variant, spans(shape, dynamic), shape, np.float64, backend, include_self=include_self)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("variant", "dynamic"), VARIANTS)
def test_one_span_for_all_heads(variant, dynamic, backend):
    judge(variant, spans(SHAPES[0], dynamic, alike=True), SHAPES[0], np.float64, backend)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16],
                         ids=lambda x: np.dtype(x).name)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("variant", "dynamic"), VARIANTS)
def test_other_dtypes(variant, dynamic, backend, dtype):
    judge(variant, spans(SHAPES[0], dynamic, np.float32), SHAPES[0], dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, "top_left"])
@pytest.mark.parametrize(("variant", "dynamic"), VARIANTS)
def test_lengths_masks_and_softcap(variant, dynamic, causal, backend):
    s = SHAPES[1]
    lengths = {"q_lengths": np.array([70, 31]), "kv_lengths": np.array([90, 133])}
    mask = np.random.default_rng(0).random((s.n, s.m)) < 0.7
    judge(variant, spans(s, dynamic), s, np.float64, backend, causal=causal, softcap=2.0,
          mask=mask, allowed=mask, **lengths)


@pytest.mark.parametrize(("variant", "dynamic"), VARIANTS)
def test_packed_sequences(variant, dynamic):
    s = Shape((), 2, 1, 100, 100, 8, 8)
    span = spans(s, dynamic)
    q, k, v = operands(s, np.float64)
    packed = variant(q, k, v, span, ramp=RAMP, segments=[30, 70])
    for part in (slice(0, 30), slice(30, 100)):
        alone = variant(*(x[..., part, :] for x in (q, k, v)),
                        span[..., part] if dynamic else span, ramp=RAMP)
        np.testing.assert_allclose(packed[..., part, :], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("variant", "dynamic"), VARIANTS)
def test_finite_differences(variant, dynamic, backend):
    s = Shape((2,), 2, 1, 9, 9, 4, 3)
    with pyattn.use_backend(backend):
        gradcheck(variant, *operands(s, np.float64), spans(s, dynamic) / 10 + 0.123, ramp=3.0)
        gradcheck(variant, *operands(s, np.float64), spans(s, dynamic) / 10 + 0.123, ramp=3.0,
                  include_self=False, return_lse=True)


@pytest.mark.parametrize(("variant", "dynamic"), VARIANTS)
def test_finite_differences_of_options(variant, dynamic):
    s, rng = Shape((2,), 2, 1, 9, 9, 4, 3), np.random.default_rng(0)
    gradcheck(variant, *operands(s, np.float64), spans(s, dynamic) / 10 + 0.123, ramp=3.0,
              bias=rng.standard_normal((2, 9, 9)), sinks=rng.standard_normal(2),
              alibi_slopes=rng.random(2), scale=rng.random(2), dropout=0.2, rng=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("variant", "dynamic"), VARIANTS)
def test_a_span_over_all_is_causal_attention(variant, dynamic, backend):
    s = SHAPES[0]
    qkv, span = operands(s, np.float64), np.full((s.heads, s.n) if dynamic else s.heads, 67.0)
    with pyattn.use_backend(backend):
        out, saved = variant.forward(*qkv, span)
        grads = saved.backward(out)
        wanted, dense = pyattn.attention.forward(*qkv, causal=True)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-12)
    for name, x in dense.backward(wanted)._asdict().items():
        np.testing.assert_allclose(getattr(grads, name), x, rtol=0, atol=1e-11)
    assert (grads.span == 0).all()


def test_a_span_of_0_keeps_soft_keys_alone():
    n, ramp = 100, 8
    q, k = np.zeros((2, 1, n, 4))
    weights = pyattn.adaptive_span_attention.forward(
        q, k, k, np.zeros(1), ramp=ramp, return_weights=True)[0][1]
    # the own key, and ramp - 1 others whose gate is neither 0 nor 1
    assert (np.count_nonzero(weights[0, ramp:], axis=-1) == ramp).all()
    last = weights[0, -1, -ramp:]
    np.testing.assert_allclose(last / last[-1], np.arange(1, ramp + 1) / ramp, atol=1e-12)


def test_the_middle_of_the_ramp_has_half_the_weight():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 60, 8))
    (_, lse, weights), _ = pyattn.adaptive_span_attention.forward(
        q, k, v, np.array([6.0]), ramp=8, return_lse=True, return_weights=True)
    i, j = 50, 40                       # distance 10 = span + ramp / 2
    score = q[0, i] @ k[0, j] / np.sqrt(8)
    np.testing.assert_allclose(weights[0, i, j], 0.5 * np.exp(score - lse[0, i]), rtol=1e-12)


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize(("variant", "dynamic"), VARIANTS)
def test_tiles_follow_the_span(variant, dynamic, include_self):
    n, x = 2048, np.zeros((2, 2048, 4), np.float32)
    found = []
    for far in (0, 500, 2000):
        span = np.array([0.0, far])
        span = np.repeat(span[:, None], n, 1) if dynamic else span
        saved = variant.forward(x, x, x, span, ramp=16, include_self=include_self)[1]
        found.append(saved.stats["tiles"])
        # a head with span z reaches z + ramp - 1 keys back
        back = np.array([0, far]) + 15 + (not include_self)
        if not dynamic:
            pairs = sum(min(i, b) + 1 - (not include_self) for b in back for i in range(n))
            assert saved.stats["pairs"] == pairs
    rows = n // 64
    assert found[0] == 2 * (2 * rows - 1)
    assert found[0] < found[1] < found[2] <= rows * (rows + 1) // 2 + 2 * rows


def test_tiles_of_a_dynamic_span_grow_with_the_tokens_not_their_square():
    found = []
    for n in (1024, 2048, 4096):
        x = np.zeros((1, n, 4), np.float32)
        span = np.random.default_rng(0).uniform(0, 100, (1, n))
        found.append(pyattn.dynamic_span_attention.forward(x, x, x, span)[1].stats["tiles"])
    assert found[2] < 2.1 * found[1] < 4.4 * found[0]


def test_one_far_token_costs_its_own_row_of_tiles():
    x, span = np.zeros((1, 1024, 4), np.float32), np.zeros((1, 1024))
    near = pyattn.dynamic_span_attention.forward(x, x, x, span)[1].stats["tiles"]
    span[0, 1000] = 1024
    far = pyattn.dynamic_span_attention.forward(x, x, x, span)[1].stats["tiles"]
    assert far - near == 16 - 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("variant", "dynamic"), VARIANTS)
def test_what_comes_later_changes_nothing(variant, dynamic, backend):
    s, rng = Shape((), 2, 2, 80, 80, 8, 8), np.random.default_rng(0)
    qkv, span = operands(s, np.float64), spans(s, dynamic)
    with pyattn.use_backend(backend):
        before = variant(*qkv, span, ramp=RAMP)
        for x in (*qkv, *([span] if dynamic else [])):
            x[..., 50:, :] = rng.standard_normal(x[..., 50:, :].shape) if x.ndim > 2 else x[
                ..., 50:, :]
        if dynamic:
            span[:, 50:] = rng.uniform(0, 80, (2, 30))
        after, saved = variant.forward(*qkv, span, ramp=RAMP)
        dout = np.zeros_like(after)
        dout[:, :50] = 1
        grads = saved.backward(dout)
    assert (before[:, :50] == after[:, :50]).all()
    for x in (grads.q, grads.k, grads.v):
        assert (x[:, 50:] == 0).all()
    if dynamic:
        assert (grads.span[:, 50:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_padding_holds_is_never_looked_at(backend):
    s = Shape((2,), 2, 1, 70, 70, 8, 8)
    qkv, span = operands(s, np.float32), spans(s, True, np.float32)
    lengths = np.array([70, 33])
    given = {"q_lengths": lengths, "kv_lengths": lengths, "ramp": RAMP}
    with pyattn.use_backend(backend):
        out, saved = pyattn.dynamic_span_attention.forward(*qkv, span, **given)
        grads = saved.backward(np.ones_like(out))
        for x in qkv:
            x[1, :, 33:] = np.nan
        span[1, :, 33:] = np.nan
        again, saved = pyattn.dynamic_span_attention.forward(*qkv, span, **given)
        dout = np.ones_like(out)
        dout[1, :, 33:] = np.nan
        poisoned = saved.backward(dout)
    for x, y in zip((out, *grads), (again, *poisoned), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=0 if backend == "cpu" else 1e-5)


def test_batch_items_are_independent():
    s = Shape((3,), 2, 1, 70, 70, 8, 8)
    qkv, span = operands(s, np.float64), spans(s, True)
    out = pyattn.dynamic_span_attention(*qkv, span, ramp=RAMP)
    for b in range(3):
        alone = pyattn.dynamic_span_attention(*(x[b] for x in qkv), span[b], ramp=RAMP)
        np.testing.assert_allclose(out[b], alone, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("variant", "dynamic"), VARIANTS)
@pytest.mark.parametrize("n", [0, 1])
def test_few_tokens_and_empty_batches(variant, dynamic, n):
    for batch in ((), (0,)):
        q = np.ones((*batch, 2, n, 4))
        span = np.ones((2, n) if dynamic else 2)
        out, saved = variant.forward(q, q, q, span)
        assert out.shape == q.shape
        assert (out == 1).all()
        assert saved.backward(out).span.shape == span.shape


@pytest.mark.parametrize(("variant", "dynamic"), VARIANTS)
def test_arrays_of_other_libraries(variant, dynamic):
    s = Shape((2,), 2, 1, 70, 70, 8, 8)
    given = (*operands(s, np.float64), spans(s, dynamic))
    found = []
    for xp in (np, array_api_strict):
        out, saved = variant.forward(*map(xp.asarray, given), ramp=RAMP)
        grads = saved.backward(xp.asarray(np.ones(out.shape)))
        assert all(type(x) is type(out) for x in grads)
        found.append([arrays.to_host(x) for x in (out, *grads)])
    for x, y in zip(*found, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("variant", "dynamic"), VARIANTS)
def test_a_backward_on_another_backend(variant, dynamic):
    s = SHAPES[0]
    out, saved = variant.forward(*operands(s, np.float64), spans(s, dynamic), ramp=RAMP)
    found = []
    for backend in BACKENDS:
        with pyattn.use_backend(backend):
            found.append(saved.backward(out))
    for x, y in zip(*found, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-11)


X = np.ones((2, 8, 4))


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda f, z: f(X, X, X, z - 1), OptionError, "span must be at least 0"),
    (lambda f, z: f(X, X, X, z + 9, max_span=8), OptionError, r"span must lie in 0\.\.8"),
    (lambda f, z: f(X, X, X, z, ramp=0), OptionError, "ramp must be positive"),
    (lambda f, z: f(X, X, X, z, causal=False), OptionError, "causal must be one of"),
    (lambda f, z: f(X, X, X, z, gate=X), OptionError, "gate cannot be given here"),
    (lambda f, z: f(X, X, X, z, window=3), OptionError, "window cannot be given here"),
    (lambda f, z: f(X, X, X, z, offsets=X), TypeError, "offsets"),
    (lambda f, z: f(X, X, X, np.zeros(3)), ShapeError, "span must broadcast"),
    (lambda f, z: f(X, X, X, z.astype(int)), DtypeError, "span must be one of"),
    (lambda f, z: f(X, X, X, 3.0), DtypeError, "span must be an array"),
])
@pytest.mark.parametrize(("variant", "dynamic"), VARIANTS)
def test_what_does_not_fit_is_refused(variant, dynamic, call, error, words):
    with pytest.raises(error, match=words):
        call(variant, np.zeros((2, 8) if dynamic else 2))


def test_spans_of_tokens():
    rng = np.random.default_rng(0)
    x, w, b = rng.standard_normal((2, 5, 4)), rng.standard_normal((4, 3)), rng.standard_normal(3)
    span, _ = dynamic_spans.forward(x, w, b, max_span=20)
    for batch, head, t in np.ndindex(2, 3, 5):
        wanted = 20 / (1 + np.exp(-(x[batch, t] @ w[:, head] + b[head])))
        assert abs(span[batch, head, t] - wanted) < 1e-12
    gradcheck(dynamic_spans, x, w, b, max_span=20.0)
    half = dynamic_spans.forward(x.astype(np.float16), w.astype(np.float32), b.astype(np.float32),
                                 max_span=20)
    assert half[0].dtype == np.float32
    assert [g.dtype for g in half[1].backward(half[0])] == [np.float16, np.float32, np.float32]
    with pytest.raises(ShapeError, match="w"):
        dynamic_spans(x, w.T, b, max_span=20)
    with pytest.raises(OptionError, match="max_span"):
        dynamic_spans(x, w, b, max_span=-1)


def test_the_loss_of_spans():
    span = np.random.default_rng(0).random((3, 4))
    loss, saved = span_loss.forward(span, coefficient=0.5)
    np.testing.assert_allclose(loss, 0.5 * span.mean())
    np.testing.assert_allclose(saved.backward().span, 0.5 / 12)
    np.testing.assert_allclose(saved.backward(2.0).span, 1 / 12)


def test_spans_learn_how_far_to_look():
    """Every token is to find the mark 12 tokens back: a span starts at 2 and grows to reach it."""
    n, far = 120, 12
    rng = np.random.default_rng(0)
    values = rng.standard_normal((1, n, 4))
    wanted = np.roll(values, far, axis=1)
    angle = np.arange(n) * 0.4
    place = np.stack([np.cos(angle), np.sin(angle)], -1)[None] * 4
    key = np.stack([np.cos(angle + 0.4 * far), np.sin(angle + 0.4 * far)], -1)[None] * 4
    span = np.array([2.0])
    for _ in range(150):
        out, saved = pyattn.adaptive_span_attention.forward(place, key, values, span, ramp=12)
        error = np.where(np.arange(n)[:, None] >= far, out - wanted, 0)
        span = np.clip(span - 0.2 * saved.backward(error).span, 0, 40)
    # the gate at this distance was 1/6
    assert (12 + span[0] - far) / 12 > 0.7


def test_masks_of_distances():
    table = np.random.default_rng(0).random((3, 90)) < 0.4
    mask = masks.distances(table)
    i, j = np.arange(130)[:, None], np.arange(200)
    d = abs(i + 70 - j)
    wanted = np.where(d < 90, table[:, np.minimum(d, 89)], False)
    assert (mask.dense(130, 200) == wanted).all()
    q, k = np.zeros((3, 130, 4)), np.zeros((3, 200, 4))
    seen = pyattn.attention.forward(q, k, k, mask=mask, return_weights=True)[0][1] > 0
    assert (seen == wanted).all()
    for only in (0, 1, 63, 64, 127, 128):
        alone = masks.distances(np.arange(only + 1) == only)
        assert alone.compile(256, 256).count().pairs == (256 - only) * (2 if only else 1)
    assert masks.distances(np.zeros(5, bool)).compile(640, 640).tiles.empty == 100
    band = masks.distances(np.ones(65, bool)).compile(640, 640).tiles
    assert (band.full, band.partial, band.empty) == (10, 18, 72)
