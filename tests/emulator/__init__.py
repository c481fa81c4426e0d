"""Executes the CUDA kernels' own text on the CPU, and judges what they do."""
