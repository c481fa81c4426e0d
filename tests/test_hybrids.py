"""Attention over and beside convolutions and a recurrent network, and that network."""

from __future__ import annotations

import numpy as np
import pytest

from pyattn import layers
from pyattn.checks import OptionError, ShapeError
from pyattn.testing import gradcheck

WIDTH = 8


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def block(kind, seed=0, **options):
    return layers.init_hybrid_block(seed, WIDTH, kind=kind, num_heads=2, kernel_size=3, dtype="f8",
                                    **options)


def below(x, params, kind, **options):
    """What comes out beneath the attention: a block whose own two layers write zeros."""
    cut = {**params, "w_o": 0 * params["w_o"], "w2": 0 * params["w2"],
           "b_o": 0 * params["b_o"], "b2": 0 * params["b2"]}
    return layers.hybrid_block(x, cut, num_heads=2, kind=kind, **options)


def moved(f, x, place):
    """Which tokens of the output depend on token `place`."""
    changed = x.copy()
    changed[place] += draw(WIDTH, seed=9)
    return np.flatnonzero(abs(f(changed) - f(x)).max(axis=-1) > 1e-9).tolist()


@pytest.mark.parametrize("kind", ["convolution", "gru", "parallel"])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("options", [{"causal": True}, {"lengths": np.array([4, 7])},
                                     {"activation": "silu"}], ids=str)
def test_gradients(kind, norm, options):
    gradcheck(layers.hybrid_block, draw(2, 7, WIDTH), block(kind), num_heads=2, kind=kind,
              norm=norm, **options)


@pytest.mark.parametrize("kind", ["convolution", "parallel"])
def test_grouped_heads(kind):
    params = block(kind, num_kv_heads=1)
    gradcheck(layers.hybrid_block, draw(2, 7, WIDTH), params, num_heads=2, num_kv_heads=1,
              kind=kind)


def test_a_convolution_below_shifts_with_the_tokens_and_the_attention_above_sees_all():
    params, x = block("convolution"), draw(20, WIDTH)
    y = below(x, params, "convolution")
    again = below(np.roll(x, 4, axis=0), params, "convolution")
    np.testing.assert_allclose(again[5:19], y[1:15], atol=1e-13)
    assert moved(lambda x: below(x, params, "convolution"), x, 7) == [6, 7, 8]
    assert moved(lambda x: below(x, params, "convolution", causal=True), x, 7) == [7, 8, 9]
    whole = moved(lambda x: layers.hybrid_block(x, params, num_heads=2), x, 7)
    assert whole == list(range(20))
    causal = moved(lambda x: layers.hybrid_block(x, params, num_heads=2, causal=True), x, 7)
    assert causal == list(range(7, 20))


def test_a_recurrent_network_below_sees_what_came_before_and_the_attention_above_sees_all():
    params, x = block("gru"), draw(12, WIDTH)
    assert moved(lambda x: below(x, params, "gru"), x, 5) == list(range(5, 12))
    assert moved(lambda x: layers.hybrid_block(x, params, num_heads=2, kind="gru"), x, 5) == list(
        range(12))
    # it counts: equal tokens in other places are not equal any more
    same = below(np.broadcast_to(x[:1], x.shape), params, "gru")
    assert abs(same[0] - same[3]).max() > 1e-3


def test_mixed_heads_are_the_sum_of_both_kinds():
    params, x = block("parallel")["attention"], draw(2, 9, WIDTH)
    attention, convolution = params["attention"], dict(params["convolution"])
    w_o = convolution.pop("w_o")
    for causal in (False, True):
        apart = layers.multi_head(x, attention["w_qkv"], attention["w_o"], num_heads=2,
                                  causal=causal)
        apart = apart + layers.span_convolution(x, convolution, num_heads=2, causal=causal) @ w_o
        y = layers.mixed_heads(x, params, num_heads=2, causal=causal)
        np.testing.assert_allclose(y, apart, atol=1e-14)
    seen = moved(lambda x: layers.mixed_heads(x, params, num_heads=2, causal=True), x[0], 4)
    assert seen == list(range(4, 9))


@pytest.mark.parametrize("kind", ["convolution", "gru", "parallel"])
def test_padding_says_nothing(kind):
    params, x, lengths = block(kind), draw(2, 9, WIDTH), np.array([5, 9])
    y, saved = layers.hybrid_block.forward(x, params, num_heads=2, kind=kind, lengths=lengths)
    short = layers.hybrid_block(x[:1, :5], params, num_heads=2, kind=kind)
    np.testing.assert_allclose(y[:1, :5], short, atol=1e-13)
    dout = np.where(np.arange(9)[:, None] < lengths[:, None, None], y, 0)
    changed = x.copy()
    changed[0, 5:] = 7.0
    after, other = layers.hybrid_block.forward(changed, params, num_heads=2, kind=kind,
                                               lengths=lengths)
    np.testing.assert_array_equal(after[0, :5], y[0, :5])
    for a, b in zip(flattened(other.backward(dout).params), flattened(saved.backward(dout).params),
                    strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def flattened(params):
    return [y for x in params.values() for y in (flattened(x) if isinstance(x, dict) else [x])]


# the recurrent network


def by_hand(x, w_x, w_h, b_x, b_h, h):
    """One token after another, by the formulas."""
    size, states = len(w_h), []
    for token in x:
        gx, gh = token @ w_x + b_x, h @ w_h + b_h
        r, z = (1 / (1 + np.exp(-(gx + gh)[i * size:(i + 1) * size])) for i in range(2))
        n = np.tanh(gx[2 * size:] + r * gh[2 * size:])
        h = (1 - z) * n + z * h
        states.append(h)
    return np.array(states)


def test_gru_is_the_formula():
    params, x, state = layers.init_gru(0, 4, 3, dtype="f8"), draw(2, 9, 4), draw(2, 3)
    h = layers.gru(x, **params, state=state)
    for i in range(2):
        np.testing.assert_allclose(h[i], by_hand(x[i], **params, h=state[i]), atol=1e-14)
    # the state carries over from one piece to the next
    first = layers.gru(x[:, :5], **params, state=state)
    second = layers.gru(x[:, 5:], **params, state=first[:, -1])
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), h, atol=1e-14)


def test_gru_gradients_and_padding():
    params, x = layers.init_gru(0, 4, 3, dtype="f8"), draw(2, 9, 4)
    gradcheck(layers.gru, x, **params, state=draw(2, 3))
    gradcheck(layers.gru, x, params["w_x"], params["w_h"], lengths=np.array([0, 5]))
    poisoned = x.copy()
    poisoned[1, 5:] = np.nan
    h, saved = layers.gru.forward(poisoned, **params, lengths=[9, 5])
    dout = np.where(np.isnan(poisoned[..., :3]), np.nan, 1.0)
    assert not h[1, 5:].any()
    assert all(np.isfinite(g).all() for g in saved.backward(dout))
    for shape in ((0, 4), (2, 0, 4), (0, 3, 4), (1, 4)):
        h, saved = layers.gru.forward(draw(*shape), **params)
        assert h.shape == (*shape[:-1], 3)
        assert saved.backward(h).x.shape == shape


@pytest.mark.parametrize("library", ["array_api_strict", "torch"])
def test_other_libraries(library):
    xp = pytest.importorskip(library)
    params, x = layers.init_gru(0, 4, 3, dtype="f8"), draw(2, 9, 4)
    wanted, saved = layers.gru.forward(x, **params)
    h, other = layers.gru.forward(xp.asarray(x), **{n: xp.asarray(p) for n, p in params.items()})
    np.testing.assert_allclose(np.asarray(h), wanted, atol=1e-14)
    for a, b in zip(other.backward(h), saved.backward(wanted), strict=True):
        np.testing.assert_allclose(np.asarray(a), b, atol=1e-13)


@pytest.mark.parametrize(("error", "match", "call"), [
    (ShapeError, r"w_h must be \(S, 3 S\)", lambda: layers.gru(draw(5, 4), draw(4, 9), draw(3, 8))),
    (ShapeError, "w_x must have 3 S = 9 columns",
     lambda: layers.gru(draw(5, 4), draw(4, 8), draw(3, 9))),
    (ShapeError, r"state must have shape \(3,\)",
     lambda: layers.gru(draw(5, 4), draw(4, 9), draw(3, 9), state=draw(1, 3))),
    (OptionError, "params must have local", lambda: layers.hybrid_block(
        draw(5, 8), layers.init_transformer_block(0, 8), num_heads=2)),
    (OptionError, "kind must be one of", lambda: layers.hybrid_block(
        draw(5, 8), block("gru"), num_heads=2, kind="lstm")),
    (OptionError, "lengths is about all that mixes tokens", lambda: layers.hybrid_block(
        draw(5, 8), block("gru"), num_heads=2, kind="gru", kv_lengths=3)),
    (OptionError, "attention must be None", lambda: layers.hybrid_block(
        draw(5, 8), block("parallel"), num_heads=2, kind="parallel", attention=layers.multi_head)),
    (OptionError, "must have w_o", lambda: layers.mixed_heads(
        draw(5, 8), {"attention": block("gru") and {"w_qkv": draw(8, 24), "w_o": draw(8, 8)},
                     "convolution": {}}, num_heads=2)),
    (OptionError, "width must be a multiple of 2 num_heads",
     lambda: layers.init_hybrid_block(0, 6, kind="parallel", num_heads=2)),
])
def test_errors_name_the_argument_the_rule_and_what_was_given(error, match, call):
    with pytest.raises(error, match=match):
        call()
