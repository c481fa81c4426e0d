"""Memory that kernels are given by address."""

from __future__ import annotations

from typing import Any

import numpy as np

CACHE_LINE = 64


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an empty array that starts on a cache line, as vector loads like it."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    memory = np.empty(nbytes + CACHE_LINE, np.uint8)
    start = -address(memory) % CACHE_LINE
    return memory[start:start + nbytes].view(dtype).reshape(shape)


def address(x: np.ndarray | None) -> int:
    """Return where the first number of `x` lies; 0 for None."""
    return 0 if x is None else x.ctypes.data
