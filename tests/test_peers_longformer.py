"""Longformer against the Hugging Face layer, with its weights: forward and all gradients."""

from __future__ import annotations

import numpy as np
import pytest

import pyattn

pytestmark = pytest.mark.peers

N, WIDTH, HEADS, WINDOW = 48, 24, 3, 8
PROJECTIONS = ("query", "key", "value", "query_global", "key_global", "value_global")


@pytest.fixture(scope="module")
def layer():
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    torch.manual_seed(0)
    config = LongformerConfig(hidden_size=WIDTH, num_attention_heads=HEADS,
                              attention_window=[2 * WINDOW], attention_probs_dropout_prob=0.0)
    made = LongformerSelfAttention(config, layer_id=0).double()
    with torch.no_grad():
        for parameter in made.parameters():
            # as large as the weights of a trained layer: the softmax is not flat
            parameter.normal_(0, 0.5)
    return made


def theirs(layer, x, lengths, held, dout):
    """Output, and gradients of the input and of every weight and bias."""
    import torch

    marks = np.where(held, 10000.0, 0.0)
    marks[np.arange(N) >= np.asarray(lengths)[:, None]] = -10000.0
    marks = torch.asarray(marks)
    hidden = torch.tensor(x, requires_grad=True)
    layer.zero_grad()
    out, = layer(hidden, attention_mask=marks, is_index_masked=marks < 0,
                 is_index_global_attn=marks > 0, is_global_attn=bool(held.any()))
    out.backward(torch.asarray(dout))
    found = {"x": hidden.grad.numpy()}
    for name, parameter in layer.named_parameters():
        missing = parameter.grad is None
        found[name] = np.zeros(parameter.shape) if missing else parameter.grad.numpy()
    return out.detach().numpy(), found


def ours(layer, x, lengths, held, dout, backend):
    """The same by longformer_attention, between projections written here."""
    weights = {name: p.detach().numpy() for name, p in layer.named_parameters()}

    def split(y):
        return np.swapaxes(y.reshape(*y.shape[:2], HEADS, -1), 1, 2)

    def joined(y):
        return np.swapaxes(y, 1, 2).reshape(*x.shape)

    arrays = [split(x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"])
              for name in PROJECTIONS]
    with pyattn.use_backend(backend):
        out, saved = pyattn.longformer_attention.forward(
            *arrays, window=WINDOW, global_index=held, kv_lengths=lengths)
        grads = saved.backward(split(dout))
    found = {"x": np.zeros_like(x)}
    for name, gradient in zip(PROJECTIONS, grads, strict=True):
        dy = joined(gradient)
        found["x"] += dy @ weights[f"{name}.weight"]
        found[f"{name}.weight"] = np.einsum("bno,bni->oi", dy, x)
        found[f"{name}.bias"] = dy.sum(axis=(0, 1))
    return joined(out), found


@pytest.mark.parametrize("backend", ["cpu", "array_api"])
@pytest.mark.parametrize("lengths", [(N, N), (N, 29)], ids=str)
@pytest.mark.parametrize("tokens", [([], []), ([0], [0]), ([0, 5, 40], [17])], ids=str)
def test_longformer_self_attention(layer, tokens, lengths, backend, monkeypatch):
    import torch

    softmax = torch.nn.functional.softmax
    # the layer asks for float32, in which all rounds and its -1e308 of float64 becomes -inf
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype: softmax(x, dim=dim))
    held = np.zeros((2, N), bool)
    for item, index in enumerate(tokens):
        held[item, index] = True
    rng = np.random.default_rng(0)
    x, dout = rng.standard_normal((2, 2, N, WIDTH))
    want, wanted = theirs(layer, x, lengths, held, dout)
    out, grads = ours(layer, x, lengths, held, dout, backend)
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-12)
    assert grads.keys() == wanted.keys()
    for name, gradient in wanted.items():
        np.testing.assert_allclose(grads[name], gradient, rtol=0, atol=1e-11, err_msg=name)
