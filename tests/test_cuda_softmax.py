"""CUDA kernels of softmax attention: the launch code and the kernels' text, in the emulator.

The default run takes the attention cases in the shapes where something may go wrong; with
``-m gate`` come all shapes, the kernels that are built for single terms, and other orders of threads
and blocks. A C++ compiler is needed, and without one all of it is skipped.
"""

from __future__ import annotations

import numpy as np
import pytest
from table import BFLOAT16, CASES, SHAPES
from test_attention import BY_NAME, judge, run

import pyattn

DTYPES = [np.float16, BFLOAT16, np.float32, np.float64]
NAMES = ["float16", "bfloat16", "float32", "float64"]
SMALL = SHAPES[5]
"""Lengths of several tiles that differ, shared heads, widths that fill no chunk."""

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)


def number_of(case):
    return CASES.index(case)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_cases(case, emulated):
    """A dtype each; all of them with ``-m gate``."""
    emulated.generic = True
    dtype = DTYPES[number_of(case) % 4]
    drawn = case.make(SMALL, np.dtype(dtype))
    judge(drawn, *run(drawn, "cuda"))


@pytest.mark.gate
@every_dtype
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[3], SHAPES[5], SHAPES[7]], ids=str)
def test_all_cases(case, shape, dtype, emulated):
    emulated.generic = True
    emulated.seed = 1 + number_of(case) % 3
    drawn = case.make(shape, np.dtype(dtype))
    judge(drawn, *run(drawn, "cuda"))


@pytest.mark.gate
@every_dtype
@pytest.mark.parametrize("name", ["causal", "mask_full", "everything"])
@pytest.mark.parametrize("shape", [SHAPES[4], SHAPES[6]], ids=str)
def test_wider(name, shape, dtype, emulated):
    emulated.generic = True
    drawn = BY_NAME[name].make(shape, np.dtype(dtype))
    judge(drawn, *run(drawn, "cuda"))
