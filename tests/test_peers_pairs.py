"""Additive and talking-heads attention against code that nobody here wrote: OpenNMT-py and timm.

Both packages import much that these classes do not use, so each class is taken from its file alone;
``.ci/run`` has the command that installs them.
"""

from __future__ import annotations

import numpy as np
import pytest
from public_code import close, definition, torch_in_float64  # noqa: F401

import pyattn

pytestmark = pytest.mark.peers

BACKENDS = ["cpu", "array_api"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padded", [False, True])
def test_bahdanau_attention_of_opennmt(torch, padded, backend):
    functional = torch.nn.functional
    mask = definition("onmt", "utils/misc.py", "sequence_mask", torch=torch)
    layer = definition("onmt", "modules/global_attention.py", "GlobalAttention", torch=torch,
                       nn=torch.nn, F=functional, sequence_mask=mask)(9, attn_type="mlp")
    queries, sources = torch.randn(3, 40, 9), torch.randn(3, 70, 9)
    for x in (queries, sources):
        x.requires_grad_()
    # the layer's last projection is none of attention's business: it passes the context on
    with torch.no_grad():
        layer.v.weight *= 5
        layer.linear_out.weight.copy_(torch.eye(9, 18))
        layer.linear_out.bias.zero_()
    lengths = torch.tensor([70, 33, 1]) if padded else None
    wanted, weights = layer(queries, sources, lengths)
    dout = torch.randn(3, 40, 9)
    wanted.backward(dout)

    w_q, w_k, w, b = (x.detach().numpy() for x in (
        layer.linear_query.weight.T, layer.linear_context.weight.T, layer.v.weight[0],
        layer.linear_query.bias))
    q, k = (x.detach().numpy()[:, None] for x in (queries, sources))
    options = {"kv_lengths": lengths.numpy()} if padded else {}
    with pyattn.use_backend(backend):
        out, saved = pyattn.additive_attention.forward(q, k, k, w_q, w_k, w, b, **options)
        found = saved.backward(dout.numpy()[:, None])
        each = pyattn.additive_attention(q, k, np.broadcast_to(np.eye(70), (3, 1, 70, 70)), w_q,
                                         w_k, w, b, **options)
    close(out[:, 0], wanted, "out")
    close(each[:, 0], weights, "weights")
    close(found.q[:, 0], queries.grad, "q")
    close((found.k + found.v)[:, 0], sources.grad, "k and v")
    close(found.w_q.T, layer.linear_query.weight.grad, "w_q")
    close(found.w_k.T, layer.linear_context.weight.grad, "w_k")
    close(found.w_score, layer.v.weight.grad[0], "w_score")
    close(found.b, layer.linear_query.bias.grad, "b")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [1, 4])
def test_talking_heads_of_cait(torch, heads, backend):
    layer = definition("timm", "models/cait.py", "TalkingHeadAttn", torch=torch,
                       nn=torch.nn)(24, num_heads=heads, qkv_bias=True)
    layer.proj = torch.nn.Identity()
    x = torch.randn(2, 70, 24, requires_grad=True)
    with torch.no_grad():
        layer.qkv.weight *= 4
        layer.proj_l.weight *= 4
    wanted = layer(x)
    dout = torch.randn(2, 70, 24)
    wanted.backward(dout)

    def by_head(y):
        return np.swapaxes(y.reshape(2, 70, heads, 24 // heads), 1, 2)

    weight, bias = (y.detach().numpy() for y in (layer.qkv.weight, layer.qkv.bias))
    q, k, v = (by_head(y) for y in np.split(x.detach().numpy() @ weight.T + bias, 3, axis=-1))
    w_pre, b_pre, w_post, b_post = (y.detach().numpy() for y in (
        layer.proj_l.weight.T, layer.proj_l.bias, layer.proj_w.weight.T, layer.proj_w.bias))
    with pyattn.use_backend(backend):
        out, saved = pyattn.talking_heads_attention.forward(q, k, v, w_pre, w_post, b_pre, b_post)
        found = saved.backward(by_head(dout.numpy()))
    close(np.swapaxes(out, 1, 2).reshape(2, 70, 24), wanted, "out")
    gradient = np.concatenate([np.swapaxes(y, 1, 2).reshape(2, 70, 24)
                               for y in (found.q, found.k, found.v)], axis=-1)
    close(gradient @ weight, x.grad, "x")
    close(gradient.sum(axis=(0, 1)), layer.qkv.bias.grad, "q, k and v")
    close(found.w_pre.T, layer.proj_l.weight.grad, "w_pre")
    close(found.w_post.T, layer.proj_w.weight.grad, "w_post")
    close(found.b_pre, layer.proj_l.bias.grad, "b_pre")
    close(found.b_post, layer.proj_w.bias.grad, "b_post")
