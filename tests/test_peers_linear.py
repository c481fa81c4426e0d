"""Linear and efficient attention against code that nobody here wrote: forward and gradients.

linear-attention-transformer and flash-linear-attention bring much that these tests do not need;
``.ci/run`` has the command that installs them alone.
"""

from __future__ import annotations

import numpy as np
import pytest
from public_code import close, module, module_of_file, torch_in_float64  # noqa: F401

import pyattn
from pyattn.engines import linear as engine
from pyattn.features.feature_maps import FeatureMap

pytestmark = pytest.mark.peers

BACKENDS = ["cpu", "array_api"]

LUCIDRAINS = "linear_attention_transformer.linear_attention_transformer"


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padded", [False, True])
def test_efficient_attention_of_lucidrains(torch, padded, backend):
    rival = module(LUCIDRAINS).linear_attn
    given = [draw(2, 3, 70, 16, seed=seed) for seed in range(3)]
    lengths = [70, 41] if padded else None
    tensors = [torch.tensor(x, requires_grad=True) for x in given]
    mask = torch.arange(70) < torch.tensor(lengths)[:, None] if padded else None
    # it masks its arguments in place, and divides by the root of the width
    wanted = rival(*(x.clone() for x in tensors), mask) * 16 ** 0.5
    dout = draw(2, 3, 70, 16, seed=3)
    wanted.backward(torch.tensor(dout))
    with pyattn.use_backend(backend):
        out, saved = pyattn.efficient_attention.forward(*given, kv_lengths=lengths)
        grads = saved.backward(dout)
    close(out, wanted, "out")
    for name, x, tensor in zip("qkv", grads, tensors, strict=True):
        close(x, tensor.grad, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_linear_attention_of_lucidrains(torch, backend):
    """Its buckets of one token see themselves; larger ones see earlier buckets alone."""
    rival = module(LUCIDRAINS).causal_linear_attn
    q, k, v = (draw(2, 3, 70, 16, seed=seed) for seed in range(3))
    phi_q, phi_k = torch.softmax(torch.tensor(q), -1).numpy(), np.exp(k)
    tensors = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    wanted = rival(*tensors, bucket_size=1)
    dout = draw(2, 3, 70, 16, seed=3)
    wanted.backward(torch.tensor(dout))
    with pyattn.use_backend(backend):
        out, saved = pyattn.linear_attention.forward(phi_q, phi_k, v, feature_map="identity",
                                                     causal=True)
        found = saved.backward(dout)
    close(out, wanted, "out")
    close(found.v, tensors[2].grad, "v")
    close(found.k * phi_k, tensors[1].grad, "k")
    dq = phi_q * (found.q - (phi_q * found.q).sum(axis=-1, keepdims=True))
    close(dq, tensors[0].grad, "q")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_chunks_of_flash_linear_attention(torch, normalize, backend):
    rival = module_of_file("fla", "ops/linear_attn/naive.py").naive_chunk_linear_attn
    # theirs are (batch, tokens, heads, width); with normalize their denominators lack the scale
    q, k, v = (np.abs(draw(2, 128, 3, 16, seed=seed)) for seed in range(3))
    tensors = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    wanted = rival(*tensors, scale=1.0, normalize=normalize)
    dout = draw(2, 128, 3, 16, seed=3)
    wanted.backward(torch.tensor(dout))
    with pyattn.use_backend(backend):
        out, saved = pyattn.linear_attention.forward(
            *(x.swapaxes(1, 2) for x in (q, k, v)), feature_map="identity", causal=True,
            normalize=normalize, epsilon=1e-10 if normalize else 0.0)
        grads = saved.backward(dout.swapaxes(1, 2))
    close(out.swapaxes(1, 2), wanted, "out")
    for name, x, tensor in zip("qkv", grads, tensors, strict=True):
        close(x.swapaxes(1, 2), tensor.grad, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_of_flash_linear_attention(torch, backend):
    rival = module_of_file("fla", "ops/linear_attn/naive.py").naive_recurrent_linear_attn
    q, k, v = (np.abs(draw(2, 40, 3, 16, seed=seed)).astype(np.float32) for seed in range(3))
    state = np.abs(draw(2, 3, 16, 17, seed=4)).astype(np.float32)
    tensors = [torch.tensor(x) for x in (q, k, v)]
    before = torch.tensor(state[..., :16]), torch.tensor(state[..., 16])[:, None]
    wanted, after = rival(*tensors, scale=1.0, initial_state=before, output_final_state=True,
                          normalize=True)
    with pyattn.use_backend(backend):
        out, found = pyattn.linear_attention(
            *(x.swapaxes(1, 2) for x in (q, k, v)), feature_map="identity", causal=True,
            epsilon=1e-10, state=state, return_state=True)
    # it computes in float32
    close(out.swapaxes(1, 2), wanted, "out", atol=2e-5)
    close(found[..., :16], after[0], "state", atol=2e-5)
    close(found[..., 16], after[1][:, 0], "sums", atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_onnx_linear_attention(heads, backend):
    pytest.importorskip("onnx")
    reference = pytest.importorskip("onnx.reference.ops.op_linear_attention").LinearAttention
    (h, g), rng = heads, np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 30, heads * width)).astype(np.float32)
               for heads, width in ((h, 8), (g, 8), (g, 5)))
    past = rng.standard_normal((2, g, 8, 5)).astype(np.float32)
    wanted, present = reference._run(None, q, k, v, past, q_num_heads=h, kv_num_heads=g,
                                     update_rule="linear")
    apart = [x.reshape(2, 30, count, -1).swapaxes(1, 2) for x, count in ((q, h), (k, g), (v, g))]
    with pyattn.use_backend(backend):
        (out, state), _ = engine.forward(
            8**-0.5 * apart[0], *apart[1:], feature_map=FeatureMap("identity"), causal=True,
            normalize=False, state=past, return_state=True)
    np.testing.assert_allclose(out.swapaxes(1, 2).reshape(2, 30, -1), wanted, rtol=0, atol=2e-5)
    np.testing.assert_allclose(state, present, rtol=0, atol=2e-5)
