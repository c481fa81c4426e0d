"""What is installed, which backends can run, and on what machine: for a look or a bug report."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pkgutil
import platform
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from . import dispatch
from ._version import __version__
from .checks import require_choice

REQUIRED = ("numpy", "scipy", "numba", "llvmlite", "array-api-compat", "ml_dtypes", "safetensors")
OPTIONAL = ("numba-cuda", "nvidia-cuda-nvrtc", "rich", "matplotlib", "torch", "jax", "thinc")
"""Packages that pyattn uses, or whose arrays it takes, where they are installed."""

CUPY = ("cupy-cuda13x", "cupy-cuda12x", "cupy")
"""CuPy's names on the package index, by how it was built."""

VECTOR_FEATURES = ("avx2", "fma", "avx512f", "avx512bf16", "avx512fp16", "amx-tile", "amx-bf16",
                   "neon", "sve")
"""CPU features, by LLVM's names, that decide how fast kernels can be."""


@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> dict[str, Any]: ...
def show_config(mode: str = "stdout") -> dict[str, Any] | None:
    """Print, or return, versions, backends, threads, caches and the CPU.

    Parameters
    ----------
    mode : {"stdout", "dicts"}
        Print as text, or return nested dictionaries of strings, numbers and lists.

    Returns
    -------
    dict or None
        With ``mode="dicts"``: keys ``"versions"``, ``"backends"`` (engine to backend to the string
        ``"available"`` or a reason why not), ``"gpu"``, ``"threads"``, ``"cache"``, ``"cpu"``,
        ``"blas"``.

    Raises
    ------
    OptionError
        `mode` is neither of the two.

    Notes
    -----
    Imports what the backends need, so the first call takes a moment.

    Examples
    --------
    >>> import pyattn
    >>> pyattn.show_config(mode="dicts")["backends"]["softmax"]["array_api"]
    'available'
    """
    require_choice("mode", mode, ("stdout", "dicts"))
    config: dict[str, dict[str, Any]] = {
        "versions": _versions(),
        "backends": _backends(),
        "gpu": _gpu(),
        "threads": _threads(),
        "cache": _cache(),
        "cpu": _cpu(),
        "blas": _blas(),
    }
    if mode == "dicts":
        return config
    for section, content in config.items():
        print(section)
        _print(content, "  ")
    return None


def _print(content: dict[str, Any], indent: str) -> None:
    width = max(map(len, content), default=0)
    for name, value in content.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            _print(value, indent + "  ")
        else:
            text = " ".join(map(str, value)) if isinstance(value, list) else value
            print(f"{indent}{name:{width}}  {text}".rstrip())


def _versions() -> dict[str, str]:
    versions = {"pyattn": __version__, "python": platform.python_version()}
    versions |= {name: _version(name) or "not installed" for name in (*REQUIRED, *OPTIONAL)}
    return versions | {"cupy": next(filter(None, map(_version, CUPY)), "not installed")}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _backends() -> dict[str, dict[str, str]]:
    from .kernels.cuda.device import unavailable

    folder = Path(__file__).parent / "engines"
    engines = [module.name for module in pkgutil.iter_modules([str(folder)])]
    no_gpu = dispatch.ON_GPU if unavailable() else ()
    table = {engine: {name: "no GPU, see there" if name in no_gpu else _state(engine, name)
                      for name in dispatch.BACKENDS} for engine in engines}
    return {engine: states for engine, states in table.items() if "available" in states.values()}


def _state(engine: str, backend: str) -> str:
    name = f"{__package__}.kernels.{backend}.{engine}"
    if importlib.util.find_spec(name) is None:
        return "it has no kernel for this"
    try:
        importlib.import_module(name)
    except ImportError as error:
        return f"cannot be imported: {error}"
    return "available"


def _gpu() -> dict[str, str]:
    from .kernels.cuda.device import unavailable

    reason = unavailable()
    if reason is not None:
        return {"none": reason}
    import cupy

    def described(number: int) -> str:
        found = cupy.cuda.runtime.getDeviceProperties(number)
        return (f"{found['name'].decode()}, compute capability {found['major']}.{found['minor']}, "
                f"{found['totalGlobalMem'] / 2**30:.0f} GiB")

    return {f"device {number}": described(number)
            for number in range(cupy.cuda.runtime.getDeviceCount())}


def _threads() -> dict[str, Any]:
    from .kernels.cpu.threads import VARIABLES
    from .threads import get_num_threads

    usable = (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
              else os.cpu_count())
    set_variables = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return {"cpu kernels": get_num_threads(), "CPUs of this process": usable, **set_variables}


def _cache() -> dict[str, str]:
    from .kernels.cpu import tuning
    from .kernels.disk import cache_folder

    return {"compiled kernels": str(cache_folder() or "nowhere: there is no home directory"),
            "tuning table": str(tuning.source() or "built-in figures")}


def _cpu() -> dict[str, Any]:
    import llvmlite.binding as llvm

    from .kernels.cpu import host

    features = llvm.get_host_cpu_features()
    return {"name": _cpu_name(),
            "architecture": f"{platform.machine()}, {llvm.get_host_cpu_name()}",
            "vector features": [name for name in VECTOR_FEATURES if features.get(name)],
            "vector width": f"{8 * host.vector_bytes()} bits",
            "bfloat16 products": host.dot_product() or "in float32"}


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _blas() -> dict[str, str]:
    import scipy

    # some of these make it use less of the CPU than it would by itself
    told = {name: value for name, value in os.environ.items() if name.startswith("OPENBLAS_")}
    return {"numpy": _blas_of(np), "scipy": _blas_of(scipy), **told}


def _blas_of(package: Any) -> str:
    blas = package.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return f"{blas['name']} {blas.get('version', '')}".strip()
