"""A device that executes kernels on the CPU: NumPy arrays, their own addresses, and a judge."""

from __future__ import annotations

import ctypes
import struct
import threading
from dataclasses import dataclass

import numpy as np

from .build import build, load

try:
    from pyattn.kernels.cuda.device import Kernel, encoded_tensor_map
except ImportError:
    @dataclass(frozen=True)
    class Kernel:
        """A stand-in until the package has its own."""

        file: str
        name: str
        macros: tuple[tuple[str, str | int], ...]
        threads: int

# in the order of EMULATOR_STATISTICS
STATISTICS = ("mma", "matrix_loads", "matrix_conflicts", "access_conflicts", "accesses", "copies",
              "barriers", "collectives", "switches", "wgmma", "tma")


class EmulatorError(AssertionError):
    """What the emulator found; names the kernel, the block, threads and lines."""


class _Region(ctypes.Structure):
    _fields_ = [("address", ctypes.c_uint64), ("bytes", ctypes.c_uint64)]


class _Options(ctypes.Structure):
    _fields_ = [
        ("seed", ctypes.c_uint32), ("races", ctypes.c_uint32), ("uninitialised", ctypes.c_uint32),
        ("conflicts", ctypes.c_uint32), ("step_limit", ctypes.c_uint64),
        ("region_count", ctypes.c_uint64), ("regions", ctypes.POINTER(_Region))]


class EmulatedDevice:
    """Executes kernels on NumPy arrays, and raises EmulatorError for what they do wrong.

    seed : int
        Order of threads and of blocks: 0 as they are numbered, others shuffled.
    races : bool
        Whether the race detector runs.
    uninitialised : bool
        Whether shared memory may be read before it was written (it holds NaN then).
    matrix_conflicts, access_conflicts : int or None
        How many bank conflicts a launch may have, of ldmatrix and of other accesses; None allows
        any. Those of other accesses are counted only if there is a bound, which takes time.
    """

    name = "emulator"
    multiprocessors = 4
    shared_memory = 227 * 1024

    def __init__(self, array=None, *, capability=(8, 0), folders=(), sanitize=False):
        self.capability = capability
        self.folders = tuple(folders)
        self.sanitize = sanitize
        self.seed = 0
        self.races = True
        self.uninitialised = False
        self.matrix_conflicts = 0
        self.access_conflicts = None
        self.step_limit = 1_000_000_000
        self.statistics = dict.fromkeys(STATISTICS, 0)
        self.launches = []
        self._lock = threading.Lock()

    def launch(self, kernel, grid, arguments, shared):
        """Execute a kernel; what it counted is in `statistics`, summed over launches."""
        grid = (grid,) if isinstance(grid, int) else tuple(grid)
        grid += (1,) * (3 - len(grid))
        if shared > self.shared_memory:
            raise EmulatorError(f"{kernel.name}: {shared} bytes of shared memory, a block may have "
                                f"{self.shared_memory}")
        library = load(build(kernel.file, kernel.name, kernel.macros, folders=self.folders,
                             sanitize=self.sanitize))
        arguments = np.ascontiguousarray(arguments).reshape(1)
        options = _Options(self.seed, self.races, self.uninitialised,
                           self.access_conflicts is not None, self.step_limit, 0, None)
        message = ctypes.create_string_buffer(4096)
        counted = (ctypes.c_uint64 * len(STATISTICS))()
        with self._lock:
            failed = getattr(library, f"emulate_{kernel.name}")(
                ctypes.c_void_p(arguments.ctypes.data), ctypes.c_uint64(arguments.nbytes),
                *map(ctypes.c_uint32, grid), ctypes.c_uint32(kernel.threads),
                ctypes.c_uint32(shared), ctypes.byref(options), message, len(message), counted)
        counts = dict(zip(STATISTICS, counted, strict=True))
        self.launches.append((kernel.name, counts))
        for name, count in counts.items():
            self.statistics[name] += count
        if failed:
            raise EmulatorError(f"{kernel.name}, {message.value.decode()}")
        for name in ("matrix_conflicts", "access_conflicts"):
            allowed = getattr(self, name)
            if allowed is not None and counts[name] > allowed:
                raise EmulatorError(f"{kernel.name}: {counts[name]} bank conflicts "
                                    f"({name}), {allowed} are allowed")

    def empty(self, shape, dtype):
        """Return a new array."""
        return np.empty(shape, dtype)

    def zeros(self, shape, dtype):
        """Return a new array of zeros."""
        return np.zeros(shape, dtype)

    def full(self, shape, value, dtype):
        """Return a new array of one value."""
        return np.full(shape, value, dtype)

    def constant(self, x):
        """Return `x`, which is where kernels can read it."""
        return np.ascontiguousarray(x)

    def workspace(self, nbytes):
        """Return new bytes."""
        return np.empty(nbytes, np.uint8)

    def address(self, array):
        """Return where the array's data are."""
        return array.__array_interface__["data"][0]

    def tensor_map(self, array, rows, columns):
        """Return 128 bytes by which the emulated copies find their way."""
        return encoded_tensor_map(_Driver, self.address(array), array.shape, array.strides,
                                  array.dtype.name, rows, columns)


class _Driver:
    """Stands in for the driver, whose own tensor maps nobody can read; see mbarriers.hpp."""

    MAGIC = 0x70616D726F736E74

    @staticmethod
    def cuTensorMapEncodeTiled(place, kind, rank, address, sizes, strides, box, steps,
                               interleave, swizzle, promotion, outside):
        assert (rank, interleave, swizzle, outside) == (4, 0, 3, 0)
        assert list(steps) == [1, 1, 1, 1]
        assert list(box)[2:] == [1, 1]
        described = struct.pack("<2Q4Q4Q2I", _Driver.MAGIC, address.value, *sizes, 2, *strides,
                                *list(box)[:2])
        ctypes.memmove(place, described.ljust(128, b"\0"), 128)
        return 0
