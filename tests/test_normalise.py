"""Tokens of unit length, or of mean 0 and variance 1: formulas in longdouble, at any magnitude."""

from __future__ import annotations

import array_api_strict
import ml_dtypes
import numpy as np
import pytest

from pyattn.checks import DtypeError, OptionError, ShapeError
from pyattn.features import standardise, unit_length
from pyattn.testing import gradcheck

LIMITS = {np.float64: 1e-12, np.float32: 1e-5, np.float16: 2e-2, ml_dtypes.bfloat16: 2e-1}
SIZES = {np.float64: [1e-300, 1e-100, 1e-20, 1.0, 1e20, 1e160, 1e300],
         np.float32: [1e-36, 1e-25, 1e-6, 1.0, 1e14, 1e16, 1e19, 1e25, 1e37],
         np.float16: [1e-3, 1.0, 1e4], ml_dtypes.bfloat16: [1e-30, 1.0, 1e30]}


def by_formula(operation, x, dy):
    """The output and the gradient of x, in longdouble."""
    x, dy = (a.astype(np.float64).astype(np.longdouble) for a in (x, dy))
    if operation is unit_length:
        rate = 1 / np.sqrt((x * x).sum(-1, keepdims=True))
        y = x * rate
        return y, rate * (dy - y * (y * dy).sum(-1, keepdims=True))
    centred = x - x.mean(-1, keepdims=True)
    rate = 1 / np.sqrt((centred * centred).mean(-1, keepdims=True) + np.longdouble(1e-5))
    y = centred * rate
    return y, rate * (dy - dy.mean(-1, keepdims=True) - y * (y * dy).mean(-1, keepdims=True))


@pytest.mark.parametrize("operation", [unit_length, standardise], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("dtype", "size"), [(dtype, size) for dtype in SIZES
                                             for size in SIZES[dtype]], ids=str)
def test_any_magnitude(operation, dtype, size):
    rng = np.random.default_rng(0)
    # far from tokens whose numbers are nearly equal, whose gradient rounding decides
    x = (size * np.array([1.0, -1.0, 2.0, 0.5, -1.5]) * rng.uniform(0.8, 1.2, (7, 5))).astype(dtype)
    dy = rng.standard_normal((7, 5)).astype(dtype)
    y, saved = operation.forward(x)
    dx = saved.backward(dy).x
    assert y.dtype == dx.dtype == x.dtype
    for got, want in zip((y, dx), by_formula(operation, x, dy), strict=True):
        top = np.abs(want).max()
        if top > 1e-30 or dtype is np.float64:
            assert np.abs(got.astype(np.float64) - want).max() <= LIMITS[dtype] * top


@pytest.mark.parametrize("operation", [unit_length, standardise], ids=lambda f: f.__name__)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e16, 1e25])
def test_other_libraries_give_the_same_numbers(operation, size):
    rng = np.random.default_rng(1)
    x, dy = (size * rng.standard_normal((2, 600, 4)), rng.standard_normal((2, 600, 4)))
    want, saved = operation.forward(x)
    y, other = operation.forward(array_api_strict.asarray(x))
    np.testing.assert_allclose(np.asarray(y), want, rtol=1e-14)
    np.testing.assert_allclose(np.asarray(other.backward(array_api_strict.asarray(dy)).x),
                               saved.backward(dy).x, rtol=1e-12)


@pytest.mark.parametrize("operation", [unit_length, standardise], ids=lambda f: f.__name__)
def test_gradients_are_derivatives(operation):
    gradcheck(operation, np.random.default_rng(2).standard_normal((3, 4)))


@pytest.mark.parametrize("operation", [unit_length, lambda x: standardise(x, eps=0.0),
                                       standardise])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_zeros_stay_zeros(operation, dtype):
    assert not operation(np.zeros((2, 3), dtype)).any()


@pytest.mark.parametrize(("operation", "options"), [(unit_length, {}), (standardise, {"eps": 0.0})])
def test_what_has_no_direction_has_no_gradient(operation, options):
    x = np.zeros((2, 3), np.float32)
    y, saved = operation.forward(x, **options)
    assert not y.any()
    assert not saved.backward(np.ones_like(x)).x.any()


@pytest.mark.parametrize("value", [1.0, 7e20, 1e38])
def test_equal_numbers_have_no_variance(value):
    x = np.full((1, 8), value, np.float32)
    assert not standardise(x).any()


@pytest.mark.parametrize("operation", [unit_length, standardise], ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (4,), (2, 0, 5)])
def test_nothing_to_do(operation, shape):
    y, saved = operation.forward(np.ones(shape, np.float32))
    assert y.shape == saved.backward(y).x.shape == shape


def test_what_is_refused():
    for operation in (unit_length, standardise):
        for wrong in (None, [[1.0]], np.ones((2, 3), int)):
            with pytest.raises(DtypeError, match="x must be"):
                operation(wrong)
        with pytest.raises(ShapeError, match="x must be"):
            operation(np.float32(1.0))
        with pytest.raises(ShapeError, match="dout"):
            operation.forward(np.ones((2, 3)))[1].backward(np.ones((2, 4)))
    for eps in (-1.0, np.nan, "1", None, True):
        with pytest.raises(OptionError, match="eps must"):
            standardise(np.ones((2, 3)), eps=eps)
