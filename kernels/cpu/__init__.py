"""Kernels for NumPy arrays: Numba, with micro-kernels in LLVM vector IR."""
