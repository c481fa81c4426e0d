"""Numba CUDA kernels on CuPy arrays, for any GPU that Numba knows."""

from __future__ import annotations

import importlib.util
from typing import Any

from ..cuda.compile import INSTALL


def missing(array: Any) -> str | None:
    """Say what these kernels lack, or None."""
    if importlib.util.find_spec("numba_cuda") is None:
        return f"numba-cuda is not installed: {INSTALL}"
    return None
