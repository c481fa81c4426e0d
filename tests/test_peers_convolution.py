"""Convolutions, channel gates and the GRU against code that nobody here wrote.

fairseq-light has fairseq's modules for dynamic and lightweight convolution, and timm the gates;
both bring much that these tests do not need, so their modules are loaded without the packages'
own imports.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types

import numpy as np
import pytest
from public_code import close, torch_in_float64  # noqa: F401

import pyattn
from pyattn import layers

pytestmark = pytest.mark.peers

BACKENDS = ["cpu", "array_api"]


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def from_package(package, module, monkeypatch, **attributes):
    """A module of an installed package, with the package's own imports left out."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    [folder] = spec.submodule_search_locations
    parts = module.split(".")[:-1]
    for depth in range(len(parts)):
        name = ".".join(parts[:depth + 1])
        stub = types.ModuleType(name)
        stub.__path__ = ["/".join([folder, *parts[1:depth + 1]])]
        monkeypatch.setitem(sys.modules, name, stub)
    for name, value in attributes.items():
        setattr(sys.modules[package], name, value)
        monkeypatch.setitem(sys.modules, f"{package}.{name}", value)
    before = set(sys.modules)
    found = importlib.import_module(module)
    for name in set(sys.modules) - before:
        if name.startswith(package):
            del sys.modules[name]
    return found


def fairseq(module, monkeypatch):
    utils = types.ModuleType("fairseq.utils")
    utils.softmax = lambda x, dim, onnx_trace: x.softmax(dim)
    return from_package("fairseq", f"fairseq.modules.{module}", monkeypatch, utils=utils)


# fairseq


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("causal", "renorm", "unfold"), [
    (False, False, True), (True, False, True), (False, False, False), (True, False, False),
    (False, True, False), (True, True, False)])
def test_dynamic_convolution_is_fairseq_s(torch, backend, causal, renorm, unfold, monkeypatch):
    module = fairseq("dynamic_convolution", monkeypatch)
    n, b, c, heads, taps = 33, 2, 12, 3, 7
    theirs = module.DynamicConv1dTBC(
        c, taps, padding_l=taps - 1 if causal else taps // 2, num_heads=heads, weight_softmax=True,
        renorm_padding=renorm, bias=True)
    x = torch.tensor(draw(n, b, c), requires_grad=True)
    wanted = theirs(x, unfold=unfold)
    dout = draw(n, b, c, seed=1)
    wanted.backward(torch.tensor(dout))
    w, bias = (p.detach().numpy() for p in theirs.weight_linear.parameters())
    ours = np.swapaxes(x.detach().numpy(), 0, 1)
    with pyattn.use_backend(backend):
        logits, mapped = layers.linear.forward(ours, w.T, bias)
        out, saved = pyattn.dynamic_convolution.forward(
            ours, logits.reshape(b, n, heads, taps), causal=causal, renorm_padding=renorm)
        grads = saved.backward(np.swapaxes(dout, 0, 1))
    more = mapped.backward(grads.kernel_logits.reshape(b, n, heads * taps))
    close(out, wanted.transpose(0, 1))
    close(grads.x + more.x, x.grad.transpose(0, 1))
    close(more.w, theirs.weight_linear.weight.grad.T)
    close(more.b, theirs.weight_linear.bias.grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_lightweight_convolution_is_fairseq_s(torch, backend, causal, monkeypatch):
    module = fairseq("lightweight_convolution", monkeypatch)
    n, b, c, heads, taps = 33, 2, 12, 3, 7
    theirs = module.LightweightConv1dTBC(
        c, taps, padding_l=taps - 1 if causal else taps // 2, num_heads=heads, weight_softmax=True)
    x = torch.tensor(draw(n, b, c), requires_grad=True)
    wanted = theirs(x)
    wanted.backward(torch.ones_like(wanted))
    with pyattn.use_backend(backend):
        out, saved = pyattn.lightweight_convolution.forward(
            np.swapaxes(x.detach().numpy(), 0, 1), theirs.weight.detach().numpy()[:, 0],
            causal=causal)
        grads = saved.backward(np.ones_like(out))
    close(out, wanted.transpose(0, 1))
    close(grads.x, x.grad.transpose(0, 1))
    close(grads.kernel_logits, theirs.weight.grad[:, 0])


# Hugging Face ConvBERT


def test_span_convolution_and_mixed_heads_are_convbert_s(torch):
    convbert = pytest.importorskip("transformers.models.convbert.modeling_convbert")
    config = pytest.importorskip("transformers").ConvBertConfig(
        hidden_size=24, num_attention_heads=4, head_ratio=2, conv_kernel_size=5,
        attention_probs_dropout_prob=0.0)
    theirs = convbert.ConvBertSelfAttention(config)
    for p in theirs.parameters():
        p.data.normal_()
    x = torch.tensor(draw(2, 11, 24), requires_grad=True)
    wanted = theirs(x)[0]
    dout = draw(*wanted.shape, seed=1)
    wanted.backward(torch.tensor(dout))

    def t(p):
        return p.detach().numpy().T.copy()

    key = theirs.key_conv_attn_layer
    q, k, v = (getattr(theirs, name) for name in ("query", "key", "value"))
    width = t(q.weight).shape[1]
    conv = {"w_q": t(q.weight), "b_q": t(q.bias), "w_depthwise": t(key.depthwise.weight)[:, 0],
            "w_pointwise": t(key.pointwise.weight)[0],
            "b_pointwise": key.bias.detach().numpy()[:, 0],
            "w_kernel": t(theirs.conv_kernel_layer.weight),
            "b_kernel": t(theirs.conv_kernel_layer.bias),
            "w_v": t(theirs.conv_out_layer.weight), "b_v": t(theirs.conv_out_layer.bias)}
    ours = x.detach().numpy()
    y, saved = layers.span_convolution.forward(ours, conv, num_heads=2)
    close(y, wanted[..., width:])
    grads = saved.backward(dout[..., width:])
    close(grads.params["w_kernel"], theirs.conv_kernel_layer.weight.grad.T)
    close(grads.params["w_depthwise"], key.depthwise.weight.grad[:, 0].T)
    close(grads.params["w_pointwise"], key.pointwise.weight.grad[..., 0].T)
    close(grads.params["b_pointwise"], key.bias.grad[:, 0])
    close(grads.params["w_v"], theirs.conv_out_layer.weight.grad.T)
    # both kinds of heads, side by side: an output matrix for each shows them apart
    eye = np.eye(2 * width)
    attention = {"w_qkv": np.concatenate([t(p.weight) for p in (q, k, v)], axis=1),
                 "b_qkv": np.concatenate([t(p.bias) for p in (q, k, v)]), "w_o": eye[:width]}
    params = {"attention": attention, "convolution": conv | {"w_o": eye[width:]}}
    y, saved = layers.mixed_heads.forward(ours, params, num_heads=2)
    close(y, wanted)
    grads = saved.backward(dout)
    close(grads.x, x.grad)
    # there both kinds of heads share their queries
    shared = grads.params["attention"]["w_qkv"][:, :width] + grads.params["convolution"]["w_q"]
    close(shared, q.weight.grad.T)


# torch


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [1, 6])
def test_conv1d_is_torch_s(torch, backend, groups):
    theirs = torch.nn.Conv1d(6, 6, 5, padding="same", groups=groups)
    x = torch.tensor(draw(2, 6, 40), requires_grad=True)
    wanted = theirs(x)
    wanted.backward(torch.ones_like(wanted))
    w = theirs.weight.detach().numpy().T
    with pyattn.use_backend(backend):
        y, saved = layers.conv1d.forward(np.swapaxes(x.detach().numpy(), 1, 2),
                                         w[:, 0] if groups > 1 else w,
                                         theirs.bias.detach().numpy())
        grads = saved.backward(np.ones_like(y))
    close(y, wanted.transpose(1, 2))
    close(grads.x, x.grad.transpose(1, 2))
    dw = theirs.weight.grad.permute(2, 1, 0)
    close(grads.w, dw[:, 0] if groups > 1 else dw)
    close(grads.b, theirs.bias.grad)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [
    ((3, 3), 1, (1, 1)), ((3, 3), 2, (1, 1)), ((4, 2), 3, (2, 1)), ((7, 7), 1, (3, 3)),
    ((2, 2), 2, (0, 0))])
def test_conv2d_is_torch_s(torch, kernel, stride, padding):
    theirs = torch.nn.Conv2d(3, 4, kernel, stride=stride, padding=padding)
    x = torch.tensor(draw(2, 3, 11, 9), requires_grad=True)
    wanted = theirs(x)
    dout = draw(*wanted.shape, seed=1)
    wanted.backward(torch.tensor(dout))
    y, saved = layers.conv2d.forward(x.detach().numpy(), theirs.weight.detach().numpy().transpose(
        2, 3, 1, 0), theirs.bias.detach().numpy(), stride=stride, padding=padding)
    grads = saved.backward(dout)
    close(y, wanted)
    close(grads.x, x.grad)
    close(grads.w, theirs.weight.grad.permute(2, 3, 1, 0))
    close(grads.b, theirs.bias.grad)


@pytest.mark.parametrize("bias", [True, False])
def test_gru_is_torch_s(torch, bias):
    theirs = torch.nn.GRU(5, 7, batch_first=True, bias=bias)
    x, state = (torch.tensor(draw(*shape), requires_grad=True) for shape in ((3, 20, 5), (1, 3, 7)))
    wanted, _ = theirs(x, state)
    dout = draw(3, 20, 7, seed=1)
    wanted.backward(torch.tensor(dout))
    names = {"w_x": "weight_ih_l0", "w_h": "weight_hh_l0"}
    names |= {"b_x": "bias_ih_l0", "b_h": "bias_hh_l0"} if bias else {}
    weights = {ours: getattr(theirs, name) for ours, name in names.items()}
    h, saved = layers.gru.forward(
        x.detach().numpy(), **{name: w.detach().numpy().T for name, w in weights.items()},
        state=state.detach().numpy()[0])
    grads = saved.backward(dout)
    close(h, wanted)
    close(grads.x, x.grad)
    close(grads.state, state.grad[0])
    for name, w in weights.items():
        close(getattr(grads, name), w.grad.mT if w.ndim == 2 else w.grad, name)


# timm


def timm(name, monkeypatch):
    class Absent(types.ModuleType):
        """torchvision, of which only names are needed, as classes that nothing is one of."""

        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    for module in ("torchvision", "torchvision.ops", "torchvision.ops.misc"):
        monkeypatch.setitem(sys.modules, module, Absent(module))
    return from_package("timm", f"timm.layers.{name}", monkeypatch)


def test_squeeze_excite_is_timm_s(torch, monkeypatch):
    theirs = timm("squeeze_excite", monkeypatch).SEModule(12, rd_channels=5)
    x = torch.tensor(draw(2, 12, 6, 7), requires_grad=True)
    wanted = theirs(x)
    dout = draw(2, 12, 6, 7, seed=1)
    wanted.backward(torch.tensor(dout))
    first, second = theirs.fc1, theirs.fc2
    out, saved = pyattn.squeeze_excite.forward(
        x.detach().numpy(), first.weight.detach().numpy()[..., 0, 0].T,
        first.bias.detach().numpy(), second.weight.detach().numpy()[..., 0, 0].T,
        second.bias.detach().numpy())
    grads = saved.backward(dout)
    close(out, wanted)
    close(grads.x, x.grad)
    close(grads.w1, first.weight.grad[..., 0, 0].T)
    close(grads.b1, first.bias.grad)
    close(grads.w2, second.weight.grad[..., 0, 0].T)
    close(grads.b2, second.bias.grad)


@pytest.mark.parametrize("training", [True, False])
def test_cbam_is_timm_s(torch, training, monkeypatch):
    theirs = timm("cbam", monkeypatch).CbamModule(12, rd_channels=5).train(training)
    norm, conv = theirs.spatial.conv.bn, theirs.spatial.conv.conv
    for p in (norm.weight, norm.bias, norm.running_mean):
        p.data.normal_()
    statistics = None if training else (norm.running_mean.item(), norm.running_var.item())
    x = torch.tensor(draw(2, 12, 6, 7), requires_grad=True)
    wanted = theirs(x)
    dout = draw(2, 12, 6, 7, seed=1)
    wanted.backward(torch.tensor(dout))
    first, second = theirs.channel.fc1.weight, theirs.channel.fc2.weight
    out, saved = pyattn.cbam.forward(
        x.detach().numpy(), first.detach().numpy()[..., 0, 0].T, None,
        second.detach().numpy()[..., 0, 0].T, None,
        conv.weight.detach().numpy()[0], norm.weight.detach().numpy(),
        norm.bias.detach().numpy(), order="mean_max", statistics=statistics, eps=norm.eps)
    grads = saved.backward(dout)
    close(out, wanted)
    close(grads.x, x.grad)
    close(grads.w1, first.grad[..., 0, 0].T)
    close(grads.w2, second.grad[..., 0, 0].T)
    close(grads.w_spatial, conv.weight.grad[0])
    close(grads.gamma, norm.weight.grad)
    close(grads.beta, norm.bias.grad)
