"""Overlapping blocks summed up: by loops over blocks and tokens, written out here."""

from __future__ import annotations

import array_api_strict
import numpy as np
import oracle
import pytest

import pyattn
from pyattn.checks import OptionError, ShapeError
from pyattn.features import compress
from pyattn.testing import gradcheck

SIZES = [(4, 2, 13), (5, 2, 13), (3, 1, 7), (2, 3, 11), (4, 4, 9), (4, 2, 3), (1, 1, 5),
         (4, 2, 0), (32, 16, 100)]
"""block_size, stride, tokens."""
G, D, F, O = 3, 4, 6, 5


def drawn(kind, size, lead=(), rng=None):
    """Weights of a kind; `lead` says whether heads have their own."""
    rng = np.random.default_rng(1) if rng is None else rng
    shapes = {"mean": {"pe": (size, D)},
              "mlp": {"pe": (size, D), "w1": (size * D, F), "b1": (F,), "w2": (F, O), "b2": (O,)},
              "depthwise": {"pe": (size, D), "kernel": (size, D)},
              "matrices": {"pe": (size, D), "kernel": (size, D, O)}}[kind]
    return {name: rng.standard_normal((*lead, *shape)) for name, shape in shapes.items()}


def options(kind, size, stride, **more):
    return {"block_size": size, "stride": stride, "activation": "relu",
            "kind": "conv" if kind in ("depthwise", "matrices") else kind, **more}


def summed_up(x, weights, kind, size, stride, lengths=None, dtype=np.float64):
    """One block of one head at a time, one token after the other."""
    x = x.astype(dtype)
    weights = {name: w.astype(dtype) for name, w in weights.items()}
    count = max((x.shape[-2] - size) // stride + 1, 0)
    width = O if kind in ("mlp", "matrices") else D
    y = np.zeros((*x.shape[:-2], count, width), dtype)
    for index in np.ndindex(x.shape[:-2]):
        end = x.shape[-2] if lengths is None else lengths[index[0]]
        own = {name: w[index[-1]] if len(w) == G and w.ndim > base else w
               for name, w in weights.items()
               for base in [{"b1": 1, "b2": 1, "kernel": 3 if kind == "matrices" else 2}.get(
                   name, 2)]}
        for c in range(count):
            if c * stride + size > end:
                continue
            tokens = x[index][c * stride:c * stride + size] + own.get("pe", 0)
            if kind == "mean":
                value = tokens.mean(0)
            elif kind == "mlp":
                value = np.maximum(tokens.reshape(-1) @ own["w1"] + own["b1"], 0) @ own["w2"]
                value = value + own["b2"]
            elif kind == "depthwise":
                value = sum(own["kernel"][t] * tokens[t] for t in range(size))
            else:
                value = sum(tokens[t] @ own["kernel"][t] for t in range(size))
            y[(*index, c)] = value
    return y


@pytest.mark.parametrize("own", [False, True], ids=["shared", "per head"])
@pytest.mark.parametrize("kind", ["mean", "mlp", "depthwise", "matrices"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_against_loops(sizes, kind, own):
    size, stride, n = sizes
    x = np.random.default_rng(0).standard_normal((2, G, n, D))
    weights = drawn(kind, size, (G,) if own else ())
    for lengths in (None, [n, n // 2]):
        got = compress(x, **weights, **options(kind, size, stride), lengths=lengths)
        want = summed_up(x, weights, kind, size, stride, lengths)
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
    narrow = compress(x.astype(np.float32), **weights, **options(kind, size, stride))
    assert narrow.dtype == np.float32


@pytest.mark.parametrize("own", [False, True], ids=["shared", "per head"])
@pytest.mark.parametrize("kind", ["mean", "mlp", "depthwise", "matrices"])
@pytest.mark.parametrize("sizes", [s for s in SIZES if s[2] >= s[0]], ids=str)
def test_gradients(sizes, kind, own):
    size, stride, n = sizes
    x = np.random.default_rng(0).standard_normal((2, G, n, D))
    result = gradcheck(compress, x, **drawn(kind, size, (G,) if own else ()),
                       **options(kind, size, stride, activation="silu"),
                       lengths=[n, max(n // 2, size)], n_projections=1)
    assert {a.name for a in result.arguments} >= {"x", "pe"}


@pytest.mark.parametrize("kind", ["mean", "mlp", "depthwise", "matrices"])
def test_float32(kind):
    x = np.random.default_rng(0).standard_normal((2, G, 40, D)).astype(np.float32)
    weights = {name: w.astype(np.float32) for name, w in drawn(kind, 8).items()}
    got = compress(x, **weights, **options(kind, 8, 4))
    exact = summed_up(x, weights, kind, 8, 4)
    rough = summed_up(x, weights, kind, 8, 4, dtype=np.float32)
    oracle.assert_close(got, exact, rough, factor=3, name="out", dtype=np.float32)


def test_blocks_that_overlap_add_their_gradients():
    x = np.zeros((1, 7, 1))
    _, saved = compress.forward(x, block_size=4, stride=1)
    # token 3 is in all four blocks, the first and the last in one
    np.testing.assert_allclose(saved.backward(np.ones((1, 4, 1))).x.ravel(),
                               np.array([1, 2, 3, 4, 3, 2, 1]) / 4)


def test_what_is_left_over_is_in_no_block():
    x = np.random.default_rng(0).standard_normal((1, 9, D))
    y, saved = compress.forward(x, block_size=4, stride=4)
    assert y.shape == (1, 2, D)
    assert (saved.backward(np.ones_like(y)).x[:, 8:] == 0).all()


@pytest.mark.parametrize("kind", ["mean", "mlp", "depthwise", "matrices"])
def test_padding_is_never_looked_at(kind):
    x = np.random.default_rng(0).standard_normal((2, G, 20, D))
    weights = drawn(kind, 4)
    for poison in (0.0, np.nan, np.inf):
        x[1, :, 11:] = poison
        y, saved = compress.forward(x, **weights, **options(kind, 4, 2), lengths=[20, 11])
        dout = np.ones_like(y)
        dout[1, :, 4:] = np.nan             # blocks that do not exist have no gradient either
        grads = saved.backward(dout)
        if poison == 0:
            want, wanted = y, grads
        np.testing.assert_array_equal(y, want)
        assert (y[1, :, 4:] == 0).all()
        for name in grads._fields:
            np.testing.assert_array_equal(getattr(grads, name), getattr(wanted, name))
        assert (grads.x[1, :, 11:] == 0).all()


@pytest.mark.parametrize("kind", ["mean", "mlp", "depthwise", "matrices"])
@pytest.mark.parametrize("lead", [(), (1,), (2, 3)])
@pytest.mark.parametrize("backend", ["cpu", "array_api"])
def test_one_length_for_all(backend, lead, kind):
    x = np.random.default_rng(0).standard_normal((*lead, G, 20, D))
    weights, given = drawn(kind, 4), options(kind, 4, 2)
    with pyattn.use_backend(backend):
        y, saved = compress.forward(x, **weights, **given, lengths=11)
        own = saved.backward(np.ones_like(y)).x
        want, saved = compress.forward(x[..., :11, :], **weights, **given)
        wanted = saved.backward(np.ones_like(want)).x
    np.testing.assert_array_equal(y[..., :4, :], want)
    np.testing.assert_array_equal(own[..., :11, :], wanted)
    assert y.shape[:-2] == x.shape[:-2]
    assert own.shape == x.shape
    assert not y[..., 4:, :].any()
    assert not own[..., 11:, :].any()


def test_other_libraries():
    x = np.random.default_rng(0).standard_normal((2, G, 20, D))
    for kind in ("mean", "mlp", "depthwise", "matrices"):
        weights = drawn(kind, 5)
        want, saved = compress.forward(x, **weights, **options(kind, 5, 3), lengths=[20, 13])
        wanted = saved.backward(want)
        held = {name: array_api_strict.asarray(w) for name, w in weights.items()}
        got, saved = compress.forward(array_api_strict.asarray(x), **held, **options(kind, 5, 3),
                                      lengths=[20, 13])
        np.testing.assert_allclose(np.asarray(got), want, rtol=1e-13, atol=1e-13)
        for name, grad in saved.backward(got)._asdict().items():
            np.testing.assert_allclose(np.asarray(grad), getattr(wanted, name), rtol=1e-12,
                                       atol=1e-12)


def test_inputs_stay_as_they_are():
    x = np.random.default_rng(0).standard_normal((1, 12, D))
    x.flags.writeable = False
    y, saved = compress.forward(x, block_size=4, stride=2)
    y.flags.writeable = False
    first, second = saved.backward(y), saved.backward(y)
    np.testing.assert_array_equal(first.x, second.x)


@pytest.mark.parametrize(("error", "change"), [
    (OptionError, {"block_size": 0}), (OptionError, {"stride": 0}), (OptionError, {"kind": "max"}),
    (OptionError, {"kind": "mlp"}), (OptionError, {"kind": "conv"}),
    (OptionError, {"kernel": np.ones((4, D))}), (ShapeError, {"pe": np.ones((3, D))}),
    (ShapeError, {"kind": "conv", "kernel": np.ones((2, 4, D))}),
    (ShapeError, {"lengths": [3, 3, 3]}), (ShapeError, {"lengths": 50}),
    (OptionError, {"lengths": 2.5}),
    (ShapeError, {"kind": "mlp", "w1": np.ones((4 * D, 2)), "w2": np.ones((3, D))}),
], ids=str)
def test_errors(error, change):
    with pytest.raises(error, match=r"must|needs|takes"):
        compress(np.ones((2, G, 8, D)), **{"block_size": 4, "stride": 2, **change})


def test_a_kernel_that_may_be_read_in_two_ways_is_refused():
    with pytest.raises(ShapeError, match="give"):
        compress(np.ones((4, 8, 4)), kernel=np.ones((4, 4, 4)), kind="conv", block_size=4, stride=2)
