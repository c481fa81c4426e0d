"""On a GPU: attention by the table of cases, on CuPy arrays, by every backend; and what only
hardware shows. ``pytest -m gpu``; skipped, with the reason, where there is no GPU.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from pyattn.kernels.cuda import device as devices
from pyattn.kernels.cuda.device import unavailable
from table import CASES, EMPTY, SHAPES, Shape
from test_attention import judge
from test_cuda_arrays import CALLS, LAUNCHED, both_ways, floats_on_device, leaves, on_device

import pyattn
from pyattn import dispatch

if REASON := unavailable():
    pytest.skip(REASON, allow_module_level=True)
cupy = pytest.importorskip("cupy")

pytestmark = pytest.mark.gpu

DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16,
          "bfloat16": ml_dtypes.bfloat16}
WIDE = [Shape((2,), 4, 2, 200, 330, 64, 64), Shape((1,), 2, 1, 257, 130, 128, 128),
        Shape((1,), 2, 2, 65, 65, 256, 256)]
BACKENDS = dispatch.ON_GPU


def run(drawn, backend):
    """Output, lse and gradients, on the host again."""
    rng = np.random.default_rng(7)
    given = {name: cupy.asarray(x) for name, x in drawn.arrays.items()}
    with pyattn.use_backend(backend):
        (out, lse), saved = pyattn.attention.forward(**given, **drawn.options, return_lse=True)
        dout = rng.standard_normal(out.shape).astype(out.dtype)
        dlse = rng.standard_normal(lse.shape).astype(lse.dtype)
        grads = saved.backward(cupy.asarray(dout), cupy.asarray(dlse))
    return out.get(), lse.get(), dout, dlse, type(grads)(*(x.get() for x in grads))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("shape", [SHAPES[3], SHAPES[5], SHAPES[7], *WIDE[:2]], ids=str)
def test_attention(case, shape, dtype, backend):
    if (backend, dtype) == ("numba_cuda", "bfloat16"):
        pytest.skip("Numba has no bfloat16 arrays")
    drawn = case.make(shape, DTYPES[dtype])
    judge(drawn, *run(drawn, backend))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, *EMPTY, *WIDE], ids=str)
def test_shapes(shape, dtype):
    drawn = CASES[1].make(shape, DTYPES[dtype])
    judge(drawn, *run(drawn, "cuda"))


@pytest.mark.parametrize("name", LAUNCHED)
def test_every_engine(name):
    """Beside the CPU in float64; `pyattn check` judges every function in every dtype."""
    operation, args, options = CALLS[name]
    want = both_ways(operation, args, options)
    there = {key: floats_on_device(x, cupy.asarray) for key, x in options.items()}
    got = both_ways(operation, on_device(args, cupy.asarray), there)
    for a, b in zip(leaves(got), leaves(want), strict=True):
        np.testing.assert_allclose(a.get(), b, rtol=1e-10, atol=1e-10)
    told = str(pyattn.explain(operation, *on_device(args, cupy.asarray), **there))
    assert "on cupy arrays: cuda" in told


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_from_run_to_run(backend):
    drawn = CASES[1].make(WIDE[0], np.float16)
    first, second = run(drawn, backend), run(drawn, backend)
    np.testing.assert_array_equal(first[0], second[0])
    for a, b in zip(first[4], second[4], strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_current_stream_is_used():
    """What is put into a stream after its own data is right without waiting."""
    host = np.random.default_rng(0).standard_normal((2, 2, 500, 64)).astype(np.float32)
    want = pyattn.attention(host, host, host, causal=True)
    for _ in range(4):
        with cupy.cuda.Stream(non_blocking=True) as stream:
            x = cupy.zeros(host.shape, np.float32)
            for _ in range(200):        # keeps the stream busy
                x += 1
            x[...] = cupy.asarray(host)
            out = pyattn.attention(x, x, x, causal=True)
        stream.synchronize()
        np.testing.assert_allclose(out.get(), want, rtol=1e-4, atol=1e-5)


def test_arrays_of_numba_are_taken():
    cuda = pytest.importorskip("numba.cuda")
    host = np.random.default_rng(0).standard_normal((2, 70, 64)).astype(np.float32)
    lent = cuda.to_device(host)
    out = pyattn.attention(lent, lent, lent)
    assert isinstance(out, cupy.ndarray)
    np.testing.assert_allclose(out.get(), pyattn.attention(host, host, host), rtol=1e-4, atol=1e-5)


def test_another_device_is_refused():
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("there is one GPU")
    with cupy.cuda.Device(1):
        x = cupy.zeros((1, 4, 64), np.float32)
    with pytest.raises(pyattn.BackendError, match="on CUDA device 1, and 0 is current"):
        pyattn.attention(x, x, x)


def test_a_tensor_map_is_made_by_the_driver():
    x = cupy.zeros((2, 3, 50, 128), np.float16)
    device = devices.of(x)
    if device.capability < (9, 0):
        pytest.skip("no tensor memory accelerator")
    assert len(device.tensor_map(x, 64, 64)) == 128
