"""The numba_cuda backend where there is no GPU: simulated, compiled to PTX, and refused."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from pyattn.kernels import numba_cuda
from pyattn.kernels.cuda.compile import INSTALL
from pyattn.kernels.numba_cuda import softmax
from table import CASES, SHAPES, Shape
from test_attention import BY_NAME, judge

import pyattn
from pyattn import dispatch
from pyattn.engines import softmax as engine
from pyattn.engines.problem import GateForm

needs_numba_cuda = pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None,
                                      reason="numba-cuda is not installed")


@needs_numba_cuda
def test_simulated():
    """A process of its own, as the simulator must be asked for before Numba is imported."""
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
         str(tests / "test_numba_cuda_simulated.py")],
        cwd=tests.parent, env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, done.stdout[-10000:]
    assert re.search(r"\d\d\d passed", done.stdout), done.stdout[-1000:]


# compiled


def everything(dtype, width):
    """A problem with all terms."""
    drawn = BY_NAME["everything"].make(Shape((), 2, 1, 3, 5, width, width), dtype)
    with pyattn.use_backend("array_api"):
        _, saved = pyattn.attention.forward(**drawn.arrays, **drawn.options)
    return engine._problem(saved.softmax)


def gate_in_blocks():
    """A problem whose gate's gradient is joined of parts."""
    x = np.ones((1, 5, 4), np.float32)
    _, saved = engine.forward(x, x, x, gate=x[:, :3, :3], gate_form=GateForm(block=2))
    return engine._problem(saved)


class Compiler:
    """Instead of a device: compiles what would be launched, for the arguments it is given."""

    def __init__(self, capability, wanted):
        self.capability, self.wanted, self.found = capability, wanted, {}

    def empty(self, shape, dtype):
        return np.zeros(shape, dtype)

    def view(self, x):
        return x

    constant = view

    def kept(self, owner, make):
        return make()

    def launch(self, kernel, blocks, threads, *arguments):
        from numba import cuda

        name = kernel.py_func.__name__
        if self.wanted and name not in self.wanted:
            return
        ptx, _ = cuda.compile_ptx(kernel.py_func, tuple(map(type_of, arguments)),
                                  cc=self.capability)
        self.found[name] = ptx, threads
        assert_takes(ptx, prepared(arguments))


class Memory:
    """Stands for memory on a GPU."""

    __cuda_memory__ = True
    _cuda_memsize_ = 1 << 30
    device_ctypes_pointer = SimpleNamespace(value=4096)
    device_pointer_value = 4096


def viewed(x):
    """The argument as it is for a GPU, but for its memory."""
    from pyattn.kernels.numba_cuda import device

    if isinstance(x, tuple):
        return type(x)(*map(viewed, x))
    if isinstance(x, np.ndarray):
        return device.View(x.shape, x.strides, x.dtype, gpu_data=Memory())
    return x


def prepared(arguments):
    """The numbers that Numba would hand to the driver for these arguments."""
    from numba.cuda.cudadrv import devices
    from numba.cuda.dispatcher import _Kernel
    from numba.cuda.typing.typeof import typeof

    numbers = []
    kernel = SimpleNamespace(extensions=[])
    kernel._prepare_args = functools.partial(_Kernel._prepare_args, kernel)
    with pytest.MonkeyPatch.context() as patch:
        # an empty array asks for it
        patch.setattr(devices, "get_context", lambda: None)
        for x in arguments:
            view = viewed(x)
            assert typeof(view) == type_of(x)
            kernel._prepare_args(typeof(view), view, 0, [], numbers)
    return numbers


def assert_takes(ptx, numbers):
    """As many parameters as numbers, and no more than every GPU and driver takes."""
    entry = ptx[ptx.index(".entry"):]
    parameters = re.findall(r"\.param \.(?:align \d+ \.)?[a-z](\d+)", entry[:entry.index(")")])
    assert len(parameters) == len(numbers)
    assert sum(max(8, int(bits) // 8) for bits in parameters) <= 4096


def type_of(x):
    """The type that an argument has for Numba on a GPU."""
    from numba import types
    from numba.cuda.np import numpy_support
    from numba.cuda.typing.typeof import typeof

    if isinstance(x, tuple):
        return types.BaseTuple.from_types([type_of(part) for part in x], type(x))
    if isinstance(x, np.ndarray):
        return types.Array(numpy_support.from_dtype(x.dtype), x.ndim, "A")
    return typeof(x)


def compiled(problem, capability, wanted):
    """The PTX of the kernels of a forward and backward: those wanted, or all if none is named."""
    from numba.cuda import dispatcher
    from pyattn.kernels.numba_cuda import device, launch

    compiler = Compiler(capability, wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "of", lambda x: compiler)
        # only asked for what to compile functions on the device for
        patch.setattr(dispatcher, "get_current_device",
                      lambda: SimpleNamespace(compute_capability=capability))
        out, lse = launch.forward(problem)
        launch.backward(problem, out, lse, launch.delta(out, out, lse, None))
    return compiler.found


ALL = ("forward", "delta", "by_queries", "by_keys", "by_tiles", "by_distance", "sum_cells",
       "join_tables")


@needs_numba_cuda
@pytest.mark.parametrize(("dtype", "width", "capability", "wanted"), [
    (np.float32, 128, (9, 0), ALL), (np.float64, 64, (8, 0), ("forward", "by_queries", "by_keys")),
    (np.float16, 64, (8, 0), ("forward", "delta"))], ids=["float32", "float64", "float16"])
def test_compiled(dtype, width, capability, wanted):
    """What is summed stays in registers: only numbers of a thread's rows are indexed."""
    found = compiled(everything(dtype, width), capability, wanted)
    assert set(found) == set(wanted)
    if dtype == np.float32:
        found |= compiled(gate_in_blocks(), capability, ("join_cells",))
        assert "join_cells" in found
    wide = 8 if dtype == np.float64 else 4
    for name, (ptx, threads) in found.items():
        local = sum(int(size) for size in re.findall(r"\.local .*\[(\d+)\]", ptx))
        # three numbers for each of four rows
        assert local <= 3 * 4 * wide, name
        shared = sum(int(size) for size in re.findall(r"\.shared .*\[(\d+)\]", ptx))
        assert shared <= 48 * 1024, name
        if "by_" in name:
            assert "fma.rn.f64" in ptx if wide == 8 else "fma.rn.f32" in ptx
        if shutil.which("ptxas") is not None:
            assert_fits(name, ptx, threads, capability)


def assert_fits(name, ptx, threads, capability):
    """Registers for all threads of a block, next to no spills."""
    most = min(255, 65536 // threads)
    done = subprocess.run(["ptxas", "-v", f"-arch=sm_{capability[0]}{capability[1]}",
                           f"-maxrregcount={most}", "-o", os.devnull, "-"], input=ptx, text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    spilt = int(re.search(r"(\d+) bytes spill stores", done.stderr)[1])
    # by_keys holds two outputs; what it spills is not of the products
    assert spilt <= (160 if name == "by_keys" else 0), (name, done.stderr)


@needs_numba_cuda
def test_arrays_on_a_gpu_have_one_type_whatever_their_strides():
    from numba.cuda.typing.typeof import typeof
    from pyattn.kernels.numba_cuda import device

    for dtype in (np.float16, np.float32, np.float64, np.int32, np.int64, np.uint8):
        for strides in ((96, 48, 8), (8, 8, 8), (0, -16, 8)):
            view = device.View((2, 2, 6), strides, np.dtype(dtype), gpu_data=Memory())
            assert typeof(view) == type_of(np.empty((2, 2, 6), dtype))


# refused


@pytest.mark.parametrize(("name", "change"), [
    ("q, k and v", {}), ("bias", {"bias": (5, 5)}), ("gate", {"gate": (5, 5)})])
def test_bfloat16_is_refused_with_its_reason(name, change):
    bfloat16 = ml_dtypes.bfloat16
    x = np.ones((1, 5, 4), bfloat16 if not change else np.float32)
    terms = {key: np.ones(shape, bfloat16) for key, shape in change.items()}
    _, saved = pyattn.attention.forward(x, x, x, **terms)
    reason = softmax.refuses(engine._problem(saved))
    assert reason == (f"{name} may be float16, float32, float64; got bfloat16, of which Numba has "
                      "no arrays")


@pytest.fixture
def clean():
    numba_cuda._missing.cache_clear()
    yield
    numba_cuda._missing.cache_clear()


def test_what_is_missing_is_named(monkeypatch, clean):
    monkeypatch.setattr(dispatch, "BACKENDS", ("cpu", "numba_cuda", "array_api"))
    monkeypatch.setitem(dispatch.PREFERENCE, "numpy", ("cpu", "numba_cuda", "array_api"))
    x = np.ones((1, 5, 4), np.float32)

    def told():
        numba_cuda._missing.cache_clear()
        with pyattn.use_backend("numba_cuda"), pytest.raises(pyattn.BackendError) as error:
            pyattn.attention(x, x, x)
        return str(error.value)

    if importlib.util.find_spec("numba_cuda") is not None:
        from numba import cuda

        monkeypatch.setattr(cuda, "is_available", lambda: False)
        assert "numba_cuda: Numba finds no GPU, or no driver" in told()
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *args: None if name == "numba_cuda" else found(name, *args))
    assert f"numba_cuda: numba-cuda is not installed: {INSTALL}" in told()


def test_importing_the_kernels_module_imports_no_numba():
    done = subprocess.run(
        [sys.executable, "-c", "import sys, pyattn.kernels.numba_cuda.softmax as s;"
         "assert 'numba' not in sys.modules and s.INDEXED is False"], check=False)
    assert done.returncode == 0


# on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(numba_cuda.missing(None) is not None, reason=str(numba_cuda.missing(None)))
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_on_a_gpu(case, dtype):
    cupy = pytest.importorskip("cupy")
    for shape in (SHAPES[5], SHAPES[6], SHAPES[7]):
        drawn = case.make(shape, dtype)
        arrays = {name: cupy.asarray(x) for name, x in drawn.arrays.items()}
        rng = np.random.default_rng(7)
        with pyattn.use_backend("numba_cuda"):
            (out, lse), saved = pyattn.attention.forward(**arrays, **drawn.options,
                                                         return_lse=True)
            dout = rng.standard_normal(out.shape).astype(dtype)
            dlse = rng.standard_normal(lse.shape).astype(lse.dtype)
            grads = saved.backward(cupy.asarray(dout), cupy.asarray(dlse))
            again = saved.backward(cupy.asarray(dout), cupy.asarray(dlse))
        for x, y in zip(grads, again, strict=True):
            np.testing.assert_array_equal(x.get(), y.get())
        judge(drawn, out.get(), lse.get(), dout, dlse, type(grads)(*(x.get() for x in grads)))
