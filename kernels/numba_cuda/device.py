"""The seam between launch code and where kernels run: a GPU with CuPy's arrays, or the simulator.

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
        """Return an array of the caller's kind."""
        return np.empty(shape, dtype)

    def view(self, x: Array) -> Any:
        """Return `x` as kernels take it."""
        return x

    def constant(self, x: np.ndarray) -> Any:
        """Return what a host array holds."""
        return x

    def kept(self, owner: Any, make: Callable[[], Any]) -> Any:
        """Return what `make` returned first."""
        return make()

    def launch(self, kernel: Any, blocks: int, threads: int, *arguments: Any) -> None:
        """Run a kernel."""
        if blocks:
            kernel[blocks, threads](*arguments)


if not SIMULATED:
    from numba import types
    from numba.cuda.core import config
    from numba.cuda.cudadrv.devicearray import DeviceNDArray
    from numba.cuda.np import numpy_support

    # a short sequence has few blocks, which is not the caller's to mend
    config.CUDA_LOW_OCCUPANCY_WARNINGS = 0

    class View(DeviceNDArray):
        """Memory of any strides, of one type to Numba whether it is contiguous or not.

        Otherwise each mixture of layouts would be compiled by itself.
        """

        @property
        def _numba_type_(self) -> Any:
            return types.Array(numpy_support.from_dtype(self.dtype), self.ndim, "A")

    class Gpu(Device):
        """A GPU: results from CuPy's pool, kernels on its current stream.

        Constants are Numba's, whose memory is not given to others while kernels may read it.
        """

        def __init__(self) -> None:
            self.constants: collections.OrderedDict[Any, Any] = collections.OrderedDict()
            self.owned: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
            self.lock = threading.Lock()

        def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
            """Return an array of the caller's kind."""
            import cupy

            return cupy.empty(shape, dtype)

        def view(self, x: Array) -> Any:
            """Return `x` as kernels take it."""
            # arrays tell the stream that they are made on: ours, so there is none to wait for
            array = cuda.as_cuda_array(x, sync=False)
            return View(array.shape, array.strides, array.dtype, gpu_data=array.gpu_data)

        def constant(self, x: np.ndarray) -> Any:
            """Return what a host array holds."""
            x = np.ascontiguousarray(x)
            key = x.shape, x.dtype.str, hashlib.blake2b(x, digest_size=16).digest()
            with self.lock:
                if key not in self.constants:
                    self.constants[key] = self._copied(x)
                    if len(self.constants) > CONSTANTS:
                        self.constants.popitem(last=False)
                self.constants.move_to_end(key)
                return self.constants[key]

        def kept(self, owner: Any, make: Callable[[], Any]) -> Any:
            """Return what `make` returned first."""
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

        def launch(self, kernel: Any, blocks: int, threads: int, *arguments: Any) -> None:
            """Run a kernel."""
            import cupy

            if blocks:
                stream = cupy.cuda.get_current_stream().ptr
                kernel[blocks, threads, cuda.external_stream(stream) if stream else 0](*arguments)


_devices: dict[tuple[str, int], Device] = {}
_lock = threading.Lock()


def of(x: Array) -> Device:
    """Return the device of `x`, which is CuPy's current one."""
    if SIMULATED:
        return _known(("simulator", 0), Simulator)
    own = x.device.id
    # each thread has a current device for Numba, too, which does not follow CuPy's
    if cuda.get_current_device().id != own:
        cuda.select_device(own)
    return _known(("gpu", own), Gpu)


def _known(key: tuple[str, int], make: Callable[[], Device]) -> Device:
    with _lock:
        if key not in _devices:
            _devices[key] = make()
        return _devices[key]
