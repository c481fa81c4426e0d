"""Positions, embeddings and rotary rotation: formulas, gradients, array libraries."""

import importlib
import math

import numpy as np
import pytest

from pyattn import features
from pyattn.checks import DtypeError, OptionError, ShapeError


def central_difference(function, x, direction, step=1e-6):
    return (function(x + step * direction) - function(x - step * direction)) / (2 * step)


def close(got, wanted, rtol=1e-12):
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=rtol, atol=rtol * max(1.0, np.abs(wanted).max()))


@pytest.mark.parametrize(("n", "width"), [(0, 4), (1, 1), (5, 8), (7, 5)])
def test_sinusoidal_is_the_paper_s_formula(n, width):
    table = features.sinusoidal(n, width, base=100.0, dtype=np.float64)
    assert table.shape == (n, width)
    for p in range(n):
        for column in range(width):
            angle = p / 100.0 ** (column // 2 * 2 / width)
            close(table[p, column], math.cos(angle) if column % 2 else math.sin(angle))


def test_sinusoidal_is_made_in_float64_and_in_the_namespace_asked_for():
    strict = importlib.import_module("array_api_strict")
    table = features.sinusoidal(100_000, 2, xp=strict)
    assert table.dtype == strict.float32
    close(table[99_999, 0], np.float32(math.sin(99_999)), rtol=1e-7)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_keeps_lengths_and_sees_only_differences_of_positions(interleaved):
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 8))
    at = {p: [features.rotary(x[None], positions=np.array([p]), interleaved=interleaved)[0]
              for x in (q, k)] for p in (0, 3, 5, 8, 1000, 1003)}
    q, k = q[0], k[0]
    turned_q, turned_k = ({p: pair[i].ravel() for p, pair in at.items()} for i in (0, 1))
    for p in at:
        close(np.linalg.norm(turned_q[p]), np.linalg.norm(q))
    for m, n, also_m, also_n in ((3, 0, 8, 5), (3, 0, 1003, 1000), (0, 3, 5, 8)):
        close(turned_q[m] @ turned_k[n], turned_q[also_m] @ turned_k[also_n], rtol=1e-10)
    assert abs(turned_q[3] @ turned_k[0] - turned_q[5] @ turned_k[0]) > 1e-3


def test_rotary_pairs_are_those_of_the_paper_when_interleaved():
    x = np.random.default_rng(1).standard_normal((6, 4))
    y = features.rotary(x, interleaved=True)
    for p in range(6):
        for i in range(2):
            angle = p * 10000.0 ** (-2 * i / 4)
            turn = np.array([[math.cos(angle), -math.sin(angle)],
                             [math.sin(angle), math.cos(angle)]])
            close(y[p, 2 * i:2 * i + 2], turn @ x[p, 2 * i:2 * i + 2])
    halves = np.concatenate([x[:, 0::2], x[:, 1::2]], axis=1)
    close(features.rotary(halves), np.concatenate([y[:, 0::2], y[:, 1::2]], axis=1))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_gradient(interleaved):
    rng = np.random.default_rng(2)
    x, dout, direction = rng.standard_normal((3, 2, 5, 6))
    positions = np.array([[0, 1, 5, 5, -2]] * 2)
    options = {"positions": positions, "interleaved": interleaved}
    _, saved = features.rotary.forward(x, **options)
    wanted = central_difference(lambda x: np.sum(dout * features.rotary(x, **options)), x,
                                direction)
    close(np.sum(saved.backward(dout).x * direction), wanted, rtol=1e-8)


def test_rotary_refuses_what_does_not_fit():
    x = np.ones((3, 4))
    with pytest.raises(ShapeError, match=r"D even; got \(3, 5\)"):
        features.rotary(np.ones((3, 5)))
    with pytest.raises(ShapeError, match=r"positions must broadcast to .* = \(3,\); got \(4,\)"):
        features.rotary(x, positions=np.arange(4))
    with pytest.raises(ShapeError, match="positions"):
        features.rotary(x, positions=3)
    with pytest.raises(DtypeError, match="positions must be integers; got float64"):
        features.rotary(x, positions=np.linspace(0, 1, 3))
    with pytest.raises(DtypeError, match="x must be one of"):
        features.rotary(np.ones((3, 4), int))


def test_add_positions_gradients():
    rng = np.random.default_rng(3)
    x, dout = rng.standard_normal((2, 2, 3, 4, 5))
    table = rng.standard_normal((6, 5))
    out, saved = features.add_positions.forward(x, table)
    close(out, x + table[:4])
    grads = saved.backward(dout)
    assert grads._fields == ("x", "table")
    close(grads.x, dout)
    close(grads.table, np.concatenate([dout.sum((0, 1)), np.zeros((2, 5))]))


def test_add_positions_refuses_a_short_table():
    with pytest.raises(ShapeError, match=r"L >= N .* got table \(3, 5\), x \(4, 5\)"):
        features.add_positions(np.ones((4, 5)), np.ones((3, 5)))


@pytest.mark.parametrize("count", [1, 7, 2500])
@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64"])
def test_embedding_sums_the_gradients_of_every_place(count, dtype):
    rng = np.random.default_rng(4)
    tokens = rng.integers(0, min(count, 256), (3, 11)).astype(dtype)
    table, dout = rng.standard_normal((count, 4)), rng.standard_normal((3, 11, 4))
    out, saved = features.embedding.forward(tokens, table)
    assert np.array_equal(out, table[tokens])
    wanted = np.zeros_like(table)
    np.add.at(wanted, tokens, dout)
    close(saved.backward(dout).table, wanted)
    assert np.array_equal(saved.backward(dout).table, saved.backward(dout).table)


def test_embedding_refuses_tokens_that_are_no_rows():
    table = np.ones((4, 2))
    with pytest.raises(OptionError, match="tokens must be 0 to V - 1 = 3; got -1 to 4"):
        features.embedding(np.array([-1, 4]), table)
    with pytest.raises(DtypeError, match="tokens must be integers; got float64"):
        features.embedding(np.ones(3), table)
    assert features.embedding(np.zeros((0,), int), table).shape == (0, 2)


@pytest.mark.parametrize("library", ["array_api_strict", "torch", "jax.numpy"])
def test_other_array_libraries_give_the_same_numbers(library):
    xp = pytest.importorskip(library)
    rng = np.random.default_rng(5)
    x, table = rng.standard_normal((2, 5, 6), np.float32), rng.standard_normal((9, 6), np.float32)
    tokens = rng.integers(0, 9, (2, 5))
    for operation, arguments in (
            (features.rotary, (x,)), (features.add_positions, (x, table)),
            (features.embedding, (tokens.astype(np.int32), table))):
        wanted, saved = operation.forward(*arguments)
        out, other = operation.forward(*(xp.asarray(a) for a in arguments))
        assert type(out) is type(xp.asarray(x))
        close(out, wanted, rtol=1e-6)
        for got, want in zip(other.backward(out), saved.backward(wanted), strict=True):
            assert str(got.dtype).endswith("float32")
            close(got, want, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_rounded_once(dtype):
    import ml_dtypes

    dtype = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    x = np.random.default_rng(6).standard_normal((3, 4)).astype(dtype)
    wide = x.astype(np.float32)
    for operation, arguments, widened in (
            (features.rotary, (x,), (wide,)), (features.add_positions, (x, x), (wide, wide))):
        out, saved = operation.forward(*arguments)
        assert out.dtype == dtype
        assert np.array_equal(out, operation(*widened).astype(dtype))
        assert all(grad.dtype == dtype for grad in saved.backward(out))
