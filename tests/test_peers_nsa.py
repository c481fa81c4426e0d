"""Native sparse attention against public code: fla's naive functions, and lucidrains' layer."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import pyattn
from pyattn.layers import nsa_layer

pytestmark = pytest.mark.peers

BACKENDS = ["cpu", "array_api"]


@pytest.fixture
def naive(monkeypatch):
    """fla's naive NSA. Its package needs triton, and mean pooling is a kernel there."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("einops")
    spec = importlib.util.find_spec("fla")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("fla is not installed")

    def mean_pooling(x, size, cu_seqlens=None):
        # of a block that is not full fla takes the mean; it is never visible
        return torch.stack([part.mean(1) for part in x.split(size, dim=1)], dim=1)

    for name, contents in (("fla", {}), ("fla.ops", {}),
                           ("fla.ops.utils", {"prepare_chunk_offsets": None}),
                           ("fla.ops.utils.pooling", {"mean_pooling": mean_pooling})):
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    path = Path(next(iter(spec.submodule_search_locations)), "ops/nsa/naive.py")
    if not path.exists():
        pytest.skip("this fla has no naive NSA")
    spec = importlib.util.spec_from_file_location("fla_naive_nsa", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.warns(ImportWarning, match="Flash Attention"):
        spec.loader.exec_module(module)
    # it computes in float32 whatever it is given
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    return module.naive_nsa


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [1, 2])
def test_fla(naive, groups, backend):
    """Compressed and selected branch, and the lists; blocks of 8 are compressed and selected."""
    import torch

    rng = np.random.default_rng(0)
    n, heads, size, count = 75, 16 * groups, 8, 4
    shapes = {"q": (2, heads, n, 8), "k": (2, groups, n, 8), "v": (2, groups, n, 8)}
    given = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    gates = rng.uniform(0, 1, (2, heads, n, 3))
    gates[..., 2] = 0                       # its window needs flash_attn
    dout = rng.standard_normal((2, heads, n, 8))

    held = {name: torch.tensor(np.swapaxes(x, 1, 2), requires_grad=True)
            for name, x in given.items()}
    g_cmp, g_slc = (torch.tensor(np.swapaxes(gates[..., c], 1, 2), requires_grad=True)
                    for c in range(2))
    want, lists = naive(**held, g_cmp=g_cmp, g_slc=g_slc, block_counts=count, block_size=size,
                        return_block_indices=True)
    want.backward(torch.tensor(np.swapaxes(dout, 1, 2)))

    with pyattn.use_backend(backend):
        out, saved = pyattn.nsa_attention.forward(
            **given, gates=gates, block_size=size, stride=size, select_block=size,
            num_selected=count, num_initial=1, num_local=2, window=3)
        grads = saved.backward(dout)
    chosen = np.swapaxes(np.sort(lists.numpy(), axis=-1), 1, 2)
    np.testing.assert_array_equal(np.sort(saved.decisions["blocks"], axis=-1), chosen)
    np.testing.assert_allclose(out, np.swapaxes(want.detach().numpy(), 1, 2), rtol=0, atol=1e-12)
    for name in "qkv":
        np.testing.assert_allclose(getattr(grads, name),
                                   np.swapaxes(held[name].grad.numpy(), 1, 2), rtol=0, atol=1e-11)
    for c, gate in enumerate((g_cmp, g_slc)):
        np.testing.assert_allclose(grads.gates[..., c], np.swapaxes(gate.grad.numpy(), 1, 2),
                                   rtol=0, atol=1e-11)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_lucidrains(groups, backend, monkeypatch):
    """The layer, selected and window branch, with its lists. Compressed it attends to a learned
    token besides, and sees a block one step later."""
    torch = pytest.importorskip("torch")
    package = pytest.importorskip("native_sparse_attention_pytorch")
    torch.manual_seed(0)
    n, heads, size, window = 44, 4, 8, 10
    layer = package.SparseAttention(
        dim=12, dim_head=6, heads=heads, kv_heads=groups, sliding_window_size=window,
        compress_block_size=size, compress_block_sliding_stride=size, selection_block_size=size,
        num_selected_blocks=2, causal=True, norm=False).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.5)
        gate = layer.to_strategy_combine[0]
        gate.weight[0::3], gate.bias[0::3] = 0.0, -1e9
    monkeypatch.setattr(layer.rotary_emb, "rotate_queries_with_cached_keys", lambda q, k: (q, k))
    found = []
    top = torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk",
                        lambda x, *a, **b: found.append(top(x, *a, **b)) or found[-1])

    rng = np.random.default_rng(0)
    x, dout = rng.standard_normal((2, 2, n, 12))
    held = torch.tensor(x, requires_grad=True)
    want = layer(held)
    want.backward(torch.tensor(dout))
    [(values, indices)] = found
    own = np.broadcast_to(np.arange(n)[:, None] // size, (2, groups, n, 1))
    blocks = np.concatenate([np.where(values.detach().numpy() > 1e-10, indices.numpy(), -1), own],
                            axis=-1)

    def turned(linear):
        return linear.weight.detach().numpy().T

    w_qkv = turned(layer.to_qkv)
    params = {"w_q": w_qkv[:, :heads * 6], "w_kv": w_qkv[:, heads * 6:],
              "w_o": turned(layer.combine_heads), "w_gate": turned(gate),
              "b_gate": gate.bias.detach().numpy()}
    with pyattn.use_backend(backend):
        out, saved = nsa_layer.forward(
            x, params, num_heads=heads, num_kv_heads=groups, window=window, block_size=size,
            stride=size, select_block=size, decisions={"blocks": blocks})
        grads = saved.backward(dout)
    np.testing.assert_allclose(out, want.detach().numpy(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(grads.x, held.grad.numpy(), rtol=0, atol=1e-11)
    wanted = {"w_o": layer.combine_heads.weight.grad.T, "w_gate": gate.weight.grad.T,
              "b_gate": gate.bias.grad}
    wanted |= dict(zip(("w_q", "w_kv"), layer.to_qkv.weight.grad.T.split(
        [heads * 6, 2 * groups * 6], dim=1), strict=True))
    for name, gradient in wanted.items():
        np.testing.assert_allclose(grads.params[name], gradient.numpy(), rtol=0, atol=1e-11,
                                   err_msg=name)
