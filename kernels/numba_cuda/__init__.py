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
