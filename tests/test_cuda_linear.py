"""CUDA kernels of linear attention: the launch code and the kernels' text, in the emulator.

`generic` devices get kernels that decide about passes and feature maps when they run, so there is
one to build for each dtype and width; some tests take the kernels as GPUs get them. Without a C++
compiler all of it is skipped.
"""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from pyattn.kernels.cuda import linear
from table import BFLOAT16, Shape
from test_linear import both, dense, draw, judge, made, same

import pyattn
from pyattn.checks import BackendError
from pyattn.engines import linear as engine
from pyattn.features.feature_maps import FeatureMap

pytestmark = pytest.mark.gate

DTYPES = [np.float16, BFLOAT16, np.float32, np.float64]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: np.dtype(x).name)
KINDS = ["identity", "elu1", "relu", "exp"]
CAUSAL = [False, True, "top_left"]
LONG = Shape((1,), 2, 1, 233, 201, 20, 13)
SMALL = [Shape((2,), 4, 2, 33, 47, 20, 13), Shape((1,), 3, 1, 70, 90, 16, 8)]


@pytest.fixture
def device(emulated, monkeypatch):
    """The emulator, and spans of one step."""
    emulated.generic = True
    monkeypatch.setattr(linear, "SHORTEST", 1)
    monkeypatch.setattr(emulated, "multiprocessors", 3)
    return emulated


def options(kind, projected, d, seed=0):
    """A feature map; of kind "identity" its output is not normalised."""
    found = made(kind, d, projected)
    return found, {"normalize": kind != "identity", "order": "kv"}


@every_dtype
@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("kind", KINDS)
def test_against_the_rule(kind, causal, dtype, device):
    number = KINDS.index(kind) + CAUSAL.index(causal) + DTYPES.index(dtype)
    shape = SMALL[KINDS.index(kind) % 2]
    found, given = options(kind, number % 2, shape.d)
    judge(found, shape, dtype, "cuda", causal=causal, **given)


@pytest.mark.parametrize("seed", [0, 1, 2])
@every_dtype
def test_spans_and_orders_of_threads(dtype, seed, device):
    """Sums of spans, their scan, and walks from there; whatever order threads and blocks have."""
    device.seed = seed
    kind = KINDS[(seed + 1) % 4]
    found, given = options(kind, kind == "exp", LONG.d)
    causal = seed != 1
    judge(found, LONG, dtype, "cuda", causal=causal, **given)
    names = [name for name, _ in device.launches]
    assert "linear_scan" in names
    assert names.count("linear") == 7


def test_runs_have_the_same_bits(device):
    given = draw(LONG, np.float32)
    found = []
    with pyattn.use_backend("cuda"):
        for device.seed in (0, 1, 2):
            found.append(both(made("exp", LONG.d, dtype=np.float32), *given, causal=True))
    for other in found[1:]:
        for x, y in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_hand_on_their_state_and_its_gradient(kind, causal, device):
    shape = Shape((2,), 4, 2, 80, 80, 8, 5)
    q, k, v = draw(shape)
    given = {"feature_map": made(kind, 8), "causal": causal, "normalize": kind != "identity"}
    rng = np.random.default_rng(0)
    dout, found = rng.standard_normal((2, 4, 80, 5)), {}
    for backend in ("cpu", "cuda"):
        with pyattn.use_backend(backend):
            (first, state), before = engine.forward(q, k, v, **given, return_state=True)
            (out, state), saved = engine.forward(q[..., :50, :], k, v, **given, state=state,
                                                 return_state=True)
            sums = state.sums if kind == "exp" else state
            grads = saved.backward(dout[..., :50, :],
                                   np.random.default_rng(1).standard_normal(sums.shape))
            earlier = before.backward(dout, grads.state)
        whole = state if kind == "exp" else (state,)
        found[backend] = first, out, *whole, *grads, *earlier
    same(found["cuda"], found["cpu"])


@pytest.mark.parametrize("kind", ["elu1", "exp"])
@pytest.mark.parametrize("causal", CAUSAL)
def test_padding_is_as_if_it_was_not_there(causal, kind, device):
    q, k, v = draw(Shape((3,), 4, 2, 70, 80, 8, 5))
    n, m = [70, 3, 0], [66, 80, 5]
    dout = np.random.default_rng(0).standard_normal((3, 4, 70, 5))
    for b in range(3):
        q[b, :, n[b]:] = dout[b, :, n[b]:] = np.nan
        k[b, :, m[b]:] = v[b, :, m[b]:] = np.nan
    given = {"feature_map": made(kind, 8), "causal": causal, "return_state": True}
    with pyattn.use_backend("cuda"):
        (out, state), saved = engine.forward(q, k, v, **given, q_lengths=n, kv_lengths=m)
        found = out, *saved.backward(dout)
    for b in range(3):
        own = q[b, :, :n[b]], k[b, :, :m[b]], v[b, :, :m[b]]
        (alone, own_state), own_saved = engine.forward(*own, **given)
        grads = own_saved.backward(dout[b, :, :n[b]])
        for got, want in zip(found, (alone, *grads), strict=True):
            np.testing.assert_allclose(got[b, :, :want.shape[1]], want, rtol=1e-9, atol=1e-12)
            assert not got[b, :, want.shape[1]:].any()
        sums, own_sums = (x.sums if kind == "exp" else x for x in (state, own_state))
        np.testing.assert_allclose(sums[b], own_sums, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("kind", "dtype"), [("elu1", np.float32), ("exp", np.float64)])
@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
def test_a_token_that_is_not_finite_reaches_those_that_see_it_alone(where, kind, dtype, device):
    given = dict(zip("qkv", draw(Shape((1,), 2, 1, 40, 40, 8, 5), dtype), strict=True))
    dout = np.random.default_rng(0).standard_normal((1, 2, 40, 5)).astype(dtype)
    at_token = 20
    (given | {"dout": dout})[where][..., at_token, :] = np.nan
    with pyattn.use_backend("cuda"):
        out, saved = engine.forward(*given.values(), feature_map=made(kind, 8), causal=True)
        dq, dk, dv = saved.backward(dout)
    i = np.arange(40)
    touched = {"q": i == at_token, "k": i >= at_token, "v": i >= at_token, "dout": i < 0}[where]
    assert (np.isnan(out).any(axis=(0, 1, 3)) == touched).all()
    for x in (dk, dv):
        assert np.isfinite(x[..., at_token + 1:, :]).all() or where in ("k", "v")
    if where in ("q", "dout"):
        assert (np.isnan(dq).any(axis=(0, 1, 3)) == (i == at_token)).all()
    else:
        assert np.isfinite(dq[..., :at_token, :]).all()


def test_large_logits_stay_finite(device):
    q, k, v = (30 * x for x in draw(Shape((1,), 2, 1, 100, 100, 8, 5), np.float32))
    with pyattn.use_backend("cuda"):
        for causal in (True, False):
            for x in both(made("exp", 8), q, k, v, causal=causal):
                assert np.isfinite(x).all()


def test_rows_whose_weights_are_all_zero(device):
    q, k, v = draw(Shape((1,), 1, 1, 6, 6, 4, 4))
    q[..., 2, :] = -1
    with pyattn.use_backend("cuda"):
        out, saved = engine.forward(q, k, v, feature_map=FeatureMap("relu"), causal=True,
                                    epsilon=1e-6)
        dout = np.ones_like(out)
        dout[..., 2, :] = np.nan
        assert not out[..., 2, :].any()
        grads = saved.backward(dout)
    assert all(np.isfinite(x).all() for x in grads)
    assert not grads.q[..., 2, :].any()


@pytest.mark.parametrize("kind", ["elu1", "exp"])
def test_one_backend_undoes_what_another_did(kind, device):
    q, k, v = draw(Shape((2,), 4, 2, 33, 47, 20, 13))
    found = []
    for first, second in (("cpu", "cuda"), ("cuda", "cpu"), ("cpu", "cpu")):
        with pyattn.use_backend(first):
            out, saved = engine.forward(q, k, v, feature_map=made(kind, 20), causal=True)
        with pyattn.use_backend(second):
            found.append(saved.backward(np.ones_like(out)))
    same(found[0], found[2])
    same(found[1], found[2])


@pytest.mark.parametrize("shape", [Shape((2,), 2, 1, 0, 5, 4, 4), Shape((2,), 2, 1, 5, 0, 4, 4),
                                   Shape((0,), 2, 2, 3, 3, 4, 4), Shape((1,), 0, 0, 3, 3, 4, 4)],
                         ids=str)
@pytest.mark.parametrize("kind", ["elu1", "exp"])
@pytest.mark.parametrize("causal", CAUSAL)
def test_nothing_to_do(causal, kind, shape, device):
    q, k, v = draw(shape)
    with pyattn.use_backend("cuda"):
        (out, state), saved = engine.forward(q, k, v, feature_map=made(kind, shape.d),
                                             causal=causal, return_state=True)
        grads = saved.backward(np.ones_like(out))
    sums = state.sums if kind == "exp" else state
    assert sums.shape == (*shape.batch, shape.groups, 21, shape.e + 1)
    for x, like in zip((out, *grads), (out, q, k, v), strict=True):
        assert x.shape == like.shape
        assert not x.any() or not x.size


def test_strides_and_leading_axes(device):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((3, 2, 9, 4, 8)).swapaxes(2, 3)
    k, v = rng.standard_normal((2, 1, 2, 8, 14)).swapaxes(-1, -2)[..., ::2, :]
    dout = rng.standard_normal((3, 2, 4, 9, 8))
    found = []
    for x in (q, k, v, dout):
        x.flags.writeable = False
    for backend in ("cpu", "cuda"):
        with pyattn.use_backend(backend):
            out, saved = pyattn.linear_attention.forward(q, k, v, causal=True)
            found.append((out, *saved.backward(dout)))
    same(*found)


@pytest.mark.parametrize("planted", [
    ("linear.cu", "const u64 columns = bits_below(step.columns);\n"
                  "            bits[h].set(PASS <= DQ ? bits_below(row + step.shift + 1)",
     "const u64 columns = bits_below(step.columns);\n"
     "            bits[h].set(PASS <= DQ ? bits_below(row + step.shift)"),
    ("linear.cu", "__syncthreads();            // the tiles are free", "// the tiles are free"),
    ("linear_scan.cu", "sum = times_plus(sum, kept(a, sequence, pair, span), own[i]);",
     "sum += own[i];")], ids=["mask", "barrier", "stabiliser"])
def test_mistakes_are_found(planted, device, tmp_path):
    """Each of the judges of this file, on a kernel with a mistake."""
    file, right, wrong = planted
    text = (linear.devices.compile.SOURCES / file).read_text()
    assert text.count(right) == 1
    (tmp_path / file).write_text(text.replace(right, wrong))
    device.folders = (tmp_path,)
    with pytest.raises(AssertionError):
        judge(made("exp", 8), Shape((1,), 2, 1, 150, 150, 8, 5), np.float64, "cuda", causal=True)


@pytest.fixture
def narrow(device, monkeypatch):
    """The device, with parts of 32 features and columns, and tokens that are wider than that."""
    monkeypatch.setattr(linear, "WIDTHS", linear.WIDTHS[:1])
    return device


def projected(kind, f, d):
    w = np.random.default_rng(d).standard_normal((f, d))
    return FeatureMap(kind, w, scale=d ** -0.25, epsilon=0.01 if kind == "relu" else 0.0)


PARTS = [(FeatureMap("elu1"), 36), (projected("exp", 40, 36), 36), (projected("relu", 40, 20), 20),
         (FeatureMap("identity"), 70)]


@every_dtype
@pytest.mark.parametrize("number", range(3))
def test_what_is_wide_is_done_in_parts(number, dtype, narrow):
    """Of features, of values, of both, and of tokens that are projected."""
    number = (number + DTYPES.index(dtype)) % len(PARTS)
    found, d = PARTS[number]
    judge(found, Shape((1,), 2, 1, 70, 66, d, 45 if number != 2 else 13), dtype, "cuda",
          causal=number != 3, normalize=found.kind != "identity", order="kv")
    assert len([name for name, _ in narrow.launches if name == "linear"]) >= 2 * 5


@pytest.mark.parametrize(("number", "causal"), [(0, False), (1, True)])
def test_pieces_of_what_is_wide(number, causal, narrow):
    """States in parts, handed on with their gradients, and the same bits in whatever order."""
    found, d = PARTS[number]
    q, k, v = draw(Shape((1,), 1, 1, 30, 30, d, 37))
    rng = np.random.default_rng(0)
    dout, dsums = rng.standard_normal((1, 1, 30, 37)), rng.standard_normal((1, 1, 40, 38))
    runs = []
    for backend, narrow.seed in (("cpu", 0), ("cuda", 0), ("cuda", 1)):
        given = {"feature_map": found, "causal": causal, "return_state": True}
        with pyattn.use_backend(backend):
            (first, state), before = engine.forward(q, k, v, **given)
            (out, state), saved = engine.forward(q, k, v, **given, state=state,
                                                 kv_lengths=21)
            sums = state.sums if found.kind == "exp" else state
            grads = saved.backward(dout, dsums[..., :sums.shape[2], :])
            earlier = before.backward(dout, grads.state)
        runs.append((first, out, sums, *grads, *earlier))
    same(runs[1], runs[0])
    for x, y in zip(*runs[1:], strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda x: np.dtype(x).name)
def test_gradients_that_cancel_err_like_plain_arithmetic(dtype, device):
    """Of one feature the weights are the keys', whatever the query: dq is 0, as a sum that cancels.

    Then one draw tells nothing: plain arithmetic may be exact by luck.
    """
    shape, errors = Shape((), 1, 1, 2, 3, 1, 1), []
    for seed in range(12):
        given = draw(shape, dtype, seed)
        dout = np.random.default_rng(seed).standard_normal((1, 2, 1)).astype(dtype)
        exact, rough = (dense(FeatureMap("elu1"), *given, dout, r, causal=True)["q"]
                        for r in (oracle.exact(dtype), oracle.plain(dtype)))
        with pyattn.use_backend("cuda"):
            _, saved = engine.forward(*given, feature_map=FeatureMap("elu1"), causal=True,
                                      order="kv")
            found = saved.backward(dout).q
        errors.append([np.abs(x - exact).max() for x in (found, rough)])
    own, plain = np.sum(errors, axis=0)
    assert own <= 2 * plain


@pytest.mark.parametrize(("made_of", "e", "memory", "message"), [
    (FeatureMap("elu1"), 4000, 227, r"take 125 parts, 32 of each .* 64 are allowed"),
    (FeatureMap("relu", np.ones((100, 4))), 4, 64, "does not fit the 65536 bytes")])
def test_what_is_left_to_others(made_of, e, memory, message, device, monkeypatch):
    monkeypatch.setattr(device, "shared_memory", memory * 1024)
    x, v = np.ones((1, 3, 4)), np.ones((1, 3, e))
    with pyattn.use_backend("cuda"), pytest.raises(BackendError, match=message):
        engine.forward(x, x, v, feature_map=made_of)


def test_tilings_fit(device):
    """Of all that a GPU may be asked for: the default of `performer_attention`, and wider."""
    for memory in linear.SHARED.values():
        for name in linear.TOKENS:
            for d, f, e, is_projected in ((64, 266, 64, True), (128, 620, 128, True),
                                          (512, 512, 256, False), (64, 512, 256, True)):
                x = linear.tiling(name, d, f, e, is_projected, memory)
                assert linear.shared_bytes(name, x, is_projected) <= memory
                assert x.width >= 64
                assert len(linear.parts(f, e, x.width)) <= 32
    assert linear.tiling("bfloat16", 64, 266, 64, True, memory).width == 64
    assert linear.tiling("bfloat16", 64, 64, 64, True, memory).width == 64
    assert linear.tiling("bfloat16", 128, 620, 128, True, memory).width == 128


@pytest.mark.parametrize(("made_of", "d", "e", "dtype"), [
    (projected("exp", 266, 64), 64, 64, BFLOAT16),
    (projected("relu", 200, 64), 64, 256, np.float16), (FeatureMap("elu1"), 260, 130, np.float64)],
    ids=["performer-bfloat16", "values-float16", "features-float64"])
def test_wide_ones(made_of, d, e, dtype, device):
    judge(made_of, Shape((1,), 1, 1, 37, 30, d, e), dtype, "cuda", causal=True, order="kv")


def test_mistakes_with_parts_are_found(narrow, tmp_path):
    """Each part with a stabiliser of its own, which no sum over parts can tell."""
    text, right = (linear.devices.compile.SOURCES / "linear.cu").read_text(), "KIND == EXP && most"
    assert text.count(right) == 1
    (tmp_path / "linear.cu").write_text(text.replace(right, "false"))
    narrow.folders = (tmp_path,)
    with pytest.raises(AssertionError):
        judge(PARTS[1][0], Shape((1,), 2, 1, 40, 40, 36, 45), np.float64, "cuda", causal=True)


WIDE = [(kind, width, dtype) for kind in ("elu1", "exp") for width in linear.WIDTHS
        for dtype in DTYPES]


@pytest.mark.parametrize(("kind", "width", "dtype"), WIDE)
def test_every_width(kind, width, dtype, device):
    """Of bfloat16 the kernels as GPUs get them, of each width those for one kind of features."""
    device.generic = dtype != BFLOAT16 or (kind == "exp") != (width == linear.WIDTHS[1])
    shape = Shape((1,), 2, 1, 150, 140, width, width - 3)
    for causal in (False, True):
        judge(made(kind, width, kind == "exp"), shape, dtype, "cuda", causal=causal)
