"""Numba's decorators and functions as the kernels here use them.

Numba's simulator (``NUMBA_ENABLE_CUDASIM=1``, set before numba is imported) runs the same kernels
as Python, a Python thread for each thread of a block. It swaps the global name `cuda` of the module
whose function is running for what it simulates, and back when that function returns, which goes
wrong when threads are in functions of several modules. So there `cuda` looks up what is simulated
at every use, and functions on the device are plain functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import config
from numba import cuda as numba_cuda

SIMULATED = bool(config.ENABLE_CUDASIM)


class _Simulated:
    """What the kernel being simulated sees as `cuda`."""

    def __getattr__(self, name: str) -> Any:
        from numba.cuda.simulator import kernel

        return getattr(kernel._get_kernel_context(), name)


kernel: Callable[..., Any] = numba_cuda.jit

if SIMULATED:
    cuda: Any = _Simulated()

    def device(function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that kernels may call."""
        return function

    # those of math raise errors instead of returning inf
    exp, log, tanh = np.exp, np.log, np.tanh
else:
    cuda = numba_cuda

    def device(function: Callable[..., Any]) -> Callable[..., Any]:
        """Make a function that kernels may call, and that becomes part of them.

        Only so can what a thread owns stay in registers when the function is handed it.
        """
        return numba_cuda.jit(function, device=True, forceinline=True)

    exp, log, tanh = math.exp, math.log, math.tanh
