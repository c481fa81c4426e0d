"""Linformer and Performer against code that nobody here wrote: forward and gradients.

linformer and performer-pytorch bring much that these tests do not need; ``.ci/run`` has the command
that installs them alone.
"""

from __future__ import annotations

import functools
import inspect

import numpy as np
import pytest
from public_code import close, leaves, module, torch_in_float64  # noqa: F401

import pyattn
from pyattn.features import random_features, random_projection

pytestmark = pytest.mark.peers

BACKENDS = ["cpu", "array_api"]


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


# lucidrains' linformer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("m", "share", "one_head"), [
    (40, False, False), (33, False, False), (40, True, False), (21, True, True),
    (40, False, True)])
def test_linformer(torch, m, share, one_head, backend):
    """Tokens go to the heads by its own code; its keys are its values where they are shared."""
    heads, width, rank, groups = 4, 6, 5, 1 if one_head else 4
    layer = module("linformer.linformer").LinformerSelfAttention(
        heads * width, 40, k=rank, heads=heads, one_kv_head=one_head, share_kv=share)
    q, k, v = draw(2, 17, heads * width), *draw(2, 2, m, groups * width, seed=1)
    given = leaves(torch, q, k) if share else leaves(torch, q, k, v)
    for name, x in zip(("to_q", "to_k", "to_v"), given, strict=False):
        delattr(layer, name)
        setattr(layer, name, lambda _, x=x: x)
    layer.to_out = torch.nn.Identity()
    out = layer(given[0], context=given[1])
    dout = draw(*out.shape, seed=2)
    out.backward(torch.tensor(dout))

    def split(x):
        return np.swapaxes(x.reshape(*x.shape[:2], -1, width), 1, 2)

    def joined(x):
        return np.swapaxes(x, 1, 2).reshape(x.shape[0], x.shape[2], -1)

    mixing = [p.detach().numpy().T for p in ([layer.proj_k] if share else
                                             [layer.proj_k, layer.proj_v])]
    with pyattn.use_backend(backend):
        got, saved = pyattn.linformer_attention.forward(
            split(q), split(k), split(k if share else v), *mixing)
        grads = saved.backward(split(dout))
    close(joined(got), out, "out")
    close(joined(grads.q), given[0].grad, "q")
    dk, dv = joined(grads.k), joined(grads.v)
    for name, x, gradient in zip("kv", given[1:], [dk + dv] if share else [dk, dv], strict=False):
        close(gradient, x.grad, name)
    close(grads.e.T, layer.proj_k.grad, "e")
    if not share:
        close(grads.f.T, layer.proj_v.grad, "f")


# lucidrains' performer-pytorch


def performer_module(monkeypatch, *, whole):
    """Its module; `whole` keeps the stabiliser in the gradient, where it has a part."""
    performer = module("performer_pytorch.performer_pytorch")
    if whole:
        source = inspect.getsource(performer.softmax_kernel)
        assert source.count(".detach()") == 2
        own = dict(vars(performer))
        exec(source.replace(".detach()", ""), own)
        monkeypatch.setattr(performer, "softmax_kernel", own["softmax_kernel"])
    return performer


@pytest.mark.parametrize(("stabiliser", "is_query"), [("token", True), ("sequence", False)])
@pytest.mark.parametrize("epsilon", [1e-4, 0.03])
def test_softmax_features(torch, monkeypatch, stabiliser, is_query, epsilon):
    performer = performer_module(monkeypatch, whole=True)
    x, w = draw(2, 3, 11, 6), draw(9, 6, seed=1)
    [given] = leaves(torch, x)
    want = performer.softmax_kernel(given, projection_matrix=torch.tensor(w), is_query=is_query,
                                    eps=epsilon)
    dout = draw(*want.shape, seed=2)
    want.backward(torch.tensor(dout))
    got, saved = random_features.forward(x, w, stabiliser=stabiliser, reference=True,
                                         epsilon=epsilon)
    close(got, want)
    close(saved.backward(dout).x, given.grad)


def test_relu_features(torch, monkeypatch):
    performer = performer_module(monkeypatch, whole=True)
    x, w = draw(2, 3, 11, 6), draw(9, 6, seed=1)
    [given] = leaves(torch, x)
    want = performer.generalized_kernel(given, projection_matrix=torch.tensor(w))
    dout = draw(*want.shape, seed=2)
    want.backward(torch.tensor(dout))
    got, saved = random_features.forward(x, w, kernel="relu")
    close(got, want)
    close(saved.backward(dout).x, given.grad)


def fast_attention(torch, monkeypatch, w, *, causal, kernel="softmax", epsilon=None, whole=True):
    """Its attention with these directions; nothing is added to a causal denominator."""
    performer = performer_module(monkeypatch, whole=whole)
    if epsilon is not None:
        name = "softmax_kernel" if kernel == "softmax" else "generalized_kernel"
        key = "eps" if kernel == "softmax" else "kernel_epsilon"
        monkeypatch.setattr(performer, name, functools.partial(getattr(performer, name),
                                                               **{key: epsilon}))
    monkeypatch.setattr(performer, "causal_linear_attention_noncuda", functools.partial(
        performer.causal_linear_attention_noncuda, eps=0.0, chunk_size=3))
    layer = performer.FastAttention(w.shape[1], nb_features=len(w), causal=causal,
                                    generalized_attention=kernel == "relu")
    layer.projection_matrix.copy_(torch.tensor(w))
    return layer


def compare(torch, layer, w, backend, shape=(2, 3, 22, 6), *, atol=1e-11, factor=1.0, **options):
    q, k, v, dout = draw(4, *shape)
    q, k = factor * q, factor * k
    given = leaves(torch, q, k, v)
    want = layer(*given)
    want.backward(torch.tensor(dout))
    with pyattn.use_backend(backend):
        out, saved = pyattn.performer_attention.forward(q, k, v, projection=w, **options)
        grads = saved.backward(dout)
    close(out, want, "out", atol)
    for name, x, gradient in zip("qkv", given, grads, strict=True):
        close(gradient, x.grad, name, atol)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("epsilon", [None, 0.02])
def test_performer_as_it_is(torch, monkeypatch, causal, epsilon, backend):
    """With its epsilon, and its largest exponent over a sequence's keys."""
    w = draw(19, 6, seed=1)
    layer = fast_attention(torch, monkeypatch, w, causal=causal, epsilon=epsilon)
    compare(torch, layer, w, backend, causal=causal, reference=True, epsilon=epsilon)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_performer_without_its_epsilon(torch, monkeypatch, causal, factor, backend):
    """Then every stabiliser cancels, and so does its gradient, which that code leaves out."""
    w = draw(19, 6, seed=1)
    layer = fast_attention(torch, monkeypatch, w, causal=causal, epsilon=0.0, whole=False)
    compare(torch, layer, w, backend, causal=causal, factor=factor)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("epsilon", [None, 0.3])
def test_performer_of_the_relu_kernel(torch, monkeypatch, causal, epsilon, backend):
    w = draw(19, 6, seed=1)
    layer = fast_attention(torch, monkeypatch, w, causal=causal, kernel="relu", epsilon=epsilon)
    compare(torch, layer, w, backend, causal=causal, kernel="relu", epsilon=epsilon)


def test_what_that_code_s_gradient_lacks(torch, monkeypatch):
    """Its stabiliser is a constant to it: off by hundredths, with its epsilon of 1e-4."""
    w = draw(19, 6, seed=1)
    layer = fast_attention(torch, monkeypatch, w, causal=False, whole=False)
    with pytest.raises(AssertionError, match="Mismatched elements"):
        compare(torch, layer, w, "array_api", reference=True)
    compare(torch, layer, w, "array_api", reference=True, atol=0.1)


@pytest.mark.parametrize("scaling", [0, 1])
def test_its_directions_are_drawn_alike(torch, scaling):
    performer = module("performer_pytorch.performer_pytorch")
    theirs = performer.gaussian_orthogonal_random_matrix(2400, 6, scaling=scaling).numpy()
    ours = random_projection(2400, 6, scaling=scaling, rng=0)
    for start in range(0, 2400, 6):
        for block in (theirs[start:start + 6], ours[start:start + 6]):
            products = block @ block.T
            np.testing.assert_allclose(products, np.diag(np.diag(products)), atol=1e-12)
    squares = [np.sort((w**2).sum(axis=1)) for w in (theirs, ours)]
    if scaling:
        np.testing.assert_allclose(squares[0], squares[1])
    else:
        # of one distribution: their largest distance, by Kolmogorov and Smirnov
        both = np.concatenate(squares)
        shares = [np.searchsorted(x, both, side="right") / 2400 for x in squares]
        assert abs(shares[0] - shares[1]).max() < 1.63 * np.sqrt(2 / 2400)
