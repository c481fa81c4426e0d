"""Dynamic, lightweight and constant convolutions over tokens: formulas, limits, kernels, layers."""

from __future__ import annotations

import dataclasses
import math

import array_api_strict
import ml_dtypes
import numpy as np
import oracle
import pytest
from test_micro_kernels import WIDTHS, at, micro_kernel

import pyattn
from pyattn import layers
from pyattn.checks import DtypeError, OptionError, ShapeError
from pyattn.testing import gradcheck

BACKENDS = ["cpu", "array_api"]
DTYPES = [np.float64, np.float32, ml_dtypes.bfloat16, np.float16]


def draw(*shape, dtype=np.float64, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Size:
    b: int
    n: int
    c: int
    heads: int
    taps: int

    def __str__(self):
        return f"b{self.b}n{self.n}c{self.c}h{self.heads}k{self.taps}"


SIZES = [Size(1, 1, 1, 1, 1), Size(2, 37, 12, 3, 5), Size(1, 200, 34, 2, 31), Size(2, 9, 8, 8, 4),
         Size(1, 131, 6, 2, 64), Size(1, 140, 20, 1, 130), Size(2, 3, 4, 2, 9)]
EMPTY = [Size(2, 0, 4, 2, 3), Size(0, 5, 4, 2, 3)]


# the formulas, position by position and tap by tap


def gathered(x, taps, pad, lengths):
    """Tokens of the taps (B, N, K, C), zeros where there are none, and whether there are."""
    b, n = x.shape[:2]
    token = np.arange(n)[:, None] + np.arange(taps) - pad
    there = (token >= 0) & (token < lengths[:, None, None])
    found = x[np.arange(b)[:, None, None], np.clip(token, 0, max(n - 1, 0))]
    return np.where(there[..., None], found, 0), there, token


def weigh(logits, there, inside, pad, r, renorm=False, span=None, ramp=1.0):
    taps = logits.shape[-1]
    allowed = np.broadcast_to(inside[:, :, None, None], logits.shape)
    if renorm:
        allowed = allowed & there[:, :, None, :]
    gate = np.ones(logits.shape)
    if span is not None:
        gate = np.clip((ramp + r(span)[..., None] - abs(np.arange(taps) - pad)) / ramp, 0, 1)
        allowed = allowed & (gate != 0)
    with np.errstate(all="ignore"):
        s = np.where(allowed, r(logits), -np.inf)
        top = s.max(axis=-1, keepdims=True, initial=-np.inf)
        e = np.where(allowed, r(gate * np.exp(s - np.where(top == -np.inf, 0, top))), 0)
        total = e.sum(axis=-1, keepdims=True)
        return r(e / np.where(total == 0, 1, total)), gate


def rule(x, logits, dout, r, *, causal=False, lengths=None, factor=None, **options):
    """Output and gradients."""
    b, n, c = x.shape
    heads, taps = logits.shape[2:]
    pad = taps - 1 if causal else taps // 2
    lengths = np.full(b, n) if lengths is None else np.asarray(lengths)
    inside = np.arange(n) < lengths[:, None]
    near, there, token = gathered(r(x), taps, pad, lengths)
    near = near.reshape(b, n, taps, heads, c // heads)
    p, gate = weigh(logits, there, inside, pad, r, **options)
    used = p if factor is None else r(p * factor)
    out = r(np.einsum("bthk,btkhr->bthr", used, near)).reshape(x.shape)
    dy = np.where(inside[..., None], r(dout), 0).reshape(b, n, heads, c // heads)
    dp = r(np.einsum("bthr,btkhr->bthk", dy, near))
    dp = dp if factor is None else r(dp * factor)
    dlogits = r(p * (dp - (p * dp).sum(-1, keepdims=True)))
    each = r(np.einsum("bthk,bthr->btkhr", used, dy)).reshape(b, n, taps, c)
    dx = np.zeros(x.shape, each.dtype)
    for i, t, k in zip(*np.nonzero(there), strict=True):
        dx[i, token[t, k]] += each[i, t, k]
    grads = {"x": dx, "kernel_logits": dlogits}
    if options.get("span") is not None:
        soft = (gate > 0) & (gate < 1)
        grads["span"] = (np.where(soft, dlogits / np.where(soft, gate, 1), 0)
                         / options["ramp"]).sum(-1)
    return out, grads


def options_of(kind, s):
    rng = np.random.default_rng([3, s.n])
    return {"plain": {}, "causal": {"causal": True}, "renorm": {"renorm_padding": True},
            "renorm_causal": {"renorm_padding": True, "causal": True},
            "lengths": {"lengths": rng.integers(0, s.n + 1, s.b), "renorm_padding": True},
            "span": {"span": rng.random((s.b, s.n, s.heads)) * s.taps / 2, "ramp": 2.3,
                     "causal": True}}[kind]


def judge(s, dtype, backend, options, factor=3, **call):
    x, logits = draw(s.b, s.n, s.c, dtype=dtype), draw(s.b, s.n, s.heads, s.taps, dtype=dtype,
                                                       seed=1)
    dout = draw(s.b, s.n, s.c, dtype=dtype, seed=2)
    with pyattn.use_backend(backend):
        out, saved = pyattn.dynamic_convolution.forward(x, logits, **options, **call)
        grads = saved.backward(dout)._asdict()
    own = {name: value for name, value in options.items() if name != "renorm_padding"}
    own["renorm"] = options.get("renorm_padding", False)
    if call:
        own["factor"] = factors(s, saved)
    exact, rough = (rule(x, logits, dout, r, **own)
                    for r in (oracle.exact(dtype), oracle.plain(dtype)))
    oracle.assert_close(out, exact[0], rough[0], factor=2, name="out", dtype=dtype)
    for name, x in grads.items():
        kept = dtype
        if name == "span":
            # a float64 span beside tokens of fewer digits: its gradient has no more than acc
            assert x.dtype == np.float64
            kept = np.float64 if dtype == np.float64 else np.float32
            x = x.astype(kept)
        oracle.assert_close(x, exact[1][name], rough[1][name], factor=factor, name=name,
                            dtype=kept)
    return saved


def factors(s, saved):
    """What dropout multiplies by, by Philox as NumPy's own generator has it, word by word."""
    from pyattn.kernels.array_api.philox import philox

    seed = int(saved.decisions["dropout_seed"])
    b, t, h, k = np.ix_(*map(np.arange, (s.b, s.n, s.heads, s.taps)))
    words = np.stack(philox((k // 4, t, h, b), seed))
    lane = np.broadcast_to(k % 4, words.shape[1:])
    word = np.take_along_axis(words, lane[None], 0)[0]
    return (word >= np.uint32(0.3 * 2**32)) / 0.7


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: np.dtype(x).name)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["plain", "causal", "renorm", "renorm_causal", "lengths", "span"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_the_rule(size, kind, backend, dtype):
    judge(size, dtype, backend, options_of(kind, size))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES[1:4], ids=str)
def test_dropout(size, backend):
    saved = judge(size, np.float64, backend, {"causal": True}, dropout=0.3, rng=5)
    again = pyattn.dynamic_convolution.forward(saved.x, saved.logits, causal=True, dropout=0.3,
                                               decisions=saved.decisions)
    assert np.array_equal(again[0], pyattn.dynamic_convolution(
        saved.x, saved.logits, causal=True, dropout=0.3, rng=5))
    assert again[1].decisions == saved.decisions


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", EMPTY, ids=str)
def test_nothing_at_all(size, backend):
    judge(size, np.float32, backend, {"causal": True})
    x, w = draw(size.b, size.n, size.c), draw(3, size.c)
    with pyattn.use_backend(backend):
        y, saved = layers.conv1d.forward(x, w)
        assert y.shape == x.shape
        assert not saved.backward(y).w.any()


def test_backends_give_back_each_other_s_records():
    s = SIZES[2]
    x, logits, dout = draw(s.b, s.n, s.c), draw(s.b, s.n, s.heads, s.taps), draw(s.b, s.n, s.c)
    with pyattn.use_backend("cpu"):
        _, saved = pyattn.dynamic_convolution.forward(x, logits, causal=True)
        ours = saved.backward(dout)
    with pyattn.use_backend("array_api"):
        for a, b in zip(saved.backward(dout), ours, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_do_not_depend_on_threads(threads):
    x, logits = draw(2, 700, 24, dtype="f4"), draw(2, 700, 3, 11, dtype="f4")
    w, before = draw(9, 24, dtype="f4"), pyattn.get_num_threads()

    def all_of_it():
        out, saved = pyattn.dynamic_convolution.forward(x, logits, dropout=0.2, rng=0)
        y, other = layers.conv1d.forward(x, w)
        return [out, *saved.backward(x), y, *other.backward(x)]

    try:
        pyattn.set_num_threads(1)
        wanted = all_of_it()
        pyattn.set_num_threads(threads)
        assert all(map(np.array_equal, all_of_it(), wanted))
    finally:
        pyattn.set_num_threads(before)


@pytest.mark.parametrize("library", ["array_api_strict", "torch"])
def test_other_libraries(library):
    xp = array_api_strict if library == "array_api_strict" else pytest.importorskip(library)
    given = draw(2, 9, 4), draw(2, 9, 2, 3), draw(2)
    for name, call in {
        "dynamic_convolution": lambda f, x, logits, span: f(
            x, logits, span=span, ramp=2.0, dropout=0.3, rng=0, lengths=[5, 9]),
        "lightweight_convolution": lambda f, x, logits, span: f(
            x, logits[0, 0, :, :], causal=True, dropout=0.3, rng=0),
        "conv1d": lambda f, x, logits, span: f(x, logits[0, :4, 0, :].T),
    }.items():
        f = getattr(layers if name == "conv1d" else pyattn, name).forward
        with pyattn.use_backend("array_api"):
            wanted, saved = call(f, *given)
            found, other = call(f, *(xp.asarray(x.copy()) for x in given))
            np.testing.assert_allclose(np.asarray(found), wanted, atol=1e-13)
            for a, b in zip(other.backward(found), saved.backward(wanted), strict=True):
                assert type(a) is type(found)
                np.testing.assert_allclose(np.asarray(a), b, atol=1e-12)


def test_leading_axes_broadcast_and_strides_are_read():
    x, logits = draw(2, 3, 20, 8), draw(3, 20, 2, 5)
    out, saved = pyattn.dynamic_convolution.forward(x, logits, causal=True)
    grads = saved.backward(x)
    wide = np.broadcast_to(logits, (2, *logits.shape))
    flat, other = pyattn.dynamic_convolution.forward(x.reshape(6, 20, 8), wide.reshape(6, 20, 2, 5),
                                                     causal=True)
    np.testing.assert_array_equal(out, flat.reshape(out.shape))
    assert grads.kernel_logits.shape == logits.shape
    np.testing.assert_allclose(
        grads.kernel_logits,
        other.backward(x.reshape(6, 20, 8)).kernel_logits.reshape(wide.shape).sum(0), atol=1e-13)
    turned = np.asfortranarray(x[0]), np.swapaxes(np.swapaxes(logits, 1, 2).copy(), 1, 2)
    np.testing.assert_array_equal(pyattn.dynamic_convolution(*turned, causal=True), out[0])
    both = draw(20, 8), draw(20, 2, 5)
    for x in both:
        x.flags.writeable = False
    assert pyattn.dynamic_convolution(*both).shape == (20, 8)


# what the papers promise


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_equal_tokens_stay_as_they_are_away_from_the_ends(backend, causal):
    x = np.broadcast_to(draw(6), (30, 6))
    with pyattn.use_backend(backend):
        out = pyattn.dynamic_convolution(x, draw(30, 2, 5), causal=causal)
        inside = slice(4, 30) if causal else slice(2, 28)
        np.testing.assert_allclose(out[inside], x[inside], atol=1e-14)
        assert abs(out[0] - x[0]).max() > 1e-3
        whole = pyattn.dynamic_convolution(x, draw(30, 2, 5), causal=causal, renorm_padding=True)
        np.testing.assert_allclose(whole, x, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shifting_both_shifts_the_output(backend):
    x, logits = draw(40, 6), draw(40, 2, 5)
    with pyattn.use_backend(backend):
        out = pyattn.dynamic_convolution(x, logits)
        moved = pyattn.dynamic_convolution(np.roll(x, 7, 0), np.roll(logits, 7, 0))
    np.testing.assert_allclose(moved[9:38], out[2:31], atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [1.0, np.nan, np.inf])
def test_causal_kernels_do_not_see_what_follows(backend, value):
    x, logits = draw(90, 6), draw(90, 2, 7)
    changed, dout = x.copy(), np.zeros((90, 6))
    changed[40] = value
    dout[:40] = draw(40, 6)
    with pyattn.use_backend(backend):
        out = pyattn.dynamic_convolution(x, logits, causal=True)
        after, saved = pyattn.dynamic_convolution.forward(changed, logits, causal=True)
        grads = saved.backward(dout)
    np.testing.assert_array_equal(after[:40], out[:40])
    np.testing.assert_array_equal(after[47:], out[47:])
    assert (after[40:47] != out[40:47]).all()
    assert not grads.x[40:].any()
    assert np.isfinite(grads.kernel_logits[:40]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_tap_is_the_identity(backend):
    x = draw(50, 6)
    with pyattn.use_backend(backend):
        np.testing.assert_array_equal(pyattn.dynamic_convolution(x, draw(50, 3, 1)), x)
        np.testing.assert_array_equal(pyattn.lightweight_convolution(x, draw(3, 1)), x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_says_nothing_whatever_it_holds(backend):
    x, logits, dout = draw(2, 70, 6), draw(2, 70, 2, 5), draw(2, 70, 6)
    lengths = np.array([0, 66])
    poisoned = [a.copy() for a in (x, logits, dout)]
    for a in poisoned:
        a[0], a[1, 66:] = np.nan, np.inf
    for f, more in ((pyattn.dynamic_convolution, ()), (layers.conv1d, (draw(4, 6),)),
                    (layers.conv1d, (draw(4, 6, 3), draw(3)))):
        with pyattn.use_backend(backend):
            clean, dirty = [], []
            for found, (a, b, d) in ((clean, (x, logits, dout)), (dirty, poisoned)):
                out, saved = f.forward(a, *(more or (b,)), lengths=lengths)
                found += [out, *saved.backward(d[..., :out.shape[-1]])]
        for a, b in zip(dirty, clean, strict=True):
            np.testing.assert_array_equal(a, b)
        assert not clean[0][1, 66:].any()
        short = f(x[1:, :66], *(more or (logits[1:, :66],)))
        np.testing.assert_allclose(clean[0][1:, :66], short, atol=1e-13)


def test_one_kernel_for_all_is_the_lightweight_convolution():
    x, kernel = draw(2, 60, 12), draw(3, 7)
    wide = np.broadcast_to(kernel, (2, 60, 3, 7))
    for causal in (False, True):
        many, saved = pyattn.dynamic_convolution.forward(x, wide, causal=causal)
        out, other = pyattn.lightweight_convolution.forward(x, kernel, causal=causal)
        np.testing.assert_allclose(out, many, atol=1e-14)
        ours, theirs = other.backward(x), saved.backward(x)
        np.testing.assert_allclose(ours.x, theirs.x, atol=1e-13)
        np.testing.assert_allclose(ours.kernel_logits, theirs.kernel_logits.sum((0, 1)),
                                   atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wide_span_changes_nothing_and_a_narrow_one_leaves_the_token(backend):
    x, logits = draw(30, 6), draw(30, 2, 9)
    with pyattn.use_backend(backend):
        out = pyattn.dynamic_convolution(x, logits)
        wide = pyattn.dynamic_convolution(x, logits, span=np.array([4.0, 9.0]), ramp=3.0)
        np.testing.assert_allclose(wide, out, atol=1e-15)
        alone = pyattn.dynamic_convolution(x, logits, span=np.zeros(2), ramp=1.0)
        np.testing.assert_array_equal(alone, x)
        # a closed tap does not look, not even at NaN
        x[3] = np.nan
        _, saved = pyattn.dynamic_convolution.forward(x, logits, span=np.zeros(2), ramp=1.0)
        assert np.isfinite(saved.backward(np.ones((30, 6))).kernel_logits[[1, 2, 4, 5]]).all()


def test_a_tap_halfway_up_the_ramp_has_half_its_weight():
    x, logits = np.eye(3), np.log([[[1.0, 1.0]]] * 3)
    out = pyattn.dynamic_convolution(x, logits, causal=True, span=np.array([0.0]), ramp=2.0)
    np.testing.assert_allclose(out[1], [1 / 3, 2 / 3, 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_without_a_tap_give_zeros(backend):
    x, logits = draw(20, 4), draw(20, 2, 3)
    logits[5, 1] = -np.inf
    logits[9, 0, 1] = -np.inf
    with pyattn.use_backend(backend):
        out, saved = pyattn.dynamic_convolution.forward(x, logits)
        grads = saved.backward(np.ones_like(x))
    assert not out[5, 2:].any()
    assert out[5, :2].all()
    assert not grads.kernel_logits[5, 1].any()
    assert np.isfinite(grads.x).all()


def test_cost_is_what_the_taps_cost():
    counts = [pyattn.dynamic_convolution.forward(draw(n, 4), draw(n, 2, 5))[1].stats
              for n in (1000, 2000, 4000)]
    pairs = [c["pairs"] for c in counts]
    assert pairs == [2 * (5 * n - 6) for n in (1000, 2000, 4000)]
    assert counts[0]["flops"] == 2 * 4 * pairs[0] // 2
    saved = pyattn.dynamic_convolution.forward(draw(100, 4), draw(100, 2, 5))[1]
    assert saved.nbytes == 8 * (100 * 4 + 100 * 10)


def test_dtypes_may_differ():
    x, logits = draw(20, 4, dtype="f4"), draw(20, 2, 3)
    for kind in (np.float64, np.float16, ml_dtypes.bfloat16):
        for backend in BACKENDS:
            with pyattn.use_backend(backend):
                out, saved = pyattn.dynamic_convolution.forward(x, logits.astype(kind))
                grads = saved.backward(out)
            assert (out.dtype, grads.x.dtype, grads.kernel_logits.dtype) == (
                np.float32, np.float32, kind)


@pytest.mark.parametrize(("error", "match", "call"), [
    (ShapeError, r"kernel_logits must be \(..., N, H, K\) with N = 5",
     lambda: pyattn.dynamic_convolution(draw(5, 4), draw(6, 2, 3))),
    (ShapeError, "H a divisor of C = 4",
     lambda: pyattn.dynamic_convolution(draw(5, 4), draw(5, 3, 3))),
    (ShapeError, "leading axes of x and kernel_logits must broadcast",
     lambda: pyattn.dynamic_convolution(draw(2, 5, 4), draw(3, 5, 2, 3))),
    (ShapeError, "span must broadcast",
     lambda: pyattn.dynamic_convolution(draw(5, 4), draw(5, 2, 3), span=draw(3))),
    (OptionError, "ramp must be positive",
     lambda: pyattn.dynamic_convolution(draw(5, 4), draw(5, 2, 3), ramp=0)),
    (OptionError, "dropout must be at least 0 and below 1",
     lambda: pyattn.dynamic_convolution(draw(5, 4), draw(5, 2, 3), dropout=1.0)),
    (OptionError, "decisions may hold dropout_seed; got buckets",
     lambda: pyattn.dynamic_convolution(draw(5, 4), draw(5, 2, 3), decisions={"buckets": 1})),
    (OptionError, "causal must be one of False, True",
     lambda: pyattn.dynamic_convolution(draw(5, 4), draw(5, 2, 3), causal="top_left")),
    (ShapeError, r"lengths must lie in 0\.\.5",
     lambda: pyattn.dynamic_convolution(draw(5, 4), draw(5, 2, 3), lengths=6)),
    (DtypeError, "x must be one of", lambda: pyattn.dynamic_convolution(
        np.ones((5, 4), int), draw(5, 2, 3))),
    (ShapeError, r"dout must have shape \(5, 4\)", lambda: pyattn.dynamic_convolution.forward(
        draw(5, 4), draw(5, 2, 3))[1].backward(draw(4, 4))),
    (ShapeError, r"kernel_logits \(H, K\)",
     lambda: pyattn.lightweight_convolution(draw(5, 4), draw(3, 3))),
    (ShapeError, r"w \(K, C\) or \(K, C, O\)", lambda: layers.conv1d(draw(5, 4), draw(3, 5))),
    (ShapeError, r"b must have shape \(4,\)",
     lambda: layers.conv1d(draw(5, 4), draw(3, 4), draw(3))),
    (ShapeError, r"w \(kh, kw, C, O\)", lambda: layers.conv2d(draw(2, 5, 4), draw(3, 3, 3, 1))),
    (OptionError, "padding must be a number for a kernel of even size",
     lambda: layers.conv2d(draw(2, 5, 4), draw(2, 3, 2, 1))),
    (ShapeError, "must fit into the image",
     lambda: layers.conv2d(draw(2, 5, 4), draw(7, 7, 2, 1), padding=0)),
    (OptionError, "not both", lambda: layers.dynamic_conv_layer(
        draw(5, 4), {"w_in": draw(4, 8), "w_kernel": draw(4, 6), "kernel_logits": draw(2, 3),
                     "w_out": draw(4, 4)}, num_heads=2)),
    (ShapeError, "w_kernel must have a multiple of num_heads = 4",
     lambda: layers.dynamic_conv_layer(
         draw(5, 4), {"w_in": draw(4, 8), "w_kernel": draw(4, 6), "w_out": draw(4, 4)},
         num_heads=4)),
])
def test_errors_name_the_argument_the_rule_and_what_was_given(error, match, call):
    with pytest.raises(error, match=match):
        call()


# layers


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend):
    span = np.array([0.7, 1.6])
    with pyattn.use_backend(backend):
        gradcheck(pyattn.dynamic_convolution, draw(2, 9, 4), draw(9, 2, 5), span=span, ramp=2.0,
                  dropout=0.3, rng=0, causal=True, renorm_padding=True)
        gradcheck(pyattn.lightweight_convolution, draw(2, 9, 4), draw(2, 3), dropout=0.3, rng=1,
                  lengths=[4, 9])
        gradcheck(layers.conv1d, draw(2, 9, 4), draw(3, 4), draw(4), lengths=[5, 9])
        gradcheck(layers.conv1d, draw(2, 9, 4), draw(4, 4, 5), draw(5), causal=True)
        for lightweight in (False, True):
            params = layers.init_dynamic_conv_layer(0, 4, num_heads=2, kernel_size=3, dtype="f8",
                                                    lightweight=lightweight)
            gradcheck(layers.dynamic_conv_layer, draw(2, 9, 4), params, num_heads=2, causal=True)
        params = layers.init_span_convolution(0, 4, num_heads=2, head_width=3, kernel_size=3,
                                              dtype="f8")
        gradcheck(layers.span_convolution, draw(2, 9, 4), params, num_heads=2, lengths=[5, 9])


@pytest.mark.parametrize(("kernel", "stride", "padding"), [
    ((3, 3), 1, "same"), ((3, 3), 2, 1), ((4, 2), 3, (2, 1)), ((3, 3), 1, 3), ((2, 2), 2, 0),
    ((1, 1), 1, 0), ((5, 5), 4, 2)])
def test_conv2d(kernel, stride, padding):
    x, w, b = draw(2, 3, 7, 6), draw(*kernel, 3, 4), draw(4)
    down, across = padding if isinstance(padding, tuple) else (
        (k // 2 for k in kernel) if padding == "same" else (padding, padding))
    wide = np.pad(x, ((0, 0), (0, 0), (down, down), (across, across)))
    y = layers.conv2d(x, w, b, stride=stride, padding=padding)
    for r, s in np.ndindex(y.shape[2:]):
        patch = wide[:, :, r * stride:r * stride + kernel[0], s * stride:s * stride + kernel[1]]
        np.testing.assert_allclose(y[:, :, r, s], np.einsum("bcij,ijco->bo", patch, w) + b,
                                   atol=1e-13)
    gradcheck(layers.conv2d, x, w, b, stride=stride, padding=padding)
    assert layers.conv2d(x[:0], w, b, stride=stride, padding=padding).shape == (0, *y.shape[1:])


def test_conv2d_of_many_images_is_that_of_each():
    x, w = draw(9, 8, 40, 40, dtype="f4"), draw(3, 3, 8, 4, dtype="f4")
    y, saved = layers.conv2d.forward(x, w)
    grads = saved.backward(y)
    for i in (0, 8):
        one, other = layers.conv2d.forward(x[i], w)
        np.testing.assert_allclose(y[i], one, atol=1e-5)
        np.testing.assert_allclose(grads.x[i], other.backward(one).x, atol=1e-3)


def test_one_kernel_of_taps_in_the_layer_is_causal():
    params = layers.init_dynamic_conv_layer(0, 8, num_heads=2, kernel_size=5, dtype="f8")
    x = draw(20, 8)
    changed = np.where(np.arange(20)[:, None] == 11, x + 1, x)
    y, after = (layers.dynamic_conv_layer(a, params, num_heads=2, causal=True)
                for a in (x, changed))
    moved = abs(after - y).max(axis=1) > 0
    assert np.flatnonzero(moved).tolist() == list(range(11, 16))


# micro-kernels


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("nbytes", WIDTHS)
@pytest.mark.parametrize("accumulate", [0, 1])
def test_correlate(nbytes, dtype, accumulate):
    correlate, lanes = micro_kernel("correlate", nbytes), nbytes // np.dtype(dtype).itemsize
    for count, taps, vectors in ((1, 1, 1), (37, 5, 2), (16, 3, 1), (6, 0, 3)):
        width = vectors * lanes
        a, b = draw(taps + 1, width + 1, dtype=dtype), draw(count + taps, width + 2, dtype=dtype)
        c = draw(count, width + 3, dtype=dtype)
        wanted = c.astype(np.float64)
        wanted[:, :width] = wanted[:, :width] * accumulate + sum(
            (a[s, :width].astype(np.float64) * b[s:s + count, :width] for s in range(taps)),
            start=np.zeros((count, width)))
        correlate(count, taps, width, at(a), width + 1, at(b), width + 2, at(c), width + 3,
                  accumulate, dtype(0))
        np.testing.assert_allclose(c, wanted, rtol=0, atol=20 * np.finfo(dtype).eps)


def test_no_array_has_two_axes_of_tokens():
    import tracemalloc

    n, taps = 4096, 7
    x, logits = draw(n, 8, dtype="f4"), draw(n, 2, taps, dtype="f4")
    pyattn.dynamic_convolution.forward(x, logits)[1].backward(x)
    for backend in BACKENDS:
        with pyattn.use_backend(backend):
            tracemalloc.start()
            pyattn.dynamic_convolution.forward(x, logits)[1].backward(x)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < n * math.isqrt(n) * 4 * 16
