"""The seam between launch code and CuPy, by a CuPy that notes what it is asked for.

Needs no GPU. What needs CuPy itself (how it packs arguments, what it says without a driver) is
skipped where it is not installed.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import types

import ml_dtypes
import numpy as np
import pytest
from pyattn.kernels.cuda import compile
from pyattn.kernels.cuda import device as devices
from pyattn.kernels.cuda.device import Constants, CupyDevice, Kernel, encoded_tensor_map

import pyattn
from pyattn import arrays
from pyattn.checks import BackendError

KERNEL = Kernel("one.cu", "one", (("D", 64),), 96)
ARGUMENTS = np.zeros((), np.dtype([("at", "u8"), ("n", "i4")], align=True))


class Function:
    """A kernel of RawModule."""

    def __init__(self, name):
        self.name, self.launches = name, []
        self.granted = []

    def __setattr__(self, name, value):
        if name == "max_dynamic_shared_size_bytes":
            self.granted.append(value)
        super().__setattr__(name, value)

    def __call__(self, grid, block, given, shared_mem=0):
        self.launches.append((grid, block, given, shared_mem))


class Noting(types.ModuleType):
    """CuPy, as far as a device uses it."""

    def __init__(self):
        super().__init__("cupy")
        self.loaded, self.copied, self.current = [], [], 0
        properties = {"name": b"NVIDIA H200", "major": 9, "minor": 0, "multiProcessorCount": 132,
                      "sharedMemPerBlockOptin": 232448}
        runtime = types.SimpleNamespace(getDeviceProperties=lambda number: properties, is_hip=False)
        stream = types.SimpleNamespace(ptds=types.SimpleNamespace(ptr=2))
        self.cuda = types.SimpleNamespace(
            runtime=runtime, Stream=stream,
            get_current_stream=lambda: types.SimpleNamespace(ptr=self.current))
        self.empty, self.zeros, self.full = np.empty, np.zeros, np.full

    def asarray(self, x):
        self.copied.append(x)
        return x.copy()

    def RawModule(self, *, path):      # CuPy's name
        with open(path, "rb") as file:  # noqa: PTH123
            function = Function(file.read().decode())
        self.loaded.append(function)

        def get_function(name):
            assert name == KERNEL.name
            return function

        return types.SimpleNamespace(get_function=get_function)


@pytest.fixture
def cupy(monkeypatch):
    cupy = Noting()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(compile, "cubin", lambda file, macros, architecture:
                        f"{file} {macros} {architecture}".encode())
    monkeypatch.setattr(compile, "architecture", lambda capability, specific:
                        "sm_{}{}".format(*capability) + "a" * specific)
    return cupy


def test_what_a_device_tells(cupy):
    device = CupyDevice(0)
    assert (device.name, device.capability) == ("NVIDIA H200", (9, 0))
    assert (device.multiprocessors, device.shared_memory) == (132, 232448)
    assert device.workspace(80).nbytes == 80
    assert device.full((2, 3), 7, np.float32).sum() == 42


def test_a_kernel_is_loaded_once_and_launched_with_a_struct_by_value(cupy):
    device = CupyDevice(0)
    device.launch(KERNEL, 5, ARGUMENTS, 1000)
    device.launch(KERNEL, (4, 3, 2), ARGUMENTS, 0)
    [function] = cupy.loaded
    assert function.name == "one.cu (('D', 64),) sm_90"
    assert function.launches == [((5, 1, 1), (96, 1, 1), (ARGUMENTS,), 1000),
                                 ((4, 3, 2), (96, 1, 1), (ARGUMENTS,), 0)]
    device.launch(Kernel("one.cu", "one", (("D", 128),), 96), 1, ARGUMENTS, 0)
    assert len(cupy.loaded) == 2


def test_kernels_of_one_architecture_are_compiled_for_it(cupy):
    CupyDevice(0).launch(Kernel("one.cu", "one", (), 128, architecture_specific=True), 1,
                         ARGUMENTS, 0)
    assert cupy.loaded[0].name.endswith("sm_90a")


def test_a_grid_without_blocks_launches_nothing(cupy):
    """CuPy would launch one block."""
    device = CupyDevice(0)
    for grid in (0, (0, 1, 1), (3, 0, 1)):
        device.launch(KERNEL, grid, ARGUMENTS, 0)
    assert cupy.loaded == []


def test_much_shared_memory_is_asked_for_once(cupy):
    device = CupyDevice(0)
    for nbytes in (48 * 1024, 60_000, 50_000, 60_000, 90_000):
        device.launch(KERNEL, 1, ARGUMENTS, nbytes)
    assert cupy.loaded[0].granted == [60_000, 90_000]


def test_threads_load_a_kernel_once(cupy, monkeypatch):
    device, barrier = CupyDevice(0), threading.Barrier(4)

    def launch():
        barrier.wait()
        device.launch(KERNEL, 1, ARGUMENTS, 0)

    started = [threading.Thread(target=launch) for _ in range(4)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    assert len(cupy.loaded) == 1
    assert len(cupy.loaded[0].launches) == 4


# constants


def test_host_arrays_are_copied_once_by_their_content(cupy):
    device = CupyDevice(0)
    x = np.arange(6, dtype=np.int32)
    first = device.constant(x)
    assert device.constant(x.copy()) is first
    assert device.constant(np.arange(12, dtype=np.int32)[::2] // 2) is first
    for other in (x.reshape(2, 3), x.astype(np.uint32), x + 1, x[:0], np.int32(3)[...]):
        assert device.constant(other) is not first
        assert device.constant(other).shape == other.shape
    x[0] = 9
    assert device.constant(x)[0] == 9
    assert first[0] == 0


def test_every_stream_has_copies_of_its_own(cupy):
    device, x = CupyDevice(0), np.arange(3)
    first = device.constant(x)
    cupy.current = 77
    assert device.constant(x) is not first
    cupy.current = 0
    assert device.constant(x) is first
    cupy.current = cupy.cuda.Stream.ptds.ptr
    mine, theirs = device.constant(x), []
    thread = threading.Thread(target=lambda: theirs.append(device.constant(x)))
    thread.start()
    thread.join()
    assert theirs[0] is not mine


def test_the_oldest_constants_are_given_up():
    kept, copies = Constants(number=3, nbytes=100), []

    def get(content):
        return kept.get(0, np.full(*content, np.uint8), lambda x: copies.append(x) or x)

    for content in ((10, 1), (10, 2), (10, 3), (10, 1), (10, 4), (10, 1), (10, 3)):
        get(content)
    assert len(copies) == 4     # 2 was given up for 4
    get((10, 2))
    assert len(copies) == 5
    get((95, 1))                # leaves no room for the others, and is kept
    get((95, 1))
    get((200, 7))
    get((200, 7))
    assert len(copies) == 7


# tensor maps


class Driver:
    """libcuda, as far as tensor maps go."""

    def __init__(self, status=0):
        self.status, self.asked = status, None

    def cuTensorMapEncodeTiled(self, place, dtype, rank, address, sizes, strides, box, steps,
                               *modes):
        assert place.value % 64 == 0
        self.asked = (dtype, rank, address.value, list(sizes), list(strides), list(box),
                      list(steps), modes)
        ctypes.memmove(place, bytes(range(128)), 128)
        return self.status


def test_tensor_maps_begin_with_the_innermost_axis():
    driver = Driver()
    # (B, N, H, D) in memory, seen as (B, H, N, D)
    x = np.zeros((2, 50, 3, 128), ml_dtypes.bfloat16).swapaxes(1, 2)
    made = encoded_tensor_map(driver, 4096, x.shape, x.strides, "bfloat16", 128, 64)
    assert made == bytes(range(128))
    assert driver.asked == (9, 4, 4096, [128, 50, 3, 2], [768, 256, 38400], [64, 128, 1, 1],
                            [1, 1, 1, 1], (0, 3, 3, 0))


def test_strides_of_single_elements_do_not_matter():
    driver = Driver()
    encoded_tensor_map(driver, 4096, (1, 1, 9, 64), (6, 0, 128, 2), "float16", 64, 64)
    assert driver.asked[0] == 6
    assert driver.asked[4] == [128, 128, 128]


@pytest.mark.parametrize(("change", "message"), [
    ({"address": 4104}, "multiples of 16 bytes"), ({"dtype": "float32"}, "got 64 of float32"),
    ({"columns": 65}, "got 65"), ({"strides": (16384, 8192, 128, 4)}, "dense rows"),
    ({"strides": (0, 8192, 128, 2)}, "multiples of 16"), ({"status": 1}, "error 1"),
    ({"strides": (16384, 8192, 130, 2)}, "multiples of 16")])
def test_what_a_tensor_map_cannot_tell_is_refused(change, message):
    given = {"address": 4096, "shape": (2, 2, 64, 64), "strides": (16384, 8192, 128, 2),
             "dtype": "float16", "rows": 64, "columns": 64} | change
    driver = Driver(given.pop("status", 0))
    with pytest.raises(BackendError, match=message):
        encoded_tensor_map(driver, **given)


# what is missing


def test_devices_of_other_arrays_are_registered():
    x = np.ones(2)
    with pytest.raises(BackendError, match="takes CuPy arrays; got numpy arrays"):
        devices.of(x)
    assert devices.missing(x) == "it takes CuPy arrays"
    devices.register("numpy", lambda array: "a device")
    try:
        assert devices.of(x) == "a device"
        assert devices.missing(x) is None
    finally:
        devices.register("numpy", None)
    with pytest.raises(BackendError, match="got numpy arrays"):
        devices.of(x)


@pytest.mark.parametrize("backend", ["cuda", "numba_cuda"])
def test_forced_on_numpy_arrays(backend, monkeypatch):
    x = np.ones((1, 4, 8), np.float32)
    monkeypatch.setattr(devices, "unavailable", lambda: "CuPy is not installed: do this")
    with pytest.raises(BackendError, match=f"backend {backend} takes CuPy arrays; got numpy arrays"
                                           ".*cpu, array_api.*CuPy is not installed: do this"), \
            pyattn.use_backend(backend):
        pyattn.attention(x, x, x)
    monkeypatch.setattr(devices, "unavailable", lambda: None)
    with pytest.raises(BackendError, match=r"for these there is cpu, array_api$"), \
            pyattn.use_backend(backend):
        pyattn.attention(x, x, x)


def test_without_cupy_it_is_named_with_how_to_get_it(monkeypatch):
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    assert devices.unavailable() == ('CuPy is not installed: pip install "pyattn[cuda13]" (with a '
                                     'driver for CUDA 12: "pyattn[cuda12]")')


def test_without_a_gpu_that_is_said(monkeypatch):
    cupy = pytest.importorskip("cupy")

    def none():
        raise cupy.cuda.runtime.CUDARuntimeError(35)

    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", none)
    assert "no GPU can be used (cudaErrorInsufficientDriver" in devices.unavailable()


def test_a_cupy_for_other_gpus_is_told(cupy, monkeypatch):
    monkeypatch.setattr(cupy.cuda.runtime, "is_hip", True)
    devices._missing.cache_clear()
    assert "built for AMD's" in devices._missing(0)
    devices._missing.cache_clear()


def test_a_missing_compiler_passes_the_backend_over(cupy, monkeypatch):
    def missing():
        raise BackendError("NVRTC cannot be loaded")

    monkeypatch.setattr(compile, "nvrtc_version", missing)
    devices._missing.cache_clear()
    devices._cupy_device.cache_clear()
    assert devices._missing(0) == "NVRTC cannot be loaded"
    devices._missing.cache_clear()
    devices._cupy_device.cache_clear()


def test_arrays_on_a_gpu_without_cupy_are_refused(monkeypatch):
    class Lent:
        __cuda_array_interface__ = None

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "cupy":
                raise ImportError("none here")

    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(BackendError, match=r'used through CuPy.*pip install "pyattn\[cuda13\]"'):
        arrays.taken((Lent(),))


# CuPy itself


def test_cupy_takes_a_struct_of_any_size_by_value():
    """It packs the arguments before it asks for a GPU."""
    cupy = pytest.importorskip("cupy")
    if cupy.cuda.is_available():
        pytest.skip("a function that is nowhere must not be launched")
    function = cupy.cuda.Function.__new__(cupy.cuda.Function)
    stream = types.SimpleNamespace(ptr=0)
    wide = np.zeros((), np.dtype([("map", "V128"), ("at", "u8"), ("n", "i4")], align=True))
    for arguments in (ARGUMENTS, wide):
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError):
            function((1, 1, 1), (32, 1, 1), (arguments,), stream=stream)
    with pytest.raises(TypeError, match="size one"):
        function((1, 1, 1), (32, 1, 1), (np.zeros(2, ARGUMENTS.dtype),), stream=stream)
