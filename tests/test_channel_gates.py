"""Squeeze-and-excitation, CBAM and both: formulas written apart, gradients, what they promise."""

from __future__ import annotations

import array_api_strict
import ml_dtypes
import numpy as np
import oracle
import pytest

import pyattn
from pyattn import layers
from pyattn.checks import OptionError, ShapeError
from pyattn.testing import gradcheck

CHANNELS, HIDDEN = 6, 3
SHAPES = [(2, CHANNELS, 5, 4), (CHANNELS, 1, 1), (2, 1, CHANNELS, 3, 9)]


def draw(*shape, dtype=np.float64, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def network(seed=0, hidden=HIDDEN, biases=True, dtype=np.float64):
    w1, w2 = draw(CHANNELS, hidden, seed=seed), draw(hidden, CHANNELS, seed=seed)
    b1, b2 = (draw(hidden, seed=seed), draw(CHANNELS, seed=seed)) if biases else (None, None)
    return tuple(x if x is None else x.astype(dtype) for x in (w1, b1, w2, b2))


def zeros(k=3):
    return (np.zeros((CHANNELS, 2)), None, np.zeros((2, CHANNELS)), None, np.zeros((2, k, k)))


# the formulas


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def net(p, w1, b1, w2, b2, r):
    hidden = r(np.maximum(r(p @ r(w1)) + (0 if b1 is None else r(b1)), 0))
    return r(r(hidden @ r(w2)) + (0 if b2 is None else r(b2)))


def excite(x, weights, r):
    return r(x * r(sigmoid(net(r(x.mean((-2, -1))), *weights, r)))[..., None, None])


def pixels(x, w, r, *, order="max_mean", gamma=None, beta=None, statistics=None, eps=1e-5):
    maps = [x.max(-3), r(x.mean(-3))]
    maps = np.stack(maps if order == "max_mean" else maps[::-1], -3)
    k = w.shape[1] // 2
    wide = np.pad(maps, [(0, 0)] * (maps.ndim - 2) + [(k, k)] * 2)
    rows, columns = x.shape[-2:]
    y = sum(wide[..., c, i:i + rows, j:j + columns] * r(w)[c, i, j]
            for c, i, j in np.ndindex(w.shape))
    if gamma is not None:
        mean, variance = statistics or (y.mean(), y.var())
        y = gamma * (y - mean) / np.sqrt(variance + eps) + beta
    return r(x * r(sigmoid(r(y)))[..., None, :, :])


def both(x, weights, w, r, **options):
    gates = sigmoid(r(net(r(x.mean((-2, -1))), *weights, r) + net(x.max((-2, -1)), *weights, r)))
    return pixels(r(x * r(gates)[..., None, None]), w, r, **options)


FUNCTIONS = {
    "se": (lambda x, n, m, w: (pyattn.squeeze_excite, (x, *n), {}),
           lambda x, n, m, w, r: excite(x, n, r)),
    "cbam": (lambda x, n, m, w: (pyattn.cbam, (x, *n, w), {}),
             lambda x, n, m, w, r: both(x, n, w, r)),
    "serial": (lambda x, n, m, w: (pyattn.se_cbam, (x, *n, w), {}),
               lambda x, n, m, w, r: pixels(excite(x, n, r), w, r)),
    "full": (lambda x, n, m, w: (pyattn.se_cbam, (x, *n, w, *m), {"mode": "full"}),
             lambda x, n, m, w, r: both(excite(x, n, r), m, w, r)),
    "parallel": (lambda x, n, m, w: (pyattn.se_cbam, (x, *n, w, *m), {"mode": "parallel"}),
                 lambda x, n, m, w, r: r((excite(x, n, r) + both(x, m, w, r)) / 2)),
}


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16],
                         ids=lambda x: np.dtype(x).name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward(name, shape, dtype):
    x = draw(*shape, dtype=dtype)
    given = network(dtype=dtype), network(1, 2, biases=False, dtype=dtype), draw(
        2, 7, 7, dtype=dtype) / dtype(4)
    function, arguments, options = FUNCTIONS[name][0](x, *given)
    out = function(*arguments, **options)
    exact, rough = (FUNCTIONS[name][1](r(x), *given, r)
                    for r in (oracle.exact(dtype), oracle.plain(dtype)))
    oracle.assert_close(out, exact, rough, factor=2, name=name, dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients(name, shape):
    function, arguments, options = FUNCTIONS[name][0](
        draw(*shape), network(), network(1, 2, biases=False), draw(2, 3, 3))
    gradcheck(function, *arguments, **options)


@pytest.mark.parametrize("options", [{}, {"order": "mean_max"}, {"statistics": (0.3, 2.0)},
                                     {"eps": 0.1}], ids=str)
def test_normalised_map(options):
    x, weights, w = draw(2, CHANNELS, 5, 4), network(biases=False), draw(2, 3, 3)
    more = {"gamma": np.array([1.3]), "beta": np.array(0.2)}
    out, saved = pyattn.cbam.forward(x, *weights, w, **more, **options)
    r = oracle.exact(np.float32)
    np.testing.assert_allclose(out, both(x, weights, w, r, **more, **options), atol=1e-12)
    if "eps" not in options:        # which is an option of gradcheck, too
        gradcheck(pyattn.cbam, x, *weights, w, **more, **options)
        gradcheck(pyattn.se_cbam, x, *weights, w, **more, **options)
    assert (saved.statistics is None) == ("statistics" in options)
    if saved.statistics:
        again = pyattn.cbam(x, *weights, w, **more, **options, statistics=saved.statistics)
        np.testing.assert_allclose(again, out, atol=1e-14)


@pytest.mark.parametrize("library", ["array_api_strict", "torch"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_libraries(name, library):
    xp = array_api_strict if library == "array_api_strict" else pytest.importorskip(library)
    given = draw(2, CHANNELS, 5, 4), network(), network(1, 2), draw(2, 3, 3)
    theirs = [tuple(map(xp.asarray, x)) if isinstance(x, tuple) else xp.asarray(x) for x in given]
    (function, arguments, options), (_, others, _) = (
        FUNCTIONS[name][0](*x) for x in (given, theirs))
    wanted, saved = function.forward(*arguments, **options)
    found, other = function.forward(*others, **options)
    np.testing.assert_allclose(np.asarray(found), wanted, atol=1e-13)
    for a, b in zip(other.backward(found), saved.backward(wanted), strict=True):
        np.testing.assert_allclose(np.asarray(a), b, atol=1e-12)


# what the papers promise


def test_a_network_of_zeros_halves():
    x = draw(2, CHANNELS, 5, 4)
    none = zeros()
    np.testing.assert_array_equal(pyattn.squeeze_excite(x, *none[:4]), x / 2)
    np.testing.assert_array_equal(pyattn.cbam(x, *none), x / 4)
    np.testing.assert_array_equal(pyattn.se_cbam(x, *none), x / 4)
    np.testing.assert_array_equal(pyattn.se_cbam(x, *none, *none[:4], mode="full"), x / 8)
    np.testing.assert_allclose(pyattn.se_cbam(x, *none, *none[:4], mode="parallel"), 3 * x / 8)


def test_pixels_may_change_places_for_channel_gates_and_not_for_pixel_gates():
    x, order = draw(2, CHANNELS, 5, 4), np.random.default_rng(0).permutation(20)

    def moved(y):
        return y.reshape(2, CHANNELS, 20)[..., order].reshape(y.shape)

    np.testing.assert_allclose(pyattn.squeeze_excite(moved(x), *network()),
                               moved(pyattn.squeeze_excite(x, *network())), atol=1e-14)
    channels_alone = *network(), np.zeros((2, 3, 3))
    np.testing.assert_allclose(pyattn.cbam(moved(x), *channels_alone),
                               moved(pyattn.cbam(x, *channels_alone)), atol=1e-14)
    whole = *network(), draw(2, 3, 3)
    assert abs(pyattn.cbam(moved(x), *whole) - moved(pyattn.cbam(x, *whole))).max() > 1e-2


def test_with_one_pixel_mean_and_maximum_are_one_so_the_logit_doubles():
    x, (w1, _, w2, _) = draw(3, CHANNELS, 1, 1), network()
    once = pyattn.squeeze_excite(x, w1, None, 2 * w2, None)
    none = np.zeros((2, 3, 3))
    np.testing.assert_allclose(pyattn.cbam(x, w1, None, w2, None, none), once / 2, atol=1e-15)


def test_order_is_that_of_the_maps():
    x, weights, w = draw(2, CHANNELS, 5, 4), network(), draw(2, 3, 3)
    np.testing.assert_allclose(pyattn.cbam(x, *weights, w[::-1], order="mean_max"),
                               pyattn.cbam(x, *weights, w), atol=1e-14)
    assert abs(pyattn.cbam(x, *weights, w, order="mean_max")
               - pyattn.cbam(x, *weights, w)).max() > 1e-3


def test_the_first_of_equals_has_the_gradient():
    x = np.zeros((CHANNELS, 2, 3))
    x[:, 0, 2] = x[:, 1, 0] = 1.0
    x[:2] *= 2
    w = np.zeros((2, 1, 1))
    w[0] = 1.0
    weights = np.ones((CHANNELS, 1)), None, np.ones((1, CHANNELS)), None
    _, saved = pyattn.cbam.forward(x, *weights, w)
    assert (saved.decisions["channel_argmax"] == 2).all()
    assert saved.decisions["spatial_argmax"].tolist() == [[0, 0, 0], [0, 0, 0]]
    grads = saved.backward(x)
    assert (grads.x[:, 0, 2] != grads.x[:, 1, 0]).all()
    # channel 0 and channel 1 are equal, and the first is the pixel's maximum
    assert (grads.x[0, 0, 2], grads.x[0, 1, 0]) != (grads.x[1, 0, 2], grads.x[1, 1, 0])
    again = pyattn.cbam.forward(x, *weights, w, decisions=saved.decisions)[1]
    np.testing.assert_array_equal(again.backward(x).x, grads.x)
    other = {"channel_argmax": np.full(CHANNELS, 3)}
    moved = pyattn.cbam.forward(x, *weights, w, decisions=other)[1]
    assert (moved.decisions["channel_argmax"] == 3).all()
    assert (moved.decisions["spatial_argmax"] == saved.decisions["spatial_argmax"]).all()


def test_items_do_not_see_each_other_and_arguments_stay_as_they_are():
    x, weights, w = draw(3, CHANNELS, 5, 4), network(), draw(2, 3, 3)
    for name, (call, _) in FUNCTIONS.items():
        function, arguments, options = call(x, weights, network(1), w)
        for a in arguments:
            a.flags.writeable = False
        out, saved = function.forward(*arguments, **options)
        grads = saved.backward(out)
        np.testing.assert_array_equal(grads.x, saved.backward(out).x, err_msg=name)
        function, arguments, options = call(x[1], weights, network(1), w)
        one, other = function.forward(*arguments, **options)
        np.testing.assert_allclose(out[1], one, atol=1e-15)
        np.testing.assert_allclose(grads.x[1], other.backward(one).x, atol=1e-14)


@pytest.mark.parametrize("shape", [(0, CHANNELS, 3, 3), (2, CHANNELS, 0, 3)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_at_all(name, shape):
    function, arguments, options = FUNCTIONS[name][0](draw(*shape), network(), network(1),
                                                      draw(2, 3, 3))
    out, saved = function.forward(*arguments, **options)
    assert out.shape == saved.backward(out).x.shape == shape
    assert not saved.backward(out).w1.any()


def test_cost_is_linear_in_the_pixels():
    counts = [pyattn.cbam.forward(draw(CHANNELS, n, 8), *network(), draw(2, 7, 7))[1].stats
              for n in (8, 16, 32)]
    flops = [c["flops"] for c in counts]
    assert flops[2] - flops[1] == 2 * (flops[1] - flops[0])


X = draw(2, CHANNELS, 5, 4)


@pytest.mark.parametrize(("error", "match", "call"), [
    (ShapeError, r"x must be \(..., C, H, W\)",
     lambda: pyattn.squeeze_excite(draw(5, 4), *network())),
    (ShapeError, r"w1 must be \(C, R\) and w2 \(R, C\) for C = 6",
     lambda: pyattn.squeeze_excite(X, draw(5, 3), None, draw(3, 5), None)),
    (ShapeError, r"b1 must have shape \(3,\)", lambda: pyattn.squeeze_excite(
        X, draw(6, 3), draw(6), draw(3, 6), None)),
    (ShapeError, r"w_spatial must be \(2, k, k\), k odd",
     lambda: pyattn.cbam(X, *network(), draw(2, 4, 4))),
    (OptionError, "gamma and beta must be given both",
     lambda: pyattn.cbam(X, *network(), draw(2, 3, 3), draw(1))),
    (OptionError, "order must be one of", lambda: pyattn.cbam(X, *network(), draw(2, 3, 3),
                                                              order="mean")),
    (OptionError, "statistics are of the batch normalisation",
     lambda: pyattn.cbam(X, *network(), draw(2, 3, 3), statistics=(0, 1))),
    (OptionError, "decisions may hold channel_argmax, spatial_argmax",
     lambda: pyattn.cbam(X, *network(), draw(2, 3, 3), decisions={"blocks": 0})),
    (ShapeError, r"decisions\['channel_argmax'\] must be integers \(2, 6\)",
     lambda: pyattn.cbam(X, *network(), draw(2, 3, 3),
                         decisions={"channel_argmax": np.zeros(6, int)})),
    (OptionError, r"must lie in 0\.\.19", lambda: pyattn.cbam(
        X, *network(), draw(2, 3, 3), decisions={"channel_argmax": np.full((2, 6), 20)})),
    (OptionError, "mode 'serial' has no second network; got w1_cbam",
     lambda: pyattn.se_cbam(X, *network(), draw(2, 3, 3), *network())),
    (OptionError, "mode 'full' needs w1_cbam and w2_cbam",
     lambda: pyattn.se_cbam(X, *network(), draw(2, 3, 3), mode="full")),
    (ShapeError, r"w1_cbam must be \(C, R\)", lambda: pyattn.se_cbam(
        X, *network(), draw(2, 3, 3), draw(5, 2), None, draw(2, 5), mode="full")),
    (ShapeError, "dout must have shape", lambda: pyattn.cbam.forward(
        X, *network(), draw(2, 3, 3))[1].backward(X[0])),
])
def test_errors_name_the_argument_the_rule_and_what_was_given(error, match, call):
    with pytest.raises(error, match=match):
        call()


def test_the_gate_of_pixels_is_a_convolution():
    """By `conv2d`, which has tests of its own."""
    x, w = draw(CHANNELS, 6, 7), draw(2, 5, 5)
    out = pyattn.cbam(x, *zeros()[:4], w)
    maps = np.stack([x.max(0), x.mean(0)]) / 2
    np.testing.assert_allclose(out, x / 2 * sigmoid(layers.conv2d(
        maps, w.transpose(1, 2, 0)[..., None])), atol=1e-14)
