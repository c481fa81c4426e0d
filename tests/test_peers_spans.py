"""Spans, gates and pruning against torch: its autograd, its distributions, its pruning.

The authors' code of adaptive span is in no package; here is the published formula, written once
more in torch as a module that masks and then divides by what is left, for its autograd to judge.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from public_code import close, leaves, torch_in_float64  # noqa: F401

import pyattn
from pyattn import features

pytestmark = pytest.mark.peers

BACKENDS = ["cpu", "array_api"]


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def span_attention(torch, q, k, v, span, ramp, *, include_self):
    """Equations 1 to 3 of the paper, weights renormalised after the softmax as its code does."""
    n = q.shape[-2]
    place = torch.arange(n)
    distance = place[:, None] - place
    seen = distance >= (0 if include_self else 1)
    if not include_self:
        distance = distance - 1
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~seen, -1e30)
    weights = torch.softmax(scores, -1) * seen
    soft = torch.clamp((span[..., None] - distance) / ramp + 1, min=0, max=1)
    weights = weights * soft
    total = weights.sum(-1, keepdim=True)
    return (weights / torch.where(total == 0, 1.0, total)) @ v


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_spans_by_the_paper(torch, dynamic, include_self, backend):
    shape = (2, 3, 90) if dynamic else (3,)
    given = [*(draw(2, 3, 90, 8, seed=s) for s in range(3)),
             np.random.default_rng(3).uniform(0, 60, shape)]
    variant = pyattn.dynamic_span_attention if dynamic else pyattn.adaptive_span_attention
    with pyattn.use_backend(backend):
        out, saved = variant.forward(*given, ramp=16, include_self=include_self)
        dout = draw(*out.shape, seed=5)
        grads = saved.backward(dout)
    arguments = leaves(torch, *given)
    *qkv, span = arguments
    wanted = span_attention(torch, *qkv, span if dynamic else span[:, None], 16,
                            include_self=include_self)
    close(out, wanted)
    wanted.backward(torch.tensor(dout))
    for name, x, y in zip(grads._fields, grads, arguments, strict=True):
        close(x, y.grad, name)


def test_dynamic_spans(torch):
    x, w, b = draw(2, 5, 4), draw(4, 3, seed=1), draw(3, seed=2)
    span, saved = features.dynamic_spans.forward(x, w, b, max_span=40)
    arguments = leaves(torch, x, w, b)
    wanted = 40 * torch.sigmoid(torch.nn.functional.linear(
        arguments[0], arguments[1].T, arguments[2])).transpose(-1, -2)
    close(span, wanted)
    dout = draw(*span.shape, seed=4)
    wanted.backward(torch.tensor(dout))
    for x, y in zip(saved.backward(dout), arguments, strict=True):
        close(x, y.grad)


@pytest.mark.parametrize("hard", [True, False])
def test_binary_concrete_is_the_gumbel_softmax_of_two_classes(torch, hard):
    """Of the same Gumbel noise: that torch draws after the same seed."""
    alpha = draw(3, 50, 2)
    torch.manual_seed(7)
    (logits,) = leaves(torch, alpha)
    wanted = torch.nn.functional.gumbel_softmax(logits, tau=0.6, hard=hard)[..., 1]
    torch.manual_seed(7)
    gumbel = -torch.empty_like(logits).exponential_().log().detach().numpy()
    gates, saved = features.binary_concrete.forward(
        alpha[..., 1] - alpha[..., 0], temperature=0.6, hard=hard,
        decisions={"noise": gumbel[..., 1] - gumbel[..., 0]})
    close(gates, wanted)
    dout = draw(*gates.shape, seed=1)
    wanted.backward(torch.tensor(dout))
    close(saved.backward(dout).logits, logits.grad[..., 1])


def test_binary_concrete_has_the_density_that_torch_gives(torch):
    draws = features.binary_concrete(np.full(20000, 0.4), temperature=0.7, rng=0)
    law = torch.distributions.RelaxedBernoulli(torch.tensor(0.7, dtype=torch.float64),
                                               logits=torch.tensor(0.4, dtype=torch.float64))
    edges = np.linspace(0, 1, 11)
    found = np.histogram(draws, edges)[0] / 20000
    fine = np.linspace(1e-6, 1 - 1e-6, 20001)
    density = np.exp(law.log_prob(torch.tensor(fine)).numpy())
    wanted = [np.trapezoid(density[(fine >= a) & (fine <= b)], fine[(fine >= a) & (fine <= b)])
              for a, b in itertools.pairwise(edges)]
    assert abs(found - wanted).max() < 4 * math.sqrt(0.25 / 20000)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["concrete", "hard_concrete"])
def test_gates_of_blocks_inside_the_softmax(torch, kind, backend):
    n, size, blocks = 70, 16, 5
    given = [*(draw(2, 3, n, 8, seed=s) for s in range(3)), draw(3, blocks, blocks, seed=3)]
    with pyattn.use_backend(backend):
        out, saved = pyattn.gated_attention.forward(*given, block_size=size, kind=kind, rng=0,
                                                    causal=True)
        dout = draw(*out.shape, seed=5)
        grads = saved.backward(dout)
    arguments = leaves(torch, *given)
    q, k, v, logits = arguments
    noise = torch.tensor(saved.decisions["noise"])
    s = torch.sigmoid((logits + noise) / (1 if kind == "concrete" else 2 / 3))
    gates = s if kind == "concrete" else torch.clamp(s * 1.2 - 0.1, 0, 1)
    gates = torch.where(torch.eye(blocks, dtype=bool), 1.0, gates)
    block = torch.arange(n) // size
    gates = gates[:, block][:, :, block] * torch.ones(n, n).tril()
    weights = torch.exp(q @ k.transpose(-1, -2) / math.sqrt(8)) * gates
    wanted = weights / weights.sum(-1, keepdim=True) @ v
    close(out, wanted)
    wanted.backward(torch.tensor(dout))
    for name, x, y in zip(grads._fields, grads, arguments, strict=True):
        close(x, y.grad, name)


def test_the_penalty_and_the_policy(torch):
    logits = draw(4, 5)
    (a,) = leaves(torch, logits)
    penalty, saved = features.l0_penalty.forward(logits, temperature=0.5)
    wanted = torch.sigmoid(a - 0.5 * math.log(0.1 / 1.1)).sum()
    close(penalty, wanted)
    wanted.backward()
    close(saved.backward().logits, a.grad)
    a.grad = None
    law = torch.distributions.Bernoulli(logits=a)
    gates = np.random.default_rng(0).random((4, 5)) < 0.5
    (law.log_prob(torch.tensor(gates).double()).sum() * (3.0 - 1.0)).backward()
    close(features.policy_gradient(logits, gates, 3.0, baseline=1.0), a.grad)


@pytest.mark.parametrize("additive", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sparsebert_with_a_matrix_of_distances(torch, backend, additive):
    n = 60
    given = [*(draw(2, 3, n, 8, seed=s) for s in range(3)), draw(3, n, 2, seed=3)]
    with pyattn.use_backend(backend):
        out, saved = pyattn.sparsebert_attention.forward(*given, rng=0, additive=additive)
        dout = draw(*out.shape, seed=5)
        grads = saved.backward(dout)
    arguments = leaves(torch, *given)
    q, k, v, alpha = arguments
    noise = torch.tensor(saved.decisions["noise"])
    soft = torch.sigmoid(alpha[..., 1] - alpha[..., 0] + noise)
    gates = (soft > 0.5).double() - soft.detach() + soft
    place = torch.arange(n)
    mask = gates[:, (place[:, None] - place).abs()]
    scores = q @ k.transpose(-1, -2) / math.sqrt(8)
    if additive:
        weights = torch.softmax(scores - 1e4 * (1 - mask), -1)
    else:
        weights = torch.exp(scores) * mask
        weights = weights / weights.sum(-1, keepdim=True)
    wanted = weights @ v
    # what is left of 1 - (1 - soft + soft) has 1e4 in front
    np.testing.assert_allclose(out, wanted.detach().numpy(), rtol=0, atol=1e-10)
    wanted.backward(torch.tensor(dout))
    for name, x, y in zip(grads._fields, grads, arguments, strict=True):
        y = y.grad.numpy()
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-10 * max(1, abs(y).max()), err_msg=name)


def test_weights_of_largest_magnitude(torch):
    prune = pytest.importorskip("torch.nn.utils.prune")
    layer = torch.nn.Linear(30, 20)
    kept = features.prune_weights(layer.weight.detach().numpy(), 0.35)
    prune.l1_unstructured(layer, "weight", amount=0.35)
    assert (kept == layer.weight_mask.numpy().astype(bool)).all()
