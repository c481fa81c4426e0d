"""The compiler's decorators: Numba without the GIL, cached on disk, and never stale.

Numba's cache looks only at the file a function is written in, so a helper edited in another file
would leave its callers with the old code. Every compiled function therefore carries a hash of all
sources of this folder in its name.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba


@functools.cache
def _salt() -> str:
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


def kernel(function: Callable[..., Any]) -> Any:
    """Compile `function` at its first call; later processes load it from the cache."""
    function.__qualname__ += f"_{_salt()}"
    compiled = numba.njit(nogil=True, error_model="numpy", no_cfunc_wrapper=True)(function)
    try:
        compiled.enable_caching()
    except RuntimeError:
        pass  # no cache location can be written: every process compiles for itself
    return compiled


def part(function: Callable[..., Any]) -> Any:
    """Compile `function` into the kernels that call it; Python cannot call it.

    Every literal in a call makes a compilation of its own, so constants are np.int64.
    """
    return numba.njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)
