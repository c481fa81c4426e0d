"""CUDA C++ kernels: sources (`*.cu`, `*.cuh`), their compilation and their launches."""
