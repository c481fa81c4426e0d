"""What tests of the GPU's kernels have in common."""

from __future__ import annotations

import pytest
from emulator.build import compiler
from emulator.device import EmulatedDevice
from pyattn.kernels.cuda import device

from pyattn import dispatch


@pytest.fixture
def emulated(monkeypatch):
    """The device that executes CUDA kernels on NumPy arrays: `use_backend("cuda")` takes it."""
    if compiler() is None:
        pytest.skip("a C++ compiler builds the kernels for the emulator; there is none")
    emulator = EmulatedDevice()
    monkeypatch.setitem(dispatch.PREFERENCE, "numpy", (*dispatch.PREFERENCE["numpy"], "cuda"))
    device.register("numpy", lambda array: emulator)
    yield emulator
    device.register("numpy", None)
