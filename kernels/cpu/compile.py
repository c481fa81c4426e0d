"""Kernels as functions of the C kind, compiled once and kept on disk.

Numba is needed only to compile: what it makes is object code that LLVM loads by itself, so a
process that finds all its kernels in the cache never imports Numba. An entry belongs to one kernel
of one kind; the name of its folder tells the sources, the versions of Numba and LLVM, and the CPU.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm

from ..disk import cache_folder, read, write
from . import host

KINDS = {"float32": ("float32", "float32"), "float64": ("float64", "float64"),
         "bfloat16": ("float32", "uint16")}
"""The dtypes of a kind's two tags, `unit` and `operand`."""

ENTRY = "pyattn_kernel"
"""What object code calls its function."""

SOURCES = Path(__file__).parent

_lock = threading.RLock()
_loaded: dict[tuple[str, str], Callable[..., None]] = {}


def native(name: str, kind: str) -> Callable[..., None]:
    """Return kernel `name` ("forward.forward") as a function of integers that releases the GIL."""
    function = _loaded.get((name, kind))
    if function is None:
        with _lock:
            function = _loaded.get((name, kind))
            if function is None:
                function = _loaded[name, kind] = _load(*_object_code(name, kind))
    return function


# a fork waits for the kernel that is being compiled: Numba and LLVM hold locks meanwhile, too
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release,
                        after_in_child=_lock.release)


def _load(count: int, code: bytes) -> Callable[..., None]:
    """Make object code callable, with `count` integers."""
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), host.target_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    kind = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * count)
    place = engine.get_function_address(ENTRY)
    function = kind(place)
    function.address = place        # type: ignore[attr-defined]  # for helpers, who need no Python
    engine.detach()     # the code stays: a thread may be at work in it when the interpreter ends
    return function


def _object_code(name: str, kind: str) -> tuple[int, bytes]:
    """Return how many integers the kernel takes, and its code."""
    folder = cache_folder()
    path = folder and folder / _key() / f"{name}-{kind}"
    stored = read(path) if path else None
    if not stored:
        from .jit.link import object_code

        module, _, function = name.rpartition(".")
        kernel = getattr(importlib.import_module(f"{__package__}.jit.{module}"), function)
        count, code = object_code(kernel, *KINDS[kind])
        if path:
            write(path, bytes([count]) + code)
        return count, code
    return stored[0], stored[1:]


def part(function: Callable[..., Any]) -> Any:
    """Have `function` compiled into the kernels that call it; Python cannot call it.

    Every literal in a call makes a compilation of its own, so constants are np.int64.
    """
    import numba

    # kernels count no references: memory is the caller's
    return numba.njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True,
                      _nrt=False)(function)


def kernel(function: Callable[..., Any]) -> Any:
    """Mark a kernel: it takes integers, then the tags `unit` and `operand`; see `native`."""
    return part(function)


@functools.cache
def _key() -> str:
    """Return a name for everything that compiled code depends on but the kernel and its kind."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.rglob("*.py")):
        source = path.read_bytes()
        digest.update(f"{path.relative_to(SOURCES)} {len(source)}\n".encode() + source)
    digest.update(repr((_numba_version(), llvmlite.__version__,
                        *host.target())).encode())
    return digest.hexdigest()[:24]


def _numba_version() -> str:
    """Return Numba's version, from its file: package metadata take as long as all else here."""
    found = importlib.util.find_spec("numba")
    if found is None or found.origin is None:
        return ""
    file = Path(found.origin).with_name("_version.py")
    return file.read_text() if file.exists() else f"{found.origin} {file.parent.stat().st_mtime}"
