"""Kernels for any array-API namespace, written with whole-array operations."""
