"""A stand-in for CuPy without a GPU: NumPy's results behind CuPy's refusals.

Arrays live in a "memory" of their own. As with CuPy's, NumPy functions do not take them, they meet
no NumPy array in an operation, an index or an assignment, and only `get` and `asnumpy` bring them
to the host. Reductions give arrays without axes, never NumPy scalars. What was called, and how, is
kept, so that it can be compared with the signatures of the real CuPy.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import inspect
import operator
import sys
import types
from pathlib import Path
from typing import NamedTuple

import numpy as np

MIXED = "Unsupported type <class 'numpy.ndarray'>"

LACKED = set("""
    False_ ScalarType True_ array asarray asmatrix block bmat busday_count busday_offset
    busdaycalendar bytes_ character clongdouble complex256 datetime64 datetime_as_string
    datetime_data einsum_path errstate flexible float128 frompyfunc fromregex geomspace
    get_include getbufsize geterr geterrcall histogram_bin_edges info insert is_busday isnat
    little_endian longdouble matrix matrix_norm matvec memmap multi_dot nanpercentile nanquantile
    ndarray ndenumerate nditer nested_iters object_ polyder polydiv polyint recarray record
    sctypeDict setbufsize seterr seterrcall show_runtime spacing str_ svdvals test timedelta64
    typecodes unstack vecdot vecmat vector_norm void""".split())
"""What NumPy or its linalg has and CuPy 14 has not, or not as NumPy has it."""

IN_LINALG = {"diagonal", "outer", "tensordot", "trace"}
"""What CuPy has, but not there."""

calls = collections.defaultdict(set)
"""How each function was called: the number of positional arguments, and the keywords."""

synchronisations = collections.Counter()
"""What made the host wait for the device, by its kind."""

crossings = []
"""Copies between host and device, in order, as `Crossing`."""

WAITING = {"argwhere", "bincount", "compress", "extract", "flatnonzero", "nonzero", "setdiff1d",
           "setxor1d", "unique", "unique_all", "unique_counts", "unique_inverse", "unique_values"}
"""Functions whose results have a shape that CuPy must ask the device for."""


class Crossing(NamedTuple):
    """One copy."""

    way: str
    """How it went: "to device", or what brought it home ("get", "item", "bool", ...)."""
    dtype: np.dtype
    nbytes: int
    by: tuple[str, str, str]
    """The file and the function that asked for it, and the function that called this one."""

    @classmethod
    def of(cls, way, x):
        """Note a copy of `x`, from within the function that is asked for it."""
        frame = sys._getframe(2)
        while frame.f_code.co_filename == __file__:
            frame = frame.f_back
        names = frame.f_code.co_name, frame.f_back.f_code.co_name
        crossings.append(cls(way, x.dtype, x.nbytes, (Path(frame.f_code.co_filename).name, *names)))


def wait(kind, x):
    """Note that the host waits for an array of the device."""
    synchronisations[kind] += 1
    Crossing.of(kind, x)


class Device:
    """A device; there is one."""

    def __init__(self, device=None):
        self.id = 0 if device is None else int(device)

    def __int__(self):
        return self.id

    def __eq__(self, other):
        return isinstance(other, Device) and other.id == self.id

    def __hash__(self):
        return self.id

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def __repr__(self):
        return f"<CUDA Device {self.id}>"


class Flags:
    """CuPy's flags know nothing of writing."""

    def __init__(self, flags):
        self.c_contiguous, self.f_contiguous = flags.c_contiguous, flags.f_contiguous
        self.owndata = flags.owndata


class ndarray:
    """An array "on the device"."""

    __array_ufunc__ = None
    __array_priority__ = 100

    def __init__(self, host):
        if host.dtype.names:
            raise TypeError(f"Unsupported type {host.dtype}")
        self._memory = host

    def __array__(self, dtype=None, copy=None):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()` "
                        "to construct a NumPy array explicitly.")

    shape = property(lambda self: self._memory.shape)
    ndim = property(lambda self: self._memory.ndim)
    dtype = property(lambda self: self._memory.dtype)
    size = property(lambda self: self._memory.size)
    nbytes = property(lambda self: self._memory.nbytes)
    itemsize = property(lambda self: self._memory.itemsize)
    strides = property(lambda self: self._memory.strides)
    flags = property(lambda self: Flags(self._memory.flags))
    device = property(lambda self: Device(0))
    T = property(lambda self: ndarray(self._memory.T))
    mT = property(lambda self: ndarray(self._memory.mT))

    def get(self):
        wait("get", self)
        return self._memory.copy()

    def item(self):
        wait("item", self)
        return self._memory.item()

    def astype(self, dtype, order="K", casting="unsafe", subok=None, copy=True):
        with np.errstate(all="ignore"):     # no GPU warns
            return ndarray(self._memory.astype(dtype, order=order, casting=casting, copy=copy))

    def copy(self, order="C"):
        return ndarray(self._memory.copy(order))

    def view(self, dtype):
        return ndarray(self._memory.view(dtype))

    def reshape(self, *shape):
        return ndarray(self._memory.reshape(*shape))

    def transpose(self, *axes):
        return ndarray(self._memory.transpose(*axes))

    def sum(self, axis=None):
        return wrapped(self._memory.sum(axis))

    def ravel(self):
        return ndarray(self._memory.ravel())

    def __len__(self):
        return len(self._memory)

    def __iter__(self):
        return (self[at] for at in range(len(self)))

    def __getitem__(self, key):
        return wrapped(self._memory[index(key)])

    def __setitem__(self, key, value):
        self._memory[index(key)] = host(value)

    def __bool__(self):
        wait("bool", self)
        return bool(self._memory)

    def __int__(self):
        wait("int", self)
        return int(self._memory)

    def __float__(self):
        wait("float", self)
        return float(self._memory)

    def __repr__(self):
        return f"strict {self._memory!r}"


def host(x):
    """The memory of an array, and scalars; NumPy arrays are refused."""
    if isinstance(x, ndarray):
        return x._memory
    if isinstance(x, np.ndarray):
        raise TypeError(MIXED)
    if isinstance(x, (list, tuple)):
        return type(x)(map(host, x))
    return x


def index(key):
    """An index, in which CuPy would copy lists and NumPy arrays to the device; they are refused."""
    parts = key if isinstance(key, tuple) else (key,)
    for part in parts:
        if isinstance(part, ndarray) and part.dtype == bool:
            synchronisations["index"] += 1
        if not (part is None or part is Ellipsis
                or isinstance(part, (slice, int, np.integer, ndarray))):
            raise TypeError(f"an index that is copied to the device: {type(part)}")
    return tuple(map(host, parts)) if isinstance(key, tuple) else host(key)


def wrapped(x):
    """Results as arrays, those without axes too."""
    if isinstance(x, np.ndarray | np.generic):
        return ndarray(np.asarray(x))
    if isinstance(x, (list, tuple)):
        made = map(wrapped, x)
        return type(x)(*made) if hasattr(x, "_fields") else type(x)(made)
    return x


def binary(name):
    function = getattr(operator, name)

    def method(self, other):
        if isinstance(other, np.ndarray):
            raise TypeError(MIXED)
        if not isinstance(other, ndarray | np.generic | int | float | complex):
            return NotImplemented
        with np.errstate(all="ignore"):
            return wrapped(function(self._memory, host(other)))

    def reflected(self, other):
        if isinstance(other, np.ndarray):
            raise TypeError(MIXED)
        with np.errstate(all="ignore"):
            return wrapped(function(host(other), self._memory))

    return method, reflected


def unary(name):
    function = getattr(operator, name)
    return lambda self: wrapped(function(self._memory))


def inplace(name):
    function = getattr(operator, name)

    def method(self, other):
        with np.errstate(all="ignore"):
            self._memory = function(self._memory, host(other))
        return self

    return method


for plain in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor",
              "lshift", "rshift", "matmul"):
    name = f"__{plain}__"
    forward, backward = binary(name)
    setattr(ndarray, name, forward)
    setattr(ndarray, f"__r{plain}__", backward)
    setattr(ndarray, f"__i{plain}__", inplace(f"__i{plain}__"))
for plain in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(ndarray, f"__{plain}__", binary(f"__{plain}__")[0])
ndarray.__hash__ = None
for plain in ("neg", "pos", "abs", "invert"):
    setattr(ndarray, f"__{plain}__", unary(f"__{plain}__"))


def function(name, original):
    """A function of NumPy, on arrays of this module alone."""
    @functools.wraps(original)
    def strict(*args, **kwargs):
        calls[name].add((len(args), frozenset(kwargs)))
        if name in WAITING or (name == "where" and len(args) == 1):
            synchronisations[name] += 1
        if name == "repeat" and isinstance(args[1], ndarray):
            raise TypeError("CuPy repeats by numbers of the host only")
        with np.errstate(all="ignore"):
            return wrapped(original(*map(host, args),
                                    **{key: host(value) for key, value in kwargs.items()}))

    return strict


def asarray(obj, dtype=None, order=None, *, blocking=False):
    """The way to the device: copies a NumPy array."""
    if hasattr(obj, "__cuda_array_interface__"):
        return ndarray(obj.lent)
    if isinstance(obj, ndarray):
        return obj if dtype is None else obj.astype(dtype, copy=False)
    copy = np.array(obj, dtype)
    Crossing.of("to device", copy)
    return ndarray(copy)


def array(obj, dtype=None, copy=True, order="K", subok=False, ndmin=0, *, blocking=False):
    made = asarray(obj, dtype)
    return made.copy() if copy and made is obj else made


def part(name, original, names):
    """A module with some of the functions of one of NumPy's."""
    module = types.ModuleType(name)
    for known in names:
        found = getattr(original, known)
        keep = isinstance(found, type | types.ModuleType) or not callable(found)
        setattr(module, known, found if keep else function(known, found))
    return module


def module(capability=(7, 0)):
    """Make the stand-in module, with one GPU of that compute capability."""
    cupy = part("cupy", np, [
        known for known in dir(np) if not known.startswith("_")
        and not isinstance(getattr(np, known), types.ModuleType)
        and known not in LACKED])
    cupy.ndarray, cupy.asarray, cupy.array, cupy.dtype = ndarray, asarray, array, np.dtype
    cupy.asnumpy = ndarray.get
    cupy.linalg = part("cupy.linalg", np.linalg, set(np.linalg.__all__) - LACKED - IN_LINALG)
    cupy.fft = part("cupy.fft", np.fft, np.fft.__all__)
    cupy.cuda = types.ModuleType("cupy.cuda")
    cupy.cuda.device = types.ModuleType("cupy.cuda.device")
    cupy.cuda.Device = cupy.cuda.device.Device = Device
    properties = {"name": b"a stand-in", "major": capability[0], "minor": capability[1],
                  "multiProcessorCount": 8, "sharedMemPerBlockOptin": 2**16}
    cupy.cuda.runtime = types.SimpleNamespace(
        is_hip=False, getDevice=lambda: 0, getDeviceCount=lambda: 1,
        getDeviceProperties=lambda number: properties)
    return cupy


def require_signatures(real):
    """Raise an error unless the real CuPy has what was called, and takes its arguments."""
    for name, ways in calls.items():
        try:
            signature = inspect.signature(getattr(real, name))
        except (TypeError, ValueError):     # ufuncs have none
            continue
        for count, keywords in ways:
            signature.bind(*[None] * count, **dict.fromkeys(keywords))


@contextlib.contextmanager
def standing_in(capability=(7, 0)):
    """Have ``import cupy`` give the stand-in, and array-api-compat be wrapped round it."""
    def theirs(name):
        return name == "cupy" or name.startswith(("cupy.", "array_api_compat.cupy"))

    import array_api_compat

    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if theirs(name)}
    wrapper = array_api_compat.__dict__.pop("cupy", None)
    cupy = module(capability)
    sys.modules |= {"cupy": cupy, "cupy.linalg": cupy.linalg, "cupy.fft": cupy.fft,
                    "cupy.cuda": cupy.cuda, "cupy.cuda.device": cupy.cuda.device}
    helpers = sys.modules["array_api_compat.common._helpers"]
    cached = [found for found in vars(helpers).values() if hasattr(found, "cache_clear")]
    for found in cached:
        found.cache_clear()
    try:
        yield cupy
    finally:
        for name in [name for name in sys.modules if theirs(name)]:
            del sys.modules[name]
        sys.modules |= hidden
        array_api_compat.__dict__.pop("cupy", None)
        if wrapper is not None:
            array_api_compat.cupy = wrapper
        for found in cached:
            found.cache_clear()
