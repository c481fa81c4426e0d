"""Executes the CUDA kernels' own text on the CPU, and judges what they do.

`build.py` puts a kernel's text together with the host versions of its primitives (primitives.cuh,
hopper.cuh), adds an entry, and has g++ make a library of it. `device.py` is the device that launch
code is given (the fixture `emulated`), so that the package's own Python code runs as it does on a
GPU. What is judged, and how more primitives are added, is said at the top of `emulator.hpp`.

    with pyattn.use_backend("cuda"):            # in a test that takes the fixture `emulated`
        out = pyattn.attention(q, k, v)
    emulated.seed = 1                           # another order of threads and blocks
    emulated.statistics["mma"]                  # what launches have done

A debugger stops in kernels (`gdb --args python -m pytest ...`, `break softmax_forward`).
"""
