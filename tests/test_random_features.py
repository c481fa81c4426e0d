"""Random features: their draws, their formula and gradient, and what they estimate."""

from __future__ import annotations

import math

import array_api_strict
import ml_dtypes
import numpy as np
import pytest

from pyattn.checks import DtypeError, OptionError, ShapeError
from pyattn.features import projection_at, random_features, random_projection
from pyattn.testing import gradcheck


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


# the projection


@pytest.mark.parametrize(("features", "width"), [(1, 1), (3, 8), (8, 8), (20, 8), (266, 64)])
def test_rows_of_a_block_are_at_right_angles(features, width):
    w = random_projection(features, width, rng=0)
    assert w.shape == (features, width)
    assert w.dtype == np.float64
    for start in range(0, features, width):
        block = w[start:start + width]
        products = block @ block.T
        np.testing.assert_allclose(products, np.diag(np.diag(products)), atol=1e-11)


@pytest.mark.parametrize("orthogonal", [True, False])
def test_lengths_of_rows(orthogonal):
    w = random_projection(4000, 6, orthogonal=orthogonal, scaling=1, rng=0)
    np.testing.assert_allclose((w**2).sum(axis=1), 6)
    w = random_projection(4000, 6, orthogonal=orthogonal, scaling=0, rng=0)
    # as those of six normal numbers: chi-squared, of mean 6 and variance 12
    square = (w**2).sum(axis=1)
    assert abs(square.mean() - 6) < 4 * math.sqrt(12 / 4000)
    assert abs(square.var() - 12) < 2


def test_blocks_are_drawn_uniformly():
    """Without the sign of R's diagonal, some entries would have a sign that is more frequent."""
    w = random_projection(6000, 3, scaling=1, rng=0).reshape(-1, 3, 3) / math.sqrt(3)
    assert abs(w.mean(axis=0)).max() < 5 * math.sqrt(1 / 3 / 2000)
    assert abs((w**2).mean(axis=0) - 1 / 3).max() < 0.03
    # both rotations and reflections
    assert abs(np.linalg.det(w).mean()) < 0.1


def test_draws_come_from_the_generator():
    again = [random_projection(9, 4, rng=rng) for rng in (0, 0, 1)]
    assert np.array_equal(again[0], again[1])
    assert not np.array_equal(again[0], again[2])
    rng = np.random.default_rng(0)
    assert not np.array_equal(random_projection(9, 4, rng=rng), random_projection(9, 4, rng=rng))


def test_redrawing_depends_on_the_step_alone():
    drawn = [projection_at(step, 9, 4, period=10, seed=3) for step in (0, 9, 10, 19, 20)]
    assert np.array_equal(drawn[0], drawn[1])
    assert np.array_equal(drawn[2], drawn[3])
    assert not np.array_equal(drawn[1], drawn[2])
    assert not np.array_equal(drawn[3], drawn[4])
    assert not np.array_equal(drawn[0], projection_at(0, 9, 4, period=10, seed=4))
    assert drawn[0].shape == (9, 4)


@pytest.mark.parametrize(("arguments", "options"), [
    ((0, 4), {}), ((4, 0), {}), ((4, 4), {"scaling": 2}), ((4.5, 4), {})])
def test_a_projection_that_cannot_be(arguments, options):
    with pytest.raises(OptionError):
        random_projection(*arguments, **options)


@pytest.mark.parametrize(("step", "options"), [
    (-1, {"period": 5}), (0, {"period": 0}), (0, {"period": 5, "seed": -1})])
def test_a_step_that_cannot_be(step, options):
    with pytest.raises(OptionError):
        projection_at(step, 4, 4, **options)


# the features


def formula(x, w, kernel, scale, epsilon, stabiliser, reference, lengths):
    """One number at a time, in longdouble."""
    out = np.zeros((*x.shape[:-1], len(w)), np.longdouble)
    for lead in np.ndindex(x.shape[:-2]):
        end = x.shape[-2] if lengths is None else lengths[lead[0]]
        rows = scale * x[lead][:end].astype(np.longdouble)
        h = np.array([[sum(a * b for a, b in zip(row, f, strict=True)) for f in w]
                      for row in rows]).reshape(end, len(w))
        if kernel == "relu":
            out[lead][:end] = np.maximum(h, 0) + epsilon
            continue
        half = (rows**2).sum(axis=-1, keepdims=True) / 2
        against = h if reference else h - half
        peak = {None: np.longdouble(0), "token": against.max(axis=-1, keepdims=True),
                "sequence": against.max(initial=-np.inf)}[stabiliser]
        out[lead][:end] = (np.exp(h - half - peak) + epsilon) / np.sqrt(np.longdouble(len(w)))
    return out


KINDS = [("softmax", stabiliser, reference) for stabiliser in ("token", "sequence", None)
         for reference in (False, True)] + [("relu", "token", False), ("relu", "token", True)]


@pytest.mark.parametrize("lengths", [None, (0, 7, 4)])
@pytest.mark.parametrize(("kernel", "stabiliser", "reference"), KINDS)
def test_against_the_formula(kernel, stabiliser, reference, lengths):
    x, w = draw(3, 2, 7, 4), draw(9, 4, seed=1)
    if lengths is not None:
        for item, end in enumerate(lengths):
            x[item, :, end:] = np.nan
    options = {"kernel": kernel, "stabiliser": stabiliser, "reference": reference}
    default = 1e-3 if kernel == "relu" else 1e-4 if reference else 0
    got = random_features(x, w, **options, lengths=lengths)
    want = formula(x, w, kernel, 4**-0.25, default, stabiliser, reference, lengths)
    np.testing.assert_allclose(got, want.astype(np.float64), rtol=1e-13, atol=1e-300)
    got = random_features(x, w, **options, lengths=lengths, scale=0.8, epsilon=0.02)
    want = formula(x, w, kernel, 0.8, 0.02, stabiliser, reference, lengths)
    np.testing.assert_allclose(got, want.astype(np.float64), rtol=1e-13)


@pytest.mark.parametrize("epsilon", [None, 0.0, 0.05])
@pytest.mark.parametrize("lengths", [None, (0, 5, 3)])
@pytest.mark.parametrize(("kernel", "stabiliser", "reference"), KINDS)
def test_gradient(kernel, stabiliser, reference, lengths, epsilon):
    """The stabiliser's part included: the difference is that of the whole formula."""
    gradcheck(random_features, draw(3, 2, 5, 4), draw(9, 4, seed=1), kernel=kernel,
              stabiliser=stabiliser, reference=reference, lengths=lengths, epsilon=epsilon,
              wrt=["x"])


@pytest.mark.parametrize("stabiliser", ["token", "sequence"])
def test_without_the_stabiliser_s_part_the_gradient_is_wrong(stabiliser):
    """Other code has it as a constant; how far that is off, where epsilon is theirs."""
    x, w = draw(1, 6, 4), draw(9, 4, seed=1)
    _, saved = random_features.forward(x, w, stabiliser=stabiliser, reference=True)
    whole = saved.backward(np.ones((1, 6, 9))).x
    # features of a constant peak: those without one, and the peak multiplied in
    plain, saved = random_features.forward(x, w, stabiliser=None, epsilon=0.0)
    h = 4**-0.25 * x @ w.T
    peak = h.max(axis=-1 if stabiliser == "token" else (-2, -1), keepdims=True)
    constant = saved.backward(np.broadcast_to(np.exp(-peak), plain.shape)).x
    assert np.abs(whole - constant).max() > 1e-2 * np.abs(whole).max()


def test_padding_has_no_say():
    x, w = draw(2, 1, 6, 4), draw(9, 4, seed=1)
    dirty = x.copy()
    dirty[0, :, 2:], dirty[1, :, 5:] = np.nan, np.inf
    for stabiliser in ("token", "sequence", None):
        options = {"stabiliser": stabiliser, "lengths": [2, 5], "reference": True}
        out, saved = random_features.forward(dirty, w, **options)
        grad = saved.backward(np.full(out.shape, 3.0)).x
        assert np.isfinite(out).all()
        assert np.isfinite(grad).all()
        assert not out[0, :, 2:].any()
        assert not grad[1, :, 5:].any()
        alone = random_features(x[:1, :, :2], w, stabiliser=stabiliser, reference=True)
        np.testing.assert_allclose(out[:1, :, :2], alone, rtol=1e-14)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (1, 4), (3, 2, 1, 4)])
@pytest.mark.parametrize("stabiliser", ["token", "sequence", None])
def test_few_tokens(shape, stabiliser):
    out, saved = random_features.forward(draw(*shape), draw(5, 4), stabiliser=stabiliser)
    assert out.shape == (*shape[:-1], 5)
    assert saved.backward(out).x.shape == shape


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_narrow_dtypes_are_rounded_once(dtype):
    x, w = draw(2, 6, 8).astype(dtype), draw(12, 8, seed=1).astype(np.float32)
    out, saved = random_features.forward(x, w)
    want, wide = random_features.forward(x.astype(np.float64), w)
    assert out.dtype == dtype
    unit = 4 * float(ml_dtypes.finfo(dtype).eps)
    np.testing.assert_allclose(out.astype(np.float64), want, rtol=0, atol=unit * want.max())
    grad, exact = (s.backward(y).x for s, y in ((saved, out), (wide, out.astype(np.float64))))
    assert grad.dtype == dtype
    np.testing.assert_allclose(grad.astype(np.float64), exact, rtol=0, atol=unit * abs(exact).max())


@pytest.mark.parametrize("library", ["array_api_strict", "torch"])
@pytest.mark.parametrize(("kernel", "stabiliser", "reference"), KINDS)
def test_other_array_libraries_give_the_same_numbers(library, kernel, stabiliser, reference):
    xp = array_api_strict if library == "array_api_strict" else pytest.importorskip(library)
    x, w = draw(2, 1, 6, 4), draw(9, 4, seed=1)
    options = {"kernel": kernel, "stabiliser": stabiliser, "reference": reference,
               "lengths": [3, 6]}
    want, kept = random_features.forward(x, w, **options)
    got, saved = random_features.forward(xp.asarray(x), xp.asarray(w), **options)
    np.testing.assert_allclose(np.asarray(got), want, rtol=1e-12)
    np.testing.assert_allclose(np.asarray(saved.backward(got).x), kept.backward(want).x,
                               rtol=1e-11, atol=1e-13)


def test_arguments_are_not_written_to():
    x, w = draw(2, 1, 6, 4), draw(9, 4, seed=1)
    for given in (x, w):
        given.flags.writeable = False
    out, saved = random_features.forward(x, w, lengths=[2, 6])
    out.flags.writeable = False
    first, second = saved.backward(out), saved.backward(out)
    assert np.array_equal(first.x, second.x)


@pytest.mark.parametrize(("error", "arguments", "options", "match"), [
    (ShapeError, (draw(3, 4), draw(9, 5)), {}, "projection must be"),
    (ShapeError, (draw(3, 4), draw(0, 4)), {}, "projection must be"),
    (ShapeError, (draw(4), draw(9, 4)), {}, "x must be"),
    (ShapeError, (draw(3, 4), draw(9, 4)), {"lengths": 2}, "x must be"),
    (ShapeError, (draw(2, 1, 3, 4), draw(9, 4)), {"lengths": [1, 4]}, "lengths must lie"),
    (OptionError, (draw(2, 1, 3, 4), draw(9, 4)), {"lengths": [1.0, 2.0]}, "integers"),
    (OptionError, (draw(3, 4), draw(9, 4)), {"kernel": "cosine"}, "kernel must be"),
    (OptionError, (draw(3, 4), draw(9, 4)), {"stabiliser": "batch"}, "stabiliser must be"),
    (OptionError, (draw(3, 4), draw(9, 4)), {"epsilon": -1e-3}, "epsilon must be"),
    (OptionError, (draw(3, 4), draw(9, 4)), {"scale": math.inf}, "scale must be"),
    (DtypeError, (np.ones((3, 4), int), draw(9, 4)), {}, "x must be"),
])
def test_arguments_that_do_not_fit(error, arguments, options, match):
    with pytest.raises(error, match=match):
        random_features(*arguments, **options)


def test_a_gradient_of_another_shape_is_refused():
    _, saved = random_features.forward(draw(3, 4), draw(9, 4))
    with pytest.raises(ShapeError, match="dout"):
        saved.backward(draw(3, 4))


# what they estimate


@pytest.mark.parametrize("orthogonal", [True, False])
def test_their_products_are_the_kernel_in_the_mean(orthogonal):
    x, y = draw(2, 8) / 2
    draws, each = 4000, 8
    rng = np.random.default_rng(0)
    products = np.empty(draws)
    for i in range(draws):
        w = random_projection(each, 8, orthogonal=orthogonal, rng=rng)
        a, b = (random_features(z[None], w, stabiliser=None) for z in (x, y))
        products[i] = (a * b).sum()
    want = math.exp(x @ y / math.sqrt(8))
    assert abs(products.mean() - want) < 4 * products.std() / math.sqrt(draws)
    assert products.std() / math.sqrt(draws) < 0.05 * want


def attention_error(features, *, orthogonal=True, draws=12, n=64, width=16):
    """Root of the mean squared error of attention by features, relative to that of the values."""
    q, k, v = draw(3, n, width) / 3
    weights = np.exp(q @ k.T / math.sqrt(width))
    exact = weights @ v / weights.sum(axis=1, keepdims=True)
    square = []
    for seed in range(draws):
        w = random_projection(features, width, orthogonal=orthogonal, rng=seed)
        a = random_features(q, w) @ random_features(k, w, stabiliser="sequence").T
        square.append(np.mean((a @ v / a.sum(axis=1, keepdims=True) - exact) ** 2))
    return math.sqrt(np.mean(square) / np.mean(exact**2))


def test_the_error_falls_as_the_root_of_the_number_of_features():
    times_root = [attention_error(m) * math.sqrt(m) for m in (256, 1024, 4096)]
    assert max(times_root) < 1.25 * min(times_root)


def test_orthogonal_directions_have_a_lower_error():
    assert attention_error(256, draws=40) < 0.97 * attention_error(256, orthogonal=False, draws=40)
