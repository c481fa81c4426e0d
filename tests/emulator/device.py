"""A device that executes kernels on the CPU: NumPy arrays, their own addresses, and a judge."""

from __future__ import annotations

import ctypes
import re
import struct
import threading
import time
import weakref

import numpy as np
from pyattn.kernels.cuda.device import encoded_tensor_map

from .build import build, line_of, load

# in the order of EMULATOR_STATISTICS
STATISTICS = ("mma", "matrix_loads", "matrix_conflicts", "access_conflicts", "accesses", "copies",
              "barriers", "collectives", "switches", "wgmma", "tma")
ADDRESS_IN_TENSOR_MAP = 8     # in the emulator's own ones
_ONE_AT_A_TIME = threading.Lock()     # libraries have one state each
GUARDS = {None: 0, "end": 1, "start": 2}


class EmulatorError(AssertionError):
    """What the emulator found; names the kernel, the block, threads and lines."""


class _Region(ctypes.Structure):
    _fields_ = (("address", ctypes.c_uint64), ("bytes", ctypes.c_uint64),
                ("writable", ctypes.c_uint32), ("name", ctypes.c_char * 44))


class _Options(ctypes.Structure):
    _fields_ = (("seed", ctypes.c_uint32), ("races", ctypes.c_uint32),
                ("uninitialised", ctypes.c_uint32), ("conflicts", ctypes.c_uint32),
                ("step_limit", ctypes.c_uint64), ("time_limit", ctypes.c_uint32),
                ("guard", ctypes.c_uint32), ("region_count", ctypes.c_uint32),
                ("pointer_count", ctypes.c_uint32), ("regions", ctypes.POINTER(_Region)),
                ("pointers", ctypes.POINTER(ctypes.c_uint32)))


def pointers(dtype, offset=0, name=""):
    """The (offset, name) of each address: in fields of uint64, and in tensor maps, V128."""
    if dtype.subdtype is not None:
        inner, shape = dtype.subdtype
        return [pointer for i in range(int(np.prod(shape)))
                for pointer in pointers(inner, offset + i * inner.itemsize, f"{name}[{i}]")]
    if dtype.names is None:
        if dtype == np.dtype("V128"):
            return [(offset + ADDRESS_IN_TENSOR_MAP, name)]
        return [(offset, name)] if dtype == np.uint64 else []
    return [pointer for field in dtype.names for pointer in
            pointers(dtype.fields[field][0], offset + dtype.fields[field][1],
                     f"{name}.{field}" if name else field)]


class LiveArrays:
    """Where the arrays lie that launches were told the addresses of, as long as they live."""

    def __init__(self):
        self._found = {}

    def add(self, array):
        """Note an array, which may be a view."""
        owner = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        first = last = array.__array_interface__["data"][0]
        if array.size > 0:
            first, last = np.lib.array_utils.byte_bounds(array)
        self._found[first, last, array.flags.writeable] = weakref.ref(owner)

    def regions(self):
        """The (first, last, writable) of what there is, those that overlap as one."""
        self._found = {key: owner for key, owner in self._found.items() if owner() is not None}
        merged = []
        # the longest of those that begin together comes first: an empty one is then part of it
        for first, last, writable in sorted(self._found, key=lambda x: (x[0], -x[1], x[2])):
            if merged and first < merged[-1][1]:
                before = merged[-1]
                merged[-1] = (before[0], max(last, before[1]), writable or before[2])
            else:
                merged.append((first, last, writable))
        return merged


class EmulatedDevice:
    """Executes kernels on NumPy arrays, and raises EmulatorError for what they do wrong.

    folders
        Where sources are looked for, before those of the package.
    flags
        What the compiler is told beyond build.FLAGS.
    seed : int
        Order of threads and of blocks: 0 as they are numbered, others shuffled.
    races : bool
        Whether the race detector runs.
    uninitialised : bool
        Whether shared memory may be read before it was written (it holds NaN then).
    guard : "end", "start" or None
        Whether arrays are moved for a launch to pages that have a forbidden page right behind (or
        before) them, so that a kernel cannot touch what is beside them. Then the arguments may
        hold no address that `address` was not asked for. Read-only arrays are so for kernels too.
    matrix_conflicts, access_conflicts : int or None
        How many bank conflicts a launch may have, of ldmatrix and of other accesses; None allows
        any. Those of other accesses are counted only if there is a bound, which takes time.
    """

    name = "emulator"
    compiler = "g++"
    generic = False
    multiprocessors = 4
    shared_memory = 227 * 1024
    stream = 0

    def __init__(self, array=None, *, capability=(8, 0), folders=(), flags=()):
        self.capability = capability
        self.folders = tuple(folders)
        self.flags = tuple(flags)
        self.seed = 0
        self.races = True
        self.uninitialised = False
        self.guard = "end"
        self.matrix_conflicts = 0
        self.access_conflicts = None
        self.step_limit = 1_000_000_000
        self.time_limit = 60
        self.statistics = dict.fromkeys(STATISTICS, 0)
        self.launches = []
        self._arrays = LiveArrays()
        self._libraries = {}

    def launch(self, kernel, grid, arguments, shared):
        """Execute a kernel; what it counted is in `statistics`, summed over launches."""
        x, y, z = (grid, 1, 1) if isinstance(grid, int) else grid
        if 0 in (x, y, z):
            return
        if shared > self.shared_memory:
            raise EmulatorError(f"{kernel.name}: {shared} bytes of shared memory, a block may have "
                                f"{self.shared_memory}")
        library = self._libraries.get(kernel)
        if library is None:
            library = build(kernel.file, kernel.name, kernel.macros, folders=self.folders,
                            flags=self.flags)
            self._libraries[kernel] = library
        arguments = np.ascontiguousarray(arguments).reshape(1)
        options, _kept = self._options(arguments)
        message = ctypes.create_string_buffer(8192)
        counted = (ctypes.c_uint64 * len(STATISTICS))()
        with _ONE_AT_A_TIME:
            failed = getattr(load(library), f"emulate_{kernel.name}")(
                ctypes.c_void_p(arguments.ctypes.data), ctypes.c_uint64(arguments.nbytes),
                *map(ctypes.c_uint32, (x, y, z)), ctypes.c_uint32(kernel.threads),
                ctypes.c_uint32(shared), ctypes.byref(options), message, len(message), counted)
        counts = dict(zip(STATISTICS, counted, strict=True))
        self.launches.append((kernel.name, counts))
        for name, count in counts.items():
            self.statistics[name] += count
        if failed:
            found = re.sub(r"\{\+(0x[0-9a-f]+)\}", lambda place: line_of(library, place[1]),
                           message.value.decode())
            raise EmulatorError(f"{kernel.name}, {found}")
        for name in ("matrix_conflicts", "access_conflicts"):
            allowed = getattr(self, name)
            if allowed is not None and counts[name] > allowed:
                raise EmulatorError(f"{kernel.name}: {counts[name]} bank conflicts "
                                    f"({name}), {allowed} are allowed")

    def _options(self, arguments):
        found = pointers(arguments.dtype)
        regions = (_Region * 0)()
        if self.guard is not None:
            values = {name: int(arguments.view(np.uint8)[at:at + 8].view(np.uint64)[0])
                      for at, name in found}
            used = []
            for first, last, writable in self._arrays.regions():
                names = [name for name, value in values.items()
                         if first <= value < max(last, first + 1)]
                if names:
                    used.append(_Region(first, last - first, writable,
                                        ", ".join(names).encode()[:43]))
            regions = (_Region * len(used))(*used)
        places = (ctypes.c_uint32 * len(found))(*[at for at, _ in found])
        options = _Options(self.seed, self.races, self.uninitialised,
                           self.access_conflicts is not None, self.step_limit, self.time_limit,
                           GUARDS[self.guard], len(regions), len(places), regions, places)
        return options, (regions, places)

    def empty(self, shape, dtype):
        """Return a new array, of NaN where there is such a number."""
        array = np.empty(shape, dtype)
        array.reshape(-1).view(np.uint8)[:] = 0xFF
        return array

    def zeros(self, shape, dtype):
        """Return a new array of zeros."""
        return np.zeros(shape, dtype)

    def full(self, shape, value, dtype):
        """Return a new array of one value."""
        return np.full(shape, value, dtype)

    def workspace(self, nbytes):
        """Return new bytes."""
        return self.empty(nbytes, np.uint8)

    def constant(self, x):
        """Return a copy of `x` that nobody may write to."""
        assert x.dtype.names is None, "CuPy knows no records"
        copy = np.array(x, order="C")
        copy.flags.writeable = False
        return copy

    def address(self, array):
        """Return where the array's first element is."""
        self._arrays.add(array)
        return array.__array_interface__["data"][0]

    def seconds(self, call):
        """Return how long a call takes, by the host's clock: it says nothing about kernels."""
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

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
