"""Micro-kernels and packing, for every vector width, against NumPy."""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
import os
import platform
import re
from collections.abc import Callable

import llvmlite.binding as llvm
import ml_dtypes
import numba
import numpy as np
import pytest
from llvmlite import ir
from pyattn.kernels.cpu import host
from pyattn.kernels.cpu.compile import native
from pyattn.kernels.cpu.jit import vector
from pyattn.kernels.cpu.jit.vector import layout, products, tiles
from pyattn.kernels.cpu.jit.vector.emit import Vectors
from pyattn.kernels.cpu.jit.vector.layout import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from pyattn.kernels.cpu.records import PACK

BF16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = (np.float32, np.float64)
WIDTHS = (16, 32, 64)
HOST = host.dot_product() or "widened"
# vectors and the way to multiply bfloat16: those of any host, and this one's own
MODES = [(nbytes, "widened") for nbytes in WIDTHS] + [(64, HOST)] * (HOST != "widened")
CODES = {np.dtype(np.float64): FLOAT64, np.dtype(np.float32): FLOAT32,
         np.dtype(np.float16): FLOAT16, BF16: BFLOAT16}
OPERANDS = [(np.float64, np.float64, np.float64)] + [
    (source, np.float32, operand) for source in (np.float32, np.float16, BF16)
    for operand in (np.float32, np.uint16)]


@functools.cache
def micro_kernel(name: str, nbytes: int, dot: str = "widened") -> Callable:
    """Make a micro-kernel callable from Python."""
    kernels = vector.micro_kernels(nbytes, dot)
    kernel = getattr(kernels, name)
    if name == "multiply":
        enter, leave = kernels.enter_tiles, kernels.leave_tiles

        @numba.njit
        def multiply(*arguments):
            enter(*arguments[-2:])
            kernel(*arguments)
            leave(*arguments[-2:])

        return multiply
    return numba.njit(lambda *arguments: kernel(*arguments))


def at(x: np.ndarray, *index: int) -> int:
    """Return the address of an element."""
    return x.ctypes.data + sum(i * step for i, step in zip(index, x.strides, strict=False))


def integers(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return numbers whose products and sums are exact in any order."""
    return rng.integers(-9, 9, shape).astype(dtype)


def bf16(x: np.ndarray) -> np.ndarray:
    """Round as the kernels promise to, as bits: to nearest even, NaN quiet, denormals zero."""
    x = np.asarray(x, np.float32)
    nan, tiny = np.isnan(x), np.abs(x) < np.finfo(np.float32).tiny
    bits = np.where(nan | tiny, np.copysign(np.float32(0), x), x).astype(BF16).view(np.uint16)
    quiet = (x.view(np.uint32) >> 16).astype(np.uint16) | 0x40
    return np.where(nan, quiet, bits)


def odd_floats(count: int, dtype: np.dtype = np.float32) -> np.ndarray:
    """Return floats of every size, and all the special ones."""
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 2 ** (8 * np.dtype(dtype).itemsize), count, np.uint64)
    x = bits.astype(f"u{np.dtype(dtype).itemsize}").view(dtype)
    info = ml_dtypes.finfo(dtype)
    special = [0, -0.0, np.inf, -np.inf, np.nan, -np.nan, info.smallest_subnormal, info.tiny,
               -info.tiny, info.max, -info.max, 1, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-7]
    with np.errstate(over="ignore", invalid="ignore"):
        x[:len(special)] = np.array(special).astype(dtype)
    return x


# Conversions and layouts


@pytest.mark.parametrize(("nbytes", "dot"), MODES)
@pytest.mark.parametrize(("source", "unit", "operand"), OPERANDS)
def test_convert_rows(nbytes, dot, source, unit, operand):
    convert = micro_kernel("convert_rows", nbytes, dot)
    target = np.dtype(operand)
    rng = np.random.default_rng(0)
    for count, padded, step in itertools.product((0, 1, 31, 64, 77), (96,), (1, 2, 0, -1)):
        x = rng.standard_normal((5, 240)).astype(source)
        read = x[1:4, 80::step][:, :count] if step else np.broadcast_to(x[1:4, 80:81], (3, count))
        y = np.full((5, 100), 7).astype(target)
        strange = convert(at(read), x.strides[0], step * x.itemsize, CODES[np.dtype(source)], 3,
                          count, padded, 0.3, at(y, 1), 100, unit(1), operand(1))
        right = np.zeros((3, padded), unit)
        right[:, :count] = read.astype(unit) * unit(0.3)
        assert not strange
        assert np.array_equal(y[1:4, :padded], bf16(right) if operand == np.uint16 else right)
        assert (y[[0, 4]] == 7).all()
        assert (y[:, padded:] == 7).all()


@pytest.mark.parametrize(("nbytes", "dot"), MODES)
@pytest.mark.parametrize(("source", "unit", "operand"), OPERANDS)
def test_convert_rows_says_what_is_not_finite(nbytes, dot, source, unit, operand):
    convert = micro_kernel("convert_rows", nbytes, dot)

    def converted(x, step):
        y = np.empty(128, operand)
        flag = convert(at(x), 0, step, CODES[x.dtype], 1, len(x), 128, 1.0, at(y), 0, unit(1),
                       operand(1))
        return flag, y[:len(x)]

    x = odd_floats(90, source)
    for step in (1, 2):
        flag, y = converted(np.repeat(x, step)[::step], step * x.itemsize)
        with np.errstate(invalid="ignore"):
            right = x.astype(unit)
        if operand == np.uint16:
            assert np.array_equal(y, bf16(right))
        else:
            assert np.array_equal(y, right, equal_nan=True)
            assert np.array_equal(np.signbit(y), np.signbit(right))
        assert flag
    largest = ml_dtypes.finfo(source).max
    for value, place in itertools.product((np.nan, np.inf, -np.inf, largest), (0, 70, 89)):
        x = np.zeros(90, source)
        x[place] = value
        rounds_to_infinity = source == np.float32 and operand == np.uint16
        assert converted(x, x.itemsize)[0] == (value != largest or rounds_to_infinity)
    # what nobody reads may be anything
    x = np.full(90, np.nan, source)
    x[:70] = 1
    assert not converted(x[:70], x.itemsize)[0]


@pytest.mark.parametrize("nbytes", WIDTHS)
def test_a_scale_that_is_not_finite_leaves_the_padding_zero(nbytes):
    x, y = np.ones(5, np.float32), np.ones(64, np.float32)
    assert micro_kernel("convert_rows", nbytes)(at(x), 0, 4, FLOAT32, 1, 5, 64, np.inf, at(y), 0,
                                                np.float32(1), np.float32(1))
    assert y.tolist() == [np.inf] * 5 + [0] * 59


@pytest.mark.parametrize("nbytes", WIDTHS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_transpose(nbytes, dtype):
    transpose = micro_kernel("transpose", nbytes)
    for rows, columns in itertools.product((0, 1, 16, 37, 64), repeat=2):
        x = np.arange(rows * (columns + 3), dtype=dtype).reshape(rows, columns + 3)
        y = np.full((columns + 1, rows + 5), -1, dtype)
        transpose(at(x), columns + 3, at(y), rows + 5, rows, columns, dtype(1))
        assert np.array_equal(y[:columns, :rows], x[:, :columns].T)
        assert (y[columns:] == -1).all()
        assert (y[:, rows:] == -1).all()


@pytest.mark.parametrize("nbytes", WIDTHS)
def test_transpose_keeps_every_bit(nbytes):
    x = odd_floats(64 * 64).reshape(64, 64)
    y = np.empty((64, 64), np.float32)
    micro_kernel("transpose", nbytes)(at(x), 64, at(y), 64, 64, 64, np.float32(1))
    assert np.array_equal(y.view(np.uint32), x.view(np.uint32).T)


@pytest.mark.parametrize("nbytes", WIDTHS)
def test_pair_rows(nbytes):
    for count in (0, 1, 31, 64):
        x = np.random.default_rng(0).integers(0, 2**16, (2, count), np.uint16)
        y = np.full((count + 1, 2), 7, np.uint16)
        micro_kernel("pair_rows", nbytes)(at(x), at(x, 1), count, at(y))
        assert np.array_equal(y[:count], x.T)
        assert (y[count] == 7).all()


@pytest.mark.parametrize(("nbytes", "dot"), MODES)
def test_round_row(nbytes, dot):
    for count in (0, 1, 31, 3000):
        x = odd_floats(3000)[:count]
        y = np.full(count + 1, 7, np.uint16)
        micro_kernel("round_row", nbytes, dot)(at(x), count, at(y))
        assert np.array_equal(y[:count], bf16(x))
        assert y[count] == 7
        right = bf16(x)
        micro_kernel("round_row", nbytes, dot)(at(x), count, at(x))
        assert np.array_equal(x.view(np.uint16)[:count], right)


@pytest.mark.parametrize(("nbytes", "dot"), MODES)
def test_pair_rounded(nbytes, dot):
    for rows, columns in ((64, 64), (64, 16), (32, 48)):
        x = odd_floats(64 * 80).reshape(64, 80)
        y = np.full((columns, rows + 2), 7, np.uint16)
        micro_kernel("pair_rounded", nbytes, dot)(at(x), 80, rows, columns, at(y), rows + 2)
        assert np.array_equal(y[:, :rows], bf16(x[:rows, :columns]).T)
        assert (y[:, rows:] == 7).all()


@pytest.mark.skipif(os.name != "posix", reason="mprotect")
@pytest.mark.parametrize("nbytes", WIDTHS)
@pytest.mark.parametrize("source", [np.float32, np.float16, BF16])
def test_nothing_beyond_the_last_row_is_read(nbytes, source):
    """Behind the numbers lies a page that ends the process when it is touched."""
    memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    page = np.frombuffer(memory, np.uint8).ctypes.data + mmap.PAGESIZE
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), mmap.PAGESIZE, 0) == 0
    one, width, count = np.float32(1), 37, 17
    size, code = np.dtype(source).itemsize, CODES[np.dtype(source)]
    row = width * size
    start = page - count * row
    y = np.empty((count, 64), np.float32)
    micro_kernel("convert_rows", nbytes)(start, row, size, code, count, width, 64, 1.0, at(y), 64,
                                         one, one)
    a, c = np.ones((3, 64), np.float32), np.empty((3, count), np.float32)
    micro_kernel("dots", nbytes)(3, count, width, at(a), 64, start, row, code, at(c), count, one)
    micro_kernel("accumulate_rows", nbytes)(3, count, width, at(c), count, start, row, code, at(a),
                                            64, one)
    assert (y == 0).all()
    assert (c == 0).all()
    assert (a == 1).all()
    ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), mmap.PAGESIZE, 3)


# Products


def bf16_operands(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return A (rows, depth) and B (depth, columns), its rows in pairs, as bits."""
    depth, columns = b.shape
    pairs = b.reshape(depth // 2, 2, columns).swapaxes(1, 2).reshape(depth // 2, 2 * columns)
    return a.astype(BF16).view(np.uint16), pairs.astype(BF16).view(np.uint16)


@pytest.mark.parametrize(("nbytes", "dot"), [*MODES, (16, "emulated"), (64, "emulated")])
def test_multiply_bfloat16(nbytes, dot):
    multiply = micro_kernel("multiply", nbytes, dot)
    rng = np.random.default_rng(0)
    for rows, columns, depth in itertools.product((1, 17, 33, 64), (16, 48, 112), (0, 2, 96)):
        whole = -(-rows // 16) * 16, -(-depth // 32) * 32
        a, b = integers(rng, (rows, depth), np.float64), integers(rng, (depth, columns), np.float64)
        x, y = np.zeros((whole[0], whole[1] + 6)), np.zeros((whole[1], columns + 32))
        x[:rows, :depth], y[:depth, :columns] = a, b
        y[:, columns:] = 99
        x, y = bf16_operands(x, y)
        for add in (0, 1):
            c = integers(rng, (whole[0], columns + 3), np.float32)
            right = c.copy()
            right[:rows, :columns] = a @ b + add * c[:rows, :columns]
            multiply(rows, columns, depth, at(x), x.shape[1], 1, at(y), y.shape[1], at(c),
                     columns + 3, add, np.float32(1), np.uint16(1))
            assert np.array_equal(c[:rows], right[:rows])
            assert np.array_equal(c[:, columns:], right[:, columns:])
            if dot != "emulated":
                assert np.array_equal(c, right)


@pytest.mark.parametrize(("nbytes", "dot"), [*MODES, (64, "emulated")])
def test_multiply_bfloat16_propagates_what_is_not_finite(nbytes, dot):
    a, b = np.zeros((16, 32)), np.ones((32, 16))
    a[[0, 1, 2, 3], [0, 31, 5, 6]] = np.nan, np.inf, 2.0**127, 2.0**-126
    b[[5, 6], 3] = 2.0**127, 2.0**10
    x, y = bf16_operands(a, b)
    c = np.zeros((16, 16), np.float32)
    micro_kernel("multiply", nbytes, dot)(16, 16, 32, at(x), 32, 1, at(y), 32, at(c), 16, 0,
                                          np.float32(1), np.uint16(1))
    with np.errstate(over="ignore"):
        assert np.array_equal(c, (a @ b).astype(np.float32), equal_nan=True)


@pytest.mark.parametrize("nbytes", WIDTHS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_multiply_floats(nbytes, dtype):
    multiply = micro_kernel("multiply", nbytes, HOST)
    rng = np.random.default_rng(0)
    lanes = nbytes // np.dtype(dtype).itemsize
    for rows, vectors, depth in itertools.product((1, 3, 11, 64), (1, 3, 7), (0, 1, 64)):
        columns = vectors * lanes
        a, b = integers(rng, (rows, depth), dtype), integers(rng, (depth, columns), dtype)
        for transposed, add in itertools.product((False, True), (0, 1)):
            x = np.asarray(a, order="F" if transposed else "C")
            y = np.full((depth, columns + lanes), 99, dtype)
            y[:, :columns] = b
            c = integers(rng, (rows, columns + 3), dtype)
            right = c.copy()
            right[:, :columns] = a @ b + add * c[:, :columns]
            steps = (1, rows) if transposed else (depth, 1)
            multiply(rows, columns, depth, at(x), *steps, at(y), columns + lanes, at(c),
                     columns + 3, add, dtype(1), dtype(1))
            assert np.array_equal(c, right)


CACHES = [(np.float64, np.float64), (np.float32, np.float32), (np.float16, np.float32),
          (BF16, np.float32)]


@pytest.mark.parametrize("nbytes", WIDTHS)
@pytest.mark.parametrize(("source", "unit"), CACHES)
def test_dots(nbytes, source, unit):
    dots = micro_kernel("dots", nbytes)
    rng = np.random.default_rng(0)
    for rows, columns, depth in itertools.product((1, 2, 3, 8), (0, 1, 16, 37), (0, 1, 64, 77)):
        a = np.full((rows, 80), np.nan, unit)
        a[:, :depth] = integers(rng, (rows, depth), unit)
        b = np.full((columns, 2, depth + 3), np.nan, source)
        b[:, 0, :depth] = integers(rng, (columns, depth), np.float32)
        c = np.full((rows, columns + 1), 7, unit)
        dots(rows, columns, depth, at(a), 80, at(b), b.strides[0], CODES[np.dtype(source)], at(c),
             columns + 1, unit(1))
        assert np.array_equal(c[:, :columns], a[:, :depth] @ b[:, 0, :depth].astype(unit).T)
        assert (c[:, columns] == 7).all()


@pytest.mark.parametrize("nbytes", WIDTHS)
@pytest.mark.parametrize(("source", "unit"), CACHES)
def test_accumulate_rows(nbytes, source, unit):
    accumulate = micro_kernel("accumulate_rows", nbytes)
    rng = np.random.default_rng(0)
    for rows, count, width in itertools.product((1, 2, 3, 8), (0, 1, 64, 150), (1, 64, 77)):
        p = integers(rng, (rows, count + 5), unit)
        values = np.full((count, 2, width + 3), np.nan, source)
        values[:, 0, :width] = integers(rng, (count, width), np.float32)
        acc = integers(rng, (rows, width + 2), unit)
        right = acc.copy()
        right[:, :width] += p[:, :count] @ values[:, 0, :width].astype(unit)
        accumulate(rows, count, width, at(p), count + 5, at(values), values.strides[0],
                   CODES[np.dtype(source)], at(acc), width + 2, unit(1))
        assert np.array_equal(acc, right)


# Rows of scores


def bits_of(words: np.ndarray) -> np.ndarray:
    """Return the bits of words as booleans, 64 to a word."""
    bits = words[..., None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)
    return bits.reshape(*words.shape[:-1], -1).astype(bool)


def assert_exp(p: np.ndarray, x: np.ndarray) -> None:
    """`p` must be exp x to 1.5 ulp, 0 below the normal range, inf above it and NaN where x is."""
    info = np.finfo(p.dtype)
    with np.errstate(over="ignore"):
        right = np.exp(x.astype(np.longdouble))
        ulp = np.spacing(right.astype(p.dtype))
    nan, least = np.isnan(x), info.minexp * np.log(2)
    low, high = x < np.nextafter(p.dtype.type(least), -np.inf), right > info.max
    assert np.array_equal(np.isnan(p), nan)
    assert (p[low] == 0).all()
    assert np.isinf(p[high]).all()
    inside = ~(low | high | nan) & (right > info.tiny) & (x != p.dtype.type(least))
    error = np.abs(p[inside] - right[inside]) / ulp[inside]
    assert error.max(initial=0) < 1.5


def exponents(dtype: np.dtype, rows: int) -> np.ndarray:
    """Return arguments for exp, rows of 64, from below its range to above, and special ones."""
    info = np.finfo(dtype)
    low, high = (bits * np.log(2) for bits in (info.minexp, info.maxexp))
    rng = np.random.default_rng(0)
    dense = rng.uniform(1.1 * low, 1.1 * high, rows * 32)
    near = rng.uniform(-1, 1, rows * 64 - dense.size)
    x = np.concatenate([dense, near]).astype(dtype)
    special = np.concatenate([np.arange(np.ceil(low), high),
                              np.arange(info.minexp, info.maxexp) * np.log(2)])
    edges = [np.nextafter(dtype(high), dtype(0)), high + 1, np.nextafter(dtype(low), dtype(0)),
             low - 1, np.nan, -np.nan, np.inf, -np.inf, 0, -0.0, info.smallest_subnormal,
             info.max, info.min]
    special = np.concatenate([special, edges]).astype(dtype)
    x[:special.size] = special
    return rng.permutation(x).reshape(rows, 64)


@pytest.mark.parametrize("nbytes", WIDTHS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_exp_rows(nbytes, dtype):
    exp_rows = micro_kernel("exp_rows", nbytes)
    rows = 600
    x = np.full((rows, 70), 7, dtype)
    x[:, :64] = exponents(dtype, rows)
    y, lse = x.copy(), np.zeros(rows, dtype)
    exp_rows(at(y), 70, rows, at(lse), dtype(1))
    assert_exp(y[:, :64], x[:, :64])
    assert (y[:, 64:] == 7).all()
    rng = np.random.default_rng(1)
    x = rng.uniform(-20, 20, (5, 64)).astype(dtype)
    lse = np.array([0.5, -3, np.inf, 11, np.nan], dtype)
    y = x.copy()
    exp_rows(at(y), 64, 5, at(lse), dtype(1))
    assert_exp(y, x - lse[:, None])
    assert (y[2] == 0).all()


@pytest.mark.parametrize("nbytes", WIDTHS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_weigh(nbytes, dtype):
    """Two calls in turn: the second brings up to date what the first leaves in tops and sums."""
    weigh = micro_kernel("weigh", nbytes)
    rng = np.random.default_rng(0)
    lanes = nbytes // np.dtype(dtype).itemsize
    eps, rows = np.finfo(dtype).eps, 10
    for count, masked, gated in itertools.product((1, 3), (False, True), (False, True)):
        width = 64 * count
        tops, sums = np.full(rows + 1, -np.inf, dtype), np.zeros((rows + 1, lanes), dtype)
        decays = np.full(rows + 1, 7, dtype)
        tops[rows] = sums[rows] = 7                     # the row behind, which is not ours
        total, top = np.zeros((rows, lanes), np.longdouble), tops[:rows].copy()
        for turn in (0, 1):
            scores = np.full((rows, width + 6), 7, dtype)
            scores[:, :width] = rng.uniform(-9, 9, (rows, width))
            words = rng.integers(0, 2**64, (rows, count + 2), np.uint64)
            gates = rng.random(scores.shape).astype(dtype)
            allowed = bits_of(words[:, :count]) if masked else np.ones((rows, width), bool)
            words[1, :count], allowed[1] = 0, not masked            # nothing is allowed
            words[2 + turn, :count], allowed[2 + turn] = 0, not masked
            allowed[4] = True
            words[4] = 2**64 - 1
            scores[4, :width] -= 30 * turn              # the top does not grow
            scores[5, :width] += 200 * turn             # what was summed is all but gone
            scores[6, :width:3] = np.nan
            scores[7, :width] = np.nan
            scores[8, :width] = -np.inf
            if turn:
                scores[9, 5] = np.inf
                words[9, 0], allowed[9, 5] = words[9, 0] | np.uint64(32), True
            if masked:
                scores[0, :width][~allowed[0]] = np.nan             # a masked score may be anything
                scores[5, :width][~allowed[5]] = np.inf
            given = scores.copy()
            grew = weigh(at(scores), width + 6, rows, count, at(words) if masked else 0, count + 2,
                         at(gates) if gated else 0, at(tops), at(sums), at(decays), dtype(1))
            x = np.where(allowed, given[:, :width], -np.inf)
            old, top = top, np.fmax(top, np.fmax.reduce(x, axis=1))
            shift = np.where(top == -np.inf, 0, top)
            assert grew == 1
            assert np.array_equal(tops[:rows], top)
            with np.errstate(invalid="ignore"):
                arguments, decay = x - shift[:, None], np.where(top > old, old - shift, 0)
            weights = scores[:, :width].copy()
            assert (scores[:, width:] == 7).all()
            if gated:
                # the weights themselves are exact products
                plain = given.copy()
                weigh(at(plain), width + 6, rows, count, at(words) if masked else 0, count + 2, 0,
                      at(top), at(sums.copy()), at(decays.copy()), dtype(1))
                assert np.array_equal(weights, plain[:, :width] * gates[:, :width], equal_nan=True)
                weights = plain[:, :width]
            assert_exp(weights, arguments)
            assert_exp(decays[:rows], decay)
            weighed = scores[:, :width].astype(np.longdouble).reshape(rows, -1, lanes).sum(1)
            total = total * decays[:rows, None] + weighed
            fine = np.isfinite(total)
            assert np.array_equal(np.isnan(sums[:rows]), ~fine)
            bound = (width // lanes + 4) * eps * total
            assert (np.abs(sums[:rows] - total) <= bound)[fine].all()
            assert (tops[rows], decays[rows], *sums[rows]) == (7,) * (lanes + 2)
        # the same once more: nothing grows
        given[9, 5] = 0
        assert weigh(at(given), width + 6, rows, count, at(words) if masked else 0, count + 2, 0,
                     at(tops), at(sums), at(decays), dtype(1)) == 0
        assert (decays[:rows] == 1).all()


@pytest.mark.parametrize("nbytes", WIDTHS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_weights_of_the_whole_range(nbytes, dtype):
    """Scores below the top by any distance: exp of what is never positive has code of its own."""
    lanes = nbytes // np.dtype(dtype).itemsize
    x = exponents(dtype, 600)
    x[~np.isnan(x)] = -np.abs(x[~np.isnan(x)])
    y = x.copy()
    tops, sums, decays = np.zeros(600, dtype), np.zeros((600, lanes), dtype), np.zeros(600, dtype)
    assert micro_kernel("weigh", nbytes)(at(y), 64, 600, 1, 0, 0, 0, at(tops), at(sums),
                                         at(decays), dtype(1)) == 0
    assert_exp(y, x)


@pytest.mark.parametrize("nbytes", WIDTHS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("masked", [False, True])
def test_differentiate(nbytes, dtype, masked):
    differentiate = micro_kernel("differentiate", nbytes)
    rng = np.random.default_rng(0)
    rows = 8
    scores, slopes = (rng.uniform(-9, 9, (rows + 1, 70)).astype(dtype) for _ in range(2))
    lse, delta = (rng.uniform(-3, 3, rows).astype(dtype) for _ in range(2))
    words = rng.integers(0, 2**64, rows, np.uint64)
    words[0], words[1] = 0, 2**64 - 1
    lse[2] = np.inf                                     # a row that sees no key
    lse[3] = np.finfo(dtype).min / 2                    # weights overflow
    scores[4, :64:5] = np.nan
    slopes[5, :64:7] = np.inf
    scores[6, :64] = -np.inf
    delta[7] = np.nan
    if masked:
        hidden = ~bits_of(words[:, None])
        scores[:rows, :64][hidden] = np.nan             # what is masked may be anything
        slopes[:rows, :64][hidden] = np.inf
    p, ds = scores.copy(), slopes.copy()
    differentiate(at(p), at(ds), 70, rows, at(words) if masked else 0, at(lse), at(delta), dtype(1))
    allowed = bits_of(words[:, None]) if masked else np.ones((rows, 64), bool)
    for x, before in ((p, scores), (ds, slopes)):
        assert np.array_equal(x[:, 64:], before[:, 64:])
        assert np.array_equal(x[rows], before[rows])
        assert (x[:rows, :64][~allowed] == 0).all()
    p, ds = p[:rows, :64], ds[:rows, :64]
    assert_exp(p[allowed], (scores[:rows, :64] - lse[:, None])[allowed])
    assert (p[2] == 0).all()
    assert (ds[2] == 0).all()
    assert np.isinf(p[3][allowed[3]]).all()
    with np.errstate(invalid="ignore", over="ignore"):
        right = p * (slopes[:rows, :64] - delta[:, None])
    assert np.array_equal(ds[allowed], right[allowed], equal_nan=True)


@pytest.mark.parametrize("nbytes", WIDTHS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_scale_rows(nbytes, dtype):
    x = odd_floats(6 * 80, dtype).reshape(6, 80)
    factors = np.array([1, 0.3, 0, np.nan, -2, 1], dtype)
    y = x.copy()
    micro_kernel("scale_rows", nbytes)(at(y), 80, 5, 64, at(factors), dtype(1))
    with np.errstate(invalid="ignore", over="ignore"):
        right = x[:, :64] * factors[:, None]
    assert np.array_equal(y[:5, :64], right[:5], equal_nan=True)
    for untouched in (np.s_[0], np.s_[:, 64:], np.s_[5]):
        assert y[untouched].tobytes() == x[untouched].tobytes()


@pytest.mark.parametrize("nbytes", WIDTHS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_sums_and_products_of_rows(nbytes, dtype):
    rng = np.random.default_rng(0)
    lanes = nbytes // np.dtype(dtype).itemsize
    x, totals = integers(rng, (6, lanes), dtype), np.full(6, 7, dtype)
    x[2, lanes - 1] = np.nan
    micro_kernel("lane_sums", nbytes)(at(x), 5, at(totals), dtype(1))
    assert np.array_equal(totals, [*x[:5].sum(1), 7], equal_nan=True)
    for width in (0, lanes, 6 * lanes):
        a, b = (integers(rng, (6, 7 * lanes), dtype) for _ in range(2))
        a[3, :1], b[4, :1] = np.nan, np.inf
        a[4, :1] = 1
        products = np.full(6, 7, dtype)
        micro_kernel("row_dots", nbytes)(at(a), at(b), 7 * lanes, 5, width, at(products), dtype(1))
        right = (a * b)[:5, :width].sum(1)
        assert np.array_equal(products, [*right, 7], equal_nan=True)


@pytest.mark.parametrize("nbytes", WIDTHS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_soft_cap(nbytes, dtype):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-40, 40, 640), rng.uniform(-1e-3, 1e-3, 640)]).astype(dtype)
    x[:5] = np.inf, -np.inf, np.nan, 0, 1e30
    y = np.append(x, dtype(7))
    right = 3 * np.tanh(x.astype(np.longdouble) / 3)
    micro_kernel("soft_cap", nbytes)(at(y), x.size, 3.0, dtype(1))
    assert y[-1] == 7
    assert np.array_equal(np.isnan(y[:-1]), np.isnan(right))
    size = np.maximum(np.abs(right), np.finfo(dtype).tiny).astype(dtype)
    assert np.nanmax(np.abs(y[:-1] - right) / np.spacing(size)) < 4


@pytest.mark.parametrize("nbytes", WIDTHS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_select(nbytes, dtype):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(65).astype(dtype)
    x[[3, 50]] = np.nan
    for word in (*rng.integers(0, 2**64, 3, np.uint64), np.uint64(0), np.uint64(2**64 - 1)):
        y = x.copy()
        micro_kernel("select", nbytes)(at(y), word, -np.inf, dtype(1))
        right = np.append(np.where(bits_of(word[None]), x[:64], -np.inf), x[64])
        assert np.array_equal(y, right, equal_nan=True)


# Rows on their way to the caller's array


def between(dtype: np.dtype) -> np.ndarray:
    """Return as float32 all numbers of a 16-bit dtype, and what lies half-way and next to that."""
    x = np.arange(2**16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        x = np.sort(x[np.isfinite(x)].astype(np.float32))
        last = x[-1] + (x[-1] - x[-2]) / 2
        half = np.concatenate([x[:-1] / 2 + x[1:] / 2, [last, -last]], dtype=np.float32)
        near = [np.nextafter(half, np.float32(end)) for end in (-np.inf, np.inf)]
    return np.concatenate([x, half, *near])


@pytest.mark.parametrize(("nbytes", "dot"), MODES)
@pytest.mark.parametrize("target", [np.float32, np.float16, BF16], ids=["f4", "f2", "bf16"])
def test_write_rows(nbytes, dot, target):
    """On vectors of 16 bytes, and for what does not fill one, nothing but arithmetic is used."""
    write_rows = micro_kernel("write_rows", nbytes, dot)

    def written(x, count, factors):
        y = np.full((len(x) + 1, count + 3), 7, target)
        write_rows(at(x), x.shape[1], len(x), count, 0 if factors is None else at(factors), at(y),
                   y.strides[0], CODES[y.dtype], np.float32(1))
        assert (y[:, count:] == 7).all()
        assert (y[-1] == 7).all()
        with np.errstate(over="ignore", invalid="ignore"):
            right = x[:, :count] * (np.float32(1) if factors is None else factors[:, None])
            wanted = (bf16(right).view(BF16) if target == BF16 else right.astype(target))
        y, nan = y[:-1, :count], np.isnan(right)
        bits = f"u{y.itemsize}"
        assert np.array_equal(np.isnan(y), nan)
        assert np.array_equal(np.signbit(y), np.signbit(right))
        assert np.array_equal(y.view(bits)[~nan], wanted.view(bits)[~nan])

    x = odd_floats(4 * 800).reshape(4, 800)
    factors = np.array([1, 0.3, -2, 0], np.float32)
    for count, given in itertools.product((800, 0, 1, 5, 31), (None, factors)):
        written(x, count, given)
    if target != np.float32:
        x = between(target)
        for count in (x.size, 1):                       # in vectors, and one by one
            written(x.reshape(-1, count), count, None)


@pytest.mark.parametrize("nbytes", WIDTHS)
def test_write_rows_of_float64(nbytes):
    x, y, factors = odd_floats(80, np.float64).reshape(2, 40), np.full((2, 41), 7.0), np.ones(2)
    factors[1] = 0.3
    micro_kernel("write_rows", nbytes)(at(x), 40, 2, 37, at(factors), at(y), y.strides[0], FLOAT64,
                                       np.float64(1))
    with np.errstate(over="ignore", invalid="ignore"):
        assert np.array_equal(y[:, :37], x[:, :37] * factors[:, None], equal_nan=True)
    assert (y[:, 37:] == 7).all()


@pytest.mark.parametrize(("nbytes", "dot"), MODES)
@pytest.mark.parametrize(("source", "unit", "operand"), OPERANDS)
def test_gather_rows(nbytes, dot, source, unit, operand):
    gather = micro_kernel("gather_rows", nbytes, dot)
    rng = np.random.default_rng(0)
    rows = np.array([4, -1, 0, 3, 4])
    for count, step in itertools.product((0, 1, 31, 64, 77), (1, 2)):
        x = rng.standard_normal((5, 240)).astype(source)
        places = np.where(rows < 0, 0, at(x) - 24 + rows * x.strides[0])
        y = np.full((6, 100), 7).astype(operand)
        strange = gather(at(places), 24, step * x.itemsize, CODES[np.dtype(source)], 5, count,
                         96, 0.3, at(y), 100, unit(1), operand(1))
        right = np.zeros((5, 96), unit)
        right[:, :count] = x[rows, ::step][:, :count].astype(unit) * unit(0.3)
        right[1] = 0
        assert not strange
        assert np.array_equal(y[:5, :96], bf16(right) if operand == np.uint16 else right)
        assert (y[5] == 7).all()
        assert (y[:, 96:] == 7).all()
    x[2, 0] = np.nan
    nothing = 96, 1.0, at(y), 100, unit(1), operand(1)
    kind = x.itemsize, CODES[np.dtype(source)], 5, 5
    assert not gather(at(places), 24, *kind, *nothing)      # row 2 is not listed
    x[3, 4] = np.inf
    assert gather(at(places), 24, *kind, *nothing)


@pytest.mark.parametrize(("nbytes", "dot"), MODES)
@pytest.mark.parametrize("target", [np.float32, np.float16, BF16], ids=["f4", "f2", "bf16"])
def test_scatter_rows(nbytes, dot, target):
    scatter = micro_kernel("scatter_rows", nbytes, dot)
    rng = np.random.default_rng(0)
    rows = np.array([3, 0, -1, 1])
    for count, factors in itertools.product((0, 1, 31, 70), (None, np.float32([1, 0.3, 5, -2]))):
        x, y = rng.standard_normal((4, 80), np.float32), np.full((5, 75), 7, target)
        places = np.where(rows < 0, 0, at(y) + rows * y.strides[0])
        scatter(at(x), 80, 4, count, 0 if factors is None else at(factors), at(places),
                CODES[y.dtype], np.float32(1))
        right = np.full((5, 75), 7, target)
        for r, row in enumerate(rows):
            if row >= 0:
                scaled = x[r, :count] * (np.float32(1) if factors is None else factors[r])
                right[row, :count] = (bf16(scaled).view(BF16) if target == BF16
                                      else scaled.astype(target))
        assert np.array_equal(y, right)


@pytest.mark.parametrize("nbytes", WIDTHS)
@pytest.mark.parametrize("unit", [np.float32, np.float64])
def test_add_rows(nbytes, unit):
    add = micro_kernel("add_rows", nbytes)
    rng = np.random.default_rng(0)
    rows = np.array([3, 0, -1, 1])
    factors, kept = (np.array(x, unit) for x in ([2, 1, 5, -3], [4, 0, 1, 2]))
    for count, f, k in itertools.product((0, 1, 31, 70), (None, factors), (None, kept)):
        x, y = integers(rng, (4, 80), unit), integers(rng, (5, 75), unit)
        right = y.copy()
        for r, row in enumerate(rows):
            if row >= 0:
                right[row, :count] = (y[row, :count] * (1 if k is None else k[r])
                                      + x[r, :count] * (1 if f is None else f[r]))
        places = np.where(rows < 0, 0, at(y) + rows * y.strides[0])
        add(at(x), 80, 4, count, 0 if f is None else at(f), 0 if k is None else at(k),
            at(places), unit(1))
        assert np.array_equal(y, right)


# Packing


def packed(x: np.ndarray, unit: type, operand: type, lengths: np.ndarray, width: int, padded: int,
           scale: np.ndarray | None = None, lse: np.ndarray | None = None,
           index: np.ndarray | None = None) -> tuple:
    """Pack an array (batch, heads, length, width) in every way; return what was written.

    With an index (batch * items, heads, length) each of the batch is the source of several items.
    """
    batch, heads, tokens, _ = x.shape
    items, length = 1, tokens
    listed = np.zeros(3, np.int64)
    if index is not None:
        items, length = len(index) // batch, index.shape[2]
        listed[:] = at(index), *index.strides[:2]
        batch *= items
    tiles = -(-length // 64)
    count, pairs = batch * heads * tiles, operand == np.uint16
    rows = np.full((count, 64, padded), 7, operand)
    columns = np.full((count, padded // 2, 64, 2) if pairs else (count, width, 64), 7, operand)
    doubles = np.full((count, 32, padded, 2), 7, operand)
    notes = np.full(count, 9, np.uint8)
    record = np.zeros(1, PACK)
    for name, value in dict(
            at=at(x), heads=heads, length=length, tiles=tiles, width=width, padded=padded,
            lengths=at(lengths), kind=CODES[x.dtype], scale=0 if scale is None else at(scale),
            lse=0 if lse is None else at(lse), items=items, tokens=tokens, index=listed[0],
            index_b=listed[1], index_h=listed[2], rows=at(rows), columns=at(columns),
            pairs=at(doubles), notes=at(notes)).items():
        record[name] = value
    for name, step in zip("bhnd", x.strides, strict=True):
        record[name] = step
    kind = "bfloat16" if pairs else np.dtype(unit).name
    pack_tiles, queue = native("packing.pack_tiles", kind), np.zeros(1, np.int64)
    pack_tiles(at(record), at(queue), count, 0)
    alone = np.full_like(columns, 7)
    record["rows"], record["columns"], record["pairs"] = 0, at(alone), 0
    queue[0] = 0
    pack_tiles(at(record), at(queue), count, 0)
    assert np.array_equal(alone, columns, equal_nan=not pairs)
    return rows, columns, doubles, notes


@pytest.mark.parametrize(("source", "unit", "operand"), OPERANDS)
@pytest.mark.parametrize(("width", "apart"), [(1, 1), (64, 1), (77, 1), (130, 1), (40, 3)])
def test_packing(source, unit, operand, width, apart):
    batch, heads, length = 2, 3, 130
    rng = np.random.default_rng(0)
    memory = rng.standard_normal((batch, length, heads, width * apart)).astype(source)
    x = memory.swapaxes(1, 2)[..., ::apart]
    padded = -(-width // 32) * 32
    scale = np.array([1, 0.3, -2], unit)
    lse = rng.standard_normal((batch, heads, length)).astype(unit)
    lse[0, 1, [0, 5, 6, 63, 64, 129]] = -np.inf
    lengths = np.array([130, 70], np.int32)
    for given in (None, lse):
        live = np.arange(length) < lengths[:, None, None]
        live = np.broadcast_to(live if given is None else live & (lse != -np.inf),
                               (batch, heads, length))
        x[~live] = np.nan
        right = np.zeros((batch, heads, 192, padded), unit)
        right[:, :, :length, :width] = np.where(live[..., None],
                                                x.astype(unit) * scale[:, None, None], 0)
        right = (bf16(right) if operand == np.uint16 else right).reshape(-1, 64, padded)
        rows, columns, pairs, notes = packed(x, unit, operand, lengths, width, padded, scale, given)
        assert np.array_equal(rows, right)
        assert (notes == 0).all()
        if operand == np.uint16:
            assert np.array_equal(columns, right.reshape(-1, 64, padded // 2, 2).swapaxes(1, 2))
            assert np.array_equal(pairs, right.reshape(-1, 32, 2, padded).swapaxes(2, 3))
        else:
            assert np.array_equal(columns, right[:, :, :width].swapaxes(1, 2))
            assert (pairs == 7).all()


@pytest.mark.parametrize("with_lse", [False, True])
def test_packing_of_listed_tokens(with_lse):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 200, 40)).astype(np.float32)
    lse = rng.standard_normal((2, 3, 200)).astype(np.float32)
    lse[:, 1, 5:9] = -np.inf
    index = rng.integers(0, 200, (4, 3, 70)).astype(np.int32)
    index[1] = np.arange(70) * 2 + 1                    # evenly spaced, downwards to 0 and to none
    index[2] = np.arange(70)[::-1] - 3
    index[3, :, ::5] = -1
    index.clip(-1, out=index)
    lengths = np.array([70, 66, 70, 0], np.int32)
    item, head = np.arange(4)[:, None, None] // 2, np.arange(3)[:, None]
    live = (index >= 0) & (np.arange(70) < lengths[:, None, None])
    if with_lse:
        live &= lse[item, head, index] != -np.inf
    right = np.zeros((4, 3, 128, 64), np.float32)
    right[:, :, :70, :40] = np.where(live[..., None], x[item, head, index], 0)
    rows, *_ = packed(x, np.float32, np.float32, lengths, 40, 64, None, lse if with_lse else None,
                      index)
    assert np.array_equal(rows, right.reshape(-1, 64, 64))



@pytest.mark.parametrize(("source", "unit", "operand"), OPERANDS)
def test_packing_notes_what_is_not_finite(source, unit, operand):
    x = np.zeros((1, 1, 192, 70), source)
    x[0, 0, 64 + 63, 69] = np.inf
    x[0, 0, 150, 3] = np.nan
    *_, notes = packed(x, unit, operand, np.array([150], np.int32), 70, 96)
    assert notes.tolist() == [0, 1, 0]
    *_, notes = packed(x, unit, operand, np.array([151], np.int32), 70, 96)
    assert notes.tolist() == [0, 1, 1]


# Instructions


def assembly(emit: Callable, cpu: str, nbytes: int, dot: str = "widened", takes: str = "",
             bf16: bool = False) -> str:
    """Compile a micro-kernel for float32, or bfloat16, for another CPU."""
    module = ir.Module()
    module.triple = "x86_64-unknown-linux-gnu"
    kinds = {"i": ir.IntType(64), "f": ir.FloatType()}
    result = kinds["i"] if emit in (layout.convert_rows, vector.rows.weigh) else ir.VoidType()
    kind = ir.FunctionType(result, [kinds[letter] for letter in takes])
    function = ir.Function(module, kind, "kernel")
    builder = ir.IRBuilder(function.append_basic_block())
    emit(Vectors(builder, numba.float32, nbytes, bf16=bf16, dot=dot), *function.args)
    target = llvm.Target.from_triple(module.triple).create_target_machine(cpu=cpu, opt=3)
    return target.emit_assembly(llvm.parse_assembly(str(module)))


on_x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"),
                            reason="LLVM is set up for the host alone")


@on_x86
def test_amx_instructions():
    text = assembly(products.multiply, "sapphirerapids", 64, "amx", "i" * 11, bf16=True)
    # 2 x 2, 2 x 1, 1 x 2 and 1 x 1 tiles of sums
    assert len(re.findall(r"\ttdpbf16ps\t", text)) == 4 + 2 + 2 + 1
    assert len(re.findall(r"\ttileloadd\t", text)) == 9 + 4 + 3 + 3 + 2
    assert len(re.findall(r"\ttilestored\t", text)) == 9
    for emit, name in ((tiles.enter_tiles, "ldtilecfg"), (tiles.leave_tiles, "tilerelease")):
        assert name in assembly(emit, "sapphirerapids", 64, "amx", bf16=True)
        assert name not in assembly(emit, "sapphirerapids", 64, "amx")
        assert name not in assembly(emit, "sapphirerapids", 64, "avx512bf16", bf16=True)


@on_x86
def test_avx512_instructions():
    text = assembly(products.multiply, "znver4", 64, "avx512bf16", "i" * 11, bf16=True)
    assert len(re.findall(r"\tvdpbf16ps\t", text)) == (4 + 2 + 1) * (6 + 4 + 2 + 1)
    for emit, takes in ((layout.round_row, "iii"), (layout.pair_rounded, "iiiiii")):
        assert "vcvtneps2bf16" in assembly(emit, "znver4", 64, "avx512bf16", takes)
        assert "bf16" not in assembly(emit, "skylake-avx512", 64, "widened", takes)


@on_x86
@pytest.mark.parametrize("bf16", [False, True])
def test_a_plain_cpu_needs_no_library(bf16):
    """LLVM may put a call in place of what the CPU lacks, and nothing would answer it."""
    for emit, takes in ((layout.convert_rows, "iiiiiiifii"), (layout.transpose, "iiiiii"),
                        (layout.pair_rounded, "iiiiii"), (layout.round_row, "iii"),
                        (layout.write_rows, "iiiiiiii"), (products.multiply, "i" * 11),
                        (products.dots, "i" * 10), (products.accumulate_rows, "i" * 10),
                        (vector.rows.weigh, "i" * 10), (vector.rows.differentiate, "i" * 7),
                        (vector.rows.exp_rows, "iiii"), (vector.rows.soft_cap, "iif")):
        assert "\tcall" not in assembly(emit, "x86-64", 16, "widened", takes, bf16)
