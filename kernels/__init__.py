"""Kernels, one folder for each backend; installed as `pyattn.kernels`."""
