"""The device that kernels are launched on: the seam between launch code and CuPy.

Launch code asks `of(array)` for the device of its arrays, and that device for memory, for copies of
what was made on the host, and for launches. Nothing here waits for the GPU: everything is put into
the current stream of CuPy, memory comes from CuPy's pool, and both keep their order.
"""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import functools
import hashlib
import importlib.util
import sys
import tempfile
import threading
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pyattn.arrays import Array, dtype_name, library, require_current_device
from pyattn.checks import BackendError

from . import compile
from .compile import INSTALL, Macros

OLDEST = (8, 0)
"""The first compute capability with what all kernels use: cp.async, and bfloat16 products."""

SHARED_UNASKED = 48 * 1024
"""Bytes of dynamic shared memory that a block may have without being asked for."""

BUSY_BYTES = 2**28
BUSY_TIMES = 8
"""What is written before something is timed: about a millisecond's work."""

CONSTANTS_NUMBER = 1024
CONSTANTS_BYTES = 2**28
"""How much is kept of copies of host arrays, on each device."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A function of a source file, in one configuration."""

    file: str
    name: str
    macros: Macros = ()
    threads: int = 128
    architecture_specific: bool = False
    """Whether it uses what only one capability has, and is compiled for "sm_90a"."""


class Device(Protocol):
    """What launch code may ask for. Arrays are of the caller's library."""

    @property
    def name(self) -> str:
        """The product, "NVIDIA H200"."""

    @property
    def capability(self) -> tuple[int, int]:
        """The compute capability, (9, 0)."""

    @property
    def multiprocessors(self) -> int:
        """How many there are."""

    @property
    def shared_memory(self) -> int:
        """Bytes that a block may have."""

    @property
    def compiler(self) -> str:
        """What compiles kernels for it, "NVRTC 13.0"."""

    @property
    def stream(self) -> Hashable:
        """The current stream, for keys of what is kept from call to call.

        Memory may be used in the stream that it was asked for in, and in no other.
        """

    @property
    def generic(self) -> bool:
        """Whether kernels are built for more than a problem has: fewer to build, slower to run."""

    def launch(self, kernel: Kernel, grid: int | tuple[int, int, int], arguments: np.ndarray,
               shared: int) -> None:
        """Put a launch into the current stream; a grid without blocks launches nothing.

        `arguments` is one structure, whose dtype is laid out like the kernel's; it may be written
        to again when this returns. `shared` is in bytes.
        """

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array that holds anything."""

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array of zeros."""

    def full(self, shape: tuple[int, ...], value: float, dtype: Any) -> Array:
        """An array of one value."""

    def workspace(self, nbytes: int) -> Array:
        """Bytes that hold anything."""

    def constant(self, x: np.ndarray) -> Array:
        """A copy of `x` on the device, which nobody may write to: calls may share it."""

    def address(self, array: Array) -> int:
        """Where the first element is."""

    def seconds(self, call: Callable[[], Any]) -> float:
        """How long what `call` puts into the current stream takes; this waits for it."""

    def tensor_map(self, array: Array, rows: int, columns: int) -> bytes:
        """128 bytes that tell the tensor memory accelerator how (B, H, N, D) lies in memory.

        It copies boxes of `rows` tokens and `columns` of their 16-bit numbers (64 at most), with
        the 128-byte swizzle and zeros beyond the edges. Coordinates are (column, token, head,
        item).
        """


def of(array: Array) -> Device:
    """Return the device that `array` lives on, which must be the current one."""
    name = library(array)
    factory = _factories.get(name)
    if factory is None:
        raise BackendError(f"backend cuda takes CuPy arrays; got {name} arrays")
    return factory(array)


def register(library_name: str, factory: Callable[[Array], Device] | None) -> None:
    """Have `of` ask `factory` about arrays of a library; None takes that back."""
    if factory is None:
        _factories.pop(library_name, None)
    else:
        _factories[library_name] = factory


def missing(array: Array) -> str | None:
    """Say what these kernels lack on the device of `array`, or None."""
    if library(array) != "cupy":
        return None if library(array) in _factories else "it takes CuPy arrays"
    return _missing(array.device.id)


@functools.cache
def _missing(number: int) -> str | None:
    import cupy

    if cupy.cuda.runtime.is_hip:
        return "its kernels are for NVIDIA GPUs; this CuPy is built for AMD's"
    device = _cupy_device(number)
    if device.capability < OLDEST:
        return (f"it needs compute capability {'.'.join(map(str, OLDEST))}; {device.name} has "
                f"{'.'.join(map(str, device.capability))}")
    try:
        compile.nvrtc_version()
        compile.architecture(device.capability)
    except BackendError as error:
        return str(error)
    return None


def unavailable() -> str | None:
    """Say why no CuPy array can exist on this machine, or None; this imports CuPy."""
    if importlib.util.find_spec("cupy") is None:
        return f"CuPy is not installed: {INSTALL}"
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported: {error}"
    try:
        if cupy.cuda.runtime.getDeviceCount() > 0:
            return None
        found = "CuPy finds none"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        found = str(error)
    return f"no GPU can be used ({found}); it takes one of NVIDIA's and its driver"


class CupyDevice:
    """A GPU, through CuPy."""

    generic = False

    def __init__(self, number: int) -> None:
        import cupy

        self._cupy = cupy
        properties = cupy.cuda.runtime.getDeviceProperties(number)
        self.number = number
        self.name: str = properties["name"].decode()
        self.capability: tuple[int, int] = (properties["major"], properties["minor"])
        self.multiprocessors: int = properties["multiProcessorCount"]
        self.shared_memory: int = properties["sharedMemPerBlockOptin"]
        self._functions: dict[Kernel, Any] = {}
        self._granted: dict[Kernel, int] = {}
        self._constants = Constants(CONSTANTS_NUMBER, CONSTANTS_BYTES)
        self._lock = threading.Lock()

    @property
    def compiler(self) -> str:
        """See `Device`."""
        return f"NVRTC {'.'.join(map(str, compile.nvrtc_version()))}"

    @property
    def stream(self) -> Hashable:
        """See `Device`."""
        stream = self._cupy.cuda.get_current_stream().ptr
        # every thread has one of its own by this number
        own = stream == self._cupy.cuda.Stream.ptds.ptr
        return stream, threading.get_ident() if own else 0

    def launch(self, kernel: Kernel, grid: int | tuple[int, int, int], arguments: np.ndarray,
               shared: int) -> None:
        """See `Device`."""
        blocks = (grid, 1, 1) if isinstance(grid, int) else grid
        if 0 in blocks:
            return
        function = self._functions.get(kernel) or self._load(kernel)
        if shared > self._granted[kernel]:
            function.max_dynamic_shared_size_bytes = shared
            self._granted[kernel] = shared
        # CuPy passes an array of size 1 by value
        function(blocks, (kernel.threads, 1, 1), (arguments,), shared_mem=shared)

    def _load(self, kernel: Kernel) -> Any:
        with self._lock:
            if kernel not in self._functions:
                architecture = compile.architecture(self.capability,
                                                    specific=kernel.architecture_specific)
                code = compile.cubin(kernel.file, kernel.macros, architecture)
                # a file of our own: the one in the cache may change after it was checked
                with tempfile.TemporaryDirectory(prefix="pyattn-") as folder:
                    path = Path(folder) / "kernel.cubin"
                    path.write_bytes(code)
                    function = self._cupy.RawModule(path=str(path)).get_function(kernel.name)
                self._granted[kernel] = SHARED_UNASKED
                self._functions[kernel] = function
        return self._functions[kernel]

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """See `Device`."""
        return self._cupy.empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """See `Device`."""
        return self._cupy.zeros(shape, dtype)

    def full(self, shape: tuple[int, ...], value: float, dtype: Any) -> Array:
        """See `Device`."""
        return self._cupy.full(shape, value, dtype)

    def workspace(self, nbytes: int) -> Array:
        """See `Device`."""
        return self._cupy.empty(nbytes, np.uint8)

    def constant(self, x: np.ndarray) -> Array:
        """See `Device`."""
        return self._constants.get(self.stream, x, self._cupy.asarray)

    def address(self, array: Array) -> int:
        """See `Device`."""
        return array.data.ptr

    def seconds(self, call: Callable[[], Any]) -> float:
        """See `Device`."""
        start, stop = self._cupy.cuda.Event(), self._cupy.cuda.Event()
        # keeps the device busy while the host puts in what is timed, which then waits for nothing
        written = self._cupy.empty(BUSY_BYTES, np.uint8)
        for value in range(BUSY_TIMES):
            written.fill(value)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return self._cupy.cuda.get_elapsed_time(start, stop) / 1e3

    def tensor_map(self, array: Array, rows: int, columns: int) -> bytes:
        """See `Device`."""
        return encoded_tensor_map(_driver(), array.data.ptr, array.shape, array.strides,
                                  dtype_name(array), rows, columns)


class Constants:
    """Copies of host arrays by their content, the oldest given up first."""

    def __init__(self, number: int, nbytes: int) -> None:
        self.number, self.nbytes = number, nbytes
        self._held = 0
        self._copies: collections.OrderedDict[tuple[Any, ...], Array] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, stream: Hashable, x: np.ndarray, copy: Callable[[np.ndarray], Array]) -> Array:
        """Return the copy of `x` that belongs to `stream`, made by `copy` if there is none."""
        x = np.require(x, requirements="C")
        digest = hashlib.blake2b(x.reshape(-1).view(np.uint8).data, digest_size=16).digest()
        key = (stream, x.dtype.str, x.shape, digest)
        with self._lock:
            found = self._copies.get(key)
            if found is None:
                found = self._copies[key] = copy(x)
                self._held += x.nbytes
                while len(self._copies) > 1 and (
                        len(self._copies) > self.number or self._held > self.nbytes):
                    _, given_up = self._copies.popitem(last=False)
                    self._held -= given_up.nbytes
            else:
                self._copies.move_to_end(key)
        return found


SWIZZLE_BYTES = 128
TENSOR_MAP_BYTES = 128
TENSOR_MAP_ALIGNMENT = 64
TENSOR_MAP_TYPES = {"float16": 6, "bfloat16": 9}
"""CU_TENSOR_MAP_DATA_TYPE_..."""
NO_INTERLEAVE = 0
SWIZZLE_128B = 3
PROMOTION_L2_256B = 3
ZEROS_OUTSIDE = 0


def encoded_tensor_map(driver: Any, address: int, shape: tuple[int, ...], strides: tuple[int, ...],
                       dtype: str, rows: int, columns: int) -> bytes:
    """Return what cuTensorMapEncodeTiled of `driver` makes of an array (B, H, N, D)."""
    itemsize = 2
    if dtype not in TENSOR_MAP_TYPES or columns * itemsize > SWIZZLE_BYTES:
        raise BackendError("a tensor map takes boxes of up to 64 columns of "
                           f"{' or '.join(TENSOR_MAP_TYPES)}; got {columns} of {dtype}")
    # along an axis of one element no step is ever taken, whatever its stride says
    steps = [SWIZZLE_BYTES if size == 1 else stride
             for size, stride in zip(shape[:3], strides[:3], strict=True)]
    if address % 16 or strides[3] != itemsize or any(step <= 0 or step % 16 for step in steps):
        raise BackendError("a tensor map takes dense rows at multiples of 16 bytes; got strides "
                           f"{strides} from {address:#x}")
    rank = len(shape)
    place = ctypes.create_string_buffer(TENSOR_MAP_BYTES + TENSOR_MAP_ALIGNMENT)
    at = -ctypes.addressof(place) % TENSOR_MAP_ALIGNMENT
    status = driver.cuTensorMapEncodeTiled(
        ctypes.c_void_p(ctypes.addressof(place) + at), TENSOR_MAP_TYPES[dtype], rank,
        ctypes.c_void_p(address), (ctypes.c_uint64 * rank)(*shape[::-1]),
        (ctypes.c_uint64 * (rank - 1))(*steps[::-1]),
        (ctypes.c_uint32 * rank)(columns, rows, 1, 1), (ctypes.c_uint32 * rank)(*[1] * rank),
        NO_INTERLEAVE, SWIZZLE_128B, PROMOTION_L2_256B, ZEROS_OUTSIDE)
    if status:
        raise BackendError(f"cuTensorMapEncodeTiled refuses shape {shape}, strides {strides}, "
                           f"boxes of {rows} x {columns} with error {status}")
    return place.raw[at:at + TENSOR_MAP_BYTES]


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


@functools.cache
def _cupy_device(number: int) -> CupyDevice:
    return CupyDevice(number)


def _of_cupy(array: Array) -> Device:
    require_current_device(array)
    return _cupy_device(array.device.id)


_factories: dict[str, Callable[[Array], Device]] = {"cupy": _of_cupy}
