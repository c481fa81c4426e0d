"""CUDA C++ kernels for CuPy arrays, compiled at run time."""
