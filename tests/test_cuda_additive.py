"""CUDA kernels of additive attention: the launch code and the kernels' text, in the emulator.

What any backend is tested by (test_additive.py) is called here for this one. A C++ compiler is
needed, and without one all of it is skipped.
"""

from __future__ import annotations

import numpy as np
import pytest
import strict_cupy
import test_additive as rules
from pyattn.kernels.cuda import additive, compile
from table import BFLOAT16, Shape
from test_additive import draw, inside, judge
from test_cuda_arrays import cupy, on_device, on_host, strict_device

import pyattn
from pyattn import masks
from pyattn.checks import BackendError
from pyattn.engines import additive as engine

pytestmark = pytest.mark.gate

assert cupy, strict_device      # fixtures

DTYPES = [np.float16, BFLOAT16, np.float32, np.float64]
NAMES = ["float16", "bfloat16", "float32", "float64"]
SMALL = Shape((2,), 4, 2, 33, 70, 20, 13)


def built(*dtypes):
    """Dtypes; all of them if none are given."""
    return pytest.mark.parametrize("dtype", [
        pytest.param(dtype, id=name) for dtype, name in zip(DTYPES, NAMES, strict=True)
        if not dtypes or dtype in dtypes])


@pytest.fixture(autouse=True)
def device(emulated):
    """The emulator, and one kernel for values of any width."""
    emulated.generic = True
    return emulated


def everything(saved, out, dout):
    return out, saved.lse, *saved.backward(dout)


def operands(shape, dtype=np.float32, *, features=40, seed=0):
    """What the engine takes."""
    rng = np.random.default_rng(seed)
    acc = np.float64 if dtype == np.float64 else np.float32
    q, k, w = (rng.standard_normal(x).astype(acc) for x in (
        (*shape.batch, shape.heads, shape.n, features),
        (*shape.batch, shape.groups, shape.m, features), (shape.heads, features)))
    v = rng.standard_normal((*shape.batch, shape.groups, shape.m, shape.e)).astype(dtype)
    return q, k, v, w / acc(features)**acc(0.5)


# against the oracle


@built()
@pytest.mark.parametrize("shape", [SMALL, rules.SHAPES[0]],
                         ids=str)
def test_against_the_rule(shape, dtype):
    judge(draw(shape, dtype), inside(shape), "cuda")


@built()
@pytest.mark.parametrize("shape", rules.SHAPES[2:], ids=str)
def test_other_shapes(shape, dtype, device):
    device.seed += 1
    judge(draw(shape, dtype), inside(shape), "cuda")


@built(np.float32, np.float64)
def test_causal_masked_and_padded(dtype):
    rules.test_causal_masked_and_padded(SMALL, True, "cuda", dtype)


@pytest.mark.parametrize("causal", [False, "top_left"])
@pytest.mark.parametrize("shape", rules.SHAPES[2:], ids=str)
def test_other_masks_and_lengths(shape, causal):
    rules.test_causal_masked_and_padded(shape, causal, "cuda", np.float32)


@pytest.mark.parametrize("mask", [
    masks.window(20, 0), masks.segments((50, 7, 73)),
    masks.strided(3)], ids=str)
def test_masks(mask):
    i = np.arange(130)
    judge(draw(Shape((1,), 2, 1, 130, 130, 5, 6), BFLOAT16, features=7),
          mask.allowed(i[:, None], i[None]), "cuda", mask=mask)


@built()
def test_more_features_and_values_than_a_round_has(dtype, device):
    """Three rounds of features, the last of six; two of values, in launches of their own."""
    judge(draw(Shape((1,), 2, 1, 20, 66, 8, 40), dtype, features=70), np.True_, "cuda")
    assert [name for name, _ in device.launches].count("additive_backward_keys") == 2


@pytest.mark.parametrize(("dtype", "width"), [
    (BFLOAT16, 72), (np.float32, 64)], ids=str)
def test_kernels_as_gpus_get_them(dtype, width, device):
    device.generic = False
    shape = Shape((1,), 2, 1, 20, 70, 8, width)
    judge(draw(shape, dtype), inside(shape, causal=True), "cuda", causal=True)


def test_finite_differences():
    rules.test_finite_differences("cuda")


@pytest.mark.parametrize("shape", rules.EMPTY, ids=str)
def test_nothing_to_do(shape):
    rules.test_nothing_to_do(shape, "cuda")


def assert_alike(found, others):
    """The same in float32, but for the order of sums."""
    for x, y in zip(found, others, strict=True):
        assert np.isfinite(x).all()
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(x).max())


def test_alike_is_not_said_of_what_differs():
    x = np.ones(3, np.float32)
    for other in (x + 1e-4, x * np.nan):
        with pytest.raises(AssertionError):
            assert_alike([x], [other])
        with pytest.raises(AssertionError):
            assert_alike([other], [x])


def test_strided_and_read_only_arguments():
    arrays = operands(SMALL)
    turned = [np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2) for x in arrays]
    for x in turned:
        x.flags.writeable = False
    found = []
    for backend, given in (("cpu", arrays), ("cuda", turned)):
        with pyattn.use_backend(backend):
            out, saved = engine.forward(*given)
            found.append(everything(saved, out, np.broadcast_to(np.float32(1), out.shape)))
    assert_alike(*found)


def test_axes_that_broadcast():
    rules.test_broadcast_axes_and_strided_views("cuda")


@built(np.float32, np.float64)
def test_masks_by_head(dtype):
    shape = Shape((1,), 4, 2, 70, 70, 5, 6)
    i, j = np.arange(70)[:, None], np.arange(70)
    lefts = (0, 5, 66, 70)
    judge(draw(shape, dtype, features=7),
          np.stack([(j <= i) & (j >= i - left) for left in lefts]), "cuda",
          mask=masks.per_head([masks.window(left, 0) for left in lefts]))


@pytest.mark.parametrize("pair", [("cuda", "cpu"), ("cpu", "cuda")], ids="-".join)
def test_one_backends_saved_in_anothers_backward(pair):
    arrays = operands(SMALL)
    with pyattn.use_backend(pair[0]):
        out, saved = engine.forward(*arrays, mask=masks.causal())
    found = []
    for backend in pair:
        with pyattn.use_backend(backend):
            found.append(saved.backward(out))
    assert_alike(*found)


# digits


@built(np.float32, BFLOAT16)
def test_small_features_keep_their_digits(dtype):
    """Gradients where the tanhs are small are as exact as where they are not."""
    shape = Shape((), 1, 1, 65, 65, 8, 8)
    q, k, v, w_q, w_k, w_score, b = draw(shape, dtype)
    for scale in (1e-4, 0.1):
        judge([q, k, v, (scale * w_q).astype(dtype), (scale * w_k).astype(dtype), w_score, 0 * b],
              inside(shape), "cuda")


@built(np.float32, np.float64)
def test_saturated_features(dtype):
    rules.test_saturated_features("cuda", dtype)


def test_large_features_that_cancel():
    """Beside small ones: of the former no exponential is a number, of the latter they are used.

    Weights of some that are just small enough are large.
    """
    shape = Shape((1,), 2, 1, 66, 66, 0, 8)
    q, k, v, w = operands(shape)
    q[..., 5], k[..., 5] = 300 + q[..., 5], -300 - k[..., 5]
    q[..., 8], k[..., 8] = 11 * q[..., 8], -11 * q[..., :1, :, 8]
    for x in (q, k):
        x[..., 10:12] = 7.9 * np.sign(x[..., 10:12])
    w[:, 10:12] = 300, -299
    dout = np.random.default_rng(1).standard_normal((1, 2, 66, 8))
    exact = [x.astype(np.float64) for x in (q, k, v, w)]
    found = []
    for given, backend in ((exact, "cpu"), ([q, k, v, w], "cpu"), ([q, k, v, w], "cuda")):
        with pyattn.use_backend(backend):
            out, saved = engine.forward(*given)
            found.append(everything(saved, out, dout.astype(out.dtype)))
    for x, rough, y in zip(*found, strict=True):
        unit = np.abs(rough - x).max() + np.finfo(np.float32).eps * np.abs(x).max()
        assert np.abs(y - x).max() <= 3 * unit


# what is hidden, and what is not a number


def test_what_no_one_may_see_has_no_say():
    rules.test_what_no_one_may_see_has_no_say("cuda", np.float32)


@built()
def test_nan_goes_where_it_is_seen_and_nowhere_else(dtype):
    shape = Shape((1,), 2, 1, 80, 80, 4, 8)
    q, k, v, w = operands(shape, dtype)
    dout = np.random.default_rng(1).standard_normal((1, 2, 80, 8)).astype(dtype)
    plain, bad = (q, k, v, dout), [x.copy() for x in (q, k, v, dout)]
    bad[1][..., 75, 3], bad[2][..., 76, 2] = np.nan, np.inf
    bad[0][..., 78, 1], bad[3][..., 79, 5] = np.nan, np.inf
    found = []
    for a, c, x, pull in (plain, bad):
        with pyattn.use_backend("cuda"):
            out, saved = engine.forward(a, c, x, w, mask=masks.causal())
            grads = saved.backward(pull)
        found.append([y.astype("f8") for y in (out, saved.lse, grads.q)])
        if a is bad[0]:
            # each key is seen by a query of NaN
            assert np.isnan(grads.k).any(axis=-1).all()
            assert not np.isfinite(grads.v.astype("f8")).all(axis=-1).any()
            assert np.isnan(grads.w).any()
    for x, y in zip(*found, strict=True):
        np.testing.assert_allclose(y[..., :75, :] if y.ndim == 4 else y[..., :75],
                                   x[..., :75, :] if x.ndim == 4 else x[..., :75],
                                   rtol=0, atol=1e-6)
    out, lse, dq = found[1]
    assert np.isnan(out[..., [75, 77, 78, 79], :]).any(axis=-1).all()
    assert np.isnan(lse[..., 75:]).all()
    assert np.isnan(dq[..., 75:, :]).any(axis=-1).all()


# order and devices


@pytest.mark.parametrize("dtype", [
    BFLOAT16, np.float32], ids=NAMES[1:3])
def test_the_order_of_threads_and_blocks_changes_no_bit(dtype, device):
    arrays = operands(Shape((1,), 2, 1, 70, 130, 0, 8), dtype)
    found = []
    for device.seed in (0, 1, 2):
        with pyattn.use_backend("cuda"):
            out, saved = engine.forward(*arrays, mask=masks.causal())
            found.append([x.tobytes() for x in everything(saved, out, out)])
    assert found[0] == found[1] == found[2]


def test_shared_memory_has_no_bank_conflicts(device):
    device.access_conflicts = 0
    arrays = operands(Shape((1,), 1, 1, 33, 70, 0, 13))
    with pyattn.use_backend("cuda"):
        out, saved = engine.forward(*arrays)
        saved.backward(out)
    assert device.launches


def test_launch_code_meets_no_array_of_the_host(strict_device):
    """And does not wait for the device."""
    arrays = operands(SMALL, BFLOAT16)
    options = {"mask": masks.causal(), "kv_lengths": np.array([70, 40])}
    there = [on_device(x) for x in arrays]
    dout = on_device(np.ones((2, 4, 33, 13), BFLOAT16))
    before = dict(strict_cupy.synchronisations)
    out, saved = engine.forward(*there, **options)
    got = everything(saved, out, dout)
    assert strict_cupy.synchronisations == before
    assert strict_device.launches
    out, saved = engine.forward(*arrays, **options)
    for x, y in zip(map(on_host, got), everything(saved, out, on_host(dout)), strict=True):
        np.testing.assert_allclose(x.astype("f8"), y.astype("f8"), rtol=0, atol=0.05)


@pytest.mark.parametrize("shared", [99, 163, 227])
def test_every_width_fits(shared):
    for name in NAMES:
        for file in additive.BLOCKS:
            for width in (1, 32, 33, 100, 500):
                chunk = additive.chunk_of(name, file, width, shared * 1024)
                assert chunk or (name, shared) == ("float64", 99)
                assert additive.shared_bytes(name, file, chunk) <= shared * 1024


def test_what_does_not_fit_is_told(device):
    device.shared_memory = 99 * 1024
    with pyattn.use_backend("cuda"), pytest.raises(BackendError, match="float64 does not fit"):
        engine.forward(*operands(SMALL, np.float64))


def planted(name, *mistake):
    return pytest.param(mistake, id=name)


@pytest.mark.parametrize("mistake", [
    planted("wild", "additive_prepare.cu", "#define WILD 8.0f", "#define WILD 400.0f"),
    planted("mask", "additive_forward.cu", "if (!bits[h].get(i, e))", "if (false)"),
    planted("barrier", "additive_backward.cuh", "__syncthreads();            // the next load "
            "overwrites what was just read\n    }\n}\n\n// pulls", "}}\n// pulls"),
    planted("head", "additive_backward_keys.cu", "i64(head) * p.chunks()", "0 * p.chunks()")])
def test_mistakes_are_found(mistake, device, tmp_path):
    """Each of the judges of this file, on a kernel with a mistake."""
    file, right, wrong = mistake
    text = (compile.SOURCES / file).read_text()
    assert text.count(right) == 1
    (tmp_path / file).write_text(text.replace(right, wrong))
    device.folders = (tmp_path,)
    shape = Shape((1,), 2, 1, 70, 70, 8, 8)

    def judges():
        test_large_features_that_cancel()
        judge(draw(shape, np.float32), inside(shape, causal=True), "cuda", causal=True)

    with pytest.raises(AssertionError):
        judges()
