"""Which library an array is from, what its dtype is called, and how it gets to the host.

No array library but NumPy is imported here: a CuPy or torch array can only exist once its library
has been imported by whoever made it. (The exception: arrays of a library that only lends its memory
on a GPU, as Numba's, are taken as CuPy's.) Plain NumPy arrays are told by their type alone: asking
array-api-compat takes longer than a small attention.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterable
from typing import Any

import array_api_compat
import array_api_compat.numpy as numpy_namespace
import numpy as np

from .checks import BackendError, DtypeError

Array = Any

FLOATS = ("float16", "bfloat16", "float32", "float64")

_NUMPY = {np.ndarray}


def _all_numpy(given: Iterable[Array | None]) -> bool:
    """Whether these are NumPy's own arrays, and perhaps None."""
    kinds = set(map(type, given))
    kinds.discard(type(None))
    return kinds == _NUMPY


def dtype_name(x: Array) -> str:
    """'float32' for NumPy's, CuPy's, torch's, JAX's and ml_dtypes' dtypes alike."""
    return _numpy_name(x.dtype) if type(x) is np.ndarray else _name(x.dtype)


def _name(dtype: Any) -> str:
    return str(dtype).rpartition(".")[2]


_numpy_name = functools.lru_cache(64)(_name)


def library(x: Array) -> str:
    """The name of the array library: 'numpy', 'cupy', 'torch', 'jax', 'array_api_strict', ..."""
    if type(x) is np.ndarray:
        return "numpy"
    return namespace(x).__name__.removeprefix("array_api_compat.").partition(".")[0]


def namespace(*arrays: Array) -> Any:
    """The array-API namespace that all `arrays` share; None entries are passed over."""
    if _all_numpy(arrays):
        return numpy_namespace
    given = [x for x in arrays if x is not None]
    for x in given:
        if isinstance(x, np.ma.MaskedArray | np.matrix):
            raise DtypeError(f"arrays must be plain; got {type(x).__name__}, whose extra meaning "
                             "would be ignored")
        if not array_api_compat.is_array_api_obj(x):
            raise DtypeError(f"an array is needed; got {type(x).__module__}.{type(x).__name__}")
    try:
        return array_api_compat.array_namespace(*given)
    except TypeError:
        kinds = sorted({type(x).__module__.partition(".")[0] for x in given})
        raise BackendError(f"all arrays must be of one library; got {', '.join(kinds)}") from None


_PLAIN = frozenset({np.ndarray, type(None), bool, int, float, str, np.dtype})
"""Types of arguments that are no arrays on a GPU, whatever they hold."""

CUDA_DEVICES = (2, 13)
"""DLPack's numbers of memory on CUDA GPUs, and of memory that these share with the host."""


def taken(arguments: Any) -> Any:
    """Arguments, in which arrays that lie on a GPU and are of no array-API library become CuPy's.

    Memory is shared, by ``__cuda_array_interface__`` or DLPack. Containers that hold no such array
    are returned as they are.
    """
    if not _lends(arguments):
        return arguments
    if isinstance(arguments, dict):
        return {name: taken(x) for name, x in arguments.items()}
    if isinstance(arguments, tuple | list):
        return type(arguments)(map(taken, arguments))
    try:
        import cupy
    except ImportError as error:
        raise BackendError(f"arrays of {type(arguments).__module__} on a GPU are used through "
                           f"CuPy, which cannot be imported ({error}): "
                           'pip install "pyattn[cuda13]"') from None
    if hasattr(arguments, "__cuda_array_interface__"):
        return cupy.asarray(arguments)
    return cupy.from_dlpack(arguments)


def _lends(x: Any) -> bool:
    """Whether `x` is, or holds, an array on a GPU of a library that is not array-API's."""
    kind = type(x)
    if kind in _PLAIN:
        return False
    if kind is dict:
        return any(map(_lends, x.values()))
    if kind is tuple or kind is list:
        return not _PLAIN.issuperset(map(type, x)) and any(map(_lends, x))
    if hasattr(kind, "__cuda_array_interface__"):
        return not array_api_compat.is_array_api_obj(x)
    return (hasattr(kind, "__dlpack_device__") and not array_api_compat.is_array_api_obj(x)
            and x.__dlpack_device__()[0] in CUDA_DEVICES)


def require_same_device(named: dict[str, Array]) -> None:
    """Raise BackendError unless all arrays live on one device; nothing is ever moved silently."""
    if _all_numpy(named.values()):
        return
    devices = {name: array_api_compat.device(x) for name, x in named.items() if x is not None}
    if len({str(device) for device in devices.values()}) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise BackendError(f"all arrays must be on one device; got {where}")


def require_current_device(x: Array) -> None:
    """Raise BackendError if `x` is a CuPy array on another GPU than CuPy's current one."""
    if library(x) != "cupy":
        return
    current = sys.modules["cupy"].cuda.runtime.getDevice()
    if x.device.id != current:
        raise BackendError(f"arrays must be on the current device; got arrays on CUDA device "
                           f"{x.device.id}, and {current} is current: call inside `with "
                           f"cupy.cuda.Device({x.device.id}):`")


def require_float(name: str, x: Array) -> str:
    """The dtype name of `x`, or DtypeError if it is not one of FLOATS."""
    if not hasattr(x, "dtype"):
        raise DtypeError(f"{name} must be an array; got {type(x).__module__}.{type(x).__name__}")
    found = dtype_name(x)
    if found not in FLOATS:
        raise DtypeError(f"{name} must be one of {', '.join(FLOATS)}; got {found}")
    return found


def nbytes(x: Array) -> int:
    """Bytes of the elements of `x`, for dtypes that do not tell their own size."""
    bits = dtype_name(x).lstrip("abcdefghijklmnopqrstuvwxyz")
    return math.prod(x.shape) * (int(bits) // 8 if bits else 1)


def accumulator(xp: Any, x: Array) -> Any:
    """The dtype that sums over `x` are carried in: float64 for float64, float32 for all else."""
    return xp.float64 if dtype_name(x) == "float64" else xp.float32


def to_host(x: Array) -> np.ndarray:
    """A NumPy copy or view of `x`, asked for explicitly."""
    if isinstance(x, np.ndarray):
        return x
    if array_api_compat.is_cupy_array(x):
        return x.get()
    if array_api_compat.is_torch_array(x):
        x = x.detach().cpu()
        if dtype_name(x) == "bfloat16":
            import ml_dtypes

            return x.view(namespace(x).uint16).numpy().view(ml_dtypes.bfloat16)
    return np.asarray(x)


def decided(*found: Array) -> tuple[np.ndarray, ...]:
    """Bring integers that were decided where the arrays live to the host, in one copy.

    Where content decides what a token attends to, the host waits for a device here and nowhere
    else: engines lay out their work on the host. NumPy's arrays are returned as they are.

    Parameters
    ----------
    *found : int32 arrays of one library, any shapes

    Returns
    -------
    tuple of int32 numpy.ndarray, in the same shapes
    """
    if _all_numpy(found):
        return found
    for x in found:
        if dtype_name(x) != "int32":
            raise DtypeError(f"decisions must be int32; got {dtype_name(x)}")
    xp = namespace(*found)
    sizes = [math.prod(x.shape) for x in found]
    flat = [xp.reshape(x, (size,)) for x, size in zip(found, sizes, strict=True)]
    home = to_host(xp.concat(flat) if len(flat) > 1 else flat[0])
    parts = np.split(home, np.cumsum(sizes)[:-1])
    return tuple(part.reshape(x.shape) for part, x in zip(parts, found, strict=True))


def from_host(xp: Any, x: np.ndarray, device: Any = None) -> Array:
    """A copy of `x` in the namespace `xp`; torch takes bfloat16 only by its bits."""
    x = np.array(x)
    if xp.__name__.endswith("torch") and x.dtype.name == "bfloat16":
        return xp.asarray(x.view(np.int16), device=device).view(xp.bfloat16)
    # a library's own namespace may know no devices
    return xp.asarray(x) if device is None else xp.asarray(x, device=device)


def reshape(xp: Any, x: Array, shape: tuple[int, ...]) -> Array:
    """`x` in `shape`, a view where that is possible; for NumPy by the method, which is faster."""
    return x.reshape(shape) if type(x) is np.ndarray else xp.reshape(x, shape)


def cast(xp: Any, x: Array, dtype: Any) -> Array:
    """`x` in `dtype`; what is too large for a 16-bit float becomes inf without a warning."""
    if x.dtype == dtype:
        return x
    with np.errstate(over="ignore"):
        return xp.astype(x, dtype, copy=False)


def added(total: Array, x: Array) -> Array:
    """Return `total` + `x`; `total` is ours, so it may be written to where that saves an array."""
    kind = type(total)
    # CuPy's arrays do not tell whether they are repeated along an axis; such are not contiguous
    if (total.flags.writeable if kind is np.ndarray else
            array_api_compat.is_cupy_array(total) and total.flags.c_contiguous):
        total += x
        return total
    return total + x


def device(x: Array) -> Any:
    """The device of `x`, as array-api functions take it."""
    return array_api_compat.device(x)
