"""Against code that nobody here wrote: torch's and JAX's attention, and ONNX's node tests."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import pyattn
from pyattn import masks

pytestmark = pytest.mark.peers

BACKENDS = ["cpu", "array_api"]


def draw(*shape, seed=0, dtype="f8"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def gradients_of_torch(function, arrays, dout):
    torch = pytest.importorskip("torch")
    leaves = {name: torch.tensor(x, requires_grad=True) for name, x in arrays.items()}
    out = function(torch, **leaves)
    out.backward(torch.asarray(dout))
    return out.detach().numpy(), {name: x.grad.numpy() for name, x in leaves.items()}


KEEP = np.random.default_rng(5).random((2, 1, 33, 50)) < 0.6
SDPA = {
    "dense": ({}, {}, 33),
    "scale": ({"scale": 0.4}, {"scale": 0.4}, 33),
    "causal": ({"is_causal": True}, {"causal": "top_left"}, 33),
    "causal_square": ({"is_causal": True}, {"causal": True}, 50),
    "mask": ({"attn_mask": KEEP}, {"mask": KEEP}, 33),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SDPA)
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_torch_sdpa(name, groups, backend):
    theirs, ours, n = SDPA[name]
    arrays = {
        "q": draw(2, 4, n, 16),
        "k": draw(2, groups, 50, 16, seed=1),
        "v": draw(2, groups, 50, 24, seed=2),
    }
    dout = draw(2, 4, n, 24, seed=3)

    def sdpa(torch, q, k, v):
        options = {
            key: torch.asarray(x) if isinstance(x, np.ndarray) else x for key, x in theirs.items()
        }
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)

    want, wanted = gradients_of_torch(sdpa, arrays, dout)
    with pyattn.use_backend(backend):
        out, saved = pyattn.attention.forward(**arrays, **ours)
        grads = saved.backward(dout)
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-13)
    for key, gradient in wanted.items():
        np.testing.assert_allclose(getattr(grads, key), gradient, rtol=0, atol=1e-12, err_msg=key)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 4, 33, 50), (4, 33, 50), (1, 1, 1, 50), (2, 1, 33, 1)])
def test_torch_bias_gradient(shape, backend):
    arrays = {
        "q": draw(2, 4, 33, 16),
        "k": draw(2, 4, 50, 16, seed=1),
        "v": draw(2, 4, 50, 24, seed=2),
        "bias": draw(*shape, seed=4),
    }
    dout = draw(2, 4, 33, 24, seed=3)

    def plain(torch, q, k, v, bias):
        return torch.softmax(q @ k.mT * 16**-0.5 + bias, dim=-1) @ v

    want, wanted = gradients_of_torch(plain, arrays, dout)
    with pyattn.use_backend(backend):
        out, saved = pyattn.attention.forward(**arrays)
        grads = saved.backward(dout)
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-13)
    for key, gradient in wanted.items():
        np.testing.assert_allclose(getattr(grads, key), gradient, rtol=0, atol=1e-12, err_msg=key)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:flex_attention called")
def test_torch_flex_attention(backend):
    """ALiBi, softcap and a window of FlexAttention, forward: its CPU path has no backward."""
    torch = pytest.importorskip("torch")
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    q, k, v = (torch.asarray(draw(2, 4, 40, 16, seed=s, dtype="f4")) for s in range(3))
    slopes = torch.asarray([0.5, 0.25, 0.125, 0.0625])

    def score(s, b, h, i, j):
        return 2.0 * torch.tanh(s / 2.0) - slopes[h] * (i - j).abs()

    window = flex.create_block_mask(
        lambda b, h, i, j: (i >= j) & (i - j <= 9), None, None, 40, 40, device="cpu"
    )
    want = flex.flex_attention(q, k, v, score_mod=score, block_mask=window)
    with pyattn.use_backend(backend):
        out = pyattn.attention(
            *(x.numpy() for x in (q, k, v)),
            causal=True,
            window=9,
            softcap=2.0,
            alibi_slopes=slopes.numpy(),
        )
    np.testing.assert_allclose(out, want.numpy(), rtol=0, atol=2e-6)


JAX = {
    "dense": ({}, {}),
    "causal": ({"is_causal": True}, {"causal": "top_left"}),
    "window": ({"local_window_size": (3, 2)}, {"window": (3, 2)}),
    "lengths": (
        {"query_seq_lengths": np.array([20, 31]), "key_value_seq_lengths": np.array([25, 40])},
        {"kv_lengths": [25, 40]},
    ),
}


@pytest.mark.parametrize("name", JAX)
def test_jax_dot_product_attention(name):
    jax = pytest.importorskip("jax")
    theirs, ours = JAX[name]
    q, k, v = (
        draw(2, 40, 4, 16, dtype="f4"),
        draw(2, 40, 2, 16, seed=1, dtype="f4"),
        draw(2, 40, 2, 16, seed=2, dtype="f4"),
    )
    dout = draw(2, 40, 4, 16, seed=3, dtype="f4")
    if name == "lengths":
        # padded queries are unspecified there
        dout[0, 20:], dout[1, 31:] = 0, 0
    want, pullback = jax.vjp(lambda *x: jax.nn.dot_product_attention(*x, **theirs), q, k, v)
    out, saved = pyattn.attention.forward(*(np.swapaxes(x, 1, 2) for x in (q, k, v)), **ours)
    live = np.any(dout != 0, axis=(2, 3))
    np.testing.assert_allclose(
        np.swapaxes(out, 1, 2)[live], np.asarray(want)[live], rtol=0, atol=2e-6
    )
    for ours_, theirs_ in zip(saved.backward(np.swapaxes(dout, 1, 2)), pullback(dout), strict=True):
        np.testing.assert_allclose(np.swapaxes(ours_, 1, 2), theirs_, rtol=0, atol=1e-5)


def onnx_cases():
    try:
        from onnx.backend.test.case.node import collect_testcases
    except ImportError:
        return []
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ONNX makes the cases of all its other nodes as well
        cases = collect_testcases("Attention")
    for case in cases:
        nodes = case.model.graph.node
        if len(nodes) == 1 and nodes[0].op_type == "Attention":
            found.append(pytest.param(case, id=case.name.removeprefix("test_attention_")))
    return found


ONNX = onnx_cases()


def onnx_call(case):
    """The node's inputs as a call of `pyattn.attention`."""
    from onnx.helper import get_attribute_value

    node = case.model.graph.node[0]
    options = {a.name: get_attribute_value(a) for a in node.attribute}
    inputs, outputs = case.data_sets[0]
    given = dict(zip([name for name in node.input if name], inputs, strict=True))
    wanted = dict(zip([name for name in node.output if name], outputs, strict=True))
    q, k, v = given["Q"], given["K"], given["V"]
    flat = q.ndim == 3
    if flat:
        heads, groups = options["q_num_heads"], options["kv_num_heads"]
        q, k, v = (
            np.swapaxes(x.reshape(*x.shape[:2], h, -1), 1, 2)
            for x, h in ((q, heads), (k, groups), (v, groups))
        )
    past = 0
    if "past_key" in given:
        past = given["past_key"].shape[2]
        k, v = (
            np.concatenate([given["past_key"], k], axis=2),
            np.concatenate([given["past_value"], v], axis=2),
        )
    n, m = q.shape[2], k.shape[2]
    call = {}
    if "scale" in options:
        call["scale"] = options["scale"]
    if options.get("softcap"):
        call["softcap"] = options["softcap"]
    pattern = masks.full()
    if options.get("is_causal"):
        pattern = pattern & masks.causal()
    left, right = (options.get(f"{side}_window_size", -1) for side in ("left", "right"))
    pattern = pattern & masks.window(*(None if reach < 0 else reach for reach in (left, right)))
    if "nonpad_kv_seqlen" in given:
        call["kv_lengths"] = given["nonpad_kv_seqlen"]
    else:
        pattern = masks.placed(pattern, past)  # query i stands at past + i, whatever M - N is
    if "attn_mask" in given:
        mask = given["attn_mask"]
        missing = m - mask.shape[-1]
        width = [(0, 0)] * (mask.ndim - 1) + [(0, missing)]
        if mask.dtype == bool:
            pattern = pattern & masks.dense(np.pad(mask, width))
        else:
            call["bias"] = np.pad(mask.astype("f4"), width, constant_values=-np.inf)
    out, weights = pyattn.attention(q, k, v, mask=pattern, return_weights=True, **call)
    if flat:
        out = np.swapaxes(out, 1, 2).reshape(*out.shape[:1], n, -1)
    return out, weights, wanted, options


@pytest.mark.skipif(not ONNX, reason="onnx is not installed")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ONNX)
def test_onnx_node(case, backend):
    with pyattn.use_backend(backend):
        out, weights, wanted, options = onnx_call(case)
    want = wanted["Y"]
    assert out.dtype == want.dtype
    tolerance = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}[out.dtype.name]
    np.testing.assert_allclose(out.astype("f8"), want.astype("f8"), rtol=0, atol=tolerance)
    if options.get("qk_matmul_output_mode") == 3:
        np.testing.assert_allclose(
            weights.astype("f8"), wanted["qk_matmul_output"].astype("f8"), rtol=0, atol=tolerance
        )
