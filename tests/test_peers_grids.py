"""Swin, axial attention and TimeSformer against code that nobody here wrote, with its weights."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from public_code import close, torch_in_float64  # noqa: F401

import pyattn
from pyattn import layers

pytestmark = pytest.mark.peers

BACKENDS = ["cpu", "array_api"]


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def models(name):
    """The module of a model in transformers."""
    pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its import warns of is its own affair
        return pytest.importorskip(f"transformers.models.{name}.modeling_{name}")


def unsettled(module, torch):
    """A module in float64, in evaluation, with no parameter at 0 or 1."""
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module


def leaf(torch, x):
    return torch.tensor(x, requires_grad=True)


def joined(linears, part):
    """The weights, or biases, of several linear maps side by side, as x @ w has them."""
    return np.concatenate([getattr(x, part).detach().numpy().T for x in linears], axis=-1)


def gradient(linears, part):
    return np.concatenate([getattr(x, part).grad.numpy().T for x in linears], axis=-1)


def swin_weights(layer, pick):
    """The parameters of a Swin layer, or their gradients, by our names."""
    attention = layer.attention
    found = {f"norm{i}_{ours}": pick([getattr(layer, f"layernorm_{place}")], theirs)
             for i, place in ((1, "before"), (2, "after"))
             for ours, theirs in (("gamma", "weight"), ("beta", "bias"))}
    maps = {"qkv": [attention.q_proj, attention.k_proj, attention.v_proj],
            "o": [attention.o_proj]}
    found |= {f"{ours}_{name}": pick(linears, theirs) for name, linears in maps.items()
              for ours, theirs in (("w", "weight"), ("b", "bias"))}
    found |= {f"{ours}{i}": pick([getattr(layer.mlp, f"fc{i}")], theirs) for i in (1, 2)
              for ours, theirs in (("w", "weight"), ("b", "bias"))}
    return found


def swin_layer(torch, shape, window, shift):
    """A layer of transformers on its SDPA, as its own softmax is in float32."""
    swin = models("swin")
    from transformers import SwinConfig

    config = SwinConfig(image_size=8, patch_size=1, embed_dim=8, depths=[2], num_heads=[2],
                        window_size=window, hidden_dropout_prob=0.0, drop_path_rate=0.0)
    config._attn_implementation = "sdpa"
    return unsettled(swin.SwinLayer(config, 8, shape, 2, 0.0, shift), torch)


SHAPES = [((8, 8), 4), ((6, 10), 4), ((7, 9), 3), ((14, 7), 7), ((4, 4), 4)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("shape", "window"), SHAPES, ids=str)
def test_transformers_swin_layer(shape, window, shifted, backend, torch):
    shift = window // 2 if shifted else 0
    layer = swin_layer(torch, shape, window, shift)
    x, dout = draw(2, *shape, 8), draw(2, *shape, 8, seed=1)
    theirs = leaf(torch, x.reshape(2, -1, 8))
    wanted = layer(theirs, shape)[0]
    wanted.backward(torch.tensor(dout.reshape(2, -1, 8)))
    table = layer.attention.relative_position_bias.relative_position_bias_table
    params = {**swin_weights(layer, joined), "bias_table": table.detach().numpy()}
    with pyattn.use_backend(backend):
        out, saved = layers.swin_block.forward(x, params, num_heads=2, window=window, shift=shift,
                                               reference=True)
        grads = saved.backward(dout)
    close(out.reshape(2, -1, 8), wanted)
    close(grads.x.reshape(2, -1, 8), theirs.grad)
    for name, want in {**swin_weights(layer, gradient), "bias_table": table.grad}.items():
        close(grads.params[name], torch.as_tensor(want), name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("shape", "window"), SHAPES, ids=str)
def test_transformers_swin_attention(shape, window, shifted, backend, torch):
    """Without the projections, which are made the identity and, for padding, have no biases."""
    shift = window // 2 if shifted else 0
    swin = models("swin")
    layer = swin_layer(torch, shape, window, shift)
    layer.set_shift_and_window_size(shape)
    attention = layer.attention
    with torch.no_grad():
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            linear.weight.copy_(torch.eye(8))
            linear.bias.zero_()
    x, dout = draw(2, *shape, 8), draw(2, *shape, 8, seed=1)
    theirs = leaf(torch, x)
    padded, _ = layer.maybe_pad(theirs, *shape)
    cut = swin.window_partition(layer.cyclic_shift(padded), window).reshape(-1, window * window, 8)
    found = attention(cut, layer.get_attn_mask(*padded.shape[1:3], torch.float64, "cpu"))[0]
    found = swin.window_reverse(found.reshape(-1, window, window, 8), window, *padded.shape[1:3])
    wanted = layer.cyclic_shift(found, reverse=True)[:, :shape[0], :shape[1]]
    wanted.backward(torch.tensor(dout))
    table = attention.relative_position_bias.relative_position_bias_table

    def heads(x):
        return x.reshape(2, -1, 2, 4).swapaxes(1, 2)

    with pyattn.use_backend(backend):
        out, saved = pyattn.swin_attention.forward(
            *3 * [heads(x)], table.detach().numpy(), shape=shape, window=window, shift=shift,
            reference=True)
        grads = saved.backward(heads(dout))
    close(out, torch.as_tensor(heads(wanted.detach().numpy())))
    close(grads.q + grads.k + grads.v, torch.as_tensor(heads(theirs.grad.numpy())))
    close(grads.bias_table, table.grad)


@pytest.mark.parametrize("image", [(6, 8), (5, 7)])
def test_transformers_patch_merging(image, torch):
    merging = unsettled(models("swin").SwinPatchMerging(4), torch)
    x = draw(2, *image, 4)
    theirs = leaf(torch, x.reshape(2, -1, 4))
    wanted = merging(theirs, image)
    dout = draw(*wanted.shape, seed=1)
    wanted.backward(torch.tensor(dout))
    norm, reduction = [merging.norm], [merging.reduction]
    out, saved = layers.patch_merging.forward(x, joined(norm, "weight"), joined(norm, "bias"),
                                              joined(reduction, "weight"))
    grads = saved.backward(dout.reshape(out.shape))
    close(out.reshape(wanted.shape), wanted)
    close(grads.x.reshape(2, -1, 4), theirs.grad)
    for got, (module, part) in zip(grads[1:], ((norm, "weight"), (norm, "bias"),
                                               (reduction, "weight")), strict=True):
        close(got, torch.as_tensor(gradient(module, part)))


@pytest.mark.parametrize("mode", ["sum", "sequential"])
def test_axial_attention_package(mode, torch):
    """Its layers project for each axis; sequential ones give a layer's output to the next."""
    package = pytest.importorskip("axial_attention")
    module = unsettled(package.AxialAttention(8, num_dimensions=2, heads=2, dim_index=-1,
                                              sum_axial_out=mode == "sum"), torch)
    x, dout = draw(2, 5, 7, 8), draw(2, 5, 7, 8, seed=1)
    theirs = leaf(torch, x)
    wanted = module(theirs)
    wanted.backward(torch.tensor(dout))
    tokens, given = x.reshape(2, 35, 8), dout.reshape(2, 35, 8)
    kept, total = [], 0
    for axis, permuted in enumerate(module.axial_attentions):
        maps = permuted.fn
        found, saved = layers.multi_head.forward(
            tokens, joined([maps.to_q, maps.to_kv], "weight"), joined([maps.to_out], "weight"),
            None, joined([maps.to_out], "bias"), num_heads=2, attention=pyattn.axial_attention,
            shape=(5, 7), axes=[axis])
        kept.append((maps, saved))
        total = total + found
        tokens = tokens if mode == "sum" else found
    close((total if mode == "sum" else tokens).reshape(x.shape), wanted)
    dx = 0
    for maps, saved in reversed(kept):
        grads = saved.backward(given)
        close(grads.w_qkv, torch.as_tensor(gradient([maps.to_q, maps.to_kv], "weight")))
        close(grads.w_o, torch.as_tensor(gradient([maps.to_out], "weight")))
        if mode == "sum":
            dx = dx + grads.x
        else:
            dx = given = grads.x
    close(dx.reshape(x.shape), theirs.grad)


def timesformer_weights(layer, pick):
    """The parameters of a TimeSformer layer, or their gradients, by our names."""
    found = {}
    for name, module in (("norm1", layer.layernorm_before), ("norm2", layer.layernorm_after),
                         ("temporal_norm", layer.temporal_layernorm)):
        found |= {f"{name}_gamma": pick([module], "weight"), f"{name}_beta": pick([module], "bias")}
    attentions = {"": layer.attention, "temporal_": layer.temporal_attention}
    maps = {f"{prefix}*_{name}": module for prefix, attention in attentions.items()
            for name, module in (("qkv", attention.attention.qkv), ("o", attention.output.dense))}
    maps |= {"*_temporal": layer.temporal_dense, "*1": layer.intermediate.dense,
             "*2": layer.output.dense}
    return found | {name.replace("*", letter): pick([module], part) for name, module in maps.items()
                    for letter, part in (("w", "weight"), ("b", "bias"))}


@pytest.mark.parametrize("backend", BACKENDS)
def test_transformers_timesformer_layer(backend, torch):
    timesformer = models("timesformer")
    from transformers import TimesformerConfig

    frames, side = 3, 2
    config = TimesformerConfig(image_size=side, patch_size=1, num_frames=frames, hidden_size=8,
                               num_attention_heads=2, intermediate_size=12, num_hidden_layers=1)
    layer = unsettled(timesformer.TimesformerLayer(config, 0), torch)
    x, dout = draw(2, 1 + frames * side**2, 8), draw(2, 1 + frames * side**2, 8, seed=1)

    def by_place(x):
        """Its tokens lie place by place, ours frame by frame."""
        video = x[:, 1:].reshape(2, frames, side**2, 8).swapaxes(1, 2)
        return np.concatenate([x[:, :1], video.reshape(2, -1, 8)], axis=1)

    theirs = leaf(torch, by_place(x))
    wanted = layer(theirs)[0]
    wanted.backward(torch.tensor(by_place(dout)))
    with pyattn.use_backend(backend):
        out, saved = layers.timesformer_block.forward(
            x, timesformer_weights(layer, joined), frames=frames, num_heads=2,
            eps=config.layer_norm_eps)
        grads = saved.backward(dout)
    close(by_place(out), wanted)
    close(by_place(grads.x), theirs.grad)
    for name, want in timesformer_weights(layer, gradient).items():
        close(grads.params[name], torch.as_tensor(want), name)
