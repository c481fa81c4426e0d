"""What Numba compiles: kernels, the parts that they share, and micro-kernels."""
