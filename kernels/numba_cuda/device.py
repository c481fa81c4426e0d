"""The seam between launch code and where kernels run: CuPy, Numba's own arrays, or the simulator.

Nothing here waits for the GPU, but the first copy of what tells kernels where to go.
"""

from __future__ import annotations

import collections
import hashlib
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda

from pyattn.arrays import Array
from pyattn.checks import BackendError

from .compile import SIMULATED

CONSTANTS = 256
"""How many small arrays (lengths, layouts, positions) keep a copy on each device."""


class Device:
    """Where the arrays of a problem live."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return an array of the caller's kind."""
        raise NotImplementedError

    def view(self, x: Array) -> Any:
        """Return `x` as kernels take it."""
        raise NotImplementedError

    def constant(self, x: np.ndarray) -> Any:
        """Return what a host array holds as kernels take it; copied once, known by content."""
        raise NotImplementedError

    def kept(self, owner: Any, make: Callable[[], Any]) -> Any:
        """Return what `make` returned the first time, for as long as `owner` lives."""
        raise NotImplementedError

    def launch(self, kernel: Any, blocks: int, threads: int, *arguments: Any) -> None:
        """Run a kernel after what was launched before on the current stream."""
        raise NotImplementedError


class Simulator(Device):
    """NumPy arrays in Numba's simulator, which takes those in tuples as they are."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return np.empty(shape, dtype)

    def view(self, x: Array) -> Any:
        return x

    def constant(self, x: np.ndarray) -> Any:
        return x

    def kept(self, owner: Any, make: Callable[[], Any]) -> Any:
        return make()

    def launch(self, kernel: Any, blocks: int, threads: int, *arguments: Any) -> None:
        if blocks:
            kernel[blocks, threads](*arguments)


if not SIMULATED:
    from numba import types
    from numba.cuda.cudadrv.devicearray import DeviceNDArray
    from numba.cuda.np import numpy_support

    class View(DeviceNDArray):
        """Memory of any strides, of one type to Numba whether it is contiguous or not.

        Otherwise each mixture of layouts would be compiled by itself.
        """

        @property
        def _numba_type_(self) -> Any:
            return types.Array(numpy_support.from_dtype(self.dtype), self.ndim, "A")

    class Gpu(Device):
        """A GPU. Constants are allocated and copied by Numba, results by `library`."""

        def __init__(self, number: int) -> None:
            self.number = number
            self.constants: collections.OrderedDict[bytes, Any] = collections.OrderedDict()
            self.owned: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
            self.lock = threading.Lock()

        def view(self, x: Array) -> Any:
            # arrays tell the stream that they are made on: ours, so there is none to wait for
            array = cuda.as_cuda_array(x, sync=False)
            return View(array.shape, array.strides, array.dtype, gpu_data=array.gpu_data)

        def constant(self, x: np.ndarray) -> Any:
            x = np.ascontiguousarray(x)
            key = hashlib.blake2b(x, digest_size=16, person=x.dtype.str.encode()[:16],
                                  salt=str(x.shape).encode()[:16]).digest()
            with self.lock:
                if key not in self.constants:
                    self.constants[key] = self._copied(x)
                    if len(self.constants) > CONSTANTS:
                        self.constants.popitem(last=False)
                self.constants.move_to_end(key)
                return self.constants[key]

        def kept(self, owner: Any, make: Callable[[], Any]) -> Any:
            with self.lock:
                found = self.owned.get(owner)
            if found is None:
                found = make()
                with self.lock:
                    self.owned[owner] = found
            return found

        def _copied(self, x: np.ndarray) -> Any:
            """Return a copy, finished before any stream can read it."""
            copy = cuda.to_device(x if x.size else np.zeros(1, x.dtype))
            cuda.default_stream().synchronize()
            return View(x.shape, x.strides, x.dtype, gpu_data=copy.gpu_data)

    class CupyGpu(Gpu):
        """CuPy arrays: results from its pool, kernels on its current stream."""

        def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
            import cupy

            return cupy.empty(shape, dtype)

        def launch(self, kernel: Any, blocks: int, threads: int, *arguments: Any) -> None:
            import cupy

            if blocks:
                stream = cupy.cuda.get_current_stream().ptr
                kernel[blocks, threads, cuda.external_stream(stream) if stream else 0](*arguments)

    class NumbaGpu(Gpu):
        """Numba's device arrays, on its default stream."""

        def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
            return cuda.device_array(shape, dtype)

        def launch(self, kernel: Any, blocks: int, threads: int, *arguments: Any) -> None:
            if blocks:
                kernel[blocks, threads](*arguments)


_devices: dict[tuple[str, int], Device] = {}
_lock = threading.Lock()


def of(x: Array) -> Device:
    """Return the device of `x`, which must be the current one."""
    if SIMULATED:
        return _known(("simulator", 0), Simulator)
    current = cuda.get_current_device().id
    if type(x).__module__.partition(".")[0] == "cupy":
        own = x.device.id
        found = _known(("cupy", own), lambda: CupyGpu(own))
    else:
        own = cuda.as_cuda_array(x, sync=False).gpu_data.context.device.id
        found = _known(("numba", own), lambda: NumbaGpu(own))
    if own != current:
        raise BackendError(f"q is on GPU {own}, but GPU {current} is the current one; use "
                           f"`with cupy.cuda.Device({own})`")
    return found


def _known(key: tuple[str, int], make: Callable[[], Device]) -> Device:
    with _lock:
        if key not in _devices:
            _devices[key] = make()
        return _devices[key]
