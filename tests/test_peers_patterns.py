"""Fixed patterns against code that nobody here wrote, with the same numbers going in."""

from __future__ import annotations

import numpy as np
import pytest

import pyattn

pytestmark = pytest.mark.peers

BACKENDS = ["cpu", "array_api"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_random", [1, 3])
def test_bigbird_is_that_of_transformers(backend, num_random):
    torch = pytest.importorskip("torch")
    big_bird = pytest.importorskip("transformers.models.big_bird.modeling_big_bird")
    heads, width, size, tokens = 3, 8, 4, 64
    config = big_bird.BigBirdConfig(
        hidden_size=heads * width,
        num_attention_heads=heads,
        block_size=size,
        num_random_blocks=num_random,
        max_position_embeddings=tokens,
    )
    torch.manual_seed(0)
    theirs = big_bird.BigBirdBlockSparseAttention(config, seed=1).double().train()

    plans, projected = [], {}
    draw_plan = theirs._bigbird_block_rand_mask_with_head

    def record_plan(**options):
        plans.append(draw_plan(**options))
        return plans[-1]

    theirs._bigbird_block_rand_mask_with_head = record_plan
    for name in ("query", "key", "value"):
        getattr(theirs, name).register_forward_hook(
            lambda module, given, out, name=name: (projected.update({name: out}), out)[1]
        )
    blocked, band, rows, columns = big_bird.BigBirdModel.create_masks_for_block_sparse_attn(
        torch.ones(2, tokens, dtype=torch.float64), size
    )
    x = torch.randn(2, tokens, heads * width, dtype=torch.float64)
    out, _ = theirs(x, band, rows, columns, blocked, blocked)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, [projected[name] for name in ("query", "key", "value")], dout)

    def by_head(tensor):
        return tensor.detach().numpy().reshape(2, tokens, heads, width).swapaxes(1, 2)

    blocks = np.full((heads, tokens // size, num_random), -1)
    blocks[:, 1:-1] = np.stack(plans[0])
    with pyattn.use_backend(backend):
        ours, saved = pyattn.bigbird_attention.forward(
            *(by_head(projected[name]) for name in ("query", "key", "value")),
            block_size=size,
            num_random=num_random,
            decisions={"blocks": blocks},
        )
        found = saved.backward(by_head(dout))
    np.testing.assert_allclose(ours, by_head(out), rtol=0, atol=1e-12)
    for got, want in zip(found, grads, strict=True):
        np.testing.assert_allclose(got, by_head(want), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("causal", "look"), [(True, 1), (True, 2), (False, 1)])
def test_sliding_window_is_local_attention_of_exact_size(backend, causal, look):
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("local_attention")
    theirs = peer.LocalAttention(
        window_size=8,
        causal=causal,
        look_backward=look,
        exact_windowsize=True,
        use_rotary_pos_emb=False,
    )
    leaves = [torch.randn(2, 3, 80, 16, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    out = theirs(*leaves)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, dout)
    with pyattn.use_backend(backend):
        ours, saved = pyattn.sliding_window_attention.forward(
            *(x.detach().numpy() for x in leaves), window=8 * look, causal=causal
        )
        found = saved.backward(dout.numpy())
    np.testing.assert_allclose(ours, out.detach().numpy(), rtol=0, atol=1e-12)
    for got, want in zip(found, grads, strict=True):
        np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=1e-12)
