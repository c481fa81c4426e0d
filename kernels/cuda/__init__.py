"""CUDA C++ kernels on CuPy arrays, for GPUs with tensor cores: sm_80 and later."""

from __future__ import annotations

from .device import missing as missing
