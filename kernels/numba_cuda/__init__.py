"""Kernels for the GPU in Python: Numba CUDA. The ones to read first.

They do what the kernels of `pyattn.kernels.cuda` do, with plain multiplications instead of tensor
cores: any GPU that Numba knows, float64, float32 and float16, and Numba's simulator where there is
no GPU at all. Read in this order:

``tiles``      how a block of threads multiplies tiles: what is shared, who owns which numbers
``pairs``      what happens to one score: mask, softcap, bias, offsets, gate, dropout
``forward``    flash attention, and `backward` its gradients
``terms``      the gradients of what was added to the scores
``launch``     from a `Problem` to arguments, grids and results
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

from ..cuda.compile import INSTALL


def missing(array: Any) -> str | None:
    """Say what these kernels lack on this machine, or None."""
    return _missing()


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("numba_cuda") is None:
        return f"numba-cuda is not installed: {INSTALL}"
    from numba import config, cuda

    if config.ENABLE_CUDASIM or cuda.is_available():
        return None
    return "Numba finds no GPU, or no driver (see `numba -s`, section CUDA)"
