"""CUDA kernels of linear attention: the launch code and the kernels' text, in the emulator.

`generic` devices get kernels that decide about passes and feature maps when they run, so there is
one to build for each dtype and width. With ``-m gate`` come the kernels as GPUs get them, more
shapes, and other orders of threads and blocks. Without a C++ compiler all of it is skipped.
"""

from __future__ import annotations

import numpy as np
import pytest
from pyattn.kernels.cuda import linear
from table import BFLOAT16, Shape
from test_linear import both, draw, judge, made, same

import pyattn
from pyattn.checks import BackendError
from pyattn.engines import linear as engine
from pyattn.features.feature_maps import FeatureMap

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


@pytest.mark.parametrize(("made_of", "e", "message"), [
    (FeatureMap("elu1"), 200, "at most 128 wide"),
    (FeatureMap("relu", np.ones((100, 4))), 4, "does not fit")])
def test_what_is_left_to_others(made_of, e, message, device):
    x, v = np.ones((1, 3, 4)), np.ones((1, 3, e))
    with pyattn.use_backend("cuda"), pytest.raises(BackendError, match=message):
        engine.forward(x, x, v, feature_map=made_of)


WIDE = [(kind, width, dtype) for kind in ("elu1", "exp") for width in linear.WIDTHS
        for dtype in (np.float16, BFLOAT16, np.float32, np.float64)
        # these do not fit shared memory, and are refused
        if (kind, width) != ("exp", 128) or dtype not in (np.float32, np.float64)]


@pytest.mark.gate
@pytest.mark.parametrize(("kind", "width", "dtype"), WIDE)
def test_every_width(kind, width, dtype, device):
    """Of bfloat16 the kernels as GPUs get them."""
    device.generic = dtype != BFLOAT16
    shape = Shape((1,), 2, 1, 150, 140, width, width - 3)
    for causal in (False, True):
        judge(made(kind, width, kind == "exp"), shape, dtype, "cuda", causal=causal)
