"""Cross-modal attention: which token sees which, by dense formulas written here."""

import numpy as np
import pytest

import pyattn
from pyattn import masks
from pyattn.checks import OptionError, ShapeError

RNG = np.random.default_rng(0)
Q, K = RNG.standard_normal((2, 2, 4, 9, 6))
V, DOUT = RNG.standard_normal((2, 2, 4, 9, 3))
LENGTHS = (4, 3, 2)
NUMBER = np.repeat([0, 1, 2], LENGTHS)
OTHERS = NUMBER[:, None] != NUMBER[None, :]


def dense(q, k, v, allowed):
    s = np.where(allowed, q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True) @ v


def close(got, wanted, rtol=1e-12):
    np.testing.assert_allclose(got, wanted, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("interactive", [False, True])
def test_forward(interactive):
    out = pyattn.cross_modal_attention(Q, K, V, modality_lengths=LENGTHS, interactive=interactive)
    close(out, dense(Q, K, V, OTHERS if interactive else True))


@pytest.mark.parametrize("interactive", [False, True])
def test_backward_by_differences(interactive):
    options = {"modality_lengths": LENGTHS, "interactive": interactive}
    arguments = {"q": Q, "k": K, "v": V}
    _, saved = pyattn.cross_modal_attention.forward(**arguments, **options)
    grads = saved.backward(DOUT)
    for name, x in arguments.items():
        direction = np.random.default_rng(1).standard_normal(x.shape)
        allowed = OTHERS if interactive else True
        ends = [np.sum(DOUT * dense(**arguments | {name: x + step * direction}, allowed=allowed))
                for step in (1e-5, -1e-5)]
        close(np.sum(getattr(grads, name) * direction), (ends[0] - ends[1]) / 2e-5, rtol=1e-6)


def test_joint_with_the_cross_block_masked_is_separate_attentions():
    out, saved = pyattn.cross_modal_attention.forward(
        Q, K, V, modality_lengths=LENGTHS, mask=masks.segments(LENGTHS))
    grads = saved.backward(DOUT)
    for start, end in ((0, 4), (4, 7), (7, 9)):
        part = np.s_[..., start:end, :]
        alone, own = pyattn.attention.forward(Q[part], K[part], V[part])
        close(out[part], alone)
        for got, want in zip(grads, own.backward(DOUT[part]), strict=True):
            close(got[part], want)


def test_interactive_with_one_image_token_returns_its_value():
    out = pyattn.cross_modal_attention(Q, K, V, modality_lengths=(8, 1), interactive=True)
    close(out[..., :8, :], np.broadcast_to(V[..., 8:, :], (2, 4, 8, 3)))
    close(out[..., 8:, :], dense(Q[..., 8:, :], K[..., :8, :], V[..., :8, :], True))


def test_a_modality_without_partner_finds_nothing():
    (out, lse), saved = pyattn.cross_modal_attention.forward(
        Q, K, V, modality_lengths=(9, 0), interactive=True, return_lse=True)
    assert not out.any()
    assert np.all(lse == -np.inf)
    assert not any(grad.any() for grad in saved.backward(DOUT, np.zeros_like(lse)))


@pytest.mark.parametrize("as_array", [False, True])
def test_a_mask_is_intersected(as_array):
    causal = np.tri(9, dtype=bool)
    mask = causal if as_array else masks.causal()
    out = pyattn.cross_modal_attention(Q, K, V, modality_lengths=LENGTHS, interactive=True,
                                       mask=mask)
    close(out[..., 4:, :], dense(Q, K, V, OTHERS & causal | np.eye(9, dtype=bool)
                                 * (NUMBER == 0))[..., 4:, :])
    assert not out[..., :4, :].any()


def test_other_options_reach_attention():
    bias = RNG.standard_normal((4, 9, 9))
    options = {"modality_lengths": LENGTHS, "bias": bias, "causal": True}
    out, saved = pyattn.cross_modal_attention.forward(Q, K, V, **options)
    close(out, pyattn.attention(Q, K, V, bias=bias, causal=True))
    assert saved.backward(DOUT)._fields == ("q", "k", "v", "bias")
    with pytest.raises(TypeError, match="wndow"):
        pyattn.cross_modal_attention(Q, K, V, modality_lengths=LENGTHS, wndow=3)


def test_errors():
    with pytest.raises(ShapeError, match=r"\[4, 4\] add up to 8, q is \(2, 4, 9, 6\)"):
        pyattn.cross_modal_attention(Q, K, V, modality_lengths=(4, 4))
    with pytest.raises(ShapeError, match=r"k is \(2, 4, 8, 6\)"):
        pyattn.cross_modal_attention(Q, K[..., :8, :], V[..., :8, :], modality_lengths=LENGTHS)
    for lengths in ((), 9):
        with pytest.raises(OptionError, match="modality_lengths must be a sequence"):
            pyattn.cross_modal_attention(Q, K, V, modality_lengths=lengths)
    with pytest.raises(OptionError, match="modality_lengths must be at least 0; got -1"):
        pyattn.cross_modal_attention(Q, K, V, modality_lengths=(10, -1))
    with pytest.raises(OptionError, match=r"modality_lengths must be an integer; got 4\.5"):
        pyattn.cross_modal_attention(Q, K, V, modality_lengths=(4.5, 4.5))
